"""The fair rival of retrieval in layers: the same base model reads the same neighbors in its prompt.

As in Ram et al. (2023): the neighbors found for a chunk are put before the text, and only the next chunk is scored. The
text is that of the windows of every other mode, so both models predict the same tokens after the same text.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np

from ..datastore import RetroDatastore
from .neighbors import NeighborIds
from .scoring import Row, ScoringOptions, TokenizedDocument, cut_windows, score_rows


if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True)
class Prompted:
    """Scores with the neighbors in the prompt.

    Attributes:
        nats (`np.ndarray` of float32 and shape `(num_tokens,)`): of every scored token, document after document.
        num_read (`int`): tokens that went through the model.
        num_cut (`int`): scored tokens with less text before them than in the other modes, because prompt and text together
            do not fit the model's context.
    """

    nats: np.ndarray
    num_read: int
    num_cut: int


def score_in_context(
    model: PreTrainedModel,
    documents: Sequence[TokenizedDocument],
    neighbors: tuple[RetroDatastore, NeighborIds],
    off: np.ndarray,
    separator: Sequence[int],
    options: ScoringOptions,
) -> Prompted:
    """Score documents with the neighbors in the prompt, the nearest one last.

    Args:
        model (`PreTrainedModel`): the base, any causal language model.
        neighbors (`tuple`): the datastore, and the neighbors of each document's chunks.
        off (`np.ndarray` of float32 and shape `(num_tokens,)`): nats without neighbors, which tokens keep that read none.
        separator (`Sequence[int]`): token ids after each neighbor.
    """
    limit = getattr(model.config, "max_position_embeddings", None)
    prompts = list(_prompts(documents, neighbors, separator, options, limit))
    # The longest rows first, as in `score_runs`.
    rows = sorted((row for row, _ in prompts), key=lambda row: -len(row.input_ids))
    nats = off.copy()
    options = replace(options, identity=f"{options.identity} in_context")
    score_rows(model, {"in_context": rows}, {"in_context": nats}, None, options)
    num_cut = sum(row.num_scored for row, is_cut in prompts if is_cut)
    return Prompted(nats, sum(len(row.input_ids) for row in rows), num_cut)


def _prompts(
    documents: Sequence[TokenizedDocument],
    neighbors: tuple[RetroDatastore, NeighborIds],
    separator: Sequence[int],
    options: ScoringOptions,
    limit: int | None,
) -> Iterator[tuple[Row, bool]]:
    """One row for each scored chunk of each window whose tokens read something, and whether it has less text than the window."""
    datastore, chunk_ids = neighbors
    size = datastore.chunk_size
    starts = np.cumsum([0, *(document.num_scored for document in documents)])
    for window in cut_windows(documents, options.window, options.stride):
        ids = documents[window.document].input_ids
        # The begin-of-text token stays in front of everything.
        lead = ids[:1] if documents[window.document].has_bos else ids[:0]
        limit_here = limit and limit - len(lead)
        for chunk in range(max(1, window.scored_from // size), -(-window.end // size)):
            first, end = max(window.scored_from, chunk * size), min(window.end, (chunk + 1) * size)
            known = chunk_ids[window.document][chunk - 1]
            tokens, mask = datastore.gather(known[known >= 0])
            passages = [np.append(row[kept == 1], separator) for row, kept in zip(tokens, mask, strict=True)]
            # At least the token before the first scored one must fit; if not, the farthest neighbors are left out.
            while limit_here and passages and sum(map(len, passages)) + end - first + 1 > limit_here:
                passages.pop()
            room = end if not limit_here else limit_here - sum(map(len, passages))
            if len(known[known >= 0]):
                text = ids[max(window.start, len(lead), end - room) : end]
                row = np.concatenate([lead, *reversed(passages), text]).astype(np.int64)
                is_cut = end - window.start > room or len(passages) < len(tokens)
                yield Row(row, end - first, int(starts[window.document]) + first - 1), is_cut
