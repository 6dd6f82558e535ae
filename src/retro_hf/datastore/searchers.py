"""Which chunks belong to a text: found by its vector, by its words ([`LexicalSearcher`]), or by both."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from .. import arguments
from ..errors import DatastoreInputError, DatastoreMismatchError, RetrieverError
from .compatibility import check_datastore
from .search_excluding import checked_search


if TYPE_CHECKING:
    from .embedder import ChunkEmbedder
    from .store import RetroDatastore

# Cormack et al. (2009) found 60 by experiment and call the choice not critical.
_RANK_OFFSET = 60
_FUSED_RESULTS = 100


class Searcher(Protocol):
    """Texts in, chunk ids out: what a [`RetroRetriever`] asks for the neighbors of a chunk's text."""

    metric: str
    """What a score is, for the trace; a bigger score is always nearer."""

    def search(
        self, texts: Sequence[str], num_neighbors: int, *, exclude_documents: Any = None
    ) -> tuple[np.ndarray, np.ndarray]:
        """The nearest chunks of each text, best first.

        Args:
            texts (`Sequence[str]`): queries.
            num_neighbors (`int`): chunks per query.
            exclude_documents (`np.ndarray` of integers and shape `(num_queries,)` or `(num_queries, any)`,
                *optional*): document numbers whose chunks a query must not get, -1 for none.
        Returns:
            `(scores, chunk_ids)` of shape `(num_queries, num_neighbors)`, float32 and int64; -inf and -1 for none.
            Chunks of deleted documents are never among them.
        """


class VectorIndex(Protocol):
    """Unit vectors in, chunk ids out: [`RetroDatastore`] itself, or a vector database with the store's keys."""

    def search(
        self, queries: np.ndarray, num_neighbors: int, *, exclude_documents: Any = None
    ) -> tuple[np.ndarray, np.ndarray]:
        """The nearest chunks of each query (float32, `(num_queries, dim)`); see [`RetroDatastore.search`]."""


class RestrictedIndex:
    """Finds only the chunks of some documents, under the numbers that they have in the datastore: a [`VectorIndex`].

    It finds what a [`subset`] of these documents would find, as exactly as the datastore's own index searches.

    Args:
        datastore ([`RetroDatastore`]): with all documents.
        documents (`np.ndarray` of bool and shape `(num_documents,)`): those that may be found, unless deleted.
    """

    def __init__(self, datastore: RetroDatastore, documents: np.ndarray) -> None:
        shape = documents.shape if isinstance(documents, np.ndarray) and documents.dtype.kind == "b" else None
        if shape != (datastore.num_documents,):
            raise DatastoreInputError(
                f"The documents are {arguments.shown(documents)}. Pass an array of bools of shape ({datastore.num_documents},)."
            )
        self._opened = datastore._opened.without(np.flatnonzero(~documents))
        found = np.setdiff1d(np.arange(datastore.num_documents), self._opened.deleted)
        self.num_documents = len(found)
        self.num_chunks = int((datastore.first_chunks(found + 1) - datastore.first_chunks(found)).sum())

    def search(
        self, queries: np.ndarray, num_neighbors: int, *, exclude_documents: Any = None
    ) -> tuple[np.ndarray, np.ndarray]:
        """The nearest chunks of each query; see [`RetroDatastore.search`]."""
        queries, excluded = checked_search(self._opened.manifest, queries, num_neighbors, exclude_documents)
        return self._opened.search(queries, num_neighbors, excluded)


def _check_searches(name: str, given: Any) -> None:
    if not callable(getattr(given, "search", None)):
        raise RetrieverError(f"The {name} is of type {type(given).__name__}, which has no method `search`.")


