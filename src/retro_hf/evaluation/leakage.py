"""What a text has in common with its neighbors, with the datastore, and with the other documents."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

import numpy as np

from ..datastore import RetroDatastore
from ..datastore.chunks import ranges
from ..datastore.duplicates import shingles_of, stored_documents
from ..progress import progress_bar
from .neighbors import Chunks, NeighborIds
from .result import CopiedDocument, LeakedDocument
from .scoring import TokenizedDocument


# Documents are compared by their sets of 13-grams of tokens: the share of them that another one has.
_THRESHOLD = 0.8
# Cells of (chunk, neighbor, token) compared at once.
_MAX_CELLS = 1 << 20
_BLOCK_CHUNKS = 4096
# Padding of a text and of a neighbor must not be equal.
_NO_TOKEN, _NO_NEIGHBOR = -1, -2
Block = tuple[Sequence[str], Sequence[np.ndarray]]
"""Some documents: their ids, and their token ids as int64 arrays of shape `(num_tokens,)`."""


def common_runs(
    rows: np.ndarray, neighbors: np.ndarray, neighbor_mask: np.ndarray, row_mask: np.ndarray | None = None
) -> np.ndarray:
    """For each token the length of the longest run of tokens, ending with it, that is also in a neighbor of its row.

    0 for a token that no neighbor has. The largest value of a row is the length of the longest common substring of
    tokens, s in section 2.6 of Borgeaud et al. (2022).

    Args:
        rows (`np.ndarray` of int64 and shape `(num_rows, num_tokens)`): token ids.
        neighbors, neighbor_mask (`np.ndarray` of shape `(num_rows, num_neighbors, neighbor_size)`): token ids, and 0 at
            padding. A run is within one neighbor.
        row_mask (`np.ndarray` of shape `(num_rows, num_tokens)`, *optional*): 0 at padding, where the result is 0.
    Returns:
        `np.ndarray` of int32 and shape `(num_rows, num_tokens)`.
    """
    # The dynamic program of the longest common substring, over all chunks and neighbors at once, of which only the last
    # column is kept. With the row [7, 8, 9] and the neighbor [8, 9, 5] the result is [0, 1, 2].
    found = np.where(neighbor_mask, neighbors, _NO_NEIGHBOR)
    tokens = rows if row_mask is None else np.where(row_mask, rows, _NO_TOKEN)
    result = np.zeros(rows.shape, dtype=np.int32)
    num_blocks = -(-found.size // _MAX_CELLS)
    for block in np.array_split(np.arange(len(rows)), num_blocks) if num_blocks else []:
        there = found[block]
        runs = np.zeros((*there.shape[:2], there.shape[2] + 1), dtype=np.int32)
        for column in range(rows.shape[1]):
            # The run that ended one token earlier on both sides grows by one where the tokens agree, else it is 0.
            runs[:, :, 1:] = (runs[:, :, :-1] + 1) * (there == tokens[block, column, None, None])
            result[block, column] = runs.max(axis=(1, 2))
    return result


def overlaps(rows: np.ndarray, row_mask: np.ndarray, neighbors: np.ndarray, neighbor_mask: np.ndarray) -> np.ndarray:
    """r(C) of section 2.6: the longest common substring with the neighbors, as a share of the chunk's tokens.

    Args:
        rows, row_mask (`np.ndarray` of shape `(num_chunks, chunk_size)`): token ids of chunks, and 0 at padding.
        neighbors, neighbor_mask: as in [`common_runs`].
    Returns:
        `np.ndarray` of float64 and shape `(num_chunks,)`, from 0 to 1.
    """
    longest = common_runs(rows, neighbors, neighbor_mask, row_mask).max(axis=1, initial=0)
    return longest / np.maximum(row_mask.sum(axis=1), 1)


def shared_tokens(datastore: RetroDatastore, chunks: Chunks, chunk_ids: NeighborIds) -> np.ndarray:
    """The share of each complete chunk's tokens that its neighbors have: float64 of shape `(num_complete_chunks,)`."""
    rows, ids = chunks.rows[chunks.mask.all(axis=1)], np.concatenate(chunk_ids)
    blocks = [slice(start, start + _BLOCK_CHUNKS) for start in range(0, len(rows), _BLOCK_CHUNKS)]
    shares = [(common_runs(rows[block], *datastore.gather(ids[block])) > 0).mean(axis=1) for block in blocks]
    return np.concatenate([np.empty(0), *shares])


