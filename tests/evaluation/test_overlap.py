"""Runs of common tokens: against a transcription of the definition, token by token."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from retro_hf.evaluation.leakage import common_runs, overlaps


def run_by_hand(row: list[int], place: int, neighbors: list[list[int]]) -> int:
    """Length of the longest part of the row that ends at `place` and is also in a neighbor."""
    for length in range(place + 1, 0, -1):
        wanted = row[place + 1 - length : place + 1]
        if any(
            wanted == neighbor[start : start + length]
            for neighbor in neighbors
            for start in range(len(neighbor) - length + 1)
        ):
            return length
    return 0


def longest_by_hand(row: list[int], neighbors: list[list[int]]) -> int:
    """The longest common substring, by trying all of them."""
    substrings = {tuple(row[i:j]) for i in range(len(row)) for j in range(i + 1, len(row) + 1)}
    there = {tuple(n[i:j]) for n in neighbors for i in range(len(n)) for j in range(i + 1, len(n) + 1)}
    return max((len(one) for one in substrings & there), default=0)


def padded(rows: list[list[int]], width: int) -> tuple[np.ndarray, np.ndarray]:
    tokens, mask = np.zeros((len(rows), width), dtype=np.int64), np.zeros((len(rows), width), dtype=np.int64)
    for place, row in enumerate(rows):
        tokens[place, : len(row)], mask[place, : len(row)] = row, 1
    return tokens, mask


# Few letters, so that runs are common; 0 is also what padding holds.
texts = st.lists(st.integers(0, 3), max_size=9)


@given(
    rows=st.lists(
        st.tuples(st.lists(st.integers(0, 3), min_size=1, max_size=7), st.lists(texts, min_size=2, max_size=2)),
        min_size=1,
        max_size=4,
    )
)
def test_runs_follow_the_definition(rows):
    """Any rows and neighbors, some short, some empty."""
    tokens, mask = padded([row for row, _ in rows], 7)
    pairs = [padded(neighbors, 9) for _, neighbors in rows]
    neighbors, neighbor_mask = (np.stack(parts) for parts in zip(*pairs, strict=True))
    found = common_runs(tokens, neighbors, neighbor_mask, mask)
    shares = overlaps(tokens, mask, neighbors, neighbor_mask)
    for place, (row, texts) in enumerate(rows):
        expected = [run_by_hand(row, column, texts) for column in range(len(row))]
        assert found[place].tolist() == expected + [0] * (7 - len(row))
        assert shares[place] == pytest.approx(longest_by_hand(row, texts) / len(row))


def test_block_size_changes_nothing(monkeypatch):
    """Many rows are compared a few at a time."""
    generator = np.random.default_rng(0)
    rows, neighbors = generator.integers(4, size=(50, 8)), generator.integers(4, size=(50, 2, 16))
    mask = generator.random(neighbors.shape) < 0.9
    whole = common_runs(rows, neighbors, mask)
    monkeypatch.setattr("retro_hf.evaluation.leakage._MAX_CELLS", 100)
    assert np.array_equal(common_runs(rows, neighbors, mask), whole)
    assert whole.max() > 2


def test_nothing_to_compare_gives_no_overlap():
    """No rows, and rows without neighbors."""
    assert common_runs(np.empty((0, 8), dtype=int), np.empty((0, 2, 4), dtype=int), np.empty((0, 2, 4))).shape == (
        0,
        8,
    )
    assert not common_runs(np.ones((2, 3), dtype=int), np.empty((2, 0, 4), dtype=int), np.empty((2, 0, 4))).any()
