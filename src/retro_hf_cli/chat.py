"""The command that chats in the terminal: chat."""

import queue
import sys
from typing import Annotated, Any

import typer

from . import paths
from .model import open_model
from .options import STORE, Base, Dtype, Embedder, MinScore, Model, NumNeighbors, readable
from .output import say, say_passage


commands = typer.Typer()

_COMMANDS = (
    "/off goes to a conversation without the store, /on back to the one with it, /new forgets both, and an empty line or Ctrl-D "
    "ends the chat."
)


@commands.command(rich_help_panel="Model", epilog="retro chat model --store store")
def chat(
    model: Model,
    store: Annotated[str, typer.Option(callback=paths.store, help=STORE)],
    embedder: Embedder = None,
    num_neighbors: NumNeighbors = None,
    min_score: MinScore = None,
    dtype: Dtype = "auto",
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Largest number of tokens in an answer.")] = 256,
    temperature: Annotated[float, typer.Option(min=0, help="0 always takes the most likely token.")] = 0.0,
    seed: Annotated[int | None, typer.Option(help="The same seed gives the same answers.")] = None,
    base: Base = None,
) -> None:
    """Chat with a model in the terminal. After each answer, the passages that it read are shown.

    /off goes to a conversation without the store, /on back to the one with it, /new forgets both, and an empty line or Ctrl-D
    ends the chat. To compare, ask the same in both: neither knows the answers of the other.
    """
    from retro_hf import extras

    extras.load("fastapi", "`retro chat`")
    from retro_hf.errors import counted
    from retro_hf_server.engine import Engine
    from retro_hf_server.jobs import Sampling
    from retro_hf_server.prompts import Prompts
    from retro_hf_server.source import Source

    say("Loading the model and the store ...", err=True)
    loaded, tokenizer, retriever = open_model(model, store, embedder, num_neighbors, dtype, min_score, base)
    if not tokenizer.chat_template:
        raise ValueError(f"'{model}' has no chat template, so it cannot chat. Continue a text with `retro generate`.")
    engine = Engine(loaded, tokenizer, Source(retriever, tokenizer, loaded.config.chunk_size))
    prompts = Prompts(engine, max_new_tokens)
    sampling = Sampling(max_new_tokens, temperature, seed=seed)
    # Two, because an answer that was written with passages would tell them to those that are written without.
    conversations: dict[bool, list[dict[str, str]]] = {True: [], False: []}
    retrieve = True
    say(_COMMANDS, err=True)
    while said := _turn():
        if said == "/new":
            conversations = {True: [], False: []}
            say("  Both conversations are forgotten.", err=True)
            continue
        if said in ("/on", "/off"):
            retrieve = said == "/on"
            turns = counted(len(conversations[retrieve]) // 2, "turn")
            which = "with" if retrieve else "without"
            say(f"  The store is {said[1:]}. The conversation {which} it has {turns} so far.", err=True)
            continue
        if said.startswith("/"):
            say(f"  {said.split()[0]} is not a command. {_COMMANDS}", err=True)
            continue
        messages = conversations[retrieve]
        messages.append({"role": "user", "content": said})
        prompt = prompts.prompt(messages, said)
        if engine.context_size is not None and len(prompt.tokens) + max_new_tokens > engine.context_size:
            say(f"The conversation has no room for {max_new_tokens} more tokens; /new forgets it.", err=True)
            messages.pop()
            continue
        messages.append({"role": "assistant", "content": _answer(engine, prompt, sampling, retrieve)})
    engine.close()


def _turn() -> str:
    """The next line of the user; empty at the end."""
    if sys.stdin.isatty():
        say("> ", nl=False)
    return readable(sys.stdin.readline()).strip()


def _answer(engine: Any, prompt: Any, sampling: Any, retrieve: bool) -> str:
    """Show an answer while it is written, and then what was read; Ctrl-C ends the answer."""
    from retro_hf_server.jobs import Delta, Failed, Finished, Job
    from retro_hf_server.readers import ChunkRead

    events: queue.Queue[Any] = queue.Queue()
    job = Job(prompt, sampling, events.put, retrieve)
    engine.submit(job)
    text, passages = "", []
    while True:
        try:
            event = events.get()
        except KeyboardInterrupt:
            job.canceled = True
            continue
        if isinstance(event, Delta):
            text += event.text
            say(event.text, nl=False)
        elif isinstance(event, ChunkRead):
            passages = event.passages
        elif isinstance(event, Failed):
            raise RuntimeError(event.message)
        elif isinstance(event, Finished):
            say()
            if event.retrieval == "unavailable":
                say(f"  written without the store: {event.message}", err=True)
            for passage in passages:
                names = ("score", "document_id", "title", "source", "text")
                say_passage(*(passage[name] for name in names))
            return text
