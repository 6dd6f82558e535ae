"""One generation of a datastore as it was opened: its shards under common numbers, and what has been deleted."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import DatastoreInputError, counted
from .exclusion import Deleted, checked_exclusion
from .manifest import DatastoreManifest
from .shard import Shard, hash_of_id
from .storage import RESTORE, damaged, map_npy, sha256_of


__all__ = [
    "RestrictedIndex",
    "View",
    "check_num_neighbors",
    "check_sizes",
    "checked_search",
    "merge_results",
    "verify_files",
]


# Neighbors that may be asked of a store with fewer chunks: what it lacks is filled with -1.
_FILLED_NEIGHBORS = 1 << 16


@dataclass(frozen=True)
class View:
    """Never changed, only replaced as a whole, so that a thread sees one generation or the next.

    It may be of some shards in a row only, which keep the numbers that their chunks and documents have in the store.

    Attributes:
        manifest ([`DatastoreManifest`]): of this generation.
        shards (`tuple[Shard]`): in order; each numbers its own chunks and documents from 0.
        chunk_starts, document_starts (`np.ndarray` of int64 and shape `(num_shards + 1,)`): the first chunk and document of
            each shard, then where the last one ends.
        deleted (`np.ndarray` of int64): numbers of deleted documents, in order.
        deleted_by_shard (`tuple[Deleted | None]`): the same in the numbers of each shard.
    """

    manifest: DatastoreManifest
    shards: tuple[Shard, ...]
    chunk_starts: np.ndarray
    document_starts: np.ndarray
    deleted: np.ndarray
    deleted_by_shard: tuple[Deleted | None, ...]

    @classmethod
    def open(
        cls, folder: Path, manifest: DatastoreManifest, known: Iterable[Shard] = (), places: range | None = None
    ) -> View:
        """Open what a manifest names, taking over shards that are open already: a name stands for the same files.

        Args:
            places (`range`, *optional*): of the shards to open; all by default.
        Raises:
            DatastoreCorruptError: if a file is missing, or not as the manifest says.
        """
        places = range(len(manifest.shards)) if places is None else places
        entries = manifest.shards[places.start : places.stop]
        check_sizes(folder, manifest, shards={entry.name for entry in entries})
        opened = {shard.entry.name: shard for shard in known}
        shards = tuple(opened.get(entry.name) or Shard(folder, manifest, entry) for entry in entries)
        here = slice(places.start, places.stop + 1)
        starts = np.cumsum([0, *(entry.num_documents for entry in manifest.shards)])[here]
        deleted = np.empty(0, dtype=np.int64)
        for file in manifest.entries("deleted"):
            deleted = np.array(map_npy(folder / file.name, deleted.dtype, manifest.num_deleted_documents))
            if (np.diff(deleted) <= 0).any() or deleted[0] < 0 or deleted[-1] >= manifest.num_documents:
                raise damaged(folder / file.name, "its numbers of deleted documents are not in order, or too large")
        return cls(
            manifest=manifest,
            shards=shards,
            chunk_starts=np.cumsum([0, *(entry.num_chunks for entry in manifest.shards)])[here],
            document_starts=starts,
            deleted=deleted,
            deleted_by_shard=tuple(
                _deleted_in(shard, deleted, int(start)) for shard, start in zip(shards, starts, strict=False)
            ),
        )

    def without(self, documents: np.ndarray) -> View:
        """The same view with more documents (numbers, int64) that are not found, as if they were deleted."""
        hidden = np.union1d(self.deleted, documents)
        by_shard = (
            _deleted_in(shard, hidden, int(start))
            for shard, start in zip(self.shards, self.document_starts, strict=False)
        )
        return replace(self, deleted=hidden, deleted_by_shard=tuple(by_shard))

    @property
    def num_chunks(self) -> int:
        """Chunks of all shards."""
        return int(self.chunk_starts[-1])

    @property
    def num_documents(self) -> int:
        """Documents of all shards, deleted ones included."""
        return int(self.document_starts[-1])

    def checked_ids(self, chunk_ids: Any) -> np.ndarray:
        """Chunk ids as int64.

        Raises:
            DatastoreInputError: for ids of another type, or that are not in the store.
        """
        ids = np.asarray(chunk_ids)
        if ids.size and not np.issubdtype(ids.dtype, np.integer):
            raise DatastoreInputError(f"Chunk ids are of type {ids.dtype}, not integers.")
        ids = ids.astype(np.int64, copy=False)
        if ids.size and (ids.min() < -1 or ids.max() >= self.num_chunks):
            raise DatastoreInputError(
                f"Chunk ids run from {ids.min()} to {ids.max()}, but the store has chunks 0 to {self.num_chunks - 1} "
                "(-1 for none). Were they computed with another datastore?"
            )
        return ids

    def gather(self, ids: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Tokens and mask of neighbors, int64 of shape `(*ids.shape, neighbor_size)`; deleted ones are no neighbor."""
        if len(self.deleted):
            ids = np.where(np.isin(self.document_of(ids), self.deleted), -1, ids)
        if len(self.shards) == 1:
            return self.shards[0].gather(ids)
        tokens = np.zeros((*ids.shape, self.manifest.neighbor_size), dtype=np.int64)
        mask = np.zeros_like(tokens)
        for number, here in self._by_shard(ids):
            tokens[here], mask[here] = self.shards[number].gather(ids[here] - self.chunk_starts[number])
        return tokens, mask

    def keys_of(self, ids: np.ndarray) -> np.ndarray:
        """Keys, float32 of shape `(*ids.shape, dim)`; zeros for -1."""
        keys = np.zeros((*ids.shape, self.manifest.dim), dtype=np.float32)
        for number, here in self._by_shard(ids):
            keys[here] = self.shards[number].keys[ids[here] - self.chunk_starts[number]]
        return keys

    def document_of(self, ids: np.ndarray) -> np.ndarray:
        """Document numbers of chunks, int64 in the shape of `ids`; -1 for -1."""
        if len(self.shards) == 1:
            return self.shards[0].document_of(ids)
        numbers = np.full(ids.shape, -1, dtype=np.int64)
        for number, here in self._by_shard(ids):
            local = self.shards[number].document_of(ids[here] - self.chunk_starts[number])
            numbers[here] = local + self.document_starts[number]
        return numbers

    def first_chunks(self, documents: np.ndarray) -> np.ndarray:
        """The first chunk of documents by number, int64; for `num_documents` the number of chunks."""
        owner = np.searchsorted(self.document_starts, documents, side="right") - 1
        owner = np.minimum(owner, len(self.shards) - 1)
        first = np.empty(documents.shape, dtype=np.int64)
        for number, shard in enumerate(self.shards):
            here = owner == number
            first[here] = shard.doc_offsets[documents[here] - self.document_starts[number]] + self.chunk_starts[number]
        return first

    def document(self, number: int) -> dict[str, Any]:
        """The document of a number that the store has."""
        place = int(np.searchsorted(self.document_starts, number, side="right") - 1)
        return self.shards[place].documents.document(number - int(self.document_starts[place]))

    def document_numbers(self, ids: Sequence[str]) -> np.ndarray:
        """Numbers of documents by id, int64; -1 for those that aren't there or have been deleted."""
        hashes = np.array([hash_of_id(id) for id in ids], dtype=np.uint64)
        numbers = np.full(len(ids), -1, dtype=np.int64)
        deleted = set(self.deleted.tolist())
        for shard, start in zip(self.shards, self.document_starts, strict=False):
            for place, local in shard.find_ids(hashes):
                number = local + int(start)
                if number not in deleted and shard.documents.document_id(local) == ids[place]:
                    numbers[place] = number
        return numbers

    def search(
        self, queries: np.ndarray, num_neighbors: int, excluded: np.ndarray | None
    ) -> tuple[np.ndarray, np.ndarray]:
        """Search every shard and merge; `excluded` holds document numbers, int64 of shape `(num_queries, any)`."""
        parts = []
        for number, shard in enumerate(self.shards):
            local = None
            if excluded is not None:
                local = excluded - self.document_starts[number]
                local = np.where((excluded < 0) | (local < 0) | (local >= shard.num_documents), -1, local)
            scores, ids = shard.search(queries, num_neighbors, local, self.deleted_by_shard[number])
            if self.chunk_starts[number]:
                ids = np.where(ids < 0, -1, ids + self.chunk_starts[number])
            parts.append((scores, ids))
        return merge_results(parts)

    def _by_shard(self, ids: np.ndarray) -> Iterator[tuple[int, np.ndarray]]:
        """For each shard that has some of the chunks: its place, and which of `ids` (bool) it has."""
        for number in range(len(self.shards)):
            here = (ids >= self.chunk_starts[number]) & (ids < self.chunk_starts[number + 1])
            if here.any():
                yield number, here


