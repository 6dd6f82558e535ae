"""The manifest of a datastore, `datastore.json`: what it records, how it is validated, how files are checked against it."""

# No `from __future__ import annotations` here: `strict` validates the types that it finds in the annotations.
import dataclasses
import errno
import importlib.metadata
import json
import os
import re
from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from huggingface_hub.dataclasses import strict
from transformers import PreTrainedTokenizerBase

from .. import arguments
from ..errors import DatastoreInputError, DatastoreNotFoundError
from ..outside import file_inside, is_file_name, read_json
from .atomic_files import (
    MANIFEST_NAME,
    RESTORE,
    building_folder,
    damaged,
    not_readable,
    reading,
    sha256_of,
    sha256_of_file,
    write_file,
)
from .compatibility import tokenizer_fingerprint, vocabulary_size
from .documents import without_lone_surrogates


# Of what is written. Version 2 had no `text_starts`: its keys are made of decoded tokens, not of the documents' own text.
FORMAT_VERSION = 3
_READABLE_VERSIONS = (2, FORMAT_VERSION)
MAX_TOKENS = 1 << 20

# A manifest may come from a stranger. These bounds keep it from claiming absurd amounts of memory before any file is read.
_MAX_COUNT = 1 << 48
_MAX_FILES = 50_000
_MAX_SHARDS = 5_000
_MAX_SOURCES = 1_000
_MAX_TEXT = 1 << 16
_MORE_SOURCES = {"name": "and more, which the table of documents names"}

# The files of a shard by kind. Only a retokenized one has `chunk_starts`, only one with keys of its own text `text_starts`.
SHARD_FILES = {
    "tokens": "tokens-{}.npy",
    "doc_offsets": "doc_offsets-{}.npy",
    "doc_lengths": "doc_lengths-{}.npy",
    "ids": "ids-{}.npy",
    "documents": "documents-{}.parquet",
    "keys": "keys-{}.safetensors",
    "index": "index-{}.faiss",
    "chunk_starts": "chunk_starts-{}.npy",
    "text_starts": "text_starts-{}.npy",
}
_OPTIONAL = ("chunk_starts", "text_starts")
_STORE_KINDS = ("tokenizer", "deleted")


# ── rules for values, each raises ValueError ───────────────────────────────────────────────────────────────────────────

Rule = Callable[[Any], None]


def _integer(lowest: int, highest: int = _MAX_COUNT) -> Rule:
    def check(value: Any) -> None:
        if type(value) is not int or not lowest <= value <= highest:
            raise ValueError(f"{value!r:.100} is not an integer from {lowest} to {highest}")

    return check


def _matching(pattern: str) -> Rule:
    def check(value: Any) -> None:
        if not isinstance(value, str) or not re.fullmatch(pattern, value):
            raise ValueError(f"{value!r:.100} does not match {pattern}")

    return check


def _text(value: Any) -> None:
    if not isinstance(value, str) or len(value) > _MAX_TEXT or value != without_lone_surrogates(value):
        raise ValueError(f"{value!r:.100} is not a text of at most {_MAX_TEXT:,} characters that UTF-8 can encode")


def _file_name(value: Any) -> None:
    if not is_file_name(value):
        raise ValueError(f"{value!r:.100} is not the name of a file")


def _share(value: Any) -> None:
    if type(value) not in (int, float) or not 0 <= value <= 1:  # also refuses NaN
        raise ValueError(f"{value!r:.100} is not a number from 0 to 1")


def _optional(rule: Rule) -> Rule:
    return lambda value: None if value is None else rule(value)


def _record(required: dict[str, Rule], optional: dict[str, Rule] | None = None) -> Rule:
    rules = required | (optional or {})

    def check(value: Any) -> None:
        if not isinstance(value, dict) or not required.keys() <= value.keys() <= rules.keys():
            raise ValueError(f"{value!r:.100} is not an object with the fields {sorted(required)}")
        for name, part in value.items():
            rules[name](part)

    return check


def _rule(check: Rule) -> dict[str, Any]:
    """The metadata of a dataclass field that `strict` checks."""
    return {"validator": [check]}


