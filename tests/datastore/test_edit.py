"""Append, delete, compact: what is there stays there, what is deleted is gone, and a crash leaves one state or the other."""

import json
import multiprocessing
import os
import pickle
import shutil

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from filelock import FileLock
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from retro_hf.datastore import RetroDatastore, atomic_files
from retro_hf.datastore.derive import drawn_documents
from retro_hf.datastore.documents import without_lone_surrogates
from retro_hf.datastore.shard import DocumentTable
from retro_hf.errors import (
    DatastoreCorruptError,
    DatastoreInputError,
    DatastoreMismatchError,
    DatastoreWriteError,
)
from retro_hf.retriever import RetroRetriever

from .fixtures import corpus, make_encoder
from .test_store import content_of


@pytest.fixture
def store(built, tmp_path) -> RetroDatastore:
    """A copy of the store of 40 documents that a test may change."""
    return RetroDatastore.load(shutil.copytree(built, tmp_path / "store"))


def more(number: int = 10) -> list[dict]:
    return [document | {"id": f"new-{document['id']}"} for document in corpus(number, seed=5)]


def found_by_all(store) -> set[int]:
    """Documents that any query for many neighbors returns."""
    queries = store.keys_of(np.arange(store.num_chunks))
    ids = store.search(queries, 30)[1]
    return set(store.document_of(ids[ids >= 0]).tolist())


def test_appended_documents_are_found_and_old_ones_keep_their_numbers(store, embedder):
    before = store.gather(np.arange(store.num_chunks))[0]
    old_files = {file.name for file in store.path.iterdir()}
    untouched = content_of(store.path)
    store.append(more(), embedder=embedder)
    assert store.num_documents == 50 and store.generation == 2 and len(store.shards) == 2
    np.testing.assert_array_equal(store.gather(np.arange(len(before)))[0], before)
    assert [store.document(number)["text"] for number in range(40, 50)] == [document["text"] for document in more()]
    assert store.document_number("new-doc-3") == 43
    scores, ids = store.search(store.keys_of(np.arange(store.num_chunks)), 1)
    np.testing.assert_allclose(scores[:, 0], 1, atol=2e-3)
    assert found_by_all(store) == set(range(50))
    after = content_of(store.path)
    assert all(after[name] == untouched[name] for name in old_files if name != "datastore.json")
    RetroDatastore.load(store.path, verify=True)


def test_append_with_a_taken_id_changes_nothing(store, embedder):
    before = content_of(store.path)
    with pytest.raises(DatastoreInputError):
        store.append([*more(3), corpus()[7]], embedder=embedder)
    assert content_of(store.path) == before and os.listdir(store.path.parent) == ["store"]


def test_id_can_be_reused_after_deletion(store, embedder):
    store.delete(["doc-7"])
    store.append([{"id": "doc-7", "text": "the new seventh document"}], embedder=embedder)
    assert store.document_number("doc-7") == 40
    assert store.document(40)["text"] == "the new seventh document"
    store.delete("doc-7")
    assert store.deleted_documents.tolist() == [7, 40]
    with pytest.raises(DatastoreInputError):
        store.document_number("doc-7")


def test_another_embedder_is_refused(store, tmp_path):
    with pytest.raises(DatastoreMismatchError):
        store.append(more(), embedder=make_encoder(tmp_path / "other", seed=3))


def test_deleted_document_is_never_returned(store, embedder):
    """From this moment, by search, by id, by number and as tokens; everything else is what it was."""
    everything = np.arange(store.num_chunks)
    queries, owners = store.keys_of(everything), store.document_of(everything)
    tokens = store.gather(everything)[0]
    gone = [3, 17, 18]
    store.delete([f"doc-{number}" for number in gone])
    assert found_by_all(store) == set(range(40)) - set(gone)
    for excluded in (None, owners, np.stack([owners, np.full_like(owners, 17)], axis=1)):
        ids = store.search(queries, 5, exclude_documents=excluded)[1]
        assert (ids >= 0).all() and not np.isin(store.document_of(ids), gone).any()
    kept = ~np.isin(owners, gone)
    again, mask = store.gather(everything)
    np.testing.assert_array_equal(again[kept], tokens[kept])
    assert not mask[~kept].any() and not again[~kept].any()
    for number in gone:
        with pytest.raises(DatastoreInputError):
            store.document(number)
        with pytest.raises(DatastoreInputError):
            store.document_number(f"doc-{number}")
    drawn = store.random_chunks(np.random.default_rng(0), (2000,))
    assert not np.isin(store.document_of(drawn), gone).any()