class RestrictedIndex:
    """Finds only the chunks of some documents of a datastore, under the numbers that they have there: a [`VectorIndex`].

    What it finds is what a [`subset`] of these documents would find, as exactly as the datastore's own index searches.

    Args:
        view ([`View`]): of the datastore.
        documents (`np.ndarray` of bool and shape `(num_documents,)`): which may be found; deleted ones are not.
    """

    def __init__(self, view: View, documents: np.ndarray) -> None:
        self._view = view.without(np.flatnonzero(~documents))
        found = np.setdiff1d(np.arange(view.num_documents), self._view.deleted)
        self.num_documents = len(found)
        self.num_chunks = int((view.first_chunks(found + 1) - view.first_chunks(found)).sum())

    def search(
        self, queries: np.ndarray, num_neighbors: int, *, exclude_documents: Any = None
    ) -> tuple[np.ndarray, np.ndarray]:
        """The nearest chunks of each query; see [`RetroDatastore.search`]."""
        queries, excluded = checked_search(self._view.manifest, queries, num_neighbors, exclude_documents)
        return self._view.search(queries, num_neighbors, excluded)


def check_sizes(
    folder: Path, manifest: DatastoreManifest, remedy: str = RESTORE, shards: Collection[str] | None = None
) -> None:
    """Check that every file is there and as long as the manifest says.

    Sizes come first: reading past the end of a mapped file that was cut short kills the process.

    Args:
        shards (`Collection[str]`, *optional*): names of the shards to look at; all by default.
    Raises:
        DatastoreCorruptError: at the first that is not.
    """
    for entry in manifest.files:
        if shards is not None and entry.shard is not None and entry.shard not in shards:
            continue
        try:
            size = (folder / entry.name).stat().st_size
        except (FileNotFoundError, NotADirectoryError) as error:
            raise damaged(folder / entry.name, "it is missing", remedy) from error
        if size != entry.size:
            reason = f"it has {size:,} bytes, but the manifest says {entry.size:,}"
            raise damaged(folder / entry.name, reason, remedy)


