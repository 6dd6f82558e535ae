"""What a retriever is asked and has found, and the settings that it is saved with."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from .errors import RetrieverError
from .model.values_retro import check_plain
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

    `source` is where the document comes from, such as its file; it may be empty. `metric` says what the score is:
    `"inner_product"` of unit vectors, `"bm25"`, or `"reciprocal_rank_fusion"`.
    """

    chunk_id: int
    score: float
    document_id: str
    title: str
    source: str
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


def token_rows(
    ids: torch.Tensor, mask: torch.Tensor | None, chunk_size: int | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """Check rows of token ids that a retriever is asked about.

    Args:
        ids (`torch.Tensor` of integers and shape `(num_rows, length)`): token ids.
        mask (`torch.Tensor` of the same shape, *optional*): 0 at padding.
        chunk_size (`int`, *optional*): the length that the rows must have.
    Returns:
        The ids, int64, and the mask, bool, of the same shape.
    Raises:
        RetrieverError: if they are of another type or shape, or an id that is not masked is negative.
    """
    try:
        check_plain("The tensor of token ids", ids)
        check_plain("The mask", mask)
    except ValueError as error:
        raise RetrieverError(str(error)) from error
    found = f"shape {tuple(ids.shape)}" if isinstance(ids, torch.Tensor) else f"type {type(ids).__name__}"
    if not isinstance(ids, torch.Tensor) or ids.ndim != 2 or (chunk_size or ids.shape[1]) != ids.shape[1]:
        raise RetrieverError(
            f"The prompts are of {found}. Pass a tensor of token ids of shape (batch_size, prompt_length)."
            if chunk_size is None
            else f"The chunks are of {found}, but the datastore looks up tensors of shape (num_chunks, {chunk_size}). Use a "
            f"model with chunk_size={chunk_size}, or rebuild the datastore."
        )
    is_mask = mask is None or (isinstance(mask, torch.Tensor) and mask.shape == ids.shape)
    if ids.is_floating_point() or ids.is_complex() or ids.dtype == torch.bool or not is_mask:
        kind = f"shape {tuple(mask.shape)}" if isinstance(mask, torch.Tensor) else f"type {type(mask).__name__}"
        masked = "" if mask is None else f" and a mask of {kind}"
        raise RetrieverError(
            f"The token ids are {ids.dtype} of {found}{masked}. Pass integers, and a mask of their shape."
        )
    rows = ids.detach().cpu().to(torch.int64).numpy()
    kept = np.ones(rows.shape, dtype=bool) if mask is None else mask.detach().cpu().numpy().astype(bool)
    if (least := int(rows[kept].min(initial=0))) < 0:
        raise RetrieverError(f"There is the token id {least}. Pass ids of the tokenizer, and a mask for padding.")
    return rows, kept
