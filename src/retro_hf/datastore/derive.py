"""New datastores from existing ones, without embedding again: save, subset, merge, retokenize."""

from __future__ import annotations

import dataclasses
import os
import shutil
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from transformers import PreTrainedTokenizerBase

from .. import arguments
from ..errors import DatastoreInputError, DatastoreMismatchError, counted
from ..progress import progress_bar
from ..special_tokens import tokenize_texts
from .atomic_files import INT64, NpyWriter, hash_of, link_or_copy, new_folder, write_npy
from .build import work_folder
from .chunks import text_starts, token_dtype
from .compatibility import load_tokenizer, tokenizer_fingerprint, vocabulary_size
from .document_changes import similar_ids
from .documents import document_ids
from .edit import placed, rewrite, write_changed
from .index_plan import IndexOptions
from .key_coverage import check_coverage, coverage
from .manifest import (
    SHARD_FILES,
    FileEntry,
    ShardEntry,
    describe_file,
    describe_tokenizer,
    new_path,
    unique_sources,
)
from .shard import Shard
from .store_generation import with_current_files


if TYPE_CHECKING:
    from .store import RetroDatastore

_RETOKENIZED = ("tokens", "doc_lengths", "chunk_starts")


def save(datastore: RetroDatastore, path: str | os.PathLike[str]) -> None:
    """Copy a datastore to a new folder, which appears when the copy is complete.

    Args:
        datastore ([`RetroDatastore`]): the store, for example a downloaded one.
        path (`str` or `Path`): the folder to make.
    """

    def copy() -> None:
        manifest = datastore.manifest
        with new_folder(new_path(path)) as folder:
            for entry in manifest.files:
                shutil.copyfile(datastore.path / entry.name, folder / entry.name)
            # The manifest last, as in a build.
            manifest.write(folder)

    with_current_files([datastore], copy)


def subset(
    datastore: RetroDatastore,
    path: str | os.PathLike[str],
    *,
    ids: Iterable[str] | None = None,
    fraction: float | None = None,
    seed: int = 0,
    index: IndexOptions | str = "auto",
    show_progress: bool | None = None,
) -> RetroDatastore:
    """Write some documents of a datastore to a new one, with the keys they have.

    Args:
        datastore ([`RetroDatastore`]): the source; its deleted documents are left out.
        path (`str` or `Path`): the folder to make.
        ids (`Iterable[str]`, *optional*): the documents to take. Pass exactly one of `ids` and `fraction`.
        fraction (`float`, *optional*): share of the documents to take, above 0 and at most 1. Documents are drawn by
            id, so a larger fraction with the same seed contains a smaller one.
        seed (`int`, defaults to 0): of that draw.
        index, show_progress: as for [`RetroDatastore.build`].
    Returns:
        [`RetroDatastore`]: the new store.
    Raises:
        DatastoreInputError: if an id is not in the store, no document is left, or `path` is inside a store.
    """
    path = new_path(path)
    if (ids is None) == (fraction is None):
        raise DatastoreInputError("Pass exactly one of `ids` and `fraction`.")
    if fraction is not None:
        keep = drawn_documents(datastore, fraction, seed)
    else:
        numbers = datastore.document_numbers(wanted := document_ids(ids))
        if (numbers < 0).any():
            unknown = wanted[int(np.argmin(numbers))]
            raise DatastoreInputError(
                f"There is no document with the id {unknown!r} in {str(datastore.path)!r}. {similar_ids(datastore, unknown)}".rstrip()
            )
        keep = np.zeros(datastore.num_documents, dtype=bool)
        keep[numbers] = True
    if not keep.any():
        raise DatastoreInputError(
            f"No document is left of {counted(datastore.num_documents, 'document')}. Use a larger fraction, or other ids."
        )
    with work_folder(path.absolute()) as work, new_folder(path, within=work) as folder:
        shards = rewrite(datastore, keep, work, IndexOptions.of(index), 0, datastore.num_chunks, show_progress)
        write_changed(
            datastore.manifest,
            folder,
            shards=tuple(shard.entry for shard in shards),
            files=(*placed(shards, folder), *_linked(datastore, folder, "tokenizer")),
            next_shard=len(shards),
            num_deleted_documents=0,
        )
    return type(datastore).load(path)