def verify_files(folder: Path, manifest: DatastoreManifest, remedy: str = RESTORE) -> None:
    """Compare size and sha256 of every file with the manifest.

    Raises:
        DatastoreCorruptError: at the first that differs.
    """
    check_sizes(folder, manifest, remedy)
    for entry in manifest.files:
        found = sha256_of(folder / entry.name)
        if found != entry.sha256:
            reason = f"its sha256 is {found}, but the manifest says {entry.sha256}"
            raise damaged(folder / entry.name, reason, remedy)


def _deleted_in(shard: Shard, deleted: np.ndarray, first_document: int) -> Deleted | None:
    begin, end = np.searchsorted(deleted, (first_document, first_document + shard.num_documents))
    if begin == end:
        return None
    numbers = deleted[begin:end] - first_document
    mask = np.zeros(shard.num_documents, dtype=bool)
    mask[numbers] = True
    return Deleted(mask, int((shard.doc_offsets[numbers + 1] - shard.doc_offsets[numbers]).sum()))


def checked_search(
    manifest: DatastoreManifest, queries: Any, num_neighbors: int, exclude_documents: Any
) -> tuple[np.ndarray, np.ndarray | None]:
    """The queries as float32 of shape `(num_queries, dim)`, and the excluded documents as int64 `(num_queries, any)`.

    Raises:
        DatastoreInputError: for arguments that do not fit the store; see [`RetroDatastore.search`].
    """
    try:
        queries = np.ascontiguousarray(queries, dtype=np.float32)
    except (TypeError, ValueError) as error:
        raise DatastoreInputError(
            f"The queries are of type {type(queries).__name__}, but vectors of shape (num_queries, {manifest.dim}) are expected. "
            "To look up texts: `RetroRetriever(datastore, embedder=...).find(texts)`."
        ) from error
    if queries.ndim != 2 or queries.shape[1] != manifest.dim:
        raise DatastoreInputError(
            f"The queries have shape {queries.shape}, but (num_queries, {manifest.dim}) is expected."
        )
    if not np.isfinite(queries).all():
        raise DatastoreInputError("The queries hold values that are not finite (NaN or infinity).")
    check_num_neighbors(num_neighbors, manifest.num_chunks)
    excluded = None
    if exclude_documents is not None:
        excluded = checked_exclusion(exclude_documents, len(queries), manifest.num_documents)
    return queries, excluded


def check_num_neighbors(num_neighbors: int, num_chunks: int) -> None:
    """Refuse a number of neighbors below 1, or so far above the chunks of the store that it can only be a slip.

    Raises:
        DatastoreInputError: for such a number.
    """
    if num_neighbors < 1:
        raise DatastoreInputError(f"num_neighbors is {num_neighbors}, but it must be at least 1.")
    if num_neighbors > max(num_chunks, _FILLED_NEIGHBORS):
        raise DatastoreInputError(
            f"num_neighbors is {num_neighbors:,}, but the store has {counted(num_chunks, 'chunk')}. Ask for no more than that."
        )


def merge_results(parts: Sequence[tuple[np.ndarray, np.ndarray]]) -> tuple[np.ndarray, np.ndarray]:
    """The best of several searches for the same queries.

    Args:
        parts: scores and ids of each search, both of shape `(num_queries, num_neighbors)`.
    Returns:
        Scores and ids of the same shape; the first search wins ties.
    """
    if len(parts) == 1:
        return parts[0]
    scores, ids = (np.concatenate(arrays, axis=1) for arrays in zip(*parts, strict=True))
    order = np.argsort(-scores, axis=1, kind="stable")[:, : parts[0][0].shape[1]]
    return np.take_along_axis(scores, order, axis=1), np.take_along_axis(ids, order, axis=1)
