"""The command that serves a model to other programs and to people: serve."""

import os
from typing import Annotated

import typer

from . import paths
from .model import check_alone, open_model
from .options import STORE, Base, Dtype, Embedder, MinScore, Model, NumNeighbors
from .output import say


commands = typer.Typer()


@commands.command(rich_help_panel="Model", epilog="retro serve model --store store --port 8000")
def serve(
    model: Model,
    store: Annotated[
        str | None, typer.Option(callback=paths.store, help=f"{STORE} Without one, retrieval is off.")
    ] = None,
    embedder: Embedder = None,
    num_neighbors: NumNeighbors = None,
    min_score: MinScore = None,
    dtype: Dtype = "auto",
    host: Annotated[
        str, typer.Option(help="The address to listen on. By default, only this machine can connect.")
    ] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="The port. 0 takes any free one.")] = 8000,
    name: Annotated[
        str | None, typer.Option(help="The name of the model for clients. Default: the name of its folder.")
    ] = None,
    api_key: Annotated[
        str | None,
        typer.Option(
            envvar="RETRO_API_KEY", help="The key that clients must send. Needed if --host is another address."
        ),
    ] = None,
    allow_store_changes: Annotated[
        bool, typer.Option("--allow-store-changes", help="Let clients add, replace and delete documents.")
    ] = False,
    max_batch: Annotated[
        int, typer.Option(min=1, help="Largest number of requests that are generated together.")
    ] = 16,
    max_queue: Annotated[
        int, typer.Option(min=1, help="Largest number of waiting requests. Others get the status 429.")
    ] = 64,
    max_tokens: Annotated[int, typer.Option(min=1, help="Largest number of tokens in an answer.")] = 2048,
    max_body: Annotated[int, typer.Option(min=1, help="Largest request, in bytes.")] = 1_000_000,
    timeout: Annotated[
        float, typer.Option(min=1, help="Seconds for an answer, including the time in the queue.")
    ] = 300.0,
    base: Base = None,
) -> None:
    """Serve a model over HTTP in OpenAI's protocol, with a page to try it out.

    The page is at /, the API at /v1. After SIGTERM or Ctrl-C, the server finishes the running answers first.
    """
    check_alone(model, store)
    from retro_hf_server.address import bind, is_loopback

    if not is_loopback(host) and not api_key:
        raise ValueError(
            f"On the address {host}, other machines could use the model and read the store. Set a key with `--api-key` or in "
            "the variable RETRO_API_KEY, or leave out `--host`."
        )
    listening = bind(host, port)  # what is taken shows before anything is loaded
    try:
        from retro_hf import extras

        extras.load("fastapi", "`retro serve`")
        extras.load("prometheus_client", "`retro serve`")
        extras.load("uvicorn", "`retro serve`")
        from retro_hf_server import run
        from retro_hf_server.limits import Limits

        loaded, tokenizer, retriever = open_model(model, store, embedder, num_neighbors, dtype, min_score, base)
        address = f"http://{f'[{host}]' if ':' in host else host}:{listening.getsockname()[1]}"
        served = name or os.path.basename(os.path.normpath(model))
        say(f"Serving {served} at {address} (the page) and {address}/v1 (the API). Ctrl-C ends it.")
        run.serve(
            loaded,
            tokenizer,
            retriever,
            listening,
            name=served,
            limits=Limits(
                max_body=max_body, timeout=timeout, max_tokens=max_tokens, max_batch=max_batch, max_queue=max_queue
            ),
            host=host,
            api_key=api_key,
            allow_store_changes=allow_store_changes,
        )
    finally:
        listening.close()
