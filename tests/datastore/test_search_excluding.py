"""Search with excluded documents equals brute force over the chunks that are left."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from retro_hf.datastore import RetroDatastore
from retro_hf.datastore.chunks import document_of
from retro_hf.datastore.search_excluding import search_excluding
from retro_hf.errors import DatastoreInputError

from .fixtures import corpus


def brute_force(everything: np.ndarray, offsets: np.ndarray, excluded: np.ndarray, num_neighbors: int) -> np.ndarray:
    """The best scores of each row over chunks outside its excluded documents, -inf where there are no more."""
    owners = document_of(np.arange(everything.shape[1]), offsets)
    allowed = (owners[None, :, None] != excluded[:, None, :]).all(axis=-1)
    best = -np.sort(-np.where(allowed, everything, -np.inf), axis=1)[:, :num_neighbors]
    return np.pad(best, ((0, 0), (0, num_neighbors - best.shape[1])), constant_values=-np.inf)


@given(
    sizes=st.lists(st.integers(1, 60), min_size=1, max_size=6),
    num_neighbors=st.integers(1, 50),
    num_excluded=st.integers(0, 4),
    seed=st.integers(0, 2**32 - 1),
)
def test_search_excluding_equals_brute_force(sizes, num_neighbors, num_excluded, seed):
    generator = np.random.default_rng(seed)
    offsets = np.cumsum([0, *sizes])
    everything = generator.permutation(4 * offsets[-1]).reshape(4, -1).astype(np.float32)
    excluded = generator.integers(-1, len(sizes), size=(4, num_excluded))
    calls = []

    def search(rows, count, effort):
        calls.append(count)
        order = np.argsort(-rows, axis=1)[:, :count]
        return np.take_along_axis(rows, order, axis=1), order

    scores, ids = search_excluding(search, everything, num_neighbors, excluded, offsets, max_effort=1)
    np.testing.assert_array_equal(scores, brute_force(everything, offsets, excluded, num_neighbors))
    assert ((ids >= 0) == np.isfinite(scores)).all()
    np.testing.assert_array_equal(
        np.take_along_axis(everything, np.maximum(ids, 0), axis=1)[ids >= 0], scores[ids >= 0]
    )
    assert calls == sorted(calls) and len(calls) <= 5


@pytest.fixture(scope="module", params=["Flat", "IVF16,Flat", "HNSW8,Flat"])
def store(request, tokenizer, embedder) -> RetroDatastore:
    return RetroDatastore.from_texts(
        corpus(), tokenizer, embedder=embedder, chunk_size=8, neighbor_size=16, index=request.param
    )


def test_excluded_document_is_never_returned(store):
    keys = store.keys_of(np.arange(store.num_chunks))
    own = store.document_of(np.arange(store.num_chunks))
    scores, ids = store.search(keys, 5, exclude_documents=own)
    assert (ids >= 0).all() and (store.document_of(ids) != own[:, None]).all()
    assert (np.diff(scores, axis=1) <= 0).all()
    if store.manifest.index["factory"] == "Flat":
        expected = brute_force(keys @ keys.T, store.shards[0].doc_offsets, own[:, None], 5)
        np.testing.assert_allclose(scores, expected, atol=1e-5)
    both = np.stack([own, (own + 1) % store.num_documents, np.full_like(own, -1)], axis=1)
    found = store.document_of(store.search(keys, 3, exclude_documents=both)[1])
    assert (found[:, :, None] != both[:, None, :]).all() and (found >= 0).all()


def test_minus_one_excludes_nothing(store):
    keys = store.keys_of(np.arange(50))
    plain = store.search(keys, 4)
    none = store.search(keys, 4, exclude_documents=np.full(50, -1))
    np.testing.assert_allclose(none[0], plain[0], atol=1e-6)


def test_all_remaining_chunks_are_returned(store):
    """Everything but one document is excluded, and more is asked for than it has."""
    keys = store.keys_of(np.arange(3))
    kept = np.flatnonzero(store.document_of(np.arange(store.num_chunks)) == 7)
    others = np.array([number for number in range(store.num_documents) if number != 7])
    scores, ids = store.search(keys, len(kept) + 2, exclude_documents=np.broadcast_to(others, (3, len(others))))
    if not store.manifest.index["factory"].startswith("HNSW"):
        assert (np.sort(ids, axis=1)[:, 2:] == kept).all()
    assert set(ids.ravel()) <= {-1, *kept} and (ids[:, -2:] == -1).all() and np.isneginf(scores[:, -2:]).all()


def test_more_neighbors_than_one_list_holds_are_found(store):
    keys = store.keys_of(np.arange(3))
    scores, ids = store.search(keys, store.num_chunks + 3)
    if not store.manifest.index["factory"].startswith("HNSW"):
        assert (np.sort(ids, axis=1)[:, 3:] == np.arange(store.num_chunks)).all()
    assert (ids[:, -3:] == -1).all() and np.isneginf(scores[:, -3:]).all()


def test_no_queries_give_no_results(datastore):
    for excluded in (None, np.zeros(0, dtype=np.int64)):
        scores, ids = datastore.search(np.zeros((0, 32), dtype=np.float32), 3, exclude_documents=excluded)
        assert scores.shape == ids.shape == (0, 3)


@pytest.mark.parametrize(
    ("excluded", "named"),
    [
        (np.zeros(3, dtype=np.int64), r"shape \(3,\).*shape \(2,\)"),
        (np.zeros(2), "type float64"),
        (np.array([0, 40]), "from 0 to 40.*to 39"),
        (np.array([-2, 0]), "from -2"),
        (np.zeros((2, 1, 1), dtype=np.int64), r"shape \(2, 1, 1\)"),
    ],
)
def test_wrong_exclusion_is_refused(datastore, excluded, named):
    with pytest.raises(DatastoreInputError, match=named):
        datastore.search(np.ones((2, 32), dtype=np.float32), 2, exclude_documents=excluded)


@pytest.mark.parametrize(
    ("queries", "num_neighbors", "named"),
    [
        (np.ones((2, 31)), 2, r"\(2, 31\).*\(num_queries, 32\)"),
        (np.ones(32), 2, r"shape \(32,\)"),
        (np.full((2, 32), np.nan), 2, "not finite"),
        (np.ones((2, 32)), 0, "num_neighbors is 0"),
        (np.ones((2, 32)), 10**12, r"1,000,000,000,000.*\d+ chunks"),
        ("frogs", 3, "type str.*RetroRetriever"),
        (["frogs"], 3, "type list"),
    ],
)
def test_wrong_queries_are_refused(datastore, queries, num_neighbors, named):
    with pytest.raises(DatastoreInputError, match=named):
        datastore.search(queries, num_neighbors)


@pytest.mark.parametrize("change", [torch.Tensor.requires_grad_, lambda keys: keys.to("meta"), lambda keys: keys + 1j])
def test_queries_whose_values_cannot_be_read_are_explained(datastore, change):
    """And those of complex numbers, of which numpy would leave the imaginary part out."""
    with pytest.raises(DatastoreInputError, match="no array"):
        datastore.search(change(torch.tensor(datastore.keys_of([0]))), 1)
