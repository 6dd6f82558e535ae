"""Searching vectors: checked arguments, results without excluded or deleted documents, and the merge of several searches."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np

from .. import arguments
from ..errors import DatastoreInputError, counted
from ..model.values_retro import MOST_NUMBERS
from .chunks import document_of
from .manifest import DatastoreManifest


# A store with fewer chunks than this may still be asked for as many neighbors; missing ones are filled with -1.
_FILLED_NEIGHBORS = 1 << 16
# Results fetched beyond the wanted ones, so that a few excluded ones rarely cost a second search. An index that re-scores
# reads one more vector from the disk cache for each.
_OVER_FETCH = 8
# Results held at once, over all queries, at 12 bytes each.
_MAX_RESULTS = 1 << 24


class Deleted(NamedTuple):
    """The deleted documents of a shard: a bool per document, and the number of their chunks."""

    mask: np.ndarray
    num_chunks: int


def checked_search(
    manifest: DatastoreManifest, queries: Any, num_neighbors: int, exclude_documents: Any
) -> tuple[np.ndarray, np.ndarray | None]:
    """The arguments of [`RetroDatastore.search`]: queries as float32, excluded documents as int64 `(num_queries, any)`.

    Raises:
        DatastoreInputError: for arguments that do not fit the store.
    """
    dim = manifest.dim
    try:
        if np.iscomplexobj(queries):  # numpy would leave the imaginary part out
            raise TypeError("complex numbers")
        if np.size(queries) > MOST_NUMBERS:
            raise ValueError(f"{np.size(queries):,} numbers")
        queries = np.ascontiguousarray(queries, dtype=np.float32)
    # RuntimeError: a tensor with gradients, or elsewhere than in memory.
    except (TypeError, ValueError, OverflowError, RuntimeError) as error:
        raise DatastoreInputError(
            f"The queries are of type {type(queries).__name__}, and no array: {error}. Pass vectors of shape (num_queries, {dim}); to look up texts, use "
            "`RetroRetriever(datastore, embedder=...).find(texts)`."
        ) from error
    if queries.ndim != 2 or queries.shape[1] != dim or not np.isfinite(queries).all():
        what = "values that are not finite" if queries.shape[1:] == (dim,) else f"shape {queries.shape}"
        raise DatastoreInputError(f"The queries have {what}. Pass finite vectors of shape (num_queries, {dim}).")
    check_num_neighbors(num_neighbors, manifest.num_chunks)
    if exclude_documents is None:
        return queries, None
    return queries, checked_exclusion(exclude_documents, len(queries), manifest.num_documents)


def check_num_neighbors(num_neighbors: int, num_chunks: int) -> None:
    """Raise DatastoreInputError for what is no number, a number below 1, or one far above the chunks of the store."""
    if not arguments.whole("num_neighbors", num_neighbors, DatastoreInputError) <= max(num_chunks, _FILLED_NEIGHBORS):
        raise DatastoreInputError(
            f"num_neighbors is {num_neighbors:,}, but the store has {counted(num_chunks, 'chunk')}. Pass a number from 1 to that."
        )


def checked_exclusion(documents: Any, num_queries: int, num_documents: int) -> np.ndarray:
    """Excluded document numbers as int64 of shape `(num_queries, any)`, -1 for none.

    Raises:
        DatastoreInputError: for another shape or type, or for documents that the store does not have.
    """
    excluded = arguments.numbers(
        "The numbers in exclude_documents", documents, DatastoreInputError, -1, num_documents - 1
    )
    shape = excluded.shape
    if excluded.ndim == 1:
        excluded = excluded[:, None]
    if excluded.ndim != 2 or len(excluded) != num_queries:
        raise DatastoreInputError(
            f"exclude_documents has the shape {shape}. Pass integers of shape ({num_queries},) or ({num_queries}, any)."
        )
    return excluded


def search_excluding(
    search: Callable[[np.ndarray, int, int], tuple[np.ndarray, np.ndarray]],
    queries: np.ndarray,
    num_neighbors: int,
    excluded: np.ndarray,
    doc_offsets: np.ndarray,
    max_effort: int,
    deleted: Deleted | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """The nearest chunks that are not in a query's excluded documents.

    All queries are searched in one batch for more results than wanted, and excluded ones are dropped. Queries that end up
    with too few are searched again: for four times the results if there were more, or with four times the effort if the
    index had read too little. This is several times faster than a FAISS selector per query, which would forbid batches.

    Args:
        search (`Callable`): `(queries, num_results, effort) -> (scores, chunk_ids)`; a larger effort reads more of an
            approximate index.
        queries (`np.ndarray` of float32 and shape `(num_queries, dim)`): unit vectors.
        num_neighbors (`int`): results wanted per query.
        excluded (`np.ndarray` of int64 and shape `(num_queries, any)`): document numbers, -1 for none.
        doc_offsets (`np.ndarray` of int64 and shape `(num_documents + 1,)`): first chunk of each document.
        max_effort (`int`): the effort at which the whole index is read.
        deleted ([`Deleted`], *optional*): documents that no query may get.
    Returns:
        `(scores, chunk_ids)` of shape `(num_queries, num_neighbors)`; -inf and -1 where the store has no more.
    """
    scores = np.full((len(queries), num_neighbors), -np.inf, dtype=np.float32)
    ids = np.full((len(queries), num_neighbors), -1, dtype=np.int64)
    num_chunks = int(doc_offsets[-1])
    # A document that is excluded twice, or deleted as well, counts once.
    excluded = np.sort(excluded, axis=1)
    excluded[:, 1:][excluded[:, 1:] == excluded[:, :-1]] = -1
    named = np.maximum(excluded, 0)
    counts = excluded >= 0
    if deleted is not None:
        counts &= ~deleted.mask[named]
    hidden = ((doc_offsets[named + 1] - doc_offsets[named]) * counts).sum(axis=1)
    hidden += 0 if deleted is None else deleted.num_chunks
    # The most that a query can get, and how many results are sure to contain that: in the worst case, all hidden chunks are
    # nearer than the first chunk that may be returned.
    obtainable = np.minimum(num_neighbors, num_chunks - hidden)
    enough = np.minimum(num_neighbors + hidden, num_chunks)

    # Nearly all queries are done after the first round. Those with too few results are of two kinds. Where the index found as
    # many as it was asked for, but some were hidden, more results help. Where it found fewer, it must read more.
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
            columns = slice(0, min(num_neighbors, found.shape[1]))
            scores[rows, columns], ids[rows, columns] = best_kept(kept, found_scores, found, num_neighbors)
            found_few = (ids[rows] >= 0).sum(axis=1) < obtainable[rows]
            found_all = (found >= 0).all(axis=1)
            cut.append(rows[found_few & found_all & (fetch < enough[rows])])
            exhausted.append(rows[found_few & ~found_all])
        todo.append((np.concatenate(cut), 4 * fetch, effort))
        if effort < max_effort:
            todo.append((np.concatenate(exhausted), fetch, 4 * effort))
    return scores, ids


def best_kept(kept: np.ndarray, scores: np.ndarray, ids: np.ndarray, count: int) -> tuple[np.ndarray, np.ndarray]:
    """The first `count` results of each query that are kept, in order, then -inf and -1.

    Args:
        kept, scores, ids (`np.ndarray` of bool, float32 and int64, and shape `(num_queries, num_results)`): best first.
    """
    # A stable sort moves the kept results to the front and leaves them in order.
    order = np.argsort(~kept, axis=1, kind="stable")[:, :count]
    kept, scores, ids = (np.take_along_axis(values, order, axis=1) for values in (kept, scores, ids))
    return np.where(kept, scores, -np.inf), np.where(kept, ids, -1)


def merge_results(parts: Sequence[tuple[np.ndarray, np.ndarray]]) -> tuple[np.ndarray, np.ndarray]:
    """The best of several searches for the same queries.

    Args:
        parts: scores and ids of each search, both of shape `(num_queries, num_neighbors)`.
    Returns:
        Scores and ids of the same shape; the first search wins ties.
    """
    if len(parts) == 1:
        return parts[0]
    scores, ids = (np.concatenate(arrays, axis=1) for arrays in zip(*parts, strict=True))
    order = np.argsort(-scores, axis=1, kind="stable")[:, : parts[0][0].shape[1]]
    return np.take_along_axis(scores, order, axis=1), np.take_along_axis(ids, order, axis=1)
