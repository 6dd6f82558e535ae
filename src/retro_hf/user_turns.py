"""Find the last turn of the user in a prompt that a chat template has made."""

from __future__ import annotations

import os.path
from typing import Any

from transformers import PreTrainedTokenizerBase
from transformers.utils import logging

from .special_tokens import special_ids


logger = logging.get_logger(__name__)

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


def user_turns(
    tokenizer: PreTrainedTokenizerBase, prompts: list[list[int]], *, is_copy: bool = False
) -> list[tuple[str, int] | None]:
    """The last turn of the user in each prompt, and how many tokens come before it; None for a prompt that is not a chat.

    Args:
        tokenizer (`PreTrainedTokenizerBase`): that wrote the prompts.
        prompts (`list[list[int]]`): token ids, without padding.
        is_copy (`bool`): whether it is a datastore's copy, which has no chat template.
    """
    markers = chat_markers(tokenizer)
    if markers is None:
        special = special_ids(tokenizer) - {tokenizer.bos_token_id}
        if is_copy and any(not special.isdisjoint(prompt) for prompt in prompts):
            logger.warning_once(
                "The prompt has special tokens, as a chat has, but the user's turn is not found in it: the tokenizer is the "
                "datastore's copy, whose chat template is not used. Pass the model's own: `RetroRetriever(..., tokenizer=)`."
            )
        return [None] * len(prompts)
    turns: list[tuple[str, int] | None] = []
    for ids in prompts:
        prompt = str(tokenizer.decode(ids))
        turn = last_user_turn(prompt, *markers)
        if turn is not None:
            turn = turn[0], len(tokenizer(prompt[: turn[1]], add_special_tokens=False)["input_ids"])
        turns.append(turn)
    return turns
