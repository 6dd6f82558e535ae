"""
Building and searching a datastore on a Ray cluster.

All nodes share a file system on which the datastore, and the encoder unless it is on the Hub, have the same path. Results
are files there; only the documents on their way in, and queries and ids, pass through Ray. Ray itself repeats the tasks of
a worker or node that is lost, and restarts its actors.
"""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import lru_cache, partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from transformers.utils import logging

from .. import extras
from ..arguments import optional_text, optional_whole, real
from ..errors import DatastoreCorruptError, DatastoreInputError, DatastoreNotFoundError, RetroError
from .executors import Call, Run, Task
from .manifest import DatastoreManifest
from .search_excluding import checked_search, merge_results
from .store_generation import Generation


# Times that Ray starts the same call again because its worker was lost, before the call is taken for the cause.
_MAX_RETRIES = 4
# A network file system may show files of another node only when its caches expire, after a minute by default.
_VISIBLE_SECONDS = 90.0
_POLL_SECONDS = 0.1
_CANCEL_SECONDS = 30


def _import_ray() -> Any:
    return extras.load("ray", "A cluster of several machines")


@contextmanager
def _connected(address: str | None) -> Iterator[Any]:
    """The module `ray`, connected to a cluster. A connection that exists already is used, and left open."""
    ray = _import_ray()
    if ray.is_initialized():
        yield ray
        return
    ray.init(address=address)
    try:
        yield ray
    finally:
        ray.shutdown()


def _room_for(ray: Any, num_cpus: float, num_gpus: float) -> int:
    """How many workers of a size fit on the whole cluster; DatastoreInputError if none does."""
    resources = ray.cluster_resources()
    wanted = {"CPU": num_cpus, "GPU": num_gpus}
    room = min(int(resources.get(kind, 0) / size) for kind, size in wanted.items() if size > 0)
    if not room:
        raise DatastoreInputError(
            f"A worker needs {num_cpus} CPUs and {num_gpus} GPUs, but the whole Ray cluster has {resources.get('CPU', 0):g} and "
            f"{resources.get('GPU', 0):g}. Ask for less per worker, or pass `num_workers` if an autoscaler adds nodes."
        )
    return room


# ── building ──────────────────────────────────────────────────────────────────────────────────────────────────────────


@lru_cache(maxsize=1)
def _tasks_of(reference: Any) -> Sequence[Task]:
    # Ray keeps a worker process for later calls, so the encoder is loaded once per process.
    return _import_ray().get(reference)


def _call_task(tasks: list[Any], num_threads: int, task: int, args: tuple[Any, ...]) -> None:
    """Run one call on a worker. The tasks come as a reference in a list, so that Ray does not fetch them for each call."""
    logging.disable_progress_bar()
    torch.set_num_threads(num_threads)
    work = _tasks_of(tasks[0])[task]
    folder = work.output(*args).parent
    if not folder.is_dir():
        raise DatastoreNotFoundError(
            f"The folder {str(folder)!r} does not exist on the node {socket.gethostname()!r}. Build the datastore on a file system "
            "that all nodes share under the same path."
        )
    work(*args)


def _wait_until_visible(output: Path) -> None:
    deadline = time.monotonic() + _VISIBLE_SECONDS
    while not output.exists():
        if time.monotonic() > deadline:
            raise DatastoreNotFoundError(
                f"A worker has written {str(output)!r}, but {socket.gethostname()!r} does not see it after {_VISIBLE_SECONDS:.0f} s. "
                "Build the datastore on a file system that all nodes share under the same path."
            )
        time.sleep(_POLL_SECONDS)


