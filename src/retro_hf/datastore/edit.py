"""
Changing a datastore: append, sync, delete, compact.

A change writes new files first and then, as its last step, the manifest that names them. A process that is killed leaves
the old state or the new one. Files that no manifest names are removed by the next change; unfinished work is used again
when the same call is repeated.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from transformers.utils import logging

from ..arguments import flag, whole
from ..errors import DatastoreInputError, counted
from ..progress import progress_bar
from .atomic_files import MANIFEST_NAME, complete_file, write_npy
from .build import BuildOptions, build_shards, work_folder
from .document_changes import Changes, Comparison, similar_ids
from .documents import DocumentReader, document_ids
from .embedder import ChunkEmbedder
from .executors import Executor, as_executor
from .index_plan import DEFAULT_SHARD_CHUNKS, IndexOptions, plan_index
from .manifest import (
    FORMAT_VERSION,
    SHARD_FILES,
    DatastoreManifest,
    FileEntry,
    describe_file,
    library_version,
    unique_sources,
)
from .shard import BuiltShard, Shard, ShardWriter


if TYPE_CHECKING:
    from .store import RetroDatastore

logger = logging.get_logger(__name__)


def append(
    datastore: RetroDatastore, documents: Any, *, embedder: ChunkEmbedder | str, replace: bool = False, **options: Any
) -> Changes:
    """Add documents to a datastore as a new shard, with an index of its own, in one step.

    Every shard is searched, so after many appends [`compact`] makes search faster.

    Args:
        datastore ([`RetroDatastore`]): the store; refreshed at the end.
        documents: as for [`RetroDatastore.build`]. A text without an id gets its position in the input, which an earlier build
            or append has probably used.
        embedder ([`ChunkEmbedder`] or `str`): the encoder that made the store's keys.
        replace (`bool`, defaults to `False`): a document takes the place of the one with its id; one that is equal to it is
            left out. Otherwise such an id is an error.
        options: `index`, `batch_size`, `shard_chunks`, `executor`, `show_progress`, `encoding` and `split`, as for
            [`RetroDatastore.build`], for the new documents.
    Returns:
        [`Changes`]: what was new, changed and unchanged.
    Raises:
        DatastoreInputError: for documents that cannot be added; nothing is changed.
        DatastoreMismatchError: for another embedder than the store's.
    """
    replace = flag("replace", replace, DatastoreInputError)
    return _update(datastore, documents, lambda: Comparison(datastore, replaces=replace), embedder, **options)


def compare(
    datastore: RetroDatastore, documents: Any, *, encoding: str | None = None, split: str | None = None
) -> Changes:
    """What [`sync`] would change; nothing is written.

    Args:
        datastore ([`RetroDatastore`]): the store; refreshed first.
        documents, encoding, split: as for [`RetroDatastore.build`].
    Returns:
        [`Changes`]: the ids of new, changed and gone documents.
    """
    datastore.refresh()
    reader, comparison = DocumentReader(documents, encoding=encoding, split=split), _mirror(datastore)
    for _ in comparison.select(iter(reader)):
        pass
    reader.warn_of_repairs()
    return comparison.changes()


def sync(datastore: RetroDatastore, documents: Any, *, embedder: ChunkEmbedder | str, **options: Any) -> Changes:
    """Make a datastore hold the documents of a folder, or of any other input: new ones are added, changed ones replaced, and
    those that are gone deleted, all in one step.

    A document is the same if it has the same id, and it has changed if any of its fields differs from what the store holds.
    Only new and changed documents are embedded. Pass the same path, `encoding` and `split` as for the build, since ids come
    from them.

    Args:
        datastore ([`RetroDatastore`]): the store; refreshed at the end.
        documents: all documents that the store is to have, as for [`RetroDatastore.build`].
        embedder ([`ChunkEmbedder`] or `str`): the encoder that made the store's keys.
        options: `index`, `batch_size`, `shard_chunks`, `executor`, `show_progress`, `encoding` and `split`, as for
            [`RetroDatastore.build`].
    Returns:
        [`Changes`]: what was new, changed, gone and unchanged.
    Raises:
        DatastoreInputError: for invalid documents, or if none of the store's documents is among them; nothing is changed.
        DatastoreMismatchError: for another embedder than the store's.
    """
    return _update(datastore, documents, lambda: _mirror(datastore), embedder, **options)


def _mirror(datastore: RetroDatastore) -> Comparison:
    return Comparison(datastore, replaces=True, is_mirror=True)


def _update(
    datastore: RetroDatastore,
    documents: Any,
    compare_with: Callable[[], Comparison],
    embedder: ChunkEmbedder | str,
    *,
    index: IndexOptions | str = "auto",
    batch_size: int = 64,
    shard_chunks: int = DEFAULT_SHARD_CHUNKS,
    executor: Executor | int = 1,
    show_progress: bool | None = None,
    encoding: str | None = None,
    split: str | None = None,
) -> Changes:
    """Write what differs between documents and a store as new shards, and delete what they replace and what is gone, as one
    generation; nobody else changes the store meanwhile.
    """
    reader = DocumentReader(documents, encoding=encoding, split=split)
    embedder = ChunkEmbedder.of(embedder)
    datastore.check_compatible(embedder=embedder)
    options = BuildOptions(
        tokenizer=datastore.tokenizer,
        embedder=embedder,
        chunk_size=datastore.chunk_size,
        neighbor_size=datastore.neighbor_size,
        index=IndexOptions.of(index),
        batch_size=batch_size,
        shard_chunks=shard_chunks,
        show_progress=show_progress,
    )
    executor = as_executor(executor)
    with _changing(datastore) as work:
        manifest, comparison = datastore.manifest, compare_with()
        built = build_shards(reader, work, options, executor, manifest.next_shard, comparison.select)
        changes = comparison.changes()
        hidden = [*comparison.replaced, *comparison.gone().tolist()]
        if built is not None and (built.shards or hidden):
            # The documents of a mirror are all that the store holds, so nothing is left of what is recorded about earlier ones.
            is_all = comparison.is_mirror
            _replace(
                datastore,
                shards=(*manifest.shards, *(shard.entry for shard in built.shards)),
                next_shard=manifest.next_shard + len(built.shards),
                num_empty_documents=built.num_empty + (0 if is_all else manifest.num_empty_documents),
                sources=unique_sources([*(() if is_all else manifest.sources), *built.sources]),
                **_without(datastore, hidden, placed(built.shards, datastore.path)),
            )
        return changes


def _without(datastore: RetroDatastore, numbers: Sequence[int], added: Sequence[FileEntry] = ()) -> dict[str, Any]:
    """The fields of the next manifest in which more documents are deleted and files are added; writes their numbers."""
    files = (*datastore.manifest.files, *added)
    if not len(numbers):
        return {"files": files}
    deleted = np.union1d(datastore.deleted_documents, np.asarray(numbers, dtype=np.int64))
    path = datastore.path / f"deleted-{datastore.generation + 1:05d}.npy"
    with complete_file(path) as partial:
        write_npy(partial, deleted)
    kept = (file for file in files if file.kind != "deleted")
    return {"files": (*kept, describe_file(path, "deleted")), "num_deleted_documents": len(deleted)}


def delete(datastore: RetroDatastore, ids: str | Iterable[str]) -> None:
    """Never return some documents again, as neighbors or by id.

    All numbers of documents and chunks stay the same. The content stays on the disk until [`compact`]. Other processes see
    the change after [`RetroDatastore.refresh`].

    Args:
        datastore ([`RetroDatastore`]): the store; refreshed at the end.
        ids (`str` or `Iterable[str]`): of one document, or of several.
    Raises:
        DatastoreInputError: if one is not in the store; nothing is changed.
    """
    ids = document_ids(ids)
    with _changing(datastore):
        numbers = datastore.document_numbers(ids)
        unknown = [id for id, number in zip(ids, numbers, strict=True) if number < 0]
        if unknown:
            raise DatastoreInputError(
                f"{str(datastore.path)!r} lacks {len(unknown):,} of {counted(len(ids), 'id')}, such as {unknown[0]!r}, so nothing "
                f"was deleted. {similar_ids(datastore, unknown[0])}Leave them out. If the same call was interrupted before, it may have succeeded."
            )
        if not ids:
            return
        _replace(datastore, **_without(datastore, numbers.tolist()))


def compact(
    datastore: RetroDatastore,
    *,
    index: IndexOptions | str = "auto",
    shard_chunks: int = DEFAULT_SHARD_CHUNKS,
    show_progress: bool | None = None,
) -> None:
    """Rewrite a datastore without its deleted documents and with as few shards as possible.

    A store that is compact already stays as it is, unless options for its index are given. Documents and chunks get new
    numbers, so precomputed neighbors must be computed again. The disk needs room for a second copy while it runs.

    Args:
        datastore ([`RetroDatastore`]): the store; refreshed at the end.
        index, show_progress: as for [`RetroDatastore.build`].
        shard_chunks (`int`, defaults to 67,108,864): shards are joined up to this number of chunks, but not divided.
    Raises:
        DatastoreInputError: if every document has been deleted; nothing is changed.
    """
    options = IndexOptions.of(index)
    shard_chunks = whole("shard_chunks", shard_chunks, DatastoreInputError)
    with _changing(datastore) as work:
        manifest = datastore.manifest
        if datastore.num_deleted_documents == datastore.num_documents:
            raise DatastoreInputError(
                f"All documents of {str(datastore.path)!r} have been deleted. Append documents first, or remove the folder."
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
            files=(*placed(shards, datastore.path), *shared),
            next_shard=manifest.next_shard + len(shards),
            num_deleted_documents=0,
        )


@contextmanager
def _changing(datastore: RetroDatastore) -> Iterator[Path]:
    """Lock the store for one writer, and see it as it is now."""
    if (datastore.path / MANIFEST_NAME).is_symlink():
        raise DatastoreInputError(
            f"{str(datastore.path)!r} is a download in the Hub's cache, which must stay unchanged. Make a copy with "
            "`datastore.save(path)`, and change and push that."
        )
    with work_folder(datastore.path.absolute()) as work:
        datastore.refresh()
        _remove_unnamed(datastore)  # what a killed writer left, whose names this one may need
        yield work


def placed(shards: list[BuiltShard], folder: Path) -> list[FileEntry]:
    """Put the files of finished shards into a folder; returns their entries."""
    return [file for shard in shards for file in shard.link_into(folder)]


def _replace(datastore: RetroDatastore, **changes: Any) -> None:
    """Write the next generation of the manifest; this one step makes the change."""
    write_changed(datastore.manifest, datastore.path, generation=datastore.generation + 1, **changes)
    datastore.refresh()
    _remove_unnamed(datastore)  # what this change has replaced


def write_changed(manifest: DatastoreManifest, folder: Path, *, generation: int = 1, **changes: Any) -> None:
    """Write a manifest that differs from another by some fields, and by the versions that write it."""
    changes |= {"generation": generation, "library_version": library_version(), "format_version": FORMAT_VERSION}
    dataclasses.replace(manifest, **changes).write(folder)


def _remove_unnamed(datastore: RetroDatastore) -> None:
    """Remove data files that the manifest does not name, and what a killed writer left half-written.

    A process that has them mapped keeps their content until it closes them.
    """
    named = {file.name for file in datastore.manifest.files}
    patterns = [pattern.format("[0-9]*") for pattern in (*SHARD_FILES.values(), "deleted-{}.npy")]
    for pattern in (*patterns, *(f".{pattern}.*.partial" for pattern in (*patterns, MANIFEST_NAME))):
        for file in datastore.path.glob(pattern):
            if file.name not in named:
                file.unlink(missing_ok=True)


# ── rewriting shards ──────────────────────────────────────────────────────────────────────────────────────────────────


class _Source(NamedTuple):
    """A shard to be rewritten, which of its documents (bool, `(num_documents,)`) are kept, and the chunks of these."""

    shard: Shard
    keep: np.ndarray
    num_chunks: int


def _sources(datastore: RetroDatastore, keep: np.ndarray) -> list[_Source]:
    sources, start = [], 0
    for shard in datastore.shards:
        here = keep[start : start + shard.num_documents]
        sources.append(_Source(shard, here, int(np.diff(shard.doc_offsets)[here].sum())))
        start += shard.num_documents
    return [source for source in sources if source.num_chunks]


def _joined(sources: list[_Source], shard_chunks: int) -> list[list[_Source]]:
    """Consecutive shards that become one: both retokenized or both not, with keys of the same text, and not above the limit."""
    groups: list[list[_Source]] = []
    for source in sources:
        last = groups[-1] if groups else []
        alike = last and _kinds(last[0].shard) == _kinds(source.shard)
        if alike and sum(one.num_chunks for one in last) + source.num_chunks <= shard_chunks:
            last.append(source)
        else:
            groups.append([source])
    return groups


def _kinds(shard: Shard) -> tuple[bool, bool]:
    # A retokenized stream has no padding, and a store of an earlier version does not say where chunks begin in their texts:
    # a shard has one file for all of its chunks, or none.
    return shard.chunk_starts is None, shard.text_starts is None


def _is_compact(datastore: RetroDatastore, shard_chunks: int) -> bool:
    """Whether nothing is deleted, no shards can be joined, and each has the index of its size."""
    if datastore.num_deleted_documents:
        return False
    sources = _sources(datastore, np.ones(datastore.num_documents, dtype=bool))
    return len(_joined(sources, shard_chunks)) == len(sources) and all(
        shard.entry.index["factory"] == plan_index(shard.num_chunks, shard.dim, IndexOptions()).factory
        for shard in datastore.shards
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
    """Write the documents marked in `keep` (bool, `(num_documents,)`) to new shards, with the keys they have."""
    built: list[BuiltShard] = []
    manifest = datastore.manifest
    sources = _sources(datastore, keep)
    total = sum(source.num_chunks for source in sources)
    with progress_bar(show_progress, total=total, unit="chunk", desc="Rewriting") as progress:
        for group in _joined(sources, shard_chunks):
            plan = plan_index(sum(source.num_chunks for source in group), manifest.dim, options, total)
            name = f"{first_shard + len(built):05d}"
            final = work / f"shard-{name}-rewritten-{manifest.generation}"
            with ShardWriter(final, name, np.dtype(manifest.token_dtype), manifest.dim) as writer:
                for source in group:
                    for piece in source.shard.pieces(source.keep):
                        writer.add(piece)
                        progress.update(len(piece.keys))
                built.append(writer.finish(plan.factory, options.recall))
    return built
