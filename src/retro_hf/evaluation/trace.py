"""The trace of one text: what each chunk retrieved, what every token gained, and which neighbor brought it."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from ..errors import DatasetError
from ..retriever import RetrievedNeighbor, RetroRetriever
from ..training.leakage import document_numbers
from ..training.neighbors import complete_chunks
from .scoring import check_numbers, reads_neighbors


if TYPE_CHECKING:
    from rich.console import Console, ConsoleOptions, RenderResult
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

__all__ = ["FULL_BITS", "Trace", "TracedChunk", "TracedNeighbor", "bits", "trace"]

# From this gain on, in bits, a colour is as strong as it gets: a token 64 times as likely.
FULL_BITS = 6.0
# Foreground on background for the terminal, from the greatest loss to the greatest gain: legible on dark and light.
_STYLES = ("#ffffff on #b45309", "#000000 on #fcd9a8", "", "#000000 on #b6dbfb", "#ffffff on #1d63b8")


@dataclass(frozen=True)
class TracedNeighbor(RetrievedNeighbor):
    """A neighbor as it was retrieved, and what leaving it out costs: nats without it minus nats with all.

    Attributes:
        gains (`list[float]`): for each token of the chunk that reads it, the one after the chunk it was found for.
        later_gain (`float`): sum over all tokens after those, which it reaches only through self-attention.
    """

    gains: list[float]
    later_gain: float


@dataclass(frozen=True)
class TracedChunk:
    """`chunk_size` tokens, or the fewer that end the text, and the neighbors found for them.

    Attributes:
        start, end (`int`): the tokens `start` to `end - 1` of the text.
        neighbors (`list[TracedNeighbor]`): nearest first; they are read to predict the tokens of the next chunk. The
            tokens that end the text before a chunk is complete find none.
    """

    start: int
    end: int
    neighbors: list[TracedNeighbor]


@dataclass(frozen=True)
class Trace:
    """What [`trace`] saw in one text; `print` shows it, `rich.print` in colours, `to_dict` is ready for JSON.

    Attributes:
        document_id, title (`str`): of the text, empty where unknown.
        tokens (`list[str]`): the text of each token. A character of several tokens belongs to the first of them.
        nats_off, nats_on (`list[float | None]`): negative log-likelihood of each token without and with retrieval; None for
            the first, for which there is no prediction.
        chunks (`list[TracedChunk]`): in the order of the text.
        chunk_size (`int`): tokens per chunk.
        num_tokens (`int`): tokens of the whole text, more than `len(tokens)` where only its beginning was traced.
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
        """Nats that retrieval saves for each token; 0 for the first."""
        return [
            0.0 if off is None or on is None else off - on for off, on in zip(self.nats_off, self.nats_on, strict=True)
        ]

    def to_dict(self) -> dict[str, Any]:
        """Lists, strings and numbers only, for JSON."""
        return dataclasses.asdict(self)

    def __str__(self) -> str:
        from rich.console import Console

        console = Console(width=110, color_system=None, force_terminal=False, highlight=False)
        with console.capture() as capture:
            console.print(self)
        return "\n".join(line.rstrip() for line in capture.get().splitlines())

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        """The text with coloured tokens, chunk by chunk, and the neighbors of each below it."""
        from rich.padding import Padding
        from rich.text import Text

        gains = [bits(gain) for gain in self.gains]
        name = " ".join(part for part in (self.document_id, self.title) if part) or "text"
        yield Text(
            f"{name}: {len(self.tokens):,} of {self.num_tokens:,} tokens; retrieval saves {sum(gains):+.1f} bits",
            style="bold",
        )
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
                head.append(
                    f"  leaving it out costs {cost:.1f} bits in the next chunk, {later:.1f} after it", "not bold"
                )
                yield Padding(head, (0, 0, 0, 4))
                passage = Text(" ".join(neighbor.text.split())).append(" → ", "bold")
                yield Padding(passage.append(" ".join(neighbor.continuation.split())), (0, 0, 0, 6))


