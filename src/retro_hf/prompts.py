"""How a question and its passages are written for a model: the same when it is trained and when it is asked."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from transformers import PreTrainedTokenizerBase

from .arguments import shown
from .model.readers_retro import traits_of
from .special_tokens import mark, write_chat


PROMPT = "question: {question} \n answer:"
"""What the paper writes before an answer (section 4.3)."""
INSTRUCTION = "Answer the question in one short sentence."
"""The system message of a chat that has none."""
_PASSAGE = "title: {title}, source: {text}"
# A base that reads by itself answers much better if this stands before a passage (measured in docs/results/questions.md).
# Without it, the beginning of a title has no text before it, and its first token is not read at all.
_INTRODUCTION = "Read this text.\n\n"


def checked_prompt(prompt: str | None, error: type[Exception]) -> str | None:
    """How a question is to be written, or None for the default; `error` if it is not a text with `{question}` in it."""
    if prompt is not None and (not isinstance(prompt, str) or "{question}" not in prompt):
        raise error(f"The prompt {shown(prompt)} has no place for the question. Write it as {{question}}.")
    return prompt


def is_chat(tokenizer: PreTrainedTokenizerBase, reader: str, prompt: str | None) -> bool:
    """Whether a question is asked through the chat template: by default, if the base itself reads and has a template."""
    return prompt is None and traits_of(reader).reads_question and bool(tokenizer.chat_template)


def write_question_as_chat(
    tokenizer: PreTrainedTokenizerBase, messages: Sequence[Mapping[str, str]]
) -> tuple[list[int], int]:
    """A chat whose last message is the question, as the tokenizer's template writes it.

    Args:
        tokenizer (`PreTrainedTokenizerBase`): with a chat template.
        messages (`Sequence[Mapping]`): each with a `role` and a `content`. One of the system is put first if there is none.
    Returns:
        The token ids up to the place of the answer, and the token that the question begins with.
    """
    if messages[0]["role"] != "system":
        messages = [{"role": "system", "content": INSTRUCTION}, *messages]
    return write_chat(tokenizer, messages, messages[-1]["content"].strip())


def write_question(tokenizer: PreTrainedTokenizerBase, reader: str, prompt: str | None, question: str) -> str:
    """A question without a chat, by default as the paper writes it; for [`~special_tokens.tokenize_marked`].

    Args:
        tokenizer (`PreTrainedTokenizerBase`): of the model.
        reader (`str`): of the model. The paper's reader is trained on text without a token at its beginning.
        prompt (`str`, *optional*): checked by [`checked_prompt`].
        question (`str`): a text.
    """
    begin = (tokenizer.bos_token or "") if traits_of(reader).reads_question else ""
    return begin + (prompt or PROMPT).replace("{question}", mark(tokenizer, question))


def reading_start(reader: str, question_start: int, num_tokens: int) -> int:
    """The first token of a text that passages are given to; the token before it reads them, too.

    Args:
        reader (`str`): of the model. The paper's reader begins to read where the answer begins.
        question_start (`int`): the prompt's token that the question begins with.
        num_tokens (`int`): tokens of the prompt.
    """
    return max(question_start, 1) if traits_of(reader).reads_question else num_tokens


def write_passage(reader: str, title: str, text: str) -> str:
    """A passage as the paper writes it (section 4.3), on one line; for a base that reads by itself, after an introduction."""
    if traits_of(reader).reads_question:
        return _INTRODUCTION + (f"{title}: {text}" if title else text)
    return " ".join(_PASSAGE.format(title=title, text=text).split())
