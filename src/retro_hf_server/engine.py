"""
The engine of a server: one thread that owns the model, and a queue in front of it.

Requests are generated together, each as a row of a batch. A row begins as soon as one is free, whatever the others do, and
is free again when its answer ends. Between two tokens the thread also does what has to be done in it, such as changes of
the store. Each request keeps its own temperature, seed, stop words and length, and what a row is given does not depend on
the others: its noise comes from its own generator, and its neighbors from its own chunks. (A row's logits differ from
those of the row alone by rounding only.)
"""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any

from .batches import Batch, grouped, regrouped
from .jobs import Failed, Finished, Job, QueueFullError, StoppedError
from .readers import reader_for
from .rows import Row
from .source import Source


logger = logging.getLogger(__name__)


@dataclass
class _Work:
    """A function that the engine's thread runs between two tokens."""

    run: Callable[[], Any]
    result: Future = field(default_factory=Future)


class Engine:
    """
    Generates answers in a thread of its own.

    Args:
        model ([`RetroForCausalLM`]): in evaluation mode.
        tokenizer (`PreTrainedTokenizerBase`): of the model.
        source ([`Source`], *optional*): the store that it reads.
        max_batch (`int`, defaults to 16): requests that are generated together.
        max_queue (`int`, defaults to 64): requests that may wait.

    Attributes:
        num_running (`int`): requests that are being answered.
    """

    def __init__(
        self, model: Any, tokenizer: Any, source: Source | None = None, *, max_batch: int = 16, max_queue: int = 64
    ) -> None:
        self.model = model
        model.generation_config.cache_implementation = None  # rows come and go in a cache that grows
        self.tokenizer = tokenizer
        self.source = source
        self.max_batch, self.max_queue = max_batch, max_queue
        self.num_running = 0
        self._takes_others = False
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
    def num_lookups(self) -> int:
        """Texts that were looked up."""
        return 0 if self.source is None else self.source.num_lookups

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
        """Let the engine's thread run a function between two tokens; raises as `submit` does."""
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

    # ── the thread ────────────────────────────────────────────────────────────────────────────────────────────────────

    def _run(self) -> None:
        batches: list[Batch] = []
        while batches or self._wait():
            for work in self._works():
                try:
                    work.result.set_result(work.run())
                except Exception as error:
                    work.result.set_exception(error)
            admitted = self._admitted()
            self.num_running += len(admitted)
            batches += self._begun(admitted)
            batches = self._continued(batches)
            self.num_running = sum(row.reason is None for batch in batches for row in batch.rows)

    def _wait(self) -> bool:
        """Wait for something to do. False at the end."""
        with self._changed:
            while not self._waiting and not self._stopping:
                self._changed.wait()
            return bool(self._waiting)

    def _works(self) -> list[_Work]:
        with self._changed:
            works = [item for item in self._waiting if isinstance(item, _Work)]
            self._waiting = deque(item for item in self._waiting if isinstance(item, Job))
            return works

    def _admitted(self) -> list[Job]:
        """The requests that get a row, first come, first served. Those that nobody waits for any more leave the queue."""
        admitted: list[Job] = []
        rest: deque[Job | _Work] = deque()
        with self._changed:
            for item in self._waiting:
                if isinstance(item, Job) and (reason := _reason_to_drop(item)):
                    item.emit(Finished(reason, 0, "off"))
                elif isinstance(item, Job) and self.num_running + len(admitted) < self.max_batch:
                    admitted.append(item)
                else:
                    rest.append(item)
            self._waiting = rest
        return admitted

    def _is_wanted(self) -> bool:
        """Whether the queue holds something that can be done at once."""
        with self._changed:
            return any(
                isinstance(item, _Work) or self.num_running < self.max_batch or bool(_reason_to_drop(item))
                for item in self._waiting
            )

    def _begun(self, jobs: list[Job]) -> list[Batch]:
        """The requests as batches with their first tokens, without those that fail."""
        rows = [row for job in jobs if (row := self._row(job)) is not None]
        if self._takes_others:
            return [batch for group in grouped(rows) for batch in self._first_tokens(group)]
        # The first answer shows whether prompts of this model can be computed together.
        begun = [batch for row in rows for batch in self._first_tokens([row])]
        self._takes_others = any(batch.takes_others for batch in begun)
        return begun

    def _row(self, job: Job) -> Row | None:
        """The request as a row; None if what it reads cannot be prepared."""
        try:
            reader = None
            if job.retrieve and self.source is not None:
                reader = reader_for(self.source, self.model, job.prompt, self.tokenizer, job.sampling.max_tokens)
            return Row(job, self.tokenizer, reader)
        except Exception as error:  # one bad request must not end the server
            logger.exception("A request failed.")
            job.emit(_failure(error))
            return None

    def _first_tokens(self, rows: list[Row]) -> list[Batch]:
        """The rows as one batch. If that fails, each is tried alone, so that only a row that fails itself gets an error."""
        try:
            return [Batch.of(self.model, rows, self._ends())]
        except Exception as error:
            if len(rows) == 1 or any(len(row.tokens) > len(row.job.prompt.tokens) for row in rows):
                self._fail(rows, error)
                return []
        again = (Row(row.job, self.tokenizer, row.reader) for row in rows)  # with the first of its random numbers
        return [batch for row in again for batch in self._first_tokens([row])]

    def _continued(self, batches: list[Batch]) -> list[Batch]:
        """Put rows together that can be, and let each batch run until there is something to do in the queue."""
        rows = [row for batch in batches for row in batch.rows]
        try:
            batches = regrouped(batches)
            for batch in batches:
                rows = batch.rows
                batch.run(self.model, self._ends(), self._turn(len(batches)))
        except Exception as error:
            self._fail(rows, error)
        return [batch for batch in batches if any(row.reason is None for row in batch.rows)]

    def _fail(self, rows: Sequence[Row], error: Exception) -> None:
        """End the answers of rows that have not ended."""
        logger.exception("A batch of %d requests failed.", len(rows))
        for row in rows:
            if row.reason is None:
                row.reason = "failed"
                row.job.emit(_failure(error))

    def _turn(self, num_batches: int) -> Callable[[], bool]:
        """Tells a batch after each token whether others have their turn: what waits, and after a chunk other batches."""
        steps = iter(range(1, self.model.config.chunk_size))
        return lambda: self._is_wanted() or (num_batches > 1 and next(steps, None) is None)

    def _ends(self) -> set[int]:
        """Tokens that end an answer."""
        ends = self.model.generation_config.eos_token_id
        ends = ends if isinstance(ends, list) else [ends]
        return {end for end in (*ends, self.tokenizer.eos_token_id) if end is not None}


def _reason_to_drop(job: Job | _Work) -> str | None:
    """Why a request that waits needs no answer any more; None if it needs one."""
    if isinstance(job, _Work):
        return None
    return "canceled" if job.canceled else "timeout" if time.monotonic() > job.deadline else None


def _failure(error: Exception) -> Failed:
    return Failed(f"The model failed: {type(error).__name__}: {error}")


__all__ = ["Engine"]
