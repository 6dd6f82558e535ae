"""The bodies of requests: OpenAI's fields, checked. An unsupported field that would change the answer is refused by name."""

from __future__ import annotations

import json
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from .jobs import Sampling


class RequestError(Exception):
    """
    A request that gets an answer in OpenAI's form for errors.

    Args:
        message (`str`): what is wrong, and the remedy.
        status (`int`, defaults to 400): of HTTP.
        param (`str`, *optional*): the field that is wrong.
        code (`str`, *optional*): a short name for programs.
        retry_after (`int`, *optional*): seconds after which it may be tried again.
    """

    def __init__(
        self,
        message: str,
        status: int = 400,
        *,
        param: str | None = None,
        code: str | None = None,
        retry_after: int | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.param, self.code, self.retry_after = status, param, code, retry_after

    def body(self) -> dict[str, Any]:
        """The error as OpenAI writes it."""
        kind = {401: "authentication_error", 403: "permission_error", 429: "rate_limit_error"}.get(self.status)
        kind = kind or ("invalid_request_error" if self.status < 500 else "server_error")
        return {"error": {"message": str(self), "type": kind, "param": self.param, "code": self.code}}


# Fields that are accepted at the value that changes nothing, with that value.
_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "n": (1,),
    "best_of": (1,),
    "logprobs": (False,),
    "top_logprobs": (0,),
    "echo": (False,),
    "suffix": ("",),
    "presence_penalty": (0,),
    "frequency_penalty": (0,),
    "logit_bias": ({},),
    "tools": ([],),
    "tool_choice": ("none", "auto"),
    "functions": ([],),
    "function_call": ("none", "auto"),
    "response_format": ({"type": "text"},),
    "modalities": (["text"],),
    "audio": (),
    "prediction": (),
    "web_search_options": (),
    "reasoning_effort": ("none",),
}
# Fields for OpenAI's own bookkeeping, which change no answer.
_IGNORED = {
    "user",
    "metadata",
    "store",
    "service_tier",
    "parallel_tool_calls",
    "prompt_cache_key",
    "safety_identifier",
    "verbosity",
}


class _Part(BaseModel):
    model_config = ConfigDict(extra="allow")

    type: str
    text: str | None = None


class Message(BaseModel):
    """One turn of a chat. OpenAI's client writes fields that are empty, such as `tool_calls`, into turns that it repeats."""

    model_config = ConfigDict(extra="allow")

    role: str
    content: str | list[_Part]
    name: str | None = None

    @field_validator("role")
    @classmethod
    def _known(cls, role: str) -> str:
        if role not in ("system", "developer", "user", "assistant"):
            raise ValueError(f"the role is {role!r:.100}, but it is system, developer, user or assistant")
        return role

    @model_validator(mode="before")
    @classmethod
    def _supported(cls, turn: Any) -> Any:
        filled = (
            [name for name in turn if name not in cls.model_fields and turn[name]] if isinstance(turn, dict) else []
        )
        if filled:
            raise ValueError(f"it has {filled[0]!r}, which this server does not support; a turn has a role and a text")
        return turn

    @field_validator("content", mode="before")
    @classmethod
    def _some(cls, content: Any) -> Any:
        return _text_or_list(content)

    @field_validator("content")
    @classmethod
    def _only_text(cls, content: str | list[_Part]) -> str | list[_Part]:
        for part in content if isinstance(content, list) else []:
            if part.type != "text" or part.text is None:
                raise ValueError(f"a part of the content is of type {part.type!r}, but this model reads text only")
        return content

    def text(self) -> str:
        """The text of all its parts."""
        return self.content if isinstance(self.content, str) else "".join(part.text or "" for part in self.content)


def _text_or_list(value: Any) -> Any:
    """Refuse what is neither, before each kind is tried by itself and named in the error."""
    if not isinstance(value, str | list):
        raise ValueError(f"it is {'null' if value is None else type(value).__name__}; give a text")
    return value


class _StreamOptions(BaseModel):
    include_usage: bool = False
    include_obfuscation: bool = False


class _Request(BaseModel):
    model_config = ConfigDict(extra="allow")

    model: str | None = None
    temperature: float | None = Field(None, ge=0, le=2)
    top_p: float | None = Field(None, gt=0, le=1)
    top_k: int | None = Field(None, ge=0)
    max_tokens: int | None = Field(None, ge=1)
    seed: int | None = Field(None, ge=-(2**63), lt=2**63)
    stop: str | list[str] | None = None
    stream: bool | None = False
    stream_options: _StreamOptions | None = None
    retrieval: bool = True

    @field_validator("stop")
    @classmethod
    def _few(cls, stop: str | list[str] | None) -> list[str]:
        words = [stop] if isinstance(stop, str) else stop or []
        if len(words) > 16 or any(not 0 < len(word) <= 500 for word in words):
            raise ValueError("give up to 16 texts, each of 1 to 500 characters")
        return words

    @model_validator(mode="after")
    def _supported(self) -> _Request:
        for name, value in (self.model_extra or {}).items():
            if name in _IGNORED or value is None or (name in _NEUTRAL and value in _NEUTRAL[name]):
                continue
            known = name in _NEUTRAL and _NEUTRAL[name]
            remedy = f"Leave it out, or give {json.dumps(_NEUTRAL[name][0])}" if known else "Leave it out"
            raise RequestError(
                f"This server does not support `{name}`={json.dumps(value, default=str)[:200]}. {remedy}.",
                param=name,
                code="unsupported_parameter",
            )
        return self

    def sampling(self, defaults: dict[str, Any], max_tokens: int) -> Sampling:
        """The settings for sampling; the model's own where the request does not say."""
        given = {name: getattr(self, name) for name in ("temperature", "top_p", "top_k")}
        settings = defaults | {name: value for name, value in given.items() if value is not None}
        return Sampling(max_tokens, **settings, seed=self.seed, stop=tuple(self.stop or ()))


