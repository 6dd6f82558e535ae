"""Passages looked up by question: what they hold, that none comes twice, and which searcher may find them."""

import numpy as np
import pytest
from datasets import Dataset

from retro_hf import RetroRetriever
from retro_hf.datastore import LexicalSearcher, RetroDatastore, chunk_texts
from retro_hf.errors import DatasetError
from retro_hf.passages import find_passages
from retro_hf.training import retrieve_passages


WORDS = "one two three four five six seven eight nine ten eleven twelve".split()


class Fixed:
    """A searcher that finds the same chunks for every text, in order."""

    metric = "fixed"

    def __init__(self, *chunk_ids: int) -> None:
        self.chunk_ids = chunk_ids
        self.texts: list[str] = []

    def search(self, texts, num_neighbors, *, exclude_documents=None):
        self.texts += texts
        ids = np.full((len(texts), num_neighbors), -1, dtype=np.int64)
        ids[:, : len(self.chunk_ids)] = self.chunk_ids[:num_neighbors]
        return np.zeros(ids.shape, dtype=np.float32), ids


@pytest.fixture(scope="module")
def store(world, tmp_path_factory) -> RetroDatastore:
    """Three documents of 4, 2 and 1 chunks of 8 tokens; neighbors of 16."""
    words = [word for word in WORDS if len(world.tokenizer.encode(f" {word}")) == 1]
    draw = np.random.default_rng(0)
    documents = [
        {
            "id": str(chunks),
            "title": f"T{chunks}",
            "text": "".join(f" {word}" for word in draw.choice(words, 8 * chunks)),
        }
        for chunks in (4, 2, 1)
    ]
    store = RetroDatastore.build(
        documents,
        tmp_path_factory.mktemp("passages") / "store",
        tokenizer=world.tokenizer,
        embedder=world.embedder,
        chunk_size=8,
        neighbor_size=16,
    )
    assert store.first_chunks(np.arange(4)).tolist() == [0, 4, 6, 7]
    return store


def found(store, *chunk_ids: int, num_passages: int = 3) -> list[tuple[str, int]]:
    """Title and number of words of each passage."""
    retriever = RetroRetriever(store, searcher=Fixed(*chunk_ids))
    (row,) = retrieve_passages(Dataset.from_list([{"question": "which"}]), retriever, num_passages=num_passages)
    return [(passage["title"], len(passage["text"].split())) for passage in row["passages"]]


def test_passage_is_as_long_as_its_document_allows(store):
    """The chunk and its continuation; the last chunk of a document with the one before it; a short document whole."""
    assert found(store, 0) == found(store, 2) == found(store, 3) == [("T4", 16)]
    assert found(store, 4) == found(store, 5) == [("T2", 16)]
    assert found(store, 6) == [("T1", 8)]


def test_passages_of_a_question_do_not_overlap(store):
    """The next best comes instead, from twice as many as wanted."""
    assert found(store, 5, 4, 6) == [("T2", 16), ("T1", 8)]
    assert found(store, 1, 2, 0, 6) == [("T4", 16), ("T4", 16), ("T1", 8)]
    assert found(store, 0, 1, 4, 5, num_passages=2) == [("T4", 16), ("T2", 16)]
    assert found(store, 0, 1, 4, 5, num_passages=1) == [("T4", 16)]
    assert found(store) == []


def test_passage_begins_with_a_whole_word(world, tmp_path):
    """Chunks end where tokens end, also inside a number; what a model reads must not begin with half of it."""
    text = "The number of the first house is 64011 and that of the second is 98765. " * 4
    store = RetroDatastore.build(
        [{"id": "a", "text": text}, {"id": "b", "text": text[::-1]}],
        tmp_path / "store",
        tokenizer=world.tokenizer,
        embedder=world.embedder,
        chunk_size=8,
        neighbor_size=16,
    )
    begins = [parts[0] for parts in store.texts_of(np.arange(store.num_chunks))]
    inside = [
        chunk for chunk in range(1, store.num_chunks) if begins[chunk][0].isalnum() and begins[chunk - 1][-1].isalnum()
    ]
    assert len(inside) > 4
    for chunk in range(store.num_chunks):
        ((passage,),) = find_passages(RetroRetriever(store, searcher=Fixed(chunk)), ["which"], 1)
        whole = text if passage.document_id == "a" else text[::-1]
        assert passage.text in whole and len(passage.text) >= 8
        place = whole.index(passage.text)
        assert place == 0 or not (whole[place - 1].isalnum() and passage.text[0].isalnum())