_sha256 = _matching(r"[0-9a-f]{64}")
_ORIGIN = {"name": _text, "revision": _optional(_text), "fingerprint": _sha256}
_tokenizer = _record(_ORIGIN | {"vocab_size": _integer(1, 1 << 32)})
# `prompt` and `query` are recorded only if chunks or queries have a prompt, or queries an encoder of their own.
_embedder = _record(
    _ORIGIN | {"dim": _integer(1, 1 << 16), "pooling": _text, "dtype": _text},
    {"prompt": _text, "query": _record(_ORIGIN | {"name": _optional(_text), "prompt": _text})},
)
_source = _record({"name": _text}, {"config": _text, "revision": _text, "license": _text})
_index_fields = _record(
    {
        "factory": _matching(r"[A-Za-z0-9_,.()\[\]\-]{1,256}"),
        # Far above what tuning ever chooses.
        "search": _record(
            {}, {"nprobe": _integer(1, 1 << 32), "k_factor": _integer(1, 1000), "efSearch": _integer(1, 1 << 16)}
        ),
        "recall": _optional(_record({"at": _integer(0), "value": _share, "queries": _integer(1)})),
    }
)


def _sources(value: Any) -> None:
    for source in value:
        _source(source)


def _index(value: Any) -> None:
    _index_fields(value)
    kind = value["factory"]
    # Without its search parameters an index would silently find less than it was measured to find.
    needed = {"nprobe": "IVF" in kind, "efSearch": "HNSW" in kind and "IVF" not in kind, "k_factor": "Refine" in kind}
    if missing := [name for name, is_needed in needed.items() if is_needed and name not in value["search"]]:
        raise ValueError(f"the index {kind!r} lacks the search parameters {missing}")


# ── the records ───────────────────────────────────────────────────────────────────────────────────────────────────────


@strict
@dataclass
class FileEntry:
    """One file of a datastore.

    Attributes:
        name: file name inside the folder.
        kind: kind of content, such as `"tokens"`.
        size: bytes.
        sha256: checksum in hex.
        shard: name of the shard that it belongs to; None for files of the whole store.
    """

    name: str = field(metadata=_rule(_file_name))
    kind: str
    size: int = field(metadata=_rule(_integer(0, 1 << 56)))
    sha256: str = field(metadata=_rule(_sha256))
    shard: str | None = None


@strict
@dataclass
class ShardEntry:
    """One shard: a run of documents with everything that finds and reads their chunks. Its files never change.

    Attributes:
        name: five to ten digits; a name is used once in the life of a store.
        num_chunks, num_documents, num_tokens: counts; tokens without padding.
        stream_length: tokens in its stream, with padding.
        max_token_id: the largest id in its stream.
        index: `factory` (FAISS), `search` (search parameters) and `recall`: None for an exact index, else the share
            `value` of the `at` nearest neighbors that was found for `queries` of its own keys.
    """

    name: str = field(metadata=_rule(_matching(r"[0-9]{5,10}")))
    num_chunks: int = field(metadata=_rule(_integer(1)))
    num_documents: int = field(metadata=_rule(_integer(1)))
    num_tokens: int = field(metadata=_rule(_integer(1)))
    stream_length: int = field(metadata=_rule(_integer(1)))
    max_token_id: int = field(metadata=_rule(_integer(0, (1 << 32) - 1)))
    index: dict[str, Any] = field(metadata=_rule(_index))

    def validate_counts(self) -> None:
        """Check that the counts can be true together."""
        if (
            not self.num_documents <= self.num_chunks
            or not self.num_documents <= self.num_tokens <= self.stream_length
        ):
            raise ValueError(f"the counts of shard {self.name} contradict each other")
        recall = self.index["recall"]
        if recall is not None and max(recall["at"], recall["queries"]) > self.num_chunks:
            raise ValueError(f"the recall of shard {self.name} was measured on more chunks than it has")


