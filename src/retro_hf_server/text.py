"""Turn tokens into text while they are generated, and end the text at a stop word."""

from typing import Any


class TextStream:
    """
    Decodes tokens one by one. A character of several tokens comes with its last token.

    Args:
        tokenizer (`PreTrainedTokenizerBase`): of the model.
        stop (`tuple[str]`): stop words. They are not part of the text.

    Attributes:
        ids (`list[int]`): the tokens so far.
        length (`int`): characters that the tokens so far stand for.
        stopped (`bool`): whether a stop word was found.
    """

    def __init__(self, tokenizer: Any, stop: tuple[str, ...] = ()) -> None:
        self.ids: list[int] = []
        self.length = 0
        self.stopped = False
        self._tokenizer = tokenizer
        self._stop = stop
        self._held = ""  # may be the beginning of a stop word
        # Tokens from `_first` on are decoded together, since a token alone may lose its space; those before `_read` are shown.
        self._first = self._read = 0

    def add(self, token: int) -> str:
        """Add a token and return the text that can be shown now."""
        self.ids.append(token)
        known, now = self._decoded(self._read), self._decoded(len(self.ids))
        # An unfinished character is shown as U+FFFD; the next token may complete it.
        if now.endswith("�") or len(now) <= len(known):
            return ""
        self._first, self._read = self._read, len(self.ids)
        return self._passed(now[len(known) :])

    def finish(self) -> str:
        """Return the text that was held back, after the last token."""
        rest = self._passed(self._decoded(len(self.ids))[len(self._decoded(self._read)) :])
        held, self._held = self._held, ""
        return rest + held

    def _decoded(self, end: int) -> str:
        return self._tokenizer.decode(self.ids[self._first : end], skip_special_tokens=True)

    def _passed(self, text: str) -> str:
        """The part of the held and the new text that no stop word can reach."""
        if self.stopped:
            return ""
        self.length += len(text)
        text, self._held = self._held + text, ""
        places = [place for place in (text.find(word) for word in self._stop) if place >= 0]
        if places:
            self.stopped = True
            self.length -= len(text) - min(places)
            return text[: min(places)]
        # The longest end of the text that a stop word begins with: with the stop word "User:", "the Use" keeps "Use" back.
        sizes = range(1, max(map(len, self._stop), default=0))
        held = max((n for n in sizes if any(word.startswith(text[-n:]) for word in self._stop)), default=0)
        cut = len(text) - min(held, len(text))
        self._held = text[cut:]
        return text[:cut]
