"""The LangChain retriever, with the real package."""

import pytest
from langchain_core.runnables import RunnableLambda
from tiny_training import make_world

from retro_hf.errors import RetrieverError
from retro_hf.integrations.langchain import RetroLangChainRetriever
from retro_hf.passages import find_passages


@pytest.fixture(scope="module")
def retriever(tmp_path_factory):
    """Over the tiny store."""
    return make_world(tmp_path_factory.mktemp("langchain")).retriever


def test_it_returns_passages_with_their_documents_in_a_chain(retriever):
    """Best first."""
    chain = RetroLangChainRetriever(retriever=retriever, num_passages=3) | RunnableLambda(lambda found: found)
    documents = chain.invoke("golden lighthouse")
    (expected,) = find_passages(retriever, ["golden lighthouse"], 3)
    assert [one.page_content for one in documents] == [one.text for one in expected]
    assert [one.metadata["document_id"] for one in documents] == [one.document_id for one in expected]
    assert documents[0].metadata.keys() == {"document_id", "title", "source", "score"}


def test_its_number_of_passages_is_the_retrievers_by_default(retriever):
    """As everywhere."""
    assert len(RetroLangChainRetriever(retriever=retriever).invoke("golden lighthouse")) == retriever.num_neighbors


def test_an_empty_query_is_refused(retriever):
    """Nothing can be looked up. Nor is an argument with a slip in its name left out."""
    with pytest.raises(ValueError, match="num_passage"):
        RetroLangChainRetriever(retriever=retriever, num_passage=3)
    with pytest.raises(RetrieverError):
        RetroLangChainRetriever(retriever=retriever).invoke(" ")
