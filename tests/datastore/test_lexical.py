"""BM25 over the chunks: exact, nothing hidden is found, in memory as from its folder, bound to its store."""

import hashlib
import json
import math
import os
import pickle
import re
import shutil

import numpy as np
import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

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


def test_lexical_search_equals_bm25_by_hand(datastore, queries):
    texts = texts_of(datastore)
    scores, ids = LexicalSearcher.build(datastore).search(queries, 5)
    assert scores.dtype == np.float32 and ids.dtype == np.int64 and ids.shape == (20, 5)
    for row, query in enumerate(queries):
        expected = bm25_by_hand(texts, query)
        best = np.argsort(-expected, kind="stable")[:5]
        np.testing.assert_allclose(scores[row], expected[best], rtol=1e-5)
        np.testing.assert_allclose(expected[ids[row]], expected[best], rtol=1e-5)


def test_chunk_without_a_common_word_is_not_a_neighbor(datastore):
    searcher = LexicalSearcher.build(datastore)
    for query in ("", "zzz qqq", "!"):
        scores, ids = searcher.search([query], 3)
        assert (ids == -1).all() and np.isneginf(scores).all()
    scores, ids = searcher.search(["lighthouse"], datastore.num_chunks + 5)
    found = ids[0][ids[0] >= 0]
    assert sorted(found) == [place for place, text in enumerate(texts_of(datastore)) if "lighthouse" in text]
    assert searcher.search([], 3)[1].shape == (0, 3)


def test_lexical_search_skips_excluded_and_deleted_documents(own_store, queries):
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
    with pytest.raises(DatastoreInputError):
        searcher.search(["king", "queen"], 2, exclude_documents=[0, 99])
    with pytest.raises(DatastoreInputError):
        searcher.search(["king"], 0)


def test_saved_and_pickled_lexical_index_finds_the_same(datastore, queries, tmp_path):
    memory = LexicalSearcher.build(datastore)
    expected = memory.search(queries, 4)
    kept = LexicalSearcher.build(datastore, tmp_path / "words")
    assert not kept._bm25.scores["data"].flags.owndata  # mapped
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


def test_lexical_index_of_other_chunks_is_refused(own_store, embedder, tmp_path):
    searcher = LexicalSearcher.build(own_store, tmp_path / "words")
    own_store.append([{"id": "new", "text": "moon"}], embedder=embedder)
    with pytest.raises(DatastoreMismatchError):
        searcher.search(["king"], 2)
    with pytest.raises(DatastoreMismatchError):
        LexicalSearcher.load(own_store, tmp_path / "words")
    again = LexicalSearcher.build(own_store)
    assert own_store.document(int(own_store.document_of(again.search(["moon"], 1)[1][0, 0])))["id"] == "new"


def test_missing_or_damaged_lexical_index_is_reported(datastore, tmp_path):
    with pytest.raises(DatastoreNotFoundError):
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
        with pytest.raises(DatastoreCorruptError):
            LexicalSearcher.load(datastore, tmp_path / "words")
        (tmp_path / "words" / name).write_bytes(before)
    LexicalSearcher.load(datastore, tmp_path / "words")


DATA, INDICES, INDPTR = (f"{name}.csc.index.npy" for name in ("data", "indices", "indptr"))


def damage_by(change):
    """Change the description of the files, `lexical.json`."""

    def damage(folder):
        content = json.loads((folder / "lexical.json").read_text())
        change(content)
        (folder / "lexical.json").write_text(json.dumps(content))

    return damage


def forge(name, make):
    """Replace a file, and what is said of it, by another: all sums are right, and the content is not."""

    def damage(folder):
        make(folder / name)
        digest = hashlib.sha256((folder / name).read_bytes()).hexdigest()
        entry = {"size": (folder / name).stat().st_size, "sha256": digest}
        damage_by(lambda content: content["files"].update({name: entry}))(folder)

    return damage


