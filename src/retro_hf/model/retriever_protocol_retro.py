# Copyright 2026 The retro-hf authors. Apache License 2.0: http://www.apache.org/licenses/LICENSE-2.0
"""Ask a retriever: check its answers, look up every distinct chunk once, and keep a trace of what was found."""

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from transformers.utils import is_torchdynamo_exporting, logging

from .cache_retro import pad_to
from .configuration_retro import RetroConfig


logger = logging.get_logger(__name__)

Retriever = Callable[[torch.Tensor, torch.Tensor], tuple[torch.Tensor, torch.Tensor]]
"""`retriever(chunk_input_ids (N, m), chunk_attention_mask (N, m)) -> (neighbor_input_ids (N, K, R), mask (N, K, R))`."""


ATTACHED: Any = type("AttachedRetriever", (), {"__repr__": lambda self: "<the attached retriever>"})()
"""The default of an argument `retriever`; None turns retrieval off."""


def check_retriever(retriever: Any, chunk_size: int | None = None) -> None:
    """Check that a retriever is callable, and that its chunk size, if it has one, is the model's.

    Raises:
        ValueError: if one of the two is not true.
    """
    if not callable(retriever):
        raise ValueError(
            "A retriever must be callable as retriever(chunk_input_ids, chunk_attention_mask), got "
            f"{type(retriever).__name__}. `RetroRetriever.from_pretrained(...)` opens a saved one."
        )
    size = getattr(retriever, "chunk_size", None)
    if None not in (size, chunk_size) and size != chunk_size:
        raise ValueError(
            f"The retriever looks up chunks of {size} tokens, the model's chunks have {chunk_size}. Build the datastore with "
            f"chunk_size={chunk_size}."
        )


def check_neighbors(
    input_ids: Any, mask: Any, shape: tuple[int, ...], vocab_size: int, source: str
) -> tuple[torch.Tensor, torch.Tensor]:
    """Check neighbor tensors.

    Args:
        input_ids, mask (`torch.Tensor` of shape `(*shape, K, R)`): the neighbors; a mask of None means all ones.
        shape (`tuple[int]`): leading dimensions, -1 for any.
        vocab_size (`int`): of the model.
        source (`str`): the name of the tensors in a message.
    Returns:
        Ids of dtype long, and a boolean mask.
    Raises:
        ValueError: with the wrong value and the one that is needed.
    """
    expected = f"({', '.join('any' if n == -1 else str(n) for n in shape)}, num_neighbors, neighbor_size)"
    for tensor in (input_ids, mask):
        if not (isinstance(tensor, torch.Tensor) or tensor is mask is None):
            raise ValueError(f"{source} must be tensors of shape {expected}, got {type(tensor).__name__}.")
    leading = input_ids.shape[: len(shape)]
    if input_ids.dim() != len(shape) + 2 or any(n not in (-1, size) for n, size in zip(shape, leading, strict=True)):
        raise ValueError(f"{source} must have shape {expected}, got {tuple(input_ids.shape)}.")
    if input_ids.shape[-1] == 0:
        raise ValueError(f"{source} must hold neighbors of at least one token, got shape {tuple(input_ids.shape)}.")
    if input_ids.is_floating_point() or input_ids.is_complex() or input_ids.dtype == torch.bool:
        raise ValueError(f"{source} must be token ids of an integer dtype (torch.long), got {input_ids.dtype}.")
    if mask is None:
        mask = torch.ones_like(input_ids)
    if mask.shape != input_ids.shape:
        raise ValueError(
            f"The mask of {source} must have the shape of the ids {tuple(input_ids.shape)}, got {tuple(mask.shape)}."
        )
    if mask.numel() and (mask.is_floating_point() or mask.is_complex()):  # an additive mask says the opposite
        raise ValueError(
            f"The mask of {source} must be of dtype bool or long, 1 at tokens and 0 at padding, got {mask.dtype}."
        )
    if torch.compiler.is_compiling():  # reading values would break the graph; a wrong id fails in the embedding
        return input_ids.long(), mask.bool()
    if mask.dtype != torch.bool and mask.numel() and not (0 <= int(mask.min()) and int(mask.max()) <= 1):
        raise ValueError(
            f"The mask of {source} must be 1 at tokens and 0 at padding, but holds values from {int(mask.min())} to "
            f"{int(mask.max())}."
        )
    mask = mask.bool()
    used = input_ids[mask]
    if used.numel() and not (0 <= int(used.min()) and int(used.max()) < vocab_size):
        raise ValueError(
            f"{source} holds token ids from {int(used.min())} to {int(used.max())}, but the model's vocabulary has "
            f"{vocab_size} tokens. Were they made with another tokenizer?"
        )
    return input_ids.long(), mask