def test_search_after_deletion_equals_search_over_the_rest(store):
    queries = store.keys_of(np.arange(0, store.num_chunks, 7))
    gone = list(range(0, 40, 2))
    owners = store.document_of(np.arange(store.num_chunks))
    everything = queries @ store.keys_of(np.arange(store.num_chunks)).T
    everything[:, np.isin(owners, gone)] = -np.inf
    store.delete(f"doc-{number}" for number in gone)
    scores, _ = store.search(queries, 9)
    np.testing.assert_allclose(scores, -np.sort(-everything, axis=1)[:, :9], atol=1e-5)


def test_open_store_sees_changes_after_refresh(store, embedder):
    other = RetroDatastore.load(store.path)
    key = store.keys_of(store.first_chunks(np.array([3])))
    store.delete(["doc-3"])
    assert other.document_of(other.search(key, 1)[1]) == 3
    other.refresh()
    assert other.num_deleted_documents == 1
    assert other.document_of(other.search(key, 1)[1]) != 3
    store.append(more(), embedder=embedder)
    other.refresh()
    assert other.num_documents == 50 and other.shards[0] is not None
    assert pickle.loads(pickle.dumps(other)).generation == 3


def test_retriever_cache_is_cleared_when_the_store_changes(store, embedder, tokenizer):
    """Its memory of chunks that were looked up does not outlive a deletion."""
    import torch

    retriever = RetroRetriever(store, embedder=embedder, tokenizer=tokenizer)
    tokens, mask = store.gather(store.first_chunks(np.array([3])))
    chunk = torch.from_numpy(tokens[:, :8])
    assert store.document_of(retriever.search(chunk).chunk_ids)[0, 0] == 3
    store.delete(["doc-3"])
    assert store.document_of(retriever.search(chunk).chunk_ids)[0, 0] != 3


def test_deleting_an_unknown_id_changes_nothing(store):
    before = content_of(store.path)
    with pytest.raises(DatastoreInputError):
        store.delete(["doc-1", "doc-99"])
    assert content_of(store.path) == before
    store.delete([])
    assert store.generation == 1


@pytest.mark.parametrize(
    ("given", "near"),
    [
        ("DOC-17", "doc-17"),
        ("doc-1o", "doc-1"),
        ("notes/doc-17", "doc-17"),
        ("e\u0301t\u00e9.txt", "\u00e9t\u00e9.txt"),
    ],
)
def test_unknown_id_is_answered_with_those_like_it(store, embedder, given, near):
    store.append([{"id": "\u00e9t\u00e9.txt", "text": "the old river"}], embedder=embedder)
    for call in (lambda: store.delete(given), lambda: store.document_number(given)):
        with pytest.raises(DatastoreInputError, match=f"like it are .*'{near}'"):
            call()


@pytest.mark.parametrize(
    "name", ["-x.txt", "a b.txt", "a\nb.txt", "\x1b[2J.txt", "caf\udce9.txt", "\U0001f600.txt", "*.txt", "'.txt"]
)
def test_documents_of_odd_file_names_are_deleted(tmp_path, store, embedder, name):
    """By the name as the shell gives it, and by the id as search shows it."""
    for id in (name, without_lone_surrogates(name)):
        (tmp_path / "notes").mkdir(exist_ok=True)
        (tmp_path / "notes" / name).write_text("the old river")
        store.append(tmp_path / "notes", embedder=embedder)
        count = store.num_deleted_documents
        store.delete(id)
        assert store.num_deleted_documents == count + 1


