"""What the indexes in vector databases share: they hold a datastore's keys, under its chunk ids."""

from __future__ import annotations

import re
from typing import Any, ClassVar

import numpy as np
from transformers.utils import logging

from ..arguments import shown, whole
from ..datastore.compatibility import check_datastore
from ..datastore.search_excluding import checked_search
from ..datastore.store import RetroDatastore
from ..errors import DatastoreInputError, DatastoreMismatchError


logger = logging.get_logger(__name__)

_COMPARED = 64


class FilledIndex:
    """A [`VectorIndex`] over a table of a vector database.

    Args:
        datastore ([`RetroDatastore`]): whose keys are searched. Tokens and texts still come from it.
        table (`str`): name of the table. If it does not exist, it is made and filled. If it does, it is used as it is, and gets the
            chunks that it lacks, so that a filling that was interrupted goes on.
        batch_size (`int`, defaults to 1024): chunks that are written at once.

    Attributes:
        num_chunks (`int`): chunks in the table.
    Raises:
        DatastoreInputError: for a name that no table of the database can have.
        DatastoreMismatchError: if the table has keys of other chunks, as after `compact`.
    """

    _name: ClassVar[re.Pattern[str]]  # of a table
    _rule: ClassVar[str]  # the same in words

    def __init__(self, datastore: RetroDatastore, table: str, batch_size: int = 1024) -> None:
        check_datastore(datastore)
        if not isinstance(table, str) or not self._name.fullmatch(table):
            raise DatastoreInputError(f"The name of the table is {shown(table)}. Pass a text of {self._rule}.")
        self.datastore, self.table = datastore, table
        self.batch_size = whole("batch_size", batch_size, DatastoreInputError)
        self.refresh()

    def refresh(self) -> None:
        """Add the chunks that the datastore has and the table lacks; for after `append`, `sync` or `refresh` of the datastore."""
        store, held = self.datastore.snapshot(), self._count()
        compared = np.unique(np.linspace(0, held - 1, min(held, _COMPARED)).astype(np.int64))
        if held > store.num_chunks or not self._holds_keys_of(store, compared):
            raise DatastoreMismatchError(
                f"The table {self.table!r} has the keys of {held:,} chunks that are not those of {str(store.path)!r} (generation "
                f"{store.generation}). Delete the table, or give the index another name."
            )
        for start in range(held, store.num_chunks, self.batch_size):
            chunks = np.arange(start, min(start + self.batch_size, store.num_chunks))
            self._add(chunks, store.document_of(chunks), store.keys_of(chunks))
        self.num_chunks = store.num_chunks
        self.manifest = store.manifest  # by which a searcher sees that chunk ids have changed

    def _other_table(self) -> DatastoreMismatchError:
        """The error for a table that was made for something else."""
        return DatastoreMismatchError(
            f"The table {self.table!r} is not one of keys of {self.datastore.manifest.dim} numbers that are compared by their inner "
            "product. Give the index another name."
        )

    def search(
        self, queries: np.ndarray, num_neighbors: int, *, exclude_documents: Any = None
    ) -> tuple[np.ndarray, np.ndarray]:
        """The nearest chunks of each query; see [`RetroDatastore.search`]. Deleted documents are left out."""
        queries, excluded = checked_search(self.manifest, queries, num_neighbors, exclude_documents)
        if self.datastore.num_chunks > self.num_chunks:
            logger.warning_once(
                f"The table {self.table!r} lacks {self.datastore.num_chunks - self.num_chunks:,} chunks of the datastore, which are not "
                "found. Call `refresh()` of the index."
            )
        deleted = self.datastore.deleted_documents
        scores = np.full((len(queries), num_neighbors), -np.inf, dtype=np.float32)
        chunks = np.full((len(queries), num_neighbors), -1, dtype=np.int64)
        for row, query in enumerate(queries):
            hidden = deleted if excluded is None else np.union1d(deleted, excluded[row])
            found = self._nearest(query, num_neighbors, hidden[hidden >= 0].tolist())
            for column, (chunk, score) in enumerate(found):
                chunks[row, column], scores[row, column] = chunk, score
        return scores, chunks

    def _holds_keys_of(self, store: RetroDatastore, chunks: np.ndarray) -> bool:
        """Whether the table has the keys of a datastore for these chunks (int64, sorted)."""
        found, none = self._keys(chunks.tolist()) if len(chunks) else {}, [0.0] * store.manifest.dim
        keys = np.array([found.get(chunk, none) for chunk in chunks.tolist()], dtype=np.float32).reshape(-1, len(none))
        # Databases keep float32, so only the order of sums differs.
        return np.allclose(keys, store.keys_of(chunks), atol=1e-4)

    def _count(self) -> int:
        """The number of rows, after the table has been made if it was not there."""
        raise NotImplementedError

    def _keys(self, chunks: list[int]) -> dict[int, list[float]]:
        """The stored vectors by chunk id, of at least one chunk; those that are not there are left out."""
        raise NotImplementedError

    def _add(self, chunks: np.ndarray, documents: np.ndarray, keys: np.ndarray) -> None:
        raise NotImplementedError

    def _nearest(self, query: np.ndarray, number: int, hidden: list[int]) -> list[tuple[int, float]]:
        """Chunk ids and inner products, best first, without the chunks of hidden documents."""
        raise NotImplementedError
