"""Bits per byte of a language model with real, random and no neighbors, on the same tokens of the same documents."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import astuple, dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from ..datastore import RetroDatastore
from ..datastore.executors import progress_bar
from ..errors import DatasetError, counted
from ..retriever import RetroRetriever
from ..training.leakage import document_numbers
from ..training.neighbors import complete_chunks, nearest_chunks, wanted_neighbors
from .bootstrap import paired_interval
from .modes import as_many, random_neighbors
from .scoring import Document, check_numbers, checked_window, cut_windows, evaluating, read_documents, score_windows


if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

__all__ = ["BitsPerByte", "bits_per_byte"]

_MODES = ("on", "off", "random")
_SEARCH_BLOCK = 4096


@dataclass(frozen=True)
class BitsPerByte:
    """What [`bits_per_byte`] measured; `print` shows it as a table.

    Attributes:
        nats (`dict[str, np.ndarray]`): per mode the negative log-likelihood of each document's scored tokens.
        num_tokens, num_bytes (`np.ndarray` of int64 and shape `(num_documents,)`): scored tokens of each document, and
            the UTF-8 bytes of their text; the same for all modes.
        num_neighbors (`int`): neighbors per chunk.
        bits_per_byte (`dict[str, float]`): per mode, over all documents.
        differences (`dict[str, tuple[float, float, float]]`): for each mode but `off`, the bits per byte it has more
            than `off` (negative is better) and the ends of the 95 % interval, from a paired bootstrap over documents;
            NaN for fewer than two documents.
    """

    nats: dict[str, np.ndarray]
    num_tokens: np.ndarray
    num_bytes: np.ndarray
    num_neighbors: int
    bits_per_byte: dict[str, float]
    differences: dict[str, tuple[float, float, float]]

    def to_dict(self) -> dict[str, Any]:
        """The totals as plain numbers, for JSON."""
        return {
            "bits_per_byte": dict(self.bits_per_byte),
            "difference_to_off": {
                mode: {"difference": difference, "low": low, "high": high}
                for mode, (difference, low, high) in self.differences.items()
            },
            "num_documents": len(self.num_bytes),
            "num_tokens": int(self.num_tokens.sum()),
            "num_bytes": int(self.num_bytes.sum()),
            "num_neighbors": self.num_neighbors,
        }

    def __str__(self) -> str:
        lines = [f"{'retrieval':<10} {'bits/byte':>9}   {'minus off':>9}  {'95 % interval':<18} {'relative':>8}"]
        for mode, value in self.bits_per_byte.items():
            line = f"{mode:<10} {value:>9.4f}"
            if mode in self.differences:
                difference, low, high = self.differences[mode]
                relative = difference / self.bits_per_byte["off"]
                line += f"   {difference:>+9.4f}  {f'[{low:+.4f}, {high:+.4f}]':<18} {relative:>+8.1%}"
            lines.append(line)
        lines.append(
            f"{counted(len(self.num_bytes), 'document')}; scored: {counted(self.num_tokens.sum(), 'token')}, "
            f"{counted(self.num_bytes.sum(), 'byte')} (all but each document's first token); "
            f"{counted(self.num_neighbors, 'neighbor')} per chunk"
        )
        return "\n".join(lines)


def bits_per_byte(
    model: PreTrainedModel,
    documents: Iterable[str | Mapping[str, Any]],
    tokenizer: PreTrainedTokenizerBase,
    *,
    retriever: RetroRetriever | RetroDatastore | None = None,
    neighbor_chunk_ids: Sequence[Any] | None = None,
    num_neighbors: int | None = None,
    modes: Sequence[str] | None = None,
    window: int | None = None,
    stride: int | None = None,
    batch_size: int = 8,
    seed: int = 0,
    num_resamples: int = 2000,
    show_progress: bool | None = None,
) -> BitsPerByte:
    """Measure bits per byte with retrieval on, off and random, over the very same tokens.

    Every token of every document is scored except its first, for which there is no prediction. Long documents are read
    in windows that overlap, each scoring only tokens that no window before it has scored. Neighbors belong to the chunks
    of the document, so windows begin at chunk borders and a chunk has the same neighbors in every window. What is read
    and scored is the same for all modes; only the neighbors differ.

    Args:
        model ([`RetroForCausalLM`], or for `modes=("off",)` any causal language model): it is put into eval mode while
            measuring.
        documents (iterable of `str`, or of `dict` with `text` and perhaps `id`, such as a `datasets.Dataset`): the
            texts. They should not be in the datastore, nor copies of one another, which would make intervals too narrow:
            [`evaluate`] looks for both. A document whose id is in the datastore gets no neighbors from there.
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]): the model's, a fast one.
        retriever ([`RetroRetriever`] or [`RetroDatastore`], *optional*): where neighbors come from; a datastore alone
            needs `neighbor_chunk_ids`.
        neighbor_chunk_ids (sequence of arrays of shape `(num_chunks, num_neighbors)`, *optional*): chunk ids for the
            complete chunks of each document, to use instead of a search.
        num_neighbors (`int`, *optional*): neighbors per chunk; as many as `neighbor_chunk_ids` has, or the retriever's
            number, by default.
        modes (`Sequence[str]`, *optional*): of `"on"` (retrieved), `"off"` (none) and `"random"` (drawn uniformly from
            the datastore); all three by default, `("off",)` without a retriever.
        window (`int`, *optional*): tokens per row, a multiple of the chunk size; by default what the model has
            positions for, at most 2048.
        stride (`int`, *optional*): tokens between the starts of two windows, a multiple of the chunk size and shorter
            than the window; half a window by default, as in the paper.
        batch_size (`int`, defaults to 8): windows per forward pass.
        seed (`int`, defaults to 0): of random neighbors and of the bootstrap.
        num_resamples (`int`, defaults to 2000): of the bootstrap.
        show_progress (`bool`, *optional*): a progress bar; by default on a terminal only.
    Returns:
        [`BitsPerByte`]: totals, sums per document, and paired intervals.
    Raises:
        DatasetError: if no document has two tokens, or `neighbor_chunk_ids` does not fit the documents.
        DatastoreMismatchError: if the datastore is of another tokenizer or chunk size than the model.
    *Determinism*: the same arguments give the same numbers; `batch_size` moves only the last bits.
    """
    check_numbers(batch_size=(batch_size, 1), num_resamples=(num_resamples, 1), seed=(seed, 0))
    datastore = retriever.datastore if isinstance(retriever, RetroRetriever) else retriever
    modes = tuple(modes or (_MODES if retriever is not None else ("off",)))
    unknown = [mode for mode in modes if mode not in _MODES]
    if unknown:
        raise ValueError(f"Unknown modes {unknown}; there are {list(_MODES)}.")
    if datastore is None and modes != ("off",):
        raise ValueError(f"The modes {list(modes)} need neighbors: pass `retriever=`, or measure `modes=('off',)`.")
    chunk_size = getattr(model.config, "chunk_size", None) or (1 if datastore is None else datastore.chunk_size)
    if datastore is not None:
        datastore.check_compatible(tokenizer=tokenizer, chunk_size=chunk_size)
    window, stride = checked_window(model, window, stride, chunk_size)

    if neighbor_chunk_ids is not None and num_neighbors is None:
        num_neighbors = max((len(row) for rows in neighbor_chunk_ids for row in rows), default=None)
    count = wanted_neighbors(retriever, num_neighbors)
    read = list(read_documents(documents, tokenizer))
    kept = [number for number, document in enumerate(read) if document.num_bytes]
    if not kept:
        raise DatasetError(f"There is nothing to score: no document of {len(read):,} has two tokens.")
    chunk_ids: dict[str, list[np.ndarray]] = {}
    if retriever is not None:
        found = _find_neighbors(read, retriever, modes, neighbor_chunk_ids, count, seed)
        chunk_ids = {mode: [ids[number] for number in kept] for mode, ids in found.items()}
    scored = [read[number] for number in kept]

    windows = cut_windows(scored, window, stride)
    nats = {mode: np.zeros(len(scored)) for mode in modes}
    with (
        progress_bar(show_progress, total=len(windows) * len(modes), unit="window", desc="Scoring") as bar,
        evaluating(model),
    ):
        for first in range(0, len(windows), batch_size):
            rows = windows[first : first + batch_size]
            for mode in modes:
                scores = score_windows(model, scored, rows, chunk_ids.get(mode), datastore, chunk_size)
                sums = [values.sum(dtype=np.float64) for values in scores]
                np.add.at(nats[mode], [row.document for row in rows], sums)
                bar.update(len(rows))
    num_bytes = np.array([document.num_bytes for document in scored])
    differences = {}
    for mode in modes:
        if mode != "off" and "off" in modes:
            bits = (nats[mode] - nats["off"]) / math.log(2)
            differences[mode] = astuple(paired_interval(bits, num_bytes, num_resamples, seed))
    return BitsPerByte(
        nats=nats,
        num_tokens=np.array([document.num_scored for document in scored]),
        num_bytes=num_bytes,
        num_neighbors=0 if datastore is None else count,
        bits_per_byte={mode: float(nats[mode].sum() / num_bytes.sum() / math.log(2)) for mode in modes},
        differences=differences,
    )


def _find_neighbors(
    read: Sequence[Document],
    retriever: RetroRetriever | RetroDatastore,
    modes: Sequence[str],
    given: Sequence[Any] | None,
    count: int,
    seed: int,
) -> dict[str, list[np.ndarray]]:
    """The chunk ids of each mode and document, `(num_complete_chunks, num_neighbors)` each."""
    if given is not None and len(given) != len(read):
        raise DatasetError(f"There are {len(read)} documents, but neighbor_chunk_ids of {len(given)}.")
    datastore = retriever if isinstance(retriever, RetroDatastore) else retriever.datastore
    chunks = [complete_chunks(document.input_ids, datastore.chunk_size) for document in read]
    counts = [len(rows) for rows in chunks]
    if "on" in modes and given is None:
        own = np.repeat(document_numbers(datastore, [document.id for document in read]), counts, axis=0)
        rows = np.concatenate(chunks)
        blocks = [slice(first, first + _SEARCH_BLOCK) for first in range(0, len(rows), _SEARCH_BLOCK)]
        found = [nearest_chunks(retriever, rows[block], count, exclude_documents=own[block]) for block in blocks]
        given = np.split(np.concatenate([*found, np.empty((0, count), dtype=np.int64)]), np.cumsum(counts)[:-1])
    chunk_ids: dict[str, list[np.ndarray]] = {}
    if given is not None and "on" in modes:
        chunk_ids["on"] = []
        for number, rows in enumerate(given):
            # A list of nothing has lost its second axis.
            ids = np.asarray(rows, dtype=np.int64) if len(rows) else np.empty((0, count), np.int64)
            if len(ids) != counts[number]:
                raise DatasetError(
                    f"Document {number} has {counts[number]} complete chunks, but neighbor_chunk_ids of {len(ids)}."
                )
            chunk_ids["on"].append(ids[:, :count])
    if "random" in modes:
        drawn = random_neighbors(datastore, counts, count, seed)
        chunk_ids["random"] = as_many(drawn, chunk_ids["on"]) if "on" in chunk_ids else drawn
    return chunk_ids
