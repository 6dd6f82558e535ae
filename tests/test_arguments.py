"""Arguments of the wrong kind: one rule for numbers, texts and places, and an error that names what was given."""

import traceback

import numpy as np
import pytest
import torch

from retro_hf import RetroRetriever
from retro_hf.arguments import numbers, texts, whole
from retro_hf.datastore import ChunkEmbedder, EmbeddingSearcher, HybridSearcher, LexicalSearcher, chunk_texts
from retro_hf.errors import RetroError
from retro_hf.passages import find_passages
from retro_hf.training import RetroDataCollator, precompute_neighbors, tokenize_documents, tokenize_questions

from .tiny_training import make_world


class Wrong(Exception):
    """Raised by the checks."""


STRANGE = [
    None,
    "x",
    b"x",
    1.5,
    float("nan"),
    object(),
    [None],
    ["x"],
    {"a": 1},
    {},
    np.array([1.5]),
    np.array(["a"]),
    [[1, 2], [3]],
]


@pytest.mark.parametrize("value", [*STRANGE, -1, True, np.float32(2), np.bool_(True), 10**20])
def test_a_whole_number_is_one(value):
    with pytest.raises(Wrong, match="count"):
        whole("count", value, Wrong, most=1 << 60)


@pytest.mark.parametrize("value", [3, np.int64(3), np.uint8(3)])
def test_numbers_of_numpy_count(value):
    found = whole("count", value, Wrong)
    assert found == 3 and type(found) is int
    with pytest.raises(Wrong, match="at least 4 and at most 5"):
        whole("count", value, Wrong, 4, 5)


@pytest.mark.parametrize("value", [None, 5, 1.5, b"x", [None], ["a", 5], [["a"]], np.array(5), object()])
def test_texts_are_texts(value):
    with pytest.raises(Wrong, match="Query [01] is of type"):
        texts("Query", value, Wrong)


def test_one_text_is_a_list_of_it():
    assert texts("Query", "ab", Wrong) == ["ab"]
    assert texts("Query", ("a", "b"), Wrong) == texts("Query", np.array(["a", "b"]), Wrong) == ["a", "b"]


@pytest.mark.parametrize("value", [None, "x", 1.5, [None], [[1, 2], [3]], np.array([1.5]), 6, -2, 10**20, True])
def test_numbers_in_a_range(value):
    with pytest.raises(Wrong, match="Ids"):
        numbers("Ids", value, Wrong, -1, 5)
    assert numbers("Ids", [[0, np.int32(5)]], Wrong, -1, 5).dtype == np.int64


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return make_world(tmp_path_factory.mktemp("world"))


def calls(world, lexical):
    """Public functions of a datastore, of retrieval and of training, each with one argument that may be strange."""
    store, retriever, tokenizer = world.datastore, world.retriever, world.tokenizer
    dense = EmbeddingSearcher(store, world.embedder)
    hybrid = HybridSearcher(dense, lexical)
    ids = torch.zeros(1, 8, dtype=torch.long)
    collator = RetroDataCollator(tokenizer, store)
    return {
        "first_chunks": store.first_chunks,
        "document": store.document,
        "document_id": store.document_id,
        "document_number": store.document_number,
        "document_numbers": store.document_numbers,
        "restricted_to": store.restricted_to,
        "random_chunks": lambda value: store.random_chunks(value, (2,)),
        "random_chunks, shape": lambda value: store.random_chunks(np.random.default_rng(0), value),
        "search": lambda value: store.search(store.keys_of([0]), value),
        "delete": store.delete,
        "merge": lambda value: store.merge(value, "never"),
        "embed": world.embedder.embed,
        "embed, batch_size": lambda value: world.embedder.embed(["a"], batch_size=value),
        "embedder": lambda value: ChunkEmbedder.of(value) if value != "x" else whole("x", value, RetroError),
        "dtype": lambda value: ChunkEmbedder.from_pretrained(world.embedder.name_or_path, dtype=value or "x"),
        "LexicalSearcher": LexicalSearcher.build,
        "EmbeddingSearcher": lambda value: EmbeddingSearcher(value, world.embedder),
        "lexical": lambda value: lexical.search(value, 2) if value not in ("x", ["x"], {"a": 1}, {}) else store.document(value),
        "hybrid": lambda value: hybrid.search(["a"], value),
        "RetroRetriever": lambda value: RetroRetriever(value, embedder=world.embedder),
        "cache_size": lambda value: RetroRetriever(store, embedder=world.embedder, cache_size=value),
        "retriever": retriever,
        "retriever, num_neighbors": lambda value: retriever.search(ids, num_neighbors=value or "x"),
        "find_passages": lambda value: find_passages(value, ["a"], 1),
        "find_passages, num_passages": lambda value: find_passages(retriever, ["a"], value),
        "chunk_texts": lambda value: chunk_texts(tokenizer, value),
        "precompute_neighbors": lambda value: precompute_neighbors(world.windows, value),
        "tokenize_documents": lambda value: tokenize_documents(["a"], tokenizer, max_length=8, chunk_size=value),
        "tokenize_questions": lambda value: tokenize_questions(world.windows, tokenizer, neighbor_size=value),
        "collator": collator,
        "collator, row": lambda value: collator([{**world.dataset[0], "input_ids": value}]),
    }  # fmt: skip


def test_public_functions_explain_strange_arguments(world):
    """Whatever is passed, the error is ours: a RetroError, or a ValueError that a check of ours has raised."""
    lexical = LexicalSearcher.build(world.datastore)
    raw = []
    for name, call in calls(world, lexical).items():
        for value in STRANGE:
            try:
                call(value)
            except Exception as error:
                raised_by = traceback.extract_tb(error.__traceback__)[-1].filename
                is_ours = isinstance(error, ValueError) and "/retro_hf/" in raised_by
                if not isinstance(error, RetroError) and not is_ours:
                    raw.append((name, repr(value), repr(error)))
    assert raw == []
