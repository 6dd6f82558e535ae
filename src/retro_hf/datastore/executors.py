"""Who does the work of a build: this process, several processes, or every rank of a job; block by block.

A task is idempotent and its output appears when it is complete, so work can be stopped and repeated anywhere. `rank`
needs nothing but a folder that all ranks see, and serves torchrun and Slurm; [`retro_hf.datastore.cluster`] has Ray.
"""

from __future__ import annotations

import multiprocessing
import os
import time
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import torch
import xxhash
from transformers.utils import logging

from ..errors import DatastoreInputError, RetroError, counted


__all__ = ["Call", "Executor", "LocalExecutor", "RankExecutor", "Run", "Task", "progress_bar", "run_stage"]

_POLL_SECONDS = 0.2
# Calls that wait for a worker, so that documents are read no faster than they are worked on.
_CALLS_PER_WORKER = 2


class Task(Protocol):
    """One stage of a build: picklable, and safe to run twice."""

    def output(self, *args: Any) -> Path:
        """The file or folder that exists once the call with these arguments is done."""

    def __call__(self, *args: Any) -> None:
        """Make the output."""


class Call(NamedTuple):
    """The arguments of one call of a task, and how many units of progress it is worth."""

    units: int
    args: tuple[Any, ...]


class Run(Protocol):
    """Runs the calls of one of the tasks that an executor was started with."""

    def __call__(self, task: int, calls: Iterable[Call]) -> Iterator[int]:
        """Yield the units of each call once its output exists; `calls` is read only as fast as they are worked off."""


class Executor(Protocol):
    """Runs the calls of tasks, in any order and place."""

    is_main: bool
    """Whether this process puts the results together; of several that run the same build, one does."""

    def start(self, tasks: Sequence[Task]) -> AbstractContextManager[Run]:
        """Get ready for some tasks; workers are given each of them once, and stop when the context ends."""


def progress_bar(show_progress: bool | None, **options: Any) -> Any:
    """A progress bar: on a terminal by default, always with True, never with False or with transformers' bars off."""
    return logging.tqdm(disable=None if show_progress is None else not show_progress, **options)


def run_stage(run: Run, tasks: Sequence[Task], task: int, calls: Iterable[Call], progress: Any) -> None:
    """Run the calls of a task whose output is not there yet."""

    def missing() -> Iterator[Call]:
        for call in calls:
            if tasks[task].output(*call.args).exists():
                progress.update(call.units)
            else:
                yield call

    for units in run(task, missing()):
        progress.update(units)


_tasks: Sequence[Task] = ()


def _receive_tasks(inbox: Any, num_threads: int) -> None:
    global _tasks
    torch.set_num_threads(num_threads)
    _tasks = inbox.get()


def _call_task(task: int, args: tuple[Any, ...]) -> None:
    _tasks[task](*args)


