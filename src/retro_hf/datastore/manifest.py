"""The manifest of a datastore: what `datastore.json` says, and how a hostile or damaged one is refused."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..errors import DatastoreCorruptError, DatastoreInputError, DatastoreNotFoundError
from .fields import integer, object_of, of_type, sha256, text
from .origins import check_origins
from .storage import building_folder, write_file


__all__ = [
    "FORMAT_VERSION",
    "MANIFEST_NAME",
    "MAX_TOKENS",
    "SHARD_FILES",
    "DatastoreManifest",
    "FileEntry",
    "ShardEntry",
    "check_num_shards",
    "checked_path",
    "new_path",
]

FORMAT_VERSION = 2
MANIFEST_NAME = "datastore.json"
METRIC = "inner_product"

# Bounds keep a hostile manifest from asking for absurd amounts of memory before a single file has been looked at.
_MAX_MANIFEST_BYTES = 16 << 20
_MAX_COUNT = 1 << 48
MAX_TOKENS = 1 << 20
_MAX_FILES = 50_000
_MAX_SHARDS = 5_000
_FILE_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]{0,127}")
_SHARD_NAME = re.compile(r"[0-9]{5,10}")
_MAX_REASON = 500
_FACTORY = re.compile(r"[A-Za-z0-9_,.()\[\]\-]{1,256}")
# Far above what is ever tuned: reading all lists, and re-scoring or visiting more candidates than recall needs.
_MAX_SEARCH = {"nprobe": 1 << 32, "k_factor": 1000, "efSearch": 1 << 16}

# What a shard consists of, each kind in one file named after the shard; only a retokenized shard has `chunk_starts`.
SHARD_FILES = {
    "tokens": "tokens-{}.npy",
    "doc_offsets": "doc_offsets-{}.npy",
    "doc_lengths": "doc_lengths-{}.npy",
    "ids": "ids-{}.npy",
    "documents": "documents-{}.parquet",
    "keys": "keys-{}.safetensors",
    "index": "index-{}.faiss",
    "chunk_starts": "chunk_starts-{}.npy",
}
_OPTIONAL = ("chunk_starts",)
_STORE_KINDS = ("tokenizer", "deleted")


@dataclass(frozen=True)
class FileEntry:
    """One file of a datastore: `name` inside its folder, `kind` of content, `size` in bytes, sha256 in hex.

    `shard` is the name of the shard it belongs to, None for what the whole store shares.
    """

    name: str
    kind: str
    size: int
    sha256: str
    shard: str | None = None


@dataclass(frozen=True)
class ShardEntry:
    """One shard: a run of documents with everything that finds and reads their chunks. Its files never change.

    Attributes:
        name: five digits or more, never given twice in the life of a store.
        num_chunks, num_documents, num_tokens: counts; tokens without padding.
        stream_length: tokens in its stream, padding included.
        max_token_id: the largest id in its stream.
        index: `factory` (FAISS), `search` (its search parameters), `recall` (None where the index is exact, else
            `at`, `value`, `queries`: the share of the exact neighbors that this many of its own keys find).
    """

    name: str
    num_chunks: int
    num_documents: int
    num_tokens: int
    stream_length: int
    max_token_id: int
    index: dict[str, Any]


@dataclass(frozen=True)
class DatastoreManifest:
    """What a datastore is made of; written last, so a folder with a manifest is a whole datastore.

    Attributes:
        chunk_size, neighbor_size: tokens per chunk, and per chunk with its continuation.
        token_dtype: `"uint16"` or `"uint32"`.
        tokenizer: `name`, `revision`, `fingerprint`, `vocab_size` of the language model's tokenizer.
        embedder: `name`, `revision`, `fingerprint`, `dim`, `pooling`, `dtype` of the frozen encoder.
        shards: the shards, whose documents and chunks are numbered in this order.
        files: every file of the folder that belongs to the datastore.
        generation: 1 when built, one more with every change.
        next_shard: number of the shard that is written next.
        num_deleted_documents: documents that are no longer returned, but still counted until [`RetroDatastore.compact`].
        num_empty_documents: documents of the input without text, which were skipped.
        sources: where the documents come from, at most 1,000 by name: `name`, and `config`, `revision` and `license` where known.
    """

    chunk_size: int
    neighbor_size: int
    token_dtype: str
    tokenizer: dict[str, Any]
    embedder: dict[str, Any]
    shards: tuple[ShardEntry, ...]
    files: tuple[FileEntry, ...]
    generation: int = 1
    next_shard: int = 1
    num_deleted_documents: int = 0
    num_empty_documents: int = 0
    sources: list[dict[str, Any]] = field(default_factory=list)
    metric: str = METRIC
    library_version: str = "unknown"
    format_version: int = FORMAT_VERSION

    @property
    def num_chunks(self) -> int:
        """Chunks of all shards."""
        return sum(shard.num_chunks for shard in self.shards)

    @property
    def num_documents(self) -> int:
        """Documents of all shards, deleted ones included."""
        return sum(shard.num_documents for shard in self.shards)

    @property
    def num_tokens(self) -> int:
        """Tokens of all shards, without padding."""
        return sum(shard.num_tokens for shard in self.shards)

    @property
    def max_token_id(self) -> int:
        """The largest id in any token stream."""
        return max(shard.max_token_id for shard in self.shards)

    @property
    def index(self) -> dict[str, Any]:
        """The index of the largest shard."""
        return max(self.shards, key=lambda shard: shard.num_chunks).index

    @property
    def dim(self) -> int:
        """Length of a key."""
        return self.embedder["dim"]

    def entries(self, kind: str) -> list[FileEntry]:
        """The files of one kind, in the order of their shards."""
        return [entry for entry in self.files if entry.kind == kind]

    def shard_files(self, shard: str) -> dict[str, str]:
        """File names of one shard, by kind."""
        return {entry.kind: entry.name for entry in self.files if entry.shard == shard}

    def to_bytes(self) -> bytes:
        """The content of `datastore.json`, with a checksum over itself."""
        content = dataclasses.asdict(self)
        content["checksum"] = _checksum(content)
        text = json.dumps(content, indent=2, sort_keys=True, ensure_ascii=True) + "\n"
        return text.encode()

    def write(self, folder: Path) -> None:
        """Write `datastore.json` into `folder`, atomically; DatastoreInputError for more shards than `read` accepts."""
        check_num_shards(len(self.shards))
        write_file(folder / MANIFEST_NAME, self.to_bytes())

    @classmethod
    def read(cls, folder: str | os.PathLike[str]) -> DatastoreManifest:
        """Read and check `datastore.json`.

        Raises:
            DatastoreNotFoundError: if the folder or its manifest does not exist.
            DatastoreCorruptError: if anything in it is not as this library writes it.
        """
        folder = checked_path(folder)
        path = folder / MANIFEST_NAME
        if not os.path.isfile(path):  # which, unlike the method, knows no error such as a name too long
            if os.path.isfile(folder):
                reason = "it is a file, and a datastore is a folder"
                if (folder.parent / MANIFEST_NAME).is_file():
                    reason = f"it is a file of the datastore {str(folder.parent)!r}"
            else:
                reason = f"it has no {MANIFEST_NAME}" if os.path.isdir(folder) else "the folder does not exist"
            if os.path.isdir(unfinished := building_folder(folder)):
                raise DatastoreNotFoundError(
                    f"The datastore {str(folder)!r} is not finished: what has been done is kept in {str(unfinished)!r}. Make the "
                    "same call of `RetroDatastore.build(documents, path, ...)` again, and it goes on from there."
                )
            raise DatastoreNotFoundError(
                f"There is no datastore at {str(folder)!r}: {reason}. "
                "Check the path, or build one with `RetroDatastore.build(documents, path, ...)`."
            )
        if path.stat().st_size > _MAX_MANIFEST_BYTES:
            raise _corrupt(path, f"it is {path.stat().st_size:,} bytes long, more than {_MAX_MANIFEST_BYTES:,}")
        try:
            content = json.loads(path.read_bytes())
        except (ValueError, RecursionError) as error:
            raise _corrupt(path, f"it is not JSON ({error})") from error
        if not isinstance(content, dict):
            raise _corrupt(path, f"it holds a {type(content).__name__}, not an object")
        version = content.get("format_version")
        if version != FORMAT_VERSION:
            raise _corrupt(
                path,
                f"format_version is {version!r}, but this version of retro-hf reads {FORMAT_VERSION}; "
                "another version of the library may read it",
            )
        try:
            return cls._from_content(content)
        except (ValueError, TypeError, KeyError) as error:
            raise _corrupt(path, str(error)) from error

    @classmethod
    def _from_content(cls, content: dict[str, Any]) -> DatastoreManifest:
        fields = {entry.name for entry in dataclasses.fields(cls)}
        unknown, missing = sorted(set(content) - fields - {"checksum"}), sorted((fields | {"checksum"}) - set(content))
        if unknown or missing:
            raise ValueError(f"unknown fields {unknown}, missing fields {missing}")
        checksum = content.pop("checksum")
        if checksum != _checksum(content):
            raise ValueError("its checksum does not match its content")
        content["files"] = tuple(FileEntry(**entry) for entry in of_type(content, "files", list))
        content["shards"] = tuple(ShardEntry(**entry) for entry in of_type(content, "shards", list))
        manifest = cls(**content)
        manifest._validate()
        return manifest

    def _validate(self) -> None:
        content = vars(self)
        integer(content, "chunk_size", 1, MAX_TOKENS)
        integer(content, "neighbor_size", self.chunk_size, MAX_TOKENS)
        integer(content, "generation", 1, _MAX_COUNT)
        integer(content, "next_shard", 1, _MAX_COUNT)
        integer(content, "num_empty_documents", 0, _MAX_COUNT)
        if self.token_dtype not in ("uint16", "uint32"):
            raise ValueError(f"token_dtype is {self.token_dtype!r}, not 'uint16' or 'uint32'")
        if self.metric != METRIC:
            raise ValueError(f"metric is {self.metric!r}, not {METRIC!r}")
        text(content, "library_version")
        check_origins(content)
        if not self.shards:
            raise ValueError("it lists no shards")
        retokenized = {entry.shard for entry in self.files if entry.kind == "chunk_starts"}
        for shard in self.shards:
            self._validate_shard(shard, shard.name in retokenized)
        names = [shard.name for shard in self.shards]
        if len(set(names)) != len(names) or any(int(name) >= self.next_shard for name in names):
            raise ValueError(
                f"the shards are named {names}, but each name is used once and the next is {self.next_shard}"
            )
        integer(content, "num_deleted_documents", 0, self.num_documents)
        self._validate_files()

    def _validate_shard(self, shard: ShardEntry, retokenized: bool) -> None:
        content = vars(shard)
        if not isinstance(shard.name, str) or not _SHARD_NAME.fullmatch(shard.name):
            raise ValueError(f"a shard is named {shard.name!r}, not with five to ten digits")
        integer(content, "num_chunks", 1, _MAX_COUNT)
        integer(content, "num_documents", 1, shard.num_chunks)
        integer(content, "num_tokens", shard.num_documents, _MAX_COUNT)
        integer(content, "stream_length", shard.num_tokens, _MAX_COUNT)
        if not retokenized and shard.stream_length != shard.num_chunks * self.chunk_size:
            raise ValueError(
                f"shard {shard.name} has {shard.num_chunks} chunks in a stream of {shard.stream_length} tokens"
            )
        integer(content, "max_token_id", 0, (1 << 16 if self.token_dtype == "uint16" else 1 << 32) - 1)
        self._validate_index(object_of(content, "index", ("factory", "search", "recall")), shard.num_chunks)

    def _validate_index(self, index: dict[str, Any], num_chunks: int) -> None:
        if not _FACTORY.fullmatch(of_type(index, "factory", str)):
            raise ValueError(f"index.factory is {index['factory']!r}, not a factory string of FAISS")
        search = of_type(index, "search", dict)
        if unknown := sorted(set(search) - set(_MAX_SEARCH)):
            raise ValueError(f"index.search has {unknown}, but only {sorted(_MAX_SEARCH)} are known")
        for name in search:
            integer(search, name, 1, _MAX_SEARCH[name])
        kind = index["factory"]
        needed = {
            "nprobe": "IVF" in kind,
            "efSearch": "HNSW" in kind and "IVF" not in kind,
            "k_factor": "Refine" in kind,
        }
        if missing := [name for name, is_needed in needed.items() if is_needed and name not in search]:
            raise ValueError(f"index.search lacks {missing}, without which an index {kind!r} would find less")
        if index["recall"] is None:
            return
        recall = object_of(index, "recall", ("at", "value", "queries"))
        integer(recall, "at", 0, num_chunks)
        integer(recall, "queries", 1, num_chunks)
        value = recall["value"]
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value <= 1:
            raise ValueError(f"index.recall.value is {value!r}, not a number from 0 to 1")

    def _validate_files(self) -> None:
        if len(self.files) > _MAX_FILES:
            raise ValueError(f"it lists {len(self.files):,} files, more than {_MAX_FILES:,}")
        for entry in self.files:
            if not isinstance(entry.name, str) or not _FILE_NAME.fullmatch(entry.name):
                raise ValueError(f"{entry.name!r} is not a plain file name")
            if entry.kind not in (_STORE_KINDS if entry.shard is None else SHARD_FILES):
                raise ValueError(f"file {entry.name!r} is of unknown kind {entry.kind!r}")
            integer(vars(entry), "size", 0, 1 << 56)
            sha256(vars(entry), "sha256")
        names = [entry.name for entry in self.files]
        if len(set(names)) != len(names):
            raise ValueError("it lists a file twice")
        found = sorted(
            (str(entry.shard), entry.kind) for entry in self.files if entry.kind not in (*_STORE_KINDS, *_OPTIONAL)
        )
        needed = sorted((shard.name, kind) for shard in self.shards for kind in SHARD_FILES if kind not in _OPTIONAL)
        if found != needed:
            raise ValueError("its files are not those of its shards, one of each kind")
        if len(self.entries("deleted")) != bool(self.num_deleted_documents):
            raise ValueError(f"it lists {len(self.entries('deleted'))} files of deleted documents")


def _checksum(content: dict[str, Any]) -> str:
    canonical = json.dumps(content, sort_keys=True, ensure_ascii=True, separators=(",", ":"))
    return hashlib.sha256(canonical.encode()).hexdigest()


def _corrupt(path: Path, reason: str) -> DatastoreCorruptError:
    if len(reason) > _MAX_REASON:  # a hostile one may hold names of any length
        reason = f"{reason[:_MAX_REASON]}…"
    return DatastoreCorruptError(
        f"The manifest {str(path)!r} cannot be used: {reason}. Restore the folder from a copy, or build the datastore "
        "again."
    )


def check_num_shards(number: int) -> None:
    """Raise DatastoreInputError for more shards than a manifest holds, before one is written that could not be read."""
    if number > _MAX_SHARDS:
        raise DatastoreInputError(
            f"The datastore would have {number:,} shards, but a manifest holds {_MAX_SHARDS:,}. Choose a larger `shard_chunks`; "
            "shards that are there already are joined by `compact()`."
        )


def checked_path(path: Any) -> Path:
    """A path to a datastore that a user gave.

    Raises:
        DatastoreInputError: for what is no path.
    """
    if not isinstance(path, (str, os.PathLike)):
        raise DatastoreInputError(
            f"The path of the datastore is {path!r}, of type {type(path).__name__}. Pass its folder, as a text or a Path."
        )
    if "\0" in str(path):
        raise DatastoreInputError(
            f"The path of the datastore is {str(path)!r}, but no name of a file has a NUL byte. Remove it."
        )
    return Path(path)


def new_path(path: Any) -> Path:
    """The path that a user gave for a new datastore.

    Raises:
        DatastoreInputError: for what is no path, or lies inside another datastore.
    """
    path = checked_path(path)
    for folder in path.resolve().parents:
        if os.path.isfile(folder / MANIFEST_NAME):
            raise DatastoreInputError(
                f"The new datastore cannot be written to {str(path)!r}: that lies inside the datastore {str(folder)!r}, whose "
                "folder holds what its manifest names and nothing else. Choose a path outside of it."
            )
    return path
