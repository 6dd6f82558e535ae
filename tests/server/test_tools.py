"""The store as a tool for agents, through the client of the official SDK; docs/mcp.md runs the command with it."""

import anyio
import pytest
from mcp import Client
from tiny_training import make_world

from retro_hf import RetroDatastore
from retro_hf.errors import DatastoreReadError
from retro_hf_server.tools import make_tools


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """The tiny store and its folder."""
    folder = tmp_path_factory.mktemp("tools")
    made = make_world(folder)
    made.folder = folder
    return made


def call(server, *calls):
    """The results of calls of the tool."""

    async def run():
        async with Client(server) as client:
            names = [tool.name for tool in (await client.list_tools()).tools]
            assert names == ["search"]
            return [await client.call_tool("search", arguments) for arguments in calls]

    return anyio.run(run)


def test_an_agent_finds_passages_and_sees_changes_of_other_processes(world):
    """Best first, with their documents."""
    server = make_tools(world.retriever, "store")
    (found,) = call(server, {"query": "golden lighthouse", "num_passages": 3})
    passages = found.structured_content["result"]
    assert len(passages) == 3
    assert passages[0].keys() == {"document_id", "title", "source", "text", "score"}
    other = RetroDatastore.load(world.folder / "store")
    other.append([{"id": "other", "text": "a golden lighthouse"}], embedder=world.embedder)
    (found,) = call(server, {"query": "a golden lighthouse"})
    assert found.structured_content["result"][0]["document_id"] == "other"


def test_bad_arguments_are_errors_of_the_call(world):
    """And the server goes on."""
    bad = [{"query": ""}, {"query": "  "}, {"query": "x", "num_passages": 0}, {}, {"query": "x", "num_pasages": 3}]
    *refused, found = call(make_tools(world.retriever, "store"), *bad, {"query": "a king"})
    assert [one.is_error for one in refused] == [True] * len(bad)
    assert not found.is_error
    assert "at least one word" in refused[1].content[0].text
    assert "num_pasages" in refused[-1].content[0].text


def test_the_schema_names_all_arguments(world):
    """So that an agent sees before it calls that there are no others."""

    async def schema():
        async with Client(make_tools(world.retriever, "store")) as client:
            return (await client.list_tools()).tools[0].input_schema

    assert anyio.run(schema)["additionalProperties"] is False


def test_an_agent_is_told_what_is_wrong_with_the_store(world, monkeypatch):
    """As in the other errors of this package, and no more of any other error."""

    def fail(*_):
        raise DatastoreReadError("Too many files are open.")

    monkeypatch.setattr("retro_hf_server.tools.find_passages", fail)
    (refused,) = call(make_tools(world.retriever, "store"), {"query": "a king"})
    assert refused.is_error and "Too many files are open." in refused.content[0].text
