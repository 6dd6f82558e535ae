"""Search on a Ray cluster: actors that each hold some of the shards of a datastore, and the merge of what they find."""

from __future__ import annotations

import os
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple

import numpy as np
import torch

from ..errors import DatastoreCorruptError, DatastoreNotFoundError, RetroError
from .cluster import check_size, connected, import_ray, room_for
from .manifest import DatastoreManifest
from .view import View, checked_search, merge_results


__all__ = ["RayShards"]


class _Searcher:
    """The actor of a search: it opens the shards that it is asked for, and keeps them open."""

    def __init__(self, folder: Path, num_threads: int) -> None:
        torch.set_num_threads(num_threads)
        self._folder = folder
        self._version = -1
        self._view: View | None = None

    def open(self, version: int, manifest: list[Any], places: range) -> View:
        """The shards at some places of a manifest, which comes as a reference since it is long and seldom needed."""
        if self._view is None or version != self._version:
            named: DatastoreManifest = import_ray().get(manifest[0])
            known = () if self._view is None else self._view.shards
            try:
                self._view = View.open(self._folder, named, known, places)
            except DatastoreCorruptError as error:
                if DatastoreManifest.read(self._folder) == named:
                    raise
                raise DatastoreNotFoundError(
                    f"Files of generation {named.generation} of {str(self._folder)!r} are no longer there: the datastore was "
                    "compacted since it was opened. Call `refresh()`; chunk ids from before are void."
                ) from error
            self._version = version
        return self._view

    def warm_up(self, version: int, manifest: list[Any], places: range) -> None:
        """Open the shards with their indexes."""
        for shard in self.open(version, manifest, places).shards:
            _ = shard.index

    def search(
        self,
        version: int,
        manifest: list[Any],
        places: range,
        queries: np.ndarray,
        num_neighbors: int,
        excluded: np.ndarray | None,
    ) -> tuple[np.ndarray, np.ndarray]:
        """Search the shards at some places; chunk ids are those of the whole store."""
        return self.open(version, manifest, places).search(queries, num_neighbors, excluded)


class _Opened(NamedTuple):
    """One generation of a store on a cluster: which actor searches which shards of it."""

    version: int
    manifest: DatastoreManifest
    reference: Any
    parts: tuple[tuple[Any, range], ...]


class RayShards:
    """Searches a datastore on a Ray cluster, each actor its share of the shards: the same results as one process.

    It stands in for a [`RetroDatastore`] where that is searched; tokens and documents are read from the store itself,
    `RetroDatastore.load(path)`, of which only a few pages are touched. An actor that is lost is started again, on
    another node if need be, opens its files and answers.

    Args:
        path (`str` or `Path`): the folder of the datastore, on a file system that all nodes share.
        num_actors (`int`, *optional*): by default one per shard, as far as the cluster has room.
        num_cpus_per_actor (`float`, defaults to 1): CPUs that an actor occupies, and its threads.
        timeout (`float`, defaults to 120): seconds to wait for actors to start, or to answer, before giving up.
        address (`str`, *optional*): of the cluster, as for [`RayExecutor`].

    Raises:
        DatastoreNotFoundError: if there is no datastore at `path`.
        MissingExtraError: if Ray is not installed.
    *Cost*: about 10 ms per search on top of the search itself; queries belong together in batches.
    *Memory*: of an actor, what its shards' indexes keep resident.
    *Processes*: threads of one process can share it. It ends with [`close`], as a context manager, or with the process.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        *,
        num_actors: int | None = None,
        num_cpus_per_actor: float = 1,
        timeout: float = 120.0,
        address: str | None = None,
    ) -> None:
        check_size(num_actors, num_cpus_per_actor, 0)
        self.path = Path(os.path.abspath(path))
        self.timeout = timeout
        manifest = DatastoreManifest.read(self.path)
        self._exit = ExitStack()
        self._ray = self._exit.enter_context(connected(address))
        try:
            self._limit = num_actors or room_for(self._ray, num_cpus_per_actor, 0)
            # Ray starts a lost actor again, and repeats the searches that it had not answered.
            self._create = partial(
                self._ray.remote(
                    num_cpus=num_cpus_per_actor, max_restarts=-1, max_task_retries=-1, scheduling_strategy="SPREAD"
                )(_Searcher).remote,
                self.path,
                max(1, int(num_cpus_per_actor)),
            )
            self._actors: list[Any] = []
            self._exit.callback(self._kill_actors)
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
        parts = tuple(
            (actor, range(first, end))
            for actor, first, end in zip(self._actors, borders[:-1], borders[1:], strict=False)
        )
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
            return self._ray.get(references, timeout=self.timeout)
        except self._ray.exceptions.RayTaskError as error:
            raise error.cause from error
        except self._ray.exceptions.GetTimeoutError as error:
            done = self._ray.wait(references, num_returns=len(references), timeout=0)[0]
            raise RetroError(
                f"{len(references) - len(done)} of {len(references)} actors for the shards of {str(self.path)!r} did not "
                f"answer within {self.timeout:g} s. Either the cluster has no room for them (see `ray status`), or a node "
                "was lost and none has replaced it: use fewer actors (num_actors), add nodes, or raise the timeout."
            ) from error

    @property
    def manifest(self) -> DatastoreManifest:
        """What the folder said about itself when it was opened or refreshed."""
        return self._opened.manifest

    @property
    def generation(self) -> int:
        """That of the datastore when it was opened or refreshed."""
        return self.manifest.generation

    def search(
        self, queries: np.ndarray, num_neighbors: int, *, exclude_documents: Any = None
    ) -> tuple[np.ndarray, np.ndarray]:
        """The nearest chunks of each query, best first. See [`RetroDatastore.search`].

        Args:
            queries (`np.ndarray` of float32 and shape `(num_queries, dim)`): unit vectors of the store's embedder.
            num_neighbors (`int`): chunks per query.
            exclude_documents (`np.ndarray` of integers and shape `(num_queries,)` or `(num_queries, any)`,
                *optional*): document numbers whose chunks a query must not get, -1 for none.
        Returns:
            `(scores, chunk_ids)` of shape `(num_queries, num_neighbors)`, float32 and int64; -inf and -1 for none.
        Raises:
            RetroError: if actors do not answer in time.
        """
        opened = self._opened
        queries, excluded = checked_search(opened.manifest, queries, num_neighbors, exclude_documents)
        parts = self._gather(opened, "search", self._ray.put(queries), num_neighbors, excluded)
        return merge_results(parts)

    def refresh(self) -> None:
        """See what has changed in the folder since it was opened; searches go on meanwhile.

        Raises:
            DatastoreCorruptError: if the folder is damaged; what was open stays open.
        """
        manifest = DatastoreManifest.read(self.path)
        if manifest != self.manifest:
            self._opened = self._open(manifest, self._opened.version + 1)

    def close(self) -> None:
        """Stop the actors, and the connection to the cluster if it was made here."""
        self._exit.close()

    def __enter__(self) -> RayShards:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"RayShards({str(self.path)!r}, num_shards={len(self.manifest.shards)}, num_actors={len(self._opened.parts)})"
