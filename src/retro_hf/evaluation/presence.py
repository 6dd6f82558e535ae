"""Evaluation documents that lie in the datastore, or in one another: found by what they say, whatever they are called."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from ..datastore import RetroDatastore
from ..datastore.chunks import ranges
from ..datastore.duplicates import shingles_of, stored_documents
from .result import CopiedDocument, LeakedDocument
from .scoring import Document


__all__ = ["copied_documents", "leaked_documents"]

_NGRAM = 13
_THRESHOLD = 0.8


class _Sets:
    """The sets of 13-grams of some documents, by n-gram."""

    def __init__(self, documents: Sequence[Document]) -> None:
        self.members = shingles_of([document.input_ids for document in documents], _NGRAM)
        self.sizes = np.array([len(shingles) for shingles in self.members], dtype=np.int64)
        owners = np.repeat(np.arange(len(self.members)), self.sizes)
        flat = np.concatenate([*self.members, np.empty(0, dtype=np.uint32)])
        order = np.argsort(flat, kind="stable")
        self._owners = owners[order]
        self._values, self._starts, self._counts = np.unique(flat[order], return_index=True, return_counts=True)

    def shared(self, shingles: np.ndarray) -> np.ndarray:
        """How many of these n-grams each document has: int64 of shape `(num_documents,)`."""
        places = np.minimum(np.searchsorted(self._values, shingles), len(self._values) - 1)
        places = places[self._values[places] == shingles]
        found = self._owners[ranges(self._starts[places], self._counts[places])]
        return np.bincount(found, minlength=len(self.members))


def copied_documents(documents: Sequence[Document], names: Sequence[str]) -> dict[int, CopiedDocument]:
    """Documents of whose 13-grams of tokens another one, that is kept, has at least 80 %.

    Intervals draw documents as if each were news; a copy is none. Of two that hold each other the longer is kept, of equal
    ones the first.

    Args:
        documents (`Sequence[Document]`): to compare; each has a token.
        names (`Sequence[str]`): what to call them.
    Returns:
        `dict[int, CopiedDocument]`: by the document's place.
    """
    sets = _Sets(documents)
    kept = np.zeros(len(documents), dtype=bool)
    copies: dict[int, CopiedDocument] = {}
    for place in np.argsort(-sets.sizes, kind="stable").tolist():
        shared = sets.shared(sets.members[place]) * kept
        best, size = int(shared.argmax()), int(sets.sizes[place])
        kept[place] = not shared[best] or shared[best] < _THRESHOLD * size
        if not kept[place]:
            copies[place] = CopiedDocument(names[place], names[best], round(float(shared[best] / size), 4))
    return copies


def leaked_documents(
    documents: Sequence[Document], datastore: RetroDatastore, progress: Any
) -> dict[int, LeakedDocument]:
    """Documents of whose 13-grams of tokens one document of the datastore has at least 80 %.

    Stricter than the paper's rule, a Jaccard similarity of 0.8 ([`near_duplicates`]): a passage is also found within a longer
    document. Shares are counted, not estimated; a document of fewer than 13 tokens must be there as a whole.

    Args:
        documents (`Sequence[Document]`): to look for.
        datastore ([`RetroDatastore`]): where to look; it is read block by block, deleted documents are passed over.
        progress: a progress bar, in documents of the datastore.
    Returns:
        `dict[int, LeakedDocument]`: by the document's place.
    """
    sets = _Sets(documents)
    best: dict[int, LeakedDocument] = {}
    for ids, tokens in stored_documents(datastore) if sets.sizes.any() else ():
        for stored_id, shingles in zip(ids, shingles_of(tokens, _NGRAM), strict=True):
            shared = sets.shared(shingles)
            for row in np.flatnonzero((shared > 0) & (shared >= _THRESHOLD * sets.sizes)).tolist():
                contained, id = float(shared[row] / sets.sizes[row]), documents[row].id
                if row not in best or contained > best[row].contained:
                    best[row] = LeakedDocument(id, stored_id, round(contained, 4), id == stored_id)
        progress.update(len(ids))
    return best
