"""The LlamaIndex retriever, with the real package."""

import pytest
from tiny_training import make_world

from retro_hf.errors import RetrieverError
from retro_hf.integrations.llama_index import RetroLlamaIndexRetriever
from retro_hf.passages import find_passages


@pytest.fixture(scope="module")
def retriever(tmp_path_factory):
    """Over the tiny store."""
    return make_world(tmp_path_factory.mktemp("llama_index")).retriever


def test_it_returns_passages_with_their_documents(retriever):
    """Best first."""
    nodes = RetroLlamaIndexRetriever(retriever, num_passages=3).retrieve("golden lighthouse")
    (expected,) = find_passages(retriever, ["golden lighthouse"], 3)
    assert [one.node.get_content() for one in nodes] == [one.text for one in expected]
    assert [one.metadata["document_id"] for one in nodes] == [one.document_id for one in expected]
    assert [one.score for one in nodes] == [one.score for one in expected]


def test_its_number_of_passages_is_the_retrievers_by_default(retriever):
    """As everywhere."""
    assert len(RetroLlamaIndexRetriever(retriever).retrieve("golden lighthouse")) == retriever.num_neighbors


def test_an_empty_query_is_refused(retriever):
    """Nothing can be looked up."""
    with pytest.raises(RetrieverError):
        RetroLlamaIndexRetriever(retriever).retrieve(" ")
