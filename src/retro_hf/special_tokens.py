"""Texts that others wrote, as tokens: what is written like a special token in them, such as `<|im_end|>`, stays text.

A document or a message must not end a turn, begin one of the system, or end the answer. So a special token is made only
where this package or the chat template writes one, never from a text. A text that has its name is cut in the middle of the
name, and both parts are tokenized by themselves: `"a<|im_end|>b"` becomes the tokens of `"a<|im_"` and of `"end|>b"`. All
other texts have the tokens that the tokenizer gives them.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any
from weakref import WeakKeyDictionary

from transformers import PreTrainedTokenizerBase
from transformers.utils import logging

from .arguments import check_tokenizer


logger = logging.get_logger(__name__)

# Stands for a cut in a text, from where it is found to where it is tokenized. Unicode keeps this character for uses inside
# of a program, so texts have no reason to have it.
_CUT = "\ufdd0"
_ROLES = ("system", "user", "assistant", "user")
# By tokenizer: what may have changed since, and the ids.
_known: WeakKeyDictionary[Any, tuple[Any, frozenset[int]]] = WeakKeyDictionary()

Span = tuple[int, int]


def special_ids(tokenizer: PreTrainedTokenizerBase) -> frozenset[int]:
    """The token ids that no text may contain.

    These are the special tokens of the tokenizer and those added tokens that its chat template writes around a turn. A token
    of one character, such as a line end that was made the end token, is not among them: it cannot be told from text. Nor is
    one that the tokenizer gives for unknown words.
    """
    added: Mapping[int, Any] = getattr(tokenizer, "added_tokens_decoder", {})
    named = frozenset(tokenizer.all_special_ids)
    state = (tokenizer.chat_template, len(added), named)
    known = _known.get(tokenizer)
    if known is None or known[0] != state:
        marks = {id for id in _template_ids(tokenizer) if id in added}
        ids = {id for id, token in added.items() if token.special} | named | marks
        ids = {id for id in ids if len(_name(tokenizer, id)) > 1} - _unknown_ids(tokenizer)
        _known[tokenizer] = known = (state, frozenset(ids))
    return known[1]


def _template_ids(tokenizer: PreTrainedTokenizerBase) -> set[int]:
    """The tokens of a plain conversation."""
    messages: Any = [{"role": role, "content": "a"} for role in _ROLES]
    for turns in (messages, messages[1:]) if tokenizer.chat_template else ():
        try:
            text = tokenizer.apply_chat_template(turns, tokenize=False)
        except Exception:  # noqa: S112 - a template is a program of its author; some refuse the role "system"
            continue
        return set(tokenizer(str(text), add_special_tokens=False)["input_ids"])
    return set()


def _unknown_ids(tokenizer: PreTrainedTokenizerBase) -> set[int | None]:
    """The id of unknown words, where texts can have such."""
    model = getattr(getattr(tokenizer, "backend_tokenizer", None), "model", None)
    gives = model is None or type(model).__name__ == "Unigram" or getattr(model, "unk_token", None) is not None
    return {tokenizer.unk_token_id} if gives else set()


def _name(tokenizer: PreTrainedTokenizerBase, id: int) -> str:
    return str(tokenizer.convert_ids_to_tokens(id)).strip()


def tokenize_texts(
    tokenizer: PreTrainedTokenizerBase, texts: Sequence[str]
) -> tuple[list[list[int]], list[list[Span]] | None]:
    """The tokens of texts, none of them a special one.

    Args:
        tokenizer (`PreTrainedTokenizerBase`): any tokenizer.
        texts (`Sequence[str]`): of any length.
    Returns:
        For each text its token ids, and where each token is in it: the first character and the one after the last. A
        tokenizer that is not a fast one does not know the places; then they are None.
    """
    ids, spans = _tokenize(tokenizer, texts)
    special = special_ids(tokenizer)
    for row, text in enumerate(texts):
        if special.isdisjoint(ids[row]):
            continue
        starts, parts = zip(*_parts(tokenizer, text, special), strict=True)
        part_ids, part_spans = _tokenize(tokenizer, parts)
        ids[row] = [id for part in part_ids for id in part]
        if spans is not None and part_spans is not None:
            spans[row] = [
                (start + first, start + end)
                for start, part in zip(starts, part_spans, strict=True)
                for first, end in part
            ]
    return ids, spans


def mark(tokenizer: PreTrainedTokenizerBase, text: str) -> str:
    """A text to be written into a prompt for [`tokenize_marked`], with marks where it must be cut."""
    text = text.replace(_CUT, "")
    return _CUT.join(part for _, part in _parts(tokenizer, text, special_ids(tokenizer)))


def tokenize_marked(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str]) -> list[list[int]]:
    """The tokens of prompts: special tokens where they are written, but not in the texts that [`mark`] has marked."""
    parts = [text.split(_CUT) for text in texts]
    tokens = iter(_tokenize(tokenizer, [one for text in parts for one in text])[0])
    return [[token for _ in text for token in next(tokens)] for text in parts]


def write_chat(
    tokenizer: PreTrainedTokenizerBase, messages: Sequence[Mapping[str, Any]], question: str
) -> tuple[list[int], int]:
    """A conversation as the chat template writes it, up to the place of the answer. No message can write a special token.

    Args:
        tokenizer (`PreTrainedTokenizerBase`): with a chat template.
        messages (`Sequence[Mapping]`): each with a `role` and a `content`.
        question (`str`): a part of the last message of the user.
    Returns:
        The token ids, and the token that the question begins with; 0 if it is not found.
    """

    def marked(value: Any) -> Any:
        if isinstance(value, str):
            return mark(tokenizer, value)
        if isinstance(value, Mapping):
            return {key: marked(one) for key, one in value.items()}
        return [marked(one) for one in value] if isinstance(value, (list, tuple)) else value

    text = str(tokenizer.apply_chat_template(marked(messages), tokenize=False, add_generation_prompt=True))
    return tokenize_prompt(tokenizer, text, question)


def tokenize_prompt(tokenizer: PreTrainedTokenizerBase, text: str, question: str) -> tuple[list[int], int]:
    """The tokens of a prompt with marked parts, and the token that the question in it begins with; 0 if it is not found."""
    # The last place: earlier turns may have the same words. Without one, as in a template that changes them, every token reads.
    before = text[: max(text.rfind(mark(tokenizer, question)), 0)]
    tokens, first = tokenize_marked(tokenizer, [text, before])
    return tokens, len(first)


def _tokenize(tokenizer: Any, texts: Sequence[str]) -> tuple[list[list[int]], list[list[Span]] | None]:
    check_tokenizer(tokenizer, ValueError)
    if not texts:
        return [], [] if tokenizer.is_fast else None
    encoded = tokenizer(
        list(texts),
        add_special_tokens=False,
        padding=False,
        truncation=False,
        return_attention_mask=False,
        return_token_type_ids=False,
        return_offsets_mapping=tokenizer.is_fast,
        verbose=False,
    )
    return encoded["input_ids"], encoded.get("offset_mapping")


def _parts(tokenizer: PreTrainedTokenizerBase, text: str, special: frozenset[int]) -> list[tuple[int, str]]:
    """A text in parts that have no special token when each is tokenized by itself, and where each begins."""
    done: list[tuple[int, str]] = []
    todo = [(0, text)]
    while todo:
        ids, spans = _tokenize(tokenizer, [part for _, part in todo])
        again: list[tuple[int, str]] = []
        for place, (start, part) in enumerate(todo):
            if special.isdisjoint(ids[place]):
                done.append((start, part))
                continue
            if spans is None:
                names = "|".join(re.escape(_name(tokenizer, id)) for id in ids[place] if id in special)
                found = [match.span() for match in re.finditer(names, part)]
            else:
                found = [span for id, span in zip(ids[place], spans[place], strict=True) if id in special]
            _tell(part, found)
            cuts = [0, *(cut for span in found for cut in _cuts(part, span)), len(part)]
            pieces = [(start + first, part[first:end]) for first, end in zip(cuts[::2], cuts[1::2], strict=True)]
            # Pieces are shorter than what they were cut from, so this ends.
            is_cut = all(len(piece) < len(part) for _, piece in pieces)
            (again if is_cut else done).extend(pieces)
        todo = again
    return sorted(done)


def _cuts(text: str, span: Span) -> Span:
    """Where the part before a special token ends and the next one begins: in its middle, spaces around it not counted."""
    name = text[slice(*span)]
    first = span[0] + len(name) - len(name.lstrip())
    length = len(name.strip())
    # What is one character, or nothing, can only be left out.
    return (first + length // 2,) * 2 if length > 1 else span


def _tell(text: str, found: Sequence[Span]) -> None:
    for span in found[:1]:
        logger.warning_once(
            f"A text has {text[slice(*span)]!r} in it, which is the name of a special token. It is read as text."
        )
