"""What a model makes of each token of some documents: reading them, cutting them into windows, the forward passes."""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from ..datastore import RetroDatastore
from ..errors import DatasetError


if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

__all__ = [
    "Document",
    "Window",
    "check_numbers",
    "checked_window",
    "cut_windows",
    "evaluating",
    "num_complete_chunks",
    "read_documents",
    "reads_neighbors",
    "score_windows",
]

_DEFAULT_WINDOW = 2048


@dataclass(frozen=True)
class Document:
    """A document to score.

    Attributes:
        id (`str`, *optional*): as given.
        text (`str`): as given.
        input_ids (`np.ndarray` of int64 and shape `(num_tokens,)`): without special tokens.
        char_ends, byte_ends (`np.ndarray` of int64 and shape `(num_tokens,)`): how far into the text, in characters and in
            UTF-8 bytes, the document reaches with each token. White space that a tokenizer drops counts to the token
            after it, and a character of several tokens to the first of them.
    """

    id: str | None
    text: str
    input_ids: np.ndarray
    char_ends: np.ndarray
    byte_ends: np.ndarray

    @property
    def num_scored(self) -> int:
        """Tokens that are scored: all but the first, for which there is no prediction."""
        return max(len(self.input_ids) - 1, 0)

    @property
    def num_bytes(self) -> int:
        """Bytes that the scored tokens stand for."""
        return int(self.byte_ends[-1] - self.byte_ends[0]) if self.num_scored else 0


@dataclass(frozen=True)
class Window:
    """A stretch of a document in one row; tokens before `scored_from` are context. Places count from the document's start."""

    document: int
    start: int
    end: int
    scored_from: int


def read_documents(
    documents: Iterable[str | Mapping[str, Any]], tokenizer: PreTrainedTokenizerBase
) -> Iterator[Document]:
    """Tokenize texts, or dicts with a `text` and perhaps an `id`.

    Raises:
        DatasetError: for a tokenizer that is not fast, or a document without a text.
    """
    if isinstance(documents, (str, Mapping)):
        what = "string" if isinstance(documents, str) else "mapping"
        raise DatasetError(f"The documents are one {what}; give a list of texts, or of dicts with a 'text'.")
    if not isinstance(documents, Iterable):
        raise DatasetError(
            f"The documents are of type {type(documents).__name__}; give a list of texts, or of dicts with a 'text'."
        )
    if not getattr(tokenizer, "is_fast", False):
        raise DatasetError("Counting bytes needs a fast tokenizer, one that knows which text each token stands for.")
    for number, record in enumerate(documents):
        text = record.get("text") if isinstance(record, Mapping) else record
        if not isinstance(text, str):
            raise DatasetError(f"Document {number} has no text: pass texts, or dicts with a 'text'.")
        encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
        ends = np.maximum.accumulate([0, *(end for _, end in encoded["offset_mapping"])])[1:]
        sizes = np.cumsum([0, *(len(letter.encode("utf-8", "surrogatepass")) for letter in text)])
        id = record.get("id") if isinstance(record, Mapping) else None
        yield Document(
            None if id is None else str(id), text, np.array(encoded["input_ids"], dtype=np.int64), ends, sizes[ends]
        )


def num_complete_chunks(document: Document, chunk_size: int) -> int:
    """Chunks of a document for which neighbors are looked up; a short last one is never completed."""
    return len(document.input_ids) // chunk_size


def check_numbers(**numbers: tuple[int, int]) -> None:
    """Check that each number is an integer and not below its least value, the second of the pair.

    Raises:
        ValueError: for the first that is.
    """
    for name, (value, least) in numbers.items():
        if isinstance(value, bool) or not isinstance(value, (int, np.integer)) or value < least:
            raise ValueError(f"{name} is {value!r}, but it must be an integer of at least {least}.")


