"""Builds on a Ray cluster: a pool of actors that work on the blocks of a datastore.

Nodes share a file system, on which the datastore, and the encoder unless it comes from the Hub, have the same path
everywhere. What is done is files there; all that passes through Ray is the documents on their way in. So a worker or a
node can be lost at any moment, and costs only the blocks that it was working on.
"""

from __future__ import annotations

import socket
import time
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from transformers.utils import logging

from .. import extras
from ..errors import DatastoreInputError, DatastoreNotFoundError, RetroError
from .executors import Call, Run, Task


__all__ = ["RayExecutor", "check_size", "connected", "import_ray", "room_for"]

logger = logging.get_logger(__name__)

# Workers lost over the same call before it is taken for the cause.
_MAX_LOSSES = 5
# A network file system may show what another node has written only when its caches run out, after a minute by default.
_VISIBLE_SECONDS = 90.0
_POLL_SECONDS = 0.1


def import_ray() -> Any:
    """The module `ray`, imported when it is first needed; raises `MissingExtraError` without it."""
    return extras.load("ray", "A cluster of several machines")


@contextmanager
def connected(address: str | None) -> Iterator[Any]:
    """The module `ray`, connected to a cluster; a connection that was there before is used, and left open."""
    ray = import_ray()
    if ray.is_initialized():
        yield ray
        return
    ray.init(address=address)
    try:
        yield ray
    finally:
        ray.shutdown()


def room_for(ray: Any, num_cpus: float, num_gpus: float) -> int:
    """How many actors of a size the whole cluster holds.

    Raises:
        DatastoreInputError: if it holds none.
    """
    resources = ray.cluster_resources()
    wanted = {"CPU": num_cpus, "GPU": num_gpus}
    room = min(int(resources.get(kind, 0) / size) for kind, size in wanted.items() if size > 0)
    if not room:
        raise DatastoreInputError(
            f"A worker needs {num_cpus} CPUs and {num_gpus} GPUs, but the whole Ray cluster has "
            f"{resources.get('CPU', 0):g} and {resources.get('GPU', 0):g}. Ask for less per worker, or, where an autoscaler "
            "adds nodes, say how many workers there are to be."
        )
    return room


def check_size(num_actors: int | None, num_cpus: float, num_gpus: float) -> None:
    """Refuse sizes that no actor can have; raises `DatastoreInputError`."""
    if num_actors is not None and (isinstance(num_actors, bool) or not isinstance(num_actors, int) or num_actors < 1):
        raise DatastoreInputError(f"The number of workers is {num_actors!r}, but it must be an integer of at least 1.")
    if num_cpus < 0 or num_gpus < 0 or num_cpus + num_gpus == 0:
        raise DatastoreInputError(
            f"A worker is given {num_cpus} CPUs and {num_gpus} GPUs, but it needs some of either."
        )


class _Worker:
    """The actor of a build: it gets the tasks once, and loads the encoder once."""

    def __init__(self, tasks: Sequence[Task], num_threads: int) -> None:
        logging.disable_progress_bar()
        torch.set_num_threads(num_threads)
        self._tasks = tasks

    def ready(self) -> None:
        """Return when the worker has started."""

    def call(self, task: int, args: tuple[Any, ...]) -> None:
        """Run one call of a task."""
        folder = self._tasks[task].output(*args).parent
        if not folder.is_dir():
            raise DatastoreNotFoundError(
                f"The folder {str(folder)!r} is not there on the node {socket.gethostname()!r}. Build the datastore on a "
                "file system that all nodes of the cluster share, under the same path everywhere."
            )
        self._tasks[task](*args)


class _Assignment(NamedTuple):
    """A call at work: whose it is, and how many workers were lost over it before."""

    worker: Any
    call: Call
    losses: int