def test_all_documents_can_be_deleted(store, embedder):
    store.delete([f"doc-{number}" for number in range(40)])
    scores, ids = store.search(np.ones((2, 32), dtype=np.float32), 3, exclude_documents=np.array([0, -1]))
    assert (ids == -1).all() and np.isneginf(scores).all()
    assert (store.random_chunks(np.random.default_rng(0), (3,)) == -1).all()
    with pytest.raises(DatastoreInputError):
        store.compact()
    store.append(more(2), embedder=embedder)
    store.compact()
    assert store.num_documents == 2 and store.document_number("new-doc-1") == 1


@pytest.mark.parametrize("index", ["auto", "IVF8,Flat"])
def test_compaction_removes_deleted_documents_and_joins_shards(store, embedder, index):
    store.append(more(), embedder=embedder)
    store.delete(["doc-3", "new-doc-0"])
    live = [number for number in range(50) if number not in (3, 40)]
    documents = [store.document(number) for number in live]
    first = store.first_chunks(np.array(live))
    tokens = store.gather(first)[0]
    keys = store.keys_of(first)
    store.compact(index=index)
    assert (store.num_documents, store.num_deleted_documents, len(store.shards)) == (48, 0, 1)
    assert [store.document(number) for number in range(48)] == documents
    first = store.first_chunks(np.arange(48))
    np.testing.assert_array_equal(store.gather(first)[0], tokens)
    np.testing.assert_array_equal(store.keys_of(first), keys)
    assert store.document_number("new-doc-1") == 39
    table = pq.read_table(store.path / store.manifest.entries("documents")[0].name)
    assert table.column("text").to_pylist() == [document["text"] for document in documents]
    names = {file.name for file in store.path.iterdir()}
    assert names == {"datastore.json", *(entry.name for entry in store.manifest.files)}
    RetroDatastore.load(store.path, verify=True)


def test_store_opened_before_compaction_keeps_its_generation_until_it_is_refreshed(store, embedder):
    """Everything is mapped when a store is opened, also what is read only later."""
    warm, cold = (RetroDatastore.load(store.path) for _ in range(2))
    queries = warm.keys_of(np.arange(5))
    expected = warm.search(queries, 2)[1]
    store.delete(["doc-1"])
    store.compact()
    np.testing.assert_array_equal(warm.search(queries, 2)[1], expected)
    np.testing.assert_array_equal(cold.search(queries, 2)[1], expected)
    assert cold.document(cold.document_number("doc-1"))["id"] == "doc-1"
    cold.refresh()
    assert cold.search(queries, 2)[1].shape == (5, 2)


def _change_and_die(folder, change, embedder, after):
    """A child process that dies before its `after`-th step that makes something visible on the disk."""
    calls = []

    def dying(function):
        def call(*args, **kwargs):
            calls.append(1)
            if len(calls) == after:
                os._exit(9)
            return function(*args, **kwargs)

        return call

    os.replace, os.link, os.unlink = dying(os.replace), dying(os.link), dying(os.unlink)
    store = RetroDatastore.load(folder)
    if change == "append":
        store.append(more(), embedder=embedder)
    elif change == "replace":
        store.append([*more(3), {"id": "doc-1", "text": "another text"}], embedder=embedder, replace=True)
    elif change == "sync":
        store.sync([*corpus()[4:], *more(3)], embedder=embedder)
    elif change == "delete":
        store.delete(["doc-1"])
    else:
        store.compact()
    os._exit(0)