def checked_window(model: PreTrainedModel, window: int | None, stride: int | None, chunk_size: int) -> tuple[int, int]:
    """Tokens per window and between the starts of two windows, by default what the model has room for, and half of it.

    Raises:
        ValueError: if a window is longer than the model has positions, or would not begin at a chunk border, or with a token
            that was not scored before.
    """
    for name, value in (("window", window), ("stride", stride)):
        if isinstance(value, bool) or not isinstance(value, (int, np.integer, type(None))):
            raise ValueError(f"{name} is {value!r}, but it must be a whole number of tokens.")
    limit = getattr(model.config, "max_position_embeddings", None) or _DEFAULT_WINDOW
    if window is None:
        window = max(1, min(limit, _DEFAULT_WINDOW) // chunk_size) * chunk_size
    if stride is None:
        stride = max(1, window // 2 // chunk_size) * chunk_size
    for name, value, least in (("window", window, 2 * chunk_size), ("stride", stride, chunk_size)):
        below = max(least, value // chunk_size * chunk_size)
        if value != below:
            near = f"{below} or {below + chunk_size}" if below < value else f"{below}"
            raise ValueError(
                f"{name}={value} must be a multiple of the chunk size {chunk_size}, from {least} on, so that every window "
                f"begins at a chunk border of its document. Use {near}."
            )
    most = getattr(model.config, "max_position_embeddings", None) or window
    if window > most:
        raise ValueError(
            f"window={window} is more than the {most} positions that the model has (max_position_embeddings). Use at most "
            f"{most // chunk_size * chunk_size}."
        )
    if stride >= window:
        raise ValueError(
            f"stride={stride} must be shorter than window={window}, so that the first token of a window has been scored "
            f"before. Use at most {window - chunk_size}."
        )
    return window, stride


def cut_windows(documents: Sequence[Document], window: int, stride: int) -> list[Window]:
    """The windows that score every token of every document but its first exactly once.

    Rows of one length need no padding, so they come sorted; the longest first, where running out of memory costs least.
    """
    windows = []
    for number, document in enumerate(documents):
        length, scored, start = len(document.input_ids), 1, 0
        while scored < length:
            end = min(start + window, length)
            windows.append(Window(number, start, end, scored))
            scored, start = end, start + stride
    return sorted(windows, key=lambda part: part.start - part.end)


def reads_neighbors(model: PreTrainedModel) -> bool:
    """Whether a model has an input for neighbors."""
    return "neighbor_input_ids" in inspect.signature(model.forward).parameters


@contextmanager
def evaluating(model: PreTrainedModel) -> Iterator[None]:
    """Put a model into eval mode, and back."""
    was_training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(was_training)


@torch.inference_mode()
def score_windows(
    model: PreTrainedModel,
    documents: Sequence[Document],
    rows: Sequence[Window],
    chunk_ids: Sequence[np.ndarray] | None,
    datastore: RetroDatastore | None,
    chunk_size: int,
) -> list[np.ndarray]:
    """Negative log-likelihood of the scored tokens of each window, in nats.

    Args:
        documents (`Sequence[Document]`): that the windows refer to.
        rows (`Sequence[Window]`): windows of one forward pass.
        chunk_ids (`Sequence` of int64 arrays of shape `(num_complete_chunks, num_neighbors)`, *optional*): for each document
            the neighbors of its chunks, -1 for none; without them retrieval is off.
        datastore ([`RetroDatastore`], *optional*): that the chunk ids belong to.
        chunk_size (`int`): of the model.
    Returns:
        `list` of float32 arrays: one value per scored token of each window.
    """
    length = max(row.end - row.start for row in rows)
    input_ids = np.zeros((len(rows), length), dtype=np.int64)
    attention_mask = np.zeros_like(input_ids)
    for place, row in enumerate(rows):
        input_ids[place, : row.end - row.start] = documents[row.document].input_ids[row.start : row.end]
        attention_mask[place, : row.end - row.start] = 1
    tensors = {"input_ids": input_ids, "attention_mask": attention_mask}
    if chunk_ids is not None and datastore is not None and length >= chunk_size:
        found = [chunk_ids[row.document][row.start // chunk_size : row.end // chunk_size] for row in rows]
        padded = np.full((len(rows), length // chunk_size, found[0].shape[1]), -1, dtype=np.int64)
        for place, ids in enumerate(found):
            padded[place, : len(ids)] = ids
        tensors["neighbor_input_ids"], tensors["neighbor_attention_mask"] = datastore.gather(padded)
    inputs: dict[str, Any] = {name: torch.from_numpy(values).to(model.device) for name, values in tensors.items()}
    if "retriever" in inspect.signature(model.forward).parameters:
        # One that is attached must not supply neighbors where none are meant.
        inputs["retriever"] = None
    logits = model(**inputs, use_cache=False).logits
    scores = []
    for place, row in enumerate(rows):
        first, last = row.scored_from - row.start, row.end - row.start
        # Row by row: float32 copies of the logits of a whole batch may not fit.
        loss = torch.nn.functional.cross_entropy(
            logits[place, first - 1 : last - 1].float(), inputs["input_ids"][place, first:last], reduction="none"
        )
        scores.append(loss.cpu().numpy())
    return scores
