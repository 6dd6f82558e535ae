"""
The engine of a server: one thread that owns the model, and a queue in front of it.

Requests that wait together are generated together, in one padded batch. Each keeps its own temperature, seed, stop words
and length, and what a row is given does not depend on the others: its noise comes from its own generator, and its
neighbors from its own chunks. (A row's logits differ from those of the row alone by rounding only.)
"""

from __future__ import annotations

import copy
import logging
import threading
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import LogitsProcessor, LogitsProcessorList, StoppingCriteria, StoppingCriteriaList

from .readers import ChunkRead, Prompt, Reader, reader_for
from .source import Source
from .text import TextStream


logger = logging.getLogger(__name__)

# Seconds for which the first request of a batch waits for others.
_GATHERING = 0.01


class QueueFullError(Exception):
    """The queue of requests is full."""


class StoppedError(Exception):
    """The engine is closing and takes no more requests."""


@dataclass(frozen=True)
class Sampling:
    """
    How the tokens of one answer are chosen.

    Attributes:
        max_tokens (`int`): how many there may be.
        temperature (`float`): 0 takes the likeliest token.
        top_p (`float`): draw from the likeliest tokens that have this probability together.
        top_k (`int`): draw from this many tokens; 0 means all.
        seed (`int`, *optional*): the same seed gives the same draws.
        stop (`tuple[str]`): texts at which the answer ends.
    """

    max_tokens: int
    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    seed: int | None = None
    stop: tuple[str, ...] = ()


@dataclass(frozen=True)
class Delta:
    """New text of an answer."""

    text: str


@dataclass(frozen=True)
class Finished:
    """
    The end of an answer.

    Attributes:
        reason (`str`): `"stop"`, `"length"`, `"canceled"` or `"timeout"`.
        num_tokens (`int`): tokens of the answer, with the one that ended it.
        retrieval (`str`): `"on"`, `"off"` or `"unavailable"`.
        message (`str`, *optional*): why retrieval was not available.
        store (`dict`, *optional*): the generation of the store and its number of documents.
    """

    reason: str
    num_tokens: int
    retrieval: str
    message: str | None = None
    store: dict[str, int] | None = None


@dataclass(frozen=True)
class Failed:
    """Why there is no answer."""

    message: str


Event = Delta | ChunkRead | Finished | Failed


@dataclass
class Job:
    """
    One answer to be generated.

    Attributes:
        prompt ([`Prompt`]): what it follows.
        sampling ([`Sampling`]): how to choose tokens.
        emit (`Callable[[Event], None]`): is told what happens, in the engine's thread. It must not wait.
        retrieve (`bool`): whether to read the store.
        deadline (`float`): of `time.monotonic()`.
        canceled (`bool`): set by whoever does not want the answer any more.
    """

    prompt: Prompt
    sampling: Sampling
    emit: Callable[[Event], None]
    retrieve: bool = True
    deadline: float = float("inf")
    canceled: bool = False


@dataclass
class _Work:
    """A function that the engine's thread runs between two batches."""

    run: Callable[[], Any]
    result: Future = field(default_factory=Future)