def test_number_of_passages_is_that_of_the_error(store):
    retriever = RetroRetriever(store, searcher=Fixed(0))
    assert len(find_passages(retriever, ["which"], store.num_chunks)[0]) == 1
    with pytest.raises(ValueError, match="100,000"):
        find_passages(retriever, ["which"], 100_000)


def test_document_after_a_short_one_is_a_passage_of_its_own(world, tmp_path):
    """A passage of 16 tokens that begins in a document of one chunk would reach into the next document; it ends before."""
    documents = [{"id": name, "title": name, "text": f" {name}"} for name in WORDS[:3]]
    store = RetroDatastore.build(
        documents,
        tmp_path / "store",
        tokenizer=world.tokenizer,
        embedder=world.embedder,
        chunk_size=8,
        neighbor_size=16,
    )
    assert found(store, 0, 1, 2) == [("one", 1), ("two", 1), ("three", 1)]
    assert found(store, 1, 2, 0, num_passages=2) == [("two", 1), ("three", 1)]


def test_questions_find_their_documents(world):
    """By embeddings and by words; order is that of the search, and rows keep their other columns."""
    numbers = [3, 11, 25]
    first = world.datastore.first_chunks(np.array(numbers))
    texts = chunk_texts(world.tokenizer, world.datastore.gather(first)[0][:, :8])
    rows = [{"question": text, "answers": ["x"], "id": number} for number, text in zip(numbers, texts, strict=True)]
    lexical = RetroRetriever(world.datastore, searcher=LexicalSearcher.build(world.datastore, show_progress=False))
    for retriever in (world.retriever, lexical):
        made = retrieve_passages(Dataset.from_list(rows), retriever, num_passages=4, batch_size=2)
        assert made["id"] == numbers and made.column_names == ["question", "answers", "id", "passages"]
        for row in made:
            assert len(row["passages"]) == 4
            titles = [passage["title"] for passage in row["passages"]]
            assert world.datastore.document(row["id"])["title"] in titles
            assert all(
                passage["text"] in world.datastore.document(int(passage["title"][6:]))["text"]
                for passage in row["passages"]
            )


def test_question_is_looked_up_with_single_spaces(store):
    """With single white space, and readable whatever it holds."""
    searcher = Fixed(0)
    retriever = RetroRetriever(store, searcher=searcher)
    retrieve_passages(Dataset.from_list([{"question": " which\n river "}]), retriever, num_passages=1)
    assert searcher.texts == ["which river"]


def test_input_that_cannot_be_looked_up_is_an_error(world):
    """Empty questions by row; a datastore alone."""
    rows = Dataset.from_list([{"question": "which"}, {"question": ""}])
    with pytest.raises(DatasetError, match="row 1"):
        retrieve_passages(rows, world.retriever)
    with pytest.raises(DatasetError):
        retrieve_passages(rows.rename_column("question", "query"), world.retriever)
    with pytest.raises(DatasetError):
        retrieve_passages(rows, world.datastore)
    with pytest.raises(ValueError):
        retrieve_passages(rows, world.retriever, num_passages=0)


def test_existing_passages_are_not_overwritten(world):
    """The remedy is in the message."""
    rows = Dataset.from_list([{"question": "which", "passages": ["the river"]}])
    with pytest.raises(DatasetError):
        retrieve_passages(rows, world.retriever)
