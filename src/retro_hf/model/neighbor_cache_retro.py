# Copyright 2026 The retro-hf authors. Apache License 2.0: http://www.apache.org/licenses/LICENSE-2.0
"""Encoded neighbors of the reader `parallel_context`, and the cache that keeps them."""

import os
import sys
import threading
from collections import OrderedDict
from typing import Any, NamedTuple

import torch
from torch import nn


NEIGHBOR_BYTES = 2**30
"""Memory of the encoded neighbors that are kept between calls."""


class EncodedNeighbor(NamedTuple):
    """Keys and values of one neighbor of r tokens: `(H, r - 1, D)` for each layer that reads."""

    keys: tuple[torch.Tensor, ...]
    values: tuple[torch.Tensor, ...]

    def __deepcopy__(self, memo: dict) -> "EncodedNeighbor":
        return self  # it never changes, and rows, caches and calls share it

    @property
    def num_tokens(self) -> int:
        """The number of tokens that are read."""
        return self.keys[0].shape[-2]

    @property
    def num_bytes(self) -> int:
        """The memory of the keys and values, in bytes."""
        return sum(tensor.numel() * tensor.element_size() for tensor in self.keys + self.values)


Neighbors = tuple[EncodedNeighbor, ...]
"""What a token attends to besides the text."""


class PlacedNeighbor(NamedTuple):
    """The tokens of a neighbor, and the position of the first one: keys depend on both."""

    tokens: tuple[int, ...]
    start: int


def place_neighbors(neighbors: list[tuple[int, ...]], neighbor_size: int, context: int | None) -> list[PlacedNeighbor]:
    """Place the neighbors of a chunk one before another, the first one right before the text.

    They take at most half of the base's context. Those for which there is no room share the farthest place.

    Args:
        neighbors (`list[tuple[int, ...]]`): their tokens, the best one first.
        neighbor_size (`int`): the positions that each takes, unless it is longer.
        context (`int`, *optional*): positions that the base was trained with; None if it has no limit.
    """
    room = (context or sys.maxsize) // 2
    start, placed = 0, []
    for tokens in neighbors:
        width = max(len(tokens), neighbor_size)
        start = start - width if width - start <= room else min(start, -width)
        placed.append(PlacedNeighbor(tokens, start))
    return placed


class NeighborCache:
    """Maps a neighbor at its place to its keys and values. It drops the least recently used first. A copy starts empty.

    Args:
        max_bytes (`int`): the most memory that its keys and values may take.
    """

    def __init__(self, max_bytes: int = NEIGHBOR_BYTES):
        self.max_bytes = max_bytes
        self.num_bytes = 0
        self._weights: Any = None
        self._kept: OrderedDict[PlacedNeighbor, EncodedNeighbor] = OrderedDict()
        self._lock = threading.Lock()

    def __reduce__(self) -> tuple:
        return NeighborCache, (self.max_bytes,)

    def __len__(self) -> int:
        return len(self._kept)

    def use(self, weights: Any) -> None:
        """Forget everything if the weights of the base have changed since the last call; None always forgets."""
        with self._lock:
            if weights is None or weights != self._weights:
                self._kept.clear()
                self.num_bytes = 0
            self._weights = weights

    def get(self, placed: PlacedNeighbor) -> EncodedNeighbor | None:
        """The encoded neighbor; None if it is not here."""
        with self._lock:
            if placed in self._kept:
                self._kept.move_to_end(placed)
            return self._kept.get(placed)

    def put(self, placed: PlacedNeighbor, neighbor: EncodedNeighbor) -> None:
        """Keep a neighbor."""
        with self._lock:
            if placed not in self._kept:
                self._kept[placed] = neighbor
                self.num_bytes += neighbor.num_bytes
            while self.num_bytes > self.max_bytes:
                self.num_bytes -= self._kept.popitem(last=False)[1].num_bytes


def weights_version(backbone: nn.Module) -> Any:
    """A value that changes when the weights of a base change, or the PEFT adapters that are active in it."""
    versions = [(p.data_ptr(), None if p.is_inference() else p._version) for p in backbone.parameters()]
    names = ("_active_adapter", "_disable_adapters", "merged_adapters", "scaling")
    adapters = [
        str([vars(module).get(name) for name in names])
        for module in backbone.modules()
        if "_active_adapter" in vars(module)
    ]
    return versions, adapters


def total_memory(device: torch.device) -> int | None:
    """The memory of a device in bytes, used or not; None if it is unknown."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[1]
    if device.type == "cpu" and hasattr(os, "sysconf"):
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return None


def check_memory(example: EncodedNeighbor, num_tokens: int) -> None:
    """Refuse neighbors of `num_tokens` tokens, of which `example` is one, that the memory of its device could not hold."""
    device = example.keys[0].device
    memory, needed = total_memory(device), num_tokens * example.num_bytes // example.num_tokens
    if memory is not None and needed > memory:
        raise ValueError(
            f"The keys and values of the neighbors of this pass, {num_tokens:,} tokens, need {needed / 2**30:.1f} GiB, but "
            f"'{device}' has {memory / 2**30:.1f} GiB. Retrieve fewer neighbors (`num_neighbors`), or give fewer or "
            "shorter rows at a time."
        )
