"""A datastore as a tool for agents, by the Model Context Protocol."""

from __future__ import annotations

import threading
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated

from mcp.server import MCPServer
from mcp.server.mcpserver.exceptions import ToolError
from mcp.server.mcpserver.tools import Tool
from pydantic import Field, create_model

from retro_hf.errors import RetroError
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
    one_at_a_time = threading.Lock()

    def search(
        query: Annotated[str, Field(description="What to look for, in plain words.", min_length=1, max_length=10_000)],
        num_passages: Annotated[int, Field(description="How many passages to return.", ge=1, le=50)] = 5,
    ) -> list[Found]:
        """Find the passages of the store that are nearest to a query, best first."""
        if not query.strip():
            raise ToolError("The query is empty. Give at least one word.")
        try:
            with one_at_a_time:
                store.refresh()
                (found,) = find_passages(retriever, [query], num_passages)
        except RetroError as error:  # of any other error an agent is told nothing
            raise ToolError(str(error)) from error
        return [Found(one.document_id, one.title, one.source, one.text, one.score) for one in found]

    tool = Tool.from_function(search)
    # An argument with a slip in its name would be left out silently, and the default taken for it.
    strict = create_model("Arguments", __base__=tool.fn_metadata.arg_model, __cls_kwargs__={"extra": "forbid"})
    tool.fn_metadata.arg_model, tool.parameters = strict, strict.model_json_schema()
    instructions = f"Searches the {count:,} documents of the store '{name}'."
    return MCPServer(f"retro-{name}", instructions=instructions, tools=[tool])
