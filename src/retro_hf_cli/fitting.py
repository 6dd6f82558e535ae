"""The command that fits a reader to documents: fit."""

from pathlib import Path
from typing import Annotated

import typer

from . import paths
from .options import DEFAULT_EMBEDDER, STORE, TEXTS, Embedder, open_retriever, tell_progress
from .output import say


commands = typer.Typer()


@commands.command(
    rich_help_panel="Model", epilog="retro fit HuggingFaceTB/SmolLM2-135M-Instruct --texts notes/ -o my-adapter"
)
def fit(
    base: Annotated[
        str,
        typer.Argument(
            callback=paths.model,
            help="Folder or Hub name of a decoder-only model, or of a RETRO adapter to train further.",
        ),
    ],
    texts: Annotated[Path, typer.Option(callback=paths.source, help=f"Documents to train on. {TEXTS}")],
    output: Annotated[
        Path,
        typer.Option(
            "--output", "-o", callback=paths.folder, help="The folder of the adapter. A stopped fit resumes there."
        ),
    ],
    store: Annotated[
        str | None,
        typer.Option(callback=paths.store, help=f"{STORE} Without one, OUTPUT/store is built from the texts."),
    ] = None,
    embedder: Embedder = None,
    minutes: Annotated[
        float | None, typer.Option(help="Longest training time. Default: 30.", show_default=False)
    ] = None,
    steps: Annotated[int | None, typer.Option(help="Number of training steps, instead of --minutes.")] = None,
    num_neighbors: Annotated[int, typer.Option("-k", min=1, help="Neighbors per chunk when the adapter is used.")] = 2,
    num_heldout: Annotated[
        int, typer.Option("--held-out", min=2, help="Documents to measure on, at most a fifth of all.")
    ] = 24,
    seed: Annotated[int, typer.Option(min=0, help="Seed of all random choices.")] = 0,
    backbone: Annotated[
        str | None, typer.Option("--base", callback=paths.base, help="Folder of the base of an adapter to go on with.")
    ] = None,
) -> None:
    """Train a reader on your documents, and measure it on documents that it held out.

    Before training starts, it times two steps, and tells how long all of it will take and how much memory it needs. A time
    that is too short for 60 steps is refused.
    """
    tell_progress()

    from retro_hf import fit as fit_reader
    from retro_hf.datastore.compatibility import load_tokenizer

    retriever = None if store is None else open_retriever(store, embedder, load_tokenizer(base))
    result = fit_reader(
        base,
        texts,
        output,
        retriever=retriever,
        embedder=embedder or DEFAULT_EMBEDDER,
        minutes=minutes,
        steps=steps,
        num_neighbors=num_neighbors,
        num_heldout=num_heldout,
        seed=seed,
        backbone=backbone,
    )
    say(f"\n{result}\n\nThe adapter and its card are in {output}; its folder 'work' is only needed to go on.")
