"""One shard of a datastore: its files, memory-mapped and checked, and the search over its chunks."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import xxhash

from ..errors import DatastoreNotFoundError
from .chunks import document_of, gather_tokens, ranges
from .exclusion import Deleted, search_excluding
from .index import import_faiss, max_effort, open_index, search_index, search_parameters
from .manifest import DatastoreManifest, ShardEntry
from .storage import damaged, map_npy, map_tensor
from .table import DocumentTable
from .writer import Piece


__all__ = ["Shard", "hash_of_id"]

# Borders of up to a million documents are checked when a shard opens: a few milliseconds.
_CHECKED_DOCUMENTS = 1 << 20
_INT64 = np.dtype(np.int64)


def hash_of_id(document_id: str) -> int:
    """The 64-bit hash that documents are found by; equal hashes are told apart by the ids themselves."""
    return xxhash.xxh3_64_intdigest(document_id.encode())


class Shard:
    """An opened shard. Documents and chunks are numbered from 0 in each shard.

    Args:
        folder (`Path`): of the datastore.
        manifest ([`DatastoreManifest`]): of the datastore.
        entry ([`ShardEntry`]): which of its shards to open.

    Raises:
        DatastoreCorruptError: if its files contradict the manifest.
    """

    def __init__(self, folder: Path, manifest: DatastoreManifest, entry: ShardEntry) -> None:
        self.entry = entry
        self.chunk_size, self.neighbor_size, self.dim = manifest.chunk_size, manifest.neighbor_size, manifest.dim
        self._files = {kind: folder / name for kind, name in manifest.shard_files(entry.name).items()}
        documents = entry.num_documents
        self.doc_offsets = map_npy(self._files["doc_offsets"], _INT64, documents + 1)
        self.doc_lengths = map_npy(self._files["doc_lengths"], _INT64, documents)
        self.tokens = map_npy(self._files["tokens"], np.dtype(manifest.token_dtype), entry.stream_length)
        self.chunk_starts = (
            map_npy(self._files["chunk_starts"], _INT64, entry.num_chunks) if "chunk_starts" in self._files else None
        )
        # By effort and by how much is fetched beyond what is wanted: a few of each.
        self._parameters: dict[tuple[int, float], Any] = {}
        self._check_borders()

    @property
    def num_chunks(self) -> int:
        """Chunks in the shard."""
        return self.entry.num_chunks

    @property
    def num_documents(self) -> int:
        """Documents in the shard."""
        return self.entry.num_documents

    @cached_property
    def keys(self) -> np.ndarray:
        """The keys: a read-only float16 memory map of shape `(num_chunks, dim)`, rows of length 1."""
        return map_tensor(self._present("keys"), (self.num_chunks, self.dim))

    @cached_property
    def index(self) -> Any:
        """The FAISS index over the keys, opened on first use through a memory map."""
        path, factory = self._present("index"), self.entry.index["factory"]
        index = open_index(path, self.num_chunks, self.dim)
        if (factory == "Flat") != isinstance(index, import_faiss().IndexFlat):
            raise damaged(path, f"it is a {type(index).__name__}, but the manifest says {factory!r}")
        return index

    @cached_property
    def documents(self) -> DocumentTable:
        """The documents as they were given."""
        return DocumentTable(self._present("documents"), self.num_documents)

    @cached_property
    def _ids(self) -> tuple[np.ndarray, np.ndarray]:
        """Sorted hashes of the documents' ids, and the document of each."""
        pairs = map_npy(self._present("ids"), np.dtype(np.uint64), 2 * self.num_documents)
        return pairs[: self.num_documents], pairs[self.num_documents :]

    def _present(self, kind: str) -> Path:
        """The path of a file that is opened when it is first needed, by which time it may be gone."""
        path = self._files[kind]
        if not path.exists():
            raise DatastoreNotFoundError(
                f"{str(path)!r} is no longer there. If the datastore was compacted since it was opened, call `refresh()` and "
                "look again; chunk ids from before are void. Otherwise restore the folder from a copy."
            )
        return path

    def find_ids(self, hashes: np.ndarray) -> Iterator[tuple[int, int]]:
        """Places in `hashes` (uint64, `(n,)`) whose document may be here, each with a document number to look at."""
        known, numbers = self._ids
        first = np.searchsorted(known, hashes, side="left")
        last = np.searchsorted(known, hashes, side="right")
        for place in np.flatnonzero(last > first):
            for row in range(int(first[place]), int(last[place])):
                number = int(numbers[row])
                if number >= self.num_documents:
                    raise damaged(self._files["ids"], f"it names document {number} of {self.num_documents}")
                yield int(place), number

    def starts_in_document(self, document: int) -> np.ndarray:
        """Where the chunks of a document begin, in tokens from its beginning (int64, `(num_chunks,)`)."""
        first, end = int(self.doc_offsets[document]), int(self.doc_offsets[document + 1])
        if self.chunk_starts is None:
            return np.arange(end - first) * self.chunk_size
        return self.chunk_starts[first:end] - self.chunk_starts[first]

    def pieces(self, keep: np.ndarray) -> Iterator[Piece]:
        """The documents that `keep` (bool, `(num_documents,)`) marks, with what was computed for them."""
        first = 0
        for table in self.documents.pieces():
            documents = first + np.flatnonzero(keep[first : first + table.num_rows])
            if len(documents):
                yield self._piece(documents, table.take(documents - first))
            first += table.num_rows

    def _piece(self, documents: np.ndarray, table: pa.Table) -> Piece:
        starts, ends = self.doc_offsets[documents], self.doc_offsets[documents + 1]
        counts, lengths = ends - starts, self.doc_lengths[documents]
        chunks = ranges(starts, counts)
        if self.chunk_starts is None:
            begins, sizes, chunk_starts = starts * self.chunk_size, counts * self.chunk_size, None
        else:
            begins, sizes = self.chunk_starts[starts], lengths
            new_begins = np.cumsum(lengths) - lengths
            chunk_starts = self.chunk_starts[chunks] + np.repeat(new_begins - begins, counts)
        ids = table.column("id").to_pylist()
        return Piece(
            tokens=self.tokens[ranges(begins, sizes)],
            lengths=lengths,
            counts=counts,
            hashes=np.array([hash_of_id(id) for id in ids], dtype=np.uint64),
            keys=self.keys[chunks],
            documents=table,
            chunk_starts=chunk_starts,
        )

    def gather(self, chunk_ids: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Tokens and mask of neighbors by chunk id, -1 for none; see [`gather_tokens`]."""
        return gather_tokens(
            chunk_ids,
            self.tokens,
            self.doc_offsets,
            self.doc_lengths,
            chunk_size=self.chunk_size,
            neighbor_size=self.neighbor_size,
            chunk_starts=self.chunk_starts,
        )

    def document_of(self, chunk_ids: np.ndarray) -> np.ndarray:
        """Document numbers of chunks, -1 for -1."""
        return document_of(chunk_ids, self.doc_offsets)

    def search(
        self, queries: np.ndarray, num_neighbors: int, excluded: np.ndarray | None, deleted: Deleted | None
    ) -> tuple[np.ndarray, np.ndarray]:
        """The nearest chunks of each query that it may see, best first.

        Args:
            queries (`np.ndarray` of float32 and shape `(num_queries, dim)`): unit vectors.
            num_neighbors (`int`): chunks per query.
            excluded (`np.ndarray` of int64 and shape `(num_queries, any)`, *optional*): documents that a query must
                not see, -1 for none.
            deleted ([`Deleted`], *optional*): documents that no query may see.
        Returns:
            `(scores, chunk_ids)` of shape `(num_queries, num_neighbors)`, float32 and int64; -inf and -1 for none.
        """
        if excluded is None and deleted is None:
            scores, ids = self._search(queries, num_neighbors, 1, num_neighbors)
            # Results come best first, so a row is full if its last is there.
            if self._max_effort == 1 or ids[:, min(num_neighbors, self.num_chunks) - 1].min(initial=0) >= 0:
                return scores, ids
        # Otherwise few lists were read and they held too little: read more of them for the rows that came out short.
        if excluded is None:
            excluded = np.empty((len(queries), 0), dtype=np.int64)

        def search(rows: np.ndarray, count: int, effort: int) -> tuple[np.ndarray, np.ndarray]:
            return self._search(rows, count, effort, num_neighbors)

        limit = self._max_effort
        return search_excluding(search, queries, num_neighbors, excluded, self.doc_offsets, limit, deleted)

    @cached_property
    def _max_effort(self) -> int:
        return max_effort(self.index, self.entry.index["search"])

    def _search(self, queries: np.ndarray, count: int, effort: int, wanted: int) -> tuple[np.ndarray, np.ndarray]:
        """`count` results per query, of which `wanted` are for the caller; `effort` multiplies the lists that are read."""
        key = (effort, wanted / count)
        if key not in self._parameters:
            search = dict(self.entry.index["search"])
            if "nprobe" in search:
                search["nprobe"] *= effort
            if "k_factor" in search:
                # The number re-scored was tuned for the wanted results; those fetched beyond them count as re-scored.
                search["k_factor"] = max(1.0, search["k_factor"] * key[1])
            self._parameters[key] = search_parameters(self.index, search)
        if not len(queries):
            return np.empty((0, count), dtype=np.float32), np.empty((0, count), dtype=np.int64)
        scores, ids = search_index(self.index, queries, min(count, self.num_chunks), self._parameters[key])
        # One look where all is well: as unsigned numbers, the negative ones of missing results are beyond the last, too.
        if ids.view(np.uint64).max() >= self.num_chunks:
            if ids.max() >= self.num_chunks:
                raise damaged(self._files["index"], "it returns chunks that the shard does not have")
            scores[ids < 0] = -np.inf
        if count > self.num_chunks:
            missing = ((0, 0), (0, count - self.num_chunks))
            scores = np.pad(scores, missing, constant_values=-np.inf)
            ids = np.pad(ids, missing, constant_values=-1)
        return scores, ids

    def _check_borders(self) -> None:
        offsets, lengths, starts = self.doc_offsets, self.doc_lengths, self.chunk_starts
        sound = offsets[0] == 0 and offsets[-1] == self.num_chunks
        if sound and self.num_documents <= _CHECKED_DOCUMENTS:
            chunks = np.diff(offsets)
            sound = bool((chunks > 0).all() and (lengths > 0).all())
            if sound and starts is None:
                sound = bool((-(-lengths // self.chunk_size) == chunks).all())
        if not sound:
            raise damaged(self._files["doc_offsets"], "its document borders contradict each other")
        if starts is not None and (starts[0] != 0 or (np.diff(starts) < 0).any() or starts[-1] >= len(self.tokens)):
            raise damaged(self._files["chunk_starts"], "its chunks do not follow each other in the token stream")