def bits(nats: float) -> float:
    """Nats in bits."""
    return nats / math.log(2)


def _style(gain: float) -> str:
    """For bits: none below a tenth of the full gain, strong from half of it on."""
    size = abs(gain) / FULL_BITS
    steps = 0 if size < 0.1 else 1 if size < 0.5 else 2
    return _STYLES[2 + steps if gain > 0 else 2 - steps]


def _strongest(tokens: list[str], gains: list[float], count: int = 3) -> str:
    """The tokens with the greatest gains in bits, where colours can't show them."""
    order = sorted(range(len(gains)), key=lambda place: -gains[place])[:count]
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
    """Read a text with retrieval on, off, and without each single neighbor in turn, and keep what every token gained.

    Leaving out one neighbor tells what it brings that the others don't: two that say the same can each be spared, so
    these gains need not add up to that of retrieval. A neighbor found for chunk u is read by the predictions of the
    tokens of chunk u + 1 (section 2.4 of the paper); what comes later it reaches through self-attention only.

    Args:
        model ([`RetroForCausalLM`]): it is put into eval mode meanwhile.
        document (`str`, or mapping with `text` and perhaps `id` and `title`): the text; a document whose id is in the
            datastore gets no neighbors from itself.
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]): the model's, a fast one.
        retriever ([`RetroRetriever`]): where neighbors come from.
        num_neighbors (`int`, *optional*): neighbors per chunk; the retriever's number by default.
        max_tokens (`int`, defaults to 512): tokens from the beginning of the text to read.
        batch_size (`int`, defaults to 8): rows per forward pass.
    Returns:
        [`Trace`]: one chunk for each `chunk_size` tokens.
    Raises:
        DatasetError: if the text has fewer than two tokens, or the tokenizer can't tell which text a token stands for;
            without a `RetroRetriever`.
        DatastoreMismatchError: if the datastore is of another tokenizer or chunk size than the model.
        ValueError: for a model without retrieval, or numbers out of range.
    *Cost*: `2 + num_chunks * num_neighbors` rows of `max_tokens` tokens.
    """
    if not isinstance(retriever, RetroRetriever):
        raise DatasetError(
            f"A trace shows what a retriever finds, but the retriever is a {type(retriever).__name__}: pass "
            "`retriever=RetroRetriever.from_pretrained(store, ...)`. `bits_per_byte` measures a model alone."
        )
    if not reads_neighbors(model):
        raise ValueError(
            f"{type(model).__name__} has no retrieval: it takes no neighbors, so there is nothing to trace. Make a RETRO model of "
            "it with `retrofit`."
        )
    check_numbers(max_tokens=(max_tokens, 2), batch_size=(batch_size, 1))
    if num_neighbors is not None:
        check_numbers(num_neighbors=(num_neighbors, 1))
    fields = document if isinstance(document, Mapping) else {"text": document}
    size, datastore = model.config.chunk_size, retriever.datastore
    datastore.check_compatible(tokenizer=tokenizer, chunk_size=size)
    tokens, input_ids = _read(fields.get("text"), tokenizer)
    num_tokens = len(input_ids)
    tokens, input_ids = tokens[:max_tokens], input_ids[:max_tokens]

    rows = complete_chunks(input_ids, size)
    own = np.repeat(document_numbers(datastore, [fields.get("id")]), len(rows), axis=0)
    found = retriever.trace(
        torch.from_numpy(rows),  # type: ignore[arg-type]
        num_neighbors=num_neighbors,
        exclude_documents=own,
    )
    chunk_ids = np.full((len(rows), max([1, *map(len, found)])), -1, dtype=np.int64)
    for row, neighbors in zip(chunk_ids, found, strict=True):
        row[: len(neighbors)] = [neighbor.chunk_id for neighbor in neighbors]
    neighbor_ids, mask = datastore.gather(chunk_ids)
    # Neighbors of a chunk that ends the text are read for a token that isn't there.
    places = [(u, k) for u in range(len(rows)) if (u + 1) * size < len(input_ids) for k in range(len(found[u]))]
    masks = np.repeat(mask[None], 2 + len(places), axis=0)
    masks[0] = 0  # off; 1 is on
    for number, place in enumerate(places, start=2):
        masks[(number, *place)] = 0
    nats = np.concatenate(list(_nats(model, input_ids, neighbor_ids, masks, batch_size)))
    brought = dict(zip(places, nats[2:] - nats[1], strict=True))

    chunks = []
    for start in range(0, len(input_ids), size):
        u = start // size
        traced = []
        for k, neighbor in enumerate(found[u] if u < len(rows) else []):
            # Entry i of the losses belongs to token i + 1.
            gains = brought.get((u, k), np.empty(0))[start + size - 1 :]
            parts = {"gains": gains[:size].tolist(), "later_gain": float(gains[size:].sum())}
            traced.append(TracedNeighbor(**vars(neighbor), **parts))
        chunks.append(TracedChunk(start, min(start + size, len(input_ids)), traced))
    return Trace(
        document_id=str(fields.get("id") or ""),
        title=str(fields.get("title") or ""),
        tokens=tokens,
        nats_off=[None, *nats[0].tolist()],
        nats_on=[None, *nats[1].tolist()],
        chunks=chunks,
        chunk_size=size,
        num_tokens=num_tokens,
    )


