"""Answer a question from a datastore, and say which passages were read."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from . import arguments, special_tokens
from .datastore.chunks import padded
from .datastore.compatibility import is_copy
from .datastore.documents import without_lone_surrogates
from .errors import RetrieverError
from .model.configuration_retro import RetroConfig
from .model.modeling_retro import RetroForCausalLM
from .model.readers_retro import traits_of
from .passages import Passage, find_passages
from .prompts import (
    checked_prompt,
    is_chat,
    reading_start,
    write_passage,
    write_question,
    write_question_as_chat,
)
from .retriever import RetroRetriever
from .unwrapped import unwrapped


Message = Mapping[str, str]
_MOST_TOKENS = 1 << 20


@dataclass(frozen=True)
class Answer:
    """A generated answer and what was read for it.

    Attributes:
        text (`str`): the answer.
        sources (`list[Passage]`): the passages that the model read, best first.
    """

    text: str
    sources: list[Passage]

    def __str__(self) -> str:
        return self.text


@dataclass(frozen=True)
class Question:
    """A question that is ready for `model.generate(**question.inputs)`.

    Attributes:
        inputs (`dict`): `input_ids` and `attention_mask` of shape `(1, prompt_length)`, `neighbor_input_ids` and
            `neighbor_attention_mask` of shape `(1, num_chunks, num_passages, neighbor_size)`, `chunk_offset` of shape `(1,)`,
            and `retriever=None`. All int64, on the model's device.
        sources (`list[Passage]`): the passages in the neighbors.
        num_tokens (`int`): tokens of the prompt; what is generated follows them.
    """

    inputs: dict[str, Any]
    sources: list[Passage]
    num_tokens: int


def answer(
    model: RetroForCausalLM,
    retriever: RetroRetriever,
    question: str | Sequence[Message],
    *,
    query: str | None = None,
    prompt: str | None = None,
    num_passages: int | None = None,
    max_new_tokens: int = 64,
    **options: Any,
) -> Answer:
    """Look a question up, let the model read the passages, and generate an answer.

    The whole question is looked up once, and the model reads the same passages to the end of its answer. A model with
    `reader="parallel_context"` reads them from the first token of the question on; it is asked through the chat template of
    the tokenizer, if there is one. A model with the paper's reader is asked as in section 4.3, which is how
    [`QuestionCollator`] trains it: the question ends a chunk, and the answer reads the passages.

    Args:
        model ([`RetroForCausalLM`]): with either reader; PEFT may have wrapped it with LoRA.
        retriever ([`RetroRetriever`]): where to look. Its tokenizer must be the model's.
        question (`str` or a list of messages): a text, or a chat as `[{"role": "user", "content": ...}]`, whose last message
            is the question.
        query (`str`, *optional*): what to look up; by default the question.
        prompt (`str`, *optional*): how the question is written, with `{question}` in it, instead of a chat.
        num_passages (`int`, *optional*): passages to read; by default the retriever's `num_neighbors`.
        max_new_tokens (`int`, defaults to 64): longest answer, in tokens.
        options: for [`~transformers.GenerationMixin.generate`]. Without any, the answer is the most likely one, token by
            token (`do_sample=False`).
    Returns:
        [`Answer`]: its text, and the passages that were read.
    Raises:
        RetrieverError: if the question is empty, or the retriever is not a [`RetroRetriever`], or its tokenizer is the
            datastore's copy, whose chat template is not used.
    """
    model = unwrapped(model)
    asked = prepare_question(
        model,
        retriever,
        question,
        query=query,
        prompt=prompt,
        num_passages=num_passages,
        max_new_tokens=max_new_tokens,
    )
    options = {"do_sample": False, **options}
    sequences = model.generate(**asked.inputs, **options, max_new_tokens=max_new_tokens, return_dict_in_generate=False)
    text = str(retriever.tokenizer.decode(sequences[0, asked.num_tokens :], skip_special_tokens=True))
    return Answer(text=text.strip(), sources=asked.sources)


def prepare_question(
    model: RetroForCausalLM,
    retriever: RetroRetriever,
    question: str | Sequence[Message],
    *,
    query: str | None = None,
    prompt: str | None = None,
    num_passages: int | None = None,
    max_new_tokens: int = 64,
) -> Question:
    """Look a question up and make the inputs of `generate`, for callers that generate themselves, such as a server.

    Args:
        model, retriever, question, query, prompt, num_passages, max_new_tokens: as in [`answer`].
    Returns:
        [`Question`].
    Raises:
        RetrieverError: as in [`answer`].
    """
    if not isinstance(retriever, RetroRetriever):
        raise RetrieverError(
            f"The retriever is of type {type(retriever).__name__}. Questions are looked up as text, which needs a RetroRetriever."
        )
    model = unwrapped(model)
    if not isinstance(model, RetroForCausalLM):
        raise RetrieverError(
            f"The model is a {type(model).__name__}, which reads no passages. Make it read them: "
            "`retrofit(model, reader='parallel_context')`."
        )
    max_new_tokens = arguments.whole("max_new_tokens", max_new_tokens, RetrieverError, most=_MOST_TOKENS)
    if query is not None and not isinstance(query, str):
        raise RetrieverError(f"query is of type {type(query).__name__}. Pass a text, or None.")
    prompt = checked_prompt(prompt, RetrieverError)
    messages = _checked_messages(question)
    asked = messages[-1]["content"].strip()
    config, tokenizer = model.config, retriever.tokenizer
    if prompt is None and traits_of(config.reader).reads_question and is_copy(tokenizer, retriever.datastore):
        raise RetrieverError(
            "The tokenizer is the datastore's copy, whose chat template is not used, since whoever made the datastore wrote "
            "it. Give the retriever the model's own: `RetroRetriever(..., tokenizer=)`. Or say how to ask: `prompt=`."
        )
    if is_chat(tokenizer, config.reader, prompt):
        tokens, question_start = write_question_as_chat(tokenizer, messages)
    else:
        if len(messages) > 1:
            raise RetrieverError(
                f"The chat has {len(messages)} messages, but this model is asked one question without a chat template. Pass "
                "the question as a text."
            )
        text = write_question(tokenizer, config.reader, prompt, asked)
        tokens, question_start = special_tokens.tokenize_prompt(tokenizer, text, asked)
    input_ids = torch.tensor([tokens])
    length = len(tokens)
    limit = config.max_position_embeddings
    if limit is not None and length + max_new_tokens > limit:
        raise RetrieverError(
            f"The prompt with the question has {length:,} tokens, and the answer may have {max_new_tokens:,}, but the context of "
            f"the model ends at {limit:,}. Shorten the question, or lower `max_new_tokens`."
        )

    (sources,) = find_passages(retriever, [asked if query is None else query], num_passages)
    inputs = {"input_ids": input_ids, "attention_mask": torch.ones_like(input_ids)} | passage_inputs(
        config, tokenizer, sources, num_tokens=length, question_start=question_start, max_new_tokens=max_new_tokens
    )
    inputs = {name: values.to(model.device) for name, values in inputs.items()}
    return Question(inputs | {"retriever": None}, sources, length)


def passage_inputs(
    config: RetroConfig,
    tokenizer: PreTrainedTokenizerBase,
    sources: Sequence[Passage],
    *,
    num_tokens: int,
    question_start: int,
    max_new_tokens: int,
) -> dict[str, torch.Tensor]:
    """The passages as neighbors that a model reads from a question on to the end of its answer.

    Args:
        config ([`RetroConfig`]): of the model.
        tokenizer (`PreTrainedTokenizerBase`): of the model.
        sources (`Sequence[Passage]`): what to read.
        num_tokens (`int`): tokens of the prompt.
        question_start (`int`): the prompt's token that the question begins with. The paper's reader begins after the prompt.
        max_new_tokens (`int`): longest answer, in tokens.
    Returns:
        `neighbor_input_ids` and `neighbor_attention_mask` of shape `(1, num_chunks, num_passages, neighbor_size)`, and
        `chunk_offset` of shape `(1,)`; all int64.
    """
    texts = [write_passage(config.reader, source.title, source.text) for source in sources]
    rows = special_tokens.tokenize_texts(tokenizer, texts)[0] or [[]]  # one masked row without any
    ids, mask = map(torch.from_numpy, padded(rows, config.neighbor_size))  # type: ignore[arg-type]  # a config has it
    # The chunk that ends right before `start` is the first one with neighbors; its last token reads them, too. With chunks
    # of 8 and a question that starts at token 13, the offset is 3: chunk 0 has tokens 0 to 4, chunk 1 has tokens 5 to 12.
    start = reading_start(config.reader, question_start, num_tokens)
    offset = -start % config.chunk_size
    chunks = torch.arange((offset + num_tokens + max_new_tokens) // config.chunk_size + 1)
    reads = (chunks >= (offset + start) // config.chunk_size - 1)[None, :, None, None]
    return {
        "neighbor_input_ids": torch.where(reads, ids, 0),
        "neighbor_attention_mask": torch.where(reads, mask, 0),
        "chunk_offset": torch.tensor([offset]),
    }


def _checked_messages(question: str | Sequence[Message]) -> list[dict[str, str]]:
    """A chat whose last message is the question; raises RetrieverError for anything else."""
    messages = [{"role": "user", "content": question}] if isinstance(question, str) else question
    if not isinstance(messages, Sequence) or not all(
        isinstance(one, Mapping) and isinstance(one.get("content"), str) and isinstance(one.get("role"), str)
        for one in messages
    ):
        raise RetrieverError(
            f"The question is of type {type(question).__name__}. Pass a text, or a list of messages such as "
            "[{'role': 'user', 'content': 'Who founded the library?'}]."
        )
    if not messages or messages[-1]["role"] != "user" or not messages[-1]["content"].strip():
        raise RetrieverError("There is no question. The last message must be the user's, with at least one word.")
    return [dict(one) | {"content": without_lone_surrogates(one["content"])} for one in messages]
