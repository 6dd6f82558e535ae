"""Files of a datastore: atomic writing, growing .npy and safetensors files, bounded read-only memory maps."""

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
from types import TracebackType
from typing import Any

import numpy as np

from ..errors import DatastoreCorruptError, DatastoreExistsError, DatastoreWriteError, RetroError


__all__ = [
    "RESTORE",
    "NpyWriter",
    "TensorWriter",
    "building_folder",
    "check_free",
    "complete_file",
    "damaged",
    "link_or_copy",
    "map_npy",
    "map_tensor",
    "new_folder",
    "not_written",
    "sha256_of",
    "sync",
    "write_file",
]

_KEYS_NAME = "keys"
# Where the matrix of keys begins in its file: room for the longest header, and a multiple of a cache line.
_KEYS_OFFSET = 256
_HASH_BLOCK = 1 << 20
_MAX_HEADER_BYTES = 1 << 20
# What helps against most damage.
RESTORE = "Restore the folder from a copy, or build the datastore again."


def sync(path: Path) -> None:
    """Flush a file or folder to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def complete_file(path: Path) -> Iterator[Path]:
    """A hidden sibling to write to, which takes the name `path` once the block ends without an error.

    A reader sees the old content or the new, never a part; a crash leaves at most the sibling.
    """
    # Its own name for each writer, also on machines that share the folder.
    partial = path.with_name(f".{path.name}.{uuid.uuid4().hex}.partial")
    try:
        yield partial
        sync(partial)
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)
    sync(path.parent)


def write_file(path: Path, content: bytes) -> None:
    """Write a small file atomically."""
    with complete_file(path) as partial:
        partial.write_bytes(content)


def link_or_copy(source: Path, target: Path) -> None:
    """Give a file that never changes a second name; a copy where the file system cannot, or the name lies on another.

    An older file under the new name, which a killed process left, is replaced.
    """
    target.unlink(missing_ok=True)
    try:
        os.link(source, target)
    except OSError:
        with complete_file(target) as partial:
            shutil.copyfile(source, partial)


def building_folder(path: Path) -> Path:
    """Where a build of the datastore at `path` keeps what it has done until it is finished."""
    return path.parent / f".{path.name}.building"


def check_free(path: Path) -> None:
    """Refuse to write a datastore where something is.

    Raises:
        DatastoreExistsError: if `path` is a file or a folder with content. It stays as it is.
        DatastoreWriteError: if it cannot be looked at, such as a name that is too long.
    """
    try:
        taken = path.is_symlink() or path.is_file() or (path.is_dir() and any(path.iterdir()))
    except OSError as error:
        raise not_written(path, error) from error
    if taken:
        raise DatastoreExistsError(
            f"{str(path)!r} already exists. A datastore is never written over another: choose another path, remove the old "
            "one first, or add to it with `RetroDatastore.load(path).append(documents, ...)`."
        )


def not_written(path: Path, error: OSError) -> DatastoreWriteError:
    """The error for a disk that did not take what was to be written to `path`."""
    # numpy counts what a full disk has taken, and says no more.
    reason = error if error.errno else f"the disk took a part only ({error})"
    return DatastoreWriteError(
        f"{str(path)!r} could not be written: {reason}. What was there before is unharmed. Make room on the disk, or allow "
        "writing, and make the same call again; or choose another path."
    )


@contextmanager
def new_folder(path: Path, within: Path | None = None) -> Iterator[Path]:
    """A hidden folder to write into, which takes the name `path` once the block ends without an error.

    A crash leaves at most the hidden folder, beside `path` or in `within`, never a half-written one under the final name;
    an exception removes it.

    Raises:
        DatastoreExistsError: if `path` is a file or a folder with content. It stays as it is.
        DatastoreWriteError: if the disk is full, or must not be written to.
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
                f"{str(path)!r} appeared while the datastore was being written. Nothing was changed; choose another "
                "path and write it again."
            ) from error
        sync(path.parent)
    except BaseException as error:
        shutil.rmtree(partial, ignore_errors=True)
        if isinstance(error, OSError) and not isinstance(error, RetroError):
            raise not_written(path, error) from error
        raise


