"""The `retro` command; beside the package so that `--help` waits for neither torch nor transformers."""

from importlib.metadata import version

import typer


app = typer.Typer(
    name="retro",
    help="RETRO for Hugging Face transformers: language models that read a datastore, chunk by chunk.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)


def _print_version(value: bool) -> None:
    if value:
        typer.echo(f"retro-hf {version('retro-hf')}")
        raise typer.Exit


@app.callback()
def _options(
    show_version: bool = typer.Option(
        False, "--version", callback=_print_version, is_eager=True, help="Show the version and exit."
    ),
) -> None:
    pass


def main() -> None:
    """Run the `retro` command."""
    app()


if __name__ == "__main__":
    main()
