"""Whether a datastore fits a language model's tokenizer and sizes, and the embedder of the queries."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from transformers import AutoTokenizer

from ..errors import DatastoreInputError, DatastoreMismatchError, PretrainedNotFoundError
from .chunks import tokenizer_fingerprint, vocabulary_size


if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from .embedder import ChunkEmbedder
    from .manifest import DatastoreManifest
    from .store import RetroDatastore

__all__ = ["check_compatible", "load_tokenizer"]


def load_tokenizer(tokenizer: PreTrainedTokenizerBase | str | os.PathLike[str]) -> PreTrainedTokenizerBase:
    """The tokenizer as it is, or the one of that name: a folder, or a model on the Hub.

    Raises:
        PretrainedNotFoundError: if there is no tokenizer of that name, or no vocabulary in it.
    """
    if not isinstance(tokenizer, (str, os.PathLike)):
        if not hasattr(tokenizer, "get_vocab"):
            raise DatastoreInputError(
                f"The tokenizer is of type {type(tokenizer).__name__}. Pass the tokenizer itself, or its folder or Hub name."
            )
        return tokenizer
    try:
        loaded = AutoTokenizer.from_pretrained(tokenizer)
        # Where a folder has a model but no vocabulary, transformers makes one up of the family's special tokens.
        if len(loaded) <= len(set(loaded.all_special_ids)):
            raise ValueError("there is no vocabulary, such as a tokenizer.json")
    except (OSError, ValueError) as error:
        raise PretrainedNotFoundError.for_name("tokenizer", str(tokenizer), error) from error
    return loaded


def check_compatible(
    datastore: RetroDatastore,
    *,
    tokenizer: PreTrainedTokenizerBase | None = None,
    chunk_size: int | None = None,
    neighbor_size: int | None = None,
    embedder: ChunkEmbedder | None = None,
) -> None:
    """Check that a datastore fits a language model's tokenizer and sizes, and the embedder of the queries.

    Raises:
        DatastoreMismatchError: for the first that it was not built with; names both sides, what would go wrong, and the
            remedy.
    """
    path, manifest = datastore.path, datastore.manifest
    for name, wanted, known in (
        ("chunk_size", chunk_size, manifest.chunk_size),
        ("neighbor_size", neighbor_size, manifest.neighbor_size),
    ):
        if wanted is not None and wanted != known:
            raise DatastoreMismatchError(
                f"The datastore {str(path)!r} was built with {name}={known}, but {name}={wanted} is expected. "
                f"Neighbors would be cut at the wrong borders. Rebuild it with {name}={wanted}, or use a model with "
                f"{name}={known}."
            )
    if tokenizer is not None:
        _check_tokenizer(path, manifest, tokenizer)
    if embedder is not None:
        _check_embedder(path, manifest.embedder, embedder)


def _check_embedder(path: Path, made: dict[str, Any], embedder: ChunkEmbedder) -> None:
    if embedder.fingerprint != made["fingerprint"]:
        raise DatastoreMismatchError(
            f"The keys of the datastore {str(path)!r} were made by the embedder {made['name']!r} (dim={made['dim']}, "
            f"fingerprint {made['fingerprint'][:12]}), but the embedder given is {embedder.name_or_path!r} "
            f"(dim={embedder.dim}, fingerprint {embedder.fingerprint[:12]}). Distances between vectors of two "
            "encoders mean nothing. Use the embedder of the datastore, or rebuild it with this one."
        )
    query = made.get("query") or {"name": None, "prompt": made.get("prompt", ""), "fingerprint": made["fingerprint"]}
    if embedder.query_fingerprint != query["fingerprint"]:
        other = embedder.query_encoder
        raise DatastoreMismatchError(
            f"The datastore {str(path)!r} was built for queries of the encoder {query['name'] or made['name']!r} with the "
            f"prompt {query['prompt']!r} (fingerprint {query['fingerprint'][:12]}), but the embedder given has the queries' "
            f"encoder {(other or embedder).name_or_path!r} with the prompt {embedder.query_prompt!r} (fingerprint "
            f"{embedder.query_fingerprint[:12]}). Its queries would not find what they should. Load the embedder with the "
            "`query_encoder=` and `query_prompt=` of the datastore, or rebuild it with this one."
        )


def _check_tokenizer(path: Path, manifest: DatastoreManifest, tokenizer: PreTrainedTokenizerBase) -> None:
    known, found = manifest.tokenizer, tokenizer_fingerprint(tokenizer)
    if found == known["fingerprint"] and manifest.max_token_id < vocabulary_size(tokenizer):
        return
    # The same vocabulary, but a token that was added on top of it when the store was built is missing.
    lacking = f", without token id {manifest.max_token_id}" if found == known["fingerprint"] else ""
    raise DatastoreMismatchError(
        f"The datastore {str(path)!r} holds token ids of the tokenizer {known['name']!r} (fingerprint "
        f"{known['fingerprint'][:12]}), but the tokenizer given is {tokenizer.name_or_path!r} (fingerprint "
        f"{found[:12]}{lacking}). The ids would stand for other text. Make a copy for this tokenizer, with the same keys: "
        "`datastore.retokenize('<new folder>', tokenizer)`; or use the tokenizer it was built with."
    )
