"""RetroDatastore: what is built is what was given, it travels, and building is atomic and repeatable."""

import functools
import inspect
import multiprocessing
import os
import pickle
import signal
import tempfile

import datasets
import numpy as np
import pytest
import safetensors.numpy
from transformers import AutoTokenizer

from retro_hf import RetroRetriever
from retro_hf.datastore import ChunkEmbedder, RetroDatastore, chunk_texts, shard
from retro_hf.datastore.compatibility import vocabulary_fingerprint
from retro_hf.errors import (
    DatastoreCorruptError,
    DatastoreExistsError,
    DatastoreInputError,
    DatastoreMismatchError,
    DatastoreWriteError,
    PretrainedNotFoundError,
)

from .fixtures import corpus, make_encoder, make_tokenizer
from .test_chunks import change


def content_of(folder) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in folder.iterdir()}


def test_store_contains_the_given_documents(datastore, tokenizer, embedder):
    documents = corpus()
    assert datastore.num_documents == len(documents) and len(datastore) == datastore.num_chunks
    assert [datastore.document(number) for number in range(len(documents))] == documents
    assert [datastore.document_number(document["id"]) for document in documents] == list(range(len(documents)))
    ids = np.arange(datastore.num_chunks)
    tokens, mask = datastore.gather(ids)
    tokens, mask = tokens[:, :8], mask[:, :8].astype(bool)
    owners = datastore.document_of(ids)
    for number, document in enumerate(documents):
        expected = tokenizer(document["text"])["input_ids"]
        assert tokens[owners == number][mask[owners == number]].tolist() == expected
    assert datastore.num_tokens == mask.sum()
    texts = chunk_texts(tokenizer, tokens, mask)
    np.testing.assert_allclose(datastore.keys_of(ids), embedder.embed(texts), atol=1e-3)


def test_every_chunk_finds_itself(datastore, embedder, tokenizer):
    ids = np.arange(datastore.num_chunks)
    tokens, mask = datastore.gather(ids)
    scores, found = datastore.search(embedder.embed(chunk_texts(tokenizer, tokens[:, :8], mask[:, :8])), 1)
    np.testing.assert_allclose(scores[:, 0], 1, atol=2e-3)
    # Short chunks at the end of two documents may be the same.
    assert (found[:, 0] == ids).mean() > 0.9


def test_keys_are_a_safetensors_file_that_others_can_read(datastore):
    name = datastore.manifest.entries("keys")[0].name
    keys = safetensors.numpy.load_file(datastore.path / name)["keys"]
    np.testing.assert_array_equal(keys, datastore.shards[0].keys)
    assert keys.dtype == np.float16 and keys.shape == (datastore.num_chunks, 32)


def test_documents_are_a_parquet_file_that_others_can_read(datastore):
    table = datasets.Dataset.from_parquet(str(datastore.path / datastore.manifest.entries("documents")[0].name))
    assert table["text"] == [document["text"] for document in corpus()]


def test_store_has_a_copy_of_its_tokenizer(datastore, tokenizer):
    assert datastore.tokenizer("the old river \u05e9")["input_ids"] == tokenizer("the old river \u05e9")["input_ids"]
    AutoTokenizer.from_pretrained(datastore.path)


def test_building_twice_gives_identical_bytes(built, tmp_path, tokenizer, embedder):
    other = tmp_path / "again"
    RetroDatastore.build(iter(corpus()), other, tokenizer=tokenizer, embedder=embedder, chunk_size=8, neighbor_size=20)
    assert content_of(other) == content_of(built)


