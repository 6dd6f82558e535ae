"""The text of a web page, as a browser would show it."""

from __future__ import annotations

import html
import re


_UNSEEN = frozenset(("noscript", "script", "style", "svg", "template"))
_RAW = {name: re.compile(rf"</{name}(?=[\s/>])", re.IGNORECASE) for name in ("script", "style")}
_HEADINGS = ("h1", "h2", "h3", "h4", "h5", "h6")
_BLOCKS = frozenset(
    "address article aside blockquote body br dd details div dl dt fieldset figcaption figure footer form header hr li main nav "
    "ol option p pre section summary table title tr ul".split()
).union(_HEADINGS)
# What begins with `<` and is no text: a comment, a tag, or something else that browsers take for a comment.
_MARKUP = re.compile(r"<(?:!--|(?P<end>/?)(?P<tag>[a-zA-Z][^\s/>]*)|[!?/])")
# The rest of a tag. What follows `=` may have `>` in quotes. Nothing is tried twice, however the quotes stand.
_REST = re.compile(r"""(?:=\s*+(?:"[^"]*+"|'[^']*+')|[^>])*+>""")
# Python refuses to read so many digits.
_NO_CHARACTER = re.compile(r"&#(?:[0-9]{99,}|[xX][0-9a-fA-F]{99,});?")


def read_page(content: str) -> tuple[str, str | None]:
    """What a browser would show of a page, and its title on one line, None without one.

    There is one line per block, and headings are marked with `#` as in Markdown. The time is linear in the length, whatever the
    content is; the parser of Python needs the square of it for tags that do not end.
    """
    page = _Page()
    place = 0
    while markup := _MARKUP.search(content, place):
        page.add(content[place : markup.start()])
        tag = (markup["tag"] or "").lower()
        if not tag:
            ending = "-->" if markup.group() == "<!--" else ">"
            found = content.find(ending, markup.start() + 2)
            if found < 0:  # nothing is shown from here on
                break
            place = found + len(ending)
            continue
        rest = _REST.match(content, markup.end())
        if rest is None:  # a tag that does not end is none
            page.add(content[markup.start() :])
            break
        place = rest.end()
        if markup["end"]:
            page.end(tag)
        else:
            is_empty = content[place - 2] == "/"
            page.begin(tag, is_empty)
            if tag in _RAW and not is_empty:
                raw = _RAW[tag].search(content, place)
                place = raw.start() if raw else len(content)
    else:
        page.add(content[place:])
    lines = (" ".join(line.split()) for line in "".join(page.parts).split("\n"))
    return "\n".join(line for line in lines if line.strip("# ")), " ".join("".join(page.title).split()) or None


class _Page:
    """Collects the text: `parts` with a line break before each block, the `title`, and in which `unseen` tag it is."""

    def __init__(self) -> None:
        self.parts: list[str] = []
        self.title: list[str] = []
        self.unseen: str | None = None  # the outermost tag whose content is not shown
        self._in_title = False

    def begin(self, tag: str, is_empty: bool) -> None:
        """Begin a line, or what is not shown; nothing is inside of an empty tag."""
        if not is_empty:
            self._in_title = tag == "title" and self.unseen != "svg"
        if tag in _UNSEEN and not is_empty:
            self.unseen = self.unseen or tag
        elif tag in _BLOCKS and not self.unseen:
            self.parts.append("\n" + "#" * int(tag[1]) + " " if tag in _HEADINGS and not is_empty else "\n")
        elif tag in ("td", "th") and not is_empty:
            self.add(" ")

    def end(self, tag: str) -> None:
        """End a line, or what is not shown."""
        self._in_title = False
        if tag == self.unseen:
            self.unseen = None
        elif tag in _BLOCKS and not self.unseen:
            self.parts.append("\n")

    def add(self, content: str) -> None:
        """Add text to the line or the title."""
        if content and (self._in_title or not self.unseen):
            text = html.unescape(_NO_CHARACTER.sub("\ufffd", content)) if "&" in content else content
            (self.title if self._in_title else self.parts).append(text.replace("\n", " "))
