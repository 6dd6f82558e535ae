"""The words of a text, for search by words: of scripts with spaces and without."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Callable, Iterator, Sequence

import regex

from .. import extras


WORDS_VERSION = 2
"""Of the rule below. An index of words records it, and keeps its own."""

Words = Callable[[Sequence[str]], list[list[str]]]

# Written without spaces, one character for a syllable or a word. Korean has spaces, but between phrases.
_SYLLABLES = r"\p{Han}\p{Hiragana}\p{Katakana}\p{Hangul}\u30fc"
# Alphabets that are written without spaces.
_LETTERS = r"\p{Thai}\p{Lao}\p{Khmer}\p{Myanmar}"
# Marks are parts of letters, as the vowels of Hindi, and joiners are parts of words.
_RUNS = regex.compile(
    rf"(?V1)(?P<syllables>[{_SYLLABLES}]+)|(?P<letters>[{_LETTERS}]+)"
    rf"|(?P<word>[[\p{{L}}\p{{N}}\p{{M}}_\u200c\u200d]--[{_SYLLABLES}{_LETTERS}]]{{2,}})"
)
_ASCII_WORD = re.compile(r"\w\w+")
_GRAMS = {"syllables": (1, 2), "letters": (2, 3)}


def words_function(version: int) -> Words:
    """How an index of words finds the words of texts; the same for chunks and queries."""
    return _words_of_bm25s if version == 1 else _words


def _words_of_bm25s(texts: Sequence[str]) -> list[list[str]]:
    """The first rule: runs of two or more letters or digits, in lower case."""
    bm25s = extras.load("bm25s", "Search by words")
    return bm25s.tokenize(list(texts), stopwords=None, return_ids=False, show_progress=False)


def _words(texts: Sequence[str]) -> list[list[str]]:
    """Runs of two or more letters or digits, folded to one case and width.

    Of scripts that put no spaces between words, every character and pair of characters (Chinese, Japanese, Korean) or every
    two and three letters in a row (Thai, Lao, Khmer, Burmese): a word of the query is found wherever it is.
    """
    return [list(_words_in(text)) for text in texts]


def _words_in(text: str) -> Iterator[str]:
    if text.isascii():  # the same rule, several times as fast
        yield from _ASCII_WORD.findall(text.lower())
        return
    text = unicodedata.normalize("NFKC", text).casefold()
    for match in _RUNS.finditer(text):
        run, sizes = match[0], _GRAMS.get(match.lastgroup or "")
        if sizes is None:
            yield run
            continue
        for size in sizes:
            yield from (run[start : start + size] for start in range(len(run) - size + 1))
