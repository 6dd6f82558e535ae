"""The errors of retro-hf: one base class, and children that are also the builtin a caller would expect.

Every message says what is wrong with both values, why, and what to do about it.
"""

from __future__ import annotations

import os
import re
import textwrap
from typing import Any


__all__ = [
    "DatasetError",
    "DatastoreCorruptError",
    "DatastoreExistsError",
    "DatastoreInputError",
    "DatastoreMismatchError",
    "DatastoreNotFoundError",
    "DatastoreWriteError",
    "MissingExtraError",
    "PretrainedNotFoundError",
    "RetrieverError",
    "RetroError",
    "UnsupportedBackboneError",
    "UnsupportedEmbedderError",
]


def counted(count: int, noun: str) -> str:
    """A number of things in words: "1 document", "2,000 documents"."""
    return f"{count:,} {noun}" if count == 1 else f"{count:,} {noun}s"


def in_commands(message: str, group: Any) -> str:
    """A message in the words of a command line: flags for arguments, commands for methods.

    Args:
        message (`str`): of an error that was raised in Python.
        group (`click.Group`): the commands.
    """
    parameters = [one for command in group.commands.values() for one in command.params]
    flags = {one.name: one.opts[0] for one in parameters if one.opts[0].startswith("-")}
    message = re.sub(rf"`[\w.()]+\.({'|'.join(group.commands)})(_to_hub)?(\([^`]*\))?`", r"`retro \1`", message)

    def flag(found: re.Match[str]) -> str:
        name, equals = found.groups()
        # Words such as "index" are arguments only where a value follows, or where they are what is spoken of.
        return f"{flags[name]} " if equals else flags[name] if "_" in name else name

    message = re.sub(rf"^({'|'.join(flags)})(?= (?:has|is) )", lambda found: flags[found[1]], message)
    return re.sub(rf"(?<!-)\b({'|'.join(flags)})\b(=?)", flag, message)


class RetroError(Exception):
    """Base of the errors below. A wrong argument of a model or an evaluation is a plain ValueError, as in transformers."""


class DatasetError(RetroError, ValueError):
    """A training or evaluation set lacks what is needed: a column, token ids, texts. The message says how to make it."""


class DatastoreNotFoundError(RetroError, FileNotFoundError):
    """There is no datastore, or no input file, at the given path. Check the path, or build the datastore first."""


class DatastoreExistsError(RetroError, FileExistsError):
    """Something already lies where a datastore should be written. Nothing was changed; choose another path."""


class DatastoreInputError(RetroError, ValueError):
    """The documents or the options given cannot make a datastore. The message names the document, file or line."""


class DatastoreCorruptError(RetroError, ValueError):
    """The files of a datastore contradict its manifest. Nothing was read from them; restore or rebuild the store."""


class DatastoreWriteError(RetroError, OSError):
    """The disk refused to take a datastore: full, read-only, a name too long. What was there before is unharmed."""


class DatastoreMismatchError(RetroError, ValueError):
    """A datastore was built with another tokenizer, embedder or chunk size than the caller works with."""


class PretrainedNotFoundError(RetroError, FileNotFoundError):
    """A model, tokenizer or embedder could be loaded neither from a folder nor from the Hub. Check its name."""

    @classmethod
    def for_name(cls, what: str, name: str, cause: Exception) -> PretrainedNotFoundError:
        """The error for a `what` ("model", "tokenizer" …) called `name`, when transformers raised `cause`."""
        said = textwrap.shorten(str(cause), 600, placeholder=" …").rstrip(".")
        if os.path.isdir(name):
            return cls(
                f"The folder '{name}' holds no {what} that can be loaded: {said}. Name a folder that `save_pretrained` "
                "wrote, or a model on the Hub."
            )
        return cls(
            f"There is no folder '{name}', and no {what} of that name could be loaded from the Hub: {said}. Check the path, "
            "or the spelling of the Hub name ('org/name'); without a network, name a folder."
        )


class UnsupportedBackboneError(RetroError, ValueError):
    """The layers of a backbone could not be found. The message says what was looked for and how to name it by hand."""


class UnsupportedEmbedderError(RetroError, ValueError):
    """A model that is no bidirectional encoder was named as the embedder. The message says what it is."""


class RetrieverError(RetroError, ValueError):
    """A retriever was called with, or returned, tensors of the wrong shape or type."""


class MissingExtraError(RetroError, ImportError):
    """An optional package is not installed. The message has the `pip install` line that installs it."""
