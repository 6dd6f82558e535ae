"""
Who does the work of a build: this process, several processes, or every rank of a job.

A task is idempotent, and its output appears when it is complete, so work can be stopped and repeated anywhere. Ranks need
only a folder that all of them see, which suits torchrun and Slurm. [`retro_hf.datastore.ray`] uses a Ray cluster.
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

import numpy as np
import torch

from ..arguments import real, shown, whole
from ..errors import DatastoreInputError, RetroError, counted
from .atomic_files import hash_of


_POLL_SECONDS = 0.2
_MAX_WORKERS = 1024
# Calls that wait for a worker. The number is bounded, so that documents are read only as fast as they are processed.
_CALLS_PER_WORKER = 2


class Task(Protocol):
    """One stage of a build: picklable, and safe to run twice."""

    def output(self, *args: Any) -> Path:
        """The file or folder that exists once the call with these arguments is done."""

    def __call__(self, *args: Any) -> None:
        """Make the output."""


class Call(NamedTuple):
    """The arguments of one call of a task, and how many units of progress it counts for."""

    units: int
    args: tuple[Any, ...]


class Run(Protocol):
    """Runs the calls of one of the tasks that an executor was started with."""

    def __call__(self, task: int, calls: Iterable[Call]) -> Iterator[int]:
        """Yield the units of each call once its output exists; `calls` is read only as fast as they are processed."""


class Executor(Protocol):
    """Runs the calls of tasks, in any order and place."""

    is_main: bool
    """Whether this process puts the results together. Of several that run the same build, one does."""

    def start(self, tasks: Sequence[Task]) -> AbstractContextManager[Run]:
        """Get ready for some tasks. Workers receive the tasks once, and stop when the context ends."""


def run_stage(run: Run, tasks: Sequence[Task], task: int, calls: Iterable[Call], progress: Any) -> None:
    """Run the calls of a task whose output does not exist yet."""

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

    Workers are spawned, since neither FAISS nor torch survives a fork with its threads. A script that uses workers needs
    the usual `if __name__ == "__main__":`.
    """

    is_main = True

    def __init__(self, num_workers: int = 1) -> None:
        self.num_workers = whole("executor", num_workers, DatastoreInputError, most=_MAX_WORKERS)

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
        # The tasks go through a queue. If they were an argument and the worker died at its start, Python would wait forever.
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
                    "A worker process ended before its work was done, usually for lack of memory: use fewer workers and repeat the "
                    "call, which resumes. If workers cannot start at all, put `if __name__ == '__main__':` around the code of the "
                    "script, which each worker imports."
                ) from error
            finally:
                pool.shutdown(cancel_futures=True)


def _finished(pending: dict[Future[None], int]) -> Iterator[int]:
    """Wait for at least one of the pending calls, remove those that are done, and yield their units."""
    for future in wait(pending, return_when=FIRST_COMPLETED).done:
        units = pending.pop(future)
        future.result()
        yield units


def as_executor(executor: Executor | int) -> Executor:
    """An executor from a number of processes; DatastoreInputError for something else."""
    if isinstance(executor, (int, np.integer)):
        return LocalExecutor(int(executor) if not isinstance(executor, bool) else executor)
    if not hasattr(executor, "start") or not hasattr(executor, "is_main"):
        raise DatastoreInputError(
            f"executor is {shown(executor)}. Pass a number of processes, such as 2, a RankExecutor or a RayExecutor."
        )
    return executor


class WorkRemovedError(RetroError):
    """The first rank has removed the unfinished work: the store is complete, or the first rank has failed."""


def _of_launcher(*variables: str, default: int) -> int:
    """The number in the first environment variable that is set."""
    for variable in variables:
        if (text := os.environ.get(variable)) is not None:
            return whole(variable, int(text) if text.isdecimal() else text, DatastoreInputError, least=0)
    return default


class RankExecutor:
    """One of `world_size` processes that run the same build over a shared folder; each does its share of the calls.

    Args:
        rank, world_size (`int`, *optional*): by default those of torchrun (`RANK`, `WORLD_SIZE`) or Slurm.
        timeout (`float`, defaults to 86,400): seconds without any progress of the other ranks after which to give up.
    """

    def __init__(self, rank: int | None = None, world_size: int | None = None, timeout: float = 86_400.0) -> None:
        self.rank = _of_launcher("RANK", "SLURM_PROCID", default=0) if rank is None else rank
        self.world_size = _of_launcher("WORLD_SIZE", "SLURM_NTASKS", default=1) if world_size is None else world_size
        for name in ("rank", "world_size"):
            whole(name, getattr(self, name), DatastoreInputError, least=0)
        if not self.rank < self.world_size:
            raise DatastoreInputError(
                f"The rank is {self.rank} of {self.world_size}, but ranks run from 0 to {self.world_size - 1}. Start the "
                "processes with torchrun or srun, or pass rank= and world_size=."
            )
        self.timeout = real("timeout", timeout, DatastoreInputError, least=0)
        self.is_main = self.rank == 0

    @contextmanager
    def start(self, tasks: Sequence[Task]) -> Iterator[Run]:
        """See [`Executor.start`]."""

        def run(task: int, calls: Iterable[Call]) -> Iterator[int]:
            others: list[tuple[Path, int]] = []
            for call in calls:
                output = tasks[task].output(*call.args)
                # The name of the output decides whose work it is. A running number would not do: ranks may see different
                # states of the folder, and skip different calls as done.
                if hash_of(output.name) % self.world_size == self.rank:
                    tasks[task](*call.args)
                    yield call.units
                else:
                    others.append((output, call.units))
            yield from self._wait_for(others)

        yield run

    def _wait_for(self, outputs: list[tuple[Path, int]]) -> Iterator[int]:
        waited = 0.0
        while outputs:
            done = [output.exists() for output, _ in outputs]
            if not all(done) and not outputs[0][0].parent.exists():
                raise WorkRemovedError("The first rank has removed the unfinished work.")
            yield from (units for (_, units), is_done in zip(outputs, done, strict=True) if is_done)
            outputs = [one for one, is_done in zip(outputs, done, strict=True) if not is_done]
            waited = 0.0 if any(done) else waited + _POLL_SECONDS
            if waited > self.timeout:
                raise RetroError(
                    f"Rank {self.rank} waited {self.timeout:.0f} s for {counted(len(outputs), 'block')} of the other ranks, such as "
                    f"{outputs[0][0].name!r}. Start the build again: it resumes."
                )
            if outputs:
                time.sleep(_POLL_SECONDS)