def test_every_input_kind_gives_the_same_chunks(built, tmp_path, tokenizer, embedder):
    options = dict(tokenizer=tokenizer, embedder=embedder, chunk_size=8, neighbor_size=20)
    dataset = datasets.Dataset.from_list(corpus())
    dataset.to_json(tmp_path / "corpus.jsonl")
    for number, documents in enumerate([dataset, dataset.to_iterable_dataset(), tmp_path / "corpus.jsonl"]):
        store = RetroDatastore.build(documents, tmp_path / str(number), **options)
        for kind in ("tokens", "doc_offsets", "keys", "documents"):
            name = store.manifest.entries(kind)[0].name
            assert (store.path / name).read_bytes() == (built / name).read_bytes(), kind


def test_any_unicode_survives(tokenizer, embedder):
    texts = [
        "\x00 \x7f",
        "\U0001f600\U0001f468\u200d\U0001f469",
        "\u05e9\u05dc\u05d5\u05dd \u202etxet",
        "a\ud800b",
        "\ufeff",
    ]
    store = RetroDatastore.from_texts(texts, tokenizer, embedder=embedder, chunk_size=4, neighbor_size=64)
    first = np.searchsorted(store.document_of(np.arange(store.num_chunks)), np.arange(store.num_documents))
    tokens, mask = store.gather(first)
    expected = [text.replace("\ud800", "\ufffd") for text in texts]
    assert chunk_texts(tokenizer, tokens, mask) == expected
    assert [store.document(number)["text"] for number in range(store.num_documents)] == expected


def test_store_of_one_short_document(tokenizer, embedder):
    store = RetroDatastore.from_texts(["a"], tokenizer, embedder=embedder)
    assert (store.num_chunks, store.num_tokens, store.chunk_size, store.neighbor_size) == (1, 1, 64, 128)
    tokens, mask = store.gather([[0, -1]])
    assert mask.sum(axis=-1).tolist() == [[1, 0]]
    scores, ids = store.search(store.keys_of(np.arange(store.num_chunks)), 3)
    assert ids.tolist() == [[0, -1, -1]] and np.isneginf(scores[0, 1:]).all()


def test_large_vocabularies_use_four_bytes_per_token(embedder):
    tokenizer = make_tokenizer()
    tokenizer.add_tokens([f"<{number}>" for number in range(70_000)])
    store = RetroDatastore.from_texts(["<3> <69999> the"], tokenizer, embedder=embedder, chunk_size=4, neighbor_size=8)
    assert store.manifest.token_dtype == "uint32"
    assert store.gather(0)[0][:3].max() == tokenizer.convert_tokens_to_ids("<69999>")
    with pytest.raises(DatastoreMismatchError):
        store.check_compatible(tokenizer=make_tokenizer())


def test_a_temporary_store_lives_as_long_as_the_object(tokenizer, embedder, tmp_path):
    store = RetroDatastore.from_texts(corpus(3), tokenizer, embedder=embedder)
    path = store.path
    store.save(tmp_path / "kept")
    assert path.is_dir()
    del store
    assert not path.exists()
    assert RetroDatastore.load(tmp_path / "kept", verify=True).num_documents == 3


def test_forked_child_does_not_remove_a_temporary_store(tokenizer, embedder):
    stores = [RetroDatastore.from_texts(["a"], tokenizer, embedder=embedder)]
    child = multiprocessing.get_context("fork").Process(target=stores.clear)
    child.start()
    child.join()
    assert child.exitcode == 0 and stores[0].path.is_dir()


