"""One text split into several documents: by line, by paragraph, or by heading."""

from __future__ import annotations

import re
from collections.abc import Iterator

from ..arguments import shown
from ..errors import DatastoreInputError


SPLITS = ("line", "paragraph", "heading")
_HEADING = re.compile(r" {0,3}#{1,6}[ \t]+(.*?)[ \t#]*$")
_UNDERLINE = re.compile(r"(={3,}|-{3,})\s*$")
_FENCE = re.compile(r" {0,3}(```|~~~)")


def check_split(split: str | None) -> None:
    """Raise DatastoreInputError unless it is None or one of `SPLITS`."""
    if split is not None and not (isinstance(split, str) and split in SPLITS):
        raise DatastoreInputError(f"split is {shown(split)}. Pass one of {', '.join(map(repr, SPLITS))}, or None.")


def split_text(text: str, split: str) -> Iterator[tuple[int, str, str]]:
    """Split a text into several.

    Args:
        split (`str`): `"line"`; `"paragraph"`, which ends with a blank line; or `"heading"`, which begins a part (`# …` of
            Markdown outside of code, or a line that is underlined with `===` or `---`).
    Returns:
        For each part that is not blank the number of its first line, from 1, its heading or an empty text, and its text.
    """
    lines = text.split("\n")
    headings = _headings(lines) if split == "heading" else {}
    start, has_text, title = 0, False, ""
    for number, line in enumerate([*lines, ""]):
        is_end = number == len(lines)
        heading = headings.get(number)
        # A heading right below another one belongs to the same part.
        begins = split == "line" or (split == "paragraph" and not line.strip()) or (bool(heading) and has_text)
        if is_end or begins:
            part = lines[start:number]
            first = next((place for place, one in enumerate(part) if one.strip()), None)
            if first is not None:
                yield start + first + 1, title, "\n".join(part[first:]).rstrip()
            start, has_text = number, False
        title = heading or title
        has_text |= bool(line.strip()) and number not in headings


def _headings(lines: list[str]) -> dict[int, str]:
    """The lines that make headings, and what they say; empty for the line below a heading that underlines it."""
    found: dict[int, str] = {}
    fence = ""
    for number, line in enumerate(lines):
        if mark := _FENCE.match(line):
            fence = "" if mark[1] == fence else fence or mark[1]
        if fence:
            continue
        if marked := _HEADING.match(line):
            found[number] = marked[1].strip() or line.strip()
        elif number and _UNDERLINE.match(line) and lines[number - 1].strip() and number - 1 not in found:
            # The last line of a longer paragraph, or of a table, is none.
            if number == 1 or not lines[number - 2].strip() or number - 2 in found:
                found[number - 1], found[number] = lines[number - 1].strip(), ""
    return found