class EmbeddingSearcher:
    """Finds chunks by the vector of a text, as the paper does.

    Args:
        datastore ([`RetroDatastore`]): whose chunks are found.
        embedder ([`ChunkEmbedder`]): the encoder that made the datastore's keys, and makes the queries.
        index ([`VectorIndex`], *optional*): where to search instead of in the datastore's own index; it holds the keys
            of the same chunks (`datastore.keys_of`) under the same ids.

    Raises:
        DatastoreMismatchError: if the embedder is not the datastore's.
    """

    metric = "inner_product"

    def __init__(self, datastore: RetroDatastore, embedder: ChunkEmbedder, index: VectorIndex | None = None) -> None:
        check_datastore(datastore)
        datastore.check_compatible(embedder=embedder)
        self.datastore = datastore
        self.embedder = embedder
        self.index: VectorIndex = datastore if index is None else index
        _check_searches("index", self.index)

    def over(self, datastore: RetroDatastore) -> EmbeddingSearcher:
        """The same searcher over a snapshot of its datastore."""
        check_datastore(datastore)
        searcher = copy.copy(self)
        searcher.datastore = datastore
        searcher.index = datastore if self.index is self.datastore else self.index
        return searcher

    def search(
        self, texts: Sequence[str], num_neighbors: int, *, exclude_documents: Any = None
    ) -> tuple[np.ndarray, np.ndarray]:
        """See [`Searcher.search`]; a score is the inner product of two unit vectors."""
        queries = self.embedder.embed_queries(texts)
        return self.search_vectors(queries, num_neighbors, exclude_documents=exclude_documents)

    def search_vectors(
        self, queries: np.ndarray, num_neighbors: int, *, exclude_documents: Any = None
    ) -> tuple[np.ndarray, np.ndarray]:
        """The nearest chunks of the vectors of queries (float32, `(num_queries, dim)`).

        Raises:
            RetrieverError: if another index than the datastore's own returns arrays of another shape.
        """
        scores, ids = self.index.search(queries, num_neighbors, exclude_documents=exclude_documents)
        if self.index is self.datastore:
            return scores, ids
        expected = (len(queries), num_neighbors)
        if np.shape(scores) != expected or np.shape(ids) != expected:
            raise RetrieverError(
                f"{type(self.index).__name__}.search returned scores of shape {np.shape(scores)} and chunk ids of shape "
                f"{np.shape(ids)}. It must return the shape {expected} for both, filled with -inf and -1."
            )
        # A cluster that searches shards which the datastore no longer has would return ids of other text.
        shards = [entry.name for entry in getattr(getattr(self.index, "manifest", None), "shards", ())]
        if shards != [entry.name for entry in self.datastore.manifest.shards][: len(shards)]:
            raise DatastoreMismatchError(
                f"{type(self.index).__name__} searches other shards than those of {str(self.datastore.path)!r} (generation "
                f"{self.datastore.generation}). Call `refresh()` of both, and search again."
            )
        # Another index does not know which documents were deleted since it was filled.
        hidden = np.isin(self.datastore.document_of(ids), np.append(self.datastore.deleted_documents, -1))
        return np.where(hidden, -np.inf, scores).astype(np.float32), np.where(hidden, -1, ids).astype(np.int64)

    def __repr__(self) -> str:
        return f"EmbeddingSearcher({self.embedder!r}, index={type(self.index).__name__})"


class HybridSearcher:
    """Finds chunks by two searchers and fuses their ranks (reciprocal rank fusion, Cormack et al., 2009).

    A chunk's score is the sum of `1 / (60 + rank)` over the searchers that have it among their best 100, with ranks
    from 1. If scores are equal, the first searcher decides.

    Args:
        dense ([`Searcher`]): such as [`EmbeddingSearcher`].
        lexical ([`Searcher`]): such as [`LexicalSearcher`].

    Raises:
        RetrieverError: if they find the chunks of different datastores.
    """

    metric = "reciprocal_rank_fusion"

    def __init__(self, dense: Searcher, lexical: Searcher) -> None:
        _check_searches("first searcher", dense)
        _check_searches("second searcher", lexical)
        stores: list[Any] = [one.datastore for one in (dense, lexical) if hasattr(one, "datastore")]
        if len(stores) == 2 and stores[0].path.resolve() != stores[1].path.resolve():
            raise RetrieverError(
                f"One searcher finds chunks of {str(stores[0].path)!r}, the other of {str(stores[1].path)!r}. Make both for the "
                "same datastore."
            )
        self.dense = dense
        self.lexical = lexical
        if stores:
            self.datastore = stores[0]

    def over(self, datastore: RetroDatastore) -> HybridSearcher:
        """The same searcher over a snapshot of its datastore."""
        parts = (one.over(datastore) if hasattr(one, "over") else one for one in (self.dense, self.lexical))
        return HybridSearcher(*parts)

    def search(
        self, texts: Sequence[str], num_neighbors: int, *, exclude_documents: Any = None
    ) -> tuple[np.ndarray, np.ndarray]:
        """See [`Searcher.search`]."""
        num_neighbors = arguments.whole("num_neighbors", num_neighbors, DatastoreInputError)
        fetched = max(num_neighbors, _FUSED_RESULTS)
        both = [
            searcher.search(texts, fetched, exclude_documents=exclude_documents)[1]
            for searcher in (self.dense, self.lexical)
        ]
        ids = np.concatenate(both, axis=1)
        shares = np.tile(1 / (_RANK_OFFSET + 1 + np.arange(fetched)), 2) * (ids >= 0)
        # A chunk that both searchers found gets the sum at its first place, and zero at its second.
        places = (np.arange(len(ids))[:, None] * (ids.max(initial=0) + 2) + ids).reshape(-1)
        _, first, inverse = np.unique(places, return_index=True, return_inverse=True)
        scores = np.zeros(ids.shape)
        scores.flat[first] = np.bincount(inverse, weights=shares.reshape(-1), minlength=len(first))
        order = np.argsort(-scores, axis=1, kind="stable")[:, :num_neighbors]
        scores = np.take_along_axis(scores, order, axis=1)
        ids = np.where(scores > 0, np.take_along_axis(ids, order, axis=1), -1)
        return np.where(ids < 0, -np.inf, scores).astype(np.float32), ids

    def __repr__(self) -> str:
        return f"HybridSearcher({self.dense!r}, {self.lexical!r})"
