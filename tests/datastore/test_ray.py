"""A Ray cluster makes the store of one process and finds what one process finds, also when workers and nodes are lost."""

import contextlib
import os
import re
import secrets
import signal
import sys
import time
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest

from retro_hf.datastore import RayExecutor, RayShards, RetroDatastore
from retro_hf.datastore import ray as ray_module
from retro_hf.datastore import stages as stages_module
from retro_hf.datastore.executors import Call
from retro_hf.datastore.search_excluding import merge_results
from retro_hf.datastore.store_generation import Generation
from retro_hf.errors import DatastoreInputError, DatastoreNotFoundError, MissingExtraError, RetroError

from .fixtures import corpus
from .test_store import content_of


OBJECT_STORE_BYTES = 78 * 2**20
OPTIONS = {"chunk_size": 8, "neighbor_size": 20, "shard_chunks": 100}


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    monkeypatch.setattr(stages_module, "_BLOCK_DOCUMENTS", 5)


def build(path, tokenizer, embedder, documents=None, **options):
    documents = corpus() if documents is None else documents
    return RetroDatastore.build(documents, path, tokenizer=tokenizer, embedder=embedder, **OPTIONS, **options)


@pytest.fixture(scope="module")
def sharded(tmp_path_factory, tokenizer, embedder):
    """The folder of a store of 40 documents in several shards, made by one process; tests must not change it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(stages_module, "_BLOCK_DOCUMENTS", 5)
        return build(tmp_path_factory.mktemp("sharded") / "store", tokenizer, embedder).path


# ── without a cluster ─────────────────────────────────────────────────────────────────────────────────────────────────


def test_missing_ray_names_the_extra(tmp_path, tokenizer, embedder, sharded, monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(MissingExtraError):
        build(tmp_path / "store", tokenizer, embedder, executor=RayExecutor())
    with pytest.raises(MissingExtraError):
        RayShards(sharded)


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"num_workers": 0}, "is 0"),
        ({"num_workers": True}, "is True"),
        ({"num_cpus_per_worker": 0}, "0 CPUs and 0 GPUs"),
        ({"num_cpus_per_worker": -1, "num_gpus_per_worker": 1}, "is -1"),
    ],
)
def test_impossible_workers_are_refused(options, named):
    with pytest.raises(DatastoreInputError, match=named):
        RayExecutor(**options)


@pytest.mark.parametrize("delete", [False, True])
@pytest.mark.parametrize("exclude", [False, True])
def test_parts_searched_separately_give_the_results_of_the_whole(tmp_path, sharded, delete, exclude):
    """What the actors of a search do: each opens some of the shards, under the numbers of the whole."""
    store = RetroDatastore.load(sharded)
    if delete:
        store.save(tmp_path / "store")
        store = RetroDatastore.load(tmp_path / "store")
        store.delete(["doc-0", "doc-7", "doc-30", "doc-39"])
    queries = store.keys_of(np.arange(store.num_chunks))
    excluded = store.document_of(np.arange(store.num_chunks))[:, None] if exclude else None
    last = len(store.shards)
    assert last > 3
    parts = [
        Generation.open(store.path, store.manifest, places=places).search(queries, 5, excluded)
        for places in (slice(0, 2), slice(2, 3), slice(3, last))
    ]
    scores, ids = merge_results(parts)
    expected, expected_ids = store.search(queries, 5, exclude_documents=excluded)
    np.testing.assert_array_equal(ids, expected_ids)
    np.testing.assert_array_equal(scores, expected)


def test_part_opens_only_its_own_files(tmp_path, sharded):
    RetroDatastore.load(sharded).save(tmp_path / "store")
    store = RetroDatastore.load(tmp_path / "store")
    for name in (file.name for file in store.shards[0].files.values()):
        (store.path / name).unlink()
    assert len(Generation.open(store.path, store.manifest, places=slice(1, 2)).shards) == 1


# ── on a cluster ──────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.fixture(scope="module")
def ray():
    """Ray with a token of its own, so that it writes none to the home folder; it reads these settings when imported."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_AUTH_MODE", "token")
        patch.setenv("RAY_AUTH_TOKEN", secrets.token_hex(32))
        patch.setenv("RAY_USAGE_STATS_ENABLED", "0")
        yield pytest.importorskip("ray", reason="the extra `ray` is not installed; `make install` does it")


@pytest.fixture
def cluster(ray):
    """A head without CPUs, to which this process is connected, and two nodes: three raylets on this machine."""
    from ray.cluster_utils import Cluster

    node = {"object_store_memory": OBJECT_STORE_BYTES, "include_dashboard": False}
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, **node})
    try:
        for _ in range(2):
            cluster.add_node(num_cpus=1, **node)
        ray.init(address=cluster.address, log_to_driver=False)
        yield cluster
    finally:
        ray.shutdown()
        cluster.shutdown()


class Process(NamedTuple):
    """A process of the machine: its id, its parent's id, and the name it shows."""

    id: int
    parent: int
    name: str