def given_neighbors(
    input_ids: torch.Tensor | None,
    mask: torch.Tensor | None,
    tokens: torch.Tensor,
    config: RetroConfig,
    *,
    is_step: bool,
    is_whole: bool,
) -> tuple[torch.Tensor, torch.Tensor] | None:
    """Check the neighbors that were given to a forward pass; None if there are none.

    Args:
        input_ids, mask (`torch.Tensor` of shape `(B, C, K, R)`, *optional*): the neighbors of the chunks of each row.
        tokens (`torch.Tensor` of shape `(B, T, ...)`): the new tokens, or their embeddings.
        config ([`RetroConfig`]): of the model.
        is_step (`bool`): whether an earlier pass has checked these neighbors.
        is_whole (`bool`): whether no tokens can follow.
    Returns:
        Ids and boolean mask of shape `(B, C, K, R)`, with K at least 1.
    """
    if input_ids is None:
        if mask is not None:
            raise ValueError("`neighbor_attention_mask` was given without `neighbor_input_ids`. Give both, or none.")
        return None
    size, (batch_size, num_tokens) = config.chunk_size, tokens.shape[:2]
    if not is_step:
        source = "`neighbor_input_ids` (batch, chunks, …)"
        input_ids, mask = check_neighbors(input_ids, mask, (batch_size, -1), config.vocab_size, source)
        # An exported program also runs on shorter texts; neighbors of chunks beyond the text are never read.
        if is_whole and not is_torchdynamo_exporting() and input_ids.shape[1] > num_tokens // size + 1:
            raise ValueError(
                f"`neighbor_input_ids` holds neighbors of {input_ids.shape[1]} chunks, but {num_tokens} tokens have "
                f"only {num_tokens // size} complete chunks of {size}. Were they made with another `chunk_size`?"
            )
    if mask is None:
        mask = torch.ones((), dtype=torch.bool, device=input_ids.device).expand_as(input_ids)
    # A chunk has at least one neighbor, if only to be masked.
    return pad_to(input_ids.to(tokens.device), 1, dim=-2), pad_to(mask.bool().to(tokens.device), 1, dim=-2)


def text_of(
    inputs_embeds: torch.Tensor,
    input_ids: torch.Tensor | None,
    given: tuple[torch.Tensor, torch.Tensor] | None,
    retriever: "RetroLookup | None",
    is_unclear: bool,
) -> torch.Tensor:
    """The tokens that given embeddings stand for, or the embeddings themselves if the tokens are not known.

    Args:
        inputs_embeds (`torch.FloatTensor` of shape `(B, T, hidden_size)`): the embeddings.
        input_ids (`torch.LongTensor` of shape `(B, T)`, *optional*): the tokens that they stand for.
        given, retriever (*optional*): where neighbors come from.
        is_unclear (`bool`): whether it is unknown where the chunks of the given neighbors begin.
    Raises:
        ValueError: if retrieval needs to know more.
    """
    if input_ids is not None:
        if input_ids.shape != inputs_embeds.shape[:2]:
            raise ValueError(
                f"`input_ids` has the shape {tuple(input_ids.shape)} and `inputs_embeds` {tuple(inputs_embeds.shape)}, so the "
                "chunks of the text are unknown. Give embeddings of exactly these tokens, or `input_ids` alone."
            )
        return input_ids
    if retriever is not None:
        raise ValueError(
            "Retrieval needs `input_ids`: there are no tokens to look up in `inputs_embeds`. Give "
            "`neighbor_input_ids`, or `retriever=None`."
        )
    if given is not None and is_unclear:
        raise ValueError(
            "With `inputs_embeds` it is unknown where the chunks of `neighbor_input_ids` begin: virtual tokens before the "
            "text, as in PEFT's prompt tuning, would let tokens read neighbors of their own chunk. Give `input_ids` (and "
            "tune with LoRA), or, for embeddings of the text alone, `chunk_offset=0`."
        )
    return inputs_embeds


