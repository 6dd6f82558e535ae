"""Bits per byte of a language model with found, random and no neighbors, on the same tokens of the same documents."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import astuple, dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from ..arguments import listed, numbers, whole
from ..datastore import RetroDatastore
from ..datastore.bos_eos import Borders
from ..errors import DatasetError, counted
from ..retriever import RetroRetriever
from ..training.search import datastore_of, wanted_neighbors
from ..unwrapped import unwrapped
from .interval import Bootstrap, checked_resamples
from .neighbors import Chunks, NeighborIds, NeighborSearch, Run, check_modes, random_neighbors
from .scoring import ScoringOptions, chunk_size_of, read_documents, score_runs


if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

_MODES = ("on", "off", "random")


@dataclass(frozen=True)
class BitsPerByte:
    """What [`bits_per_byte`] measured; `print` shows it as a table.

    Attributes:
        nats (`dict[str, np.ndarray]`): per mode the negative log-likelihood of each document's scored tokens, float64 of
            shape `(num_documents,)`.
        num_tokens, num_bytes (`np.ndarray` of int64 and shape `(num_documents,)`): scored tokens of each document, and
            the UTF-8 bytes of their text; the same for all modes.
        num_neighbors (`int`): neighbors per chunk.
        bits_per_byte (`dict[str, float]`): per mode, over all documents.
        differences (`dict[str, tuple[float, float, float]]`): for each mode but `off`, its bits per byte minus those of
            `off` (negative is better) and the ends of the 95 % interval, from a paired bootstrap over documents; NaN for
            fewer than two documents.
    """

    nats: dict[str, np.ndarray]
    num_tokens: np.ndarray
    num_bytes: np.ndarray
    num_neighbors: int
    bits_per_byte: dict[str, float]
    differences: dict[str, tuple[float, float, float]]

    def to_dict(self) -> dict[str, Any]:
        """The totals as plain numbers, for JSON."""
        names = ("difference", "low", "high")
        return {
            "bits_per_byte": dict(self.bits_per_byte),
            "difference_to_off": {
                mode: dict(zip(names, values, strict=True)) for mode, values in self.differences.items()
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
    add_bos: bool | None = None,
    add_eos: bool = False,
    batch_size: int = 8,
    seed: int = 0,
    num_resamples: int = 2000,
    show_progress: bool | None = None,
) -> BitsPerByte:
    """Measure bits per byte with retrieval on, off and random, over the same tokens.

    Every token of every document is scored except its first, which nothing predicts. Long documents are read in
    overlapping windows, each of which scores only tokens that no window before it has scored. Neighbors belong to the
    chunks of the document, so windows begin at chunk borders and a chunk has the same neighbors in every window. All modes
    read and score the same tokens; only the neighbors differ.

    Args:
        model ([`RetroForCausalLM`], or for `modes=("off",)` any causal language model): put into eval mode while measuring.
        documents (iterable of `str`, or of `dict` with `text` and optionally `id`, such as a `datasets.Dataset`): the
            texts. They should not be in the datastore, nor copies of one another, which would make intervals too narrow;
            [`evaluate`] checks both. A document whose id is in the datastore gets no neighbors from there.
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]): the model's fast tokenizer.
        retriever ([`RetroRetriever`] or [`RetroDatastore`], *optional*): finds the neighbors. A datastore alone needs
            `neighbor_chunk_ids`.
        neighbor_chunk_ids (sequence of arrays of shape `(num_chunks, num_neighbors)`, *optional*): chunk ids for the
            complete chunks of each document, instead of a search.
        num_neighbors (`int`, *optional*): neighbors per chunk; by default as many as `neighbor_chunk_ids` has, or the
            retriever's number.
        modes (`Sequence[str]`, *optional*): of `"on"` (found), `"off"` (none) and `"random"` (random chunks of the
            datastore); by default all three, or `("off",)` without a retriever.
        window (`int`, *optional*): tokens per row, a multiple of the chunk size; by default the model's context, at most
            2048.
        stride (`int`, *optional*): tokens between the starts of two windows, a multiple of the chunk size and shorter
            than the window; by default half a window, as in the paper.
        add_bos (`bool`, *optional*): whether a document begins with the begin-of-text token, after which its first token is
            scored, too; by default if the tokenizer puts one before a prompt.
        add_eos (`bool`, defaults to `False`): whether the end-of-text token is scored behind each document. It counts as a
            token without bytes, so results are not comparable with those of texts alone.
        batch_size (`int`, defaults to 8): windows per forward pass.
        seed (`int`, defaults to 0): seed of random neighbors and of the bootstrap.
        num_resamples (`int`, defaults to 2000): draws of the bootstrap.
        show_progress (`bool`, *optional*): whether to show progress bars; by default only on a terminal.
    Returns:
        [`BitsPerByte`]: totals, sums per document, and paired intervals.
    Raises:
        DatasetError: if no document has two tokens, or `neighbor_chunk_ids` does not fit the documents.
        DatastoreMismatchError: if the datastore has another tokenizer or chunk size than the model.
        ValueError: for unknown modes, or settings out of range.
    *Determinism*: the same arguments give the same numbers; `batch_size` moves only the last bits.
    """
    batch_size = whole("batch_size", batch_size, ValueError)
    num_resamples, seed = checked_resamples(num_resamples, seed)
    datastore = None if retriever is None else datastore_of(retriever)
    modes = (("off",) if retriever is None else _MODES) if modes is None else modes
    modes = check_modes(modes, _MODES, has_neighbors=retriever is not None)
    model = unwrapped(model)
    chunk_size = chunk_size_of(model, datastore)
    if datastore is not None:
        datastore.check_compatible(tokenizer=tokenizer, chunk_size=chunk_size)
    options = ScoringOptions.checked(
        model, chunk_size, window, stride, batch_size=batch_size, show_progress=show_progress
    )
    ids = None if neighbor_chunk_ids is None else _checked_ids(neighbor_chunk_ids, datastore)
    if ids and num_neighbors is None:
        num_neighbors = max((rows.shape[1] for rows in ids if len(rows)), default=None)
    count = wanted_neighbors(retriever, num_neighbors)

    borders = Borders.of(tokenizer, add_bos, add_eos)
    read = list(read_documents(documents, tokenizer, borders))
    kept = [number for number, document in enumerate(read) if document.num_bytes]
    if not kept:
        raise DatasetError(f"There is nothing to score: none of {counted(len(read), 'document')} has two tokens.")
    scored = [read[number] for number in kept]
    given: dict[str, NeighborIds | None] = {"off": None}
    if datastore is not None:
        chunks = Chunks.of(scored, chunk_size)
        # Without ON there is nothing to search, and RANDOM fills every place.
        found = [np.zeros((num_chunks, count), dtype=np.int64) for num_chunks in chunks.complete]
        if ids is not None:
            if len(ids) != len(read):
                raise DatasetError(f"There are {len(read)} documents, but neighbor_chunk_ids has {len(ids)}.")
            found = [_first_columns(ids[number], rows.shape) for number, rows in zip(kept, found, strict=True)]
        elif "on" in modes:
            if not isinstance(retriever, RetroRetriever):
                raise DatasetError(
                    "A datastore alone cannot search for text. Pass a RetroRetriever, or `neighbor_chunk_ids=`."
                )
            search = NeighborSearch(retriever, scored, chunks, show_progress=show_progress)
            found = chunks.complete_by_document(search.nearest(count))
        given |= {"on": found, "random": random_neighbors(datastore, found, seed)}

    nats = score_runs(model, scored, [Run(mode, given[mode], count) for mode in modes], datastore, options)
    num_tokens = np.array([document.num_scored for document in scored])
    owners = np.repeat(np.arange(len(scored)), num_tokens)
    sums = {mode: np.bincount(owners, weights=nats[mode].astype(np.float64)) for mode in modes}
    num_bytes = np.array([document.num_bytes for document in scored])
    differences = {}
    for mode in modes:
        if mode != "off" and "off" in modes:
            bits = (sums[mode] - sums["off"]) / math.log(2)
            differences[mode] = astuple(Bootstrap(num_resamples, seed).interval(bits, num_bytes))
    return BitsPerByte(
        nats=sums,
        num_tokens=num_tokens,
        num_bytes=num_bytes,
        num_neighbors=0 if datastore is None else count,
        bits_per_byte={mode: float(sums[mode].sum() / num_bytes.sum() / math.log(2)) for mode in modes},
        differences=differences,
    )


def _checked_ids(given: Any, datastore: RetroDatastore | None) -> NeighborIds:
    """Given chunk ids as one int64 array of two dimensions per document."""
    if datastore is None:
        raise DatasetError("neighbor_chunk_ids are chunks of a datastore. Pass it, too: `retriever=`.")
    documents, found = listed(given), []
    for number, rows in enumerate([given] if documents is None else documents):
        ids = numbers(f"neighbor_chunk_ids of document {number}", rows, DatasetError, -1, datastore.num_chunks - 1)
        if ids.ndim != 2 and ids.size:
            raise DatasetError(
                f"neighbor_chunk_ids of document {number} are of shape {ids.shape}. Pass for each document integers of shape "
                "(num_chunks, num_neighbors)."
            )
        found.append(ids if ids.ndim == 2 else np.empty((0, 0), dtype=np.int64))  # an empty list has lost an axis
    return found


def _first_columns(ids: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """Given chunk ids of a document, of the shape `(num_chunks, num_neighbors)` that it needs."""
    if len(ids) != shape[0] or (len(ids) and ids.shape[1] < shape[1]):
        raise DatasetError(
            f"A document has {shape[0]} complete chunks with {shape[1]} neighbors each, but neighbor_chunk_ids are of shape "
            f"{ids.shape} for it."
        )
    return ids[:, : shape[1]] if len(ids) else np.empty(shape, dtype=np.int64)
