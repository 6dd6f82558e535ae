"""A LangChain retriever over a datastore."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from .. import extras
from ..passages import find_passages


if TYPE_CHECKING:
    from langchain_core.documents import Document
    from langchain_core.retrievers import BaseRetriever
else:
    Document = extras.load("langchain_core.documents", "RetroLangChainRetriever").Document
    BaseRetriever = extras.load("langchain_core.retrievers", "RetroLangChainRetriever").BaseRetriever


class RetroLangChainRetriever(BaseRetriever):
    """Finds passages of a datastore for LangChain.

    Args:
        retriever ([`RetroRetriever`]): over the datastore.
        num_passages (`int`, *optional*): passages per query; by default the retriever's `num_neighbors`.
    Raises:
        RetrieverError: by `invoke`, for a query without a word.
    """

    model_config = {"extra": "forbid"}  # a slip in a name would be left out silently

    retriever: Any
    num_passages: int | None = None

    def _get_relevant_documents(self, query: str, *, run_manager: Any = None) -> list[Document]:
        (found,) = find_passages(self.retriever, [query], self.num_passages)
        rows = [asdict(passage) for passage in found]
        return [Document(page_content=row.pop("text"), metadata=row) for row in rows]
