"""Files of a datastore: checksums, atomic writes, arrays that grow on disk, and read-only memory maps."""

from __future__ import annotations

import errno
import hashlib
import io
import json
import os
import shutil
import struct
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import xxhash
from filelock import FileLock, Timeout

from ..errors import (
    DatastoreCorruptError,
    DatastoreExistsError,
    DatastoreReadError,
    DatastoreWriteError,
    RetroError,
)
from ..outside import file_inside, parse_json


MANIFEST_NAME = "datastore.json"
RESTORE = "Restore the folder from a copy, or build the datastore again."
INT64 = np.dtype(np.int64)
UINT32 = np.dtype(np.uint32)
_KEYS = "keys"
# The keys start here in their file: after room for the longest header, at a multiple of a cache line.
_KEYS_OFFSET = 256
_HASH_BLOCK = 1 << 20
_MAX_REASON = 500
_MAX_HEADER_BYTES = 1 << 20
_MAX_NPY_HEADER_BYTES = 1 << 12
# A file that is not there, or is something else than a file: the folder is damaged. Any other error is the system's.
_DAMAGE = (errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.ELOOP, errno.ENXIO, errno.EINVAL)
_READ_REMEDIES = {
    errno.EMFILE: "Close files or raise the limit (`ulimit -n`), and repeat the call.",
    errno.ENFILE: "Close files or raise the limit of the system, and repeat the call.",
    errno.EACCES: "Allow this user to read it, and repeat the call.",
    errno.EPERM: "Allow this user to read it, and repeat the call.",
    errno.EIO: "The disk or the network failed: check it, and repeat the call.",
    errno.ENOMEM: "Free memory, and repeat the call.",
}


# ── checksums ─────────────────────────────────────────────────────────────────────────────────────────────────────────
# Two kinds of hash, both fixed by the format on disk: sha256 where content must be verified or identified (`sha256sum`
# and the Hub show the same), and 64-bit xxh3 where a text is only looked up and the match is then checked.


def sha256_of(*parts: str | bytes | memoryview) -> str:
    """The sha256 of texts (as UTF-8) and bytes one after the other, in hex."""
    digest = hashlib.sha256()
    for part in parts:
        digest.update(part.encode() if isinstance(part, str) else part)
    return digest.hexdigest()


def sha256_of_file(path: Path) -> str:
    """The sha256 of a file, in hex."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(_HASH_BLOCK):
            digest.update(block)
    return digest.hexdigest()


def digest_of(*parts: str | bytes) -> str:
    """A short digest (24 hex characters) of several texts; their order and their borders count."""
    digest = hashlib.sha256()
    for part in parts:
        data = part.encode() if isinstance(part, str) else part
        # The length keeps ("ab", "c") and ("a", "bc") apart.
        digest.update(len(data).to_bytes(8, "little") + data)
    return digest.hexdigest()[:24]


def hash_of(text: str) -> int:
    """The 64-bit hash by which document ids are found, the same in every process."""
    return xxhash.xxh3_64_intdigest(text.encode(errors="surrogatepass"))  # a caller may ask for any id


def damaged(path: Path, reason: str, remedy: str = RESTORE) -> DatastoreCorruptError:
    """The error for a file whose content is wrong."""
    return DatastoreCorruptError(f"{str(path)!r} is damaged: {reason}. {remedy}")


def not_readable(path: Path, error: OSError | MemoryError) -> DatastoreReadError:
    """The error for a file that the system did not let us read."""
    number = errno.ENOMEM if isinstance(error, MemoryError) else error.errno or 0
    reason = os.strerror(number) if number else str(error)
    remedy = _READ_REMEDIES.get(number, "Check the disk and the permissions, and repeat the call.")
    raised = DatastoreReadError(f"{str(path)!r} could not be read: {reason}. {remedy}")
    raised.errno = number
    return raised


@contextmanager
def reading(path: Path, remedy: str = RESTORE) -> Iterator[None]:
    """Explain whatever goes wrong while something at `path` is read: it may be damaged, or made to do harm.

    Raises:
        DatastoreReadError: if the system refused to read it, or memory is short.
        DatastoreCorruptError: for any other error.
    """
    try:
        yield
    except RetroError:
        raise
    except OSError as error:
        if error.errno is None or error.errno in _DAMAGE:
            raise damaged(path, _one_line(error), remedy) from error
        raise not_readable(path, error) from error
    except MemoryError as error:
        raise not_readable(path, error) from error
    except Exception as error:  # a hostile file can make FAISS, pyarrow and tokenizers raise anything
        raise damaged(path, _one_line(error), remedy) from error
    except BaseException as error:
        # A panic of a library in Rust is not an `Exception`.
        if type(error).__name__ != "PanicException":
            raise
        raise damaged(path, _one_line(error), remedy) from error


def _one_line(error: BaseException) -> str:
    if isinstance(error, RecursionError):
        return "it is nested too deeply"
    if isinstance(error, FileNotFoundError):
        return "it is missing"
    text = " ".join(str(error).split())[:_MAX_REASON].rstrip(".")
    return text if isinstance(error, ValueError) and text else f"{type(error).__name__}: {text}"


# ── atomic writes ─────────────────────────────────────────────────────────────────────────────────────────────────────


def flush_to_disk(path: Path) -> None:
    """Flush a file or a folder to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def complete_file(path: Path) -> Iterator[Path]:
    """Write to a hidden sibling, which is renamed to `path` if the block ends without an error.

    A reader sees the old content or the new content, never a part. A crash leaves at most the sibling.
    """
    # Every writer gets its own name: another machine may write the same file in a shared folder.
    partial = path.with_name(f".{path.name}.{uuid.uuid4().hex}.partial")
    with writing(path):
        try:
            yield partial
            # The content must be on the disk before the name is, or a power cut could leave an empty file under the name.
            flush_to_disk(partial)
            os.replace(partial, path)
        finally:
            with suppress(OSError):
                partial.unlink(missing_ok=True)
        # The rename itself is stored in the folder.
        flush_to_disk(path.parent)


