"""One shard of a datastore: how it is written, and its files memory-mapped, checked, read and searched."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from ..locks import Lock, lazy
from ..outside import parse_json
from .atomic_files import (
    INT64,
    UINT32,
    NpyWriter,
    TensorWriter,
    bytes_of,
    damaged,
    group_bytes,
    hash_of,
    link_or_copy,
    map_npy,
    map_tensor,
    mapped,
    open_parquet,
    partial_folder,
    reading,
    write_file,
)
from .chunks import document_of, gather_tokens, ranges
from .index import build_index, max_effort, open_index, search_index, search_parameters
from .manifest import SHARD_FILES, DatastoreManifest, FileEntry, ShardEntry, describe_file
from .search_excluding import Deleted, search_excluding


DOCUMENT_SCHEMA = pa.schema([(name, pa.string()) for name in ("id", "title", "source", "text", "metadata")])
# Documents are read back one by one, so row groups are small.
GROUP_DOCUMENTS = 512
# A row group is read as a whole, so what it may take is bounded, and known before it is read.
MAX_GROUP_BYTES = 1 << 30
_MAX_GROUP_DOCUMENTS = 1 << 16
_OPTIONAL_TEXTS = ("metadata",)
_DESCRIPTION_NAME = "shard.json"
_CACHED_GROUPS = 4
_CACHED_ID_GROUPS = 4096
# The borders of up to a million documents are checked when a shard opens, which takes a few milliseconds.
_CHECKED_DOCUMENTS = 1 << 20


# ── writing ───────────────────────────────────────────────────────────────────────────────────────────────────────────


class Piece(NamedTuple):
    """Some consecutive documents that are to be written to a shard.

    Attributes:
        tokens (`np.ndarray` of uint16 or uint32 and shape `(stream_length,)`): their part of the stream.
        lengths (`np.ndarray` of int64 and shape `(num_documents,)`): real tokens of each document.
        counts (`np.ndarray` of int64 and shape `(num_documents,)`): chunks of each document.
        hashes (`np.ndarray` of uint64 and shape `(num_documents,)`): of their ids.
        keys (`np.ndarray` of float16 and shape `(num_chunks, dim)`).
        documents (`pa.Table`): the documents, by `DOCUMENT_SCHEMA`.
        chunk_starts (`np.ndarray` of int64 and shape `(num_chunks,)`, *optional*): where in `tokens` each chunk begins,
            if not at every multiple of the chunk size.
        text_starts (`np.ndarray` of uint32 and shape `(num_chunks,)`, *optional*): where in the text of its document each
            chunk begins, if the keys are made of that text.
    """

    tokens: np.ndarray
    lengths: np.ndarray
    counts: np.ndarray
    hashes: np.ndarray
    keys: np.ndarray
    documents: pa.Table
    chunk_starts: np.ndarray | None = None
    text_starts: np.ndarray | None = None


@dataclass(frozen=True)
class BuiltShard:
    """A finished shard outside of any datastore: the folder with its files, and its entries for a manifest."""

    folder: Path
    entry: ShardEntry
    files: tuple[FileEntry, ...]

    @classmethod
    def read(cls, folder: Path) -> BuiltShard:
        """Read the description that [`ShardWriter`] wrote to the folder."""
        content = json.loads((folder / _DESCRIPTION_NAME).read_bytes())
        return cls(folder, ShardEntry(**content["entry"]), tuple(FileEntry(**file) for file in content["files"]))

    def link_into(self, folder: Path) -> tuple[FileEntry, ...]:
        """Put the files into a datastore, where they take effect once its manifest names them; returns their entries."""
        for file in self.files:
            link_or_copy(self.folder / file.name, folder / file.name)
        return self.files


class ShardWriter:
    """Writes a shard to a folder of its own, which is renamed to `final` when the shard is complete.

    Args:
        final (`Path`): the folder; an existing one is left unchanged.
        name (`str`): of the shard.
        dtype (`np.dtype`): of the token stream.
        dim (`int`): length of the keys.
    """

    def __init__(self, final: Path, name: str, dtype: np.dtype, dim: int) -> None:
        self._final = final
        self._name, self._dim = name, dim
        self._hashes: list[np.ndarray] = []
        self._num_chunks = self._num_documents = self._num_tokens = self._stream_length = self._max_token_id = 0
        final.parent.mkdir(parents=True, exist_ok=True)
        with ExitStack() as unfinished:
            # An executor may repeat a task while the first worker, believed dead, still runs: each gets its own folder.
            self._folder = unfinished.enter_context(partial_folder(final.parent, final.name))
            self._path = {kind: self._folder / pattern.format(name) for kind, pattern in SHARD_FILES.items()}
            files = unfinished.enter_context(ExitStack())
            self._tokens = files.enter_context(NpyWriter(self._path["tokens"], dtype))
            self._offsets, self._lengths, self._starts = (
                files.enter_context(NpyWriter(self._path[kind], INT64))
                for kind in ("doc_offsets", "doc_lengths", "chunk_starts")
            )
            self._texts = files.enter_context(NpyWriter(self._path["text_starts"], UINT32))
            self._keys = files.enter_context(TensorWriter(self._path["keys"], dim))
            documents = pq.ParquetWriter(self._path["documents"], DOCUMENT_SCHEMA, compression="zstd")
            self._documents = files.enter_context(documents)
            self._files = files
            self._unfinished = unfinished.pop_all()

    def __enter__(self) -> ShardWriter:
        return self

    def __exit__(self, *_: object) -> None:
        self._unfinished.close()

    def add(self, piece: Piece) -> None:
        """Append documents."""
        if not len(piece.lengths):
            return
        ends = np.cumsum(piece.counts)
        self._offsets.append(self._num_chunks + ends - piece.counts)
        self._lengths.append(piece.lengths)
        self._tokens.append(piece.tokens)
        if piece.chunk_starts is not None:
            self._starts.append(piece.chunk_starts + self._stream_length)
        if piece.text_starts is not None:
            self._texts.append(piece.text_starts)
        self._keys.append(piece.keys)
        # Long documents get row groups of their own, which stay below what a reader accepts.
        step = GROUP_DOCUMENTS if piece.documents.nbytes <= MAX_GROUP_BYTES // 2 else 1
        for start in range(0, piece.documents.num_rows, step):
            self._documents.write_table(piece.documents.slice(start, step))
        self._hashes.append(piece.hashes)
        self._num_chunks += int(ends[-1])
        self._num_documents += len(piece.lengths)
        self._num_tokens += int(piece.lengths.sum())
        self._stream_length += len(piece.tokens)
        self._max_token_id = max(self._max_token_id, int(piece.tokens.max()))

    def finish(self, factory: str, recall: float) -> BuiltShard:
        """Close the files, build the index, describe all files, and rename the folder."""
        self._offsets.append(np.array([self._num_chunks]))
        self._files.close()
        for kind, written in (("chunk_starts", self._starts), ("text_starts", self._texts)):
            if not written.length:
                self._path[kind].unlink()
        hashes = np.concatenate(self._hashes)
        order = np.argsort(hashes, kind="stable")
        with NpyWriter(self._path["ids"], np.dtype(np.uint64)) as ids:
            ids.append(hashes[order])
            ids.append(order)
        keys = map_tensor(self._path["keys"], (self._num_chunks, self._dim))
        entry = ShardEntry(
            name=self._name,
            num_chunks=self._num_chunks,
            num_documents=self._num_documents,
            num_tokens=self._num_tokens,
            stream_length=self._stream_length,
            max_token_id=self._max_token_id,
            index=build_index(keys, factory, self._path["index"], recall=recall),
        )
        files = [describe_file(path, kind, self._name) for kind, path in self._path.items() if path.exists()]
        content = {"entry": asdict(entry), "files": [asdict(file) for file in files]}
        write_file(self._folder / _DESCRIPTION_NAME, json.dumps(content).encode())
        if not self._final.exists():
            os.replace(self._folder, self._final)
        return BuiltShard.read(self._final)


# ── reading ───────────────────────────────────────────────────────────────────────────────────────────────────────────


class DocumentTable:
    """Random access to a parquet file of documents, by row groups of at most 512 documents, with the last few cached.

    Raises:
        DatastoreCorruptError: if the file is not a parquet file of `num_documents` documents.
    """

    def __init__(self, path: Path, data: np.ndarray, num_documents: int) -> None:
        self._path, self._data = path, data
        self._lock = Lock()
        self._file = self._open()
        self._process = os.getpid()
        with reading(path):
            metadata = self._file.metadata
            groups = [metadata.row_group(group) for group in range(metadata.num_row_groups)]
            schema = {field.name: field.type for field in self._file.schema_arrow}
            self._starts = np.cumsum([0, *(group.num_rows for group in groups)])
            if self._starts[-1] != num_documents or any(group.num_rows < 0 for group in groups):
                raise ValueError(f"it has {self._starts[-1]} documents instead of {num_documents}")
            texts = pa.dictionary(pa.int32(), pa.string())
            if not all(schema.get(name) in (pa.string(), texts) for name in DOCUMENT_SCHEMA.names):
                raise ValueError(f"it has the columns {sorted(schema)} instead of texts in {DOCUMENT_SCHEMA.names}")
            for number, group in enumerate(groups):
                size = group_bytes(metadata, number)
                if group.num_rows > _MAX_GROUP_DOCUMENTS or size > MAX_GROUP_BYTES:
                    raise ValueError(f"its row group {number} has {group.num_rows} documents of {size:,} bytes")
        self._rows = lru_cache(_CACHED_GROUPS)(lambda group: self._read(group, DOCUMENT_SCHEMA.names).to_pylist())
        self._ids = lru_cache(_CACHED_ID_GROUPS)(lambda group: self._read(group, ["id"]).column("id").to_pylist())

    def _open(self) -> pq.ParquetFile:
        with reading(self._path):
            return open_parquet(pa.BufferReader(pa.py_buffer(self._data)))

    def _place(self, number: int) -> tuple[int, int]:
        group = int(np.searchsorted(self._starts, number, side="right") - 1)
        return group, number - int(self._starts[group])

    def document(self, number: int) -> dict[str, Any]:
        """The document at a position, with all fields that it was given with."""
        group, place = self._place(number)
        row = dict(self._rows(group)[place])
        metadata = row.pop("metadata")
        with reading(self._path):
            return {**parse_json(metadata), **row} if metadata else row

    def text(self, number: int) -> str:
        """The text of the document at a position."""
        group, place = self._place(number)
        return self._rows(group)[place]["text"]

    def document_id(self, number: int) -> str:
        """The id of the document at a position, without reading its text."""
        group, place = self._place(number)
        return self._ids(group)[place]

    def ids(self) -> Iterator[str]:
        """The ids of all documents in order."""
        for group in range(len(self._starts) - 1):
            yield from self._ids(group)

    def pieces(self) -> Iterator[pa.Table]:
        """All documents in order, at most 512 at a time."""
        for group in range(len(self._starts) - 1):
            yield self._read(group, DOCUMENT_SCHEMA.names)

    def _read(self, group: int, columns: list[str]) -> pa.Table:
        with reading(self._path), self._lock:
            # A thread of the parent may have been reading when this process was forked.
            if self._process != os.getpid():
                self._file, self._process = self._open(), os.getpid()
            # One small group: threads would cost more than they save, and they do not survive a fork.
            table = self._file.read_row_group(group, columns=columns, use_threads=False)
            table.validate(full=True)  # finds texts that are not UTF-8
            if (size := bytes_of(table)) > MAX_GROUP_BYTES:
                raise ValueError(f"its row group {group} has {size:,} bytes of text")
            table = table.cast(pa.schema([DOCUMENT_SCHEMA.field(name) for name in columns]))
            if any(table.column(name).null_count for name in columns if name not in _OPTIONAL_TEXTS):
                raise ValueError(f"a document of its row group {group} has no text, id, title or source")
            return table


class Shard:
    """An opened shard. Documents and chunks are numbered from 0 in each shard.

    Args:
        folder (`Path`): of the datastore.
        manifest ([`DatastoreManifest`]): of the datastore.
        entry ([`ShardEntry`]): which of its shards to open.
        files (`Mapping[str, FileEntry]`): its files by kind.

    Everything is mapped when a shard is opened, so it can be read to the end even if another process compacts the store and
    removes its files. No file stays open.

    Raises:
        DatastoreCorruptError: if its files contradict the manifest.
    """

    def __init__(
        self, folder: Path, manifest: DatastoreManifest, entry: ShardEntry, files: Mapping[str, FileEntry]
    ) -> None:
        self.entry, self.files = entry, files
        self.chunk_size, self.neighbor_size, self.dim = manifest.chunk_size, manifest.neighbor_size, manifest.dim
        self.num_chunks, self.num_documents = entry.num_chunks, entry.num_documents
        self._files = {kind: folder / file.name for kind, file in files.items()}
        self.doc_offsets = map_npy(self._files["doc_offsets"], INT64, self.num_documents + 1)
        self.doc_lengths = map_npy(self._files["doc_lengths"], INT64, self.num_documents)
        self.tokens = map_npy(self._files["tokens"], np.dtype(manifest.token_dtype), entry.stream_length)
        self.chunk_starts = None
        if "chunk_starts" in self._files:
            self.chunk_starts = map_npy(self._files["chunk_starts"], INT64, self.num_chunks)
        self.text_starts = None
        if "text_starts" in self._files:
            self.text_starts = map_npy(self._files["text_starts"], UINT32, self.num_chunks)
        self.keys = map_tensor(self._files["keys"], (self.num_chunks, self.dim))
        ids = map_npy(self._files["ids"], np.dtype(np.uint64), 2 * self.num_documents)
        # Sorted hashes of the document ids, and the document of each.
        self._ids = ids[: self.num_documents], ids[self.num_documents :]
        self._max_token_id = entry.max_token_id
        with reading(self._files["index"]):
            self._index_file = mapped(self._files["index"])
        with reading(self._files["documents"]):
            self._documents_file = mapped(self._files["documents"])
        # Prepared search parameters by effort and by the share of the results that is wanted: a few of each.
        self._parameters: dict[tuple[int, float], Any] = {}
        self._check_borders()

    def _check_borders(self) -> None:
        offsets, lengths, starts = self.doc_offsets, self.doc_lengths, self.chunk_starts
        sound = offsets[0] == 0 and offsets[-1] == self.num_chunks
        if sound and self.num_documents <= _CHECKED_DOCUMENTS:
            chunks = np.diff(offsets)
            sound = bool((chunks > 0).all() and (lengths > 0).all())
            if sound and starts is None:
                sound = bool((-(-lengths // self.chunk_size) == chunks).all())
        if not sound:
            raise damaged(self._files["doc_offsets"], "the borders of its documents contradict each other")
        if starts is not None and (starts[0] != 0 or (np.diff(starts) < 0).any() or starts[-1] >= len(self.tokens)):
            raise damaged(self._files["chunk_starts"], "its chunks are not in order")

    @lazy
    def index(self) -> Any:
        """The FAISS index over the keys, made on first use; its vectors stay in the memory map."""
        return open_index(
            self._files["index"], self._index_file, self.entry.index["factory"], self.num_chunks, self.dim
        )

    @lazy
    def documents(self) -> DocumentTable:
        """The documents as they were given."""
        return DocumentTable(self._files["documents"], self._documents_file, self.num_documents)

    @lazy
    def _max_effort(self) -> int:
        return max_effort(self.index, self.entry.index["search"])

    def find_ids(self, hashes: np.ndarray) -> Iterator[tuple[int, int]]:
        """Candidates for document ids by their hashes (uint64, `(n,)`): pairs of a place in `hashes` and a document."""
        known, numbers = self._ids
        first = np.searchsorted(known, hashes, side="left")
        last = np.searchsorted(known, hashes, side="right")
        for place in np.flatnonzero(last > first):
            for row in range(int(first[place]), int(last[place])):
                number = int(numbers[row])
                if number >= self.num_documents:
                    raise damaged(self._files["ids"], f"it names document {number} of {self.num_documents}")
                yield int(place), number

    def token_starts(self, chunks: np.ndarray) -> np.ndarray:
        """Where chunks (int64) begin in the token stream (int64)."""
        return chunks * self.chunk_size if self.chunk_starts is None else self.chunk_starts[chunks]

    def pieces(self, keep: np.ndarray) -> Iterator[Piece]:
        """The documents marked in `keep` (bool, `(num_documents,)`), with their tokens and keys."""
        first = 0
        for table in self.documents.pieces():
            documents = first + np.flatnonzero(keep[first : first + table.num_rows])
            if len(documents):
                yield self._piece(documents, table.take(documents - first))
            first += table.num_rows

    def _piece(self, documents: np.ndarray, table: pa.Table) -> Piece:
        starts, lengths = self.doc_offsets[documents], self.doc_lengths[documents]
        counts = self.doc_offsets[documents + 1] - starts
        chunks, begins = ranges(starts, counts), self.token_starts(starts)
        sizes, chunk_starts = counts * self.chunk_size, None
        if self.chunk_starts is not None:  # a retokenized stream has no padding
            sizes = lengths
            # Each chunk keeps its distance from the beginning of its document, which now stands behind those before it here.
            chunk_starts = self.chunk_starts[chunks] + np.repeat(np.cumsum(lengths) - lengths - begins, counts)
        return Piece(
            tokens=self.tokens[ranges(begins, sizes)],
            lengths=lengths,
            counts=counts,
            hashes=np.array([hash_of(id) for id in table.column("id").to_pylist()], dtype=np.uint64),
            keys=self.keys[chunks],
            documents=table,
            chunk_starts=chunk_starts,
            text_starts=None if self.text_starts is None else self.text_starts[chunks],
        )

    def gather(self, chunk_ids: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Tokens and mask of neighbors by chunk id, -1 for none; see [`gather_tokens`]."""
        with reading(self._files["doc_offsets"]):
            tokens, mask = gather_tokens(
                chunk_ids,
                self.tokens,
                self.doc_offsets,
                self.doc_lengths,
                chunk_size=self.chunk_size,
                neighbor_size=self.neighbor_size,
                chunk_starts=self.chunk_starts,
            )
        if tokens.max(initial=0) > self._max_token_id:
            raise damaged(self._files["tokens"], f"it has tokens above its largest id {self._max_token_id:,}")
        return tokens, mask

    def document_of(self, chunk_ids: np.ndarray) -> np.ndarray:
        """Document numbers of chunks, -1 for -1."""
        return document_of(chunk_ids, self.doc_offsets)

    def search(
        self, queries: np.ndarray, num_neighbors: int, excluded: np.ndarray | None, deleted: Deleted | None
    ) -> tuple[np.ndarray, np.ndarray]:
        """The nearest chunks of each query, best first.

        Args:
            queries (`np.ndarray` of float32 and shape `(num_queries, dim)`): unit vectors.
            num_neighbors (`int`): chunks per query.
            excluded (`np.ndarray` of int64 and shape `(num_queries, any)`, *optional*): documents that a query must
                not get, -1 for none.
            deleted ([`Deleted`], *optional*): documents that no query may get.
        Returns:
            `(scores, chunk_ids)` of shape `(num_queries, num_neighbors)`, float32 and int64; -inf and -1 for none.
        """
        if excluded is None and deleted is None:
            scores, ids = self._search(queries, num_neighbors, 1, num_neighbors)
            # Results are best first, so a row is full if its last result is there.
            if self._max_effort == 1 or ids[:, min(num_neighbors, self.num_chunks) - 1].min(initial=0) >= 0:
                return scores, ids
        # Otherwise few lists were read and held too little; the following reads more lists for the rows that are short.
        if excluded is None:
            excluded = np.empty((len(queries), 0), dtype=np.int64)

        def search(rows: np.ndarray, count: int, effort: int) -> tuple[np.ndarray, np.ndarray]:
            return self._search(rows, count, effort, num_neighbors)

        limit = self._max_effort
        return search_excluding(search, queries, num_neighbors, excluded, self.doc_offsets, limit, deleted)

    def _search(self, queries: np.ndarray, count: int, effort: int, wanted: int) -> tuple[np.ndarray, np.ndarray]:
        """`count` results per query, of which the caller keeps about `wanted`; `effort` multiplies the lists that are read."""
        key = (effort, wanted / count)
        if key not in self._parameters:
            search = dict(self.entry.index["search"])
            if "nprobe" in search:
                search["nprobe"] *= effort
            if "k_factor" in search:
                # FAISS re-scores `k_factor * count`. The number was tuned for the wanted results, and does not have to grow
                # with those that are fetched beyond them.
                search["k_factor"] = max(1.0, search["k_factor"] * key[1])
            self._parameters[key] = search_parameters(self.index, search)
        if not len(queries):
            return np.empty((0, count), dtype=np.float32), np.empty((0, count), dtype=np.int64)
        scores, ids = search_index(self.index, queries, min(count, self.num_chunks), self._parameters[key])
        # One test for both ends: as unsigned numbers, the -1 of missing results are above all chunks, too.
        if ids.view(np.uint64).max() >= self.num_chunks:
            if ids.max() >= self.num_chunks:
                raise damaged(self._files["index"], "it returns chunks that the shard does not have")
            scores[ids < 0] = -np.inf
        if count > self.num_chunks:
            missing = ((0, 0), (0, count - self.num_chunks))
            scores = np.pad(scores, missing, constant_values=-np.inf)
            ids = np.pad(ids, missing, constant_values=-1)
        return scores, ids