def processes():
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            with contextlib.suppress(OSError):
                status, name = (entry / "status").read_text(), (entry / "cmdline").read_text()
                yield Process(int(entry.name), int(re.search(r"PPid:\s+(\d+)", status)[1]), name)


def workers_of(node, names: str = "_call_task|IDLE") -> list[int]:
    """Process ids of the workers on a node, those at work first."""
    raylet = node.all_processes["raylet"][0].process.pid
    found = [one for one in processes() if one.parent == raylet and re.match(rf"ray::({names})", one.name)]
    return [one.id for one in sorted(found, key=lambda one: "IDLE" in one.name)]


def actors_of(node) -> list[int]:
    """Process ids of our actors, and of workers that run a call, on a node."""
    return workers_of(node, "_call_task|_Searcher")


def assert_actors_end(cluster) -> None:
    """No actor stays; those that were just told to end may take a moment."""
    deadline = time.monotonic() + 30
    while any(actors_of(node) for node in cluster.worker_nodes):
        assert time.monotonic() < deadline
        time.sleep(0.1)


class Interrupted(RayExecutor):
    """Does something after the first call of a stage, while the other worker is at its own."""

    def __init__(self, stage: int, action, **options) -> None:
        super().__init__(**options)
        self.stage, self.action, self.done = stage, action, False

    @contextmanager
    def start(self, tasks):
        with super().start(tasks) as run:

            def interrupted(task, calls):
                for units in run(task, calls):
                    if task == self.stage and not self.done:
                        self.done = True
                        self.action()
                    yield units

            yield interrupted


@pytest.mark.slow
def test_two_nodes_build_the_store_of_one_process(cluster, tmp_path, tokenizer, embedder, sharded):
    store = build(tmp_path / "store", tokenizer, embedder, executor=RayExecutor())
    assert content_of(store.path) == content_of(sharded)
    assert [path.name for path in tmp_path.iterdir()] == ["store"]

    more = corpus(12, seed=1)
    for number, document in enumerate(more):
        document["id"] = f"more-{number}"
    RetroDatastore.load(sharded).save(tmp_path / "alone")
    alone = RetroDatastore.load(tmp_path / "alone")
    alone.append(more, embedder=embedder)
    store.append(more, embedder=embedder, executor=RayExecutor())
    assert content_of(store.path) == content_of(alone.path)

    # Errors are those of one process, and leave nothing.
    with pytest.raises(DatastoreInputError) as caught:
        build(tmp_path / "bad", tokenizer, embedder, [*corpus(9), corpus(2)[1]], executor=RayExecutor())
    assert type(caught.value) is DatastoreInputError
    with pytest.raises(DatastoreInputError):
        build(tmp_path / "bad", tokenizer, embedder, executor=RayExecutor(num_gpus_per_worker=1))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["alone", "store"]
    assert_actors_end(cluster)


@pytest.mark.slow
@pytest.mark.parametrize("stage", [0, 1, 2], ids=["tokenizing", "embedding", "indexing"])
def test_killed_worker_does_not_change_the_result(cluster, tmp_path, tokenizer, embedder, sharded, stage):
    def kill():
        while not (found := [pid for node in cluster.worker_nodes for pid in workers_of(node)]):
            time.sleep(0.01)
        os.kill(found[0], signal.SIGKILL)

    store = build(tmp_path / "store", tokenizer, embedder, executor=Interrupted(stage, kill))
    assert content_of(store.path) == content_of(sharded)
    assert [path.name for path in tmp_path.iterdir()] == ["store"]


@pytest.mark.slow
def test_killed_node_does_not_change_the_result(cluster, tmp_path, tokenizer, embedder, sharded):
    """The other node does the rest; no room for the lost worker is waited for."""

    def kill():
        while not all(workers_of(node) for node in cluster.worker_nodes):
            time.sleep(0.01)
        cluster.remove_node(list(cluster.worker_nodes)[0], allow_graceful=False)

    store = build(tmp_path / "store", tokenizer, embedder, executor=Interrupted(1, kill))
    assert len(cluster.worker_nodes) == 1
    assert content_of(store.path) == content_of(sharded)
    assert [path.name for path in tmp_path.iterdir()] == ["store"]


def assert_same_results(shards, store, queries, **options):
    scores, ids = shards.search(queries, 5, **options)
    expected, expected_ids = store.search(queries, 5, **options)
    np.testing.assert_allclose(scores, expected, atol=1e-6)
    # Where two chunks are equally near, either may come first.
    tied = np.isclose(expected[:, :, None], expected[:, None, :], atol=1e-6).sum(axis=-1) > 1
    tied[:, -1] = True
    assert (ids == expected_ids)[~tied].all()
    assert (ids == expected_ids).mean() > 0.97


