"""The documents of a datastore, read back one by one from parquet."""

from __future__ import annotations

import json
import threading
from collections import OrderedDict
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from ..errors import DatastoreCorruptError


__all__ = ["DocumentTable"]

_COLUMNS = ("id", "title", "source", "text", "metadata")
_CACHED_GROUPS = 4


class DocumentTable:
    """Random access to a parquet file of documents, by row groups of at most 512 documents, the last few kept.

    Raises:
        DatastoreCorruptError: if the file is not a parquet file of `num_documents` documents.
    """

    def __init__(self, path: Path, num_documents: int) -> None:
        self._path = path
        self._lock = threading.Lock()
        self._groups: OrderedDict[int, list[dict[str, Any]]] = OrderedDict()
        try:
            self._file = pq.ParquetFile(path, memory_map=True)
            metadata = self._file.metadata
            rows = [metadata.row_group(group).num_rows for group in range(metadata.num_row_groups)]
            names = set(self._file.schema_arrow.names)
        except (OSError, pa.ArrowException) as error:
            raise self._damaged(str(error)) from error
        self._starts = np.cumsum([0, *rows])
        if self._starts[-1] != num_documents or not names.issuperset(_COLUMNS):
            raise self._damaged(
                f"it has {self._starts[-1]} rows with the columns {sorted(names)}, but {num_documents} documents with "
                f"{list(_COLUMNS)} are expected"
            )

    def document(self, number: int) -> dict[str, Any]:
        """The document at a position; fields beyond the four come back as they were given."""
        group = int(np.searchsorted(self._starts, number, side="right") - 1)
        row = dict(self._group(group)[number - int(self._starts[group])])
        metadata = row.pop("metadata")
        try:
            return {**json.loads(metadata), **row} if metadata else row
        except (ValueError, TypeError) as error:
            raise self._damaged(f"the metadata of document {number} is not a JSON object") from error

    @cached_property
    def numbers(self) -> dict[str, int]:
        """Document numbers by id."""
        try:
            with self._lock:
                ids = self._file.read(columns=["id"]).column("id").to_pylist()
        except (OSError, pa.ArrowException) as error:
            raise self._damaged(str(error)) from error
        return {id: number for number, id in enumerate(ids)}

    def _group(self, group: int) -> list[dict[str, Any]]:
        with self._lock:
            if group in self._groups:
                self._groups.move_to_end(group)
            else:
                try:
                    # One small group: threads would cost more than they bring, and do not survive a fork.
                    table = self._file.read_row_group(group, columns=list(_COLUMNS), use_threads=False)
                    self._groups[group] = table.to_pylist()
                except (OSError, pa.ArrowException) as error:
                    raise self._damaged(str(error)) from error
                if len(self._groups) > _CACHED_GROUPS:
                    self._groups.popitem(last=False)
            return self._groups[group]

    def _damaged(self, reason: str) -> DatastoreCorruptError:
        return DatastoreCorruptError(
            f"{str(self._path)!r} is damaged: {reason}. Restore the folder from a copy, or build the datastore again."
        )
