"""Dense, fused and foreign search behind one protocol."""

import numpy as np
import pytest

from retro_hf.datastore import ChunkEmbedder, EmbeddingSearcher, HybridSearcher, LexicalSearcher, RetroDatastore
from retro_hf.errors import DatastoreMismatchError, RetrieverError
from retro_hf.retriever import RetroRetriever

from .fixtures import make_encoder


QUERIES = ["the king builds a bridge", "lighthouse near the harbor", "!"]


class StandIn:
    """A vector database in ten lines: the store's keys in an array, brute force."""

    def __init__(self, store) -> None:
        self.keys = store.keys_of(np.arange(store.num_chunks))
        self.owners = store.document_of(np.arange(store.num_chunks))

    def search(self, queries, num_neighbors, *, exclude_documents=None):
        scores = queries @ self.keys.T
        if exclude_documents is not None:
            scores[self.owners == np.asarray(exclude_documents)[:, None]] = -np.inf
        ids = np.argsort(-scores, axis=1)[:, :num_neighbors]
        return np.take_along_axis(scores, ids, axis=1), ids


class Fixed:
    """A searcher with given results."""

    metric = "fixed"

    def __init__(self, ids) -> None:
        self.ids = np.array(ids)

    def search(self, texts, num_neighbors, *, exclude_documents=None):
        ids = np.full((len(self.ids), num_neighbors), -1)
        ids[:, : self.ids.shape[1]] = self.ids
        return np.where(ids < 0, -np.inf, 1).astype(np.float32), ids


def test_embedding_searcher_embeds_and_searches(datastore, embedder):
    scores, ids = EmbeddingSearcher(datastore, embedder).search(QUERIES, 3, exclude_documents=[1, 2, -1])
    expected = datastore.search(embedder.embed(QUERIES), 3, exclude_documents=[1, 2, -1])
    np.testing.assert_array_equal(ids, expected[1])
    np.testing.assert_array_equal(scores, expected[0])


def test_another_index_can_replace_the_stores_own(datastore, embedder):
    own, other = EmbeddingSearcher(datastore, embedder), EmbeddingSearcher(datastore, embedder, StandIn(datastore))
    for excluded in (None, [3, 4, -1]):
        found = other.search(QUERIES, 4, exclude_documents=excluded)
        # Scores, since copies of a chunk may come in any order.
        np.testing.assert_allclose(found[0], own.search(QUERIES, 4, exclude_documents=excluded)[0], atol=1e-6)
        np.testing.assert_allclose(
            (embedder.embed(QUERIES)[:, None] * datastore.keys_of(found[1].reshape(-1)).reshape(3, 4, -1)).sum(-1),
            found[0],
            atol=1e-6,
        )
    assert found[0].dtype == np.float32 and found[1].dtype == np.int64


def test_another_index_does_not_return_deleted_documents(built, embedder, tmp_path):
    RetroDatastore.load(built).save(tmp_path / "store")
    store = RetroDatastore.load(tmp_path / "store")
    searcher = EmbeddingSearcher(store, embedder, StandIn(store))
    before = searcher.search(QUERIES[:1], 3)[1]
    gone = int(store.document_of(before)[0, 0])
    store.delete([store.document(gone)["id"]])
    scores, ids = searcher.search(QUERIES[:1], 3)
    assert ids[0, 0] == -1 and np.isneginf(scores[0, 0]) and (store.document_of(ids) != gone).all()


def test_another_index_with_other_shapes_or_ids_is_refused(datastore, embedder):
    class Short:
        def search(self, queries, num_neighbors, *, exclude_documents=None):
            return np.zeros((len(queries), 1)), np.zeros((len(queries), 1), dtype=np.int64)

    with pytest.raises(RetrieverError):
        EmbeddingSearcher(datastore, embedder, Short()).search(QUERIES, 4)


def test_the_embedder_of_another_store_is_refused(datastore, tmp_path):
    with pytest.raises(DatastoreMismatchError):
        EmbeddingSearcher(datastore, ChunkEmbedder.from_pretrained(make_encoder(tmp_path, seed=5)))


def test_ranks_are_fused_reciprocally_and_the_first_searcher_wins_ties():
    """Chunk 7 is second and first, 5 is first and missing, 9 is missing and second."""
    scores, ids = HybridSearcher(Fixed([[5, 7, 3], [4, -1, -1]]), Fixed([[7, 9, 5], [2, -1, -1]])).search(["", ""], 5)
    np.testing.assert_array_equal(ids, [[7, 5, 9, 3, -1], [4, 2, -1, -1, -1]])
    expected = [1 / 62 + 1 / 61, 1 / 61 + 1 / 63, 1 / 62, 1 / 63]
    np.testing.assert_allclose(scores[0, :4], expected, rtol=1e-6)
    assert np.isneginf(scores[0, 4]) and scores[1, 0] == scores[1, 1] == np.float32(1 / 61)


def test_hybrid_search_fuses_both_searchers_and_excludes_documents(datastore, embedder):
    dense, lexical = EmbeddingSearcher(datastore, embedder), LexicalSearcher.build(datastore)
    hybrid = HybridSearcher(dense, lexical)
    excluded = datastore.document_of(dense.search(QUERIES, 1)[1][:, 0])
    scores, ids = hybrid.search(QUERIES, 6, exclude_documents=excluded)
    assert (datastore.document_of(ids) != excluded[:, None]).all() and (np.diff(scores, axis=1) <= 0).all()
    for row in range(len(QUERIES)):
        totals: dict[int, float] = {}
        for searcher in (dense, lexical):
            found = searcher.search(QUERIES, 100, exclude_documents=excluded)[1][row]
            for rank, chunk in enumerate(found[found >= 0], start=1):
                totals[int(chunk)] = totals.get(int(chunk), 0) + 1 / (60 + rank)
        np.testing.assert_allclose(scores[row], sorted(totals.values(), reverse=True)[:6], rtol=1e-6)
    # A query without words is answered by vectors alone.
    np.testing.assert_array_equal(ids[2], dense.search(QUERIES, 6, exclude_documents=excluded)[1][2])


def test_searchers_of_two_stores_are_not_fused(datastore, embedder, tokenizer):
    other = RetroDatastore.from_texts(["the old river"], tokenizer, embedder=embedder, chunk_size=8, neighbor_size=20)
    with pytest.raises(RetrieverError):
        HybridSearcher(EmbeddingSearcher(datastore, embedder), EmbeddingSearcher(other, embedder))


def test_lone_surrogate_in_a_query_is_replaced(datastore, embedder):
    assert RetroRetriever(datastore, embedder=embedder).find("the river\ud83d")[0]
