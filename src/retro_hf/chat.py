"""Find the last turn of the user in a prompt that a chat template has made."""

from __future__ import annotations

import os.path
from typing import Any

from transformers import PreTrainedTokenizerBase
from transformers.utils import logging


logger = logging.get_logger(__name__)

__all__ = ["chat_markers", "last_user_turn"]

_TURNS = ("first question", "first answer", "second question")


def chat_markers(tokenizer: PreTrainedTokenizerBase) -> tuple[str, str] | None:
    """The texts that a tokenizer's chat template writes before and after a turn of the user; None if they are not clear."""
    if not getattr(tokenizer, "chat_template", None):
        return None
    roles = ("user", "assistant", "user")
    messages: Any = [{"role": role, "content": turn} for role, turn in zip(roles, _TURNS, strict=True)]
    try:
        text, finished = (
            str(tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=asks))
            for asks in (True, False)
        )
    except Exception as error:  # a template is a program of its author, which may raise anything
        logger.warning_once(
            f"The chat template failed on a plain conversation ({error}), so user turns are not found."
        )
        return None
    parts: list[str] = []
    for turn in _TURNS:
        part, found, text = text.partition(turn)
        if not found:
            return None
        parts.append(part)
    # What comes before a first turn may begin with a system prompt, and what comes after a turn may begin another one.
    before = os.path.commonprefix([parts[0][::-1], parts[2][::-1]])[::-1]
    after = os.path.commonprefix([parts[1], text])
    # A prompt may also end with the turn itself, before the answer is asked for.
    after = os.path.commonprefix([after, finished.rpartition(_TURNS[-1])[2]]).strip() or after
    return (before, after) if before.strip() and after.strip() else None


def last_user_turn(prompt: str, before: str, after: str) -> tuple[str, int] | None:
    """The text between the last `before` and the `after` that follows it, and where it begins; None if there is none.

    Args:
        prompt (`str`): the decoded prompt, special tokens included.
        before, after (`str`): see [`chat_markers`].
    Returns:
        The turn, without white space at its ends, and the index of its first character in `prompt`.
    """
    start, found, rest = prompt.rpartition(before.strip())
    turn, ended, _ = rest.partition(after.strip())
    if not (found and ended and turn.strip()):
        return None
    return turn.strip(), len(start) + len(found) + turn.index(turn.strip())
