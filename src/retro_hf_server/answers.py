"""The bodies of answers: OpenAI's, with a field `retrieval` that names the passages read for each part of the answer."""

from __future__ import annotations

import json
import time
import uuid
from dataclasses import dataclass, field
from typing import Any

from .jobs import Delta, Event, Finished
from .readers import ChunkRead
from .requests import Kind


@dataclass
class PartialAnswer:
    """
    An answer, as far as it is known.

    Args:
        kind (`str`): `"chat.completion"` or `"text_completion"`.
        model (`str`): the name under which the model is served.
        num_prompt_tokens (`int`): tokens of the prompt.
    """

    kind: Kind
    model: str
    num_prompt_tokens: int
    id: str = field(default_factory=lambda: uuid.uuid4().hex)
    created: int = field(default_factory=lambda: int(time.time()))
    text: str = ""
    reads: list[ChunkRead] = field(default_factory=list)
    end: Finished | None = None

    def add(self, event: Event) -> None:
        """Note what happened."""
        if isinstance(event, Delta):
            self.text += event.text
        elif isinstance(event, ChunkRead):
            self.reads.append(event)
        elif isinstance(event, Finished):
            self.end = event

    def body(self) -> dict[str, Any]:
        """The whole answer, for a client that does not stream."""
        part = {"message": {"role": "assistant", "content": self.text}} if self._is_chat else {"text": self.text}
        return self._head(self.kind) | {
            "choices": [self._choice(part)],
            "usage": self.usage(),
            "retrieval": self.retrieval(),
        }

    def opening(self) -> dict[str, Any]:
        """The first piece of a streamed answer, which has no text."""
        return self._piece({"role": "assistant", "content": ""} if self._is_chat else "")

    def piece(self, event: Event) -> dict[str, Any]:
        """A piece of a streamed answer: its text, or what was read; the last one has the whole field `retrieval`."""
        text = event.text if isinstance(event, Delta) else ""
        delta: Any = ({"content": text} if text else {}) if self._is_chat else text
        piece = self._piece(delta)
        if isinstance(event, ChunkRead):
            piece["retrieval"] = {"status": "on", "chunks": [self._read(event)]}
        elif isinstance(event, Finished):
            piece["retrieval"] = self.retrieval()
        return piece

    def usage_piece(self) -> dict[str, Any]:
        """The piece of a streamed answer that `stream_options.include_usage` asks for."""
        return self._head(self._piece_kind) | {"choices": [], "usage": self.usage()}

    def usage(self) -> dict[str, int]:
        """How many tokens there were."""
        written = 0 if self.end is None else self.end.num_tokens
        return {
            "prompt_tokens": self.num_prompt_tokens,
            "completion_tokens": written,
            "total_tokens": self.num_prompt_tokens + written,
        }

    def retrieval(self) -> dict[str, Any]:
        """The passages that were read, and whether retrieval was available."""
        end = self.end
        report: dict[str, Any] = {"status": "off" if end is None else end.retrieval}
        if end is not None and end.message is not None:
            report["message"] = end.message
        if end is not None and end.store is not None:
            report["store"] = end.store
        return report | {"chunks": [self._read(read) for read in self.reads]}

    def _read(self, read: ChunkRead) -> dict[str, Any]:
        """A chunk, its passages, and the tokens and characters of the answer that were written while reading them."""
        places = [(one.first_token, one.first_character) for one in self.reads if one.is_read]
        places.append((0 if self.end is None else self.end.num_tokens, len(self.text)))
        first = (read.first_token, read.first_character)
        last = min((place for place in places if place > first), default=first) if read.is_read else first
        return {
            "query": read.query,
            "tokens": [first[0], last[0]],
            "characters": [min(first[1], len(self.text)), min(last[1], len(self.text))],
            "passages": read.passages,
        }

    @property
    def _is_chat(self) -> bool:
        return self.kind == "chat.completion"

    @property
    def _piece_kind(self) -> str:
        return "chat.completion.chunk" if self._is_chat else self.kind

    def _piece(self, delta: Any) -> dict[str, Any]:
        choice = self._choice({"delta": delta} if self._is_chat else {"text": delta})
        return self._head(self._piece_kind) | {"choices": [choice]}

    def _choice(self, part: dict[str, Any]) -> dict[str, Any]:
        reason = None if self.end is None else self.end.reason
        return {"index": 0, **part, "logprobs": None, "finish_reason": reason}

    def _head(self, kind: str) -> dict[str, Any]:
        prefix = "chatcmpl" if self._is_chat else "cmpl"
        return {"id": f"{prefix}-{self.id}", "object": kind, "created": self.created, "model": self.model}


def event_line(body: dict[str, Any] | str) -> bytes:
    """A server-sent event."""
    return f"data: {body if isinstance(body, str) else json.dumps(body, ensure_ascii=False)}\n\n".encode()
