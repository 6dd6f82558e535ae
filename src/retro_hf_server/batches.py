"""
Rows that are generated together, though each begins and ends when it likes.

Prompts that arrive together and are about as long are computed together. Then their rows join a batch, as more rows of the
batch's cache. A batch runs token by token until one of its rows ends, or until there is something else to do. The steps are
those of `generate`, which goes on from the cache.
"""

from __future__ import annotations

import copy
from collections import defaultdict
from collections.abc import Callable, Hashable, Iterable
from typing import Any

import torch
from transformers import LogitsProcessor, LogitsProcessorList, StoppingCriteria, StoppingCriteriaList

from retro_hf.model.compatibility_retro import CACHE_NAME

from .caches import is_divisible, joined
from .readers import RowLookup
from .rows import Row


# Of the prompts that are computed together, with their padding. More would be no faster: so many use the processor fully.
_TOKENS_TOGETHER = 2048


class Batch:
    """
    Rows with one cache between them.

    Args:
        rows (`list[Row]`): at least one. All of them read neighbors of the same size, or none at all.
        cache (`Cache`): of their tokens, but for the last of each.
    """

    def __init__(self, rows: list[Row], cache: Any) -> None:
        self.rows, self.cache = rows, cache

    @classmethod
    def of(cls, model: Any, rows: list[Row], ends: set[int]) -> Batch:
        """Compute the prompts of rows, and the first token of each, which may be its last."""
        return cls(rows, _generate(model, rows, None, _Turn(rows, ends, lambda: True)))

    def run(self, model: Any, ends: set[int], is_over: Callable[[], bool]) -> None:
        """
        Write one token per row, and more until a row ends.

        Args:
            model ([`RetroForCausalLM`]): of the cache.
            ends (`set[int]`): tokens that end an answer.
            is_over (`Callable[[], bool]`): is asked after each step whether to stop there.
        """
        self.cache = _generate(model, self.rows, self.cache, _Turn(self.rows, ends, is_over))

    @property
    def takes_others(self) -> bool:
        """Whether other prompts of this model could have been computed together with the first of these."""
        # A processor may count from the end of the prompt, so it is made for one prompt alone.
        return is_divisible(self.cache) and not self.rows[0].processors

    @property
    def _kind(self) -> Hashable:
        """Batches of the same kind can become one."""
        return self.rows[0].neighbor_size, None if is_divisible(self.cache) else id(self)


def grouped(rows: Iterable[Row]) -> list[list[Row]]:
    """Rows that have not begun, in groups whose prompts are computed together: none has more padding than tokens."""
    kinds: dict[Hashable, list[Row]] = defaultdict(list)
    for row in rows:
        kinds[row.neighbor_size].append(row)
    groups: list[list[Row]] = []
    for alike in kinds.values():
        alike.sort(key=lambda row: len(row.tokens), reverse=True)
        group: list[Row] = []
        for row in alike:
            longest = len(group[0].tokens) if group else 0
            if not group or 2 * len(row.tokens) < longest or (len(group) + 1) * longest > _TOKENS_TOGETHER:
                groups.append(group := [])
            group.append(row)
    return groups


def regrouped(batches: Iterable[Batch]) -> list[Batch]:
    """The batches without the rows that have ended, and with as many rows together as can be."""
    kinds: dict[Hashable, list[Batch]] = defaultdict(list)
    for batch in batches:
        if any(row.reason is None for row in batch.rows):
            kinds[batch._kind].append(batch)
    return [_together(alike) for alike in kinds.values()]


def _together(batches: list[Batch]) -> Batch:
    places = [[place for place, row in enumerate(batch.rows) if row.reason is None] for batch in batches]
    if len(batches) == 1 and len(places[0]) == len(batches[0].rows):
        return batches[0]
    rows = [batch.rows[place] for batch, taken in zip(batches, places, strict=True) for place in taken]
    parts = [(batch.cache, taken) for batch, taken in zip(batches, places, strict=True)]
    return Batch(rows, joined(parts, max(len(row.tokens) for row in rows) - 1))


def _generate(model: Any, rows: list[Row], cache: Any, turn: _Turn) -> Any:
    """Run `generate` for one turn: from the prompts of rows, or from a cache. Returns the cache."""
    width, device = max(len(row.tokens) for row in rows), model.device
    mask = torch.tensor([[0] * (width - len(row.tokens)) + [1] * len(row.tokens) for row in rows], device=device)
    config = copy.deepcopy(model.generation_config)
    config.update(do_sample=False, num_beams=1, temperature=None, top_p=None, top_k=None, max_length=None)
    config.update(max_new_tokens=max(row.job.sampling.max_tokens for row in rows), return_dict_in_generate=True)
    config.update(pad_token_id=0 if config.pad_token_id is None else config.pad_token_id)
    inputs: dict[str, Any] = {"attention_mask": mask, "retriever": None}
    readers = [row.reader for row in rows if row.reader is not None]
    if readers:
        inputs["retriever"] = RowLookup(readers, model.config.vocab_size)
    if cache is not None:
        inputs[CACHE_NAME] = cache
    elif readers:
        inputs["chunk_offset"] = torch.tensor([reader.chunk_offset for reader in readers])

    def decode(
        model: Any, input_ids: torch.Tensor, logits_processor: Any, stopping_criteria: Any, **kwargs: Any
    ) -> Any:
        # `generate` has made the processors for these prompts. They hold for the whole answer of a row.
        if cache is None:
            for row in rows:
                row.processors = logits_processor
        turns = LogitsProcessorList([_Choose(turn)]), StoppingCriteriaList([_Take(turn)])
        return model._sample(input_ids, *turns, **kwargs)[CACHE_NAME]

    padding = config.pad_token_id
    tokens = [[padding] * (width - len(row.tokens)) + row.tokens if cache is None else row.tokens[-1:] for row in rows]
    return model.generate(
        torch.tensor(tokens, device=device), generation_config=config, custom_generate=decode, **inputs
    )


class _Turn:
    """The steps of a batch until a row ends, or something else says that they are over."""

    def __init__(self, rows: list[Row], ends: set[int], is_over: Callable[[], bool]) -> None:
        self.rows, self._ends, self._is_over = rows, ends, is_over
        self.is_over = False

    def choose(self, scores: torch.Tensor) -> torch.Tensor:
        """Every row draws its own token."""
        if self.is_over:  # some devices compute a step more than they are asked for, and take it back
            return scores
        return torch.stack([row.draw(own).to(scores) for row, own in zip(self.rows, scores, strict=True)])

    def take(self, tokens: list[int]) -> bool:
        """Hand every row its token. Whether the turn is over."""
        if not self.is_over:
            for row, token in zip(self.rows, tokens, strict=True):
                row.add(token, self._ends)
            self.is_over = any(row.reason is not None for row in self.rows) or self._is_over()
        return self.is_over


class _Choose(LogitsProcessor):
    """A turn, as `generate` asks for scores."""

    def __init__(self, turn: _Turn) -> None:
        self._turn = turn

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        return self._turn.choose(scores)


class _Take(StoppingCriteria):
    """A turn, as `generate` asks whether to stop."""

    def __init__(self, turn: _Turn) -> None:
        self._turn = turn

    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
        is_over = self._turn.take(input_ids[:, -1].tolist())
        return torch.full((len(input_ids),), is_over, device=input_ids.device)


__all__ = ["Batch", "grouped", "regrouped"]
