"""Evaluation documents that lie in the datastore: found by what they say, whatever they are called."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from ..datastore import RetroDatastore
from ..datastore.chunks import ranges
from ..datastore.duplicates import shingles_of, stored_documents
from .result import LeakedDocument
from .scoring import Document


__all__ = ["leaked_documents"]

_NGRAM = 13
_THRESHOLD = 0.8


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
    sets = shingles_of([document.input_ids for document in documents], _NGRAM)
    sizes = np.array([len(shingles) for shingles in sets], dtype=np.int64)
    owners = np.repeat(np.arange(len(sets)), sizes)
    flat = np.concatenate([*sets, np.empty(0, dtype=np.uint32)])
    order = np.argsort(flat, kind="stable")
    owners = owners[order]
    values, starts, counts = np.unique(flat[order], return_index=True, return_counts=True)
    best: dict[int, LeakedDocument] = {}
    for ids, tokens in stored_documents(datastore) if len(values) else ():
        for stored_id, shingles in zip(ids, shingles_of(tokens, _NGRAM), strict=True):
            places = np.minimum(np.searchsorted(values, shingles), len(values) - 1)
            places = places[values[places] == shingles]
            shared = np.bincount(owners[ranges(starts[places], counts[places])], minlength=len(sets))
            for row in np.flatnonzero((shared > 0) & (shared >= _THRESHOLD * sizes)).tolist():
                contained, id = float(shared[row] / sizes[row]), documents[row].id
                if row not in best or contained > best[row].contained:
                    best[row] = LeakedDocument(id, stored_id, round(contained, 4), id == stored_id)
        progress.update(len(ids))
    return best
