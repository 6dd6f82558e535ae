"""The command that measures whether retrieval helps: evaluate."""

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer

from . import paths
from .model import check_alone, open_model
from .options import (
    AsJson,
    Base,
    Dtype,
    Embedder,
    Encoding,
    MinScore,
    Model,
    NumNeighbors,
    Split,
    tell_progress,
)
from .output import say, say_json


commands = typer.Typer()

MODES = ("off", "on", "random", "shuffled", "oracle", "in_context")  # also in `retro_hf.evaluation`
# Documents that a report shows token by token.
_TRACED = 3


def _known_modes(modes: str) -> str:
    if unknown := [mode for mode in _parsed("--modes", modes, str) if mode not in MODES]:
        raise typer.BadParameter(f"There is no mode {', '.join(unknown)}. Choose from {', '.join(MODES)}.")
    return modes


@commands.command(rich_help_panel="Model", epilog="retro evaluate model heldout.jsonl --store store -o results")
def evaluate(
    model: Model,
    texts: Annotated[
        Path,
        typer.Argument(
            metavar="DOCUMENTS",
            callback=paths.source,
            help="Held-out documents: a folder, or a file such as .jsonl, as for `retro build`.",
        ),
    ],
    store: Annotated[
        str | None,
        typer.Option(
            callback=paths.store, help="A datastore: a folder, or a Hub name. Without one, only OFF is measured."
        ),
    ] = None,
    embedder: Embedder = None,
    output: Annotated[
        Path | None,
        typer.Option(
            "--output", "-o", callback=paths.folder, help="The folder for results. A stopped run resumes there."
        ),
    ] = None,
    report: Annotated[
        bool, typer.Option("--report", help="Also write an HTML page and pictures there. Needs matplotlib.")
    ] = False,
    num_neighbors: NumNeighbors = None,
    modes: Annotated[
        str,
        typer.Option(
            callback=_known_modes,
            help="What to measure. Also possible: in_context, the neighbors in the prompt of the base. It is slow.",
        ),
    ] = "off,on,random,shuffled,oracle",
    num_neighbors_sweep: Annotated[
        str, typer.Option("--sweep-k", help="Numbers of neighbors to compare, such as 1,2,5,10.")
    ] = "",
    fractions: Annotated[str, typer.Option(help="Shares of the datastore to compare, such as 0.1,0.5.")] = "",
    window: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="Tokens per row: at least two chunks, only whole ones. Default: as many as the model allows, at most 2,048.",
        ),
    ] = None,
    stride: Annotated[
        int | None,
        typer.Option(
            min=1, help="Tokens from one row to the next: whole chunks, less than a window. Default: half a window."
        ),
    ] = None,
    min_score: MinScore = None,
    encoding: Encoding = None,
    split: Split = None,
    add_bos: Annotated[
        bool | None,
        typer.Option(
            "--add-bos/--no-add-bos",
            help="Begin each document with the begin-of-text token. Default: as the tokenizer does.",
        ),
    ] = None,
    add_eos: Annotated[bool, typer.Option("--add-eos", help="Score the end-of-text token, too.")] = False,
    batch_size: Annotated[int, typer.Option(min=1, help="Rows per forward pass.")] = 8,
    dtype: Dtype = "auto",
    seed: Annotated[int, typer.Option(min=0, help="Seed of random neighbors, fractions and intervals.")] = 0,
    as_json: AsJson = False,
    base: Base = None,
) -> None:
    """Measure on held-out texts whether retrieval helps, how much, and whether the gain is copying.

    The first line is the verdict. With --json it is verdict.outcome: helps, nothing, hurts, broken or not_measured. The exit
    code is 0 if there is a verdict, also a bad one; 1 after an error; 2 for wrong options.
    """
    if report and output is None:
        raise ValueError("--report writes into the folder of results, but there is none: add --output FOLDER.")
    check_alone(model, store)
    numbers, shares = _parsed("--sweep-k", num_neighbors_sweep, int), _parsed("--fractions", fractions, float)

    from rich.console import Console

    from retro_hf import extras
    from retro_hf.datastore.documents import read_texts
    from retro_hf.evaluation import evaluate as measure
    from retro_hf.evaluation import trace, write_report

    if report:
        extras.load("matplotlib", "The page of --report")  # what is missing shows before any work is spent
    documents, reader = read_texts(texts, encoding=encoding, split=split)
    longest = sorted(documents, key=lambda one: -len(one["text"]))[:_TRACED]
    # The reader skips those without text, but they are counted.
    documents += [{"id": reader.first_empty or "", "text": ""}] * reader.num_empty
    tell_progress()
    loaded, tokenizer, retriever = open_model(model, store, embedder, dtype=dtype, min_score=min_score, base=base)
    result = measure(
        loaded,
        documents,
        tokenizer,
        retriever=retriever,
        modes=None if store is None else _parsed("--modes", modes, str),
        num_neighbors=num_neighbors,
        num_neighbors_sweep=numbers,
        fractions=shares,
        output=output,
        window=window,
        stride=stride,
        add_bos=add_bos,
        add_eos=add_eos,
        batch_size=batch_size,
        seed=seed,
    )
    page = None
    if report and output is not None:
        traces = [
            trace(loaded, one, tokenizer, retriever=retriever, num_neighbors=num_neighbors)
            for one in longest
            if retriever
        ]
        page = write_report(result, output, traces=traces)
    if as_json:
        say_json(result.to_dict())
        return
    if sys.stdout.isatty():
        Console(highlight=False).print(result)
    else:
        say(str(result))
    if output is not None:
        say(f"\nKept in {output}: evaluation.json, tokens.parquet, documents.parquet")
    if page is not None:
        say(f"Report: {page}")


def _parsed(option: str, text: str, kind: Callable[[str], Any]) -> list[Any]:
    """The values of an option that lists them, separated by commas."""
    try:
        return [kind(part.strip()) for part in text.split(",") if part.strip()]
    except ValueError:
        raise ValueError(
            f"{option} is {text!r}, but it lists {'whole ' if kind is int else ''}numbers with commas between them, such as "
            f"{'1,2,5' if kind is int else '0.1,0.5'}."
        ) from None
