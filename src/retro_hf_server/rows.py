"""One request that is being answered: what it has read and written, and how its next token is chosen."""

from __future__ import annotations

import time
from typing import Any, cast

import torch
from transformers import LogitsProcessorList

from .jobs import Delta, Finished, Job
from .readers import Reader
from .text import TextStream


class Row:
    """
    A row of a batch. Nothing in it depends on the other rows.

    Args:
        job ([`Job`]): the request.
        tokenizer (`PreTrainedTokenizerBase`): of the model.
        reader ([`Reader`], *optional*): what it reads; None without retrieval.

    Attributes:
        tokens (`list[int]`): the prompt, and what was written after it.
        reason (`str`, *optional*): why the answer has ended; None while it has not.
        processors (`LogitsProcessorList`): what the model's `generation_config` asks for, made for this prompt alone.
    """

    def __init__(self, job: Job, tokenizer: Any, reader: Reader | None = None) -> None:
        self.job, self.reader = job, reader
        self.tokens = list(job.prompt.tokens)
        self.reason: str | None = None
        self.processors = LogitsProcessorList()
        seed = job.sampling.seed
        self.generator = torch.Generator()
        self.generator.seed() if seed is None else self.generator.manual_seed(seed)
        self._text = TextStream(tokenizer, job.sampling.stop)

    @property
    def neighbor_size(self) -> int | None:
        """Tokens of each neighbor; None without retrieval."""
        return None if self.reader is None else self.reader.neighbor_size

    def draw(self, scores: torch.Tensor) -> torch.Tensor:
        """Scores (float, `(vocab_size,)`); the largest is that of a token drawn with the request's settings."""
        if self.processors:
            tokens: Any = torch.tensor([self.tokens], device=scores.device)
            scores = self.processors(tokens, cast("Any", scores).unsqueeze(0))[0]
        sampling = self.job.sampling
        if sampling.temperature == 0:
            return scores
        scores = scores.float().cpu() / sampling.temperature
        if 0 < sampling.top_k < len(scores):
            scores = scores.masked_fill(scores < scores.topk(sampling.top_k).values[-1], float("-inf"))
        if sampling.top_p < 1:
            ordered, order = scores.sort(descending=True)
            before = ordered.softmax(-1).cumsum(-1) - ordered.softmax(-1)
            scores = scores.masked_fill((before >= sampling.top_p)[order.argsort()], float("-inf"))
        # One random number and a table, because a random number for each token would take longer than a layer of the model.
        table = scores.softmax(-1).double().cumsum(-1)
        place = torch.rand(1, generator=self.generator, dtype=torch.double) * table[-1]
        drawn = torch.full_like(scores, float("-inf"))
        drawn[torch.searchsorted(table, place, right=True).clamp(max=len(table) - 1)] = 0.0
        return drawn

    def add(self, token: int, ends: set[int]) -> None:
        """Take the next token, send its text and what was read for it, and end the answer if the request says so."""
        if self.reader is not None:
            for read in self.reader.reads(len(self._text.ids), self._text.length):
                self.job.emit(read)
        self.tokens.append(token)
        if token in ends:
            self._text.ids.append(token)
            return self.end("stop")
        self._show(self._text.add(token))
        if self._text.stopped:
            self.end("stop")
        elif len(self._text.ids) >= self.job.sampling.max_tokens:
            self.end("length")
        elif self.job.canceled:
            self.end("canceled")
        elif time.monotonic() > self.job.deadline:
            self.end("timeout")
        return None

    def end(self, reason: str) -> None:
        """Send that the answer is complete."""
        num_tokens = len(self._text.ids)
        if reason != "stop" or not self._text.stopped:
            self._show(self._text.finish())
        self.reason = "stop" if self._text.stopped else reason
        status, message, store = "off", None, None
        if self.reader is not None:
            status, message = ("on", None) if self.reader.error is None else ("unavailable", self.reader.error)
            store = self.reader.store
        self.job.emit(Finished(self.reason, num_tokens, status, message, store))

    def _show(self, text: str) -> None:
        if text:
            self.job.emit(Delta(text))


__all__ = ["Row"]