def write_file(path: Path, content: bytes) -> None:
    """Write a small file atomically."""
    with complete_file(path) as partial:
        partial.write_bytes(content)


def link_or_copy(source: Path, target: Path) -> None:
    """Give a file a second name without copying it; copy it where the file system has no hard links.

    Files of a datastore never change, so both names can share the content. An older `target` is replaced.
    """
    target.unlink(missing_ok=True)
    try:
        os.link(source, target)
    except OSError:
        with complete_file(target) as partial:
            shutil.copyfile(source, partial)


def make_folder(path: Path) -> None:
    """Make a folder and those above it, unless it is there."""
    with writing(path):
        path.mkdir(parents=True, exist_ok=True)


def building_folder(path: Path) -> Path:
    """The folder that keeps the unfinished work on the datastore at `path`."""
    return path.parent / f".{path.name}.building"


def check_free(path: Path) -> None:
    """Check that nothing is at `path` yet.

    Raises:
        DatastoreExistsError: for a file, or a folder with content. It is left unchanged.
        DatastoreWriteError: if the path cannot be read, for example because the name is too long.
    """
    try:
        taken = path.is_symlink() or path.is_file() or (path.is_dir() and any(path.iterdir()))
    except OSError as error:
        raise not_written(path, error) from error
    if taken:
        raise DatastoreExistsError(
            f"{str(path)!r} already exists and is never overwritten. Choose another path, remove it, or add documents "
            "with `retro append` (in Python: `RetroDatastore.load(path).append(documents, ...)`)."
        )


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Explain that the disk refused a write to `path`.

    Raises:
        DatastoreWriteError: instead of the error of the system, or of a library in Rust that passes it on as a text.
    """
    try:
        yield
    except RetroError:
        raise
    except Exception as error:  # libraries in Rust pass an error of the system on as a text of their own
        if not isinstance(error, OSError) and "(os error " not in str(error):
            raise
        raise not_written(path, error) from error


def not_written(path: Path, error: Exception) -> DatastoreWriteError:
    """The error for a disk that refused a write to `path`."""
    # numpy reports only how many bytes a full disk has taken.
    partly = isinstance(error, OSError) and not error.errno
    reason = f"the disk took only a part ({error})" if partly else error
    return DatastoreWriteError(
        f"{str(path)!r} could not be written: {reason}. Existing data is unharmed: free disk space or allow writing and "
        "repeat the call, or choose another path."
    )


@contextmanager
def new_folder(path: Path, within: Path | None = None) -> Iterator[Path]:
    """Write to a hidden folder, which is renamed to `path` if the block ends without an error.

    A crash leaves at most the hidden folder, beside `path` or in `within`. An exception removes it.

    Raises:
        DatastoreExistsError: if something is at `path`. It is left unchanged.
        DatastoreWriteError: if the disk is full or read-only.
    """
    path = Path(os.path.abspath(path))
    check_free(path)
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        with partial_folder(within or path.parent, path.name) as partial:
            yield partial
            for file in partial.iterdir():
                flush_to_disk(file)
            flush_to_disk(partial)
            try:
                os.replace(partial, path)
            except OSError as error:
                raise DatastoreExistsError(
                    f"{str(path)!r} was created by another process in the meantime. Choose another path and repeat the call."
                ) from error
        flush_to_disk(path.parent)


@contextmanager
def partial_folder(parent: Path, name: str) -> Iterator[Path]:
    """A new hidden folder in `parent` for unfinished work on `name`; what is left of it in the end is removed.

    Those of calls that were killed are removed first. A lock beside the folder tells them from those that are in use, also
    by other processes.
    """
    for entry in list(os.scandir(parent)):
        if entry.name.startswith(f".{name}.") and entry.name.endswith((".partial", ".partial.lock")):
            stale = parent / entry.name.removesuffix(".lock")
            with suppress(Timeout, OSError), _locked(stale):
                shutil.rmtree(stale, ignore_errors=True)
    partial = parent / f".{name}.{uuid.uuid4().hex}.partial"
    with _locked(partial):
        partial.mkdir()
        try:
            yield partial
        finally:
            shutil.rmtree(partial, ignore_errors=True)


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Hold the lock of a folder, which ends with the process; `Timeout` if another holds it."""
    lock = FileLock(folder.with_name(f"{folder.name}.lock"), timeout=0)
    with lock:
        try:
            yield
        finally:
            with suppress(OSError):
                os.unlink(lock.lock_file)


