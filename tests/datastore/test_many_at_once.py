"""Readers, writers, forks and kills at once, and small limits: nothing is mixed up, waits for ever, or is called damaged."""

import multiprocessing
import os
import resource
import shutil
import signal
import sys
import threading
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from filelock import FileLock

from retro_hf.datastore import EmbeddingSearcher, RetroDatastore
from retro_hf.datastore.atomic_files import new_folder, partial_folder, write_file
from retro_hf.datastore.store_generation import Generation
from retro_hf.errors import DatastoreReadError
from retro_hf.locks import Lock, lazy
from retro_hf.outside import check_folder
from retro_hf.retriever import RetroRetriever

from .fixtures import corpus


FORK = multiprocessing.get_context("fork")


@pytest.fixture
def store(built, tmp_path) -> RetroDatastore:
    return RetroDatastore.load(shutil.copytree(built, tmp_path / "store"))


def compacted(path: Path) -> None:
    """Another process deletes documents and compacts, so that the same numbers name other text."""
    other = RetroDatastore.load(path)
    other.delete([f"doc-{number}" for number in range(10)])
    other.compact()


def chunks_of(store: RetroDatastore, ids) -> torch.Tensor:
    return torch.from_numpy(store.gather(np.array(ids))[0][:, : store.chunk_size])


class Interrupted(EmbeddingSearcher):
    """While it searches, another process compacts the store, and another thread refreshes it."""

    def search_vectors(self, *args, **options):
        found = super().search_vectors(*args, **options)
        if self.others:
            compacted(self.others.path)
            self.others.refresh()
            Interrupted.others = None
        return found


def test_what_was_looked_up_in_one_generation_is_gathered_in_it_and_not_remembered(store, embedder):
    chunks = chunks_of(store, [100, 200])
    Interrupted.others = None
    expected = RetroRetriever(store, searcher=Interrupted(store, embedder))(chunks)
    retriever = RetroRetriever(store, searcher=Interrupted(store, embedder))
    Interrupted.others = store
    found = retriever(chunks)
    assert store.generation == 3
    assert torch.equal(found[0], expected[0])
    fresh = RetroRetriever(RetroDatastore.load(store.path), embedder=embedder)
    assert torch.equal(retriever(chunks)[0], fresh(chunks)[0])


def test_snapshot_keeps_its_generation(store, embedder):
    snapshot = store.snapshot()
    before = snapshot.search(store.keys_of([5]), 3), snapshot.document(3)
    compacted(store.path)
    store.refresh()
    assert (snapshot.generation, store.generation) == (1, 3)
    np.testing.assert_array_equal(snapshot.search(snapshot.keys_of([5]), 3)[1], before[0][1])
    assert snapshot.document(3) == before[1] != store.document(3)
    assert snapshot.tokenizer is store.tokenizer


def test_store_built_again_at_the_same_path_is_another_store(store, tokenizer, embedder):
    queries = store.keys_of([3])
    shutil.rmtree(store.path)
    options = {"tokenizer": tokenizer, "embedder": embedder, "chunk_size": 8, "neighbor_size": 20}
    RetroDatastore.build(corpus(40, seed=9), store.path, **options)
    store.refresh()
    fresh = RetroDatastore.load(store.path)
    np.testing.assert_array_equal(store.search(queries, 3)[1], fresh.search(queries, 3)[1])
    assert store.document(0) == fresh.document(0)


@pytest.mark.parametrize("action", ["load", "verify", "save", "refresh"])
def test_reader_that_a_writer_overtakes_starts_again(store, tmp_path, monkeypatch, action):
    """The writer removes the files of the generation whose manifest the reader has just read."""
    real, raced = Generation.open.__func__, []

    def open_late(cls, folder, manifest, *args):
        if not raced:
            raced.append(1)
            compacted(folder)
        return real(cls, folder, manifest, *args)

    if action in ("load", "refresh"):
        if action == "refresh":
            RetroDatastore.load(store.path).delete(["doc-30"])
        monkeypatch.setattr(Generation, "open", classmethod(open_late))
        opened = RetroDatastore.load(store.path) if action == "load" else store
        opened.refresh()
    else:
        compacted(store.path)
        opened = store
        store.verify() if action == "verify" else store.save(tmp_path / "copy")
    assert opened.num_documents == (29 if action == "refresh" else 30)
    if action == "save":
        assert RetroDatastore.load(tmp_path / "copy", verify=True).num_documents == 30


