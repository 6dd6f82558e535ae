"""Which tokenizer and embedder a datastore belongs to: their fingerprints, and the check that a caller has the same."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from transformers import AutoTokenizer, PreTrainedTokenizerBase

from .. import arguments
from ..errors import (
    DatastoreInputError,
    DatastoreMismatchError,
    MissingExtraError,
    PretrainedNotFoundError,
    RetroError,
)
from ..outside import check_pretrained_folder
from .atomic_files import digest_of, reading, sha256_of


if TYPE_CHECKING:
    from .embedder import ChunkEmbedder
    from .store import RetroDatastore


def load_tokenizer(tokenizer: PreTrainedTokenizerBase | str | os.PathLike[str]) -> PreTrainedTokenizerBase:
    """A tokenizer unchanged, or the one with a given name: a folder, or a model on the Hub.

    Raises:
        PretrainedNotFoundError: if there is no tokenizer of that name, or it has no vocabulary.
    """
    if not isinstance(tokenizer, (str, os.PathLike)):
        if not hasattr(tokenizer, "get_vocab"):  # that of an embedder need not be one of transformers
            raise DatastoreInputError(
                f"The tokenizer is of type {type(tokenizer).__name__}. Pass a tokenizer, or its folder or Hub name."
            )
        return tokenizer
    with loading("tokenizer", str(tokenizer)):
        loaded = AutoTokenizer.from_pretrained(tokenizer, trust_remote_code=False)
        # For a model folder without a vocabulary, transformers makes one up from the family's special tokens.
        if len(loaded) <= len(set(loaded.all_special_ids)):
            raise ValueError("there is no vocabulary, such as a tokenizer.json")
    return loaded


def load_own_tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    """The tokenizer in the folder of a datastore, which somebody else may have made.

    It has no chat template: a template writes turns of the system, and it is a program that need not end.

    Raises:
        DatastoreCorruptError: if it cannot be loaded, or names files of other folders or code.
    """
    with reading(folder):
        check_pretrained_folder(folder)
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False, local_files_only=True)
        tokenizer.chat_template = None
        return tokenizer


def is_copy(tokenizer: PreTrainedTokenizerBase, datastore: RetroDatastore) -> bool:
    """Whether a tokenizer is the one in the folder of a datastore."""
    return tokenizer.name_or_path == str(datastore.path)


def check_datastore(datastore: Any) -> None:
    """Raise DatastoreInputError for what is no datastore."""
    if not hasattr(datastore, "shards") or isinstance(datastore, type):
        raise DatastoreInputError(
            f"The datastore is of type {type(datastore).__name__}. Pass an opened one, such as `RetroDatastore.load(path)`."
        )


def check_embedder(embedder: Any) -> None:
    """Raise DatastoreInputError for what is no embedder."""
    if not hasattr(embedder, "embed") or isinstance(embedder, type):
        raise DatastoreInputError(
            f"The embedder is of type {type(embedder).__name__}. Pass a ChunkEmbedder, or its folder or Hub name."
        )


@contextmanager
def loading(what: str, name: str) -> Iterator[None]:
    """Check the folder that a caller named, if it is one, and explain whatever goes wrong while it is loaded.

    Raises:
        MissingExtraError: if a package is missing.
        PretrainedNotFoundError: if it cannot be loaded.
    """
    try:
        if os.path.isdir(name):
            check_pretrained_folder(name)
        yield
    except RetroError:
        raise
    except ImportError as error:
        raise MissingExtraError(f"The {what} {name!r} needs a package that is not installed: {error}") from error
    except Exception as error:  # transformers and tokenizers raise anything for files that are damaged
        raise PretrainedNotFoundError.for_name(what, name, error) from error
    except BaseException as error:
        if type(error).__name__ != "PanicException":  # of a library in Rust, which is not an `Exception`
            raise
        raise PretrainedNotFoundError.for_name(what, name, error) from error


def vocabulary_size(tokenizer: PreTrainedTokenizerBase) -> int:
    """The largest token id plus one; `len(tokenizer)` is less if the vocabulary has gaps."""
    return max(len(tokenizer), max(tokenizer.get_vocab().values(), default=0) + 1)


def vocabulary_fingerprint(tokenizer: PreTrainedTokenizerBase) -> str:
    """A sha256 of the vocabulary and, for BPE, the merges: what datastores recorded until version 0.1."""
    return _content(tokenizer)[0]


def tokenizer_fingerprint(tokenizer: PreTrainedTokenizerBase, without: str | None = None) -> str:
    """A sha256 of what turns text into ids and back.

    Vocabulary, merges, how the model applies them, added tokens and how they match, normalizer, pre-tokenizer, post-processor
    and decoder count. Padding and truncation settings and the path that it was loaded from do not.

    Args:
        tokenizer (`PreTrainedTokenizerBase`): any tokenizer; of a slow one the vocabulary and the added tokens are read.
        without (`str`, *optional*): an added token that is left out.
    Returns:
        `str` of 64 hexadecimal digits.
    """
    arguments.optional_text("without", without, DatastoreInputError)
    vocabulary, stages = _content(load_tokenizer(tokenizer))
    # What is off or empty is left out: other versions of the library do not write it.
    model = {key: value for key, value in stages.get("model", {}).items() if value}
    added = [
        (id_, *(getattr(token, name, None) for name in ("content", "lstrip", "rstrip", "normalized", "single_word")))
        for id_, token in sorted(getattr(tokenizer, "added_tokens_decoder", {}).items())
        if str(token) != without
    ]
    return sha256_of(json.dumps([vocabulary, added, *_pipeline(stages), model], sort_keys=True, default=str))


def tokenizer_record(tokenizer: PreTrainedTokenizerBase) -> str:
    """What token ids that are kept say of their tokenizer: its fingerprint, and that without the token for padding."""
    kinds = (None, getattr(tokenizer, "pad_token", None))
    return " ".join(tokenizer_fingerprint(tokenizer, without=kind)[:16] for kind in kinds)


def check_record(datastore: RetroDatastore, record: Any) -> None:
    """Check that token ids with a record are of the tokenizer of a datastore, except for its token for padding.

    Raises:
        DatastoreMismatchError: if they are of another.
    """
    known = datastore.manifest.tokenizer
    alike = {known["fingerprint"][:16], *tokenizer_record(datastore.tokenizer).split()}
    if not isinstance(record, str) or alike.isdisjoint(record.split()):
        raise DatastoreMismatchError(
            f"The token ids were made by another tokenizer (fingerprint {arguments.shown(record)}) than those of the datastore "
            f"{str(datastore.path)!r}, which are of {known['name']!r} (fingerprint {known['fingerprint'][:16]}). Tokenize the documents with "
            "that tokenizer, or make a copy of the datastore for the other one with `datastore.retokenize('<new folder>', tokenizer)`."
        )


def former_fingerprints(tokenizer: PreTrainedTokenizerBase) -> tuple[str, ...]:
    """What datastores of earlier versions recorded for the same tokenizer, also before a pad token was added."""
    vocabulary, stages = _content(tokenizer)
    alike = [vocabulary]
    for without in (None, getattr(tokenizer, "pad_token", None)):
        named = getattr(tokenizer, "added_tokens_decoder", {}).items()
        added = sorted((id_, str(token)) for id_, token in named if str(token) != without)
        alike.append(sha256_of(json.dumps([vocabulary, added, _pipeline(stages)], sort_keys=True)))
    return tuple(alike)


def _content(tokenizer: PreTrainedTokenizerBase) -> tuple[str, dict[str, Any]]:
    """The fingerprint of the vocabulary, and the stages of a fast tokenizer without the vocabulary and the merges."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    return (_digest({"vocab": tokenizer.get_vocab()}), {}) if backend is None else _parsed(backend.to_str())


