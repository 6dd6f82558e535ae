"""Changing a datastore: append, delete, compact. New files first, then the manifest that names them, in one step.

A process that is killed leaves the old state or the new. What it wrote and no manifest names is removed by the next
change; what it had computed is used again when the same call is made.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from transformers.utils import logging

from ..errors import DatastoreInputError
from .build import BuildOptions, build_shards, work_folder
from .documents import document_ids
from .embedder import ChunkEmbedder
from .executors import Executor, as_executor, progress_bar
from .manifest import MANIFEST_NAME, SHARD_FILES, DatastoreManifest, FileEntry
from .origins import library_version, unique_sources
from .policy import DEFAULT_SHARD_CHUNKS, IndexOptions, parse_bytes, plan_index
from .storage import NpyWriter, complete_file
from .writer import BuiltShard, Piece, ShardWriter, describe_file


if TYPE_CHECKING:
    from .store import RetroDatastore

__all__ = ["append", "compact", "delete", "rewrite"]

logger = logging.get_logger(__name__)

_DELETED_NAME = "deleted-{:05d}.npy"


def append(
    datastore: RetroDatastore,
    documents: Any,
    *,
    embedder: ChunkEmbedder | str,
    index: str = "auto",
    recall: float = 0.95,
    memory_budget: float | str | None = None,
    batch_size: int = 64,
    shard_chunks: int = DEFAULT_SHARD_CHUNKS,
    executor: Executor | int = 1,
    show_progress: bool | None = None,
) -> None:
    """Add documents to a datastore as a new shard, with an index of its own.

    Every shard is searched, so after many appends [`compact`] makes search faster.

    Args:
        datastore ([`RetroDatastore`]): the store; refreshed at the end.
        documents: as for [`RetroDatastore.build`]. Their ids must not be in the store; a text without an id gets its
            position in the input for one, which an earlier build or append will have used.
        embedder ([`ChunkEmbedder`] or `str`): the encoder that made the store's keys.
        index, recall, memory_budget, batch_size, shard_chunks, executor, show_progress: as for [`RetroDatastore.build`];
            the budget is that of the new shard.
    Raises:
        DatastoreInputError: for documents that cannot be added; nothing has changed.
        DatastoreMismatchError: for another embedder than the store's.
    """
    embedder = embedder if isinstance(embedder, ChunkEmbedder) else ChunkEmbedder.from_pretrained(embedder)
    datastore.check_compatible(embedder=embedder)
    options = BuildOptions(
        tokenizer=datastore.tokenizer,
        embedder=embedder,
        chunk_size=datastore.chunk_size,
        neighbor_size=datastore.neighbor_size,
        index=IndexOptions(index, recall, parse_bytes(memory_budget)),
        batch_size=batch_size,
        shard_chunks=shard_chunks,
        show_progress=show_progress,
    )
    executor = as_executor(executor)
    with _changing(datastore) as work:
        manifest = datastore.manifest
        built = build_shards(
            documents, work, options, executor, first_shard=manifest.next_shard, taken=datastore.document_numbers
        )
        if built is None:
            return
        shards, sources, num_empty = built
        _replace(
            datastore,
            shards=(*manifest.shards, *(shard.entry for shard in shards)),
            files=(*manifest.files, *_placed(datastore.path, shards)),
            next_shard=manifest.next_shard + len(shards),
            num_empty_documents=manifest.num_empty_documents + num_empty,
            sources=unique_sources([*manifest.sources, *sources]),
        )


def delete(datastore: RetroDatastore, ids: str | Iterable[str]) -> None:
    """Never return some documents again, as neighbors or by id.

    Their numbers and those of all other documents and chunks stay. Their content stays on the disk until [`compact`].
    Copies of the store that other processes have open see it after [`RetroDatastore.refresh`].

    Args:
        datastore ([`RetroDatastore`]): the store; refreshed at the end.
        ids (`str` or `Iterable[str]`): of one document, or of several.
    Raises:
        DatastoreInputError: if one is not in the store; nothing has changed.
    """
    ids = document_ids(ids)
    with _changing(datastore):
        numbers = datastore.document_numbers(ids)
        unknown = [id for id, number in zip(ids, numbers, strict=True) if number < 0]
        if unknown:
            others = (
                f", and {len(unknown) - 1:,} more of the {len(ids):,} ids are not there" if len(unknown) > 1 else ""
            )
            raise DatastoreInputError(
                f"There is no document with the id {unknown[0]!r} in {str(datastore.path)!r}{others}. Nothing was deleted; leave "
                "out what is not there. If the same call was stopped before, it may have been done."
            )
        if not ids:
            return
        manifest = datastore.manifest
        deleted = np.union1d(datastore.deleted_documents, numbers)
        path = datastore.path / _DELETED_NAME.format(manifest.generation + 1)
        with complete_file(path) as partial, NpyWriter(partial, np.dtype(np.int64)) as file:
            file.append(deleted)
        kept = (file for file in manifest.files if file.kind != "deleted")
        _replace(datastore, files=(*kept, describe_file(path, "deleted")), num_deleted_documents=len(deleted))


def compact(
    datastore: RetroDatastore,
    *,
    index: str = "auto",
    recall: float = 0.95,
    memory_budget: float | str | None = None,
    shard_chunks: int = DEFAULT_SHARD_CHUNKS,
    show_progress: bool | None = None,
) -> None:
    """Rewrite a datastore without its deleted documents and with as few shards as can be; nothing is embedded again.

    One that is so already stays as it is, unless something is asked of its index. Documents and chunks are numbered anew, so neighbors that were precomputed must be computed again. Needs room on the
    disk for a second copy while it runs.

    Args:
        datastore ([`RetroDatastore`]): the store; refreshed at the end.
        index, recall, memory_budget, shard_chunks, show_progress: as for [`RetroDatastore.build`]; shards are joined up to
            `shard_chunks`, but not divided.
    Raises:
        DatastoreInputError: if every document has been deleted; nothing has changed.
    """
    options = IndexOptions(index, recall, parse_bytes(memory_budget))
    with _changing(datastore) as work:
        manifest = datastore.manifest
        if datastore.num_deleted_documents == datastore.num_documents:
            raise DatastoreInputError(
                f"All documents of {str(datastore.path)!r} have been deleted, and a datastore has at least one. Append the documents that are to be there first, or remove the folder."
            )
        if options == IndexOptions() and _is_compact(datastore, shard_chunks):
            logger.info(f"Nothing to do: {str(datastore.path)!r} is compact already.")
            return
        keep = np.ones(datastore.num_documents, dtype=bool)
        keep[datastore.deleted_documents] = False
        shards = rewrite(datastore, keep, work, options, manifest.next_shard, shard_chunks, show_progress)
        shared = (file for file in manifest.files if file.kind == "tokenizer")
        _replace(
            datastore,
            shards=tuple(shard.entry for shard in shards),
            files=(*_placed(datastore.path, shards), *shared),
            next_shard=manifest.next_shard + len(shards),
            num_deleted_documents=0,
        )


def _is_compact(datastore: RetroDatastore, shard_chunks: int) -> bool:
    """Whether nothing is deleted, no shards can be joined, and each has the index of its size."""
    pieces: list[tuple[bool, Iterator[Piece], int]] = [
        (shard.chunk_starts is not None, iter(()), shard.num_chunks) for shard in datastore.shards
    ]
    joined = len(list(_grouped(pieces, shard_chunks))) < len(pieces)
    return (
        not joined
        and not datastore.num_deleted_documents
        and all(
            shard.entry.index["factory"] == plan_index(shard.num_chunks, shard.dim, IndexOptions()).factory
            for shard in datastore.shards
        )
    )


def rewrite(
    datastore: RetroDatastore,
    keep: np.ndarray,
    work: Path,
    options: IndexOptions,
    first_shard: int,
    shard_chunks: int,
    show_progress: bool | None,
) -> list[BuiltShard]:
    """Write the documents that `keep` (bool, `(num_documents,)`) marks to new shards, with the keys they have.

    Shards that were retokenized are not joined with others.
    """
    built: list[BuiltShard] = []
    manifest = datastore.manifest
    chunks_of = np.concatenate([np.diff(shard.doc_offsets) for shard in datastore.shards])
    total = int(chunks_of[keep].sum())
    start = 0
    pieces: list[tuple[bool, Iterator[Piece], int]] = []
    for shard in datastore.shards:
        here = slice(start, start + shard.num_documents)
        pieces.append(
            (shard.chunk_starts is not None, shard.pieces(keep[here]), int(chunks_of[here][keep[here]].sum()))
        )
        start += shard.num_documents
    with progress_bar(show_progress, total=total, unit="chunk", desc="Rewriting") as progress:
        for group in _grouped(pieces, shard_chunks):
            num_chunks = sum(count for _, count in group)
            plan = plan_index(num_chunks, manifest.dim, options, total)
            name = f"{first_shard + len(built):05d}"
            final = work / f"shard-{name}-rewritten-{manifest.generation}"
            with ShardWriter(final, name, np.dtype(manifest.token_dtype), manifest.dim) as writer:
                for part, _ in group:
                    for piece in part:
                        writer.add(piece)
                        progress.update(len(piece.keys))
                built.append(writer.finish(plan.factory, options.recall))
    return built


def _grouped(
    pieces: list[tuple[bool, Iterator[Piece], int]], shard_chunks: int
) -> Iterator[list[tuple[Iterator[Piece], int]]]:
    """Old shards that become one new shard: in order, alike, and together not above the limit if one alone is not."""
    group: list[tuple[Iterator[Piece], int]] = []
    kind = False
    for retokenized, part, count in pieces:
        if not count:
            continue
        if group and (retokenized != kind or sum(c for _, c in group) + count > shard_chunks):
            yield group
            group = []
        group.append((part, count))
        kind = retokenized
    if group:
        yield group


@contextmanager
def _changing(datastore: RetroDatastore) -> Iterator[Path]:
    """Hold the store for one writer, and see it as it is now."""
    if (datastore.path / MANIFEST_NAME).is_symlink():
        raise DatastoreInputError(
            f"{str(datastore.path)!r} is a download in the cache of the Hub's client, which must stay what its revision "
            "says. Make a copy with `datastore.save(path)` (or `cp -rL`), and change and push that."
        )
    with work_folder(datastore.path.absolute()) as work:
        datastore.refresh()
        _remove_unnamed(datastore.path, datastore.manifest)
        yield work


def _placed(folder: Path, shards: list[BuiltShard]) -> Iterator[FileEntry]:
    for shard in shards:
        shard.link_into(folder)
        yield from shard.files


def _replace(datastore: RetroDatastore, **changes: Any) -> None:
    """Write the next generation of the manifest; from then on the change has happened."""
    manifest = datastore.manifest
    new = dataclasses.replace(
        manifest, generation=manifest.generation + 1, library_version=library_version(), **changes
    )
    new.write(datastore.path)
    datastore.refresh()
    _remove_unnamed(datastore.path, new)


def _remove_unnamed(folder: Path, manifest: DatastoreManifest) -> None:
    """Remove files of shards and deletions that no manifest names, and what a killed writer left half-written.

    Processes that have them mapped keep them until they close them.
    """
    named = {file.name for file in manifest.files}
    patterns = [pattern.format("[0-9]*") for pattern in (*SHARD_FILES.values(), "deleted-{}.npy")]
    for pattern in (*patterns, *(f".{pattern}.*.partial" for pattern in (*patterns, MANIFEST_NAME))):
        for file in folder.glob(pattern):
            if file.name not in named:
                file.unlink(missing_ok=True)