def test_a_failed_temporary_build_leaves_no_folder(tokenizer, embedder, tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    with pytest.raises(DatastoreInputError):
        RetroDatastore.from_texts([], tokenizer, embedder=embedder)
    assert list(tmp_path.iterdir()) == []


def test_saving_makes_an_exact_copy_and_never_overwrites(datastore, tmp_path):
    datastore.save(tmp_path / "a" / "copy")
    assert content_of(tmp_path / "a" / "copy") == content_of(datastore.path)
    with pytest.raises(DatastoreExistsError):
        datastore.save(tmp_path / "a" / "copy")
    assert os.listdir(tmp_path / "a") == ["copy"]


def test_loading_writes_nothing(built):
    before = {file.name: file.stat().st_mtime_ns for file in built.iterdir()}
    store = RetroDatastore.load(built, verify=True)
    store.search(store.keys_of(np.arange(3)), 2)
    store.document(0)
    assert {file.name: file.stat().st_mtime_ns for file in built.iterdir()} == before
    with pytest.raises(ValueError):
        store.shards[0].keys[0] = 0


def test_pickling_keeps_the_path_only(datastore):
    _ = datastore.shards[0].index, datastore.shards[0].keys
    data = pickle.dumps(datastore)
    assert len(data) < 500
    again = pickle.loads(data)
    np.testing.assert_array_equal(again.gather([0, 5])[0], datastore.gather([0, 5])[0])


def test_existing_path_is_refused_before_any_work(tmp_path, tokenizer, embedder):
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(DatastoreExistsError):
        RetroDatastore.build(["a"], tmp_path, tokenizer=tokenizer, embedder=embedder)
    with pytest.raises(DatastoreExistsError):
        RetroDatastore.build(["a"], tmp_path / "notes.txt", tokenizer=tokenizer, embedder=embedder)
    assert content_of(tmp_path) == {"notes.txt": b"mine"}


@pytest.mark.parametrize(
    ("documents", "options", "named"),
    [
        ([], {}, "0 documents"),
        (["", " "], {}, "2 documents"),
        (["a"], {"chunk_size": 0}, "chunk_size is 0"),
        (["a"], {"chunk_size": "8"}, "chunk_size is '8'"),
        (["a"], {"neighbor_size": 7}, "neighbor_size is 7.*chunk_size=8"),
        (["a"], {"index": "Nonsense"}, "Nonsense"),
        (["a"], {"index": "IVF64,Flat"}, r"at least 64 chunks, but the documents make 1\."),
        (["a"], {"index": "PQ8"}, "at least 256 chunks"),
        (["a"], {"index": "PCAR16,Flat"}, "at least 16 chunks"),
        (["a"], {"index": "IVF0,Flat"}, "IVF0,Flat"),
        (["a"], {"index": "PCA512,Flat"}, "PCA512,Flat"),
        (["a"], {"index": None}, "NoneType"),
        ([{"id": "x", "text": "a"}, {"id": "x", "text": "b"}], {}, "'x': Document 0 and Document 1"),
        ([{"id": "1", "text": "a"}, "b"], {}, "'1'"),
    ],
)
def test_bad_input_leaves_nothing_behind(documents, options, named, tmp_path, tokenizer, embedder):
    options = {"chunk_size": 8, "neighbor_size": 16, **options}
    with pytest.raises(DatastoreInputError, match=named):
        RetroDatastore.build(documents, tmp_path / "store", tokenizer=tokenizer, embedder=embedder, **options)
    assert list(tmp_path.iterdir()) == []


def test_duplicate_id_is_reported_with_both_places(tmp_path, tokenizer, embedder):
    texts = tmp_path / "texts"
    texts.mkdir()
    (texts / "a.jsonl").write_text('{"id": "x", "text": "a"}\n\n{"id": "y", "text": "b"}\n')
    (texts / "b.jsonl").write_text('{"id": "z", "text": "c"}\n{"id": "y", "text": "d"}\n')
    build = functools.partial(RetroDatastore.build, path=tmp_path / "store", tokenizer=tokenizer, embedder=embedder)
    with pytest.raises(DatastoreInputError):
        build(texts)
    with pytest.raises(DatastoreInputError):
        build({"id": id, "text": "a"} for id in "xyzy")


def test_empty_documents_are_logged_once(tokenizer, embedder, caplog):
    store = RetroDatastore.from_texts(["a", "", "b"], tokenizer, embedder=embedder)
    assert store.manifest.num_empty_documents == 1
    (record,) = (record for record in caplog.records if record.name.endswith("build"))
    assert "1 of 3 documents" in record.getMessage()


def test_files_that_are_not_utf8_are_logged_once(tmp_path, tokenizer, embedder, caplog):
    for name, content in (("a", "fine"), ("b", "caf\u00e9"), ("c", "na\u00efve"), ("d", "\u00fcber")):
        (tmp_path / f"{name}.txt").write_bytes(content.encode("latin1"))
    RetroDatastore.build(tmp_path, tmp_path / "store", tokenizer=tokenizer, embedder=embedder)
    (record,) = (record for record in caplog.records if record.name.endswith("documents"))
    assert "3 of 4 files" in record.getMessage() and "'b.txt'" in record.getMessage()


def test_an_embedder_that_gives_nan_is_refused(tmp_path, tokenizer, embedder, monkeypatch):
    monkeypatch.setattr(type(embedder), "embed", lambda self, texts, **_: np.full((len(texts), 32), np.nan))
    with pytest.raises(DatastoreInputError):
        RetroDatastore.build(["a"], tmp_path / "store", tokenizer=tokenizer, embedder=embedder)


def test_killed_build_leaves_no_store_under_the_final_name(tmp_path, encoder_folder, tokenizer, embedder):
    """Killed while it embeds, after the tokens were written."""

    def build_and_be_killed():
        embedder.embed = lambda *_, **__: os.kill(os.getpid(), signal.SIGKILL)
        RetroDatastore.build(["a b c"] * 3, tmp_path / "store", tokenizer=tokenizer, embedder=embedder)

    child = multiprocessing.get_context("fork").Process(target=build_and_be_killed)
    child.start()
    child.join(60)
    assert child.exitcode == -signal.SIGKILL
    assert list(tmp_path.glob(".store.building/tokens-*")) and not (tmp_path / "store").exists()
    options = dict(tokenizer=tokenizer, embedder=str(encoder_folder))
    assert RetroDatastore.build(["a b c"], tmp_path / "store", **options).num_documents == 1


def test_mismatch_is_reported_with_both_values(datastore, tokenizer, embedder, tmp_path):
    datastore.check_compatible(tokenizer=tokenizer, chunk_size=8, neighbor_size=20, embedder=embedder)
    with pytest.raises(DatastoreMismatchError):
        datastore.check_compatible(chunk_size=64)
    with pytest.raises(DatastoreMismatchError):
        datastore.check_compatible(neighbor_size=16)
    with pytest.raises(DatastoreMismatchError):
        datastore.check_compatible(tokenizer=make_tokenizer(vocab_size=380))
    other = ChunkEmbedder.from_pretrained(make_encoder(tmp_path / "other", seed=1))
    with pytest.raises(DatastoreMismatchError):
        datastore.check_compatible(embedder=other)


def test_a_tokenizer_that_differs_in_any_stage_is_refused(tokenizer, embedder):
    """The vocabulary is the same in each case; a pad token that was added since changes no text."""
    store = RetroDatastore.from_texts(["the old river"], tokenizer, embedder=embedder, chunk_size=4)
    for part in ("added tokens", "normalizer", "pre-tokenizer", "post-processor"):
        other = make_tokenizer()
        change(other, part)
        with pytest.raises(DatastoreMismatchError, match="retokenize"):
            store.check_compatible(tokenizer=other)
    padded = make_tokenizer()
    padded.add_special_tokens({"pad_token": "<pad>"})
    store.check_compatible(tokenizer=padded)


def test_a_store_that_recorded_the_vocabulary_alone_still_opens(tokenizer, embedder, tmp_path, monkeypatch):
    """As version 0.1 did; it is compared as it was then."""
    monkeypatch.setattr("retro_hf.datastore.manifest.tokenizer_fingerprint", vocabulary_fingerprint)
    RetroDatastore.from_texts(["the old river"], tokenizer, embedder=embedder, chunk_size=4).save(tmp_path / "store")
    store = RetroDatastore.load(tmp_path / "store")
    assert store.manifest.tokenizer["fingerprint"] == vocabulary_fingerprint(tokenizer)
    store.check_compatible(tokenizer=tokenizer)
    with pytest.raises(DatastoreMismatchError, match="retokenize"):
        store.check_compatible(tokenizer=make_tokenizer(vocab_size=380))


@pytest.mark.parametrize("which", [0, 1])
def test_a_store_that_recorded_the_vocabulary_alone_can_be_merged(which, tokenizer, embedder, tmp_path, monkeypatch):
    """The stores' own copies of the tokenizer are compared, which must be the same in every stage."""

    def make(number, tokenizer):
        texts = [{"id": str(number), "text": "the old river"}]
        store = RetroDatastore.from_texts(texts, tokenizer, embedder=embedder, chunk_size=4)
        store.save(tmp_path / str(number))
        return RetroDatastore.load(tmp_path / str(number))

    stores = [make(0, tokenizer), make(1, tokenizer)]
    with monkeypatch.context() as version:
        version.setattr("retro_hf.datastore.manifest.tokenizer_fingerprint", vocabulary_fingerprint)
        stores[which] = make(2, tokenizer)
    merged = RetroDatastore.merge(stores, tmp_path / "merged")
    assert merged.num_documents == 2
    merged.check_compatible(tokenizer=tokenizer)
    other = make_tokenizer()
    change(other, "normalizer")
    stores[1 - which] = make(3, other)
    with pytest.raises(DatastoreMismatchError):
        RetroDatastore.merge(stores, tmp_path / "refused")


@pytest.mark.parametrize("ids", [[-2], [10_000], [0.5], ["a"]])
def test_unknown_chunk_ids_are_refused(datastore, ids):
    for call in (datastore.gather, datastore.document_of):
        with pytest.raises(DatastoreInputError):
            call(ids)


def test_unknown_documents_are_refused(datastore):
    for number in (-1, 40):
        with pytest.raises(DatastoreInputError):
            datastore.document(number)
    with pytest.raises(DatastoreInputError):
        datastore.document_number("doc-99")


@pytest.mark.filterwarnings("ignore:Cannot enable progress bars")
def test_progress_bars_follow_the_transformers_setting(tokenizer, embedder, capsys):
    from transformers.utils import logging

    RetroDatastore.from_texts(["a"], tokenizer, embedder=embedder, show_progress=True)
    assert capsys.readouterr().err == ""
    logging.enable_progress_bar()
    try:
        RetroDatastore.from_texts(["a"], tokenizer, embedder=embedder, show_progress=True)
        shown = capsys.readouterr().err
        RetroDatastore.from_texts(["a"], tokenizer, embedder=embedder, show_progress=False)
        assert capsys.readouterr().err == ""
    finally:
        logging.disable_progress_bar()
    assert all(part in shown for part in ("Tokenizing", "Embedding", "Indexing (Flat)", "doc", "chunk"))


def test_store_among_the_texts_is_not_read(tmp_path, tokenizer, embedder, caplog):
    """Otherwise the texts of yesterday come back from its own documents."""
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "a.txt").write_text("the old river")
    options = dict(tokenizer=tokenizer, embedder=embedder)
    first = RetroDatastore.build(tmp_path / "notes", tmp_path / "notes" / "store", **options)
    (tmp_path / "notes" / "a.txt").rename(tmp_path / "notes" / "b.txt")
    second = RetroDatastore.build(tmp_path / "notes", tmp_path / "second", **options)
    assert [second.document(n)["id"] for n in range(second.num_documents)] == ["b.txt"]
    assert "Left out 1 datastore among the texts" in caplog.text
    with pytest.raises(DatastoreInputError):
        RetroDatastore.build(first.path, tmp_path / "third", **options)


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"tokenizer": None}, "tokenizer is of type NoneType"),
        ({"embedder": None}, "embedder is of type NoneType"),
        ({"executor": "2"}, "executor is '2'"),
        ({"index": "IDMap,Flat"}, "IDMap,Flat"),
        ({"index": 3}, "index is of type int"),
    ],
)
def test_arguments_of_the_wrong_type_are_refused(options, named, tmp_path, tokenizer, embedder):
    with pytest.raises(DatastoreInputError, match=named):
        RetroDatastore.build(["a"], tmp_path / "store", **{"tokenizer": tokenizer, "embedder": embedder, **options})
    assert list(tmp_path.iterdir()) == []


