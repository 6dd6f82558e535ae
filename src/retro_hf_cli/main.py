"""The `retro` command: its options, and how an error is shown."""

import os
import sys
from importlib.metadata import version
from typing import Annotated, Any

import typer

from . import ask, chat, datastore, env, evaluate, fitting, mcp, model, push, serve
from .output import say
from .wording import as_typed


app = typer.Typer(
    name="retro",
    help="Let language models read your documents. `retro COMMAND --help` explains a command and ends with an example.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
_INTERRUPTED = 130  # exit code, which typer gives to Ctrl-C


def _print_version(value: bool) -> None:
    if value:
        say(f"retro-hf {version('retro-hf')}")
        raise typer.Exit


@app.callback()
def _options(
    show_version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Show the version and exit.")
    ] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")] = False,
) -> None:
    pass


for group in (ask, datastore, push, model, fitting, evaluate, serve, chat, mcp, env):
    app.add_typer(group.commands)


def main() -> None:
    """Run the `retro` command; an error that can be explained is one line on stderr, exit code 1; after Ctrl-C it is 130."""
    # Help, logs and tables come from others; what the output cannot show is written out instead of raised. Input of another
    # encoding has U+FFFD for what cannot be read.
    for stream, errors in ((sys.stdout, "backslashreplace"), (sys.stderr, "backslashreplace"), (sys.stdin, "replace")):
        if hasattr(stream, "reconfigure"):  # a stream may be closed, or an object of the caller's
            stream.reconfigure(errors=errors)
    if not sys.stderr.isatty():
        # The switch of transformers and the Hub's client, whose bars would fill a log.
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    try:
        app()
    except SystemExit as ended:
        if ended.code == _INTERRUPTED:
            say(
                "Interrupted. A datastore is as it was before, or the change is complete. To resume `retro build`, `retro fit` or "
                "`retro evaluate -o`, repeat the same command.",
                err=True,
            )
        raise
    except Exception as error:
        package = sys.modules.get("retro_hf.errors")
        explained = (ValueError, OSError, RuntimeError, ImportError, *([package.RetroError] if package else ()))
        if "--debug" in sys.argv or not isinstance(error, explained):
            raise
        say(f"Error: {as_typed(str(error), _parameters())}", err=True)
        raise SystemExit(1) from None


def _parameters() -> list[Any]:
    """Those of the command that was typed."""
    group: Any = typer.main.get_command(app)
    return next((group.commands[word].params for word in sys.argv[1:] if word in group.commands), [])


if __name__ == "__main__":
    main()