class _Pool:
    """Workers that are each handed one call at a time, and replaced when they are lost."""

    def __init__(self, ray: Any, create: Any, num_workers: int) -> None:
        self._ray, self._create = ray, create
        self._starting: dict[Any, Any] = {}
        self._idle: list[Any] = []
        self._working: dict[Any, _Assignment] = {}
        for _ in range(num_workers):
            self._add_worker()

    def _add_worker(self) -> None:
        worker = self._create()
        # A worker without room waits here, until room is made or a node comes.
        self._starting[worker.ready.remote()] = worker

    def run(self, tasks: Sequence[Task], task: int, calls: Iterable[Call]) -> Iterator[int]:
        """See [`Run`]. Documents are read when a worker is there for them, so no more of them are held than workers."""
        calls, lost = iter(calls), deque[tuple[Call, int]]()
        exhausted = False
        while True:
            while self._idle and not (exhausted and not lost):
                call, losses = lost.popleft() if lost else (next(calls, None), 0)
                if call is None:
                    exhausted = True
                    break
                worker = self._idle.pop()
                self._working[worker.call.remote(task, call.args)] = _Assignment(worker, call, losses)
            if not self._working and not lost and exhausted:
                return
            for reference in self._ray.wait([*self._working, *self._starting])[0]:
                if reference in self._starting:
                    self._take_in(reference)
                    continue
                assignment = self._working.pop(reference)
                if self._finished(reference, assignment):
                    _wait_until_visible(tasks[task].output(*assignment.call.args))
                    yield assignment.call.units
                else:
                    lost.append((assignment.call, assignment.losses + 1))

    def _take_in(self, reference: Any) -> None:
        """A worker has started; or been lost before that, and is replaced."""
        worker = self._starting.pop(reference)
        try:
            self._ray.get(reference)
        except self._ray.exceptions.RayActorError as error:
            if error.actor_init_failed:
                raise RetroError(
                    f"A worker could not start: {error}. Every node needs retro-hf and what the embedder needs, in the "
                    "versions of this process."
                ) from error
            self._add_worker()
        else:
            self._idle.append(worker)

    def _finished(self, reference: Any, assignment: _Assignment) -> bool:
        """Whether a call was done; if its worker was lost instead, that is replaced. Errors of the task are raised."""
        exceptions = self._ray.exceptions
        try:
            self._ray.get(reference)
        except exceptions.RayTaskError as error:
            self._idle.append(assignment.worker)
            raise error.cause from error
        except exceptions.RayError as error:
            self._ray.kill(assignment.worker)
            self._add_worker()
            if assignment.losses + 1 == _MAX_LOSSES:
                raise RetroError(
                    f"{_MAX_LOSSES} workers were lost over the same work, the last with: {error}. Either it takes more memory "
                    "than a worker has, or the cluster is failing. What is done is kept: start the build again."
                ) from error
            logger.warning(f"A worker was lost; what it was doing is given to another. Ray says: {error}")
            return False
        self._idle.append(assignment.worker)
        return True

    def stop(self) -> None:
        """Kill the workers, and wait until Ray says of those at work that they have ended."""
        for worker in (*self._idle, *self._starting.values(), *(one.worker for one in self._working.values())):
            self._ray.kill(worker)
        if self._working:
            self._ray.wait(list(self._working), num_returns=len(self._working), timeout=30)


def _wait_until_visible(output: Path) -> None:
    deadline = time.monotonic() + _VISIBLE_SECONDS
    while not output.exists():
        if time.monotonic() > deadline:
            raise DatastoreNotFoundError(
                f"A worker has written {str(output)!r}, but after {_VISIBLE_SECONDS:.0f} s it still cannot be seen from "
                f"{socket.gethostname()!r}. Build the datastore on a file system that all nodes of the cluster share."
            )
        time.sleep(_POLL_SECONDS)


class RayExecutor:
    """Runs a build on a Ray cluster: `RetroDatastore.build(..., executor=RayExecutor())`, and `append` alike.

    The datastore is written to a file system that all nodes share, under the same path; the encoder is a name on the Hub
    or lies there too. This process reads the documents and hands them out, block by block; each worker is given the
    tasks once and one block at a time. A worker or node that is lost costs the blocks it was working on: they are given
    to others, and it is replaced when there is room again.

    Args:
        num_workers (`int`, *optional*): by default as many as the cluster has room for. More than that wait for room,
            which an autoscaler makes.
        num_cpus_per_worker (`float`, defaults to 1): CPUs that a worker occupies, and its threads.
        num_gpus_per_worker (`float`, defaults to 0): GPUs that a worker occupies; with 1, each embeds on its own.
        address (`str`, *optional*): of the cluster, such as `"auto"`. By default the one that this process belongs to
            (`RAY_ADDRESS`), or a new one on this machine. A connection that was made before (`ray.init`) is used.

    Raises:
        MissingExtraError: when a build starts, if Ray is not installed.
    *Determinism*: on nodes of one kind the store has the bytes that one process makes with as many threads.
    *Memory*: of this process, a block per worker (about 1 MB, or one document where that is longer), and 8 bytes per
    document of the input.
    """

    is_main = True

    def __init__(
        self,
        num_workers: int | None = None,
        *,
        num_cpus_per_worker: float = 1,
        num_gpus_per_worker: float = 0,
        address: str | None = None,
    ) -> None:
        check_size(num_workers, num_cpus_per_worker, num_gpus_per_worker)
        self.num_workers = num_workers
        self.num_cpus_per_worker = num_cpus_per_worker
        self.num_gpus_per_worker = num_gpus_per_worker
        self.address = address

    @contextmanager
    def start(self, tasks: Sequence[Task]) -> Iterator[Run]:
        """See [`Executor.start`]."""
        with connected(self.address) as ray:
            room = room_for(ray, self.num_cpus_per_worker, self.num_gpus_per_worker) if self.num_workers is None else 0
            actor = ray.remote(
                num_cpus=self.num_cpus_per_worker, num_gpus=self.num_gpus_per_worker, scheduling_strategy="SPREAD"
            )(_Worker)
            create = partial(actor.remote, ray.put(tuple(tasks)), max(1, int(self.num_cpus_per_worker)))
            pool = _Pool(ray, create, self.num_workers or room)
            try:
                yield partial(pool.run, tasks)
            finally:
                pool.stop()