class Engine:
    """
    Generates answers, one batch at a time, in a thread of its own.

    Args:
        model ([`RetroForCausalLM`]): in evaluation mode.
        tokenizer (`PreTrainedTokenizerBase`): of the model.
        source ([`Source`], *optional*): the store that it reads.
        max_batch (`int`, defaults to 8): requests that are generated together.
        max_queue (`int`, defaults to 64): requests that may wait.
    """

    def __init__(
        self, model: Any, tokenizer: Any, source: Source | None = None, *, max_batch: int = 8, max_queue: int = 64
    ) -> None:
        self.model = model
        self.tokenizer = tokenizer
        self.source = source
        self.max_batch, self.max_queue = max_batch, max_queue
        self.num_running = 0
        self.num_lookups = 0
        self._waiting: deque[Job | _Work] = deque()
        self._changed = threading.Condition()
        self._stopping = False
        self._thread = threading.Thread(target=self._run, name="retro-engine", daemon=True)
        self._thread.start()

    @property
    def num_waiting(self) -> int:
        """Requests in the queue."""
        return len(self._waiting)

    @property
    def context_size(self) -> int | None:
        """The longest prompt with its answer, in tokens; None if the model has no limit."""
        return getattr(self.model.config.get_text_config(decoder=True), "max_position_embeddings", None)

    def submit(self, job: Job) -> None:
        """
        Queue a request.

        Raises:
            QueueFullError: if as many wait as may wait.
            StoppedError: after `close`.
        """
        self._put(job)

    def call(self, run: Callable[[], Any]) -> Future:
        """Let the engine's thread run a function between two batches; raises as `submit` does."""
        work = _Work(run)
        self._put(work)
        return work.result

    def close(self) -> None:
        """Finish what was queued, then end the thread."""
        with self._changed:
            self._stopping = True
            self._changed.notify()
        self._thread.join()

    def _put(self, item: Job | _Work) -> None:
        with self._changed:
            if self._stopping:
                raise StoppedError("The server is stopping.")
            if len(self._waiting) >= self.max_queue:
                raise QueueFullError(
                    f"{len(self._waiting)} requests are waiting, and no more may wait. Try again later."
                )
            self._waiting.append(item)
            self._changed.notify()

    def _run(self) -> None:
        while (items := self._next()) is not None:
            if isinstance(items, _Work):
                try:
                    items.result.set_result(items.run())
                except Exception as error:
                    items.result.set_exception(error)
                continue
            self.num_running = len(items)
            try:
                self._generate(items)
            except Exception as error:  # one bad batch must not end the server
                logger.exception("A batch of %d requests failed.", len(items))
                for job in items:
                    job.emit(Failed(f"The model failed: {type(error).__name__}: {error}"))
            self.num_running = 0

    def _next(self) -> list[Job] | _Work | None:
        """The next batch: the first request and others that read in the same way. None at the end."""
        with self._changed:
            while not self._waiting:
                if self._stopping:
                    return None
                self._changed.wait()
            if isinstance(first := self._waiting[0], _Work):
                self._waiting.popleft()
                return first
            if len(self._waiting) < self.max_batch and not self._stopping:
                self._changed.wait(_GATHERING)
            batch: list[Job] = []
            rest: deque[Job | _Work] = deque()
            for item in self._waiting:
                if isinstance(item, Job) and (item.canceled or time.monotonic() > item.deadline):
                    item.emit(Finished("canceled" if item.canceled else "timeout", 0, "off"))
                elif isinstance(item, Job) and self._fits(item, batch):
                    batch.append(item)
                else:
                    rest.append(item)
            self._waiting = rest
            return batch

    def _fits(self, job: Job, batch: list[Job]) -> bool:
        """Whether a request can be generated with a batch: both read the store or not, for a question or for a text."""
        alike = [(one.retrieve, one.prompt.query is None) for one in (job, *batch[:1])]
        return len(batch) < self.max_batch and len(set(alike)) == 1

    def _generate(self, jobs: list[Job]) -> None:
        if not jobs:
            return
        reader = None
        prompts = [job.prompt for job in jobs]
        if jobs[0].retrieve and self.source is not None:
            reader = reader_for(self.source, self.model, prompts, self.tokenizer)
        rows = [_Row(number, job, self.tokenizer, reader) for number, job in enumerate(jobs)]
        width = max(len(prompt.tokens) for prompt in prompts)
        pad = self.tokenizer.pad_token_id if self.tokenizer.pad_token_id is not None else 0
        input_ids = torch.tensor([[pad] * (width - len(prompt.tokens)) + prompt.tokens for prompt in prompts])
        mask = torch.tensor([[0] * (width - len(prompt.tokens)) + [1] * len(prompt.tokens) for prompt in prompts])
        max_tokens = max(job.sampling.max_tokens for job in jobs)
        config = copy.deepcopy(self.model.generation_config)
        config.update(do_sample=False, num_beams=1, temperature=None, top_p=None, top_k=None, max_length=None)
        config.update(max_new_tokens=max_tokens, pad_token_id=pad)
        device = self.model.device
        self.model.generate(
            input_ids.to(device),
            generation_config=config,
            attention_mask=mask.to(device),
            **({"retriever": None} if reader is None else reader.inputs(max_tokens)),
            logits_processor=LogitsProcessorList([_Sampler(rows)]),
            stopping_criteria=StoppingCriteriaList([_Progress(rows, self._ends())]),
        )
        self.num_lookups += reader.num_lookups if reader else 0
        for row in rows:
            row.end("length")  # it has ended already, unless there was nothing to generate

    def _ends(self) -> set[int]:
        """Tokens that end an answer."""
        ends = self.model.generation_config.eos_token_id
        ends = ends if isinstance(ends, list) else [ends]
        return {end for end in (*ends, self.tokenizer.eos_token_id) if end is not None}


