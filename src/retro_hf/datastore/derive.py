"""New datastores from old ones without embedding again: save, subset, merge, retokenize."""

from __future__ import annotations

import dataclasses
import os
import shutil
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ..errors import DatastoreInputError, DatastoreMismatchError, counted
from .build import work_folder
from .chunks import token_dtype, vocabulary_size
from .compatibility import load_tokenizer
from .documents import document_ids
from .executors import progress_bar
from .manifest import MANIFEST_NAME, SHARD_FILES, DatastoreManifest, FileEntry, ShardEntry, new_path
from .origins import describe_tokenizer, library_version, unique_sources
from .policy import IndexOptions, parse_bytes
from .shard import Shard, hash_of_id
from .storage import NpyWriter, link_or_copy, new_folder
from .update import rewrite
from .writer import describe_file


if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from .store import RetroDatastore

__all__ = ["drawn_documents", "merge", "retokenize", "save", "subset"]


def save(datastore: RetroDatastore, path: str | os.PathLike[str]) -> None:
    """Copy a datastore to a new folder, which appears when the copy is complete.

    Args:
        datastore ([`RetroDatastore`]): the store, such as one that was downloaded.
        path (`str` or `Path`): the folder to make.
    """
    with new_folder(new_path(path)) as folder:
        for entry in datastore.manifest.files:
            shutil.copyfile(datastore.path / entry.name, folder / entry.name)
        # The manifest last, as in a build.
        shutil.copyfile(datastore.path / MANIFEST_NAME, folder / MANIFEST_NAME)


def subset(
    datastore: RetroDatastore,
    path: str | os.PathLike[str],
    *,
    ids: Iterable[str] | None = None,
    fraction: float | None = None,
    seed: int = 0,
    index: str = "auto",
    recall: float = 0.95,
    memory_budget: float | str | None = None,
    show_progress: bool | None = None,
) -> RetroDatastore:
    """Write some of the documents of a datastore to a new one, with the keys they have.

    Args:
        datastore ([`RetroDatastore`]): where they come from; deleted documents are left out.
        path (`str` or `Path`): the folder to make.
        ids (`Iterable[str]`, *optional*): the documents to take. Give either `ids` or `fraction`.
        fraction (`float`, *optional*): share of the documents to take, above 0 and at most 1. Documents are drawn by
            id, so a smaller fraction with the same seed is contained in a larger one.
        seed (`int`, defaults to 0): of that draw.
        index, recall, memory_budget, show_progress: as for [`RetroDatastore.build`].
    Returns:
        [`RetroDatastore`]: the new store.
    Raises:
        DatastoreInputError: if an id is not in the store, nothing is left, or `path` lies inside a store.
    """
    path = new_path(path)
    keep = np.zeros(datastore.num_documents, dtype=bool)
    if (ids is None) == (fraction is None):
        raise DatastoreInputError("Give either the ids of the documents to take, or a fraction of them.")
    if ids is not None:
        wanted = document_ids(ids)
        numbers = datastore.document_numbers(wanted)
        if (numbers < 0).any():
            unknown = wanted[int(np.flatnonzero(numbers < 0)[0])]
            raise DatastoreInputError(f"There is no document with the id {unknown!r} in {str(datastore.path)!r}.")
        keep[numbers] = True
    elif fraction is not None:
        keep = drawn_documents(datastore, fraction, seed)
    if not keep.any():
        raise DatastoreInputError(
            f"No document is left of {counted(datastore.num_documents, 'document')}. Take a larger fraction, or other ids."
        )
    options = IndexOptions(index, recall, parse_bytes(memory_budget))
    with work_folder(path.absolute()) as work, new_folder(path, within=work) as folder:
        shards = rewrite(datastore, keep, work, options, 0, datastore.num_chunks, show_progress)
        for shard in shards:
            shard.link_into(folder)
        _write_manifest(
            folder,
            datastore,
            shards=tuple(shard.entry for shard in shards),
            files=(*(file for shard in shards for file in shard.files), *_tokenizer_files(datastore, folder)),
            next_shard=len(shards),
            num_deleted_documents=0,
        )
    return type(datastore).load(path)


def drawn_documents(datastore: RetroDatastore, fraction: float, seed: int = 0) -> np.ndarray:
    """Which documents belong to a fraction; a larger one with the same seed contains a smaller one.

    Args:
        fraction (`float`): share of the documents, above 0 and at most 1. Whether a document belongs is decided by its
            id, so the share that is drawn is near the fraction, not equal to it.
        seed (`int`, defaults to 0): of that draw.
    Returns:
        `np.ndarray` of bool and shape `(num_documents,)`; `False` for deleted documents.
    Raises:
        DatastoreInputError: for a fraction out of range.
    """
    if isinstance(fraction, bool) or not isinstance(fraction, (int, float)) or not 0 < fraction <= 1:
        raise DatastoreInputError(f"fraction is {fraction!r}, but it is a share: above 0 and at most 1.")
    drawn = (
        hash_of_id(f"{seed} {id}") < fraction * 2**64
        for shard in datastore.shards
        for table in shard.documents.pieces()
        for id in table.column("id").to_pylist()
    )
    keep = np.fromiter(drawn, dtype=bool, count=datastore.num_documents)
    keep[datastore.deleted_documents] = False
    return keep


