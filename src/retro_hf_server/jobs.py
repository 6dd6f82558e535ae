"""A request to the engine, and what the engine tells about its answer."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from .readers import ChunkRead, Prompt


class QueueFullError(Exception):
    """The queue of requests is full."""


class StoppedError(Exception):
    """The engine is closing and takes no more requests."""


@dataclass(frozen=True)
class Sampling:
    """
    How the tokens of one answer are chosen.

    Attributes:
        max_tokens (`int`): how many there may be.
        temperature (`float`): 0 takes the likeliest token.
        top_p (`float`): draw from the likeliest tokens that have this probability together.
        top_k (`int`): draw from this many tokens; 0 means all.
        seed (`int`, *optional*): the same seed gives the same draws.
        stop (`tuple[str]`): texts at which the answer ends.
    """

    max_tokens: int
    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    seed: int | None = None
    stop: tuple[str, ...] = ()


@dataclass(frozen=True)
class Delta:
    """New text of an answer."""

    text: str


@dataclass(frozen=True)
class Finished:
    """
    The end of an answer.

    Attributes:
        reason (`str`): `"stop"`, `"length"`, `"canceled"` or `"timeout"`.
        num_tokens (`int`): tokens of the answer, with the one that ended it.
        retrieval (`str`): `"on"`, `"off"` or `"unavailable"`.
        message (`str`, *optional*): why retrieval was not available.
        store (`dict`, *optional*): the generation of the store and its number of documents.
    """

    reason: str
    num_tokens: int
    retrieval: str
    message: str | None = None
    store: dict[str, int] | None = None


@dataclass(frozen=True)
class Failed:
    """Why there is no answer."""

    message: str


Event = Delta | ChunkRead | Finished | Failed


@dataclass
class Job:
    """
    One answer to be generated.

    Attributes:
        prompt ([`Prompt`]): what it follows.
        sampling ([`Sampling`]): how to choose tokens.
        emit (`Callable[[Event], None]`): is told what happens, in the engine's thread. It must not wait.
        retrieve (`bool`): whether to read the store.
        deadline (`float`): of `time.monotonic()`.
        canceled (`bool`): set by whoever does not want the answer any more.
    """

    prompt: Prompt
    sampling: Sampling
    emit: Callable[[Event], None]
    retrieve: bool = True
    deadline: float = float("inf")
    canceled: bool = False