class _Row:
    """One request in a batch."""

    def __init__(self, number: int, job: Job, tokenizer: Any, reader: Reader | None) -> None:
        self.job = job
        self.reason: str | None = None
        seed = job.sampling.seed
        self.generator = torch.Generator()
        self.generator.seed() if seed is None else self.generator.manual_seed(seed)
        self._number = number
        self._text = TextStream(tokenizer, job.sampling.stop)
        self._reader = reader

    def draw(self, scores: torch.Tensor) -> torch.Tensor:
        """Scores (float, `(vocab_size,)`); the largest is that of a token drawn with the request's settings."""
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
        # The largest of the scores plus Gumbel noise is a draw from their softmax.
        noise = torch.empty_like(scores).exponential_(generator=self.generator)
        return scores - noise.log()

    def add(self, token: int, ends: set[int]) -> None:
        """Take the next token, send its text and what was read for it, and end the answer if the request says so."""
        if self._reader is not None:
            for read in self._reader.reads(self._number, self._text.ids, self._text.length):
                self.job.emit(read)
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
        if self.reason is not None:
            return
        num_tokens = len(self._text.ids)
        if reason != "stop" or not self._text.stopped:
            self._show(self._text.finish())
        self.reason = "stop" if self._text.stopped else reason
        status, message, store = "off", None, None
        if self._reader is not None:
            status, message = ("on", None) if self._reader.error is None else ("unavailable", self._reader.error)
            store = self._reader.store
        self.job.emit(Finished(self.reason, num_tokens, status, message, store))

    def _show(self, text: str) -> None:
        if text:
            self.job.emit(Delta(text))


class _Sampler(LogitsProcessor):
    """Lets every row of a batch draw its own token."""

    def __init__(self, rows: list[_Row]) -> None:
        self._rows = rows

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        drawn = [row.draw(own) if row.reason is None else own for row, own in zip(self._rows, scores, strict=True)]
        return torch.stack([one.to(scores) for one in drawn])


class _Progress(StoppingCriteria):
    """Hands every row its new token, and ends the rows that are complete."""

    def __init__(self, rows: list[_Row], ends: set[int]) -> None:
        self._rows, self._ends = rows, ends

    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
        for row, token in zip(self._rows, input_ids[:, -1].tolist(), strict=True):
            if row.reason is None:
                row.add(token, self._ends)
        return torch.tensor([row.reason is not None for row in self._rows], device=input_ids.device)


__all__ = [
    "ChunkRead",
    "Delta",
    "Engine",
    "Event",
    "Failed",
    "Finished",
    "Job",
    "Prompt",
    "QueueFullError",
    "Sampling",
    "StoppedError",
]