DAMAGE = {
    "file cut short": lambda folder: os.truncate(folder / DATA, 200),
    "file grown": lambda folder: (folder / INDICES).open("ab").write(b"1234"),
    "file missing": lambda folder: (folder / INDPTR).unlink(),
    "files swapped": lambda folder: (folder / DATA).rename(folder / "x") and (folder / INDICES).rename(folder / DATA),
    "word changed": lambda folder: flip(folder / "vocab.index.json", 3),
    "setting changed": lambda folder: flip(folder / "params.index.json", 10),
    "description of text": lambda folder: (folder / "lexical.json").write_text('"words"'),
    "description without end": lambda folder: (folder / "lexical.json").write_text("[" * 100_000),
    "description huge": lambda folder: os.truncate(folder / "lexical.json", 17 << 20),
    "words negative": damage_by(lambda content: content.update(num_words=-1)),
    "words true": damage_by(lambda content: content.update(num_words=True)),
    "words huge": damage_by(lambda content: content.update(num_words=1 << 60)),
    "entries of text": damage_by(lambda content: content.update(num_entries="many")),
    "fewer entries": damage_by(lambda content: content.update(num_entries=content["num_entries"] - 1)),
    "unknown field": damage_by(lambda content: content.update(code="import os")),
    "unknown file": damage_by(lambda content: content["files"].update({"../../x": {"size": 1, "sha256": ""}})),
    "files a list": damage_by(lambda content: content.update(files=[1])),
    "entry a number": damage_by(lambda content: content["files"].update({DATA: 3})),
    "pickle": forge(DATA, lambda path: path.write_bytes(pickle.dumps([1.0]))),
    "array of objects": forge(DATA, lambda path: np.save(path, np.array([None, {}], dtype=object))),
    "array of another type": forge(INDICES, lambda path: np.save(path, np.load(path).astype(np.int64))),
    "lists backwards": forge(INDPTR, lambda path: np.save(path, np.load(path)[::-1])),
    "a list before the first": forge(INDPTR, lambda path: np.save(path, np.r_[0, -5, np.load(path)[2:]])),
    "a word beyond the last": forge("vocab.index.json", lambda path: path.write_text('{"king": 99999999}')),
    "words of lists": forge("vocab.index.json", lambda path: path.write_text("[[0]]")),
    "settings unknown": forge("params.index.json", lambda path: path.write_text('{"num_docs": 3, "code": "x"}')),
    "settings a list": forge("params.index.json", lambda path: path.write_text("[]")),
    "other number of chunks": forge(
        "params.index.json", lambda path: path.write_text(path.read_text().replace('"num_docs": ', '"num_docs": 1'))
    ),
}


def flip(path, place: int) -> None:
    content = bytearray(path.read_bytes())
    content[place] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize("kind", DAMAGE)
def test_damaged_lexical_files_are_refused_when_opened(datastore, tmp_path, kind):
    LexicalSearcher.build(datastore, tmp_path / "words")
    DAMAGE[kind](tmp_path / "words")
    with pytest.raises(DatastoreCorruptError):
        LexicalSearcher.load(datastore, tmp_path / "words")


@pytest.mark.parametrize("name", [DATA, INDICES, INDPTR, "vocab.index.json", "params.index.json"])
def test_verify_finds_a_flipped_bit_in_every_file(datastore, tmp_path, name):
    searcher = LexicalSearcher.build(datastore, tmp_path / "words")
    searcher.verify()
    LexicalSearcher.load(datastore, tmp_path / "words", verify=True)
    flip(tmp_path / "words" / name, (tmp_path / "words" / name).stat().st_size - 3)
    with pytest.raises(DatastoreCorruptError):
        searcher.verify()
    with pytest.raises(DatastoreCorruptError):
        LexicalSearcher.load(datastore, tmp_path / "words", verify=True)


