# Copyright 2026 The retro-hf authors. Apache License 2.0: http://www.apache.org/licenses/LICENSE-2.0
"""How the attention of a base reaches the active pass, for a reader that works inside of it."""

import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from transformers import AttentionInterface, PreTrainedModel
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, AttentionMaskInterface
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from .backbone_retro import active_pass


_PREFIX = f"{__name__}."  # with code from the Hub a process may have several of this module, each for its own models


def _attention_function(name: str) -> Callable:
    """The attention function `name` of transformers; in a layer that reads, the active pass calls it with the neighbors."""

    def attend(module: nn.Module, *args: Any, **kwargs: Any) -> tuple[torch.Tensor, torch.Tensor | None]:
        function = ALL_ATTENTION_FUNCTIONS.get(name) or sys.modules[type(module).__module__].eager_attention_forward
        current = active_pass.get()
        if getattr(module, "layer_idx", None) not in getattr(current, "layers", ()):
            return function(module, *args, **kwargs)
        return current.attend(function, module, *args, **kwargs)

    return attend


for _name in ("eager", "sdpa"):
    AttentionInterface.register(_PREFIX + _name, _attention_function(_name))
    AttentionMaskInterface.register(_PREFIX + _name, ALL_MASK_ATTENTION_FUNCTIONS[_name])


def route_attention(backbone: PreTrainedModel) -> None:
    """Let the active pass compute the attention of a base; it goes on using "eager" or "sdpa", as set before."""
    config = backbone.config.get_text_config(decoder=True)
    name = config._attn_implementation or "sdpa"
    if name.startswith(_PREFIX):
        return
    if name not in ("eager", "sdpa"):
        raise ValueError(
            f"reader='parallel_context' attends by 'sdpa' or 'eager', got attn_implementation='{name}'. Set one of the two."
        )
    config._attn_implementation = _PREFIX + name
