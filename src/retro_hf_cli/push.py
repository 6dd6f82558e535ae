"""The command that uploads a datastore or a model: push."""

from pathlib import Path
from typing import Annotated, Any

import typer

from . import paths
from .model import load_model, tokenizer_of
from .output import say


commands = typer.Typer()


@commands.command(rich_help_panel="Datastore", epilog="retro push store me/my-store")
def push(
    folder: Annotated[
        Path, typer.Argument(callback=paths.saved, help="The folder of a datastore or of a RETRO model.")
    ],
    repo: Annotated[
        str, typer.Argument(help="The repository, such as me/my-store. It is created if it does not exist.")
    ],
    private: Annotated[bool, typer.Option("--private", help="Make a new repository private.")] = False,
    revision: Annotated[
        str | None, typer.Option(help="The branch to push to. It is created if it does not exist.")
    ] = None,
    evaluation: Annotated[
        Path | None,
        typer.Option(
            callback=paths.evaluation,
            help="The folder of `retro evaluate -o`. Its numbers go into the card of the model.",
        ),
    ] = None,
) -> None:
    """Upload a datastore (as a dataset) or a model to the Hub, with a card.

    The card of a model is the README.md of its folder; without one, or with --evaluation, a card is made.
    """
    if paths.is_datastore(folder):
        from retro_hf import RetroDatastore

        commit = RetroDatastore.load(folder).push_to_hub(repo, private=private or None, revision=revision)
        say(f"{commit.repo_url}, commit {commit.oid}")
    else:
        say(_push_model(folder, repo, evaluation, private=private, revision=revision))


def _push_model(folder: Path, repo: str, evaluation: Path | None, *, private: bool, revision: str | None) -> str:
    """Upload a model, its tokenizer and its card; returns the address of the last commit."""
    from huggingface_hub import HfApi

    model, tokenizer = load_model(str(folder)), tokenizer_of(str(folder))
    card = folder / "README.md"
    options: dict[str, Any] = {"private": private or None, "revision": revision}
    if revision is not None:
        HfApi().create_repo(repo, private=private or None, exist_ok=True)
        HfApi().create_branch(repo, branch=revision, exist_ok=True)
    model.push_to_hub(repo, evaluation=evaluation, **options)
    address = tokenizer.push_to_hub(repo, **options)
    if card.is_file() and evaluation is None:  # after the tokenizer, which rewrites the head of a card
        address = HfApi().upload_file(path_or_fileobj=card, path_in_repo=card.name, repo_id=repo, revision=revision)
    return str(address)