def drawn_documents(datastore: RetroDatastore, fraction: float, seed: int = 0) -> np.ndarray:
    """The documents that belong to a fraction; a larger one with the same seed contains a smaller one.

    Args:
        fraction (`float`): share of the documents, above 0 and at most 1. Whether a document belongs depends on its id, so
            the share that is drawn is near the fraction, not equal to it.
        seed (`int`, defaults to 0): of that draw.
    Returns:
        `np.ndarray` of bool and shape `(num_documents,)`; `False` for deleted documents.
    Raises:
        DatastoreInputError: for a fraction out of range.
    """
    seed = arguments.whole("seed", seed, DatastoreInputError, least=0)
    fraction = arguments.real("fraction", fraction, DatastoreInputError, least=0, most=1)
    if not fraction:
        raise DatastoreInputError(f"fraction is {fraction!r}. Pass a share above 0 and at most 1.")
    # The hash of an id is as good as a draw between 0 and 2^64, and the same in every store that has the document.
    ids = (id for shard in datastore.shards for id in shard.documents.ids())
    drawn = (hash_of(f"{seed} {id}") < fraction * 2**64 for id in ids)
    keep = np.fromiter(drawn, dtype=bool, count=datastore.num_documents)
    keep[datastore.deleted_documents] = False
    return keep


def merge(datastores: Sequence[RetroDatastore], path: str | os.PathLike[str]) -> RetroDatastore:
    """Put the shards of several datastores into a new one.

    Files are hard-linked where the file system can, otherwise copied. Every shard keeps its index;
    [`RetroDatastore.compact`] makes one of all.

    Args:
        datastores (`Sequence[RetroDatastore]`): with the same tokenizer, embedder, chunk and neighbor size.
        path (`str` or `Path`): the folder to make.
    Returns:
        [`RetroDatastore`]: the new store.
    Raises:
        DatastoreMismatchError: if they were built differently; names what differs.
        DatastoreInputError: if a document is in two of them.
    """
    is_list = isinstance(datastores, (list, tuple))
    if not is_list or not datastores or not all(hasattr(store, "shards") for store in datastores):
        kinds = [type(store).__name__ for store in datastores] if is_list else type(datastores).__name__
        raise DatastoreInputError(
            f"Pass a list of opened datastores, such as `RetroDatastore.load(path)`, not {kinds}."
        )
    path = new_path(path)
    for number, store in enumerate(datastores):
        _check_alike(datastores[0], store)
        _check_disjoint(store, datastores[:number])
    with_current_files(datastores, lambda: _merged(datastores, path))
    return type(datastores[0]).load(path)


def _merged(datastores: Sequence[RetroDatastore], path: Path) -> None:
    first = datastores[0]
    shards: list[ShardEntry] = []
    files: list[FileEntry] = []
    deleted: list[np.ndarray] = []
    with new_folder(path) as folder:
        start = 0
        for store in datastores:
            for shard in store.shards:
                name = f"{len(shards):05d}"
                shards.append(dataclasses.replace(shard.entry, name=name))
                files += _linked_shard(store, shard, folder, name)
            deleted.append(store.deleted_documents + start)
            start += store.num_documents
        numbers = np.concatenate(deleted)
        if len(numbers):
            write_npy(folder / "deleted-00001.npy", numbers)
            files.append(describe_file(folder / "deleted-00001.npy", "deleted"))
        write_changed(
            first.manifest,
            folder,
            shards=tuple(shards),
            files=(*files, *_linked(first, folder, "tokenizer")),
            next_shard=len(shards),
            num_deleted_documents=len(numbers),
            num_empty_documents=sum(store.manifest.num_empty_documents for store in datastores),
            sources=unique_sources(source for store in datastores for source in store.manifest.sources),
        )