# By the content, since a tokenizer may change; a vocabulary of 100,000 takes a second to read, and each check would read it.
@lru_cache(maxsize=2)
def _parsed(text: str) -> tuple[str, dict[str, Any]]:
    stages = json.loads(text)
    model = {key: value for key, value in stages["model"].items() if key not in ("vocab", "merges")}
    return _digest(stages["model"]), stages | {"model": model}


def _digest(model: dict[str, Any]) -> str:
    vocab = model.get("vocab", {})
    items = sorted(vocab.items(), key=lambda item: item[1]) if isinstance(vocab, dict) else vocab
    # Library versions write a merge as "a b" or as ["a", "b"].
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in model.get("merges") or []]
    return sha256_of(json.dumps([items, merges], ensure_ascii=True, separators=(",", ":")))


def _pipeline(stages: dict[str, Any]) -> list[Any]:
    return [stages.get(name) for name in ("normalizer", "pre_tokenizer", "post_processor", "decoder")]


def tokenizer_identity(tokenizer: PreTrainedTokenizerBase) -> str:
    """A digest of everything that turns text into ids, by which a build finds its unfinished work."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        return digest_of(type(tokenizer).__name__, json.dumps(tokenizer.get_vocab(), sort_keys=True))
    content = json.loads(backend.to_str())
    content.update(padding=None, truncation=None)
    return digest_of(json.dumps(content, sort_keys=True))


def check_compatible(
    datastore: RetroDatastore,
    *,
    tokenizer: PreTrainedTokenizerBase | None = None,
    chunk_size: int | None = None,
    neighbor_size: int | None = None,
    embedder: ChunkEmbedder | None = None,
) -> None:
    """Check that a datastore was built for a language model's tokenizer and sizes, and by the embedder of the queries.

    Raises:
        DatastoreMismatchError: for the first difference, with both values and the remedy.
    """
    path, manifest = str(datastore.path), datastore.manifest
    for name, wanted, known in (
        ("chunk_size", chunk_size, manifest.chunk_size),
        ("neighbor_size", neighbor_size, manifest.neighbor_size),
    ):
        if wanted is not None and arguments.whole(name, wanted, DatastoreInputError) != known:
            raise DatastoreMismatchError(
                f"The datastore {path!r} was built with {name}={known}, but {name}={wanted} is expected. Build it again "
                f"with `retro build --{name.replace('_', '-')} {wanted}` (in Python: `{name}={wanted}`), or use a model with "
                f"{name}={known}."
            )
    if tokenizer is not None:
        _check_tokenizer(path, manifest.tokenizer, manifest.max_token_id, load_tokenizer(tokenizer))
    if embedder is not None:
        check_embedder(embedder)
        _check_embedder(path, manifest.embedder, embedder)


def _check_tokenizer(path: str, known: dict[str, Any], max_id: int, tokenizer: PreTrainedTokenizerBase) -> None:
    found = tokenizer_fingerprint(tokenizer)
    # A pad token that was added since changes no text.
    alike = found, tokenizer_fingerprint(tokenizer, without=tokenizer.pad_token), *former_fingerprints(tokenizer)
    lacks = max_id >= vocabulary_size(tokenizer)
    if known["fingerprint"] in alike and not lacks:
        return
    lacking = f", without token id {max_id}" if lacks else ""
    raise DatastoreMismatchError(
        f"The datastore {path!r} has token ids of the tokenizer {known['name']!r} (fingerprint {known['fingerprint'][:12]}), "
        f"but the tokenizer given is {tokenizer.name_or_path!r} (fingerprint {found[:12]}{lacking}). Use its own tokenizer, or "
        "build it again with `retro build --tokenizer` (in Python: make a copy for this one with "
        "`datastore.retokenize('<new folder>', tokenizer)`)."
    )


def _check_embedder(path: str, made: dict[str, Any], embedder: ChunkEmbedder) -> None:
    if made["fingerprint"] not in (embedder.fingerprint, embedder.former_fingerprint):
        raise DatastoreMismatchError(
            f"The keys of the datastore {path!r} were made by the embedder {made['name']!r} (fingerprint "
            f"{made['fingerprint'][:12]}), but the embedder given is {embedder.name_or_path!r} (fingerprint "
            f"{embedder.fingerprint[:12]}), whose vectors are not comparable. Use its own embedder, or rebuild it."
        )
    query = made.get("query") or {"name": None, "prompt": made.get("prompt", ""), "fingerprint": made["fingerprint"]}
    if query["fingerprint"] not in (embedder.query_fingerprint, embedder.former_query_fingerprint):
        other = embedder.query_encoder or embedder
        raise DatastoreMismatchError(
            f"The datastore {path!r} was built for queries by {query['name'] or made['name']!r} with the prompt "
            f"{query['prompt']!r}, but the embedder given makes queries by {other.name_or_path!r} with the prompt "
            f"{embedder.query_prompt!r}. Load it with the `query_encoder=` and `query_prompt=` of the datastore, or rebuild."
        )