# ── arrays that grow block by block ───────────────────────────────────────────────────────────────────────────────────


class _ArrayWriter:
    """A file with a header of fixed length and rows that are appended; `close` writes the header with the final length."""

    def __init__(self, path: Path, dtype: np.dtype) -> None:
        self.length = 0
        self._dtype = dtype
        self._file: BinaryIO = path.open("wb")
        self._write_header()

    def _write_header(self) -> None:
        raise NotImplementedError

    def append(self, rows: np.ndarray) -> None:
        """Append rows, converted to the dtype of the file."""
        self._file.write(np.ascontiguousarray(rows, dtype=self._dtype).tobytes())
        self.length += len(rows)

    def close(self) -> None:
        """Write the final header and close the file."""
        self._file.seek(0)
        self._write_header()
        self._file.close()

    def __enter__(self) -> Any:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class NpyWriter(_ArrayWriter):
    """A one-dimensional .npy file. numpy leaves room in the header for the final length."""

    def _write_header(self) -> None:
        header = {"descr": np.lib.format.dtype_to_descr(self._dtype), "fortran_order": False, "shape": (self.length,)}
        np.lib.format.write_array_header_1_0(self._file, header)


class TensorWriter(_ArrayWriter):
    """A safetensors file with one float16 matrix `keys` of shape `(length, dim)`."""

    def __init__(self, path: Path, dim: int) -> None:
        self._dim = dim
        super().__init__(path, np.dtype(np.float16))

    def _write_header(self) -> None:
        shape = (self.length, self._dim)
        # The format allows trailing spaces, which leave room for a longer length.
        text = json.dumps({_KEYS: _tensor_header(shape)}, separators=(",", ":")).encode().ljust(_KEYS_OFFSET - 8)
        self._file.write(struct.pack("<Q", len(text)) + text)


def write_npy(path: Path, values: np.ndarray) -> None:
    """Write a one-dimensional .npy file in one go; the caller renames it."""
    with NpyWriter(path, values.dtype) as file:
        file.append(values)


# ── parquet ───────────────────────────────────────────────────────────────────────────────────────────────────────────

_PARQUET_LIMITS = {"thrift_string_size_limit": 64 << 20, "thrift_container_size_limit": 1 << 20}
_DECIMAL = "DECIMAL"


def open_parquet(source: Any) -> pq.ParquetFile:
    """Open a parquet file that somebody else may have written, with bounds on what its header takes.

    Texts stay in the form that the file has them in until their size is known: a dictionary of one long text can stand for any
    number of copies.
    """
    opened = pq.ParquetFile(source, **_PARQUET_LIMITS)
    schema = opened.schema
    texts = [
        number
        for number in range(len(schema))
        if schema.column(number).physical_type == "BYTE_ARRAY" and schema.column(number).logical_type.type != _DECIMAL
    ]
    return pq.ParquetFile(source, metadata=opened.metadata, read_dictionary=texts, **_PARQUET_LIMITS)


def group_bytes(metadata: pq.FileMetaData, group: int) -> int:
    """The bytes that a row group takes when it is read, but for copies from dictionaries; ValueError if it cannot be true."""
    row_group = metadata.row_group(group)
    columns = [row_group.column(number) for number in range(row_group.num_columns)]
    # Repeated numbers take nearly nothing in the file, and eight bytes each when they are read.
    sizes = [max(column.total_uncompressed_size, 8 * column.num_values) for column in columns]
    if row_group.num_rows < 0 or any(min(column.total_uncompressed_size, column.num_values) < 0 for column in columns):
        raise ValueError(f"its row group {group} has a negative size")
    return sum(sizes)


