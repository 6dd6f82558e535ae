"""Qdrant and LanceDB in the place of a datastore's own index, with the real engines inside this process."""

import lancedb
import numpy as np
import pytest
import qdrant_client
from datastore.fixtures import corpus
from tiny_training import make_world

from retro_hf import RetroDatastore, RetroRetriever
from retro_hf.datastore import EmbeddingSearcher
from retro_hf.errors import DatastoreInputError, DatastoreMismatchError
from retro_hf.integrations.lancedb import LanceIndex
from retro_hf.integrations.qdrant import QdrantIndex


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A tiny store, some of whose documents are deleted."""
    world = make_world(tmp_path_factory.mktemp("databases"))
    world.datastore.delete(["doc-3", "doc-5"])
    world.vectors = world.embedder.embed_queries([one["text"][:60] for one in corpus()[:12]])
    return world


@pytest.fixture(params=["qdrant", "lancedb"])
def make(request, tmp_path):
    """Makes an index of a datastore; the database outlives it."""
    if request.param == "lancedb":
        connection = lancedb.connect(tmp_path / "lance")
        yield lambda datastore, **options: LanceIndex(connection, datastore, **options)
        return
    where = ":memory:" if request.param == "qdrant" else None
    client = qdrant_client.QdrantClient(where, path=None if where else str(tmp_path / "qdrant"))
    yield lambda datastore, **options: QdrantIndex(client, datastore, **options)
    client.close()


@pytest.fixture
def own(world, tmp_path):
    """A copy of the store that a test may change."""
    world.datastore.save(tmp_path / "store")
    return RetroDatastore.load(tmp_path / "store")


def assert_same(index, datastore, queries, k, **options):
    """The same scores, and the same chunks but for ties."""
    scores, chunks = index.search(queries, k, **options)
    expected, of_store = datastore.search(queries, k, **options)
    assert (scores.dtype, chunks.dtype, chunks.shape) == (np.float32, np.int64, (len(queries), k))
    np.testing.assert_allclose(scores, expected, atol=1e-3)
    untied = np.abs(np.diff(expected, axis=1, append=-np.inf)) > 1e-3
    untied[:, 1:] &= untied[:, :-1]
    assert (chunks[untied] == of_store[untied]).all() and untied.any()


def test_it_finds_what_the_datastore_finds(world, make):
    """With each query's own excluded documents, without deleted ones, and with -1 where there are no more."""
    index = make(world.datastore)
    assert index.num_chunks == world.datastore.num_chunks
    assert_same(index, world.datastore, world.vectors, 5)
    numbers = np.arange(12)
    assert_same(index, world.datastore, world.vectors, 5, exclude_documents=numbers)
    several = np.stack([numbers, numbers + 1, np.full(12, -1)], axis=1)
    assert_same(index, world.datastore, world.vectors, 5, exclude_documents=several)
    scores, chunks = index.search(world.vectors[:2], world.datastore.num_chunks)
    missing = chunks == -1
    assert missing.any() and (scores[missing] == -np.inf).all() and (scores[~missing] > -np.inf).all()
    assert not np.isin(world.datastore.document_of(chunks[~missing]), world.datastore.deleted_documents).any()


def test_a_retriever_reads_the_same_neighbors(world, make):
    """Tokens and texts come from the datastore."""
    searcher = EmbeddingSearcher(world.datastore, world.embedder, make(world.datastore))
    texts = ["golden lighthouse", "the king reads seven letters"]
    found = RetroRetriever(world.datastore, searcher=searcher).find(texts)
    expected = RetroRetriever(world.datastore, embedder=world.embedder).find(texts)
    assert [[one.text for one in row] for row in found] == [[one.text for one in row] for row in expected]


@pytest.mark.parametrize("make", ["qdrant", "qdrant-folder", "lancedb"], indirect=True)
def test_a_table_that_is_there_is_used_and_completed(world, own, make):
    """After a filling that was interrupted, and after documents were appended."""
    index = make(own, batch_size=7)
    again = make(own)
    assert again._count() == own.num_chunks
    own.append([{"id": "new", "text": "the golden lighthouse and the quiet baker"}], embedder=world.embedder)
    query = world.embedder.embed_queries(["the golden lighthouse and the quiet baker"])
    assert own.num_chunks - 1 not in index.search(query, 3)[1]
    index.refresh()
    assert_same(index, own, query, 3)
    assert index._count() == own.num_chunks


def test_keys_of_other_chunks_are_refused(world, own, make):
    """Chunk ids of a compacted store name other text."""
    index = make(own)
    searcher = EmbeddingSearcher(own, world.embedder, index)
    own.compact()
    with pytest.raises(DatastoreMismatchError):
        searcher.search(["golden lighthouse"], 2)
    with pytest.raises(DatastoreMismatchError):
        make(own)
    assert make(own, table="others").num_chunks == own.num_chunks


def test_a_table_of_something_else_is_refused(world, tmp_path):
    """Other columns, keys of another length or a name, and distances that are no inner product."""
    connection = lancedb.connect(tmp_path / "lance")
    connection.create_table("other", [{"chunk": 0, "key": [1.0]}])
    client, models = qdrant_client.QdrantClient(":memory:"), qdrant_client.models
    dot, size = models.Distance.DOT, world.datastore.manifest.dim
    for name, vectors in {
        "short": models.VectorParams(size=3, distance=dot),
        "named": {"key": models.VectorParams(size=size, distance=dot)},
        "distance": models.VectorParams(size=size, distance=models.Distance.EUCLID),
    }.items():
        client.create_collection(name, vectors_config=vectors)
        with pytest.raises(DatastoreMismatchError, match=f"'{name}' is not one of keys of {size} numbers"):
            QdrantIndex(client, world.datastore, name)
    with pytest.raises(DatastoreMismatchError, match="'other' is not one of keys"):
        LanceIndex(connection, world.datastore, "other")


@pytest.mark.parametrize(
    "name", ["", ".", "..", "a/b", "../x", "a\0b", "a\nb", "C:x", "\udc80", "x" * 300, "a?b", 5, None, b"x"]
)
def test_a_name_that_no_table_can_have(world, make, name):
    with pytest.raises(DatastoreInputError, match="name of the table"):
        make(world.datastore, table=name)


@pytest.mark.parametrize("name", ["a.b", "-a_1", "x" * 200])
def test_a_name_that_a_table_can_have(world, make, name):
    assert make(world.datastore, table=name).num_chunks == world.datastore.num_chunks
