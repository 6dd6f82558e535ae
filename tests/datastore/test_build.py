"""Building: stopped anywhere it goes on and ends with the same bytes; any number of processes make the same store."""

import logging
import multiprocessing
import os
import runpy
import shutil

import datasets
import numpy as np
import pytest

from retro_hf.datastore import ChunkEmbedder, RetroDatastore
from retro_hf.datastore import build as build_module
from retro_hf.datastore import executors as executors_module
from retro_hf.datastore import manifest as manifest_module
from retro_hf.datastore import stages as stages_module
from retro_hf.datastore.executors import RankExecutor
from retro_hf.errors import (
    DatastoreExistsError,
    DatastoreInputError,
    DatastoreNotFoundError,
    DatastoreWriteError,
    RetroError,
)

from .fixtures import corpus
from .test_store import content_of


OPTIONS = {"chunk_size": 8, "neighbor_size": 20}


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    monkeypatch.setattr(stages_module, "_BLOCK_DOCUMENTS", 5)


def build(path, tokenizer, embedder, documents=None, **options):
    documents = corpus() if documents is None else documents
    return RetroDatastore.build(documents, path, tokenizer=tokenizer, embedder=embedder, **OPTIONS, **options)


class Stopped(BaseException):
    """What Ctrl-C does: no error of ours, and not to be caught."""


def test_store_does_not_depend_on_the_block_size(built, tmp_path, tokenizer, embedder):
    store = build(tmp_path / "store", tokenizer, embedder)
    names = {entry.name for entry in store.manifest.files if entry.kind not in ("keys", "documents", "index")}
    assert {name: content_of(store.path)[name] for name in names} == {name: content_of(built)[name] for name in names}
    # Texts are embedded in other batches, which moves the last bits.
    np.testing.assert_allclose(
        store.keys_of(np.arange(len(store))), RetroDatastore.load(built).keys_of(np.arange(len(store))), atol=2e-3
    )


@pytest.mark.parametrize("stop_at", [1, 3, 6])
def test_interrupted_build_resumes_with_identical_bytes(tmp_path, tokenizer, embedder, monkeypatch, stop_at, caplog):
    whole = build(tmp_path / "whole", tokenizer, embedder)
    embed = type(embedder).embed
    calls = []

    def embed_until(self, texts, **rest):
        calls.append(len(texts))
        if len(calls) == stop_at:
            raise Stopped
        return embed(self, texts, **rest)

    monkeypatch.setattr(type(embedder), "embed", embed_until)
    with pytest.raises(Stopped):
        build(tmp_path / "store", tokenizer, embedder)
    assert ".store.building" in caplog.text
    assert not (tmp_path / "store").exists()
    done = len(calls)
    calls.clear()
    monkeypatch.setattr(
        type(embedder), "embed", lambda self, texts, **rest: calls.append(1) or embed(self, texts, **rest)
    )
    store = build(tmp_path / "store", tokenizer, embedder)
    assert content_of(store.path) == content_of(whole.path)
    # Eight blocks in all; those that were done are not embedded again.
    assert len(calls) == 8 - (done - 1)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["store", "whole"]


def test_only_changed_blocks_are_computed_again(tmp_path, tokenizer, embedder, monkeypatch):
    """Another document in the third block; the others keep their keys."""
    embed = type(embedder).embed
    calls = []

    def embed_seven(self, texts, **rest):
        calls.append(len(texts))
        if len(calls) == 8:
            raise Stopped
        return embed(self, texts, **rest)

    monkeypatch.setattr(type(embedder), "embed", embed_seven)
    with pytest.raises(Stopped):
        build(tmp_path / "store", tokenizer, embedder)
    changed = corpus()
    changed[12]["text"] = "another text"
    calls.clear()
    store = build(tmp_path / "store", tokenizer, embedder, changed)
    assert len(calls) == 2
    assert store.document(12)["text"] == "another text"
    monkeypatch.undo()
    again = build(tmp_path / "again", tokenizer, embedder, changed)
    assert again.num_chunks == store.num_chunks


def _build_and_die(path, tokenizer, embedder, after, shard_chunks=1000):
    """A child process that dies before its `after`-th file appears."""
    replace, calls = os.replace, []

    def dying(*args):
        calls.append(1)
        if len(calls) == after:
            os._exit(9)
        return replace(*args)

    os.replace = dying
    build(path, tokenizer, embedder, shard_chunks=shard_chunks)
    os._exit(0)