def test_lexical_lists_with_unknown_chunks_are_refused(datastore, queries, tmp_path):
    """Damage in the mapped lists that only a search sees."""
    LexicalSearcher.build(datastore, tmp_path / "words")
    places = np.load(tmp_path / "words" / INDICES)
    np.save(tmp_path / "words" / INDICES, np.full_like(places, 1 << 30))
    searcher = LexicalSearcher.load(datastore, tmp_path / "words")
    with pytest.raises(DatastoreCorruptError):
        searcher.search(queries, 2)


def test_store_without_words_is_refused(tokenizer, embedder):
    store = RetroDatastore.from_texts(["! ? ."], tokenizer, embedder=embedder, chunk_size=8, neighbor_size=16)
    with pytest.raises(DatastoreInputError):
        LexicalSearcher.build(store)


def test_lexical_search_numbers_chunks_across_shards(tokenizer, embedder, queries, datastore):
    many = RetroDatastore.from_texts(
        corpus(), tokenizer, embedder=embedder, chunk_size=8, neighbor_size=20, shard_chunks=100
    )
    np.testing.assert_array_equal(
        LexicalSearcher.build(many).search(queries, 3)[1], LexicalSearcher.build(datastore).search(queries, 3)[1]
    )


@pytest.mark.parametrize(
    ("query", "found"),
    [
        ("图书馆", "zh"),
        ("图书馆几点开门", "zh"),
        ("门", "zh"),
        ("市长", "zh2"),
        ("としょかん", "ja"),
        ("ﾎﾃﾙ", "ja"),
        ("ห้องสมุด", "th"),
        ("도서관", "ko"),
        ("पुस्तकालय", "hi"),
        ("LIBRARY", "en"),
        ("ｌｉｂｒａｒｙ", "en"),
    ],
)
def test_words_of_every_script_are_found(query, found, scripts):
    """Also of those that put no space between words, and with letters that consist of several characters."""
    ids = scripts.search([query], 1)[1]
    assert scripts.datastore.document(int(scripts.datastore.document_of(ids)[0, 0]))["id"] == found


@pytest.fixture(scope="module")
def scripts(embedder) -> LexicalSearcher:
    """An index over one document for each script, as bytes for a tokenizer without these letters."""
    texts = {
        "zh": "图书馆每天早上九点开门。",
        "zh2": "市长住在大教堂附近。",
        "ja": "としょかんはホテルのとなりです。",
        "th": "ห้องสมุดเปิดเก้าโมงเช้า",
        "ko": "도서관은 아홉 시에 열린다.",
        "hi": "पुस्तकालय नौ बजे खुलता है।",
        "en": "The library opens at nine.",
    }
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokens = Tokenizer(models.BPE({letter: number for number, letter in enumerate(sorted(alphabet))}, []))
    tokens.pre_tokenizer, tokens.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    rows = [{"id": id, "text": text} for id, text in texts.items()]
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=tokens)
    store = RetroDatastore.from_texts(rows, tokenizer, embedder=embedder, chunk_size=128)
    return LexicalSearcher.build(store)


def test_index_of_before_keeps_its_words(own_store, tmp_path):
    """Another rule would look for words that it does not have."""
    LexicalSearcher.build(own_store, tmp_path / "words")
    path = tmp_path / "words" / "lexical.json"
    content = json.loads(path.read_text())
    assert content.pop("words") == 2
    path.write_text(json.dumps(content))
    old, new = LexicalSearcher.load(own_store, tmp_path / "words"), LexicalSearcher.build(own_store)
    assert old.words(["图书馆 opens"]) == [["图书馆", "opens"]] != new.words(["图书馆 opens"])
    assert pickle.loads(pickle.dumps(old)).words(["图书馆"]) == [["图书馆"]]
    np.testing.assert_array_equal(old.search(["the king"], 3)[1], new.search(["the king"], 3)[1])
    path.write_text(json.dumps(content | {"words": 3}))
    with pytest.raises(DatastoreCorruptError):
        LexicalSearcher.load(own_store, tmp_path / "words")
