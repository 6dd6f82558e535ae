"""Scoring documents with a model: reading them, cutting them into windows, and the loop of forward passes."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch

from ..arguments import whole
from ..datastore import RetroDatastore
from ..datastore.atomic_files import digest_of
from ..datastore.bos_eos import Borders
from ..datastore.chunks import padded
from ..datastore.documents import is_missing, known_id, without_lone_surrogates
from ..errors import DatasetError
from ..model.backbone_retro import accepted_arguments
from ..progress import progress_bar
from ..special_tokens import tokenize_texts
from .cache import ArrayCache


if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from .neighbors import Run

_DEFAULT_WINDOW = 2048
_NO_BORDERS = Borders()


@dataclass(frozen=True)
class TokenizedDocument:
    """A document to score.

    Attributes:
        id (`str`, *optional*): as given.
        text (`str`): as given.
        input_ids (`np.ndarray` of int64 and shape `(num_tokens,)`): token ids, between the begin-of-text and end-of-text tokens
            that were asked for, which have no bytes.
        has_bos (`bool`): whether they begin with the begin-of-text token.
        char_ends, byte_ends (`np.ndarray` of int64 and shape `(num_tokens,)`): end of each token in the text, in
            characters and in UTF-8 bytes. White space that the tokenizer drops belongs to the token after it. A
            character made of several tokens belongs to the first of them.
    """

    id: str | None
    text: str
    input_ids: np.ndarray
    char_ends: np.ndarray
    byte_ends: np.ndarray
    has_bos: bool = False

    @property
    def num_scored(self) -> int:
        """Number of scored tokens: all but the first, which nothing predicts."""
        return max(len(self.input_ids) - 1, 0)

    @property
    def num_bytes(self) -> int:
        """Number of UTF-8 bytes of the scored tokens."""
        return int(self.byte_ends[-1] - self.byte_ends[0]) if self.num_scored else 0

    @property
    def token_texts(self) -> list[str]:
        """The part of the text that each token covers. A token decoded on its own could lose a space or half a letter."""
        starts = [0, *self.char_ends.tolist()]
        return [self.text[start:end] for start, end in zip(starts, self.char_ends.tolist(), strict=False)]


@dataclass(frozen=True)
class ScoringOptions:
    """How documents are scored.

    Attributes:
        window, stride (`int`): tokens per row, and tokens between the starts of two rows of a document.
        batch_size (`int`): rows per forward pass.
        show_progress (`bool`, *optional*): whether to show a progress bar; by default only on a terminal.
        cache ([`ArrayCache`]): where the scores of each batch are kept.
        identity (`str`): everything that scores depend on, except token ids and chunk ids.
    """

    window: int
    stride: int
    batch_size: int
    show_progress: bool | None = None
    cache: ArrayCache = field(default_factory=ArrayCache)
    identity: str = ""

    @classmethod
    def checked(
        cls, model: PreTrainedModel, chunk_size: int, window: int | None, stride: int | None, **options: Any
    ) -> ScoringOptions:
        """Options with defaults filled in: the window that the model has room for, and half of it as the stride.

        Raises:
            ValueError: if the window is longer than the model's context, or windows would not begin at chunk borders, or
                the first token of a window would not have been scored before.
        """
        limit = getattr(model.config, "max_position_embeddings", None)
        if window is None:
            window = max(1, min(limit or _DEFAULT_WINDOW, _DEFAULT_WINDOW) // chunk_size) * chunk_size
        window = whole("window", window, ValueError)
        if stride is None:
            stride = max(1, window // 2 // chunk_size) * chunk_size
        stride = whole("stride", stride, ValueError)
        for name, value, least in (("window", window, 2 * chunk_size), ("stride", stride, chunk_size)):
            if value % chunk_size or value < least:
                raise ValueError(
                    f"{name} is {value}, but it must be a multiple of the chunk size {chunk_size} and at least {least}, so "
                    f"that every window begins at a chunk border. Use {max(least, value // chunk_size * chunk_size)}."
                )
        if limit and window > limit:
            raise ValueError(
                f"window is {window}, but the model is made for {limit} tokens (`max_position_embeddings`). Use at most "
                f"{limit // chunk_size * chunk_size}."
            )
        if stride >= window:
            raise ValueError(
                f"stride is {stride}, but it must be shorter than window={window}, so that the first token of a window has "
                f"been scored before. Use at most {window - chunk_size}."
            )
        return cls(window, stride, **options)


class Row(NamedTuple):
    """Tokens that a model reads together, and how many of the last ones are scored.

    Args:
        input_ids (`np.ndarray` of int64 and shape `(length,)`): token ids.
        num_scored (`int`): the tokens at the end of the row that are scored; those before them are context.
        place (`int`): place of the first scored token among the scored tokens of all documents.
        chunk_ids (`np.ndarray` of int64 and shape `(num_chunks, num_neighbors)`, *optional*): neighbors of the row's
            complete chunks; without them retrieval is off.
    """

    input_ids: np.ndarray
    num_scored: int
    place: int
    chunk_ids: np.ndarray | None = None


@dataclass(frozen=True)
class _Window:
    """Tokens `start` to `end` of a document in one row; those before `scored_from` are context only."""

    document: int
    start: int
    end: int
    scored_from: int


def read_documents(
    documents: Iterable[str | Mapping[str, Any]], tokenizer: PreTrainedTokenizerBase, borders: Borders = _NO_BORDERS
) -> Iterator[TokenizedDocument]:
    """Tokenize documents and find the text of each token.

    Args:
        documents (iterable of `str`, or of `dict` with `text` and optionally `id`): the texts.
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]): a fast tokenizer.
        borders ([`Borders`]): the tokens before and after each document.
    Raises:
        DatasetError: if the tokenizer cannot map tokens to text, or a document has no text.
    """
    has_none = (
        isinstance(documents, torch.Tensor) or getattr(documents, "ndim", 1) == 0
    )  # or an array without dimensions
    if isinstance(documents, (str, Mapping)) or not isinstance(documents, Iterable) or has_none:
        raise DatasetError(
            f"The documents are of type {type(documents).__name__}, but they must be a list of texts or of dicts with a "
            "'text'. Put a single document into a list."
        )
    if not getattr(tokenizer, "is_fast", False):
        raise DatasetError(
            "Only a fast tokenizer can tell which text a token stands for. Pass one with `is_fast=True`."
        )
    for number, record in enumerate(documents):
        fields = record if isinstance(record, Mapping) else {"text": record}
        text, id = fields.get("text"), fields.get("id")
        if "text" in fields and is_missing(text):
            text = ""
        if not isinstance(text, str):
            raise DatasetError(f"Document {number} has no text. Pass texts, or dicts with a 'text'.")
        text = without_lone_surrogates(text)  # as in a datastore
        (tokens,), spans = tokenize_texts(tokenizer, [text])
        # With the largest end so far every byte counts once, also where several tokens are parts of one character.
        ends = np.maximum.accumulate([0, *(end for _, end in (spans or [[]])[0])])[1:]
        sizes = np.cumsum([0, *(len(letter.encode()) for letter in text)])
        around = borders if tokens else _NO_BORDERS
        input_ids = np.array(around.around(tokens), dtype=np.int64)
        last = ends[-1:] if len(around.end) else ends[:0]
        ends = np.concatenate([np.zeros(len(around.begin), dtype=np.int64), ends, last])
        yield TokenizedDocument(known_id(id), text, input_ids, ends, sizes[ends], bool(around.begin))


def accepts(model: PreTrainedModel, argument: str) -> bool:
    """Whether the forward pass of a model has an argument of this name."""
    check_model(model)
    return argument in accepted_arguments(model)


def check_model(model: Any) -> None:
    """Raise ValueError for what is no model."""
    if not hasattr(model, "forward") or not hasattr(model, "config"):
        raise ValueError(f"The model is of type {type(model).__name__}. Pass a causal language model of transformers.")


def chunk_size_of(model: PreTrainedModel, datastore: RetroDatastore | None = None) -> int:
    """Tokens per chunk of a RETRO model. Any other model is scored in the datastore's chunks, or without chunks."""
    check_model(model)
    return getattr(model.config, "chunk_size", None) or (1 if datastore is None else datastore.chunk_size)


