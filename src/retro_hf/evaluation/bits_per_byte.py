"""Bits per byte of a language model with real, random and no neighbors, on the same tokens of the same documents."""

from __future__ import annotations

import inspect
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from transformers.utils import logging

from ..datastore import RetroDatastore
from ..errors import DatasetError, counted
from ..retrieval_retro import RetroRetriever
from ..training.leakage import document_numbers
from ..training.neighbors import complete_chunks, nearest_chunks, wanted_neighbors


if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

__all__ = ["BitsPerByte", "bits_per_byte"]

_MODES = ("on", "off", "random")
_DEFAULT_WINDOW = 2048
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


@dataclass
class _Document:
    """One document: its tokens, the byte its text reaches with each, and the chunk ids of its neighbors per mode."""

    input_ids: np.ndarray
    byte_ends: np.ndarray
    chunk_ids: dict[str, np.ndarray]


@dataclass(frozen=True)
class _Window:
    """A stretch of a document in one row; tokens before `scored_from` are context."""

    document: int
    start: int
    end: int
    scored_from: int


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
            texts. They should not be in the datastore; a document whose id is in it gets no neighbors from there.
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
    if isinstance(documents, str):
        raise DatasetError("`documents` is one string; give a list of texts: `bits_per_byte(model, [text], ...)`.")
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
    window, stride = _checked_window(model, window, stride, chunk_size)

    if neighbor_chunk_ids is not None and num_neighbors is None:
        num_neighbors = max((len(row) for rows in neighbor_chunk_ids for row in rows), default=None)
    count = wanted_neighbors(retriever, num_neighbors)
    read = list(_read(documents, tokenizer))
    if not any(len(document.input_ids) > 1 for document, _ in read):
        raise DatasetError(f"There is nothing to score: no document of {len(read):,} has two tokens.")
    if retriever is not None:
        _find_neighbors(read, retriever, modes, neighbor_chunk_ids, count, seed)
    kept = [document for document, _ in read if len(document.input_ids) > 1]

    windows = [part for number, document in enumerate(kept) for part in _cut(number, document, window, stride)]
    # Rows of one length need no padding; the longest come first, where running out of memory costs least.
    windows.sort(key=lambda part: part.start - part.end)
    nats = {mode: np.zeros(len(kept)) for mode in modes}
    total = len(windows) * len(modes)
    bar = logging.tqdm(
        total=total, unit="window", desc="Scoring", disable=None if show_progress is None else not show_progress
    )
    was_training = model.training
    model.eval()
    try:
        for first in range(0, len(windows), batch_size):
            rows = windows[first : first + batch_size]
            for mode in modes:
                scores = _score(model, kept, rows, None if mode == "off" else mode, datastore, chunk_size)
                np.add.at(nats[mode], [row.document for row in rows], scores)
                bar.update(len(rows))
    finally:
        bar.close()
        model.train(was_training)
    num_bytes = np.array([document.byte_ends[-1] - document.byte_ends[0] for document in kept])
    return BitsPerByte(
        nats=nats,
        num_tokens=np.array([len(document.input_ids) - 1 for document in kept]),
        num_bytes=num_bytes,
        num_neighbors=0 if datastore is None else count,
        bits_per_byte={mode: float(nats[mode].sum() / num_bytes.sum() / math.log(2)) for mode in modes},
        differences={
            mode: _paired_interval(nats[mode] - nats["off"], num_bytes, num_resamples, seed)
            for mode in modes
            if mode != "off" and "off" in modes
        },
    )