@strict
@dataclass
class DatastoreManifest:
    """What a datastore is made of. It is written last, so a folder with a manifest is a complete datastore.

    Attributes:
        chunk_size, neighbor_size: tokens per chunk, and per chunk with its continuation.
        token_dtype: `"uint16"` or `"uint32"`.
        tokenizer: `name`, `revision`, `fingerprint`, `vocab_size` of the language model's tokenizer.
        embedder: `name`, `revision`, `fingerprint`, `dim`, `pooling`, `dtype` of the frozen encoder, and `prompt` and
            `query` where it has them.
        shards: the shards; documents and chunks are numbered in this order.
        files: every file of the folder that belongs to the datastore.
        generation: 1 when built, one more with every change.
        next_shard: number of the shard that is written next.
        num_deleted_documents: documents that are not returned any more, but counted until the store is compacted.
        num_empty_documents: documents of the input without text, which were skipped.
        sources: where the documents come from, at most 1,000: `name`, and `config`, `revision`, `license` where known.
    """

    chunk_size: int = field(metadata=_rule(_integer(1, MAX_TOKENS)))
    neighbor_size: int = field(metadata=_rule(_integer(1, MAX_TOKENS)))
    token_dtype: Literal["uint16", "uint32"]
    tokenizer: dict[str, Any] = field(metadata=_rule(_tokenizer))
    embedder: dict[str, Any] = field(metadata=_rule(_embedder))
    shards: tuple[ShardEntry, ...]
    files: tuple[FileEntry, ...]
    generation: int = field(default=1, metadata=_rule(_integer(1)))
    next_shard: int = field(default=1, metadata=_rule(_integer(1)))
    num_deleted_documents: int = field(default=0, metadata=_rule(_integer(0)))
    num_empty_documents: int = field(default=0, metadata=_rule(_integer(0)))
    sources: list[dict[str, Any]] = field(default_factory=list, metadata=_rule(_sources))
    metric: Literal["inner_product"] = "inner_product"
    library_version: str = field(default="unknown", metadata=_rule(_text))
    format_version: int = FORMAT_VERSION

    def validate_sizes(self) -> None:
        """Check chunk and neighbor size, and the stream of every shard that was not retokenized, against each other."""
        if self.neighbor_size < self.chunk_size:
            raise ValueError(f"neighbor_size={self.neighbor_size} is below chunk_size={self.chunk_size}")
        retokenized = {entry.shard for entry in self.files if entry.kind == "chunk_starts"}
        for shard in self.shards:
            if shard.name not in retokenized and shard.stream_length != shard.num_chunks * self.chunk_size:
                raise ValueError(f"shard {shard.name} has {shard.num_chunks} chunks in {shard.stream_length} tokens")
            if self.token_dtype == "uint16" and shard.max_token_id >= 1 << 16:
                raise ValueError(f"shard {shard.name} has token ids that do not fit into uint16")

    def validate_shards(self) -> None:
        """Check the names of the shards, and that no more documents are deleted than they have."""
        names = [shard.name for shard in self.shards]
        if not names or len(set(names)) != len(names) or any(int(name) >= self.next_shard for name in names):
            raise ValueError(f"the shards {names[:5]} are not distinct and below next_shard={self.next_shard}")
        if self.num_deleted_documents > self.num_documents:
            raise ValueError(f"{self.num_deleted_documents} of {self.num_documents} documents are deleted")

    def validate_files(self) -> None:
        """Check that the files are those of the shards, one of each kind, and those of the whole store."""
        names = [entry.name for entry in self.files]
        if len(names) > _MAX_FILES or len(set(names)) != len(names):
            raise ValueError(f"it lists {len(names):,} files, more than {_MAX_FILES:,} or one of them twice")
        found = sorted((entry.shard or "", entry.kind) for entry in self.files if entry.kind not in _OPTIONAL)
        shared = [("", entry.kind) for entry in self.files if entry.shard is None and entry.kind in _STORE_KINDS]
        needed = [(shard.name, kind) for shard in self.shards for kind in SHARD_FILES if kind not in _OPTIONAL]
        optional = [(entry.shard, entry.kind) for entry in self.files if entry.kind in _OPTIONAL]
        shards = {shard.name for shard in self.shards}
        if (
            found != sorted(shared + needed)
            or len(set(optional)) != len(optional)
            or not shards.issuperset(shard for shard, _ in optional)
        ):
            raise ValueError("its files are not those of its shards, one of each kind")
        if len(self.entries("deleted")) != bool(self.num_deleted_documents):
            raise ValueError(f"it lists {len(self.entries('deleted'))} files of deleted documents")

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

    def files_by_shard(self) -> dict[str | None, dict[str, FileEntry]]:
        """The files by shard and kind."""
        files: dict[str | None, dict[str, FileEntry]] = {}
        for entry in self.files:
            files.setdefault(entry.shard, {})[entry.kind] = entry
        return files

    def to_bytes(self) -> bytes:
        """The content of `datastore.json`, with a checksum over itself."""
        content = dataclasses.asdict(self)
        content["checksum"] = _checksum(content)
        return (json.dumps(content, indent=2, sort_keys=True, ensure_ascii=True) + "\n").encode()

    def write(self, folder: Path) -> None:
        """Write `datastore.json` into `folder`, atomically."""
        check_num_shards(len(self.shards))
        write_file(folder / MANIFEST_NAME, self.to_bytes())

    @classmethod
    def read(cls, folder: str | os.PathLike[str]) -> "DatastoreManifest":
        """Read and validate `datastore.json`.

        Raises:
            DatastoreNotFoundError: if the folder or its manifest does not exist.
            DatastoreCorruptError: if it is not a manifest that this library writes.
        """
        folder = checked_path(folder)
        path = folder / MANIFEST_NAME
        try:
            os.lstat(path)
        except OSError as error:
            if error.errno in (errno.ENOENT, errno.ENOTDIR, errno.ENAMETOOLONG):
                raise _not_found(folder) from error
            raise not_readable(path, error) from error
        with reading(path):
            content = read_json(folder, MANIFEST_NAME)
            version = content.get("format_version")
            if type(version) is not int or version not in _READABLE_VERSIONS:
                raise ValueError(f"its format version is {version!r:.100}, but this version of retro-hf reads 2 and 3")
            if content.pop("checksum", None) != _checksum(content):
                raise ValueError("its checksum does not match its content")
            if missing := {field.name for field in dataclasses.fields(cls)} - set(content):
                raise ValueError(f"it lacks the fields {sorted(missing)}")
            content["files"] = tuple(FileEntry(**entry) for entry in content["files"][: _MAX_FILES + 1])
            content["shards"] = tuple(ShardEntry(**entry) for entry in content["shards"])
            return cls(**content)


