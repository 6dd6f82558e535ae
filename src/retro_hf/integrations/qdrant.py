"""The keys of a datastore in Qdrant."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

import numpy as np

from .. import extras
from ..errors import DatastoreInputError
from .vectors import FilledIndex


if TYPE_CHECKING:
    from ..datastore.store import RetroDatastore


class QdrantIndex(FilledIndex):
    """Lets Qdrant find the nearest chunks of a datastore: a [`VectorIndex`] for [`EmbeddingSearcher`].

    Args:
        client (`qdrant_client.QdrantClient`): a server (`url=...`), a folder (`path=...`), or this process (`":memory:"`).
        datastore, table, batch_size: as in [`FilledIndex`]; Qdrant calls a table a collection.
    Raises:
        DatastoreInputError: for a name that no collection can have.
        DatastoreMismatchError: if the collection has keys of other chunks.
    """

    _name = re.compile(r"(?!\.{1,2}$)[^\x00-\x1f<>:\"/\\|?*\ud800-\udfff]{1,255}")
    _rule = '1 to 255 characters without control characters and < > : " / \\ | ? *'

    def __init__(
        self, client: Any, datastore: RetroDatastore, table: str = "chunks", *, batch_size: int = 1024
    ) -> None:
        self.client = client
        self._models = extras.load("qdrant_client.models", "QdrantIndex")
        super().__init__(datastore, table, batch_size)

    def _count(self) -> int:
        if not hasattr(self.client, "collection_exists"):
            raise DatastoreInputError(
                f"The client is of type {type(self.client).__name__}. Pass a `qdrant_client.QdrantClient`."
            )
        vectors = self._models.VectorParams(size=self.datastore.manifest.dim, distance=self._models.Distance.DOT)
        if not self.client.collection_exists(self.table):
            self.client.create_collection(self.table, vectors_config=vectors)
        found = self.client.get_collection(self.table).config.params.vectors
        if not isinstance(found, type(vectors)) or (found.size, found.distance) != (vectors.size, vectors.distance):
            raise self._other_table()
        return int(self.client.count(self.table, exact=True).count)

    def _keys(self, chunks: list[int]) -> dict[int, list[float]]:
        points = self.client.retrieve(self.table, chunks, with_vectors=True, with_payload=False)
        return {point.id: point.vector for point in points}

    def _add(self, chunks: np.ndarray, documents: np.ndarray, keys: np.ndarray) -> None:
        payloads = [{"document": number} for number in documents.tolist()]
        batch = self._models.Batch(ids=chunks.tolist(), vectors=keys.tolist(), payloads=payloads)
        self.client.upsert(self.table, batch, wait=True)

    def _nearest(self, query: np.ndarray, number: int, hidden: list[int]) -> list[tuple[int, float]]:
        of_hidden = self._models.FieldCondition(key="document", match=self._models.MatchAny(any=hidden))
        without = self._models.Filter(must_not=[of_hidden]) if hidden else None
        found = self.client.query_points(
            self.table, query.tolist(), limit=number, query_filter=without, with_payload=False
        )
        return [(point.id, point.score) for point in found.points]