@pytest.mark.parametrize("change", ["append", "replace", "sync", "delete", "compact"])
def test_crash_leaves_the_old_state_or_the_new_one(store, embedder, change, tmp_path):
    """Killed before each step in turn, until one run comes through."""
    store.delete(["doc-2"])
    states, code, after = set(), 9, 0
    while code == 9:
        after += 1
        folder = shutil.copytree(store.path, tmp_path / f"{after}")
        child = multiprocessing.get_context("fork").Process(
            target=_change_and_die, args=(folder, change, embedder, after)
        )
        child.start()
        child.join(60)
        code = child.exitcode
        opened = RetroDatastore.load(folder, verify=True)
        states.add((opened.num_documents, opened.num_deleted_documents))
        # The next change cleans up and goes through.
        opened.delete(["doc-30"])
        assert {file.name for file in folder.iterdir()} == {"datastore.json", *(f.name for f in opened.manifest.files)}
    assert code == 0 and after > 3
    expected = {"append": (50, 1), "replace": (44, 2), "sync": (43, 4), "delete": (40, 2), "compact": (39, 0)}
    assert states == {(40, 1), expected[change]}


def test_compact_store_is_not_rewritten(store, embedder, caplog):
    """Nothing to do is not the same work again, unless something is asked of the index."""
    before = content_of(store.path)
    with caplog.at_level("INFO", "retro_hf"):
        store.compact()
    assert content_of(store.path) == before and "Nothing to do" in caplog.text
    store.compact(index="IVF2,Flat")
    assert store.generation == 2 and store.manifest.index["factory"] == "IVF2,Flat"
    store.compact()
    assert store.generation == 3 and store.manifest.index["factory"] == "Flat"
    store.append(more(), embedder=embedder)
    store.compact()
    assert store.generation == 5 and len(store.shards) == 1


def test_repeated_change_is_refused(store, embedder):
    """A kill just after the change looks like one before it."""
    for change in (lambda: store.append(more(), embedder=embedder), lambda: store.delete("doc-1")):
        change()
        with pytest.raises(DatastoreInputError):
            change()


def test_document_damaged_beyond_utf8_is_reported(store):
    """A flipped bit that parquet lets through: a checksum would have been looked at by `verify` only."""
    path = store.path / "documents-00000.parquet"
    table = pq.read_table(path)
    broken = pa.Table.from_arrays(
        [pa.array([b"\xff" + str(text).encode() for text in column.to_pylist()]) for column in table.columns],
        table.column_names,
    )
    views = [pa.Array.from_buffers(pa.string(), len(column), column.chunk(0).buffers()) for column in broken.columns]
    pq.write_table(pa.Table.from_arrays(views, schema=table.schema), path)
    documents = DocumentTable(path, atomic_files.mapped(path), store.num_documents)
    with pytest.raises(DatastoreCorruptError):
        documents.document(3)
    with pytest.raises(DatastoreCorruptError):
        documents.document_id(3)


def test_invalid_numbers_of_deleted_documents_are_refused(store):
    store.delete(["doc-1", "doc-2"])
    name = store.manifest.entries("deleted")[0].name
    for numbers in ([2, 1], [1, 40], [-1, 2], [1, 1]):
        with atomic_files.NpyWriter(store.path / name, np.dtype(np.int64)) as file:
            file.append(np.array(numbers))
        with pytest.raises(DatastoreCorruptError):
            RetroDatastore.load(store.path)


@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(steps=st.lists(st.tuples(st.sampled_from(["append", "delete", "compact"]), st.integers(0, 2**16)), max_size=5))
def test_any_sequence_of_changes_leaves_exactly_the_expected_documents(steps, tokenizer, embedder):
    """Against a dictionary that is changed in the same way."""
    expected = {document["id"]: document for document in corpus(6)}
    store = RetroDatastore.from_texts(expected.values(), tokenizer, embedder=embedder, chunk_size=8, neighbor_size=20)
    for number, (step, seed) in enumerate(steps):
        if step == "append":
            new = {f"{number}-{d['id']}": d | {"id": f"{number}-{d['id']}"} for d in corpus(1 + seed % 4, seed)}
            store.append(new.values(), embedder=embedder)
            expected |= new
        elif step == "delete" and expected:
            gone = [id for place, id in enumerate(expected) if (seed >> place % 16) & 1]
            store.delete(gone)
            expected = {id: document for id, document in expected.items() if id not in gone}
        elif step == "compact" and expected:
            store.compact()
    live = [number for number in range(store.num_documents) if number not in set(store.deleted_documents.tolist())]
    assert [store.document(number) for number in live] == list(expected.values())
    assert [store.document_number(id) for id in expected] == live
    assert found_by_all(store) == set(live)
    store.verify()