def _checked_window(
    model: PreTrainedModel, window: int | None, stride: int | None, chunk_size: int
) -> tuple[int, int]:
    limit = getattr(model.config, "max_position_embeddings", None) or _DEFAULT_WINDOW
    window = window or max(1, min(limit, _DEFAULT_WINDOW) // chunk_size) * chunk_size
    stride = stride or max(1, window // 2 // chunk_size) * chunk_size
    if window % chunk_size or stride % chunk_size or not 0 < stride < window:
        raise ValueError(
            f"window={window} and stride={stride} must be multiples of the chunk size {chunk_size}, so that a window begins "
            "at a chunk border of its document, and the stride shorter than the window, so that its first token has been "
            "scored before."
        )
    return window, stride


def _read(
    documents: Iterable[str | Mapping[str, Any]], tokenizer: PreTrainedTokenizerBase
) -> Iterator[tuple[_Document, Any]]:
    """Tokenize documents; yields each with its id, None if it has none."""
    if not tokenizer.is_fast:
        raise DatasetError("Counting bytes needs a fast tokenizer, one that knows which text each token stands for.")
    for number, record in enumerate(documents):
        text = record if isinstance(record, str) else record.get("text")
        if not isinstance(text, str):
            raise DatasetError(f"Document {number} has no text: pass texts, or dicts with a 'text'.")
        encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
        # What a token adds to the text up to its end; white space that a tokenizer drops counts to the token after it,
        # and a character of several tokens to the first of them.
        ends = np.maximum.accumulate([0, *(end for _, end in encoded["offset_mapping"])])[1:]
        sizes = np.cumsum([0, *(len(letter.encode("utf-8", "surrogatepass")) for letter in text)])
        ids = np.array(encoded["input_ids"], dtype=np.int64)
        yield _Document(ids, sizes[ends], {}), None if isinstance(record, str) else record.get("id")


def _find_neighbors(
    read: Sequence[tuple[_Document, Any]],
    retriever: RetroRetriever | RetroDatastore,
    modes: Sequence[str],
    given: Sequence[Any] | None,
    count: int,
    seed: int,
) -> None:
    """Set the chunk ids of every document and mode, `(num_chunks, num_neighbors)` each."""
    if given is not None and len(given) != len(read):
        raise DatasetError(f"There are {len(read)} documents, but neighbor_chunk_ids of {len(given)}.")
    datastore = retriever if isinstance(retriever, RetroDatastore) else retriever.datastore
    chunks = [complete_chunks(document.input_ids, datastore.chunk_size) for document, _ in read]
    counts = [len(rows) for rows in chunks]
    if "on" in modes and given is None:
        own = np.repeat(document_numbers(datastore, [id for _, id in read]), counts, axis=0)
        rows = np.concatenate(chunks)
        blocks = [slice(first, first + _SEARCH_BLOCK) for first in range(0, len(rows), _SEARCH_BLOCK)]
        found = [nearest_chunks(retriever, rows[block], count, exclude_documents=own[block]) for block in blocks]
        given = np.split(np.concatenate([*found, np.empty((0, count), dtype=np.int64)]), np.cumsum(counts)[:-1])
    for number, (document, _) in enumerate(read):
        if "on" in modes and given is not None:
            # A list of nothing has lost its second axis.
            ids = np.asarray(given[number], dtype=np.int64) if len(given[number]) else np.empty((0, count), np.int64)
            if len(ids) != counts[number]:
                raise DatasetError(
                    f"Document {number} has {counts[number]} complete chunks, but neighbor_chunk_ids of {len(ids)}."
                )
            document.chunk_ids["on"] = ids[:, :count]
        if "random" in modes:
            generator = np.random.default_rng([seed, number])
            document.chunk_ids["random"] = datastore.random_chunks(generator, (counts[number], count))


def _cut(number: int, document: _Document, window: int, stride: int) -> Iterator[_Window]:
    length, scored, start = len(document.input_ids), 1, 0
    while scored < length:
        end = min(start + window, length)
        yield _Window(number, start, end, scored)
        scored, start = end, start + stride


@torch.inference_mode()
def _score(
    model: PreTrainedModel,
    documents: Sequence[_Document],
    rows: Sequence[_Window],
    mode: str | None,
    datastore: RetroDatastore | None,
    chunk_size: int,
) -> list[float]:
    """Negative log-likelihood of the scored tokens of each window, in nats."""
    length = max(row.end - row.start for row in rows)
    input_ids = np.zeros((len(rows), length), dtype=np.int64)
    attention_mask = np.zeros_like(input_ids)
    for place, row in enumerate(rows):
        input_ids[place, : row.end - row.start] = documents[row.document].input_ids[row.start : row.end]
        attention_mask[place, : row.end - row.start] = 1
    tensors = {"input_ids": input_ids, "attention_mask": attention_mask}
    if mode is not None and datastore is not None and length >= chunk_size:
        found = [
            documents[row.document].chunk_ids[mode][row.start // chunk_size : row.end // chunk_size] for row in rows
        ]
        chunk_ids = np.full((len(rows), length // chunk_size, found[0].shape[1]), -1, dtype=np.int64)
        for place, ids in enumerate(found):
            chunk_ids[place, : len(ids)] = ids
        tensors["neighbor_input_ids"], tensors["neighbor_attention_mask"] = datastore.gather(chunk_ids)
    inputs: dict[str, Any] = {name: torch.from_numpy(values).to(model.device) for name, values in tensors.items()}
    if "retriever" in inspect.signature(model.forward).parameters:
        # One that is attached must not supply neighbors where none are meant.
        inputs["retriever"] = None
    logits = model(**inputs, use_cache=False).logits
    sums = []
    for place, row in enumerate(rows):
        first, last = row.scored_from - row.start, row.end - row.start
        # Row by row: float32 copies of the logits of a whole batch may not fit.
        loss = torch.nn.functional.cross_entropy(
            logits[place, first - 1 : last - 1].float(), inputs["input_ids"][place, first:last], reduction="none"
        )
        sums.append(float(loss.double().sum()))
    return sums


def _paired_interval(
    differences: np.ndarray, num_bytes: np.ndarray, num_resamples: int, seed: int
) -> tuple[float, float, float]:
    """Difference in bits per byte, and the 95 % interval over documents drawn again with replacement."""
    bits = differences / math.log(2)
    value = float(bits.sum() / num_bytes.sum())
    if len(bits) < 2:
        return value, math.nan, math.nan
    generator = np.random.default_rng(seed)
    drawn = [generator.integers(len(bits), size=len(bits)) for _ in range(num_resamples)]
    low, high = np.quantile([bits[rows].sum() / num_bytes[rows].sum() for rows in drawn], (0.025, 0.975))
    return value, float(low), float(high)
