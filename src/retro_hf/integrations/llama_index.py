"""A LlamaIndex retriever over a datastore."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from .. import extras
from ..passages import find_passages


if TYPE_CHECKING:
    from llama_index.core.retrievers import BaseRetriever
    from llama_index.core.schema import NodeWithScore, QueryBundle, TextNode
else:
    BaseRetriever = extras.load("llama_index.core.retrievers", "RetroLlamaIndexRetriever").BaseRetriever
    _schema = extras.load("llama_index.core.schema", "RetroLlamaIndexRetriever")
    NodeWithScore, TextNode = _schema.NodeWithScore, _schema.TextNode


class RetroLlamaIndexRetriever(BaseRetriever):
    """Finds passages of a datastore for LlamaIndex.

    Args:
        retriever ([`RetroRetriever`]): over the datastore.
        num_passages (`int`, *optional*): passages per query; by default the retriever's `num_neighbors`.
        options: those of LlamaIndex's `BaseRetriever`, such as `callback_manager`.
    Raises:
        RetrieverError: by `retrieve`, for a query without a word.
    """

    def __init__(self, retriever: Any, num_passages: int | None = None, **options: Any) -> None:
        self._passages = retriever
        self._num_passages = num_passages
        super().__init__(**options)

    def _retrieve(self, query_bundle: QueryBundle) -> list[NodeWithScore]:
        (found,) = find_passages(self._passages, [query_bundle.query_str], self._num_passages)
        rows = [asdict(passage) for passage in found]
        return [
            NodeWithScore(score=row.pop("score"), node=TextNode(text=row.pop("text"), metadata=row)) for row in rows
        ]
