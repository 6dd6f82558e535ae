"""Files of a datastore: checksums, atomic writes, arrays that grow on disk, and read-only memory maps."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import struct
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tokenize import TokenError
from typing import Any, BinaryIO

import numpy as np
import xxhash

from ..errors import DatastoreCorruptError, DatastoreExistsError, DatastoreWriteError, RetroError


MANIFEST_NAME = "datastore.json"
RESTORE = "Restore the folder from a copy, or build the datastore again."
INT64 = np.dtype(np.int64)
_KEYS = "keys"
# The keys start here in their file: after room for the longest header, at a multiple of a cache line.
_KEYS_OFFSET = 256
_HASH_BLOCK = 1 << 20
_MAX_HEADER_BYTES = 1 << 20


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
    return xxhash.xxh3_64_intdigest(text.encode())


def damaged(path: Path, reason: str, remedy: str = RESTORE) -> DatastoreCorruptError:
    """The error for a file whose content is wrong."""
    return DatastoreCorruptError(f"{str(path)!r} is damaged: {reason}. {remedy}")


# ── atomic writes ─────────────────────────────────────────────────────────────────────────────────────────────────────


def sync(path: Path) -> None:
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
    try:
        yield partial
        # The content must be on the disk before the name is, or a power cut could leave an empty file under the name.
        sync(partial)
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)
    # The rename itself is stored in the folder.
    sync(path.parent)


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
            "with `RetroDatastore.load(path).append(documents, ...)`."
        )


def not_written(path: Path, error: OSError) -> DatastoreWriteError:
    """The error for a disk that refused a write to `path`."""
    # numpy reports only how many bytes a full disk has taken.
    reason = error if error.errno else f"the disk took only a part ({error})"
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
    partial = (within or path.parent) / f".{path.name}.{uuid.uuid4().hex}.partial"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        partial.mkdir()
        yield partial
        for file in partial.iterdir():
            sync(file)
        sync(partial)
        try:
            os.replace(partial, path)
        except OSError as error:
            raise DatastoreExistsError(
                f"{str(path)!r} was created by another process in the meantime. Choose another path and repeat the call."
            ) from error
        sync(path.parent)
    except BaseException as error:
        shutil.rmtree(partial, ignore_errors=True)
        if isinstance(error, OSError) and not isinstance(error, RetroError):
            raise not_written(path, error) from error
        raise


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


# ── memory maps ───────────────────────────────────────────────────────────────────────────────────────────────────────


def map_npy(path: Path, dtype: np.dtype, length: int) -> np.ndarray:
    """Map a one-dimensional .npy file read-only; DatastoreCorruptError unless it holds `length` values of `dtype`."""
    try:
        values = np.load(path, mmap_mode="r", allow_pickle=False)
    # All that numpy was seen to raise on damaged headers, which it parses as Python literals.
    except (OSError, ValueError, EOFError, SyntaxError, TypeError, TokenError) as error:
        raise damaged(path, f"it is not a .npy file ({error})") from error
    if not isinstance(values, np.ndarray) or values.dtype != dtype or values.shape != (length,):
        found = f"{values.dtype} of shape {values.shape}" if isinstance(values, np.ndarray) else type(values).__name__
        raise damaged(path, f"it holds {found} instead of {dtype} of shape {(length,)}")
    return values


def map_tensor(path: Path, shape: tuple[int, int]) -> np.ndarray:
    """Map the float16 matrix `keys` of a safetensors file read-only; DatastoreCorruptError for another header."""
    # Not by `safetensors`, which copies what it reads into memory.
    size = path.stat().st_size
    with path.open("rb") as file:
        prefix = file.read(8)
        header_size = struct.unpack("<Q", prefix)[0] if len(prefix) == 8 else 0
        # Checked before reading: a hostile header may claim to be as long as the memory.
        if not 2 <= header_size <= min(_MAX_HEADER_BYTES, size - 8):
            raise damaged(path, f"its header claims {header_size:,} bytes in a file of {size:,}")
        try:
            header: Any = json.loads(file.read(header_size))
        except (ValueError, RecursionError) as error:
            raise damaged(path, f"its header is not JSON ({error})") from error
    expected = _tensor_header(shape)
    end = 8 + header_size + expected["data_offsets"][1]
    if not isinstance(header, dict) or header.get(_KEYS) != expected or size != end:
        raise damaged(path, f"its header does not describe a float16 matrix of shape {shape}")
    return np.memmap(path, dtype=np.float16, mode="r", offset=8 + header_size, shape=shape)


def _tensor_header(shape: tuple[int, int]) -> dict[str, Any]:
    return {"dtype": "F16", "shape": list(shape), "data_offsets": [0, 2 * shape[0] * shape[1]]}