def check_chunk_size(looked_up: torch.Tensor | int | None, chunk_size: int) -> None:
    """Check that given neighbors were looked up for chunks of the model's size; `looked_up` is one number, or `(B,)`."""
    if looked_up is None:
        return
    looked_up = torch.as_tensor(looked_up).flatten()
    if torch.compiler.is_compiling():  # reading values would break the graph
        message = f"The neighbors were looked up for chunks of another size than the model's {chunk_size}."
        torch._assert_async((looked_up == chunk_size).all(), message)
    elif set(looked_up.tolist()) != {chunk_size}:
        raise ValueError(
            f"The neighbors were looked up for chunks of {sorted(set(looked_up.tolist()))} tokens, but the model has chunks of "
            f"{chunk_size}: it would read neighbors of text that it is yet to predict. Take a datastore (and "
            f"a collator) of chunk_size={chunk_size}, and cut and look up the training text with it."
        )


class RetroLookup:
    """The retriever of one forward pass or one call of `generate`.

    Every distinct chunk is looked up once, so beams and repeated prefixes cost one search. The answers are kept for the trace.

    Args:
        retriever (`Callable`): see [`Retriever`].
        vocab_size (`int`): of the model.
        chunk_size (`int`, *optional*): of the model; the retriever's must be the same, if it has one.
    """

    def __init__(self, retriever: Retriever, vocab_size: int, chunk_size: int | None = None) -> None:
        check_retriever(retriever, chunk_size)
        # All look-ups see the same state of the datastore, even if other threads change it in the meantime.
        self.retriever: Any = retriever.snapshot() if hasattr(retriever, "snapshot") else retriever
        self.vocab_size = vocab_size
        self.found: dict[Any, tuple[torch.Tensor, torch.Tensor]] = {}
        self.padding_mask: torch.Tensor | None = None
        # Set by `generate`; see `look_up_prompts`.
        self.query: str | list[str] | None = None
        self.aligns = False
        self.offsets: list[int] = [0]
        self.repeats = 1
        self.queries: list[str | None] = []
        self.chunks: list[range] = []

    def last_turns(self, prompt: torch.Tensor, mask: torch.Tensor) -> list[tuple[str, int] | None]:
        """The last user turn of each prompt (B, T), and how many tokens come before it; None where the retriever sees none."""
        if prompt.dim() != 2 or not hasattr(self.retriever, "last_turns"):
            return [None] * len(prompt)
        return self.retriever.last_turns(prompt, mask)

    def look_up_prompts(self, turns: list[str | None], chunks: list[range]) -> None:
        """Look up one text for each prompt, instead of its chunks.

        Args:
            turns (`list[str | None]`): the text of each prompt, unless the user gave a `query`; None to look up its chunks.
            chunks (`list[range]`): for each prompt, the chunks whose neighbors are those of the text. The chunks before
                them have no neighbors, and the chunks after them are looked up as usual.
        Raises:
            ValueError: if a query is not a text, or the retriever cannot look up texts.
        """
        queries = list(turns)
        if self.query is not None:
            queries = [self.query] * len(turns) if isinstance(self.query, str) else list(self.query)
            if len(queries) != len(turns) or not all(isinstance(text, str) and text.strip() for text in queries):
                raise ValueError(
                    f"`query` must be a text, or one for each of {len(turns)} prompts, got {self.query!r}."
                )
            if not hasattr(self.retriever, "look_up"):
                raise ValueError(
                    f"A retriever of type {type(self.retriever).__name__} has no method `look_up(texts)`, so it can't look up "
                    "`query`. Use a RetroRetriever, or give `neighbor_input_ids`."
                )
        self.queries, self.chunks = queries, chunks
        texts = list(dict.fromkeys(text for text in queries if text is not None))
        if texts:
            answer = self._ask(self.retriever.look_up, (texts,), f"{len(texts)} texts", len(texts))
            self.found.update(zip(texts, zip(*answer, strict=True), strict=True))

    def _key(self, prompt: int, chunk: int, tokens: tuple[int, ...]) -> Any:
        """What is looked up for a chunk of a row: its tokens, or the query of its prompt; None if it has no neighbors."""
        query = self.queries[prompt] if prompt < len(self.queries) else None
        if query is None or chunk >= self.chunks[prompt].stop:
            return tokens
        return query if chunk in self.chunks[prompt] else None

    def __call__(
        self, chunk_input_ids: torch.Tensor, chunk_mask: torch.Tensor, rows: torch.Tensor, chunks: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Find the neighbors of chunks. One call of the retriever looks up those that were not looked up before.

        Args:
            chunk_input_ids, chunk_mask (`torch.Tensor` of shape `(N, m)`): completed chunks, and which tokens are real.
            rows, chunks (`torch.LongTensor` of shape `(N,)`): the row of each chunk, and its number in that row.
        Returns:
            Neighbor ids and mask `(N, K, R)`, on the device of the chunks; K is the largest number among them.
        """
        # One hashable key per chunk; -1 at padding.
        cells = map(tuple, chunk_input_ids.masked_fill(~chunk_mask.bool(), -1).tolist())
        places = zip(rows.tolist(), chunks.tolist(), cells, strict=True)
        keys = [self._key(row // self.repeats, chunk, tokens) for row, chunk, tokens in places]
        missing: dict[Any, int] = {}
        for place, key in enumerate(keys):
            if key is not None and key not in self.found:
                missing.setdefault(key, place)
        if missing:
            at = list(missing.values())
            what = f"{len(at)} chunks of {chunk_input_ids.shape[1]} tokens"
            answer = self._ask(self.retriever, (chunk_input_ids[at], chunk_mask[at].long()), what, len(at))
            self.found.update(zip(missing, zip(*answer, strict=True), strict=True))
        # A chunk without neighbors (key None) only occurs in a prompt with a query, whose answer is in `found`.
        some, _ = next(iter(self.found.values()))
        nothing = some[:0], some[:0].bool()
        found = [nothing if key is None else self.found[key] for key in keys]
        sizes = sorted({ids.shape[1] for ids, _ in found})
        if len(sizes) > 1:
            raise ValueError(
                f"The retriever returned neighbors of {sizes[0]} and of {sizes[1]} tokens; the neighbor_size of a "
                "retriever must not change while generating."
            )
        width = max(1, *(len(ids) for ids, _ in found))  # at least one, if only to be masked
        ids, mask = (torch.stack([pad_to(row, width, dim=0) for row in rows]) for rows in zip(*found, strict=True))
        return ids.to(chunk_input_ids.device), mask.to(chunk_input_ids.device)

    def _ask(self, look_up: Callable, arguments: tuple, what: str, count: int) -> tuple[torch.Tensor, torch.Tensor]:
        try:
            answer = look_up(*arguments)
        except Exception as error:  # a retriever is the user's own code, which may raise anything
            if any(kind.__name__ == "RetroError" for kind in type(error).__mro__):  # explains itself
                raise
            raise RuntimeError(f"The retriever failed on {what}: {type(error).__name__}: {error}") from error
        if not isinstance(answer, tuple) or len(answer) != 2:
            found = f"a tuple of {len(answer)}" if isinstance(answer, tuple) else type(answer).__name__
            raise ValueError(
                f"The retriever must return a pair (neighbor_input_ids, neighbor_attention_mask), got {found}."
            )
        return check_neighbors(*answer, (count,), self.vocab_size, "What the retriever returned")

    def trace(
        self, sequences: torch.Tensor, real: torch.Tensor, offsets: list[int], chunk_size: int
    ) -> list[list[dict[str, Any]]]:
        """What was retrieved for every sequence, chunk by chunk.

        Args:
            sequences, real (`torch.Tensor` of shape `(B, T)`): tokens, and which of them count.
            offsets (`list[int]`): chunk position of each row's first token.
            chunk_size (`int`): tokens per chunk.
        Returns:
            For each row a list of dicts with `chunk` (index), `chunk_input_ids` (`list[int]`), `neighbor_input_ids`
            (list of lists, without padding), if a text was looked up instead of the chunk `query`, and, if the retriever
            has the methods `trace` and `find`, `neighbors`: ids, scores, document ids and text.
        """
        rows = []
        for row, (tokens, mask, offset) in enumerate(zip(sequences, real, offsets, strict=True)):
            prompt = row * len(self.queries) // len(sequences)
            cells = [-1] * offset + tokens[mask].tolist()
            entries = []
            for index in range(len(cells) // chunk_size):
                chunk = tuple(cells[index * chunk_size : (index + 1) * chunk_size])
                key = self._key(prompt, index, chunk)
                if key not in self.found:
                    continue
                ids, neighbor_mask = self.found[key]
                entry: dict[str, Any] = {
                    "chunk": index,
                    "chunk_input_ids": [token for token in chunk if token >= 0],
                    "neighbor_input_ids": [i[m].tolist() for i, m in zip(ids, neighbor_mask, strict=True)],
                }
                if isinstance(key, str):
                    entry["query"] = key
                    if hasattr(self.retriever, "find"):
                        entry["neighbors"] = self.retriever.find(key)[0]
                elif hasattr(self.retriever, "trace"):
                    tensor = torch.tensor([chunk])
                    entry["neighbors"] = self.retriever.trace(tensor.clamp(min=0), (tensor >= 0).long())[0]
                entries.append(entry)
            rows.append(entries)
        return rows


def warn_of_nothing_to_train(backbone: nn.Module, labels: torch.Tensor | None, reader: str) -> None:
    """Explain a loss without a gradient; PyTorch only says that "element 0 of tensors does not require grad".

    Args:
        backbone (`nn.Module`): of a model that runs without retrieval, or whose reader has no weights.
        labels (`torch.LongTensor`, *optional*): whether a loss is computed.
        reader (`str`): of the model.
    """
    if labels is None or not backbone.training or not torch.is_grad_enabled() or torch.compiler.is_compiling():
        return
    if any(weight.requires_grad for weight in backbone.parameters()):
        return
    if reader == "parallel_context":
        logger.warning_once(
            "reader='parallel_context' has no weights, and the backbone is frozen, so the loss has no gradient. Put LoRA on the "
            "model (`get_peft_model`), or make it with `retrofit(..., freeze_backbone=False)`."
        )
    else:
        logger.warning_once(
            "This batch has no neighbors, and the backbone is frozen, so its loss has no gradient. Give `neighbor_input_ids`, or "
            "attach a retriever with `set_retriever`."
        )


__all__ = [
    "ATTACHED",
    "Retriever",
    "RetroLookup",
    "check_chunk_size",
    "check_neighbors",
    "check_retriever",
    "given_neighbors",
    "text_of",
    "warn_of_nothing_to_train",
]