def test_manifest_records_changes(store, embedder):
    store.append(more(), embedder=embedder)
    store.delete(["doc-1"])
    content = json.loads((store.path / "datastore.json").read_text())
    assert content["generation"] == 3 and content["num_deleted_documents"] == 1
    assert [shard["name"] for shard in content["shards"]] == ["00000", "00001"] and content["next_shard"] == 2


def test_ids_are_texts_or_whole_numbers(tokenizer, embedder):
    """As they may when a store is built."""
    store = RetroDatastore.from_texts(["a", "b", {"id": 7, "text": "c"}], tokenizer, embedder=embedder)
    store.delete([7])
    store.delete(0)
    assert store.deleted_documents.tolist() == [0, 2]
    for wrong in (None, [b"1"], [True], 1.5):
        with pytest.raises(DatastoreInputError):
            store.delete(wrong)
    assert not list(store.path.parent.glob(".*"))


def test_full_disk_during_a_change_changes_nothing(store, embedder, monkeypatch):
    store.delete(["doc-2"])  # something to compact
    before = content_of(store.path)

    def full(*_):
        raise OSError(28, "No space left on device")

    for change in (lambda: store.delete(["doc-1"]), store.compact, lambda: store.append(more(), embedder=embedder)):
        with monkeypatch.context() as patched:
            patched.setattr(os, "replace", full)
            with pytest.raises(DatastoreWriteError):
                change()
        assert content_of(store.path) == before


def test_read_only_disk_is_reported(store, embedder, monkeypatch):
    """Also where unfinished work lies already, so that no folder needs to be made."""

    def refuse(*_, **__):
        raise OSError(30, "Read-only file system")

    monkeypatch.setattr(FileLock, "acquire", refuse)
    for change in (lambda: store.delete(["doc-1"]), store.compact, lambda: store.append(more(), embedder=embedder)):
        with pytest.raises(DatastoreWriteError):
            change()


@pytest.mark.parametrize("fraction", [0.1, 0.4, 1.0])
def test_restricted_index_finds_what_the_subset_finds(store, embedder, tmp_path, fraction):
    """Without a copy; over two shards, with deleted documents and with excluded ones."""
    store.append(more(), embedder=embedder)
    store.delete(["doc-3", "new-doc-4"])
    drawn = drawn_documents(store, fraction, seed=3)
    index = store.restricted_to(drawn)
    subset = store.subset(tmp_path / "subset", fraction=fraction, seed=3)
    assert (index.num_documents, index.num_chunks) == (subset.num_documents, subset.num_chunks)
    queries = store.keys_of(np.arange(0, store.num_chunks, 7))
    scores, ids = index.search(queries, 5)
    # By the scores: chunks that are equally near may change places.
    np.testing.assert_allclose(scores, subset.search(queries, 5)[0], rtol=1e-5)
    np.testing.assert_allclose(scores, np.einsum("qd,qkd->qk", queries, store.keys_of(ids)), rtol=1e-5)
    assert drawn[store.document_of(ids)].all()
    own = store.document_of(ids[:, :1])
    others = store.document_of(index.search(queries, 5, exclude_documents=own)[1])
    assert drawn[others].all() and (others != own).all()


def test_restricted_index_of_no_documents_finds_nothing(store):
    nothing = store.restricted_to(np.zeros(store.num_documents, dtype=bool))
    assert nothing.num_chunks == 0 and (nothing.search(store.keys_of(np.arange(3)), 2)[1] == -1).all()
