"""Which of the chunks that a search finds are kept: no copies of each other, and none below a score."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np

from .search_excluding import best_kept


if TYPE_CHECKING:
    from .store import RetroDatastore

# Results of one query that are looked through at most.
_MOST_RESULTS = 1024

Keep = Callable[[np.ndarray, np.ndarray, np.ndarray], np.ndarray]
"""`keep(rows (n,), tokens (n, k, R), chunk_ids (n, k)) -> bool (n, k)`: which results of the queries `rows` may stay."""


def distinct_texts(tokens: np.ndarray) -> np.ndarray:
    """Which neighbors have other tokens than those before them in their row.

    Args:
        tokens (`np.ndarray` of int64 and shape `(n, k, R)`): neighbors, -1 at padding.
    Returns:
        `np.ndarray` of bool and shape `(n, k)`.
    """
    # One number per neighbor instead of R comparisons per pair. Odd multipliers are invertible modulo 2^64, so neighbors that
    # differ in one token never collide, and others with a probability near 2^-64.
    multipliers = np.random.default_rng(0).integers(1 << 63, size=tokens.shape[-1], dtype=np.uint64) | np.uint64(1)
    hashes = (tokens.astype(np.uint64) * multipliers).sum(axis=-1, dtype=np.uint64)
    same = hashes[:, :, None] == hashes[:, None, :]
    return ~np.tril(same, -1).any(axis=-1)


def select(
    datastore: RetroDatastore,
    search: Callable[[np.ndarray, int], tuple[np.ndarray, np.ndarray]],
    num_queries: int,
    num_neighbors: int,
    *,
    min_score: float | None = None,
    keep: Keep | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """The best results that are kept, for every query.

    A neighbor with the same tokens as a better one tells nothing new and is left out; the next best takes its place. For
    queries that end up with too few, four times as many results are looked through, up to 1,024.

    Args:
        datastore ([`RetroDatastore`]): whose chunks are found.
        search (`Callable`): `(rows, count) -> (scores, chunk_ids)`, both of shape `(len(rows), count)`, best first.
        num_queries, num_neighbors (`int`): how many, and how many results for each.
        min_score (`float`, *optional*): results below it are left out.
        keep (`Callable`, *optional*): see [`Keep`].
    Returns:
        `(scores, chunk_ids)` of shape `(num_queries, num_neighbors)`, float32 and int64; -inf and -1 for none.
    """
    scores = np.full((num_queries, num_neighbors), -np.inf, dtype=np.float32)
    ids = np.full((num_queries, num_neighbors), -1, dtype=np.int64)
    rows, count, limit = np.arange(num_queries), num_neighbors, min(datastore.num_chunks, _MOST_RESULTS)
    # Each round searches the remaining queries again from the start: an index has no way to continue a search.
    while len(rows):
        found_scores, found = search(rows, count)
        good = found >= 0 if min_score is None else (found >= 0) & (found_scores >= min_score)
        tokens, mask = datastore.gather(np.where(good, found, -1))
        tokens = np.where(mask == 0, -1, tokens)
        kept = good & distinct_texts(tokens)
        if keep is not None:
            kept &= keep(rows, tokens, found)
        scores[rows], ids[rows] = best_kept(kept, found_scores, found, num_neighbors)
        # Where everything that was found is good, there may be more.
        rows = rows[(kept.sum(axis=1) < num_neighbors) & good.all(axis=1)]
        if count >= limit:
            break
        count = min(4 * count, limit)
    return scores, ids