def merge(datastores: Sequence[RetroDatastore], path: str | os.PathLike[str]) -> RetroDatastore:
    """Put the shards of several datastores into a new one.

    Files are linked, not copied, where the file system can. Every shard keeps its index; [`RetroDatastore.compact`]
    makes one of all.

    Args:
        datastores (`Sequence[RetroDatastore]`): with the same tokenizer, embedder, chunk and neighbor size.
        path (`str` or `Path`): the folder to make.
    Returns:
        [`RetroDatastore`]: the new store.
    Raises:
        DatastoreMismatchError: if they do not fit together; names what differs.
        DatastoreInputError: if a document is in two of them.
    """
    if not datastores:
        raise DatastoreInputError("There are no datastores to merge.")
    wrong = next((store for store in datastores if not hasattr(store, "shards")), None)
    if wrong is not None:
        raise DatastoreInputError(
            f"{wrong!r} is of type {type(wrong).__name__}, not a RetroDatastore. Open it first: `RetroDatastore.load(path)`."
        )
    path = new_path(path)
    first = datastores[0]
    for other in datastores[1:]:
        _check_alike(first, other)
    _check_disjoint(datastores)
    shards: list[ShardEntry] = []
    files: list[FileEntry] = []
    deleted: list[np.ndarray] = []
    with new_folder(path) as folder:
        start = 0
        for store in datastores:
            for shard in store.shards:
                name = f"{len(shards):05d}"
                shards.append(dataclasses.replace(shard.entry, name=name))
                files += _linked(store, shard, folder, name)
            deleted.append(store.deleted_documents + start)
            start += store.num_documents
        numbers = np.concatenate(deleted)
        if len(numbers):
            with NpyWriter(folder / "deleted-00001.npy", np.dtype(np.int64)) as file:
                file.append(numbers)
            files.append(describe_file(folder / "deleted-00001.npy", "deleted"))
        _write_manifest(
            folder,
            first,
            shards=tuple(shards),
            files=(*files, *_tokenizer_files(first, folder)),
            next_shard=len(shards),
            num_deleted_documents=len(numbers),
            num_empty_documents=sum(store.manifest.num_empty_documents for store in datastores),
            sources=unique_sources(source for store in datastores for source in store.manifest.sources),
        )
    return type(first).load(path)


def _check_alike(first: RetroDatastore, other: RetroDatastore) -> None:
    for name in ("chunk_size", "neighbor_size", "token_dtype", "tokenizer", "embedder"):
        known, found = getattr(first.manifest, name), getattr(other.manifest, name)
        if name in ("tokenizer", "embedder"):
            if known["fingerprint"] == found["fingerprint"] and known.get("query") == found.get("query"):
                continue
            known, found = (f"{part['name']!r} ({part['fingerprint'][:12]})" for part in (known, found))
        if known != found:
            raise DatastoreMismatchError(
                f"The datastores do not fit together: {str(first.path)!r} has {name}={known}, but {str(other.path)!r} has "
                f"{name}={found}. Rebuild one of them, or, for another tokenizer, use `retokenize`."
            )


def _check_disjoint(datastores: Sequence[RetroDatastore]) -> None:
    for number, store in enumerate(datastores):
        for shard in store.shards:
            for table in shard.documents.pieces():
                ids = table.column("id").to_pylist()
                live = store.document_numbers(ids) >= 0
                for other in datastores[:number]:
                    found = (other.document_numbers(ids) >= 0) & live
                    if found.any():
                        raise DatastoreInputError(
                            f"The document {ids[int(np.flatnonzero(found)[0])]!r} is in {str(other.path)!r} and in "
                            f"{str(store.path)!r}. Delete it from one of them first."
                        )


