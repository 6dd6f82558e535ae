"""Subset, merge and retokenize: new stores with the keys of old ones, and not one text embedded."""

import errno
import os

import numpy as np
import pytest

from retro_hf.datastore import RetroDatastore, chunk_texts
from retro_hf.errors import (
    DatastoreExistsError,
    DatastoreInputError,
    DatastoreMismatchError,
    DatastoreWriteError,
)

from .fixtures import corpus, make_encoder, make_tokenizer


OPTIONS = {"chunk_size": 8, "neighbor_size": 20}


@pytest.fixture(autouse=True)
def no_embedding(datastore, embedder, monkeypatch):
    """After the fixtures are built, nothing may be embedded."""
    monkeypatch.setattr(type(embedder), "embed", lambda *_, **__: pytest.fail("embedded"))


def nearest(store, other):
    queries = other.keys_of(np.arange(other.num_chunks))
    scores, ids = store.search(queries, 3)
    return scores, [[store.document(int(n))["id"] for n in row] for row in store.document_of(ids)]


def test_subset_by_id_has_the_documents_and_their_keys(datastore, tmp_path):
    subset = datastore.subset(tmp_path / "subset", ids=["doc-30", "doc-2", "doc-9"])
    assert [subset.document(number)["id"] for number in range(3)] == ["doc-2", "doc-9", "doc-30"]
    for number, old in enumerate((2, 9, 30)):
        here, there = (store.first_chunks(np.array([n])) for store, n in ((subset, number), (datastore, old)))
        np.testing.assert_array_equal(subset.gather(here)[0], datastore.gather(there)[0])
        np.testing.assert_array_equal(subset.keys_of(here), datastore.keys_of(there))
    subset.verify()
    with pytest.raises(DatastoreInputError):
        datastore.subset(tmp_path / "other", ids=["doc-99"])


def test_fractions_are_nested_and_of_the_right_size(datastore, tmp_path):
    """A smaller subset lies inside a larger one, so that a sweep over sizes only ever adds."""
    ids = []
    for fraction in (0.25, 0.5, 1.0):
        subset = datastore.subset(tmp_path / str(fraction), fraction=fraction, seed=3)
        ids.append({subset.document(number)["id"] for number in range(subset.num_documents)})
    assert ids[0] < ids[1] < ids[2] and len(ids[2]) == 40
    assert 4 <= len(ids[0]) <= 16 and 12 <= len(ids[1]) <= 28
    other = datastore.subset(tmp_path / "seed", fraction=0.5, seed=4)
    assert {other.document(number)["id"] for number in range(other.num_documents)} != ids[1]


@pytest.mark.parametrize(
    "options",
    [{}, {"ids": ["doc-1"], "fraction": 0.5}, {"fraction": 0}, {"fraction": 1.5}, {"fraction": 1e-9}, {"ids": []}],
)
def test_empty_subset_is_refused_and_leaves_no_files(datastore, tmp_path, options):
    with pytest.raises(DatastoreInputError):
        datastore.subset(tmp_path / "subset", **options)
    assert list(tmp_path.iterdir()) == []


def test_merged_parts_equal_the_whole(datastore, tmp_path):
    """Cut in two, one document deleted from each part, and put together again."""
    parts = [
        datastore.subset(tmp_path / str(number), ids=[f"doc-{n}" for n in range(number, 40, 2)]) for number in range(2)
    ]
    parts[0].delete(["doc-4"])
    parts[1].delete(["doc-7"])
    merged = RetroDatastore.merge(parts, tmp_path / "merged")
    assert merged.num_documents == 40 and merged.num_deleted_documents == 2
    rest = [f"doc-{n}" for n in range(40) if n not in (4, 7)]
    assert (merged.document_numbers(rest) >= 0).all()
    assert (merged.document_numbers(["doc-4", "doc-7"]) == -1).all()
    whole = datastore.subset(tmp_path / "whole", ids=rest)
    np.testing.assert_allclose(nearest(merged, whole)[0], nearest(whole, whole)[0], atol=1e-6)
    merged.verify()
    merged.compact()
    np.testing.assert_allclose(nearest(merged, whole)[0], nearest(whole, whole)[0], atol=1e-6)
    # The parts have not changed.
    assert parts[0].num_deleted_documents == 1
    parts[0].verify()


def test_incompatible_datastores_are_not_merged(datastore, tmp_path, tokenizer, monkeypatch):
    monkeypatch.undo()
    other = RetroDatastore.build(
        corpus(2),
        tmp_path / "other",
        tokenizer=tokenizer,
        embedder=make_encoder(tmp_path / "encoder", seed=4),
        **OPTIONS,
    )
    with pytest.raises(DatastoreMismatchError):
        RetroDatastore.merge([datastore, other], tmp_path / "merged")
    with pytest.raises(DatastoreInputError):
        RetroDatastore.merge([datastore, datastore.subset(tmp_path / "part", ids=["doc-3"])], tmp_path / "merged")
    with pytest.raises(DatastoreInputError):
        RetroDatastore.merge([datastore.path], tmp_path / "merged")
    with pytest.raises(DatastoreInputError):
        RetroDatastore.merge([], tmp_path / "merged")
    with pytest.raises(DatastoreExistsError):
        RetroDatastore.merge([datastore], tmp_path / "part")
    assert not (tmp_path / "merged").exists()


