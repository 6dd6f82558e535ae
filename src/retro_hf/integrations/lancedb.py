"""The keys of a datastore in LanceDB."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa

from .. import extras
from ..errors import DatastoreInputError
from .vectors import FilledIndex


if TYPE_CHECKING:
    from ..datastore.store import RetroDatastore


class LanceIndex(FilledIndex):
    """Lets LanceDB find the nearest chunks of a datastore: a [`VectorIndex`] for [`EmbeddingSearcher`].

    A table is searched exactly until it gets an index of LanceDB's own (`connection.open_table("chunks").create_index(...)`, with
    the metric "dot").

    Args:
        connection (`lancedb.DBConnection`): from `lancedb.connect(folder)`.
        datastore, table, batch_size: as in [`FilledIndex`].
    Raises:
        DatastoreInputError: for a name that no table can have.
        DatastoreMismatchError: if the table has keys of other chunks.
    """

    _name = re.compile(r"(?!\.{1,2}$)[A-Za-z0-9_.-]{1,200}")  # also that of a folder
    _rule = "1 to 200 letters without accents, digits, '_', '-' and '.'"

    def __init__(
        self, connection: Any, datastore: RetroDatastore, table: str = "chunks", *, batch_size: int = 8192
    ) -> None:
        extras.load("lancedb", "LanceIndex")
        self._connection = connection
        super().__init__(datastore, table, batch_size)

    def _count(self) -> int:
        self._schema = pa.schema(
            {"chunk": pa.int64(), "document": pa.int64(), "key": pa.list_(pa.float32(), self.datastore.manifest.dim)}
        )
        if not hasattr(self._connection, "create_table"):
            raise DatastoreInputError(
                f"The connection is of type {type(self._connection).__name__}. Pass that of `lancedb.connect(folder)`."
            )
        try:
            self._table = self._connection.create_table(self.table, schema=self._schema, exist_ok=True)
        except ValueError as error:  # it has another schema
            raise self._other_table() from error
        return int(self._table.count_rows())

    def _keys(self, chunks: list[int]) -> dict[int, list[float]]:
        rows = self._table.search().where(f"chunk IN ({_list(chunks)})").limit(len(chunks))
        return {row["chunk"]: row["key"] for row in rows.select(["chunk", "key"]).to_list()}

    def _add(self, chunks: np.ndarray, documents: np.ndarray, keys: np.ndarray) -> None:
        vectors = pa.FixedSizeListArray.from_arrays(pa.array(keys.reshape(-1)), keys.shape[1])
        self._table.add(pa.table([pa.array(chunks), pa.array(documents), vectors], schema=self._schema))

    def _nearest(self, query: np.ndarray, number: int, hidden: list[int]) -> list[tuple[int, float]]:
        search = self._table.search(query, vector_column_name="key").distance_type("dot").limit(number)
        if hidden:
            search = search.where(f"document NOT IN ({_list(hidden)})", prefilter=True)
        # LanceDB's distance is 1 minus the inner product.
        return [(row["chunk"], 1 - row["_distance"]) for row in search.select(["chunk", "_distance"]).to_list()]


def _list(numbers: list[int]) -> str:
    return ", ".join(map(str, numbers))