def _check_alike(first: RetroDatastore, other: RetroDatastore) -> None:
    for name in ("chunk_size", "neighbor_size", "token_dtype", "tokenizer", "embedder"):
        known, found = getattr(first.manifest, name), getattr(other.manifest, name)
        if name in ("tokenizer", "embedder"):
            # The name is only where it was loaded from; the fingerprint is what it is.
            if known["fingerprint"] == found["fingerprint"] and known.get("query") == found.get("query"):
                continue
            known, found = (f"{part['name']!r} ({part['fingerprint'][:12]})" for part in (known, found))
        if name == "tokenizer" and tokenizer_fingerprint(first.tokenizer) == tokenizer_fingerprint(other.tokenizer):
            continue  # earlier versions recorded less of it
        if known != found:
            raise DatastoreMismatchError(
                f"{str(first.path)!r} has {name}={known}, but {str(other.path)!r} has {name}={found}. Rebuild one of them, or, for "
                "another tokenizer, use `retokenize`."
            )


def _check_disjoint(store: RetroDatastore, others: Sequence[RetroDatastore]) -> None:
    for table in (table for shard in store.shards for table in shard.documents.pieces() if others):
        ids = table.column("id").to_pylist()
        live = store.document_numbers(ids) >= 0
        for other in others:
            found = (other.document_numbers(ids) >= 0) & live
            if found.any():
                raise DatastoreInputError(
                    f"The document {ids[int(np.argmax(found))]!r} is in {str(other.path)!r} and in {str(store.path)!r}. Delete it from "
                    "one of them first."
                )


def retokenize(
    datastore: RetroDatastore,
    path: str | os.PathLike[str],
    tokenizer: PreTrainedTokenizerBase | str,
    *,
    show_progress: bool | None = None,
) -> RetroDatastore:
    """Write the datastore for a language model with another tokenizer.

    Chunks stay the same pieces of text, so keys and index stay valid and are linked. The documents are tokenized again,
    and a neighbor is the `neighbor_size` new tokens from where its chunk begins.

    Args:
        datastore ([`RetroDatastore`]): the source of documents and keys.
        path (`str` or `Path`): the folder to make.
        tokenizer ([`~transformers.PreTrainedTokenizerBase`] or `str`): of the other language model; a fast one.
        show_progress (`bool`, *optional*): show a progress bar; by default on a terminal only.
    Returns:
        [`RetroDatastore`]: the new store, with the same documents and chunks under the same numbers.
    Raises:
        DatastoreInputError: if a tokenizer is not a fast one, or leaves a document without tokens, or the keys do not tell the
            chunks apart.
    """
    path = new_path(path)
    tokenizer = load_tokenizer(tokenizer)
    for one in (datastore.tokenizer, tokenizer):
        if not one.is_fast:
            raise DatastoreInputError(
                f"The tokenizer {one.name_or_path!r} is not a fast one, which can tell where its tokens are in the text. Build the "
                "datastore again instead."
            )
    check_coverage(coverage(datastore), datastore.chunk_size)
    with_current_files([datastore], lambda: _write_retokenized(datastore, path, tokenizer, show_progress))
    return type(datastore).load(path)


def _write_retokenized(
    datastore: RetroDatastore, path: Path, tokenizer: PreTrainedTokenizerBase, show_progress: bool | None
) -> None:
    dtype = token_dtype(vocabulary_size(tokenizer))
    shards: list[ShardEntry] = []
    files: list[FileEntry] = []
    with (
        new_folder(path) as folder,
        progress_bar(show_progress, total=datastore.num_documents, unit="doc", desc="Tokenizing") as progress,
    ):
        tokenizer.save_pretrained(folder)
        shared = [describe_file(file, "tokenizer") for file in sorted(folder.iterdir())]
        for shard in datastore.shards:
            new = {kind: folder / SHARD_FILES[kind].format(shard.entry.name) for kind in _RETOKENIZED}
            shards.append(_retokenized(shard, datastore.tokenizer, tokenizer, dtype, new, progress))
            files += _linked_shard(datastore, shard, folder, shard.entry.name, leave_out=_RETOKENIZED)
            files += [describe_file(file, kind, shard.entry.name) for kind, file in new.items()]
        write_changed(
            datastore.manifest,
            folder,
            shards=tuple(shards),
            files=(*files, *_linked(datastore, folder, "deleted"), *shared),
            token_dtype=dtype.name,
            tokenizer=describe_tokenizer(tokenizer),
        )


