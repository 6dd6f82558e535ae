"""What the command shows: text of documents, stores and models may hold characters that control a terminal."""

import json
import sys
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


def say(text: Any = "", err: bool = False, nl: bool = True) -> None:
    """Print text, whoever wrote it; a character that the output cannot show is written out, too."""
    _write(plain(str(text)), sys.stderr if err else sys.stdout, nl)


def one_line(text: str) -> str:
    """The text with its ends of lines shown as a sign."""
    return text.replace("\n", "⏎")


def say_neighbor(neighbor: Any, indent: str = "") -> None:
    """Print a neighbor that was found: score and document, then the text and its continuation."""
    document = _named(neighbor.document_id, neighbor.title, neighbor.source)
    say(f"{indent}{neighbor.score:.3f}  {one_line(document)}")
    say(f"{indent}    {one_line(neighbor.text)}\n{indent}  → {one_line(neighbor.continuation)}")


def say_passage(score: float, document_id: str, title: str, source: str, text: str) -> None:
    """Print a passage that was read: its score and document, and its text on one line."""
    heading = f"  [{score:.2f}] {_named(document_id, title, source)}"
    say(plain(heading).replace("\n", " "))
    say(f"      {' '.join(text.split())}")


def _named(document_id: str, title: str, source: str) -> str:
    """A document in a line: its id, its title, and its source, unless the id begins with that, as `notes.csv:7` does."""
    place = "" if document_id == source or document_id.startswith(f"{source}:") else source
    return "  ".join(filter(None, (document_id, title, place and f"({place})")))


def say_json(value: Any) -> None:
    """Print JSON in readable UTF-8, the same characters as JSON escapes, or all as escapes where UTF-8 cannot be shown."""
    from retro_hf.outside import printable_json

    text = printable_json(value)
    if _shown(text, sys.stdout) != text:
        text = json.dumps(value)
    _write(text, sys.stdout)


def _write(text: str, stream: Any, nl: bool = True) -> None:
    # Given a stream, typer writes to it as it is; without one it would take UTF-8 for ASCII.
    typer.echo(_shown(text, stream), file=stream, nl=nl)


def _shown(text: str, stream: Any) -> str:
    """The text as a stream can show it: cp1252, which Windows has for pipes, knows few characters."""
    encoding = getattr(stream, "encoding", None) or "utf-8"
    return text.encode(encoding, "backslashreplace").decode(encoding)