@pytest.mark.parametrize("vocab_size", [270, 800])
def test_retokenized_store_finds_the_same_chunks_in_other_tokens(datastore, tmp_path, vocab_size):
    """Chunks begin with the same text and neighbors are cut at the same documents, for finer and for coarser tokens."""
    other = make_tokenizer(vocab_size)
    again = datastore.retokenize(tmp_path / "again", other)
    ids = np.arange(datastore.num_chunks)
    np.testing.assert_array_equal(again.keys_of(ids), datastore.keys_of(ids))
    np.testing.assert_array_equal(again.document_of(ids), datastore.document_of(ids))
    queries = datastore.keys_of(ids)
    np.testing.assert_array_equal(again.search(queries, 4)[1], datastore.search(queries, 4)[1])
    again.check_compatible(tokenizer=other, chunk_size=8)
    old_texts = chunk_texts(datastore.tokenizer, *datastore.gather(ids))
    new_texts = chunk_texts(other, *again.gather(ids))
    for number, (old, new) in enumerate(zip(old_texts, new_texts, strict=True)):
        document = datastore.document(int(datastore.document_of(ids[number : number + 1])[0]))["text"]
        assert new in document and old in document
        # A token may begin before the chunk does, never after.
        place = document.index(old)
        assert any(new.startswith(document[start:place] + old[:3]) for start in range(max(0, place - 12), place + 1))
    first = datastore.first_chunks(np.arange(40))
    tokens, mask = again.gather(first)
    for number in range(40):
        expected = other(datastore.document(number)["text"])["input_ids"][:20]
        assert tokens[number][mask[number].astype(bool)].tolist() == expected
    again.verify()
    with pytest.raises(DatastoreMismatchError):
        again.check_compatible(tokenizer=datastore.tokenizer)


def test_retokenized_store_can_be_changed(datastore, tmp_path, tokenizer):
    """Back again it is the same stream; cut, joined and compacted it still says the same."""
    there = datastore.retokenize(tmp_path / "there", make_tokenizer(270))
    ids = np.arange(datastore.num_chunks)
    back = there.retokenize(tmp_path / "back", tokenizer)
    np.testing.assert_array_equal(back.gather(ids)[0][:, :8], datastore.gather(ids)[0][:, :8])
    there.delete(["doc-5"])
    expected = there.gather(ids)[0][datastore.document_of(ids) != 5]
    there.compact()
    np.testing.assert_array_equal(there.gather(np.arange(there.num_chunks))[0], expected)
    halves = [there.subset(tmp_path / str(n), ids=[f"doc-{k}" for k in range(n, 40, 2) if k != 5]) for n in (0, 1)]
    merged = RetroDatastore.merge(halves, tmp_path / "merged")
    for number in (0, 38):
        id = merged.document(number)["id"]
        one = merged.gather(merged.first_chunks(np.array([number])))[0]
        two = there.gather(there.first_chunks(np.array([there.document_number(id)])))[0]
        np.testing.assert_array_equal(one, two)
    merged.verify()


def test_any_text_survives_retokenization(tokenizer, embedder, tmp_path, monkeypatch):
    monkeypatch.undo()
    for module in ("build", "derive"):  # the encoder knows few of these words
        monkeypatch.setattr(f"retro_hf.datastore.{module}.check_coverage", lambda *_, **options: None)
    texts = [
        "\U0001f600\U0001f468\u200d\U0001f469 x",
        "\u05e9\u05dc\u05d5\u05dd " * 9,
        "a",
        "  two  spaces  ",
        "\u0301\u0302abc" * 5,
    ]
    store = RetroDatastore.from_texts(texts, tokenizer, embedder=embedder, chunk_size=3, neighbor_size=200)
    other = make_tokenizer(300)
    again = store.retokenize(tmp_path / "again", other)
    tokens, mask = again.gather(again.first_chunks(np.arange(len(texts))))
    assert chunk_texts(other, tokens, mask) == texts


@pytest.mark.parametrize("inside", [".", "new", "a/b"])
def test_store_cannot_be_written_inside_another(datastore, tmp_path, tokenizer, embedder, inside):
    """It would be taken for part of it, and go where that goes."""
    datastore.save(tmp_path / "store")
    store = RetroDatastore.load(tmp_path / "store")
    before = sorted(store.path.rglob("*"))
    target = store.path / inside
    for write in (
        lambda: store.save(target),
        lambda: store.subset(target, fraction=0.5),
        lambda: store.retokenize(target, make_tokenizer(300)),
        lambda: RetroDatastore.merge([store], target),
        lambda: RetroDatastore.build(["a text"], target, tokenizer=tokenizer, embedder=embedder),
    ):
        expected = DatastoreExistsError if inside == "." else DatastoreInputError
        with pytest.raises(expected):
            write()
    assert sorted(store.path.rglob("*")) == before and list(tmp_path.iterdir()) == [store.path]


@pytest.mark.parametrize("number", [errno.EACCES, errno.ENOSPC])
@pytest.mark.parametrize("refused", [["os.mkdir"], ["os.link", "shutil.copyfile"]])
def test_failed_write_is_reported_and_leaves_no_store(datastore, tmp_path, monkeypatch, number, refused):
    """Read-only, or full halfway: no store is there that isn't whole, and the same call makes it later."""

    def refuse(*_, **__):
        raise OSError(number, os.strerror(number))

    writes = (
        lambda path: datastore.save(path),
        lambda path: datastore.subset(path, fraction=0.5),
        lambda path: datastore.retokenize(path, make_tokenizer(300)),
        lambda path: RetroDatastore.merge([datastore], path),
    )
    for place, write in enumerate(writes):
        with monkeypatch.context() as patched:
            for name in refused:
                patched.setattr(name, refuse)
            with pytest.raises(DatastoreWriteError):
                write(tmp_path / str(place))
        assert not (tmp_path / str(place)).exists()
        write(tmp_path / str(place))
        RetroDatastore.load(tmp_path / str(place), verify=True)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["0", "1", "2", "3"]
