"""Time and memory that a fit needs on this machine, measured before it starts; an error if they are not there."""

from __future__ import annotations

import gc
import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from .. import extras
from ..datastore.index_plan import duration
from ..model.modeling_retro import RetroForCausalLM


# Fewer steps of the smallest batch have not been seen to help.
LEAST_STEPS = 60
_MOST_EPOCHS = 4
_GB = 1e9
INSTEAD = (
    "a smaller base, a machine with more memory or a GPU, or no training at all: `retro ask BASE ... --store STORE` lets the base "
    "read in parallel context"
)


@dataclass(frozen=True)
class Plan:
    """What was measured in two steps, and what follows.

    Attributes:
        steps (`int`): steps of training.
        seconds_per_step (`float`): of one step.
        seconds_afterwards (`float`): the measurement that ends the fit, about.
        memory (`int`): bytes in use at most, of the process or of the GPU.
    """

    steps: int
    seconds_per_step: float
    seconds_afterwards: float
    memory: int

    def __str__(self) -> str:
        return (
            f"{self.steps:,} steps of {self.seconds_per_step:.2g} seconds are {duration(self.steps * self.seconds_per_step)}, and "
            f"measuring afterwards takes about {duration(self.seconds_afterwards)}. Memory: {self.memory / _GB:.1f} GB."
        )


def check_memory(
    base: str | os.PathLike[str], device: torch.device, dtype: torch.dtype, num_tokens: int, num_read: int
) -> None:
    """Refuse a base that this machine cannot hold while a reader of it is trained, before its weights are loaded.

    Args:
        num_tokens (`int`): of a batch.
        num_read (`int`): tokens of its neighbors.
    Raises:
        ValueError: with what is needed and what there is.
    """
    config: Any = AutoConfig.from_pretrained(base, trust_remote_code=False)
    config = config.text_config if config.model_type == "retro" else config
    decoder = config.get_text_config(decoder=True)
    # On the meta device a model has shapes and no memory.
    with torch.device("meta"):
        count = sum(weight.numel() for weight in AutoModelForCausalLM.from_config(config).parameters())
    # The weights; logits with their softmax and gradient, in float32; and what is read, as ids, mask and embeddings.
    needed = count * dtype.itemsize + 3 * 4 * num_tokens * decoder.vocab_size
    needed += num_read * (2 * 8 + decoder.hidden_size * dtype.itemsize)
    if device.type == "cuda":
        free = torch.cuda.mem_get_info(device)[0]
    else:
        free = extras.load("psutil", "Fitting").virtual_memory().available
    if needed > free:
        raise ValueError(
            f"'{base}' has {count / _GB:.2f} billion weights, and fitting a reader to it needs more than {needed / _GB:.1f} GB of memory "
            f"({dtype}), but {free / _GB:.1f} GB are free. What would do: fewer neighbors, a smaller batch, {INSTEAD}."
        )


def measure(
    model: RetroForCausalLM,
    run: Callable[[], torch.Tensor],
    *,
    steps: int | None,
    minutes: float | None,
    most_windows: int,
    batch_size: int,
    batch_tokens: int,
    afterwards: int,
) -> Plan:
    """Time two steps, and plan as many as fit.

    Args:
        run (`Callable`): one forward pass, which returns the loss. The weights are not changed.
        steps (`int`, *optional*), minutes (`float`, *optional*): at least one is given.
        most_windows (`int`): windows that there are.
        batch_tokens (`int`): tokens of a batch.
        afterwards (`int`): tokens that go through the model when it is measured.
    Raises:
        ValueError: if the time is not enough for a reader to learn anything.
    """
    forward, total, memory = 0.0, 0.0, 0
    for _ in range(2):  # the first one warms up
        start = time.perf_counter()
        loss = run()
        forward = time.perf_counter() - start
        memory = max(memory, _memory(model.device))
        loss.backward()
        if model.device.type == "cuda":
            torch.cuda.synchronize()
        total = time.perf_counter() - start
    model.zero_grad()
    gc.collect()  # the graph of the two steps
    most = max(1, -(-_MOST_EPOCHS * most_windows // batch_size))
    if steps is None:
        steps = min(int(60 * (minutes or 0) / total), most)
        if steps < min(LEAST_STEPS, most):
            raise ValueError(
                f"A step takes {total:.2g} seconds on this machine, so {minutes:g} minutes are {steps} steps, too few to learn from: "
                f"{LEAST_STEPS} are the least. What would do: --minutes {int(np.ceil(LEAST_STEPS * total / 60 + 1))}, {INSTEAD}. To "
                "continue anyway, say how many steps: --steps."
            )
    return Plan(steps, total, forward / batch_tokens * afterwards, memory)


def _memory(device: torch.device) -> int:
    """Bytes in use, of the GPU or of this process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return int(extras.load("psutil", "Fitting").Process().memory_info().rss)
