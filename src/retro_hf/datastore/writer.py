"""Writing a shard: pieces of documents with their tokens and keys, appended file by file, then indexed."""

from __future__ import annotations

import json
import os
import shutil
import uuid
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from .index import build_index
from .manifest import SHARD_FILES, FileEntry, ShardEntry
from .storage import NpyWriter, TensorWriter, link_or_copy, map_tensor, sha256_of, write_file


__all__ = [
    "DESCRIPTION_NAME",
    "DOCUMENT_SCHEMA",
    "GROUP_DOCUMENTS",
    "BuiltShard",
    "Piece",
    "ShardWriter",
    "describe_file",
]

DESCRIPTION_NAME = "shard.json"
DOCUMENT_SCHEMA = pa.schema([(name, pa.string()) for name in ("id", "title", "source", "text", "metadata")])
# Documents are read back one by one, so row groups stay small.
GROUP_DOCUMENTS = 512
_INT64 = np.dtype(np.int64)


class Piece(NamedTuple):
    """Some documents in a row, on their way into a shard.

    Attributes:
        tokens (`np.ndarray` of uint16 or uint32 and shape `(stream_length,)`): their part of the stream.
        lengths (`np.ndarray` of int64 and shape `(num_documents,)`): real tokens of each document.
        counts (`np.ndarray` of int64 and shape `(num_documents,)`): chunks of each document.
        hashes (`np.ndarray` of uint64 and shape `(num_documents,)`): of their ids.
        keys (`np.ndarray` of float16 and shape `(num_chunks, dim)`).
        documents (`pa.Table`): as they were given, by `DOCUMENT_SCHEMA`.
        chunk_starts (`np.ndarray` of int64 and shape `(num_chunks,)`, *optional*): where in `tokens` each chunk begins,
            if not at every multiple of the chunk size.
    """

    tokens: np.ndarray
    lengths: np.ndarray
    counts: np.ndarray
    hashes: np.ndarray
    keys: np.ndarray
    documents: pa.Table
    chunk_starts: np.ndarray | None = None


@dataclass(frozen=True)
class BuiltShard:
    """A finished shard outside any datastore: the folder its files lie in, and what a manifest says of it."""

    folder: Path
    entry: ShardEntry
    files: tuple[FileEntry, ...]

    @classmethod
    def read(cls, folder: Path) -> BuiltShard:
        """Read the description that [`ShardWriter`] left in the folder."""
        content = json.loads((folder / DESCRIPTION_NAME).read_bytes())
        return cls(folder, ShardEntry(**content["entry"]), tuple(FileEntry(**file) for file in content["files"]))

    def link_into(self, folder: Path) -> None:
        """Give the files their place in a datastore, where nothing refers to them until its manifest does."""
        for file in self.files:
            link_or_copy(self.folder / file.name, folder / file.name)


def describe_file(path: Path, kind: str, shard: str | None = None) -> FileEntry:
    """What a manifest says of a file."""
    return FileEntry(path.name, kind, path.stat().st_size, sha256_of(path), shard)


class ShardWriter:
    """Writes a shard to a folder of its own, which takes the name `final` when the shard is complete.

    Args:
        final (`Path`): the folder; nothing happens to one that is there already.
        name (`str`): of the shard.
        dtype (`np.dtype`): of the token stream.
        dim (`int`): of the keys.
    """

    def __init__(self, final: Path, name: str, dtype: np.dtype, dim: int) -> None:
        self._final = final
        # Its own name for each writer: an executor may start a task again while the first, thought dead, still runs.
        self._folder = final.with_name(f"{final.name}.{uuid.uuid4().hex}.partial")
        self._name, self._dim = name, dim
        self._path = {kind: self._folder / pattern.format(name) for kind, pattern in SHARD_FILES.items()}
        self._hashes: list[np.ndarray] = []
        self._num_chunks = self._num_documents = self._num_tokens = self._stream_length = self._max_token_id = 0
        self._folder.mkdir(parents=True)
        self._files = ExitStack()
        with ExitStack() as files:
            self._tokens = files.enter_context(NpyWriter(self._path["tokens"], dtype))
            self._offsets = files.enter_context(NpyWriter(self._path["doc_offsets"], _INT64))
            self._lengths = files.enter_context(NpyWriter(self._path["doc_lengths"], _INT64))
            self._starts = files.enter_context(NpyWriter(self._path["chunk_starts"], _INT64))
            self._keys = files.enter_context(TensorWriter(self._path["keys"], dim))
            self._documents = files.enter_context(
                pq.ParquetWriter(self._path["documents"], DOCUMENT_SCHEMA, compression="zstd")
            )
            self._files = files.pop_all()

    def __enter__(self) -> ShardWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._files.close()
        shutil.rmtree(self._folder, ignore_errors=True)

    @property
    def num_chunks(self) -> int:
        """Chunks written so far."""
        return self._num_chunks

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
        self._keys.append(piece.keys)
        for start in range(0, piece.documents.num_rows, GROUP_DOCUMENTS):
            self._documents.write_table(piece.documents.slice(start, GROUP_DOCUMENTS))
        self._hashes.append(piece.hashes)
        self._num_chunks += int(ends[-1])
        self._num_documents += len(piece.lengths)
        self._num_tokens += int(piece.lengths.sum())
        self._stream_length += len(piece.tokens)
        self._max_token_id = max(self._max_token_id, int(piece.tokens.max()))

    def finish(self, factory: str, recall: float) -> BuiltShard:
        """Close the files, build the index, describe everything, and give the folder its name."""
        self._offsets.append(np.array([self._num_chunks]))
        self._files.close()
        if not self._starts.length:
            self._path["chunk_starts"].unlink()
        hashes = np.concatenate(self._hashes)
        order = np.argsort(hashes, kind="stable")
        with NpyWriter(self._path["ids"], np.dtype(np.uint64)) as ids:
            ids.append(hashes[order])
            ids.append(order)
        keys = map_tensor(self._path["keys"], (self._num_chunks, self._dim))
        index = build_index(keys, factory, self._path["index"], recall=recall)
        entry = ShardEntry(
            name=self._name,
            num_chunks=self._num_chunks,
            num_documents=self._num_documents,
            num_tokens=self._num_tokens,
            stream_length=self._stream_length,
            max_token_id=self._max_token_id,
            index=index,
        )
        files = [describe_file(path, kind, self._name) for kind, path in self._path.items() if path.exists()]
        content = {"entry": asdict(entry), "files": [asdict(file) for file in files]}
        write_file(self._folder / DESCRIPTION_NAME, json.dumps(content).encode())
        if not self._final.exists():
            os.replace(self._folder, self._final)
        return BuiltShard.read(self._final)
