"""Fields of a manifest and of documents: texts that UTF-8 can hold, numbers with bounds. Errors quote a bounded part."""

from __future__ import annotations

import re
import reprlib
from typing import Any


__all__ = ["integer", "object_of", "of_type", "sha256", "text", "without_lone_surrogates"]

_SHA256 = re.compile(r"[0-9a-f]{64}")
_MAX_TEXT = 1 << 16


def of_type(content: dict[str, Any], name: str, kind: type) -> Any:
    """The field `name`, of type `kind`; ValueError, as below, for what is not as it must be."""
    value = content.get(name)
    if not isinstance(value, kind):
        raise ValueError(f"{name} is {reprlib.repr(value)}, not of type {kind.__name__}")
    return value


def integer(content: dict[str, Any], name: str, lowest: int, highest: int) -> int:
    """A whole number from `lowest` to `highest`."""
    value = content.get(name)
    if isinstance(value, bool) or not isinstance(value, int) or not lowest <= value <= highest:
        raise ValueError(f"{name} is {reprlib.repr(value)}, not an integer from {lowest} to {highest}")
    return value


def text(content: dict[str, Any], name: str, optional: bool = False) -> str | None:
    """A text that UTF-8 can hold, of at most 65,536 characters; with `optional`, None too."""
    if optional and content.get(name) is None:
        return None
    value: str = of_type(content, name, str)
    if len(value) > _MAX_TEXT:
        raise ValueError(f"{name} has {len(value):,} characters, more than {_MAX_TEXT:,}")
    if any("\ud800" <= character <= "\udfff" for character in value):
        raise ValueError(f"{name} is {reprlib.repr(value)}, with half of a character, which UTF-8 cannot hold")
    return value


def sha256(content: dict[str, Any], name: str) -> str:
    """A sha256 in lower-case hex."""
    value: str = of_type(content, name, str)
    if not _SHA256.fullmatch(value):
        raise ValueError(f"{name} is {reprlib.repr(value)}, not a sha256")
    return value


def object_of(
    content: dict[str, Any], name: str, required: tuple[str, ...], optional: tuple[str, ...] = ()
) -> dict[str, Any]:
    """An object with all of the `required` fields, and none but these and the `optional`."""
    value: dict[str, Any] = of_type(content, name, dict)
    unknown, missing = sorted(set(value) - {*required, *optional}), sorted(set(required) - set(value))
    if unknown or missing:
        raise ValueError(f"{name} has unknown fields {reprlib.repr(unknown)}, and lacks {missing}")
    return value


def without_lone_surrogates(text: str) -> str:
    """Text that UTF-8 can hold: surrogate pairs joined, lone surrogates replaced by U+FFFD."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")
    return text