def test_folder_is_checked_while_a_writer_removes_files(store, monkeypatch):
    real = os.scandir

    def scandir(path):
        entries = list(real(path))
        (store.path / "tokens-00000.npy").unlink(missing_ok=True)
        return entries

    with monkeypatch.context() as patched:
        patched.setattr("retro_hf.outside.os.scandir", scandir)
        check_folder(store.path)
    assert not (store.path / "tokens-00000.npy").exists()


def test_damage_is_still_damage_and_not_tried_for_ever(store):
    (store.path / "tokens-00000.npy").unlink()
    with pytest.raises(ValueError):
        RetroDatastore.load(store.path)


# ── small limits ──────────────────────────────────────────────────────────────────────────────────────────────────────


def _limited(work, queue, spare: int) -> None:
    opened = len(os.listdir("/proc/self/fd"))
    resource.setrlimit(resource.RLIMIT_NOFILE, (opened + spare, resource.getrlimit(resource.RLIMIT_NOFILE)[1]))
    try:
        queue.put(work())
    except BaseException as error:  # noqa: B036 - the parent looks at it
        queue.put((type(error).__name__, str(error)))


def in_child(work, spare: int = 1000):
    """The result of a function in a forked child with a limit of open files."""
    queue = FORK.Queue()
    child = FORK.Process(target=_limited, args=(work, queue, spare))
    child.start()
    result = queue.get(timeout=60)
    child.join(10)
    return result


def test_many_shards_need_few_open_files(tmp_path, tokenizer, embedder):
    options = {"tokenizer": tokenizer, "embedder": embedder, "chunk_size": 8, "neighbor_size": 20}
    store = RetroDatastore.build(corpus(60), tmp_path / "store", shard_chunks=8, **options)
    assert len(store.shards) > 50
    queries = store.keys_of([3, 400])

    def use() -> list:
        opened = RetroDatastore.load(store.path, verify=True)
        before = opened.search(queries, 1)[0].tolist()
        opened.compact()
        return [before, len(opened.shards), opened.document(59)["id"], opened.search(queries, 1)[0].tolist()]

    before, shards, last, after = in_child(use, spare=24)
    assert (shards, last) == (1, "doc-59")
    np.testing.assert_allclose(before, after, atol=1e-5)


def test_opening_is_linear_in_the_number_of_shards(tmp_path, tokenizer, embedder):
    """By the calls of Python functions, which no load of the machine changes."""
    options = {"tokenizer": tokenizer, "embedder": embedder, "chunk_size": 8, "neighbor_size": 20, "shard_chunks": 1}
    calls = []
    for count in (5, 20, 35):
        texts = [" ".join(document["text"].split()[:3]) for document in corpus(count)]
        store = RetroDatastore.build(texts, tmp_path / str(count), **options)
        assert len(store.shards) == count
        seen = Counter()
        sys.setprofile(lambda frame, event, _, seen=seen: seen.update([event]))
        RetroDatastore.load(store.path)
        sys.setprofile(None)
        calls.append(seen["call"])
    assert calls[2] - calls[1] <= 1.1 * (calls[1] - calls[0])


def test_too_many_open_files_are_not_damage(store):
    def load() -> None:
        opened = []
        with pytest.raises(OSError):
            while True:
                opened.append(open(os.devnull))  # noqa: SIM115 - they stay open
        RetroDatastore.load(store.path)

    kind, text = in_child(load, spare=10)
    assert kind == "DatastoreReadError" and "ulimit" in text


