"""Turn a request into tokens: the chat template, the room in the context, and the model's own settings for sampling."""

from __future__ import annotations

import threading
from typing import Any

from jinja2 import TemplateError

from retro_hf.special_tokens import write_chat

from .engine import Engine
from .jobs import Sampling
from .readers import Prompt
from .requests import ChatRequest, CompletionRequest, RequestError


# Tokens of an answer where neither the request nor the context says.
_DEFAULT_TOKENS = 512


class Prompts:
    """
    Makes prompts for the model of an engine.

    Args:
        engine ([`Engine`]): it has the model and the tokenizer.
        max_tokens (`int`): that an answer may have.
    """

    def __init__(self, engine: Engine, max_tokens: int) -> None:
        self._tokenizer = engine.tokenizer
        self._room = engine.context_size
        self._max_tokens = max_tokens
        self._lock = threading.Lock()  # a fast tokenizer must not be used and changed at the same time
        own = engine.model.generation_config
        self._defaults: dict[str, Any] = {"temperature": 0.0, "top_p": 1.0, "top_k": 0}
        if own.do_sample:
            named = {name: getattr(own, name, None) for name in self._defaults}
            self._defaults |= {"temperature": 1.0} | {
                name: value for name, value in named.items() if value is not None
            }

    @property
    def has_chat(self) -> bool:
        """Whether the model has a chat template."""
        return bool(self._tokenizer.chat_template)

    def of(self, asked: ChatRequest | CompletionRequest) -> tuple[Prompt, Sampling]:
        """The prompt, and how to sample."""
        prompt = self.prompt(asked.question, asked.query)
        length = len(prompt.tokens)
        room = self._max_tokens if self._room is None else self._room - length
        wanted = asked.wanted_tokens
        if room < 1 or (wanted is not None and self._room is not None and wanted > room):
            asked_for = f" and {wanted:,} for the answer" if wanted is not None else ""
            raise RequestError(
                f"The model has room for {self._room:,} tokens, but the prompt has {length:,}{asked_for}. Shorten the "
                "prompt, or ask for fewer tokens.",
                param="messages" if isinstance(asked, ChatRequest) else "prompt",
                code="context_length_exceeded",
            )
        if wanted is not None and wanted > self._max_tokens:
            raise RequestError(
                f"The request asks for {wanted:,} tokens, but an answer of this server has {self._max_tokens:,} at most. Ask for "
                "fewer, or start the server with a larger `--max-tokens`.",
                param="max_tokens",
            )
        most = wanted or min(room, self._max_tokens, _DEFAULT_TOKENS)
        return prompt, asked.sampling(self._defaults, most)

    def prompt(self, question: list[dict[str, str]] | str, query: str | None) -> Prompt:
        """The prompt of a conversation, whose last turn is the query, or of a text."""
        with self._lock:
            if isinstance(question, str):
                return Prompt(self._checked(self._tokenizer(question).input_ids))
            tokens, first = self._written(question, query or "")
            return Prompt(self._checked(tokens), query, first)

    def _written(self, messages: list[dict[str, str]], query: str) -> tuple[list[int], int]:
        """The conversation as the chat template writes it, and the token that the query begins with."""
        if not self.has_chat:
            raise RequestError(
                "The model has no chat template, so it cannot chat. Use `/v1/completions`.", code="no_chat_template"
            )
        try:
            return write_chat(self._tokenizer, messages, query)
        except TemplateError as error:
            raise RequestError(
                f"The model's chat template refuses the messages: {error}.", param="messages"
            ) from error

    def _checked(self, tokens: list[int]) -> list[int]:
        if not tokens:
            raise RequestError("The prompt has no tokens. Give at least one word.", param="prompt")
        return tokens
