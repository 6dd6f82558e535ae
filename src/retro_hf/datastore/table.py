"""The documents of a datastore, read back one by one from parquet."""

from __future__ import annotations

import json
import threading
from collections import OrderedDict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from .storage import damaged


__all__ = ["DocumentTable"]

_COLUMNS = ("id", "title", "source", "text", "metadata")
_CACHED_GROUPS = 4
_CACHED_ID_GROUPS = 4096


class DocumentTable:
    """Random access to a parquet file of documents, by row groups of at most 512 documents, the last few kept.

    Raises:
        DatastoreCorruptError: if the file is not a parquet file of `num_documents` documents.
    """

    def __init__(self, path: Path, num_documents: int) -> None:
        self._path = path
        self._lock = threading.Lock()
        self._groups: OrderedDict[int, list[dict[str, Any]]] = OrderedDict()
        self._group_ids: OrderedDict[int, list[str]] = OrderedDict()
        try:
            self._file = pq.ParquetFile(path, memory_map=True)
            metadata = self._file.metadata
            rows = [metadata.row_group(group).num_rows for group in range(metadata.num_row_groups)]
            names = set(self._file.schema_arrow.names)
        except (OSError, pa.ArrowException) as error:
            raise damaged(self._path, str(error)) from error
        self._starts = np.cumsum([0, *rows])
        if self._starts[-1] != num_documents or not names.issuperset(_COLUMNS):
            raise damaged(
                self._path,
                f"it has {self._starts[-1]} rows with the columns {sorted(names)}, but {num_documents} documents with "
                f"{list(_COLUMNS)} are expected",
            )

    def document(self, number: int) -> dict[str, Any]:
        """The document at a position; fields beyond the four come back as they were given."""
        group = int(np.searchsorted(self._starts, number, side="right") - 1)
        row = dict(self._group(group)[number - int(self._starts[group])])
        metadata = row.pop("metadata")
        try:
            return {**json.loads(metadata), **row} if metadata else row
        except (ValueError, TypeError) as error:
            raise damaged(self._path, f"the metadata of document {number} is not a JSON object") from error

    def document_id(self, number: int) -> str:
        """The id of the document at a position, without reading its text."""
        group = int(np.searchsorted(self._starts, number, side="right") - 1)
        return self._ids(group)[number - int(self._starts[group])]

    def pieces(self) -> Iterator[pa.Table]:
        """All documents in order, at most 512 at a time."""
        for group in range(len(self._starts) - 1):
            yield self._read(group, _COLUMNS)

    def _ids(self, group: int) -> list[str]:
        with self._lock:
            if group not in self._group_ids:
                self._group_ids[group] = self._read(group, ("id",)).column("id").to_pylist()
                if len(self._group_ids) > _CACHED_ID_GROUPS:
                    self._group_ids.popitem(last=False)
            return self._group_ids[group]

    def _read(self, group: int, columns: tuple[str, ...]) -> pa.Table:
        try:
            # One small group: threads would cost more than they bring, and do not survive a fork.
            table = self._file.read_row_group(group, columns=list(columns), use_threads=False)
            table.validate(full=True)  # texts that are not UTF-8
            return table
        except (OSError, pa.ArrowException) as error:
            raise damaged(self._path, str(error)) from error

    def _group(self, group: int) -> list[dict[str, Any]]:
        with self._lock:
            if group in self._groups:
                self._groups.move_to_end(group)
            else:
                self._groups[group] = self._read(group, _COLUMNS).to_pylist()
                if len(self._groups) > _CACHED_GROUPS:
                    self._groups.popitem(last=False)
            return self._groups[group]
