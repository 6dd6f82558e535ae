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

from .source import BatchReader, Key, Source, described
from .text import TextStream


logger = logging.getLogger(__name__)

# Seconds for which the first request of a batch waits for others.
_GATHERING = 0.01


class QueueFullError(Exception):
    """As many requests wait as may wait."""


class StoppedError(Exception):
    """The engine takes no more work."""


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
class ChunkRead:
    """
    Passages that were looked up for one chunk.

    Attributes:
        chunk (`int`): its index. Chunks are counted from the beginning of the prompt.
        query (`str`): the text that was looked up.
        first_token (`int`): the first token of the answer that was written while these passages were read.
        first_character (`int`): where that token begins in the text of the answer.
        is_read (`bool`): whether the answer's tokens read them. Passages of earlier chunks of the prompt are read by the prompt.
        passages (`list[dict]`): nearest first.
    """

    chunk: int
    query: str
    first_token: int
    first_character: int
    is_read: bool
    passages: list[dict[str, Any]]


@dataclass(frozen=True)
class Finished:
    """
    The end of an answer.

    Attributes:
        reason (`str`): `"stop"`, `"length"`, `"cancelled"` or `"timeout"`.
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
    """An answer that was not made."""

    message: str


Event = Delta | ChunkRead | Finished | Failed


@dataclass
class Job:
    """
    One answer to be generated.

    Attributes:
        prompt (`list[int]`): its tokens.
        sampling ([`Sampling`]): how to choose tokens.
        emit (`Callable[[Event], None]`): is told what happens, in the engine's thread. It must not wait.
        retrieve (`bool`): whether to read the store.
        query (`str`, *optional*): is looked up instead of the last chunk of the prompt.
        deadline (`float`): of `time.monotonic()`.
        cancelled (`bool`): set by whoever does not want the answer any more.
    """

    prompt: list[int]
    sampling: Sampling
    emit: Callable[[Event], None]
    retrieve: bool = True
    query: str | None = None
    deadline: float = float("inf")
    cancelled: bool = False


@dataclass
class _Work:
    """Something else to be done by the engine's thread, between two batches."""

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
        """Tokens that a prompt and its answer may have together, if the model has a limit."""
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
        """The next batch: the first request and others with or without retrieval, as it is. None at the end."""
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
            queries: dict[Key, str | None] = {}
            for item in self._waiting:
                if isinstance(item, Job) and (item.cancelled or time.monotonic() > item.deadline):
                    item.emit(Finished("cancelled" if item.cancelled else "timeout", 0, "off"))
                elif self._fits(item, batch, queries):
                    batch.append(item)  # type: ignore[arg-type]
                else:
                    rest.append(item)
            self._waiting = rest
            return batch

    def _fits(self, item: Job | _Work, batch: list[Job], queries: dict[Key, str | None]) -> bool:
        """Whether a request can be generated with a batch. Those that look up different texts for the same tokens cannot."""
        if isinstance(item, _Work) or len(batch) == self.max_batch or (batch and item.retrieve != batch[0].retrieve):
            return False
        key = self._last_chunk(item.prompt)
        return queries.setdefault(key, item.query) == item.query

    def _last_chunk(self, prompt: list[int]) -> Key:
        """The chunk that the prompt ends."""
        size = self.model.config.chunk_size
        return tuple(([-1] * size + prompt)[-size:])

    def reader_for(self, prompts: list[tuple[list[int], str | None]]) -> BatchReader:
        """The retriever for prompts, each with the text that is looked up instead of its last chunk, or None."""
        if self.source is None:
            raise ValueError("The engine has no store to read.")
        return BatchReader(self.source, {self._last_chunk(prompt): query for prompt, query in prompts if query})

    def _generate(self, jobs: list[Job]) -> None:
        if not jobs:
            return
        reader = None
        if jobs[0].retrieve and self.source is not None:
            reader = self.reader_for([(job.prompt, job.query) for job in jobs])
        rows = [_Row(job, self.tokenizer, self.model.config.chunk_size, reader) for job in jobs]
        width = max(len(job.prompt) for job in jobs)
        pad = self.tokenizer.pad_token_id if self.tokenizer.pad_token_id is not None else 0
        input_ids = torch.tensor([[pad] * (width - len(job.prompt)) + job.prompt for job in jobs])
        mask = torch.tensor([[0] * (width - len(job.prompt)) + [1] * len(job.prompt) for job in jobs])
        config = copy.deepcopy(self.model.generation_config)
        config.update(do_sample=False, num_beams=1, temperature=None, top_p=None, top_k=None, max_length=None)
        config.update(max_new_tokens=max(job.sampling.max_tokens for job in jobs), pad_token_id=pad)
        device = self.model.device
        self.model.generate(
            input_ids.to(device),
            generation_config=config,
            attention_mask=mask.to(device),
            chunk_offset=torch.tensor([row.offset for row in rows]),
            retriever=reader,
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
    """One request in a batch. The grid is placed so that its prompt ends a chunk, which is looked up before the first token."""

    def __init__(self, job: Job, tokenizer: Any, chunk_size: int, reader: BatchReader | None) -> None:
        self.job = job
        self.offset = -len(job.prompt) % chunk_size
        self.reason: str | None = None
        seed = job.sampling.seed
        self.generator = torch.Generator()
        self.generator.seed() if seed is None else self.generator.manual_seed(seed)
        self._text = TextStream(tokenizer, job.sampling.stop)
        self._tokenizer = tokenizer
        self._cells = [-1] * self.offset + job.prompt
        self._size = chunk_size
        self._reader = reader

    def draw(self, scores: torch.Tensor) -> torch.Tensor:
        """Scores (float, `(vocab_size,)`) whose largest entry is a token drawn as the request asks."""
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
        """Take the next token, tell what was read for it and what it shows, and end where the request says so."""
        if len(self._text.ids) == 0 or len(self._cells) % self._size == 0:
            self._tell_chunks()
        self._cells.append(token)
        if token in ends:
            self._text.ids.append(token)
            return self.end("stop")
        self._show(self._text.add(token))
        if self._text.stopped:
            self.end("stop")
        elif len(self._text.ids) >= self.job.sampling.max_tokens:
            self.end("length")
        elif self.job.cancelled:
            self.end("cancelled")
        elif time.monotonic() > self.job.deadline:
            self.end("timeout")
        return None

    def end(self, reason: str) -> None:
        """Tell that the answer is complete."""
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

    def _tell_chunks(self) -> None:
        """Tell what the chunks were given that end before the next token: all of the prompt's at first, then one."""
        if self._reader is None:
            return
        num_chunks, written = len(self._cells) // self._size, len(self._text.ids)
        for chunk in range(0 if written == 0 else num_chunks - 1, num_chunks):
            key = tuple(self._cells[chunk * self._size : (chunk + 1) * self._size])
            if key not in self._reader.found:
                continue
            last = chunk == num_chunks - 1
            query = self.job.query if last and written == 0 else None
            if query is None:
                query = self._tokenizer.decode([token for token in key if token >= 0])
            passages = described(self._reader.found[key])
            self.job.emit(ChunkRead(chunk, query, written, self._text.length, last, passages))


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
    "QueueFullError",
    "Sampling",
    "StoppedError",
]
