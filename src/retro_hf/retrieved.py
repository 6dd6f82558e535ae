"""What a retriever has found, and the settings that it is saved with."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from .errors import RetrieverError
from .outside import read_json


SETTINGS_NAME = "retriever.json"
_MAX_SAVED_NEIGHBORS = 1 << 10


@dataclass(frozen=True)
class RetrievalResult:
    """What a search found.

    Attributes:
        scores (`np.ndarray` of float32 and shape `(num_queries, num_neighbors)`): best first; -inf where there is no
            neighbor. By default inner products of unit vectors; the paper's squared distance is `2 - 2 * score`.
        chunk_ids (`np.ndarray` of int64 and shape `(num_queries, num_neighbors)`): -1 where there is no neighbor.
    """

    scores: np.ndarray
    chunk_ids: np.ndarray


@dataclass(frozen=True)
class RetrievedNeighbor:
    """One readable neighbor: its chunk, its score (bigger is nearer), its document, its text and its continuation.

    `metric` says what the score is: `"inner_product"` of unit vectors, `"bm25"`, or `"reciprocal_rank_fusion"`.
    """

    chunk_id: int
    score: float
    document_id: str
    title: str
    text: str
    continuation: str
    metric: str


def saved_settings(path: Path) -> dict[str, Any]:
    """The saved number of neighbors, 2 (the paper's) for a folder that was saved as a datastore only, and `min_score`."""
    if not os.path.lexists(path / SETTINGS_NAME):
        return {"num_neighbors": 2}
    try:
        settings = read_json(path, SETTINGS_NAME)
        number, score = settings.get("num_neighbors"), settings.get("min_score")
        if score is not None and (isinstance(score, bool) or not isinstance(score, (int, float))):
            raise ValueError(f"its min_score is {score!r:.100}")
        if type(number) is not int or not 1 <= number <= _MAX_SAVED_NEIGHBORS:
            raise ValueError(f"its num_neighbors is {number!r:.100}")
    except (OSError, ValueError) as error:
        file = str(path / SETTINGS_NAME)
        raise RetrieverError(f"{file!r} is damaged ({error}). Remove it, or save the retriever again.") from error
    return {"num_neighbors": number, "min_score": score}