def _read(text: Any, tokenizer: PreTrainedTokenizerBase) -> tuple[list[str], np.ndarray]:
    """The text and the id of each token."""
    if not isinstance(text, str):
        raise DatasetError("The document has no text: pass a text, or a dict with a 'text'.")
    if not tokenizer.is_fast:
        raise DatasetError("A trace needs a fast tokenizer, one that knows which text each token stands for.")
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    if len(encoded["input_ids"]) < 2:
        raise DatasetError("There is nothing to trace: the text has fewer than two tokens.")
    # White space that a tokenizer drops belongs to the token after it.
    ends = np.maximum.accumulate([0, *(end for _, end in encoded["offset_mapping"])]).tolist()
    return [text[first:last] for first, last in pairwise(ends)], np.array(encoded["input_ids"], dtype=np.int64)


@torch.inference_mode()
def _nats(
    model: PreTrainedModel, input_ids: np.ndarray, neighbor_ids: np.ndarray, masks: np.ndarray, batch_size: int
) -> Iterator[np.ndarray]:
    """The losses of one text under many masks of its neighbors.

    Args:
        input_ids (`np.ndarray` of int64 and shape `(num_tokens,)`): the text.
        neighbor_ids (`np.ndarray` of int64 and shape `(num_chunks, num_neighbors, neighbor_size)`): its neighbors.
        masks (`np.ndarray` of int64 and shape `(num_rows, num_chunks, num_neighbors, neighbor_size)`): what each row sees.
    Yields:
        `np.ndarray` of float32 and shape `(at most batch_size, num_tokens - 1)`: nats of every token but the first.
    """
    was_training = model.training
    model.eval()
    try:
        for first in range(0, len(masks), batch_size):
            mask = torch.from_numpy(masks[first : first + batch_size]).to(model.device)
            ids = torch.from_numpy(input_ids).to(model.device).expand(len(mask), -1)
            neighbors = torch.from_numpy(neighbor_ids).to(model.device).expand(mask.shape)
            inputs = {"neighbor_input_ids": neighbors, "neighbor_attention_mask": mask} if len(neighbor_ids) else {}
            logits = model(ids, **inputs, retriever=None, use_cache=False).logits
            # Row by row: float32 copies of the logits of a whole batch may not fit.
            rows = [
                torch.nn.functional.cross_entropy(row[:-1].float(), ids[0, 1:], reduction="none") for row in logits
            ]
            yield torch.stack(rows).cpu().numpy()
    finally:
        model.train(was_training)
