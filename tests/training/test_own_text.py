"""A chunk never reads itself: the text says which document it is, where ids do not."""

import logging

import numpy as np
import pytest
from datasets import Dataset
from datastore.fixtures import corpus

from retro_hf import RetroRetriever
from retro_hf.datastore import LexicalSearcher, RetroDatastore
from retro_hf.training import RetroDataCollator, precompute_neighbors, tokenize_documents
from retro_hf.training.own_text import Text


SIZE = 8


def with_ids(ids):
    return Dataset.from_list([{**one, "id": id} for one, id in zip(corpus(), ids, strict=True)])


def windows_of(dataset, world):
    return tokenize_documents(dataset, world.tokenizer, max_length=32, chunk_size=SIZE)


def own_documents(dataset, world):
    """For each row the neighbors that are from the document with the same text."""
    shares = []
    texts = [world.datastore.document(number)["text"] for number in range(world.datastore.num_documents)]
    for row in dataset:
        text = world.tokenizer.decode(row["input_ids"])
        found = world.datastore.document_of(np.array(row["neighbor_chunk_ids"], dtype=np.int64).reshape(-1))
        shares += [text in texts[number] for number in found if number >= 0]
    return sum(shares)


@pytest.mark.parametrize(
    "ids",
    [
        [f"corpus.jsonl:{number}" for number in range(1, 41)],
        [str(number) for number in range(40)],
        [None if number % 2 else f"doc-{number}" for number in range(40)],
    ],
    ids=["lines of a file", "row numbers", "partly missing"],
)
def test_a_document_with_another_id_is_known_by_its_text(world, ids):
    """As with the right ids: nothing comes from the document itself."""
    expected = world.dataset
    found = precompute_neighbors(windows_of(with_ids(ids), world), world.retriever)
    assert found["neighbor_chunk_ids"] == expected["neighbor_chunk_ids"]
    assert own_documents(found, world) == 0
    # In a live collator, too.
    rows = [{k: v for k, v in row.items() if not k.startswith("neighbor")} for row in found.select(range(12))]
    live = RetroDataCollator(world.tokenizer, world.retriever)(rows)
    kept = RetroDataCollator(world.tokenizer, world.datastore)(list(found.select(range(12))))
    assert (live["neighbor_input_ids"] == kept["neighbor_input_ids"]).all()


def test_without_a_column_of_ids_nothing_comes_from_the_text_itself(world):
    windows = world.windows.remove_columns(["document_id"])
    assert own_documents(precompute_neighbors(windows, world.retriever), world) == 0
    words = RetroRetriever(world.datastore, searcher=LexicalSearcher.build(world.datastore))
    assert own_documents(precompute_neighbors(windows, words), world) == 0


def test_rows_that_are_parts_of_one_stored_document(world):
    """A file that is one document in the datastore, and a row per paragraph in the training set: no row reads itself."""
    texts = [one["text"] for one in corpus(12)]
    store = RetroDatastore.from_texts(
        ["\n\n".join(texts)], world.tokenizer, embedder=world.embedder, chunk_size=SIZE, neighbor_size=2 * SIZE
    )
    windows = windows_of(Dataset.from_dict({"text": texts}), world)
    for row in precompute_neighbors(windows, RetroRetriever(store, embedder=world.embedder)):
        ids = np.array(row["neighbor_chunk_ids"], dtype=np.int64).reshape(-1, 2)
        text = Text.of_windows(np.array(row["input_ids"]), np.array([len(row["input_ids"])]), SIZE)
        tokens, mask = store.gather(ids)
        assert not text.contained(np.arange(len(ids)), np.where(mask == 0, -1, tokens)).any()


def test_a_corpus_of_one_document_is_told(world, caplog):
    """The datastore and the training set are the same single document: there is nothing to read, and a warning."""
    text = "\n\n".join(one["text"] for one in corpus(12))
    store = RetroDatastore.from_texts(
        [text], world.tokenizer, embedder=world.embedder, chunk_size=SIZE, neighbor_size=2 * SIZE
    )
    for id in ("0", "corpus.txt"):
        caplog.clear()
        windows = windows_of(Dataset.from_list([{"id": id, "text": text}]), world)
        found = precompute_neighbors(windows, RetroRetriever(store, embedder=world.embedder))
        assert own_documents(found, world) == 0
        assert "have no neighbor" in caplog.text


def test_a_copy_under_another_id_is_left_out_and_counted(world, caplog):
    """The same text as another document of the datastore: equal to the chunk and its continuation."""
    documents = corpus(10)
    documents += [{**documents[3], "id": "copy"}]
    store = RetroDatastore.from_texts(
        documents, world.tokenizer, embedder=world.embedder, chunk_size=SIZE, neighbor_size=2 * SIZE
    )
    caplog.set_level(logging.INFO, logger="retro_hf")
    windows = windows_of(Dataset.from_list(corpus(10)), world)
    found = precompute_neighbors(windows, RetroRetriever(store, embedder=world.embedder))
    copy = store.document_number("copy")
    for row in found:
        if row["document_id"] != "doc-3":
            continue
        text = Text.of_windows(np.array(row["input_ids"]), np.array([len(row["input_ids"])]), SIZE)
        ids = np.array(row["neighbor_chunk_ids"], dtype=np.int64)
        tokens, mask = store.gather(ids)
        assert not text.equal(np.arange(len(ids)), np.where(mask == 0, -1, tokens)).any()
    assert copy >= 0 and "the text itself" in caplog.text


def test_share_of_chunks_without_neighbors_is_told(world, caplog):
    """Loudly where it is large, quietly where it is small."""
    caplog.set_level(logging.INFO, logger="retro_hf")
    precompute_neighbors(world.windows, world.retriever)
    quiet = [one for one in caplog.records if "have no neighbor" in one.getMessage()]
    assert [one.levelno for one in quiet] == [logging.INFO]
    caplog.clear()
    world.retriever.min_score = 2.0
    try:
        found = precompute_neighbors(world.windows, world.retriever)
    finally:
        world.retriever.min_score = None
    assert max(id for row in found["neighbor_chunk_ids"] for ids in row for id in ids) == -1
    assert [one.levelno for one in caplog.records if "100%" in one.getMessage()] == [logging.WARNING]


def test_equal_and_contained():
    """Equal: the chunk and what follows, as far as both go. Contained: a chunk's worth with its continuation, anywhere."""
    text = Text.of_windows(np.arange(100, 124), np.array([24]), SIZE)
    rows = np.zeros(1, dtype=np.int64)
    itself = np.arange(100, 116)
    cases = {
        "itself": (itself, True, True),
        "ends with the chunk": (np.where(np.arange(16) < 8, itself, -1), False, False),
        "goes on otherwise": (np.where(np.arange(16) < 8, itself, 7), False, False),
        "ends early": (np.where(np.arange(16) < 11, itself, -1), True, True),
        "begins earlier": (np.arange(97, 113), False, True),
        "begins later": (np.arange(104, 120), False, True),
        "is the continuation": (np.arange(108, 124), False, True),
        "is something else": (np.arange(300, 316), False, False),
    }
    for name, (neighbor, equal, contained) in cases.items():
        assert text.equal(rows, neighbor[None, None]).item() is equal, name
        assert text.contained(rows, neighbor[None, None]).item() is contained, name
    last = np.array([2])
    assert text.equal(last, np.arange(116, 132)[None, None]).item() is True
