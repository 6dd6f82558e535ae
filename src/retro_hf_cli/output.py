"""What the command shows: text of documents, stores and models may hold characters that control a terminal."""

import unicodedata
from typing import Any

import typer


# Joiners, which many scripts and emoji need; other format characters reorder or hide text.
_SHOWN = "\n\t\u200c\u200d"


def plain(text: str) -> str:
    r"""The text with control, format and line-separating characters written out, such as `\x1b`."""
    return "".join(
        letter
        if letter.isprintable() or letter in _SHOWN or unicodedata.category(letter) == "Zs"
        else repr(letter)[1:-1]
        for letter in text
    )


def say(text: Any = "", err: bool = False) -> None:
    """Print text, whoever wrote it."""
    typer.echo(plain(str(text)), err=err)


def say_json(value: Any) -> None:
    """Print JSON in readable UTF-8, the same characters as JSON escapes."""
    from retro_hf.outside import printable_json

    typer.echo(printable_json(value))