def test_folder_without_permission_is_not_damage(store, monkeypatch):
    """Root may read everything, so the refusal of the system is played."""
    real = os.lstat

    def lstat(path, *args, **options):
        if str(path).endswith("tokens-00000.npy"):
            raise PermissionError(13, "Permission denied", str(path))
        return real(path, *args, **options)

    monkeypatch.setattr(os, "lstat", lstat)
    with pytest.raises(DatastoreReadError):
        RetroDatastore.load(store.path)


# ── forks ─────────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_forked_child_looks_up_whatever_the_parents_threads_hold(store, embedder):
    retriever = RetroRetriever(store, embedder=embedder)
    chunks = chunks_of(store, [10, 20])
    expected = retriever(chunks)[0]
    documents = store.shards[0].documents
    held = [retriever._cache._lock, documents._lock, *_index_locks()]
    with_locks, done = threading.Event(), threading.Event()

    def hold() -> None:
        for lock in held:
            lock.__enter__()
        with_locks.set()
        done.wait()
        for lock in held:
            lock.__exit__(None, None, None)

    thread = threading.Thread(target=hold)
    thread.start()
    with_locks.wait()
    try:
        found = in_child(lambda: [retriever(chunks)[0].tolist(), retriever.trace(chunks)[0][0].document_id])
    finally:
        done.set()
        thread.join()
    assert found[0] == expected.tolist()


def test_forked_child_reads_a_property_that_a_thread_of_the_parent_was_computing():
    """The one of `functools` has a lock for all objects, which the child would find taken for ever."""
    entered, done = threading.Event(), threading.Event()

    class Kept:
        @lazy
        def value(self) -> list[int]:
            if threading.current_thread() is thread:
                entered.set()
                done.wait()
            return [5]

    first, others = Kept(), Kept()
    thread = threading.Thread(target=lambda: first.value)
    thread.start()
    entered.wait()
    try:
        assert in_child(lambda: [others.value, first.value]) == [[5], [5]]
        kept = first.value
    finally:
        done.set()
        thread.join()
    assert first.value is kept


def _index_locks() -> list[Lock]:
    from retro_hf.datastore import index

    return [index._read_lock, index._blas_lock]


# ── what power cuts and killed calls leave behind ─────────────────────────────────────────────────────────────────────


def test_content_is_on_the_disk_before_its_name(tmp_path, monkeypatch):
    """Or a power cut could leave an empty file under the name; after it the folder, which has the name."""
    calls = []
    replace = os.replace
    monkeypatch.setattr(os, "fsync", lambda descriptor: calls.append(Path(os.readlink(f"/proc/self/fd/{descriptor}"))))
    monkeypatch.setattr(os, "replace", lambda *paths: [calls.append("named"), replace(*paths)])
    write_file(tmp_path / "file", b"content")
    content, *rest = calls
    assert content.name.startswith(".file.") and rest == ["named", tmp_path]
    calls.clear()
    with new_folder(tmp_path / "folder") as folder:
        write_file(folder / "file", b"content")
        calls.clear()
    named = calls.index("named")
    assert {path.name for path in calls[:named]} == {"file", folder.name} and tmp_path in calls[named:]


def test_partial_folders_of_killed_calls_are_removed_and_those_in_use_are_kept(store, tmp_path):
    target = tmp_path / "copy"

    def write_and_be_killed() -> None:
        with new_folder(target) as folder:
            (folder / "x").write_text("x")
            os.kill(os.getpid(), signal.SIGKILL)

    child = FORK.Process(target=write_and_be_killed)
    child.start()
    child.join(100)
    assert child.exitcode == -signal.SIGKILL
    (tmp_path / ".copy.0123.partial").mkdir()  # of a version without locks
    assert len(list(tmp_path.glob(".copy.*.partial"))) == 2
    with partial_folder(tmp_path, "copy") as used:
        store.save(target)
        assert list(tmp_path.glob(".copy.*.partial")) == [used]
        with pytest.raises(TimeoutError):
            FileLock(f"{used}.lock", timeout=0).acquire()
    assert not list(tmp_path.glob(".copy.*"))
    RetroDatastore.load(target, verify=True)
