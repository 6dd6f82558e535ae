"""A datastore as a tool for agents, by the Model Context Protocol."""

from __future__ import annotations

import threading
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated

from mcp.server import MCPServer
from pydantic import Field

from retro_hf.passages import find_passages


if TYPE_CHECKING:
    from retro_hf import RetroRetriever


@dataclass
class Found:
    """One passage, as an agent gets it."""

    document_id: str
    title: str
    source: str
    text: str
    score: float


def make_tools(retriever: RetroRetriever, name: str) -> MCPServer:
    """
    A server with one tool, `search`.

    Args:
        retriever ([`RetroRetriever`]): over the datastore. Changes by other processes are seen by the next search.
        name (`str`): of the store, which agents are shown.
    """
    store = retriever.datastore
    count = store.num_documents - store.num_deleted_documents
    server = MCPServer(f"retro-{name}", instructions=f"Searches the {count:,} documents of the store '{name}'.")
    one_at_a_time = threading.Lock()

    @server.tool()
    def search(
        query: Annotated[str, Field(description="What to look for, in plain words.", min_length=1, max_length=10_000)],
        num_passages: Annotated[int, Field(description="How many passages to return.", ge=1, le=50)] = 5,
    ) -> list[Found]:
        """Find the passages of the store that are nearest to a query, best first."""
        if not query.strip():
            raise ValueError("The query is empty. Give at least one word.")
        with one_at_a_time:
            store.refresh()
            (found,) = find_passages(retriever, [query], num_passages)
        return [Found(one.document_id, one.title, one.source, one.text, one.score) for one in found]

    return server