def test_invalid_path_or_tokenizer_is_refused(datastore, tmp_path):
    for opened in (RetroDatastore.load, RetroDatastore.from_pretrained, RetroRetriever.from_pretrained):
        with pytest.raises(DatastoreInputError):
            opened(None)
    with pytest.raises(DatastoreInputError):
        datastore.retokenize(tmp_path / "other", None)
    # An option of another method is refused by the one that was called, with Python's own words.
    with pytest.raises(TypeError):
        RetroRetriever.from_pretrained(datastore.path, chunk_size=32)


def test_unknown_tokenizer_is_reported(tmp_path, embedder):
    with pytest.raises(PretrainedNotFoundError):
        RetroDatastore.build(["a"], tmp_path / "store", tokenizer="nope/x", embedder=embedder)


def test_path_that_cannot_be_written_is_reported(tmp_path, tokenizer, embedder):
    for name in ("x" * 250, "file/store"):
        (tmp_path / "file").touch()
        with pytest.raises(DatastoreWriteError):
            RetroDatastore.build(["a"], tmp_path / name, tokenizer=tokenizer, embedder=embedder)


@pytest.mark.parametrize("kind", [RetroDatastore, RetroRetriever])
def test_every_option_is_documented(kind):
    """In the signature; where it only says `**options`, by name in the docstring."""
    behind = {
        "RetroDatastore.append": RetroDatastore.build,
        "RetroDatastore.from_texts": RetroDatastore.build,
        "RetroDatastore.sync": RetroDatastore.build,
        "RetroRetriever.from_pretrained": RetroDatastore.from_pretrained,
        "RetroRetriever.from_texts": RetroDatastore.build,
        "RetroRetriever.push_to_hub": RetroDatastore.push_to_hub,
        "RetroRetriever.trace": RetroRetriever.search,
    }
    seen = 0
    for name, method in inspect.getmembers(kind, inspect.isroutine):
        if name.startswith("_"):
            continue
        parameters = inspect.signature(method).parameters
        assert method.__doc__, name
        if any(one.kind is one.VAR_KEYWORD for one in parameters.values()):
            options = inspect.signature(behind[f"{kind.__name__}.{name}"]).parameters.values()
            hidden = {one.name for one in options if one.kind is one.KEYWORD_ONLY} - set(parameters) - {"settings"}
            if name in ("append", "sync"):
                hidden -= {"tokenizer", "chunk_size", "neighbor_size"}  # of the store
            assert {option for option in hidden if f"`{option}`" not in method.__doc__} == set(), name
            seen += 1
    assert seen == sum(key.startswith(kind.__name__) for key in behind)


def test_index_that_returns_unknown_chunks_is_refused(built, monkeypatch):
    """By the file's name, and not by an error from deep inside; results that are missing are none."""
    store = RetroDatastore.load(built)
    query, found = store.keys_of([0]).astype(np.float32), np.array([[store.num_chunks, 0]])
    monkeypatch.setattr(shard, "search_index", lambda *_: (np.ones((1, 2), dtype=np.float32), found))
    with pytest.raises(DatastoreCorruptError):
        store.search(query, 2)
    found[:] = [[5, -1]]
    scores, ids = store.search(query, 2)
    assert ids.tolist() == [[5, -1]] and scores.tolist() == [[1.0, -np.inf]]