def _retokenized(
    shard: Shard,
    old: PreTrainedTokenizerBase,
    new: PreTrainedTokenizerBase,
    dtype: np.dtype,
    paths: dict[str, Path],
    progress: Any,
) -> ShardEntry:
    """Write the stream, the lengths and the chunk starts of a shard in new tokens."""
    num_tokens = largest = document = 0
    with (
        NpyWriter(paths["tokens"], dtype) as tokens,
        NpyWriter(paths["doc_lengths"], INT64) as lengths,
        NpyWriter(paths["chunk_starts"], INT64) as starts,
    ):
        for table in shard.documents.pieces():
            texts = table.column("text").to_pylist()
            tokenized, places = tokenize_texts(new, texts)
            for text, ids, spans in zip(texts, tokenized, places or (), strict=True):
                if not ids:
                    raise DatastoreInputError(
                        f"The document {text[:40]!r}… has no token in the new tokenizer. Delete it first, or use another tokenizer."
                    )
                chunks = np.arange(shard.doc_offsets[document], shard.doc_offsets[document + 1])
                # A chunk begins in the new token that contains the first character of its text.
                if shard.text_starts is None:
                    in_document = shard.token_starts(chunks) - shard.token_starts(chunks[:1])
                    first_characters = _first_characters(old, text, int(shard.doc_lengths[document]), in_document)
                else:
                    first_characters = shard.text_starts[chunks]
                # Three new tokens end before characters 4, 9 and 12: a chunk from character 4 on, or from 5 on, begins with the
                # second of them. The maximum, since some tokenizers give a token the empty place (0, 0).
                ends = np.maximum.accumulate([end for _, end in spans])
                begins = np.minimum(np.searchsorted(ends, first_characters, side="right"), len(ids) - 1)
                begins[0] = 0
                starts.append(begins + num_tokens)
                tokens.append(np.array(ids))
                lengths.append(np.array([len(ids)]))
                num_tokens += len(ids)
                largest = max(largest, *ids)
                document += 1
            progress.update(len(texts))
    return dataclasses.replace(shard.entry, num_tokens=num_tokens, stream_length=num_tokens, max_token_id=largest)


def _first_characters(
    tokenizer: PreTrainedTokenizerBase, text: str, num_tokens: int, first_tokens: np.ndarray
) -> np.ndarray:
    """Where the chunks of a document begin in its text, for a store that has not recorded it.

    In such stores, names of special tokens were tokenized as these.
    """
    spans = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)["offset_mapping"]
    if len(spans) != num_tokens:
        raise DatastoreInputError(
            f"The document {text[:40]!r}… has {len(spans)} tokens instead of the {num_tokens} recorded. Delete it first, or build "
            "the datastore again."
        )
    return text_starts(spans, first_tokens)


def _linked_shard(
    datastore: RetroDatastore, shard: Shard, folder: Path, name: str, leave_out: tuple[str, ...] = ()
) -> Iterator[FileEntry]:
    """Link the files of a shard into a folder, under the name that the shard has there."""
    for entry in shard.files.values():
        if entry.kind not in leave_out:
            renamed = dataclasses.replace(entry, name=SHARD_FILES[entry.kind].format(name), shard=name)
            link_or_copy(datastore.path / entry.name, folder / renamed.name)
            yield renamed


def _linked(datastore: RetroDatastore, folder: Path, kind: str) -> Iterator[FileEntry]:
    """Link the files of one kind into a folder."""
    for entry in datastore.manifest.entries(kind):
        link_or_copy(datastore.path / entry.name, folder / entry.name)
        yield entry
