"""Search that leaves out documents: fetch more than is wanted, drop what is excluded, repeat for rows cut short."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..errors import DatastoreInputError
from .chunks import document_of


__all__ = ["Deleted", "checked_exclusion", "search_excluding"]

# Results fetched beyond the wanted ones, so that a few excluded ones rarely cost a second search. An index that re-scores
# reads one vector more from the disk cache for each.
_OVER_FETCH = 8

# Results held at once, over all queries: 12 bytes each.
_MAX_RESULTS = 1 << 24

Search = Callable[[np.ndarray, int, int], tuple[np.ndarray, np.ndarray]]


@dataclass(frozen=True)
class Deleted:
    """Documents that no query may see: a bool per document, and how many chunks they have together."""

    mask: np.ndarray
    num_chunks: int


def checked_exclusion(documents: Any, num_queries: int, num_documents: int) -> np.ndarray:
    """Excluded document numbers as int64 of shape `(num_queries, any)`, -1 for none.

    Raises:
        DatastoreInputError: for another shape, another type, or documents that the store does not have.
    """
    excluded = np.asarray(documents)
    shape = excluded.shape
    if excluded.ndim == 1:
        excluded = excluded[:, None]
    if excluded.ndim != 2 or len(excluded) != num_queries or not np.issubdtype(excluded.dtype, np.integer):
        raise DatastoreInputError(
            f"exclude_documents is of type {excluded.dtype} and shape {shape}, but integers of shape ({num_queries},) "
            f"or ({num_queries}, any) are expected."
        )
    if excluded.size and (excluded.min() < -1 or excluded.max() >= num_documents):
        raise DatastoreInputError(
            f"exclude_documents runs from {excluded.min()} to {excluded.max()}, but the store has documents 0 to "
            f"{num_documents - 1} (-1 for none)."
        )
    return excluded.astype(np.int64)


def search_excluding(
    search: Search,
    queries: np.ndarray,
    num_neighbors: int,
    excluded: np.ndarray,
    doc_offsets: np.ndarray,
    max_effort: int,
    deleted: Deleted | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """The nearest chunks that are not in a query's excluded documents.

    One batched search over all queries and a vectorized filter, repeated for the rows that come out short: with four
    times the results where there were more, with four times the effort where the index had read too little. Several
    times the speed of a selector per query, which would forbid batches.

    Args:
        search (`Callable`): `(queries, num_results, effort) -> (scores, chunk_ids)`; a larger effort reads more of an
            approximate index.
        queries (`np.ndarray` of float32 and shape `(num_queries, dim)`): unit vectors.
        num_neighbors (`int`): results wanted per query.
        excluded (`np.ndarray` of int64 and shape `(num_queries, any)`): document numbers, -1 for none.
        doc_offsets (`np.ndarray` of int64 and shape `(num_documents + 1,)`): first chunk of each document.
        max_effort (`int`): the effort at which the index is read as a whole.
        deleted ([`Deleted`], *optional*): documents that no query may get.
    Returns:
        `(scores, chunk_ids)` of shape `(num_queries, num_neighbors)`; -inf and -1 where the store has no more.
    """
    scores = np.full((len(queries), num_neighbors), -np.inf, dtype=np.float32)
    ids = np.full((len(queries), num_neighbors), -1, dtype=np.int64)
    num_chunks = int(doc_offsets[-1])
    # A document named twice counts once: sort each row, and drop repetitions.
    excluded = np.sort(excluded, axis=1)
    excluded[:, 1:][excluded[:, 1:] == excluded[:, :-1]] = -1
    named = np.maximum(excluded, 0)
    counted = excluded >= 0
    if deleted is not None:
        # A deleted document is hidden already, and counts once.
        counted &= ~deleted.mask[named]
    sizes = ((doc_offsets[named + 1] - doc_offsets[named]) * counted).sum(axis=1)
    sizes += 0 if deleted is None else deleted.num_chunks
    # What a query can get at most, and the number of results that surely holds it.
    obtainable = np.minimum(num_neighbors, num_chunks - sizes)
    enough = np.minimum(num_neighbors + sizes, num_chunks)

    todo = [(np.arange(len(queries)), num_neighbors + _OVER_FETCH, 1)]
    while todo:
        short, fetch, effort = todo.pop()
        if not len(short):
            continue
        fetch = min(fetch, int(enough[short].max()))
        cut, exhausted = [], []
        for rows in np.array_split(short, max(1, -(-len(short) * fetch // _MAX_RESULTS))):
            found_scores, found = search(queries[rows], fetch, effort)
            owner = document_of(found, doc_offsets)
            kept = (found >= 0) & (owner[:, :, None] != excluded[rows, None, :]).all(axis=-1)
            if deleted is not None:
                kept &= ~deleted.mask[owner]
            order = np.argsort(~kept, axis=1, kind="stable")[:, :num_neighbors]
            kept = np.take_along_axis(kept, order, axis=1)
            columns = slice(0, order.shape[1])
            ids[rows, columns] = np.where(kept, np.take_along_axis(found, order, axis=1), -1)
            scores[rows, columns] = np.where(kept, np.take_along_axis(found_scores, order, axis=1), -np.inf)
            found_few = (ids[rows] >= 0).sum(axis=1) < obtainable[rows]
            found_all = (found >= 0).all(axis=1)
            cut.append(rows[found_few & found_all & (fetch < enough[rows])])
            exhausted.append(rows[found_few & ~found_all])
        todo.append((np.concatenate(cut), 4 * fetch, effort))
        if effort < max_effort:
            todo.append((np.concatenate(exhausted), fetch, 4 * effort))
    return scores, ids