class ChatRequest(_Request):
    """The body of `/v1/chat/completions`."""

    messages: list[Message]
    max_completion_tokens: int | None = Field(None, ge=1)

    @field_validator("messages")
    @classmethod
    def _asks(cls, messages: list[Message]) -> list[Message]:
        if not messages:
            raise ValueError("it is empty; give at least one message")
        if _last_turn(messages) is None:
            raise ValueError("the last message of the user is missing or empty; write at least one word")
        return messages

    @property
    def wanted_tokens(self) -> int | None:
        """The length of the answer, under either of its names."""
        return self.max_completion_tokens or self.max_tokens

    @property
    def question(self) -> list[dict[str, str]]:
        """The messages, for a chat template."""
        return _conversation(self.messages)

    @property
    def query(self) -> str | None:
        """What is looked up: the last turn of the user."""
        return _last_turn(self.messages)


class CompletionRequest(_Request):
    """The body of `/v1/completions`."""

    prompt: str | list[str]

    @field_validator("prompt", mode="before")
    @classmethod
    def _some(cls, prompt: Any) -> Any:
        if isinstance(prompt, list) and any(not isinstance(text, str) for text in prompt):
            raise ValueError("give a text; this server takes no token ids")
        return _text_or_list(prompt)

    @field_validator("prompt")
    @classmethod
    def _one(cls, prompt: str | list[str]) -> str:
        texts = [prompt] if isinstance(prompt, str) else prompt
        if len(texts) != 1 or not texts[0]:
            raise ValueError("give one text of at least one character; send several prompts as several requests")
        return texts[0]

    @property
    def wanted_tokens(self) -> int | None:
        """The length of the answer."""
        return self.max_tokens

    @property
    def question(self) -> str:
        """The text to continue."""
        return self.prompt if isinstance(self.prompt, str) else self.prompt[0]

    @property
    def query(self) -> None:
        """None: the end of the prompt is looked up."""
        return None


def _conversation(messages: list[Message]) -> list[dict[str, str]]:
    """Messages for a chat template. Templates do not know the role "developer", so it becomes "system"."""
    return [{"role": "system" if one.role == "developer" else one.role, "content": one.text()} for one in messages]


def _last_turn(messages: list[Message]) -> str | None:
    """The last turn of the user, if it has text."""
    texts = [one.text().strip() for one in messages if one.role == "user"]
    return texts[-1] or None if texts else None


class CompareRequest(BaseModel):
    """The body of `/v1/retrieval/compare`: a prompt, and an answer to it."""

    model_config = ConfigDict(extra="forbid")

    messages: list[Message] | None = None
    prompt: str | None = None
    answer: str = Field(min_length=1)

    @model_validator(mode="after")
    def _either(self) -> CompareRequest:
        if (self.messages is None) == (not self.prompt):
            raise ValueError("give either `messages` or `prompt`")
        return self

    @property
    def question(self) -> list[dict[str, str]] | str:
        """The messages, or the text."""
        return _conversation(self.messages) if self.messages else self.prompt or ""

    @property
    def query(self) -> str | None:
        """What is looked up, as in the request that was answered."""
        return _last_turn(self.messages) if self.messages else None


class _Document(BaseModel):
    model_config = ConfigDict(extra="allow")

    id: str = Field(min_length=1)
    text: str
    title: str = ""
    source: str = ""

    @field_validator("text")
    @classmethod
    def _some(cls, text: str) -> str:
        if not text.strip():
            raise ValueError("the text is empty; delete the document instead")
        return text


class DocumentsRequest(BaseModel):
    """The body of `POST /v1/store/documents`."""

    model_config = ConfigDict(extra="forbid")

    documents: list[_Document] = Field(min_length=1)

    @model_validator(mode="after")
    def _distinct(self) -> DocumentsRequest:
        ids = [one.id for one in self.documents]
        if len(set(ids)) < len(ids):
            raise ValueError("two documents have the same id")
        return self


Kind = Literal["chat.completion", "text_completion"]


def parsed(kind: type[Any], content: bytes) -> Any:
    """
    A request of a kind, from the body of an HTTP request.

    Raises:
        RequestError: if the body is no such request; the message names the field.
    """
    try:
        return kind.model_validate_json(content)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        place = ".".join(map(str, first["loc"])) or None
        reason = first["msg"].removeprefix("Value error, ")
        message = f"The field `{place}` is wrong: {reason}." if place else f"The body is wrong: {reason}."
        raise RequestError(message, param=place) from error
