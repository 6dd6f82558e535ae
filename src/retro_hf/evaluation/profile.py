"""Where the time of reading goes: embedding, search, gathering, encoding, cross-attention and the backbone."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import wraps
from typing import Any

import torch

from ..datastore import ChunkEmbedder, LexicalSearcher, RetroDatastore
from ..model.modeling_retro import RetroChunkedCrossAttention, RetroNeighborEncoder, RetroPreTrainedModel
from ..model.parallel_context_retro import ParallelContextReader
from ..retriever import RetroRetriever
from ..unwrapped import unwrapped


_ENCODING = "encode the neighbors"
_STAGES: tuple[tuple[str, type, str], ...] = (
    ("embed the queries", ChunkEmbedder, "embed_queries"),
    ("search the index", RetroDatastore, "search"),
    ("search the index", LexicalSearcher, "search"),
    ("gather the tokens", RetroDatastore, "gather"),
    ("rest of the retriever", RetroRetriever, "__call__"),
    ("rest of the retriever", RetroRetriever, "look_up"),
    (_ENCODING, RetroNeighborEncoder, "forward"),
    (_ENCODING, ParallelContextReader, "encode"),
    ("chunked cross-attention", RetroChunkedCrossAttention, "forward"),
)
_BACKBONE = "backbone"
_ORDER = list(dict.fromkeys([*(name for name, *_ in _STAGES), _BACKBONE]))


@dataclass
class Profile:
    """What [`profile`] measured.

    Attributes:
        total (`float`): seconds from the beginning to the end.
        seconds (`dict[str, float]`): seconds of each stage, without those of the stages inside of it.
        calls (`dict[str, int]`): how often each stage ran.
    """

    total: float = 0.0
    seconds: dict[str, float] = field(default_factory=dict)
    calls: dict[str, int] = field(default_factory=dict)

    @property
    def other(self) -> float:
        """Seconds of what is in no stage: planning chunks, sampling, and in training the backward pass."""
        return self.total - sum(self.seconds.values())

    def __str__(self) -> str:
        rows = [(name, self.seconds[name], f"{self.calls[name]:,}") for name in _ORDER if name in self.seconds]
        rows += [("everything else", self.other, ""), ("total", self.total, "")]
        lines = [f"{'stage':<25}{'seconds':>10}{'share':>8}{'calls':>8}"]
        lines += [
            f"{name:<25}{spent:>10.3f}{spent / max(self.total, 1e-9):>8.1%}{calls:>8}" for name, spent, calls in rows
        ]
        return "\n".join(lines)


class _Stopwatch:
    """Adds the time of nested calls up, each without the calls inside of it."""

    def __init__(self, result: Profile, cuda: bool) -> None:
        self._result, self._cuda = result, cuda
        self._inner: list[float] = []
        self._encoding = False

    def now(self) -> float:
        # A GPU works on while the host goes ahead; what it still has to do belongs to the stage that asked for it.
        if self._cuda:
            torch.cuda.synchronize()
        return time.perf_counter()

    def timed(self, name: str, function: Callable) -> Callable:
        @wraps(function)
        def call(*args: Any, **kwargs: Any) -> Any:
            if self._encoding:  # in parallel context the backbone encodes, and that is no step of the text
                return function(*args, **kwargs)
            self._encoding = name == _ENCODING
            self._inner.append(0.0)
            begin = self.now()
            try:
                return function(*args, **kwargs)
            finally:
                spent = self.now() - begin
                self._encoding = False
                seconds, calls = self._result.seconds, self._result.calls
                seconds[name] = seconds.get(name, 0.0) + spent - self._inner.pop()
                calls[name] = calls.get(name, 0) + 1
                if self._inner:
                    self._inner[-1] += spent

        return call


@contextmanager
def profile(model: RetroPreTrainedModel) -> Iterator[Profile]:
    """Measure where the time goes while the block runs: generation, scoring or training.

    It times the whole process, so let nothing else look up or generate meanwhile. On a GPU it waits for each stage to end,
    which makes the whole slower. A compiled model is measured as one piece.

    Args:
        model ([`RetroForCausalLM`] or another RETRO model): the one that will run.
    Yields:
        [`Profile`], which is complete when the block has ended. Printing it shows a table.
    """
    model = unwrapped(model)
    if not hasattr(getattr(model, "base_model", None), "backbone"):
        raise ValueError(
            f"The model is of type {type(model).__name__}. Pass a RETRO model, such as a RetroForCausalLM."
        )
    result = Profile()
    stopwatch = _Stopwatch(result, cuda=model.device.type == "cuda")
    backbone: Any = model.base_model.backbone
    stages: list[tuple[str, Any, str]] = [*_STAGES, (_BACKBONE, backbone, "forward")]
    with ExitStack() as stack:
        for name, owner, function in stages:
            original = getattr(owner, function)
            if function in vars(owner):
                stack.callback(setattr, owner, function, original)
            else:  # a module has the function of its class
                stack.callback(delattr, owner, function)
            setattr(owner, function, stopwatch.timed(name, original))
        begin = stopwatch.now()
        try:
            yield result
        finally:
            result.total = stopwatch.now() - begin