@pytest.mark.slow
def test_shards_on_two_nodes_find_what_one_process_finds(cluster, tmp_path, sharded, embedder):
    RetroDatastore.load(sharded).save(tmp_path / "store")
    store = RetroDatastore.load(tmp_path / "store")
    queries = store.keys_of(np.arange(store.num_chunks))
    own = store.document_of(np.arange(store.num_chunks))
    with RayShards(store.path) as shards:
        assert all(len(actors_of(node)) == 1 for node in cluster.worker_nodes)
        assert_same_results(shards, store, queries)
        assert_same_results(shards, store, queries[:1])
        assert_same_results(shards, store, queries, exclude_documents=own)
        with pytest.raises(DatastoreInputError):
            shards.search(queries[:1], 2, exclude_documents=[40])
        with pytest.raises(DatastoreInputError):
            shards.search(queries[:, :3], 2)

        store.delete(["doc-1", "doc-20", "doc-39"])
        deleted = store.deleted_documents
        assert np.isin(store.document_of(shards.search(queries, 5)[1]), deleted).any()
        shards.refresh()
        assert shards.generation == store.generation == 2
        assert_same_results(shards, store, queries)
        assert_same_results(shards, store, queries, exclude_documents=own)

        # A lost actor is started again, opens its files and answers; a node that is lost gives its actor to the other,
        # once that has room.
        for node in cluster.worker_nodes:
            os.kill(actors_of(node)[0], signal.SIGKILL)
            assert_same_results(shards, store, queries, exclude_documents=own)

        store.append([{"id": "new", "text": "a golden lighthouse " * 20}], embedder=embedder)
        shards.refresh()
        assert_same_results(shards, store, store.keys_of(np.arange(store.num_chunks)))

        store.compact()
        os.kill(actors_of(list(cluster.worker_nodes)[0])[0], signal.SIGKILL)
        with pytest.raises(DatastoreNotFoundError):
            shards.search(queries, 2)
        shards.refresh()
        assert_same_results(shards, store, queries)
    assert_actors_end(cluster)


@pytest.mark.slow
def test_shards_move_to_another_node_when_theirs_is_lost(cluster, sharded, ray):
    store = RetroDatastore.load(sharded)
    queries = store.keys_of(np.arange(20))
    with RayShards(sharded, timeout=60) as shards:
        before, expected = shards.search(queries, 3)
        lost = next(node for node in cluster.worker_nodes if actors_of(node))
        cluster.remove_node(lost, allow_graceful=False)
        shards.timeout = 5
        with pytest.raises(RetroError):  # there is no room for the lost actor
            shards.search(queries, 3)
        shards.timeout = 60
        cluster.add_node(num_cpus=1, object_store_memory=OBJECT_STORE_BYTES, include_dashboard=False)
        after, ids = shards.search(queries, 3)
        np.testing.assert_array_equal(ids, expected)
        np.testing.assert_array_equal(after, before)


@pytest.fixture
def one_node(ray):
    ray.init(num_cpus=1, include_dashboard=False, object_store_memory=OBJECT_STORE_BYTES, log_to_driver=False)
    yield ray
    ray.shutdown()


@pytest.mark.slow
def test_documents_are_read_only_as_fast_as_they_are_processed(one_node, tmp_path, tokenizer, embedder):
    """Documents in flight are bounded by the number of workers, however long the stream is."""
    ahead = []

    def stream():
        for number, document in enumerate(corpus(60)):
            done = list((tmp_path / ".store.building").glob("tokens-*"))
            ahead.append(number // 5 - len(done))
            yield document

    store = build(tmp_path / "store", tokenizer, embedder, stream(), executor=RayExecutor())
    assert len(ahead) == 60 and max(ahead) <= 1
    with RayShards(store.path) as shards:
        queries = store.keys_of(np.arange(10))
        assert_same_results(shards, store, queries)


class Refusing:
    """A task whose input is not as it should be."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def output(self, *args):
        return self.folder / "output"

    def __call__(self, *args):
        raise DatastoreInputError("a block is not as it should be")


class Deadly(Refusing):
    """A task that its process does not survive, as one that needs too much memory."""

    def __call__(self, *args):
        os.kill(os.getpid(), signal.SIGKILL)


class Silent(Refusing):
    """A task whose output does not come to light here."""

    def __call__(self, *args):
        pass


@pytest.mark.slow
def test_failures_on_a_cluster_are_reported(one_node, tmp_path, monkeypatch):
    one_node.cloudpickle.register_pickle_by_value(sys.modules[__name__])
    monkeypatch.setattr(ray_module, "_MAX_RETRIES", 1)
    monkeypatch.setattr(ray_module, "_VISIBLE_SECONDS", 0.1)
    tasks = [Refusing(tmp_path), Refusing(tmp_path / "elsewhere"), Silent(tmp_path), Deadly(tmp_path)]
    expected = [DatastoreInputError, DatastoreNotFoundError, DatastoreNotFoundError, RetroError]
    with RayExecutor().start(tasks) as run:
        for number, kind in enumerate(expected):
            with pytest.raises(kind) as caught:
                list(run(number, [Call(1, ())]))
            assert type(caught.value) is kind
