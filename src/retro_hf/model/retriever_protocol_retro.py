# Copyright 2026 The retro-hf authors. Apache License 2.0: http://www.apache.org/licenses/LICENSE-2.0
"""Ask a retriever: check its answers, look up every distinct chunk once, and keep a trace of what was found."""

from collections.abc import Callable
from numbers import Integral
from typing import Any

import torch
from transformers.utils import logging

from .cache_retro import pad_to
from .values_retro import check_plain, shown


logger = logging.get_logger(__name__)

Retriever = Callable[[torch.Tensor, torch.Tensor], tuple[torch.Tensor, torch.Tensor]]
"""`retriever(chunk_input_ids (N, m), chunk_attention_mask (N, m)) -> (neighbor_input_ids (N, K, R), mask (N, K, R))`."""


ATTACHED: Any = type("AttachedRetriever", (), {"__repr__": lambda self: "<the attached retriever>"})()
"""The default of an argument `retriever`; None turns retrieval off."""


class SharedRetriever:
    """Holds the retriever of a model, so that it never becomes a submodule, even if it is an `nn.Module`. Copies of the model
    share it.
    """

    def __init__(self, value: Retriever | None):
        self.value = value

    def __deepcopy__(self, memo: dict) -> "SharedRetriever":
        return self


def check_retriever(retriever: Any, chunk_size: int | None = None, neighbor_size: int | None = None) -> None:
    """Check that a retriever is callable, and that its chunk size, if it has one, is the model's. Longer neighbors than the
    model's are read, with a warning.

    Raises:
        ValueError: if one of the two is not true.
    """
    if not callable(retriever):
        raise ValueError(
            "A retriever must be callable as retriever(chunk_input_ids, chunk_attention_mask), got "
            f"{type(retriever).__name__}. `RetroRetriever.from_pretrained(...)` opens a saved one."
        )
    size = getattr(retriever, "chunk_size", None)
    if not (size is None or chunk_size is None or isinstance(size, Integral) and size == chunk_size):
        raise ValueError(
            f"The retriever looks up chunks of {shown(size)} tokens, the model's chunks have {chunk_size}. Build the datastore with "
            f"chunk_size={chunk_size}."
        )
    warn_of_longer_neighbors(getattr(retriever, "neighbor_size", None), neighbor_size)


def warn_of_longer_neighbors(found: int | None, expected: int | None) -> None:
    """Say that neighbors are longer than those that a model is made for; it reads them all the same."""
    if isinstance(found, int) and expected is not None and found > expected:
        logger.warning_once(
            f"The neighbors have {found} tokens, but the model was made for {expected} (`config.neighbor_size`). It reads them "
            f"whole; train it with the same size. The paper's is twice the chunk size: build the datastore with "
            f"neighbor_size={expected}, or make the model with neighbor_size={found}."
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
    for tensor, others in ((input_ids, ()), (mask, (type(None),))):
        if not isinstance(tensor, (torch.Tensor, *others)):
            raise ValueError(f"{source} must be tensors of shape {expected}, got {type(tensor).__name__}.")
        check_plain(source, tensor)
    leading = input_ids.shape[: len(shape)]
    if input_ids.dim() != len(shape) + 2 or any(n not in (-1, size) for n, size in zip(shape, leading, strict=True)):
        raise ValueError(f"{source} must have shape {expected}, got {tuple(input_ids.shape)}.")
    if input_ids.shape[-1] == 0:
        raise ValueError(f"{source} must hold neighbors of at least one token, got shape {tuple(input_ids.shape)}.")
    if input_ids.is_floating_point() or input_ids.is_complex() or input_ids.dtype == torch.bool:
        raise ValueError(f"{source} must be token ids of an integer dtype (torch.long), got {input_ids.dtype}.")
    input_ids = input_ids.long()
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
        return input_ids, mask.bool()
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
    return input_ids, mask


def stacked(found: list[tuple[torch.Tensor, torch.Tensor]], device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """The neighbors of N chunks, each as ids and mask `(k, R)`, as ids and mask `(N, K, R)`; K is the largest k, at least 1."""
    width = max(1, *(len(ids) for ids, _ in found))  # at least one, if only to be masked
    ids, mask = (torch.stack([pad_to(row, width, dim=0) for row in rows]) for rows in zip(*found, strict=True))
    return ids.to(device), mask.to(device)


class RetroLookup:
    """The retriever of one forward pass or one call of `generate`.

    Every distinct chunk is looked up once, so beams and repeated prefixes cost one search. The answers are kept for the trace.

    Args:
        retriever (`Callable`): see [`Retriever`].
        vocab_size (`int`): of the model.
        chunk_size, neighbor_size (`int`, *optional*): of the model; see [`check_retriever`].
    """

    def __init__(
        self, retriever: Retriever, vocab_size: int, chunk_size: int | None = None, neighbor_size: int | None = None
    ) -> None:
        check_retriever(retriever, chunk_size, neighbor_size)
        # All look-ups see the same state of the datastore, even if other threads change it in the meantime.
        self.retriever: Any = retriever.snapshot() if hasattr(retriever, "snapshot") else retriever
        self.vocab_size = vocab_size
        self.found: dict[Any, tuple[torch.Tensor, torch.Tensor]] = {}
        self.padding_mask: torch.Tensor | None = None
        # Set by `generate`; see `look_up_prompts`.
        self.query: str | list[str] | None = None
        self.aligns = False
        self.offsets: list[int] = [0]
        self.num_before = 0
        self.begins: list[tuple[int, list[int]]] = []
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
            given: list[str | None] = list(self.query) if isinstance(self.query, (list, tuple)) else [self.query]
            queries = given * len(turns) if isinstance(self.query, str) else given
            if len(queries) != len(turns) or not all(isinstance(text, str) and text.strip() for text in queries):
                raise ValueError(
                    f"`query` must be a text, or one for each of {len(turns)} prompts, got {shown(self.query)}."
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
        return stacked(found, chunk_input_ids.device)

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
        self, sequences: torch.Tensor, real: torch.Tensor, begins: list[tuple[int, list[int]]], chunk_size: int
    ) -> list[list[dict[str, Any]]]:
        """What was retrieved for every sequence, chunk by chunk.

        Args:
            sequences, real (`torch.Tensor` of shape `(B, T)`): tokens, and which of them count.
            begins (`list[tuple[int, list[int]]]`): the chunk in which each row begins, and what comes before the row in it: tokens
                of a cache, or -1 for an empty cell.
            chunk_size (`int`): tokens per chunk.
        Returns:
            For each row a list of dicts with `chunk` (index), `chunk_input_ids` (`list[int]`), `neighbor_input_ids`
            (list of lists, without padding), if a text was looked up instead of the chunk `query`, and, if the retriever
            has the methods `trace` and `find`, `neighbors`: ids, scores, document ids and text.
        """
        rows = []
        for row, (tokens, mask, (first, before)) in enumerate(zip(sequences, real, begins, strict=True)):
            prompt = row * len(self.queries) // len(sequences)
            cells = before + tokens[mask].tolist()
            entries = []
            for place in range(len(cells) // chunk_size):
                index, chunk = first + place, tuple(cells[place * chunk_size : (place + 1) * chunk_size])
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
