"""From documents and runs to the table of scored tokens."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from ..datastore import RetroDatastore
from ..datastore.executors import progress_bar
from .bootstrap import paired_interval
from .kept import KeptBlocks, digest_of
from .modes import Chunks, Run
from .overlap import common_runs, overlaps
from .result import Similarity
from .scoring import Document, cut_windows, evaluating, score_windows
from .tokens import TokenTable


if TYPE_CHECKING:
    from transformers import PreTrainedModel

__all__ = ["LEAKAGE_NEIGHBORS", "make_table", "score_runs", "similarity_of"]

# Of the leakage filter, section 2.6 of the paper.
LEAKAGE_NEIGHBORS = 10
_BLOCK_CHUNKS = 4096


def score_runs(
    model: PreTrainedModel,
    documents: Sequence[Document],
    runs: Sequence[Run],
    datastore: RetroDatastore | None,
    *,
    window: int,
    stride: int,
    batch_size: int,
    kept: KeptBlocks,
    settings: str,
    show_progress: bool | None,
) -> dict[str, np.ndarray]:
    """Negative log-likelihood of every scored token in every run.

    Args:
        kept ([`KeptBlocks`]): where the scores of each batch of windows are kept.
        settings (`str`): all that scores depend on but tokens and chunk ids.
    Returns:
        `dict[str, np.ndarray]`: by name, float32 of shape `(num_tokens,)`, document after document.
    """
    # The same neighbors under two names (the number of `on` in a sweep) are scored once.
    same = {
        run.name: digest_of(*(b"%d " % ids.shape[1] + ids.tobytes() for ids in run.chunk_ids or ())) for run in runs
    }
    first_of = {digest: name for name, digest in reversed(same.items())}
    distinct = [run for run in runs if first_of[same[run.name]] == run.name]

    size = 1 if datastore is None else datastore.chunk_size
    starts = np.cumsum([0, *(document.num_scored for document in documents)])
    nats = {run.name: np.zeros(starts[-1], dtype=np.float32) for run in distinct}
    windows = cut_windows(documents, window, stride)
    with (
        progress_bar(show_progress, total=len(windows) * len(distinct), unit="window", desc="Scoring") as bar,
        evaluating(model),
    ):
        for first in range(0, len(windows), batch_size):
            rows = windows[first : first + batch_size]
            places = np.concatenate([np.arange(row.scored_from, row.end) + starts[row.document] - 1 for row in rows])
            texts = [documents[row.document].input_ids[row.start : row.end].tobytes() for row in rows]
            spans = [f"{row.scored_from - row.start}" for row in rows]
            for run in distinct:
                ids = run.chunk_ids
                given = [
                    b"" if ids is None else ids[row.document][row.start // size : row.end // size].tobytes()
                    for row in rows
                ]

                def score(
                    rows: Sequence = rows, ids: list[np.ndarray] | None = ids, name: str = run.name
                ) -> np.ndarray:
                    scores = np.concatenate(score_windows(model, documents, rows, ids, datastore, size))
                    if not np.isfinite(scores).all():
                        raise ValueError(
                            f"The model's predictions are not numbers ({name!r}, dtype {model.dtype}): its weights are "
                            "damaged, or its numbers too large for the dtype. Try float32; else nothing can be measured."
                        )
                    return scores

                digest = digest_of(settings, f"{run.num_neighbors}", *texts, *spans, *given)
                nats[run.name][places] = kept.load_or_make("scores", digest, score)
                bar.update(len(rows))
    return {run.name: nats[first_of[same[run.name]]] for run in runs}


def make_table(
    documents: Sequence[Document],
    chunks: Chunks,
    nats: dict[str, np.ndarray],
    num_resamples: int,
    seed: int,
    datastore: RetroDatastore | None = None,
    nearest: np.ndarray | None = None,
    given: np.ndarray | None = None,
) -> TokenTable:
    """The table of scored tokens, with what neighbors have of them.

    Args:
        nats (`dict[str, np.ndarray]`): from [`score_runs`].
        datastore ([`RetroDatastore`], *optional*): that neighbors are of.
        nearest, given (`np.ndarray` of int64 and shape `(num_chunks, any)`, *optional*): chunk ids of the nearest neighbors
            of each chunk, best first, and of those that were given for its tokens.
    """
    size = chunks.rows.shape[1]
    counts = [document.num_scored for document in documents]
    document = np.repeat(np.arange(len(documents)), counts)
    position = np.concatenate([np.arange(1, count + 1) for count in counts])
    chunk = chunks.starts[document] + position // size
    overlap = np.full(len(chunks.rows), np.nan)
    run = np.full(chunks.rows.shape, -1, dtype=np.int32)
    if datastore is not None and nearest is not None and given is not None:
        for block in _blocks(len(chunks.rows)):
            found = datastore.gather(nearest[block, :LEAKAGE_NEIGHBORS])
            overlap[block] = overlaps(chunks.rows[block], chunks.mask[block], *found)
            later = block[(given[block] >= 0).any(axis=1)]
            # With the chunk before, so that a run may begin there.
            rows = np.concatenate([chunks.rows[later - 1], chunks.rows[later]], axis=1)
            run[later] = common_runs(rows, *datastore.gather(given[later]))[:, size:]
    return TokenTable(
        document=document.astype(np.int32),
        position=position.astype(np.int32),
        token_id=np.concatenate([one.input_ids[1:] for one in documents]).astype(np.int32),
        num_bytes=np.concatenate([np.diff(one.byte_ends) for one in documents]).astype(np.int32),
        chunk=chunk,
        overlap=overlap[chunk].astype(np.float32),
        run=run[chunk, position % size],
        nats=nats,
        chunk_size=size,
        num_resamples=num_resamples,
        seed=seed,
    )


def similarity_of(
    chunks: Chunks,
    on: Sequence[np.ndarray],
    random: Sequence[np.ndarray],
    datastore: RetroDatastore,
    num_resamples: int,
    seed: int,
) -> Similarity:
    """How many of the tokens of each complete chunk its neighbors have, retrieved and random: asked without the model.

    Args:
        on, random (`Sequence` of int64 arrays of shape `(num_complete_chunks, num_neighbors)`): of each document.
    """
    rows = chunks.rows[chunks.mask.all(axis=1)]
    shares = []
    for by_document in (on, random):
        ids = np.concatenate(by_document)
        share = np.empty(len(rows))
        for block in _blocks(len(rows)):
            share[block] = (common_runs(rows[block], *datastore.gather(ids[block])) > 0).mean(axis=1)
        shares.append(share)
    owners = np.repeat(np.arange(len(chunks.counts)), chunks.complete)
    difference = np.bincount(owners, weights=shares[0] - shares[1], minlength=len(chunks.counts))
    interval = paired_interval(difference, chunks.complete, num_resamples, seed)
    return Similarity(float(shares[0].mean()), float(shares[1].mean()), interval)


def _blocks(count: int) -> list[np.ndarray]:
    return [np.arange(start, min(start + _BLOCK_CHUNKS, count)) for start in range(0, count, _BLOCK_CHUNKS)]