class _Shingles:
    """The sets of 13-grams of some documents, indexed by 13-gram."""

    def __init__(self, documents: Sequence[np.ndarray]) -> None:
        # An inverted index in three arrays: each distinct 13-gram, where its documents begin in `_owners`, and how many there
        # are. The time to look up a text then depends on the text, and not on the number of documents.
        self.members = shingles_of(documents)
        self.sizes = np.array([len(shingles) for shingles in self.members], dtype=np.int64)
        owners = np.repeat(np.arange(len(self.members)), self.sizes)
        flat = np.concatenate([*self.members, np.empty(0, dtype=np.uint32)])
        order = np.argsort(flat, kind="stable")
        self._owners = owners[order]
        self._values, self._starts, self._counts = np.unique(flat[order], return_index=True, return_counts=True)

    def shared(self, shingles: np.ndarray) -> np.ndarray:
        """How many of these 13-grams each document has: int64 of shape `(num_documents,)`."""
        # What is not there would be inserted somewhere; the next line drops it.
        places = np.minimum(np.searchsorted(self._values, shingles), len(self._values) - 1)
        places = places[self._values[places] == shingles]
        found = self._owners[ranges(self._starts[places], self._counts[places])]
        return np.bincount(found, minlength=len(self.members))


def copied_documents(documents: Sequence[TokenizedDocument], names: Sequence[str]) -> dict[int, CopiedDocument]:
    """Documents of whose 13-grams another, kept document has at least 80 %.

    Intervals assume independent documents, so only one copy is kept: the longest, and of equal ones the first.

    Returns:
        `dict[int, CopiedDocument]`: by the place of the document; `names` are those in the result.
    """
    sets = _Shingles([document.input_ids for document in documents])
    kept = np.zeros(len(documents), dtype=bool)
    copies: dict[int, CopiedDocument] = {}
    for place in np.argsort(-sets.sizes, kind="stable").tolist():
        shared = sets.shared(sets.members[place]) * kept
        best, size = int(shared.argmax()), int(sets.sizes[place])
        kept[place] = not shared[best] or shared[best] < _THRESHOLD * size
        if not kept[place]:
            copies[place] = CopiedDocument(names[place], names[best], round(float(shared[best] / size), 4))
    return copies


def holders(documents: Sequence[np.ndarray], others: Iterable[Block]) -> list[list[str]]:
    """For each document the ids of those others that have at least 80 % of its 13-grams, itself if it is among them.

    Args:
        documents (`Sequence` of int64 arrays of shape `(num_tokens,)`): token ids.
        others (iterable of [`Block`]): such as [`stored_documents`].
    """
    found: list[list[str]] = [[] for _ in documents]
    for row, id, _ in _holding(_Shingles(documents), others):
        found[row].append(id)
    return found


def leaked_documents(
    documents: Sequence[TokenizedDocument], datastore: RetroDatastore, show_progress: bool | None = None
) -> dict[int, LeakedDocument]:
    """Documents of whose 13-grams one document of the datastore has at least 80 %.

    This is stricter than the paper's rule, a Jaccard similarity of 0.8 ([`near_duplicates`]), because it also finds a
    passage within a longer document. Deleted documents are skipped.

    Returns:
        `dict[int, LeakedDocument]`: by the place of the document.
    """
    best: dict[int, LeakedDocument] = {}
    with progress_bar(
        show_progress, total=datastore.num_documents, unit="doc", desc="Checking for leakage"
    ) as progress:

        def blocks() -> Iterator[Block]:
            for block in stored_documents(datastore):
                yield block
                progress.update(len(block[0]))

        for row, stored_id, contained in _holding(_Shingles([one.input_ids for one in documents]), blocks()):
            if row not in best or contained > best[row].contained:
                id = documents[row].id
                best[row] = LeakedDocument(id, stored_id, round(contained, 4), id == stored_id)
    return best


def _holding(sets: _Shingles, others: Iterable[Block]) -> Iterator[tuple[int, str, float]]:
    """Each pair of a document and another one that has at least 80 % of it: place, id of the other, and the share."""
    for ids, tokens in others if sets.sizes.any() else ():
        for id, shingles in zip(ids, shingles_of(tokens), strict=True):
            shared = sets.shared(shingles)
            for row in np.flatnonzero((shared > 0) & (shared >= _THRESHOLD * sets.sizes)).tolist():
                yield row, id, float(shared[row] / sets.sizes[row])