class LocalExecutor:
    """This process, or `num_workers` new ones that share the cores.

    Workers are started afresh (spawn), since neither FAISS nor torch survives a fork with its threads; a script that
    uses them needs the usual `if __name__ == "__main__":`.
    """

    is_main = True

    def __init__(self, num_workers: int = 1) -> None:
        if isinstance(num_workers, bool) or not isinstance(num_workers, int) or num_workers < 1:
            raise DatastoreInputError(f"num_workers is {num_workers!r}, but it must be an integer of at least 1.")
        self.num_workers = num_workers

    @contextmanager
    def start(self, tasks: Sequence[Task]) -> Iterator[Run]:
        """See [`Executor.start`]."""
        if self.num_workers == 1:

            def run_here(task: int, calls: Iterable[Call]) -> Iterator[int]:
                for call in calls:
                    tasks[task](*call.args)
                    yield call.units

            yield run_here
            return

        threads = max(1, torch.get_num_threads() // self.num_workers)
        context = multiprocessing.get_context("spawn")
        # Not as an argument of the workers: to one that dies while it starts, Python would go on writing for ever.
        inbox = context.Queue()
        inbox.cancel_join_thread()
        for _ in range(self.num_workers):
            inbox.put(tasks)
        with ProcessPoolExecutor(self.num_workers, context, _receive_tasks, (inbox, threads)) as pool:

            def run(task: int, calls: Iterable[Call]) -> Iterator[int]:
                pending: dict[Future[None], int] = {}
                for call in calls:
                    pending[pool.submit(_call_task, task, call.args)] = call.units
                    if len(pending) >= _CALLS_PER_WORKER * self.num_workers:
                        yield from _finished(pending)
                while pending:
                    yield from _finished(pending)

            try:
                yield run
            except BrokenProcessPool as error:
                raise RetroError(
                    "A worker process ended before its work was done. If it was killed, then mostly for lack of memory: take fewer "
                    "workers. If it could not start: a script that uses workers needs `if __name__ == '__main__':` around "
                    "what it does, since each worker imports it. What was done is kept, and the same call goes on from there."
                ) from error
            finally:
                pool.shutdown(cancel_futures=True)


def _finished(pending: dict[Future[None], int]) -> Iterator[int]:
    """Wait for at least one of the pending calls, take those that are done out, and yield their units."""
    for future in wait(pending, return_when=FIRST_COMPLETED).done:
        units = pending.pop(future)
        future.result()
        yield units


def as_executor(executor: Executor | int) -> Executor:
    """An executor from a number of processes.

    Raises:
        DatastoreInputError: for what is neither.
    """
    if isinstance(executor, int):
        return LocalExecutor(executor)
    if not hasattr(executor, "start"):
        raise DatastoreInputError(
            f"executor is {executor!r}, but it must be a number of processes, such as 2, a RankExecutor or a RayExecutor."
        )
    return executor


class RankExecutor:
    """One of `world_size` processes that run the same build over a shared folder; each does every so-manieth call.

    Args:
        rank, world_size (`int`, *optional*): by default those of torchrun (`RANK`, `WORLD_SIZE`) or Slurm.
        timeout (`float`, defaults to 86,400): seconds without any progress of the others after which to give up.
    """

    def __init__(self, rank: int | None = None, world_size: int | None = None, timeout: float = 86_400.0) -> None:
        self.rank = int(os.environ.get("RANK", os.environ.get("SLURM_PROCID", 0))) if rank is None else rank
        size = os.environ.get("WORLD_SIZE", os.environ.get("SLURM_NTASKS", 1))
        self.world_size = int(size) if world_size is None else world_size
        if not 0 <= self.rank < self.world_size:
            raise DatastoreInputError(
                f"The rank is {self.rank} of {self.world_size}, but ranks run from 0 to {self.world_size - 1}. Start the "
                "processes with torchrun or srun, or pass rank= and world_size=."
            )
        self.timeout = timeout

    @property
    def is_main(self) -> bool:
        """Whether this is the first rank."""
        return self.rank == 0

    @contextmanager
    def start(self, tasks: Sequence[Task]) -> Iterator[Run]:
        """See [`Executor.start`]."""

        def run(task: int, calls: Iterable[Call]) -> Iterator[int]:
            others: list[tuple[Path, int]] = []
            for call in calls:
                output = tasks[task].output(*call.args)
                # Ranks may see different states of the folder: the output's name decides whose work it is.
                if hash_of_name(output) % self.world_size == self.rank:
                    tasks[task](*call.args)
                    yield call.units
                else:
                    others.append((output, call.units))
            yield from self._wait_for(others)

        yield run

    def _wait_for(self, outputs: list[tuple[Path, int]]) -> Iterator[int]:
        waited = 0.0
        while outputs:
            missing = []
            for output, units in outputs:
                # The first rank removes the folder of unfinished work when the store is complete.
                if output.exists() or not output.parent.exists():
                    yield units
                else:
                    missing.append((output, units))
            waited = 0.0 if len(missing) < len(outputs) else waited + _POLL_SECONDS
            outputs = missing
            if waited > self.timeout:
                raise RetroError(
                    f"Rank {self.rank} waited {self.timeout:.0f} s for {counted(len(outputs), 'block')} of the other ranks, such as "
                    f"{outputs[0][0].name!r}. Start the build again: what is done is kept."
                )
            if outputs:
                time.sleep(_POLL_SECONDS)


def hash_of_name(path: Path) -> int:
    """A number that is the same in every process."""
    return xxhash.xxh3_64_intdigest(path.name.encode())