def bytes_of(values: pa.Array | pa.ChunkedArray | pa.RecordBatch | pa.Table) -> int:
    """The bytes of an array as Python values, with every copy of a text in a dictionary counted."""
    if isinstance(values, (pa.RecordBatch, pa.Table)):
        return sum(map(bytes_of, values.columns))
    if isinstance(values, pa.ChunkedArray):
        return sum(map(bytes_of, values.chunks))
    kind = values.type
    if pa.types.is_dictionary(kind):
        sizes = pc.fill_null(pc.binary_length(values.dictionary), 0).cast(pa.int64())
        return int(pc.sum(sizes.take(values.indices)).as_py() or 0)
    if pa.types.is_struct(kind):
        return sum(map(bytes_of, values.flatten()))
    if pa.types.is_nested(kind) and hasattr(values, "flatten"):
        return bytes_of(values.flatten())
    return int(values.nbytes)


# ── memory maps ───────────────────────────────────────────────────────────────────────────────────────────────────────


def mapped(path: Path) -> np.ndarray:
    """The bytes of a regular file, mapped read-only (uint8). Nothing stays open, and a file that is removed stays readable.

    A map of Python or numpy keeps its file open, so a store of many shards would exceed the limit of open files.
    """
    if not file_inside(path.parent, path.name).st_size:
        return np.empty(0, dtype=np.uint8)
    with pa.memory_map(str(path)) as file:
        return np.frombuffer(file.read_buffer(), dtype=np.uint8)


def map_npy(path: Path, dtype: np.dtype, length: int) -> np.ndarray:
    """Map a one-dimensional .npy file read-only; DatastoreCorruptError unless it holds `length` values of `dtype`."""
    with reading(path):
        data = mapped(path)
        start, found, shape = _npy_header(data)
        if found != dtype or shape != (length,):
            raise ValueError(f"it holds {found} of shape {shape} instead of {dtype} of shape {(length,)}")
        if len(data) != start + length * dtype.itemsize:
            raise ValueError(f"it has {len(data):,} bytes for {length:,} values of {dtype}")
        return np.frombuffer(data, dtype=dtype, offset=start, count=length)


def _npy_header(data: np.ndarray) -> tuple[int, np.dtype, tuple[int, ...]]:
    """Where the values of a .npy file begin, their type and their shape."""
    # From a copy of what a header may have at most: it may claim to be as long as the memory, and numpy parses it as Python.
    file = io.BytesIO(data[: 2 * _MAX_NPY_HEADER_BYTES].tobytes())
    readers = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}
    try:
        version = np.lib.format.read_magic(file)
    except ValueError:
        raise ValueError("it is not a .npy file") from None
    if version not in readers:
        raise ValueError("it is of a newer version of numpy")
    try:
        shape, _, dtype = readers[version](file, max_header_size=_MAX_NPY_HEADER_BYTES)
    except MemoryError:  # what Python's parser raises where it is nested too deeply
        raise ValueError("its header is nested too deeply") from None
    return file.tell(), dtype, shape


def map_tensor(path: Path, shape: tuple[int, int]) -> np.ndarray:
    """Map the float16 matrix `keys` of a safetensors file read-only; DatastoreCorruptError for another header."""
    # Not by `safetensors`, which copies what it reads into memory.
    with reading(path):
        data = mapped(path)
        header_size = struct.unpack("<Q", data[:8].tobytes())[0] if len(data) >= 8 else 0
        # Checked before it is read: a hostile header may claim to be as long as the memory.
        if not 2 <= header_size <= min(_MAX_HEADER_BYTES, len(data) - 8):
            raise ValueError(f"its header claims {header_size:,} bytes in a file of {len(data):,}")
        header: Any = parse_json(data[8 : 8 + header_size].tobytes())
        expected = _tensor_header(shape)
        start = 8 + header_size
        if (
            not isinstance(header, dict)
            or header.get(_KEYS) != expected
            or len(data) != start + expected["data_offsets"][1]
        ):
            raise ValueError(f"its header does not describe a float16 matrix of shape {shape}")
        return np.frombuffer(data, dtype=np.float16, offset=start, count=shape[0] * shape[1]).reshape(shape)


def _tensor_header(shape: tuple[int, int]) -> dict[str, Any]:
    return {"dtype": "F16", "shape": list(shape), "data_offsets": [0, 2 * shape[0] * shape[1]]}
