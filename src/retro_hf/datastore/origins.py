"""Where a datastore comes from: what its manifest says of the tokenizer, the embedder and the sources of its documents."""

from __future__ import annotations

import importlib.metadata
import os
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from .chunks import tokenizer_fingerprint, vocabulary_size
from .fields import integer, object_of, of_type, sha256, text, without_lone_surrogates


if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from .embedder import ChunkEmbedder

__all__ = ["check_origins", "describe_embedder", "describe_tokenizer", "library_version", "unique_sources"]

_ORIGIN = ("name", "revision", "fingerprint")
_SOURCE = ("config", "revision", "license")
_MAX_DIM = 1 << 16
_MAX_SOURCES = 1000
_MORE_SOURCES = {"name": "and more, which the table of documents names"}


def describe_tokenizer(tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    """What a manifest says of a tokenizer."""
    return {
        "name": _portable_name(tokenizer.name_or_path),
        "revision": getattr(tokenizer, "init_kwargs", {}).get("revision"),
        "fingerprint": tokenizer_fingerprint(tokenizer),
        "vocab_size": vocabulary_size(tokenizer),
    }


def describe_embedder(embedder: ChunkEmbedder) -> dict[str, Any]:
    """What a manifest says of an embedder; of prompts and queries only where there is something to say."""
    content: dict[str, Any] = {
        "name": _portable_name(embedder.name_or_path),
        "revision": embedder.revision,
        "fingerprint": embedder.fingerprint,
        "dim": embedder.dim,
        "pooling": embedder.pooling,
        "dtype": str(embedder.dtype).removeprefix("torch."),
    }
    if embedder.prompt:
        content["prompt"] = embedder.prompt
    if not embedder.symmetric:
        other = embedder.query_encoder
        content["query"] = {
            "name": _portable_name(other.name_or_path) if other else None,
            "revision": other.revision if other else None,
            "fingerprint": embedder.query_fingerprint,
            "prompt": embedder.query_prompt,
        }
    return content


def _portable_name(name_or_path: str) -> str:
    """A Hub name as it is; of a local folder only its last part, since a datastore travels."""
    if os.path.isabs(name_or_path) or os.path.exists(name_or_path):
        name_or_path = os.path.basename(os.path.normpath(name_or_path))
    return without_lone_surrogates(name_or_path)


def library_version() -> str:
    """The version of this package, for manifests."""
    try:
        return importlib.metadata.version("retro-hf")
    except importlib.metadata.PackageNotFoundError:
        return "unknown"


def unique_sources(sources: Iterable[dict[str, str]]) -> list[dict[str, str]]:
    """Each source once, in their order. Of more than 1,000 the rest is one entry that says so: the table of documents names all."""
    unique = list({tuple(sorted(source.items())): source for source in sources}.values())
    named = [source for source in unique if source != _MORE_SOURCES][:_MAX_SOURCES]
    return named if len(named) == len(unique) else [*named, _MORE_SOURCES]


def check_origins(content: dict[str, Any]) -> None:
    """Check the fields `tokenizer`, `embedder` and `sources` of a manifest; ValueError for what is not as described here."""
    tokenizer = object_of(content, "tokenizer", (*_ORIGIN, "vocab_size"))
    embedder = object_of(content, "embedder", (*_ORIGIN, "dim", "pooling", "dtype"), ("prompt", "query"))
    for part in (tokenizer, embedder):
        text(part, "name")
        text(part, "revision", optional=True)
        sha256(part, "fingerprint")
    integer(tokenizer, "vocab_size", 1, 1 << 32)
    integer(embedder, "dim", 1, _MAX_DIM)
    text(embedder, "pooling")
    text(embedder, "dtype")
    text(embedder, "prompt", optional=True)
    if "query" in embedder:
        query = object_of(embedder, "query", (*_ORIGIN, "prompt"))
        text(query, "name", optional=True)
        text(query, "revision", optional=True)
        sha256(query, "fingerprint")
        text(query, "prompt")
    for number, source in enumerate(of_type(content, "sources", list)):
        label = f"source {number}"
        for name in object_of({label: source}, label, ("name",), _SOURCE):
            text(source, name)