def sha256_of(path: Path) -> str:
    """The sha256 of a file in hex, as `sha256sum` prints it."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(_HASH_BLOCK):
            digest.update(block)
    return digest.hexdigest()


class NpyWriter:
    """A one-dimensional .npy file that grows block by block; numpy leaves room in the header for its final length."""

    def __init__(self, path: Path, dtype: np.dtype) -> None:
        self.dtype = dtype
        self.length = 0
        self._file = path.open("wb")
        self._write_header()

    def _write_header(self) -> None:
        header = {"descr": np.lib.format.dtype_to_descr(self.dtype), "fortran_order": False, "shape": (self.length,)}
        np.lib.format.write_array_header_1_0(self._file, header)

    def append(self, values: np.ndarray) -> None:
        """Append a one-dimensional array."""
        self._file.write(np.ascontiguousarray(values, dtype=self.dtype).tobytes())
        self.length += len(values)

    def __enter__(self) -> NpyWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.seek(0)
        self._write_header()
        self._file.close()


class TensorWriter:
    """A safetensors file with one float16 matrix, `keys`, that grows block by block; its header leaves room to grow."""

    def __init__(self, path: Path, dim: int) -> None:
        self._dim = dim
        self._rows = 0
        self._file = path.open("wb")
        self._write_header()

    def _write_header(self) -> None:
        end = self._rows * self._dim * 2
        header = {_KEYS_NAME: {"dtype": "F16", "shape": [self._rows, self._dim], "data_offsets": [0, end]}}
        # Spaces are part of the format.
        text = json.dumps(header, separators=(",", ":")).encode().ljust(_KEYS_OFFSET - 8)
        self._file.write(struct.pack("<Q", len(text)) + text)

    def append(self, rows: np.ndarray) -> None:
        """Append float rows of shape `(num_rows, dim)`."""
        self._file.write(np.ascontiguousarray(rows, dtype=np.float16).tobytes())
        self._rows += len(rows)

    def __enter__(self) -> TensorWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.seek(0)
        self._write_header()
        self._file.close()


def damaged(path: Path, reason: str, remedy: str = RESTORE) -> DatastoreCorruptError:
    """The error for a file that is not as it should be."""
    return DatastoreCorruptError(f"{str(path)!r} is damaged: {reason}. {remedy}")


def map_npy(path: Path, dtype: np.dtype, length: int) -> np.ndarray:
    """Map a one-dimensional .npy file read-only, after checking that it holds `length` values of `dtype`."""
    try:
        values = np.load(path, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError, EOFError, SyntaxError, TypeError, TokenError) as error:
        raise damaged(path, f"it is not a .npy file ({error})") from error
    if not isinstance(values, np.ndarray) or values.dtype != dtype or values.shape != (length,):
        found = f"{values.dtype} of shape {values.shape}" if isinstance(values, np.ndarray) else type(values).__name__
        raise damaged(path, f"it holds {found}, but the manifest says {dtype} of shape {(length,)}")
    return values


def map_tensor(path: Path, shape: tuple[int, int]) -> np.ndarray:
    """Map the float16 matrix of a safetensors file read-only, after checking its header against `shape`."""
    size = path.stat().st_size
    with path.open("rb") as file:
        prefix = file.read(8)
        header_size = struct.unpack("<Q", prefix)[0] if len(prefix) == 8 else 0
        if not 2 <= header_size <= min(_MAX_HEADER_BYTES, size - 8):
            raise damaged(path, f"its header claims {header_size:,} bytes of a file of {size:,}")
        try:
            header: Any = json.loads(file.read(header_size))
        except (ValueError, RecursionError) as error:
            raise damaged(path, f"its header is not JSON ({error})") from error
    end = shape[0] * shape[1] * 2
    expected = {"dtype": "F16", "shape": list(shape), "data_offsets": [0, end]}
    if not isinstance(header, dict) or header.get(_KEYS_NAME) != expected or size != 8 + header_size + end:
        raise damaged(path, f"its header does not describe a float16 matrix of shape {shape}")
    return np.memmap(path, dtype=np.float16, mode="r", offset=8 + header_size, shape=shape)