@pytest.mark.parametrize("after", [4, 7, 11])
def test_build_killed_repeatedly_ends_with_identical_bytes(tmp_path, tokenizer, embedder, after):
    """Each run gets a few files further; what it leaves half-written is never taken for whole."""
    whole = build(tmp_path / "whole", tokenizer, embedder)
    kills = 0
    while not (tmp_path / "store").exists():
        child = multiprocessing.get_context("fork").Process(
            target=_build_and_die, args=(tmp_path / "store", tokenizer, embedder, after)
        )
        child.start()
        child.join(60)
        kills += child.exitcode == 9
        assert kills < 60
    assert kills >= 2 and content_of(tmp_path / "store") == content_of(whole.path)
    RetroDatastore.load(tmp_path / "store", verify=True)


def test_two_processes_build_the_same_store_as_one(tmp_path, tokenizer, encoder_folder):
    """Workers are spawned; they see the tokenizer and the encoder through their folders."""
    embedder = ChunkEmbedder.from_pretrained(encoder_folder, dtype=None)
    one = build(tmp_path / "one", tokenizer, embedder, shard_chunks=100)
    two = build(tmp_path / "two", tokenizer, embedder, shard_chunks=100, executor=2)
    assert content_of(two.path) == content_of(one.path)
    assert len(two.shards) > 1


def _build_as_rank(rank, path, tokenizer, embedder):
    build(path, tokenizer, embedder, shard_chunks=100, executor=RankExecutor(rank, 3, timeout=60))


def test_killed_worker_is_reported_and_finished_work_is_kept(tmp_path, tokenizer, embedder, monkeypatch):
    stage = build_module.run_stage

    def killing(run, tasks, task, *rest):
        if task == 1:
            multiprocessing.active_children()[0].kill()
        stage(run, tasks, task, *rest)

    with monkeypatch.context() as patched, pytest.raises(RetroError):
        patched.setattr(build_module, "run_stage", killing)
        build(tmp_path / "store", tokenizer, embedder, executor=2)
    assert not (tmp_path / "store").exists()
    assert len(list((tmp_path / ".store.building").glob("tokens-*"))) == 8
    assert build(tmp_path / "store", tokenizer, embedder).num_documents == 40


def test_ranks_build_one_store_together(tmp_path, tokenizer, embedder):
    """As torchrun or Slurm start them: three processes, one folder, each a share of the blocks."""
    context = multiprocessing.get_context("fork")
    ranks = [
        context.Process(target=_build_as_rank, args=(rank, tmp_path / "store", tokenizer, embedder))
        for rank in range(3)
    ]
    for process in ranks:
        process.start()
    for process in ranks:
        process.join(120)
    assert [process.exitcode for process in ranks] == [0, 0, 0]
    alone = build(tmp_path / "alone", tokenizer, embedder, shard_chunks=100)
    assert content_of(tmp_path / "store") == content_of(alone.path)


def test_helper_ends_if_the_first_rank_is_gone(tmp_path, tokenizer, embedder):
    """Within its timeout, and without the work that it has done itself."""
    options = {"tokenizer": tokenizer, "embedder": embedder, "chunk_size": 8, "neighbor_size": 20}
    with pytest.raises(RetroError, match="Rank 1 waited"):
        RetroDatastore.build(corpus(30), tmp_path / "store", executor=RankExecutor(1, 2, timeout=0.3), **options)
    assert not (tmp_path / "store").exists()


