"""The errors of retro-hf: one base class, and children that are also the builtin a caller would expect.

Every message says in a sentence or two what is wrong, with both values, and what to do about it.
"""

from __future__ import annotations

import os
import textwrap

from .outside import is_path, printable


__all__ = [
    "DatasetError",
    "DatastoreCorruptError",
    "DatastoreExistsError",
    "DatastoreInputError",
    "DatastoreMismatchError",
    "DatastoreNotFoundError",
    "DatastoreReadError",
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


class RetroError(Exception):
    """Base of the errors below. A wrong argument of a model or an evaluation is a plain ValueError, as in transformers.

    Its text may quote names and content of somebody else's folder, so characters that control a terminal are written out.
    """

    def __str__(self) -> str:
        return printable(super().__str__())


class DatasetError(RetroError, ValueError):
    """A training or evaluation set lacks a column, token ids or texts. The message says how to make it."""


class DatastoreNotFoundError(RetroError, FileNotFoundError):
    """There is no datastore, or no input file, at the given path. Check the path, or build the datastore first."""


class DatastoreExistsError(RetroError, FileExistsError):
    """Something is already at the path where a datastore should be written. It is left unchanged."""


class DatastoreInputError(RetroError, ValueError):
    """No datastore can be made from the documents or options given. The message names the document, file or line."""


class DatastoreCorruptError(RetroError, ValueError):
    """The files of a datastore contradict its manifest. Restore the folder, or build the datastore again."""


class DatastoreReadError(RetroError, OSError):
    """The system refused to read a datastore: too many open files, no permission, a failing disk. It may be intact."""


class DatastoreWriteError(RetroError, OSError):
    """The disk refused to store a datastore: it is full or read-only, or a name is too long. Existing data is unharmed."""


class DatastoreMismatchError(RetroError, ValueError):
    """A datastore was built with another tokenizer, embedder or chunk size than the caller uses."""


class PretrainedNotFoundError(RetroError, FileNotFoundError):
    """A model, tokenizer or embedder was found neither as a folder nor on the Hub. Check its name."""

    @classmethod
    def for_name(cls, what: str, name: str, cause: BaseException) -> PretrainedNotFoundError:
        """The error for a `what` ("model", "tokenizer" …) called `name`, when transformers raised `cause`."""
        said = textwrap.shorten(str(cause), 600, placeholder=" …").rstrip(".")
        if os.path.exists(os.path.join(name, "adapter_config.json")):
            return cls(
                f"The folder '{name}' holds an adapter of PEFT and no whole {what}: {said}. Put it on its model in Python "
                "(`PeftModel.from_pretrained(model, folder)`), and save what `merge_and_unload()` gives."
            )
        if os.path.isdir(name):
            return cls(
                f"The folder '{name}' holds no {what} that can be loaded: {said}. Pass a folder that `save_pretrained` "
                "wrote, or a model on the Hub."
            )
        if is_path(name):
            return cls(
                f"There is no folder '{name}'. Check the path of the {what}, or pass a name on the Hub ('org/name')."
            )
        return cls(
            f"There is no folder '{name}', and no {what} of that name could be loaded from the Hub. Check the path or the Hub "
            f"name ('org/name'); without a network, pass a folder. The reason: {said}."
        )


class UnsupportedBackboneError(RetroError, ValueError):
    """The layers of a backbone were not found. The message says what was looked for and how to name it explicitly."""


class UnsupportedEmbedderError(RetroError, ValueError):
    """The model passed as the embedder is not a bidirectional encoder."""


class RetrieverError(RetroError, ValueError):
    """A retriever was called with, or returned, tensors of the wrong shape or type."""


class MissingExtraError(RetroError, ImportError):
    """An optional package is not installed. The message has the `pip install` line that installs it."""