class RayExecutor:
    """Runs a build on a Ray cluster: `RetroDatastore.build(..., executor=RayExecutor())`, and `append` alike.

    The datastore is written to a file system that all nodes share under the same path; the encoder is on the Hub or there,
    too. This process reads the documents and hands them out block by block. If a worker or a node is lost, Ray gives its
    blocks to others.

    Args:
        num_workers (`int`, *optional*): blocks that are worked on at once; by default as many as the cluster has room for.
            More wait for room, which an autoscaler makes.
        num_cpus_per_worker (`float`, defaults to 1): CPUs that a worker occupies, and its number of threads.
        num_gpus_per_worker (`float`, defaults to 0): GPUs that a worker occupies.
        address (`str`, *optional*): of the cluster, such as `"auto"`. By default the one that this process belongs to
            (`RAY_ADDRESS`), or a new one on this machine. An existing connection (`ray.init`) is used.

    Raises:
        MissingExtraError: when a build starts, if Ray is not installed.
    *Determinism*: on nodes of one kind the store has the bytes that one process with as many threads makes.
    *Memory*: in this process, a block per worker (about 1 MB, or one document if it is longer), and 8 bytes per document of
    the input.
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
        self.num_workers = optional_whole("num_workers", num_workers, DatastoreInputError)
        num_cpus_per_worker = real("num_cpus_per_worker", num_cpus_per_worker, DatastoreInputError, least=0)
        num_gpus_per_worker = real("num_gpus_per_worker", num_gpus_per_worker, DatastoreInputError, least=0)
        if num_cpus_per_worker + num_gpus_per_worker == 0:
            raise DatastoreInputError(
                f"A worker is given {num_cpus_per_worker:g} CPUs and {num_gpus_per_worker:g} GPUs. Give it some of either."
            )
        self.num_cpus_per_worker = num_cpus_per_worker
        self.num_gpus_per_worker = num_gpus_per_worker
        self.address = optional_text("address", address, DatastoreInputError)

    @contextmanager
    def start(self, tasks: Sequence[Task]) -> Iterator[Run]:
        """See [`Executor.start`]."""
        with _connected(self.address) as ray:
            limit = self.num_workers or _room_for(ray, self.num_cpus_per_worker, self.num_gpus_per_worker)
            remote = ray.remote(
                num_cpus=self.num_cpus_per_worker,
                num_gpus=self.num_gpus_per_worker,
                max_retries=_MAX_RETRIES,
                max_calls=0,  # by default Ray starts a new process for every call on a GPU
                scheduling_strategy="SPREAD",
            )(_call_task)
            start = partial(remote.remote, [ray.put(tuple(tasks))], max(1, int(self.num_cpus_per_worker)))
            pending: dict[Any, Call] = {}

            def finished(task: int) -> Iterator[int]:
                for reference in ray.wait(list(pending))[0]:
                    call = pending.pop(reference)
                    _result(ray, reference)
                    _wait_until_visible(tasks[task].output(*call.args))
                    yield call.units

            def run(task: int, calls: Iterable[Call]) -> Iterator[int]:
                for call in calls:
                    # Documents are read only as fast as they are processed.
                    if len(pending) >= limit:
                        yield from finished(task)
                    pending[start(task, call.args)] = call
                while pending:
                    yield from finished(task)

            try:
                yield run
            finally:
                # After an error: no worker may still write to the folder of unfinished work, which is about to be removed.
                for reference in pending:
                    ray.cancel(reference, force=True)
                if pending:
                    ray.wait(list(pending), num_returns=len(pending), timeout=_CANCEL_SECONDS)


def _result(ray: Any, references: Any, timeout: float | None = None) -> Any:
    """What calls returned; errors of the task itself are raised as they were."""
    try:
        return ray.get(references, timeout=timeout)
    except ray.exceptions.RayTaskError as error:
        raise error.cause from error
    except ray.exceptions.GetTimeoutError:
        raise
    except ray.exceptions.RayError as error:
        raise RetroError(
            f"Workers were lost {_MAX_RETRIES + 1} times over the same work: {error}. Give a worker more memory, check `ray status` "
            "and that every node has the same packages, and repeat the call, which resumes."
        ) from error


# ── searching ─────────────────────────────────────────────────────────────────────────────────────────────────────────


class _Searcher:
    """An actor that searches some of the shards, and keeps them open."""

    def __init__(self, folder: Path) -> None:
        torch.set_num_threads(1)
        self._folder = folder
        self._version = -1
        self._opened: Generation | None = None

    def open(self, version: int, manifest: list[Any], places: slice) -> Generation:
        """Open the shards at some places of a manifest, which comes as a reference, since it is long and seldom needed."""
        if self._opened is None or version != self._version:
            named: DatastoreManifest = _import_ray().get(manifest[0])
            known = () if self._opened is None else self._opened.shards
            try:
                self._opened = Generation.open(self._folder, named, known, places)
            except DatastoreCorruptError as error:
                if DatastoreManifest.read(self._folder) == named:
                    raise
                raise DatastoreNotFoundError(
                    f"{str(self._folder)!r} was compacted since generation {named.generation} was opened. Call `refresh()` and search "
                    "again; older chunk ids are void."
                ) from error
            self._version = version
        return self._opened

    def warm_up(self, version: int, manifest: list[Any], places: slice) -> None:
        """Open the shards with their indexes."""
        for shard in self.open(version, manifest, places).shards:
            _ = shard.index

    def search(self, version: int, manifest: list[Any], places: slice, *arguments: Any) -> Any:
        """Search the shards at some places; chunk ids are those of the whole store."""
        return self.open(version, manifest, places).search(*arguments)


class _Opened(NamedTuple):
    """One generation of a store on a cluster: which actor searches which shards of it."""

    version: int
    manifest: DatastoreManifest
    reference: Any
    parts: tuple[tuple[Any, slice], ...]


class RayShards:
    """Searches a datastore on a Ray cluster, each actor its share of the shards: the same results as one process.

    Pass it as the `index` of an [`EmbeddingSearcher`]. Tokens and documents are read from the store itself,
    `RetroDatastore.load(path)`, of which only a few pages are touched. Ray restarts an actor that is lost, on another node if
    need be; it opens its files and answers.

    Args:
        path (`str` or `Path`): the folder of the datastore, on a file system that all nodes share.
        timeout (`float`, defaults to 120): seconds to wait for actors to start, or to answer, before giving up.
        address (`str`, *optional*): of the cluster, as for [`RayExecutor`].

    Raises:
        DatastoreNotFoundError: if there is no datastore at `path`.
        MissingExtraError: if Ray is not installed.
    *Cost*: about 10 ms per search in addition to the search itself, so search in batches.
    *Memory*: of an actor, what its shards' indexes keep resident. There is one actor per shard, or per CPU if these are fewer.
    *Processes*: threads of one process can share it. It ends with [`close`], as a context manager, or with the process.
    """

    def __init__(self, path: str | os.PathLike[str], *, timeout: float = 120.0, address: str | None = None) -> None:
        self.path = Path(os.path.abspath(path))
        self.timeout = timeout
        manifest = DatastoreManifest.read(self.path)
        self._exit = ExitStack()
        self._ray = self._exit.enter_context(_connected(address))
        self._actors: list[Any] = []
        self._exit.callback(self._kill_actors)
        try:
            self._limit = _room_for(self._ray, 1, 0)
            # Ray restarts a lost actor, and repeats the searches that it had not answered.
            actor = self._ray.remote(num_cpus=1, max_restarts=-1, max_task_retries=-1, scheduling_strategy="SPREAD")
            self._create = partial(actor(_Searcher).remote, self.path)
            self._opened = self._open(manifest, 0)
        except BaseException:
            self._exit.close()
            raise

    def _kill_actors(self) -> None:
        for actor in self._actors:
            self._ray.kill(actor)

    def _open(self, manifest: DatastoreManifest, version: int) -> _Opened:
        num_shards = len(manifest.shards)
        wanted = min(self._limit, num_shards)
        while len(self._actors) < wanted:
            self._actors.append(self._create())
        borders = [number * num_shards // wanted for number in range(wanted + 1)]
        parts = tuple(zip(self._actors, map(slice, borders[:-1], borders[1:]), strict=False))
        opened = _Opened(version, manifest, self._ray.put(manifest), parts)
        self._gather(opened, "warm_up")
        return opened

    def _gather(self, opened: _Opened, method: str, *args: Any) -> list[Any]:
        """What a method of every actor returns, in the order of the shards."""
        references = [
            getattr(actor, method).remote(opened.version, [opened.reference], places, *args)
            for actor, places in opened.parts
        ]
        try:
            return _result(self._ray, references, self.timeout)
        except self._ray.exceptions.GetTimeoutError as error:
            done = self._ray.wait(references, num_returns=len(references), timeout=0)[0]
            raise RetroError(
                f"{len(references) - len(done)} of {len(references)} actors for {str(self.path)!r} did not answer within "
                f"{self.timeout:g} s. Check `ray status`: add nodes if one was lost, or raise the timeout."
            ) from error

    @property
    def manifest(self) -> DatastoreManifest:
        """What the folder recorded about itself when it was opened or refreshed."""
        return self._opened.manifest

    @property
    def generation(self) -> int:
        """The generation of the datastore when it was opened or refreshed."""
        return self.manifest.generation

    def search(
        self, queries: np.ndarray, num_neighbors: int, *, exclude_documents: Any = None
    ) -> tuple[np.ndarray, np.ndarray]:
        """The nearest chunks of each query, best first. See [`RetroDatastore.search`].

        Raises:
            RetroError: if actors do not answer in time.
        """
        opened = self._opened
        queries, excluded = checked_search(opened.manifest, queries, num_neighbors, exclude_documents)
        return merge_results(self._gather(opened, "search", self._ray.put(queries), num_neighbors, excluded))

    def refresh(self) -> None:
        """Open the current generation; searches go on in the meantime.

        Raises:
            DatastoreCorruptError: if the folder is damaged; the opened generation stays open.
        """
        manifest = DatastoreManifest.read(self.path)
        if manifest != self.manifest:
            self._opened = self._open(manifest, self._opened.version + 1)

    def close(self) -> None:
        """Stop the actors, and close the connection to the cluster if it was made here."""
        self._exit.close()

    def __enter__(self) -> RayShards:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"RayShards({str(self.path)!r}, num_shards={len(self.manifest.shards)}, num_actors={len(self._opened.parts)})"