@pytest.mark.parametrize("folder", ["kept", "removed"])
def test_helper_ends_if_the_first_rank_dies_at_the_end(tmp_path, tokenizer, embedder, monkeypatch, folder):
    """All blocks are there, but nobody puts the store together; with the work of a rank that was killed or that failed."""
    options = {"tokenizer": tokenizer, "embedder": embedder, "chunk_size": 8, "neighbor_size": 20}
    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(build_module, "_finish", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        RetroDatastore.build(corpus(30), tmp_path / "store", **options)
    timeout = 0.3
    if folder == "removed":
        finished = build_module.build_shards
        monkeypatch.setattr(build_module, "_SLOW_FOLDER_SECONDS", 0.3)
        monkeypatch.setattr(
            build_module,
            "build_shards",
            lambda *rest: (finished(*rest), shutil.rmtree(tmp_path / ".store.building"))[0],
        )
        timeout = 1e6
    with pytest.raises(RetroError, match="first rank did not put"):
        RetroDatastore.build(corpus(30), tmp_path / "store", executor=RankExecutor(1, 2, timeout=timeout), **options)
    assert not (tmp_path / "store").exists()


def test_helper_ends_if_the_first_rank_gives_up(tmp_path, tokenizer, embedder, monkeypatch):
    """It removes the work after bad input. The error of a helper says so, not that a file is missing."""
    monkeypatch.setattr(
        executors_module.time, "sleep", lambda _: shutil.rmtree(tmp_path / ".store.building", ignore_errors=True)
    )
    monkeypatch.setattr(build_module, "_SLOW_FOLDER_SECONDS", 0.3)
    options = {"tokenizer": tokenizer, "embedder": embedder, "chunk_size": 8, "neighbor_size": 20}
    with pytest.raises(RetroError, match="first rank did not put"):
        RetroDatastore.build(corpus(30), tmp_path / "store", executor=RankExecutor(1, 2, timeout=1e6), **options)


@pytest.mark.parametrize("timeout", [None, "3", -1, float("nan"), True, [3]])
def test_timeout_is_a_number(timeout):
    with pytest.raises(DatastoreInputError, match="timeout is"):
        RankExecutor(1, 2, timeout=timeout)


def test_bad_input_of_a_helper_leaves_the_work_of_the_others(tmp_path, tokenizer, embedder):
    work = tmp_path / ".store.building"
    work.mkdir()
    (work / "tokens-000000-0123.safetensors").write_bytes(b"of another rank")
    with pytest.raises(DatastoreInputError):
        RetroDatastore.build(
            [{"no": "text"}],
            tmp_path / "store",
            tokenizer=tokenizer,
            embedder=embedder,
            executor=RankExecutor(1, 2, timeout=0.3),
        )
    assert (work / "tokens-000000-0123.safetensors").read_bytes() == b"of another rank"


def test_rank_out_of_range_is_refused():
    with pytest.raises(DatastoreInputError):
        RankExecutor(3, 3)


@pytest.mark.parametrize("name", ["RANK", "WORLD_SIZE"])
def test_an_environment_variable_that_is_no_number_is_named(name, monkeypatch):
    monkeypatch.setenv(name, "first")
    with pytest.raises(DatastoreInputError, match=f"{name} is 'first'"):
        RankExecutor()


def test_second_builder_of_the_same_store_is_refused(tmp_path, tokenizer, embedder, monkeypatch):
    embed = type(embedder).embed

    def embed_and_build(self, texts, **rest):
        monkeypatch.setattr(type(embedder), "embed", embed)
        with pytest.raises(DatastoreExistsError):
            build(tmp_path / "store", tokenizer, embedder)
        return embed(self, texts, **rest)

    monkeypatch.setattr(type(embedder), "embed", embed_and_build)
    assert build(tmp_path / "store", tokenizer, embedder).num_documents == 40


def test_full_disk_during_a_build_loses_no_work(tmp_path, tokenizer, embedder, monkeypatch):
    whole = build(tmp_path / "whole", tokenizer, embedder)
    replace, calls = os.replace, []

    def full_after_ten(source, target):
        calls.append(target)
        if len(calls) > 10:
            raise OSError(28, "No space left on device")
        return replace(source, target)

    monkeypatch.setattr(os, "replace", full_after_ten)
    with pytest.raises(DatastoreWriteError):
        build(tmp_path / "store", tokenizer, embedder)
    monkeypatch.undo()
    monkeypatch.setattr(stages_module, "_BLOCK_DOCUMENTS", 5)
    assert content_of(build(tmp_path / "store", tokenizer, embedder).path) == content_of(whole.path)


def test_partial_write_reported_by_numpy_is_a_write_error(tmp_path, tokenizer, embedder, monkeypatch):
    def full(*_):
        raise OSError("616096 requested and 450496 written")

    monkeypatch.setattr(stages_module.np, "save", full)
    with pytest.raises(DatastoreWriteError):
        build(tmp_path / "store", tokenizer, embedder)


def test_shards_have_similar_sizes_and_are_searched_as_one(built, tmp_path, tokenizer, embedder):
    store = build(tmp_path / "store", tokenizer, embedder, shard_chunks=120)
    one = build(tmp_path / "one", tokenizer, embedder)
    sizes = [shard.num_chunks for shard in store.shards]
    assert len(sizes) > 2 and max(sizes) <= 120 and min(sizes) > 40
    ids = np.arange(store.num_chunks)
    np.testing.assert_array_equal(store.gather(ids)[0], one.gather(ids)[0])
    np.testing.assert_array_equal(store.document_of(ids), one.document_of(ids))
    np.testing.assert_array_equal(store.keys_of(ids), one.keys_of(ids))
    assert [store.document(number) for number in range(40)] == corpus()
    assert [store.document_number(f"doc-{number}") for number in range(40)] == list(range(40))
    everything = np.arange(41)
    np.testing.assert_array_equal(store.first_chunks(everything), one.first_chunks(everything))
    queries, own = one.keys_of(ids), one.document_of(ids)
    for excluded in (None, own):
        scores, found = store.search(queries, 4, exclude_documents=excluded)
        expected, expected_ids = one.search(queries, 4, exclude_documents=excluded)
        np.testing.assert_allclose(scores, expected, atol=1e-6)
        # Short chunks of different documents may be the same text.
        assert (found == expected_ids).mean() > 0.97


def test_shard_limit_holds_for_blocks_of_any_size(tmp_path, tokenizer, embedder, monkeypatch):
    """Blocks are divided between shards, documents are not."""
    monkeypatch.undo()
    whole = build(tmp_path / "whole", tokenizer, embedder)
    documents = np.diff(whole.shards[0].doc_offsets)
    for limit in (100, 30, 5):
        store = build(tmp_path / str(limit), tokenizer, embedder, shard_chunks=limit)
        for shard in store.shards:
            assert shard.num_chunks <= limit or shard.num_documents == 1
        assert len(store.shards) <= 2 * -(-whole.num_chunks // limit)
        np.testing.assert_array_equal(
            np.concatenate([np.diff(shard.doc_offsets) for shard in store.shards]), documents
        )
        ids = np.arange(whole.num_chunks)
        np.testing.assert_array_equal(store.gather(ids)[0], whole.gather(ids)[0])
        np.testing.assert_array_equal(store.keys_of(ids), whole.keys_of(ids))
        assert [store.document(number) for number in range(40)] == corpus()


@pytest.mark.parametrize("after", [4, 7])
def test_build_of_many_shards_killed_repeatedly_ends_with_identical_bytes(tmp_path, tokenizer, embedder, after):
    whole = build(tmp_path / "whole", tokenizer, embedder, shard_chunks=60)
    while not (tmp_path / "store").exists():
        child = multiprocessing.get_context("fork").Process(
            target=_build_and_die, args=(tmp_path / "store", tokenizer, embedder, after, 60)
        )
        child.start()
        child.join(60)
        assert child.exitcode in (0, 9)
    assert content_of(tmp_path / "store") == content_of(whole.path)


@pytest.mark.parametrize(
    ("path", "options", "error", "named"),
    [
        ("x" * 300, {}, DatastoreWriteError, "File name too long"),
        ("a\0b", {}, DatastoreInputError, "x00"),
        (
            "store",
            {"chunk_size": 10**12, "neighbor_size": 10**12},
            DatastoreInputError,
            "1,048,576",
        ),
    ],
)
def test_impossible_builds_are_refused_with_a_reason(tmp_path, tokenizer, embedder, path, options, error, named):
    with pytest.raises(error, match=named):
        RetroDatastore.build(corpus(), tmp_path / path, tokenizer=tokenizer, embedder=embedder, **options)
    assert list(tmp_path.iterdir()) == []


def test_unrelated_folder_is_not_used_as_a_work_folder(tmp_path, tokenizer, embedder):
    """It would be removed with what is in it when the build is done."""
    other = tmp_path / ".store.building"
    other.mkdir()
    (other / "precious").write_text("thesis")
    with pytest.raises(DatastoreExistsError):
        build(tmp_path / "store", tokenizer, embedder)
    assert (other / "precious").read_text() == "thesis"
    (tmp_path / ".one.building").write_text("thesis")
    with pytest.raises(DatastoreExistsError):
        build(tmp_path / "one", tokenizer, embedder)
    assert (tmp_path / ".one.building").read_text() == "thesis"


def test_too_many_shards_are_refused_before_they_are_written(tmp_path, tokenizer, embedder, monkeypatch):
    """A manifest has a bound when it is read, so what would be beyond it is not written."""
    monkeypatch.setattr(manifest_module, "_MAX_SHARDS", 3)
    with (
        monkeypatch.context() as patched,
        pytest.raises(DatastoreInputError),
    ):
        patched.setattr(ChunkEmbedder, "embed", None)
        build(tmp_path / "store", tokenizer, embedder, shard_chunks=20)
    store = build(tmp_path / "store", tokenizer, embedder)
    for number in range(2):
        store.append([{"id": f"new {number}", "text": "the king"}], embedder=embedder, show_progress=False)
    with pytest.raises(DatastoreInputError):
        store.append([{"id": "new 2", "text": "the king"}], embedder=embedder, show_progress=False)
    assert RetroDatastore.load(tmp_path / "store", verify=True).num_documents == 42
    store.compact(show_progress=False)
    store.append([{"id": "new 2", "text": "the king"}], embedder=embedder, show_progress=False)
    assert store.num_documents == 43


def test_manifest_lists_a_bounded_number_of_sources(tmp_path, tokenizer, embedder, monkeypatch):
    """Of a million files it would be longer than what is read of a manifest."""
    monkeypatch.setattr(manifest_module, "_MAX_SOURCES", 3)
    for name in ("first", "second"):
        (tmp_path / name).mkdir()
        for number in range(4):
            (tmp_path / name / f"{number} of {name}.txt").write_text("the king")
    store = build(tmp_path / "store", tokenizer, embedder, tmp_path / "first")
    store.append(tmp_path / "second", embedder=embedder, show_progress=False)
    names = [source["name"] for source in RetroDatastore.load(tmp_path / "store").manifest.sources]
    more = "and more, which the table of documents names"
    assert names == ["0 of first.txt", "1 of first.txt", "2 of first.txt", more]
    assert store.document(7)["source"] == "3 of second.txt"


def test_impossible_path_is_reported():
    with pytest.raises(DatastoreNotFoundError):
        RetroDatastore.load("x" * 300)
    with pytest.raises(DatastoreInputError):
        RetroDatastore.load("a\0b")


def test_stream_is_read_once(tmp_path, tokenizer, embedder):
    """An IterableDataset as large as the disk; documents are handed on in bounded groups."""
    alive = []

    def stream():
        for document in corpus():
            alive.append(document["id"])
            yield document

    dataset = datasets.IterableDataset.from_generator(stream)
    store = build(tmp_path / "store", tokenizer, embedder, dataset)
    assert store.num_documents == 40 and len(alive) == 40


def test_sizes_are_logged_before_the_long_part(tmp_path, tokenizer, embedder, caplog):
    with caplog.at_level(logging.INFO, "retro_hf"):
        store = build(tmp_path / "store", tokenizer, embedder)
    told = next(record.getMessage() for record in caplog.records if "chunks" in record.getMessage())
    assert f"{store.num_chunks} chunks" in told and "index Flat" in told and "in memory" in told


@pytest.mark.timeout(240)
def test_script_without_main_guard_fails_with_an_explanation(tmp_path, tokenizer, encoder_folder):
    """Workers import the script, and would build again; the parent must not wait for dead ones."""
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    options = {
        "tokenizer": str(tmp_path / "tokenizer"),
        "embedder": str(encoder_folder),
        "chunk_size": 8,
        "executor": 2,
    }
    script = tmp_path / "script.py"
    script.write_text(
        "from retro_hf import RetroDatastore\n"
        f"RetroDatastore.build(['one two', 'three'], {str(tmp_path / 'store')!r}, **{options!r})\n"
    )
    with pytest.raises(RetroError, match="`if __name__ == '__main__':`"):
        runpy.run_path(str(script), run_name="__main__")  # as `python script.py` does; workers find it in sys.modules
    assert not (tmp_path / "store").exists()


def test_documents_that_hold_most_chunks_are_told(tmp_path, tokenizer, embedder, caplog):
    """A corpus that is one document has nothing to read for its own text; one of many documents has."""
    caplog.set_level(logging.WARNING, logger="retro_hf")
    build(tmp_path / "many", tokenizer, embedder)
    assert not caplog.text
    build(tmp_path / "one", tokenizer, embedder, [" ".join(one["text"] for one in corpus())])
    assert "One of 1 document" in caplog.text and "100%" in caplog.text
