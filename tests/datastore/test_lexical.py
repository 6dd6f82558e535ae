"""BM25 over the chunks: exact, nothing hidden is found, in memory as from its folder, bound to its store."""

import json
import math
import pickle
import re
import shutil

import numpy as np
import pytest

from retro_hf.datastore import LexicalSearcher, RetroDatastore
from retro_hf.datastore.chunks import chunk_texts
from retro_hf.errors import (
    DatastoreCorruptError,
    DatastoreExistsError,
    DatastoreInputError,
    DatastoreMismatchError,
    DatastoreNotFoundError,
)

from .fixtures import corpus, sentence


@pytest.fixture(scope="module")
def queries() -> list[str]:
    generator = np.random.default_rng(11)
    return [sentence(generator, 6) for _ in range(20)]


@pytest.fixture
def own_store(built, tmp_path) -> RetroDatastore:
    """A copy that a test may change."""
    shutil.copytree(built, tmp_path / "store")
    return RetroDatastore.load(tmp_path / "store")


def bm25_by_hand(texts: list[str], query: str, k1: float = 1.5, b: float = 0.75) -> np.ndarray:
    """BM25 as Lucene defines it."""
    split = re.compile(r"\b\w\w+\b").findall
    documents = [split(text.lower()) for text in texts]
    average = sum(map(len, documents)) / len(documents)
    scores = np.zeros(len(documents))
    for word in split(query.lower()):
        frequency = sum(word in document for document in documents)
        idf = math.log(1 + (len(documents) - frequency + 0.5) / (frequency + 0.5))
        for place, document in enumerate(documents):
            count = document.count(word)
            scores[place] += idf * count / (count + k1 * (1 - b + b * len(document) / average)) if count else 0
    return scores


def texts_of(store: RetroDatastore) -> list[str]:
    tokens, mask = store.gather(np.arange(store.num_chunks))
    return chunk_texts(store.tokenizer, tokens[:, : store.chunk_size], mask[:, : store.chunk_size])


def test_it_finds_what_bm25_by_hand_finds(datastore, queries):
    texts = texts_of(datastore)
    scores, ids = LexicalSearcher.build(datastore).search(queries, 5)
    assert scores.dtype == np.float32 and ids.dtype == np.int64 and ids.shape == (20, 5)
    for row, query in enumerate(queries):
        expected = bm25_by_hand(texts, query)
        best = np.argsort(-expected, kind="stable")[:5]
        np.testing.assert_allclose(scores[row], expected[best], rtol=1e-5)
        np.testing.assert_allclose(expected[ids[row]], expected[best], rtol=1e-5)


def test_a_chunk_without_a_common_word_is_no_neighbor(datastore):
    searcher = LexicalSearcher.build(datastore)
    for query in ("", "zzz qqq", "!"):
        scores, ids = searcher.search([query], 3)
        assert (ids == -1).all() and np.isneginf(scores).all()
    scores, ids = searcher.search(["lighthouse"], datastore.num_chunks + 5)
    found = ids[0][ids[0] >= 0]
    assert sorted(found) == [place for place, text in enumerate(texts_of(datastore)) if "lighthouse" in text]
    assert searcher.search([], 3)[1].shape == (0, 3)


def test_excluded_and_deleted_documents_are_not_found_and_the_rest_is_exact(own_store, queries):
    searcher = LexicalSearcher.build(own_store)
    own_store.delete(["doc-3", "doc-17"])
    owners = own_store.document_of(np.arange(own_store.num_chunks))
    excluded = np.random.default_rng(0).integers(-1, 40, size=(len(queries), 3))
    everything, ids = searcher.search(queries, 8, exclude_documents=excluded)
    assert not set(own_store.document_of(ids).flatten()) & {3, 17}
    for row in range(len(queries)):
        scores = searcher._bm25.get_scores([*re.findall(r"\w\w+", queries[row].lower())])
        scores[np.isin(owners, [3, 17, *excluded[row]])] = 0
        best = np.sort(scores)[::-1][:8]
        np.testing.assert_allclose(everything[row], np.where(best > 0, best, -np.inf), rtol=1e-6)


