"""
Caches whose rows come and go.

A cache of transformers has as many columns as its longest row has tokens, and shorter rows are padded on the left. So a row
may leave by being left out, and a row of its own cache may enter with padding before it. What is kept of a row beside keys
and values, RETRO's state of its chunks and the states of linear attention, has no columns.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from transformers.cache_utils import DynamicCache

from retro_hf.model.cache_retro import RetrievalState, RetroCacheMixin


# Layers whose tensors have rows first, and columns last but one or none. Other layers, such as those of fixed size, may not.
_LAYERS = {
    "DynamicLayer",
    "RetroDynamicLayer",
    "DynamicSlidingWindowLayer",
    "DummyLayer",
    "LinearAttentionLayer",
    "LinearAttentionAndFullAttentionLayer",
    "LinearAttentionAndSlidingWindowAttentionLayer",
}


def is_divisible(cache: Any) -> bool:
    """Whether rows may leave a cache, or join another: it is an ordinary one, and so are all its layers."""
    kinds = (type(cache), *type(cache).__bases__)
    return DynamicCache in kinds and all(type(layer).__name__ in _LAYERS for layer in cache.layers)


def joined(parts: Sequence[tuple[Any, list[int]]], num_columns: int) -> Any:
    """
    Some rows of several caches as one cache.

    Args:
        parts: caches of one model for which `is_divisible` holds, each with the numbers of its rows that are taken. None of
            them may be used any more.
        num_columns (`int`): tokens of the longest row.
    Returns:
        A cache with these rows, in order. It is the first of the caches, changed.
    """
    caches = [cache for cache, _ in parts]
    rows = [torch.tensor(taken) for _, taken in parts]
    for layers in zip(*(cache.layers for cache in caches), strict=True):
        first = layers[0]
        for name in ("keys", "values"):
            tensors: list[Any] = [getattr(layer, name, None) for layer in layers]
            if tensors[0] is not None:
                setattr(first, name, _columns(tensors, rows, num_columns, getattr(first, "sliding_window", None)))
        if hasattr(first, "cumulative_length"):
            first.cumulative_length = num_columns
        for name in ("conv_states", "recurrent_states"):
            if hasattr(first, name):
                setattr(first, name, _rows([getattr(layer, name) for layer in layers], rows))
    if isinstance(caches[0], RetroCacheMixin):
        states: list[Any] = [cache.retrieval_state for cache in caches]
        for state, taken in zip(states, rows, strict=True):
            state.select(taken)
        caches[0].retrieval_state = RetrievalState.join(states, num_columns)
    return caches[0]


def _columns(
    tensors: list[torch.Tensor], rows: list[torch.Tensor], num_columns: int, window: int | None
) -> torch.Tensor:
    """Rows of tensors `(B, H, L, D)`, without the columns that none of them needs, and padded on the left."""
    if window is not None:  # the token that comes next is the last of its window
        num_columns = min(num_columns, window - 1)
    like = tensors[0]
    shape = (sum(map(len, rows)), like.shape[1], num_columns, like.shape[-1])
    both, begin = like.new_zeros(shape), 0
    for tensor, taken in zip(tensors, rows, strict=True):
        size = min(tensor.shape[-2], num_columns)
        end = begin + len(taken)
        both[begin:end, :, num_columns - size :] = tensor[:, :, tensor.shape[-2] - size :][taken.to(tensor.device)]
        begin = end
    return both


def _rows(values: list[Any], rows: list[torch.Tensor]) -> Any:
    """Rows of tensors, or of each tensor in equal dicts; None where there is none."""
    first = values[0]
    if isinstance(first, dict):
        return {name: _rows([value[name] for value in values], rows) for name in first}
    if first is None:
        return None
    return torch.cat([value[taken.to(value.device)] for value, taken in zip(values, rows, strict=True)])