def _checksum(content: dict[str, Any]) -> str:
    return sha256_of(json.dumps(content, sort_keys=True, ensure_ascii=True, separators=(",", ":")))


def _not_found(folder: Path) -> DatastoreNotFoundError:
    if os.path.isdir(unfinished := building_folder(folder)):
        return DatastoreNotFoundError(
            f"The datastore {str(folder)!r} is not finished. Repeat the same `retro build` (in Python: "
            f"`RetroDatastore.build(documents, path, ...)`): it resumes from {str(unfinished)!r}."
        )
    reason = f"the folder has no {MANIFEST_NAME}" if os.path.isdir(folder) else "the folder does not exist"
    if os.path.isfile(folder):
        reason = "it is a file, and a datastore is a folder"
    return DatastoreNotFoundError(
        f"There is no datastore at {str(folder)!r}: {reason}. Check the path, or build one with `retro build` (in "
        "Python: `RetroDatastore.build(documents, path, ...)`)."
    )


# ── files beside the manifest ─────────────────────────────────────────────────────────────────────────────────────────


def describe_file(path: Path, kind: str, shard: str | None = None) -> FileEntry:
    """The entry of a file that has just been written."""
    return FileEntry(path.name, kind, path.stat().st_size, sha256_of_file(path), shard)


