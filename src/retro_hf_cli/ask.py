"""The command that answers a question from documents."""

from pathlib import Path
from typing import Annotated

import typer

from . import paths
from .model import load_reader, tokenizer_of
from .options import (
    DEFAULT_EMBEDDER,
    STORE,
    TEXTS,
    AsJson,
    Base,
    Embedder,
    Encoding,
    MinScore,
    Model,
    Split,
    open_retriever,
    readable,
)
from .output import say, say_json, say_passage


commands = typer.Typer()


@commands.command(
    rich_help_panel="Model", epilog='retro ask HuggingFaceTB/SmolLM2-135M-Instruct "Who wrote it?" --texts notes/'
)
def ask(
    model: Model,
    question: Annotated[str, typer.Argument(help="The question.")],
    store: Annotated[str | None, typer.Option(callback=paths.store, help=STORE)] = None,
    texts: Annotated[Path | None, typer.Option(callback=paths.source, help=f"Instead of a datastore: {TEXTS}")] = None,
    embedder: Embedder = None,
    passages: Annotated[int, typer.Option("--passages", "-k", min=1, help="Number of passages to read.")] = 2,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Largest number of tokens in the answer.")] = 64,
    min_score: MinScore = None,
    encoding: Encoding = None,
    split: Split = None,
    base: Base = None,
    as_json: AsJson = False,
) -> None:
    """Answer a question from a datastore or from texts, and show the passages that were read."""
    if (store is None) == (texts is None):
        raise ValueError("Give exactly one of --store (a datastore) and --texts (documents, for a few of them).")

    import dataclasses

    from retro_hf import RetroRetriever, answer

    tokenizer = tokenizer_of(model, base)
    if texts is None:
        retriever = open_retriever(str(store), embedder, tokenizer, min_score)
    else:
        retriever = RetroRetriever.from_texts(
            str(texts), tokenizer, embedder=embedder or DEFAULT_EMBEDDER, encoding=encoding, split=split
        )
        retriever.min_score = min_score
    reader = load_reader(model, retriever, base)
    result = answer(reader, retriever, readable(question), num_passages=passages, max_new_tokens=max_new_tokens)
    if as_json:
        say_json(dataclasses.asdict(result))
        return
    say(result.text)
    if not result.sources:
        say(
            "  No passage was found, so the model answered without any."
            + ("" if min_score is None else " Lower --min-score?")
        )
    for source in result.sources:
        say_passage(source.score, source.document_id, source.title, source.source, source.text)
