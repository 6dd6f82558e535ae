"""The trace of one text: what each chunk retrieved, what every token gained, and what each neighbor brought."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from ..arguments import optional_whole, shown, whole
from ..datastore.bos_eos import Borders
from ..datastore.chunks import padded
from ..datastore.documents import is_missing
from ..errors import DatasetError
from ..retriever import RetrievedNeighbor, RetroRetriever
from ..training.exclusion import documents_by_row
from ..unwrapped import unwrapped
from .scoring import accepts, evaluating, read_documents, token_nats


if TYPE_CHECKING:
    from rich.console import RenderableType
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

# The gain, in bits, from which on a color has its full strength: a token 64 times as likely.
FULL_BITS = 6.0
# Terminal styles from the largest loss to the largest gain, readable on dark and light backgrounds.
_STYLES = ("#ffffff on #b45309", "#000000 on #fcd9a8", "", "#000000 on #b6dbfb", "#ffffff on #1d63b8")


@dataclass(frozen=True)
class TracedNeighbor(RetrievedNeighbor):
    """A retrieved neighbor and what leaving it out costs, in nats.

    Attributes:
        gains (`list[float]`): nats without it minus nats with all neighbors, for each token of the chunk that reads it,
            the one after the chunk it was found for.
        later_gain (`float`): sum over all tokens after those, which it reaches only through self-attention.
    """

    gains: list[float]
    later_gain: float


@dataclass(frozen=True)
class TracedChunk:
    """A chunk of the text and the neighbors found for it.

    Attributes:
        start, end (`int`): the tokens `start` to `end - 1` of the text; the last chunk can be short.
        neighbors (`list[TracedNeighbor]`): nearest first. They are read to predict the next chunk. A short chunk has none.
    """

    start: int
    end: int
    neighbors: list[TracedNeighbor]


@dataclass(frozen=True)
class Trace:
    """What [`trace`] found in one text. `print` shows it, `rich.print` in colors; `to_dict` is ready for JSON.

    Attributes:
        document_id, title (`str`): of the text, empty if unknown.
        tokens (`list[str]`): the text of each token. A character of several tokens belongs to the first of them.
        nats_off, nats_on (`list[float | None]`): negative log-likelihood of each token without and with retrieval; `None`
            for the first, which nothing predicts.
        chunks (`list[TracedChunk]`): in the order of the text.
        chunk_size (`int`): tokens per chunk.
        num_tokens (`int`): tokens of the whole text, more than `len(tokens)` if only its beginning was traced.
    """

    document_id: str
    title: str
    tokens: list[str]
    nats_off: list[float | None]
    nats_on: list[float | None]
    chunks: list[TracedChunk]
    chunk_size: int
    num_tokens: int

    @property
    def gains(self) -> list[float]:
        """Nats that retrieval saves on each token; 0 for the first."""
        pairs = zip(self.nats_off, self.nats_on, strict=True)
        return [0.0 if off is None or on is None else off - on for off, on in pairs]

    def to_dict(self) -> dict[str, Any]:
        """Lists, strings and numbers only, for JSON."""
        return dataclasses.asdict(self)

    def __str__(self) -> str:
        from .text import plain_text

        return plain_text(self)

    def __rich_console__(self, *_: Any) -> Iterator[RenderableType]:
        """The text with colored tokens, chunk by chunk, and the neighbors of each below it."""
        from rich.padding import Padding
        from rich.text import Text

        gains = [bits(gain) for gain in self.gains]
        name = " ".join(part for part in (self.document_id, self.title) if part) or "text"
        count = f"{len(self.tokens):,} of {self.num_tokens:,} tokens"
        yield Text(f"{name}: {count}; retrieval saves {sum(gains):+.1f} bits", style="bold")
        for number, chunk in enumerate(self.chunks):
            tokens, own = self.tokens[chunk.start : chunk.end], gains[chunk.start : chunk.end]
            yield Text(f"\nchunk {number}: {sum(own):+.1f} bits {_strongest(tokens, own)}")
            line = Text()
            for token, gain in zip(tokens, own, strict=True):
                line.append(token.replace("\n", "⏎"), style=_style(gain))
            yield Padding(line, (0, 0, 0, 2))
            for neighbor in chunk.neighbors:
                cost, later = bits(sum(neighbor.gains)), bits(neighbor.later_gain)
                head = Text(f"{neighbor.score:.3f} {neighbor.document_id} {neighbor.title}", style="bold")
                costs = f"  leaving it out costs {cost:.1f} bits in the next chunk, {later:.1f} after it"
                yield Padding(head.append(costs, "not bold"), (0, 0, 0, 4))
                passage = Text(" ".join(neighbor.text.split())).append(" → ", "bold")
                yield Padding(passage.append(" ".join(neighbor.continuation.split())), (0, 0, 0, 6))


def bits(nats: float) -> float:
    """Convert nats to bits."""
    return nats / math.log(2)


def _style(gain: float) -> str:
    """The style for a gain in bits: none below a tenth of the full gain, strong from half of it on."""
    size = abs(gain) / FULL_BITS
    steps = 0 if size < 0.1 else 1 if size < 0.5 else 2
    return _STYLES[2 + steps if gain > 0 else 2 - steps]


def _strongest(tokens: list[str], gains: list[float]) -> str:
    """The three tokens with the largest gains in bits, for terminals without colors."""
    order = sorted(range(len(gains)), key=lambda place: -gains[place])[:3]
    named = [f"{tokens[place].strip()} {gains[place]:+.1f}" for place in order if gains[place] > 0.1 * FULL_BITS]
    return f"({', '.join(named)})" if named else ""


def trace(
    model: PreTrainedModel,
    document: str | Mapping[str, Any],
    tokenizer: PreTrainedTokenizerBase,
    *,
    retriever: RetroRetriever,
    num_neighbors: int | None = None,
    max_tokens: int = 512,
    batch_size: int = 8,
) -> Trace:
    """Score a text with retrieval on, off, and without each single neighbor in turn, token by token.

    Leaving out one neighbor shows what it brings that the others do not. Of two neighbors that say the same, each can be
    left out at no cost, so these gains need not add up to the gain of retrieval. A neighbor found for chunk u is read to
    predict the tokens of chunk u + 1 (section 2.4 of the paper); it reaches later tokens through self-attention only.

    Args:
        model ([`RetroForCausalLM`]): put into eval mode while scoring.
        document (`str`, or `dict` with `text` and optionally `id` and `title`): the text. A document whose id is in the
            datastore gets no neighbors from itself.
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]): the model's fast tokenizer.
        retriever ([`RetroRetriever`]): finds the neighbors.
        num_neighbors (`int`, *optional*): neighbors per chunk; by default the retriever's.
        max_tokens (`int`, defaults to 512): how many tokens from the beginning of the text to read.
        batch_size (`int`, defaults to 8): rows per forward pass.
    Returns:
        [`Trace`]: one chunk for each `chunk_size` tokens.
    Raises:
        DatasetError: if the text has fewer than two tokens, the tokenizer is not a fast one, or the retriever is not a
            `RetroRetriever`.
        DatastoreMismatchError: if the datastore has another tokenizer or chunk size than the model.
        ValueError: for a model without retrieval, or numbers out of range.
    *Cost*: `2 + num_chunks * num_neighbors` rows of `max_tokens` tokens.
    """
    if not isinstance(retriever, RetroRetriever):
        raise DatasetError(f"A trace needs a RetroRetriever, but the retriever is a {type(retriever).__name__}.")
    model = unwrapped(model)
    if not accepts(model, "neighbor_input_ids"):
        raise ValueError(
            f"{type(model).__name__} has no retrieval to trace. Make a RETRO model of it with `retrofit`."
        )
    max_tokens = whole("max_tokens", max_tokens, ValueError, least=2)
    batch_size = whole("batch_size", batch_size, ValueError)
    num_neighbors = optional_whole("num_neighbors", num_neighbors, ValueError)
    fields = document if isinstance(document, Mapping) else {"text": document}
    title = None if is_missing(fields.get("title")) else fields["title"]
    if title is not None and not isinstance(title, str):
        raise DatasetError(f"The title is {shown(title)}. Pass a text, or none.")
    size, datastore = model.config.chunk_size, retriever.datastore
    datastore.check_compatible(tokenizer=tokenizer, chunk_size=size)
    (read,) = read_documents([fields], tokenizer, Borders.of(tokenizer, None, False))
    if read.num_scored < 1:
        raise DatasetError("There is nothing to trace: the text has fewer than two tokens.")
    input_ids = read.input_ids[:max_tokens]
    length = len(input_ids)

    rows = input_ids[: length // size * size].reshape(-1, size)
    found = retriever.trace(
        torch.from_numpy(rows),
        num_neighbors=num_neighbors,
        exclude_documents=np.repeat(documents_by_row(datastore, [read.id]), len(rows), axis=0),
    )
    ids = [[neighbor.chunk_id for neighbor in neighbors] for neighbors in found]
    chunk_ids, _ = padded(ids, max([1, *map(len, ids)]), fill=-1)
    neighbor_ids, mask = datastore.gather(chunk_ids)
    # Neighbors of a chunk that ends the text would be read for a token that is not there.
    places = [(u, k) for u in range(len(rows)) if (u + 1) * size < length for k in range(len(found[u]))]
    # One row of the batch for each variant: off, on, and on without one neighbor. A neighbor is left out by its mask, so that
    # all variants have the same shapes.
    masks = np.repeat(mask[None], 2 + len(places), axis=0)
    masks[0] = 0
    for number, place in enumerate(places, start=2):
        masks[(number, *place)] = 0
    nats = _nats(model, input_ids, neighbor_ids, masks, batch_size)
    brought = dict(zip(places, nats[2:] - nats[1], strict=True))

    chunks = []
    for start in range(0, length, size):
        u = start // size
        traced = []
        for k, neighbor in enumerate(found[u] if u < len(rows) else []):
            # Entry i of the nats belongs to token i + 1.
            gains = brought.get((u, k), np.empty(0))[start + size - 1 :]
            parts = {"gains": gains[:size].tolist(), "later_gain": float(gains[size:].sum())}
            traced.append(TracedNeighbor(**vars(neighbor), **parts))
        chunks.append(TracedChunk(start, min(start + size, length), traced))
    return Trace(
        document_id=read.id or "",
        title=title or "",
        tokens=read.token_texts[:length],
        nats_off=[None, *nats[0].tolist()],
        nats_on=[None, *nats[1].tolist()],
        chunks=chunks,
        chunk_size=size,
        num_tokens=len(read.input_ids),
    )


def _nats(
    model: PreTrainedModel, input_ids: np.ndarray, neighbor_ids: np.ndarray, masks: np.ndarray, batch_size: int
) -> np.ndarray:
    """Nats of one text under different masks of its neighbors.

    Args:
        input_ids (`np.ndarray` of int64 and shape `(num_tokens,)`): the text.
        neighbor_ids (`np.ndarray` of int64 and shape `(num_chunks, num_neighbors, neighbor_size)`): its neighbors.
        masks (`np.ndarray` of int64 and shape `(num_rows, num_chunks, num_neighbors, neighbor_size)`): what each row reads.
    Returns:
        `np.ndarray` of float32 and shape `(num_rows, num_tokens - 1)`: nats of every token but the first.
    """
    parts: list[np.ndarray] = []
    with evaluating(model):
        for first in range(0, len(masks), batch_size):
            mask = masks[first : first + batch_size]
            inputs = {"input_ids": np.tile(input_ids, (len(mask), 1))}
            if len(neighbor_ids):
                neighbors = np.repeat(neighbor_ids[None], len(mask), axis=0)
                inputs |= {"neighbor_input_ids": neighbors, "neighbor_attention_mask": mask}
            parts += token_nats(model, inputs, [(1, len(input_ids))] * len(mask))
    return np.stack(parts)