def check_sizes(folder: Path, files: Iterable[FileEntry], remedy: str = RESTORE) -> None:
    """Check that every file exists and has its recorded size; DatastoreCorruptError at the first that doesn't.

    Do this before mapping a file: a read past the end of a mapped file that was cut short kills the process (SIGBUS).
    """
    for entry in files:
        with reading(folder / entry.name, remedy):
            size = file_inside(folder, entry.name).st_size
        if size != entry.size:
            raise damaged(folder / entry.name, f"it has {size:,} bytes instead of {entry.size:,}", remedy)


def check_content(folder: Path, files: Collection[FileEntry], remedy: str = RESTORE) -> None:
    """Check the size and the sha256 of every file; DatastoreCorruptError at the first that differs."""
    check_sizes(folder, files, remedy)
    for entry in files:
        with reading(folder / entry.name, remedy):
            found = sha256_of_file(folder / entry.name)
        if found != entry.sha256:
            raise damaged(folder / entry.name, f"its sha256 is {found} instead of {entry.sha256}", remedy)


def check_num_shards(number: int) -> None:
    """Raise DatastoreInputError for more shards than a manifest may list, before any of them is written."""
    if number > _MAX_SHARDS:
        raise DatastoreInputError(
            f"The datastore would have {number:,} shards, but a manifest holds {_MAX_SHARDS:,}. Join existing shards with "
            "`retro compact` (in Python: `compact()`, or make larger ones with `shard_chunks`)."
        )


def checked_path(path: Any) -> Path:
    """A path that a user gave; DatastoreInputError for something else."""
    return arguments.path("The path of the datastore", path, DatastoreInputError)


def new_path(path: Any) -> Path:
    """The path for a new datastore; DatastoreInputError if it is inside another datastore."""
    path = checked_path(path)
    for folder in path.resolve().parents:
        if os.path.isfile(folder / MANIFEST_NAME):
            raise DatastoreInputError(
                f"{str(path)!r} is inside the datastore {str(folder)!r}. Choose a path outside of it for the new datastore."
            )
    return path


# ── what a manifest says about its origins ────────────────────────────────────────────────────────────────────────────


def describe_tokenizer(tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    """The field `tokenizer` of a manifest."""
    return {
        "name": portable_name(tokenizer.name_or_path),
        "revision": getattr(tokenizer, "init_kwargs", {}).get("revision"),
        "fingerprint": tokenizer_fingerprint(tokenizer),
        "vocab_size": vocabulary_size(tokenizer),
    }


def describe_embedder(embedder: Any) -> dict[str, Any]:
    """The field `embedder` of a manifest, for a [`ChunkEmbedder`]."""
    content: dict[str, Any] = {
        "name": portable_name(embedder.name_or_path),
        "revision": embedder.revision,
        "fingerprint": embedder.fingerprint,
        "dim": embedder.dim,
        "pooling": embedder.pooling,
        "dtype": str(embedder.dtype).removeprefix("torch."),
    }
    if embedder.prompt:
        content["prompt"] = embedder.prompt
    if not embedder.symmetric:
        other = embedder.query_encoder
        content["query"] = {
            "name": portable_name(other.name_or_path) if other else None,
            "revision": other.revision if other else None,
            "fingerprint": embedder.query_fingerprint,
            "prompt": embedder.query_prompt,
        }
    return content


def portable_name(name_or_path: str) -> str:
    """A Hub name, or only the last part of a local folder: what is uploaded must not tell one machine's paths."""
    if os.path.isabs(name_or_path) or os.path.exists(name_or_path):
        name_or_path = os.path.basename(os.path.abspath(name_or_path))
    return without_lone_surrogates(name_or_path)


def library_version() -> str:
    """The installed version of this package."""
    try:
        return importlib.metadata.version("retro-hf")
    except importlib.metadata.PackageNotFoundError:
        return "unknown"


def unique_sources(sources: Iterable[dict[str, str]]) -> list[dict[str, str]]:
    """Each source once, in order. Beyond 1,000 a last entry says that there are more."""
    unique = list({tuple(sorted(source.items())): source for source in sources}.values())
    named = [source for source in unique if source != _MORE_SOURCES][:_MAX_SOURCES]
    return named if len(named) == len(unique) else [*named, _MORE_SOURCES]
