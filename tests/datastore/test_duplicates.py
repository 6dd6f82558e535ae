"""Near-duplicates: those that exact Jaccard similarity finds, whatever their length, tokens or shard."""

import shutil

import numpy as np
import pytest

from retro_hf.datastore import RetroDatastore, near_duplicates
from retro_hf.datastore.duplicates import _bands, _jaccard, document_tokens, shingles_of
from retro_hf.errors import DatastoreInputError

from .fixtures import WORDS, corpus, make_tokenizer, sentence


def grams(tokens, size: int) -> set:
    """N-grams by definition; a shorter document is one of its own."""
    return {tuple(tokens[place : place + size]) for place in range(max(1, len(tokens) - size + 1))}


def similarity(first: set, second: set) -> float:
    return len(first & second) / len(first | second)


@pytest.fixture(scope="module")
def long_texts() -> list[str]:
    generator = np.random.default_rng(4)
    return [sentence(generator, 400) for _ in range(30)]


@pytest.fixture(scope="module")
def planted(long_texts) -> list[str]:
    """Copies with 0 to 9 words changed, whose similarities spread around the threshold."""
    generator = np.random.default_rng(5)
    texts = []
    for number, text in enumerate(long_texts):
        words = text.split()
        for place in generator.choice(400, size=number % 10, replace=False):
            words[place] = str(generator.choice(WORDS))
        texts.append(" ".join(words))
    return texts


@pytest.fixture(scope="module")
def long_store(long_texts, tokenizer, embedder) -> RetroDatastore:
    return RetroDatastore.from_texts(long_texts, tokenizer, embedder=embedder)


@pytest.mark.parametrize(("threshold", "least", "most"), [(0.3, 30, 30), (0.8, 10, 25), (1.0, 3, 5)])
def test_found_duplicates_are_those_of_exact_jaccard_similarity(
    long_store, long_texts, planted, threshold, least, most
):
    tokenizer = long_store.tokenizer
    stored = [grams(tokenizer(text)["input_ids"], 13) for text in long_texts]
    expected = [
        [str(other) for other, members in enumerate(stored) if similarity(mine, members) >= threshold]
        for mine in (grams(tokenizer(text)["input_ids"], 13) for text in planted)
    ]
    assert least <= sum(map(len, expected)) <= most
    assert near_duplicates(planted, long_store, threshold=threshold) == expected


def test_hashed_sets_have_the_exact_similarity():
    generator = np.random.default_rng(0)
    documents = [generator.integers(3, size=int(size)) for size in generator.integers(1, 60, size=40)]
    for ngram in (1, 4, 13):
        hashed, exact = shingles_of(documents, ngram), [grams(tokens.tolist(), ngram) for tokens in documents]
        for row in range(40):
            assert len(hashed[row]) == len(exact[row]) and hashed[row].dtype == np.uint32
            assert _jaccard(hashed[0], hashed[row]) == similarity(exact[0], exact[row])


def test_documents_shorter_than_an_ngram_are_compared_as_a_whole(tokenizer, embedder):
    stored = [{"id": "a", "text": "the king"}, {"id": "b", "text": "the king sings"}, {"id": "c", "text": "the king"}]
    store = RetroDatastore.from_texts(stored, tokenizer, embedder=embedder, chunk_size=8, neighbor_size=16)
    assert near_duplicates(["the king", "the", "", "the king sings"], store) == [["a", "c"], [], [], ["b"]]
    assert near_duplicates([], store) == []


def test_token_ids_give_the_same_duplicates_as_texts(long_store, planted):
    ids = [long_store.tokenizer(text)["input_ids"] for text in planted]
    mixed = [*ids[:3], *planted[3:6], np.array(ids[6])]
    assert near_duplicates(mixed, long_store) == near_duplicates(planted[:7], long_store)


def test_duplicates_in_shards_with_deletions_and_other_tokenizers(tokenizer, embedder, tmp_path):
    store = RetroDatastore.build(
        corpus(),
        tmp_path / "s",
        tokenizer=tokenizer,
        embedder=embedder,
        chunk_size=8,
        neighbor_size=16,
        shard_chunks=100,
    )
    texts = [document["text"] for document in corpus()]
    assert near_duplicates(texts, store) == [[document["id"]] for document in corpus()]
    numbers = np.array([39, 0, 17, 39])
    for number, tokens in zip(numbers, document_tokens(store, numbers), strict=True):
        assert tokens.tolist() == tokenizer(texts[number])["input_ids"]
    other = make_tokenizer(vocab_size=380)
    again = store.retokenize(tmp_path / "other", other)
    assert document_tokens(again, numbers)[0].tolist() == other(texts[39])["input_ids"]
    assert near_duplicates(texts[5:9], again) == [["doc-5"], ["doc-6"], ["doc-7"], ["doc-8"]]
    store.delete(["doc-6"])
    assert near_duplicates(texts[5:8], store) == [["doc-5"], [], ["doc-7"]]
    shutil.rmtree(tmp_path / "s")


def test_bands_miss_few_pairs_at_the_threshold():
    assert _bands(0.8) == (25, 5) and _bands(1.0) == (2, 64)
    for threshold in (0.1, 0.5, 0.8, 0.95):
        number, width = _bands(threshold)
        assert number * width <= 128 and (number == 128 or (1 - threshold**width) ** number <= 1e-3)


def test_long_document_is_hashed_in_batches(datastore):
    """Its shingles are permuted in batches; here more than one."""
    generator = np.random.default_rng(2)
    text = sentence(generator, 6000)
    assert near_duplicates([text], datastore) == [[]]


@pytest.mark.parametrize("threshold", [0, 1.1])
def test_threshold_out_of_range_is_refused(datastore, threshold):
    with pytest.raises(DatastoreInputError):
        near_duplicates(["the king"], datastore, threshold=threshold)