@contextmanager
def evaluating(model: PreTrainedModel) -> Iterator[None]:
    """Put a model into eval mode without gradients, and restore its mode afterwards."""
    was_training = model.training
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        model.train(was_training)


def token_nats(
    model: PreTrainedModel, inputs: Mapping[str, np.ndarray], spans: Sequence[tuple[int, int]]
) -> list[np.ndarray]:
    """Negative log-likelihood of some tokens of each row, in nats, from one forward pass.

    Args:
        inputs (`dict` of `np.ndarray`): arguments of the forward pass, with `input_ids` of shape `(num_rows, length)`.
        spans (`Sequence[tuple[int, int]]`): for each row the first token to score, at least 1, and the end.
    Returns:
        `list` of float32 arrays of shape `(end - first,)`.
    """
    tensors: dict[str, Any] = {name: torch.from_numpy(values).to(model.device) for name, values in inputs.items()}
    ids = tensors["input_ids"]
    if accepts(model, "retriever"):
        # An attached retriever must not add neighbors of its own.
        tensors["retriever"] = None
    # The logits at a place predict the next token, so those for token t are at t - 1.
    logits = model(**tensors, use_cache=False).logits
    # Row by row, because float32 copies of the logits of a whole batch may not fit into memory.
    rows = [
        torch.nn.functional.cross_entropy(
            logits[row, first - 1 : end - 1].float(), ids[row, first:end], reduction="none"
        )
        for row, (first, end) in enumerate(spans)
    ]
    return [row.cpu().numpy() for row in rows]


