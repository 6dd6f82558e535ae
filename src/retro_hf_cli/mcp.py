"""The command that gives a datastore to agents: mcp."""

from pathlib import Path

import typer

from .options import Embedder, MinScore, StoreName, open_retriever


commands = typer.Typer()


@commands.command(rich_help_panel="Datastore", epilog="retro mcp store")
def mcp(store: StoreName, embedder: Embedder = None, min_score: MinScore = None) -> None:
    """Let agents search a datastore, through the Model Context Protocol on standard input and output.

    Put the command into the settings of the agent: {"command": "/path/to/retro", "args": ["mcp", "/path/to/store"]}. The agent
    passes few variables on: add "env": {"HF_HOME": "/path"} if you need it, or --embedder FOLDER.
    """
    from retro_hf import extras

    extras.load("mcp", "`retro mcp`")
    from retro_hf_server.tools import make_tools

    make_tools(open_retriever(store, embedder, min_score=min_score), Path(store).name).run("stdio")
