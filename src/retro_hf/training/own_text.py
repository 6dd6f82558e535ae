"""Neighbors that are the text itself: found by its tokens, where no id says which document it is."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
from transformers.utils import logging

from ..datastore import RetroDatastore
from ..datastore.result_filter import select
from ..errors import counted


logger = logging.get_logger(__name__)

# A share of chunks without neighbors above which it is a warning: most of them should have some.
_LOUD_SHARE = 0.2
_COUNTED_CHUNKS = 256


@dataclass(frozen=True)
class Text:
    """Chunks of a text and what follows each of them.

    Attributes:
        chunks (`np.ndarray` of int64 and shape `(num_chunks, m)`): token ids, -2 at padding. A neighbor has -1 there, and
            padding must equal nothing.
        following (`np.ndarray` of int64 and shape `(num_chunks, m)`): the next tokens, -2 where the text ends.
    """

    chunks: np.ndarray
    following: np.ndarray

    @classmethod
    def of_windows(cls, tokens: np.ndarray, lengths: np.ndarray, chunk_size: int) -> Text:
        """The complete chunks of windows (integers, one after another), within which they are followed."""
        # Windows of 10 and 9 tokens with chunks of 4: each has two chunks, which begin at the tokens 0, 4, 10 and 14. Each row
        # of `columns` has a chunk and what would follow it; what is past the window's end (10, 19) is read from the
        # padding that is appended.
        counts = lengths // chunk_size
        starts = np.repeat(np.cumsum(lengths) - lengths, counts)
        places = np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts, counts)
        begins = starts + places * chunk_size
        ends = np.repeat(np.cumsum(lengths), counts)
        columns = begins[:, None] + np.arange(2 * chunk_size)
        padded = np.append(tokens.astype(np.int64), -2)
        both = padded[np.where(columns < ends[:, None], columns, len(tokens))]
        return cls(both[:, :chunk_size], both[:, chunk_size:])

    def equal(self, rows: np.ndarray, neighbors: np.ndarray) -> np.ndarray:
        """Which neighbors are the chunk itself, with the continuation that it has, as far as both are known.

        Args:
            rows (`np.ndarray` of int64 and shape `(n,)`): chunks.
            neighbors (`np.ndarray` of int64 and shape `(n, k, R)`): token ids, -1 at padding.
        Returns:
            `np.ndarray` of bool and shape `(n, k)`.
        """
        chunks, size = self.chunks[rows][:, None], self.chunks.shape[1]
        same = (neighbors[..., :size] == chunks).all(axis=-1) & (chunks[..., 0] >= 0)
        width = min(size, neighbors.shape[-1] - size)
        text, other = self.following[rows][:, None, :width], neighbors[..., size : size + width]
        known = (text >= 0) & (other >= 0)
        agrees = ((text == other) | ~known).all(axis=-1)
        # A stored chunk that ends its document tells nothing of what follows.
        return same & agrees & (known.any(axis=-1) | ~(text >= 0).any(axis=-1) | (width == 0))

    def contained(self, rows: np.ndarray, neighbors: np.ndarray) -> np.ndarray:
        """Which neighbors have a chunk's worth of this text in a row, its continuation among it, wherever it begins.

        Args, Returns: as for `equal`.
        """
        # A copy in a longer document is cut into chunks elsewhere, so it is looked for by a chunk's worth of tokens that runs
        # over the border: it ends with the first eighth of the continuation. A document that only repeats the chunk, without
        # what follows, is a fair neighbor.
        size = self.chunks.shape[1]
        both = np.concatenate([self.chunks[rows], self.following[rows]], axis=1)
        known = np.minimum((self.following[rows] >= 0).sum(axis=1), max(1, size // 8))
        over_border = np.take_along_axis(both, known[:, None] + np.arange(size), axis=1)
        return _has(neighbors, over_border) | _has(neighbors, self.following[rows])


def tell_lookups(what: str, missing: np.ndarray, num_copied: int = 0, num_short: int = 0) -> None:
    """Report the share of chunks without any neighbor; loudly if it is above a fifth.

    Args:
        what (`str`): whose chunks, for the message.
        missing (`np.ndarray` of bool and shape `(num_chunks,)`): whether nothing was found for a chunk.
        num_copied (`int`): chunks for which a copy of the text was left out.
        num_short (`int`): texts without a complete chunk.
    """
    share = missing.sum() / max(len(missing), 1)
    parts = [f"{missing.sum():,} of {counted(len(missing), 'chunk')} of {what} have no neighbor ({share:.0%})"]
    if num_copied:
        parts.append(f"for {num_copied:,} a neighbor was left out that is the text itself")
    if num_short:
        parts.append(f"{counted(num_short, 'text')} of less than a chunk read nothing")
    message = "; ".join(parts) + "."
    if not len(missing) or share > _LOUD_SHARE:
        logger.warning(
            f"{message} They are read without retrieval. A chunk gets nothing from its own document, nor below `min_score`: "
            'a datastore needs other documents. Add some, or divide long files into several documents, such as with `split="heading"`.'
        )
    else:
        logger.info(message)


class Lookups:
    """Counts the chunks of training batches that have no neighbor, and warns once if there are many."""

    def __init__(self) -> None:
        self._missing: list[bool] = []
        self._num_short = 0
        self._is_told = False

    def count(self, found: list[np.ndarray]) -> None:
        """Count the neighbors of a batch: for each text int64 of shape `(num_chunks, num_neighbors)`, -1 for none."""
        if self._is_told:
            return
        self._num_short += sum(not len(ids) for ids in found)
        self._missing += [missing for ids in found for missing in np.asarray((ids < 0).all(axis=1)).tolist()]
        if max(len(self._missing), self._num_short) >= _COUNTED_CHUNKS:
            self._is_told = True
            tell_lookups("the first batches", np.array(self._missing, dtype=bool), num_short=self._num_short)


def _has(neighbors: np.ndarray, texts: np.ndarray) -> np.ndarray:
    """Which neighbors (n, k, R) have the whole row of `texts` (n, m) somewhere; none has a row with padding."""
    n, k, length = neighbors.shape
    size = texts.shape[1]
    flat, wanted = neighbors.reshape(n * k, length), np.repeat(texts, k, axis=0)
    # Only places that begin with the right token are compared in full: all windows would be `length` times the memory.
    candidates, places = np.nonzero(flat[:, : length - size + 1] == wanted[:, :1])
    windows = np.lib.stride_tricks.sliding_window_view(flat, size, axis=1)[candidates, places]
    found = np.zeros(n * k, dtype=bool)
    found[candidates[(windows == wanted[candidates]).all(axis=1)]] = True
    return found.reshape(n, k)


@dataclass
class _Copies:
    """Leaves neighbors out that are the text itself, and notes which they were.

    Attributes:
        text, owners, has_id, is_training: see `search_without_copies`.
        left_out (`np.ndarray` of bool and shape `(num_chunks,)`): chunks for which a neighbor was left out.
        stored (`dict[int, set[int]]`): for each text without an id, the stored chunks that are the text itself.
    """

    text: Text
    owners: np.ndarray
    has_id: np.ndarray
    is_training: bool
    left_out: np.ndarray
    stored: dict[int, set[int]] = field(default_factory=dict)

    def keep(self, chunks: np.ndarray, neighbors: np.ndarray, found: np.ndarray) -> np.ndarray:
        """Which of the stored chunks `found` (n, k), with their tokens `neighbors` (n, k, R), `chunks` (n,) may get."""
        without_id = ~self.has_id[chunks][:, None]
        copies = self.text.equal(chunks, neighbors)
        if self.is_training:
            copies |= self.text.contained(chunks, neighbors) & without_id
        self.left_out[chunks] |= copies.any(axis=1)
        for row, place in zip(*np.nonzero(copies & without_id), strict=True):
            self.stored.setdefault(int(self.owners[chunks[row]]), set()).add(int(found[row, place]))
        return ~copies


def search_without_copies(
    datastore: RetroDatastore,
    search: Callable[[np.ndarray, int, np.ndarray], tuple[np.ndarray, np.ndarray]],
    text: Text,
    num_neighbors: int,
    *,
    owners: np.ndarray,
    excluded: np.ndarray,
    has_id: np.ndarray,
    is_training: bool,
    min_score: float | None = None,
) -> tuple[np.ndarray, int]:
    """Search for neighbors, none of which is the text itself.

    A neighbor equal to the chunk and its continuation is left out. If no id names the text's document, that neighbor's
    document is taken for it and left out whole. In training, a document that contains the text elsewhere also counts as its
    own.

    Args:
        search (`Callable`): `(rows, count, exclude_documents) -> (scores, chunk_ids)`.
        text ([`Text`]): the chunks that are looked up.
        owners (`np.ndarray` of int64 and shape `(num_chunks,)`): the number of the text that each chunk belongs to.
        excluded (`np.ndarray` of int64 and shape `(num_chunks, any)`): stored documents that a chunk must not get.
        has_id (`np.ndarray` of bool and shape `(num_chunks,)`): whether an id has named its stored document.
        is_training (`bool`): whether a text at another place counts, too.
    Returns:
        Chunk ids, int64 of shape `(num_chunks, num_neighbors)`, -1 for none; and for how many chunks a copy was left out.
    """
    copies = _Copies(text, owners, has_id, is_training, left_out=np.zeros(len(owners), dtype=bool))

    def search_some(chunks: np.ndarray, hidden: np.ndarray) -> np.ndarray:
        return select(
            datastore,
            lambda rows, count: search(chunks[rows], count, hidden[chunks[rows]]),
            len(chunks),
            num_neighbors,
            min_score=min_score,
            keep=lambda rows, neighbors, found: copies.keep(chunks[rows], neighbors, found),
        )[1]

    ids = np.full((len(owners), num_neighbors), -1, dtype=np.int64)
    todo, hidden = np.arange(len(owners)), excluded
    named: set[tuple[int, int]] = set()
    # If one chunk shows which stored document a text is, all chunks of the text are searched again without that document. Each
    # round names a document that was not named before, so this ends.
    while len(todo):
        copies.stored.clear()
        ids[todo] = search_some(todo, hidden)
        new = {
            (owner, number)
            for owner, chunks in copies.stored.items()
            for number in datastore.document_of(np.array(sorted(chunks))).tolist()
        } - named  # a user's own searcher may ignore the exclusion
        named |= new
        todo = np.flatnonzero(np.isin(owners, [owner for owner, _ in new]))
        for owner, number in sorted(new):
            hidden = np.pad(hidden, ((0, 0), (0, 1)), constant_values=-1)
            hidden[owners == owner, -1] = number
    return ids, int(copies.left_out.sum())