def score_runs(
    model: PreTrainedModel,
    documents: Sequence[TokenizedDocument],
    runs: Sequence[Run],
    datastore: RetroDatastore | None,
    options: ScoringOptions,
) -> dict[str, np.ndarray]:
    """Negative log-likelihood of every scored token in every run, in nats.

    Returns:
        `dict[str, np.ndarray]`: for each run float32 of shape `(num_tokens,)`, document after document.
    Raises:
        ValueError: if a prediction is not a finite number.
    """
    # Two runs with the same neighbors, such as `on` and a point of a sweep, are scored once.
    same = {
        run.name: digest_of(*(b"%d " % ids.shape[1] + ids.tobytes() for ids in run.chunk_ids or ())) for run in runs
    }
    first_of = {digest: name for name, digest in reversed(same.items())}
    size = 1 if datastore is None else datastore.chunk_size
    starts = np.cumsum([0, *(document.num_scored for document in documents)]).tolist()
    windows = cut_windows(documents, options.window, options.stride)
    rows, nats = {}, {}
    for run in runs:
        if first_of[same[run.name]] != run.name:
            continue
        nats[run.name] = np.zeros(starts[-1], dtype=np.float32)
        rows[run.name] = [
            Row(
                documents[part.document].input_ids[part.start : part.end],
                part.end - part.scored_from,
                # A document's first token is not scored, so the table has one place less than the document has tokens.
                starts[part.document] + part.scored_from - 1,
                # Windows begin at chunk borders, so a chunk has the same neighbors in every window.
                None if run.chunk_ids is None else run.chunk_ids[part.document][part.start // size : part.end // size],
            )
            for part in windows
        ]
    score_rows(model, rows, nats, datastore, options)
    return {run.name: nats[first_of[same[run.name]]] for run in runs}


def score_rows(
    model: PreTrainedModel,
    rows: Mapping[str, Sequence[Row]],
    nats: Mapping[str, np.ndarray],
    datastore: RetroDatastore | None,
    options: ScoringOptions,
) -> None:
    """Write the nats of all scored tokens of some rows to their places; the loop of every measurement.

    Args:
        rows (`dict[str, Sequence[Row]]`): by the name of the run; rows of similar length next to each other need little padding.
        nats (`dict[str, np.ndarray]` of float32 and shape `(num_tokens,)`): by the name of the run; changed in place.
    Raises:
        ValueError: if a prediction is not a finite number.
    """
    total = sum(map(len, rows.values()))
    with progress_bar(options.show_progress, total=total, unit="row", desc="Scoring") as bar, evaluating(model):
        for name, part in rows.items():
            for first in range(0, len(part), options.batch_size):
                batch = part[first : first + options.batch_size]
                places = np.concatenate([np.arange(row.place, row.place + row.num_scored) for row in batch])
                width = 0 if batch[0].chunk_ids is None else batch[0].chunk_ids.shape[1]
                key: list[str | bytes] = [options.identity, f"{width}", *(row.input_ids.tobytes() for row in batch)]
                key += [f"{len(row.input_ids) - row.num_scored}" for row in batch]
                key += [b"" if row.chunk_ids is None else row.chunk_ids.tobytes() for row in batch]
                score = partial(_score_batch, model, name, batch, datastore)
                nats[name][places] = options.cache.load_or_compute("scores", key, score)
                bar.update(len(batch))


def cut_windows(documents: Sequence[TokenizedDocument], window: int, stride: int) -> list[_Window]:
    """Windows that score every token of every document, except its first, exactly once.

    Sorted by length, because rows of one length need no padding; the longest first, so that running out of memory shows
    at once.
    """
    # 10 tokens with windows of 4 and a stride of 2: [0, 4) scores 1 to 3, [2, 6) scores 4 and 5, [4, 8) scores 6 and 7, [6, 10)
    # scores 8 and 9. Every token but those of the first window has at least window - stride tokens before it.
    windows = []
    for number, document in enumerate(documents):
        length, scored, start = len(document.input_ids), 1, 0
        while scored < length:
            end = min(start + window, length)
            windows.append(_Window(number, start, end, scored))
            scored, start = end, start + stride
    return sorted(windows, key=lambda part: part.start - part.end)


def _score_batch(
    model: PreTrainedModel, name: str, rows: Sequence[Row], datastore: RetroDatastore | None
) -> np.ndarray:
    """Nats of the scored tokens of some rows, one row after another; `name` is that of the run, for error messages."""
    length = max(len(row.input_ids) for row in rows)
    input_ids, attention_mask = padded([row.input_ids for row in rows], length)
    inputs = {"input_ids": input_ids, "attention_mask": attention_mask}
    given = [row.chunk_ids for row in rows if row.chunk_ids is not None]
    if given and datastore is not None and length >= datastore.chunk_size:
        chunk_ids, _ = padded(given, length // datastore.chunk_size, fill=-1)
        inputs["neighbor_input_ids"], inputs["neighbor_attention_mask"] = datastore.gather(chunk_ids)
    spans = [(len(row.input_ids) - row.num_scored, len(row.input_ids)) for row in rows]
    scores = np.concatenate(token_nats(model, inputs, spans))
    if not np.isfinite(scores).all():
        raise ValueError(
            f"The model's predictions in the run {name!r} are not finite numbers ({model.dtype}). Load the model in "
            "float32; if that does not help, its weights are damaged."
        )
    return scores
