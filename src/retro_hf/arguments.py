"""Arguments of public functions: each kind is checked here, so that an error says what was given and what to pass."""

from __future__ import annotations

import math
import os
from numbers import Integral, Real
from pathlib import Path
from typing import Any

import numpy as np

from .model.values_retro import MOST_NUMBERS, shown
from .outside import can_be_a_file, is_utf8


_MOST = 1 << 128  # large enough for every seed, and messages can write it
_MOST_CHARACTERS, _MOST_OBJECTS = 1 << 14, 1 << 24


def whole(name: str, value: Any, error: type[Exception], least: int = 1, most: int = _MOST) -> int:
    """A whole number, of Python or numpy, as `int`; `error` for anything else, or one out of range."""
    number = int(value) if isinstance(value, Integral) and not isinstance(value, bool) else least - 1
    if not least <= number <= most:
        upper = "" if most == _MOST and number < least else f" and at most {most:,}"
        raise error(f"{name} is {shown(value)}, but it must be an integer of at least {least:,}{upper}.")
    return number


def optional_whole(name: str, value: Any, error: type[Exception], least: int = 1, most: int = _MOST) -> int | None:
    """None, or a whole number as for [`whole`]."""
    return None if value is None else whole(name, value, error, least, most)


def real(name: str, value: Any, error: type[Exception], least: float = -math.inf, most: float = math.inf) -> float:
    """A real number, of Python or numpy, as `float`; `error` for anything else, also for NaN, or one out of range."""
    try:
        number = float(value) if isinstance(value, Real) and not isinstance(value, bool) else math.nan
    except OverflowError:  # an integer that is larger than any float
        number = math.nan
    if not least <= number <= most:
        bounds = [f"at {word} {end:g}" for word, end in (("least", least), ("most", most)) if math.isfinite(end)]
        raise error(
            f"{name} is {shown(value)}, but it must be a number{' of ' if bounds else ''}{' and '.join(bounds)}."
        )
    return number


def flag(name: str, value: Any, error: type[Exception]) -> bool:
    """True or False, of Python or numpy, as `bool`; `error` for anything else, such as a tensor or a text."""
    if not isinstance(value, (bool, np.bool_)):
        raise error(f"{name} is {shown(value)}, but it must be True or False.")
    return bool(value)


def listed(values: Any) -> list[Any] | None:
    """Values as a list; None for one text, for a dict, and for what cannot be iterated over, such as a tensor of no dimension."""
    if isinstance(values, (str, bytes, dict)):
        return None
    try:
        # Each number of an array would become an object.
        return None if hasattr(values, "dtype") and len(values) > _MOST_OBJECTS else list(values)
    except (TypeError, RuntimeError):  # the latter: a nested tensor
        return None


def texts(name: str, values: Any, error: type[Exception]) -> list[str]:
    """Texts as a list, one text as a list of it; `error` for what is no text. `name` is what one of them is called."""
    found = listed(values)
    found = [values] if found is None else found
    for number, text in enumerate(found):
        if not isinstance(text, str):
            raise error(f"{name} {number} is of type {type(text).__name__}. Pass a text or a list of texts.")
    return found


def numbers(name: str, values: Any, error: type[Exception], least: int, most: int) -> np.ndarray:
    """Whole numbers in a range as an array of int64, of any shape; `error` for another type or a number out of range."""
    try:
        found = np.asarray(values)
    # Rows of several lengths; a tensor on a GPU or with gradients; lists that are nested too deeply.
    except (ValueError, TypeError, RuntimeError, MemoryError) as problem:
        raise error(
            f"{name} are no array: {problem}. Pass rows of the same length, in memory of the CPU."
        ) from problem
    if found.size > MOST_NUMBERS:
        raise error(f"{name} are {found.size:,} numbers, more than fit into memory. Pass them in parts.")
    if found.size and not np.issubdtype(found.dtype, np.integer):
        raise error(f"{name} are of type {found.dtype}. Pass integers.")
    if found.size and (found.min() < least or found.max() > most):
        raise error(f"{name} run from {found.min()} to {found.max()}, but there are those from {least} to {most}.")
    return found.astype(np.int64, copy=False)


def check_tokenizer(value: Any, error: type[Exception]) -> None:
    """Raise `error` for what is no tokenizer of transformers."""
    if not hasattr(value, "is_fast") or isinstance(value, type):
        raise error(f"The tokenizer is of type {type(value).__name__}. Pass the model's fast tokenizer.")


def optional_text(name: str, value: str | None, error: type[Exception]) -> str | None:
    """A text that UTF-8 can encode, or None; `error` for anything else, also for a whole book, which fits into no address."""
    if value is not None and not (isinstance(value, str) and is_utf8(value) and len(value) <= _MOST_CHARACTERS):
        raise error(f"{name} is {shown(value)}. Pass a text without half characters, or None.")
    return value


def path(name: str, value: Any, error: type[Exception]) -> Path:
    """The path of a file or folder, there or not; `error` for anything else.

    Files of Arrow, FAISS and safetensors are opened by names in UTF-8, so any other name is an error, too. An empty text would
    be the current folder, but is usually a variable that was not set.
    """
    if not isinstance(value, (str, os.PathLike)) or not can_be_a_file(os.fspath(value)):
        raise error(f"{name} is {shown(value)}. Pass a `str` or `Path` in UTF-8 that is not empty.")
    return Path(value)