def retokenize(
    datastore: RetroDatastore,
    path: str | os.PathLike[str],
    tokenizer: PreTrainedTokenizerBase | str,
    *,
    show_progress: bool | None = None,
) -> RetroDatastore:
    """Write the datastore for a language model with another tokenizer, without embedding its chunks again.

    Chunks stay the same pieces of text, and so do keys and index, which are linked; the documents are tokenized anew,
    and a neighbor is the `neighbor_size` new tokens from where its chunk begins.

    Args:
        datastore ([`RetroDatastore`]): where the documents and the keys come from.
        path (`str` or `Path`): the folder to make.
        tokenizer ([`~transformers.PreTrainedTokenizerBase`] or `str`): of the other language model; a fast one.
        show_progress (`bool`, *optional*): a progress bar; by default on a terminal only.
    Returns:
        [`RetroDatastore`]: the new store, with the same documents and chunks under the same numbers.
    Raises:
        DatastoreInputError: if a tokenizer does not know the places of its tokens in the text, or leaves a document
            without tokens.
    """
    path = new_path(path)
    tokenizer = load_tokenizer(tokenizer)
    for one in (datastore.tokenizer, tokenizer):
        if not one.is_fast:
            raise DatastoreInputError(
                f"The tokenizer {one.name_or_path!r} is not a fast one, so the text of a chunk cannot be found in it. "
                "Build the datastore again."
            )
    dtype = token_dtype(vocabulary_size(tokenizer))
    shards: list[ShardEntry] = []
    files: list[FileEntry] = []
    with (
        new_folder(path) as folder,
        progress_bar(show_progress, total=datastore.num_documents, unit="doc", desc="Tokenizing") as progress,
    ):
        for shard in datastore.shards:
            replaced = {kind: folder / SHARD_FILES[kind].format(shard.entry.name) for kind in _RETOKENIZED}
            shards.append(_retokenized(shard, datastore.tokenizer, tokenizer, dtype, replaced, progress))
            files += _linked(datastore, shard, folder, shard.entry.name, leave_out=_RETOKENIZED)
            files += [describe_file(file, kind, shard.entry.name) for kind, file in replaced.items()]
        for entry in datastore.manifest.entries("deleted"):
            link_or_copy(datastore.path / entry.name, folder / entry.name)
            files.append(entry)
        before = {file.name for file in folder.iterdir()}
        tokenizer.save_pretrained(folder)
        files += [describe_file(file, "tokenizer") for file in sorted(folder.iterdir()) if file.name not in before]
        _write_manifest(
            folder,
            datastore,
            shards=tuple(shards),
            files=tuple(files),
            token_dtype=str(dtype),
            tokenizer=describe_tokenizer(tokenizer),
        )
    return type(datastore).load(path)


_RETOKENIZED = ("tokens", "doc_lengths", "chunk_starts")


def _retokenized(
    shard: Shard,
    old: PreTrainedTokenizerBase,
    new: PreTrainedTokenizerBase,
    dtype: np.dtype,
    paths: dict[str, Path],
    progress: Any,
) -> ShardEntry:
    """Write stream, lengths and chunk starts of a shard in new tokens."""
    num_tokens = largest = document = 0
    with (
        NpyWriter(paths["tokens"], dtype) as tokens,
        NpyWriter(paths["doc_lengths"], np.dtype(np.int64)) as lengths,
        NpyWriter(paths["chunk_starts"], np.dtype(np.int64)) as starts,
    ):
        for table in shard.documents.pieces():
            texts = table.column("text").to_pylist()
            options: dict[str, Any] = {"add_special_tokens": False, "return_offsets_mapping": True, "verbose": False}
            before = old(texts, **options)["offset_mapping"]
            after = new(texts, **options)
            for text, places, ids, spans in zip(
                texts, before, after["input_ids"], after["offset_mapping"], strict=True
            ):
                if not ids or len(places) != shard.doc_lengths[document]:
                    raise DatastoreInputError(
                        f"A document beginning {text[:40]!r} has {len(places)} tokens where the datastore says "
                        f"{shard.doc_lengths[document]}, and {len(ids)} in the new tokenizer. Delete it first, or build the "
                        "datastore again."
                    )
                # A chunk begins in the new token that holds its first character.
                first_characters = np.array([begin for begin, _ in places])[shard.starts_in_document(document)]
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


def _linked(
    datastore: RetroDatastore, shard: Shard, folder: Path, name: str, leave_out: tuple[str, ...] = ()
) -> Iterator[FileEntry]:
    """Link the files of a shard into a folder, under the name of a shard there."""
    for entry in datastore.manifest.files:
        if entry.shard == shard.entry.name and entry.kind not in leave_out:
            renamed = dataclasses.replace(entry, name=SHARD_FILES[entry.kind].format(name), shard=name)
            link_or_copy(datastore.path / entry.name, folder / renamed.name)
            yield renamed


def _tokenizer_files(datastore: RetroDatastore, folder: Path) -> Iterator[FileEntry]:
    for entry in datastore.manifest.entries("tokenizer"):
        link_or_copy(datastore.path / entry.name, folder / entry.name)
        yield entry


def _write_manifest(folder: Path, datastore: RetroDatastore, **changes: Any) -> None:
    """The manifest of a first generation, like that of another store but for some changes."""
    manifest: DatastoreManifest = dataclasses.replace(
        datastore.manifest, generation=1, library_version=library_version(), **changes
    )
    manifest.write(folder)
