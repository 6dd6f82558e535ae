"""How much of a text its neighbors have word for word: runs of common tokens."""

from __future__ import annotations

import numpy as np


__all__ = ["common_runs", "overlaps"]

# Cells of (chunk, neighbor, token) compared at once.
_MAX_CELLS = 1 << 20
_NO_TOKEN, _NO_NEIGHBOR = -1, -2


def common_runs(
    rows: np.ndarray, neighbors: np.ndarray, neighbor_mask: np.ndarray, row_mask: np.ndarray | None = None
) -> np.ndarray:
    """For each token the length of the longest run of tokens ending with it that one of its row's neighbors has, too.

    0 for a token that no neighbor has; the largest value of a row is the length of the longest common substring of
    tokens, s in section 2.6 of Borgeaud et al. (2022).

    Args:
        rows (`np.ndarray` of int64 and shape `(num_rows, num_tokens)`): token ids.
        neighbors, neighbor_mask (`np.ndarray` of shape `(num_rows, num_neighbors, neighbor_size)`): token ids, and 0 at
            padding. A run lies in one neighbor.
        row_mask (`np.ndarray` of shape `(num_rows, num_tokens)`, *optional*): 0 at padding, where the result is 0.
    Returns:
        `np.ndarray` of int32 and shape `(num_rows, num_tokens)`.
    """
    found = np.where(neighbor_mask, neighbors, _NO_NEIGHBOR)
    tokens = rows if row_mask is None else np.where(row_mask, rows, _NO_TOKEN)
    result = np.zeros(rows.shape, dtype=np.int32)
    num_blocks = -(-found.size // _MAX_CELLS)
    for block in np.array_split(np.arange(len(rows)), num_blocks) if num_blocks else []:
        there = found[block]
        runs = np.zeros((*there.shape[:2], there.shape[2] + 1), dtype=np.int32)
        for column in range(rows.shape[1]):
            # The run that ends one token earlier on both sides, longer by one where the tokens agree.
            runs[:, :, 1:] = (runs[:, :, :-1] + 1) * (there == tokens[block, column, None, None])
            result[block, column] = runs.max(axis=(1, 2))
    return result


def overlaps(rows: np.ndarray, row_mask: np.ndarray, neighbors: np.ndarray, neighbor_mask: np.ndarray) -> np.ndarray:
    """r(C) of section 2.6: the longest common substring with the neighbors, as a share of the chunk's tokens.

    Args:
        rows, row_mask (`np.ndarray` of shape `(num_chunks, chunk_size)`): token ids of chunks, and 0 at the padding of
            short ones.
        neighbors, neighbor_mask: as for [`common_runs`].
    Returns:
        `np.ndarray` of float64 and shape `(num_chunks,)`, from 0 to 1.
    """
    longest = common_runs(rows, neighbors, neighbor_mask, row_mask).max(axis=1, initial=0)
    return longest / np.maximum(row_mask.sum(axis=1), 1)