def test_wrong_exclusions_and_numbers_are_refused(datastore):
    searcher = LexicalSearcher.build(datastore)
    with pytest.raises(DatastoreInputError, match="exclude_documents runs from 0 to 99"):
        searcher.search(["king", "queen"], 2, exclude_documents=[0, 99])
    with pytest.raises(DatastoreInputError, match="num_neighbors is 0"):
        searcher.search(["king"], 0)


def test_from_its_folder_and_after_pickling_it_finds_the_same(datastore, queries, tmp_path):
    memory = LexicalSearcher.build(datastore)
    expected = memory.search(queries, 4)
    kept = LexicalSearcher.build(datastore, tmp_path / "words")
    assert isinstance(kept._bm25.scores["data"], np.memmap)
    assert len(pickle.dumps(kept)) < 10_000
    for other in (
        kept,
        LexicalSearcher.load(datastore, tmp_path / "words"),
        *pickle.loads(pickle.dumps([memory, kept])),
    ):
        for found, wanted in zip(other.search(queries, 4), expected, strict=True):
            np.testing.assert_array_equal(found, wanted)
    with pytest.raises(DatastoreExistsError):
        LexicalSearcher.build(datastore, tmp_path / "words")


def test_it_is_refused_for_other_chunks_with_the_remedy(own_store, embedder, tmp_path):
    searcher = LexicalSearcher.build(own_store, tmp_path / "words")
    own_store.append([{"id": "new", "text": "moon"}], embedder=embedder)
    with pytest.raises(DatastoreMismatchError, match="other chunks.*Build it again"):
        searcher.search(["king"], 2)
    with pytest.raises(DatastoreMismatchError, match="other chunks.*Build it again"):
        LexicalSearcher.load(own_store, tmp_path / "words")
    again = LexicalSearcher.build(own_store)
    assert own_store.document(int(own_store.document_of(again.search(["moon"], 1)[1][0, 0])))["id"] == "new"


def test_a_missing_or_damaged_index_of_words_is_told(datastore, tmp_path):
    with pytest.raises(DatastoreNotFoundError, match="LexicalSearcher.build"):
        LexicalSearcher.load(datastore, tmp_path / "nowhere")
    LexicalSearcher.build(datastore, tmp_path / "words")
    for name, content in (
        ("lexical.json", b"{}"),
        ("params.index.json", b"[]"),
        ("vocab.index.json", json.dumps({"king": 0}).encode()),
        ("data.csc.index.npy", b"short"),
    ):
        before = (tmp_path / "words" / name).read_bytes()
        (tmp_path / "words" / name).write_bytes(content)
        with pytest.raises(DatastoreCorruptError, match="Build it again"):
            LexicalSearcher.load(datastore, tmp_path / "words")
        (tmp_path / "words" / name).write_bytes(before)
    LexicalSearcher.load(datastore, tmp_path / "words")


def test_a_store_without_words_is_refused(tokenizer, embedder):
    store = RetroDatastore.from_texts(["! ? ."], tokenizer, embedder=embedder, chunk_size=8, neighbor_size=16)
    with pytest.raises(DatastoreInputError, match=r"No chunk of .* \(1 chunk\) has a word"):
        LexicalSearcher.build(store)


def test_several_shards_have_one_numbering(tokenizer, embedder, queries, datastore):
    many = RetroDatastore.from_texts(
        corpus(), tokenizer, embedder=embedder, chunk_size=8, neighbor_size=20, shard_chunks=100
    )
    np.testing.assert_array_equal(
        LexicalSearcher.build(many).search(queries, 3)[1], LexicalSearcher.build(datastore).search(queries, 3)[1]
    )
