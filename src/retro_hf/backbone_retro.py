# Copyright 2026 The retro-hf authors. All rights reserved.
#
# Licensed under the Apache License, Version 2.0 (the "License");
# you may not use this file except in compliance with the License.
# You may obtain a copy of the License at
#
#     http://www.apache.org/licenses/LICENSE-2.0
#
# Unless required by applicable law or agreed to in writing, software
# distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied.
# See the License for the specific language governing permissions and
# limitations under the License.
"""Where chunked cross-attention enters a backbone: its decoder layers, and the end of the self-attention branch in each."""

import inspect
from typing import NamedTuple

from torch import nn
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer


# Families whose attention module returns residual + attention instead of attention.
_ADDS_RESIDUAL_INSIDE = ("bloom",)
# Norms at the end of the attention branch, each with a sibling that tells them from a norm before the feed-forward layer.
_BRANCH_NORMS = (
    ("post_attention_layernorm", "post_feedforward_layernorm"),
    ("post_self_attn_layernorm", "post_mlp_layernorm"),
)


class BranchEnd(NamedTuple):
    """The module whose output is a layer's self-attention branch.

    Args:
        module (`nn.Module`): returns the branch, as a tensor or first in a tuple.
        includes_residual (`bool`): whether it has added the layer's input already.
        multiplier (`float`): what the layer multiplies the branch with before it adds it to its input.
    """

    module: nn.Module
    includes_residual: bool
    multiplier: float


def find_decoder_layers(backbone: PreTrainedModel, path: str | None = None) -> nn.ModuleList:
    """Find the list of decoder layers of a causal language model.

    Args:
        backbone (`PreTrainedModel`): any decoder-only model that follows the conventions of transformers.
        path (`str`, *optional*): dotted path of the list, for one that does not.
    Returns:
        `nn.ModuleList` of `num_hidden_layers` layers.
    Raises:
        ValueError: if there is no such list, or more than one.
    """
    family = backbone.config.model_type
    num_layers = backbone.config.get_text_config(decoder=True).num_hidden_layers
    if getattr(backbone.config, "is_encoder_decoder", False):
        raise ValueError(
            f"'{family}' is an encoder-decoder; RETRO needs a decoder-only causal language model such as Llama or GPT-2."
        )
    # BERT and its kin serve as causal models too, but only if told so; GPT-NeoX has the first field alone, and is causal.
    if all(getattr(backbone.config, name, None) is False for name in ("is_decoder", "add_cross_attention")):
        raise ValueError(
            f"'{family}' attends in both directions (`is_decoder=False`); RETRO needs a decoder-only causal language model "
            "such as Llama or GPT-2."
        )
    if path is not None:
        try:
            layers = backbone.get_submodule(path)
        except AttributeError as error:
            raise ValueError(
                f"`backbone_layers='{path}'` is not a module of {type(backbone).__name__}: {error}."
            ) from None
        if not isinstance(layers, nn.ModuleList) or len(layers) != num_layers:
            raise ValueError(
                f"`backbone_layers='{path}'` must be an nn.ModuleList of {num_layers} layers, found "
                f"{type(layers).__name__} in {type(backbone).__name__}."
            )
        return layers
    found = {
        name: module
        for name, module in backbone.named_modules()
        if isinstance(module, nn.ModuleList)
        and len(module) == num_layers
        and all(isinstance(layer, GradientCheckpointingLayer) for layer in module)
    }
    if len(found) != 1:
        raise ValueError(
            f"Cannot tell the decoder layers of the family '{family}': looked in {type(backbone).__name__} for one "
            f"nn.ModuleList of {num_layers} GradientCheckpointingLayer, found {sorted(found) or 'none'}. Name it: "
            "`retrofit(..., backbone_layers='model.layers')`, or choose another backbone."
        )
    return next(iter(found.values()))


def find_branch_end(backbone: PreTrainedModel, layer: nn.Module, path: str | None = None) -> BranchEnd:
    """Find where a layer's self-attention branch ends, before it is added to the residual stream.

    Args:
        backbone (`PreTrainedModel`): the model that `layer` belongs to.
        layer (`nn.Module`): one decoder layer.
        path (`str`, *optional*): dotted path inside the layer, for a family that does not follow the conventions.
    Returns:
        [`BranchEnd`].
    Raises:
        ValueError: if no module, or more than one, looks like the layer's self-attention.
    """
    config = backbone.config.get_text_config(decoder=True)
    multiplier = float(getattr(config, "residual_multiplier", None) or 1.0)
    inside = config.model_type in _ADDS_RESIDUAL_INSIDE
    if path is not None:
        try:
            return BranchEnd(layer.get_submodule(path), inside, multiplier)
        except AttributeError as error:
            raise ValueError(
                f"`backbone_attention='{path}'` is not a module of {type(layer).__name__}: {error}."
            ) from None
    children = dict(layer.named_children())
    for norm, sibling in _BRANCH_NORMS:
        if norm in children and sibling in children:
            return BranchEnd(children[norm], inside, multiplier)
    attention = {name: child for name, child in children.items() if "Attention" in type(child).__name__}
    if len(attention) != 1:
        raise ValueError(
            f"Cannot tell the self-attention of {type(layer).__name__} (family '{config.model_type}'): looked for one child "
            f"whose class name contains 'Attention', found {sorted(attention) or 'none'} among {sorted(children)}. Name "
            "it: `retrofit(..., backbone_attention='self_attn')`, or use `cross_attention_placement='after_layer'`."
        )
    return BranchEnd(next(iter(attention.values())), inside, multiplier)


def accepted_arguments(module: nn.Module) -> frozenset[str]:
    """Names of the parameters of a module's `forward`; some families take no `position_ids` or `logits_to_keep`."""
    return frozenset(inspect.signature(module.forward).parameters)


__all__ = ["BranchEnd", "accepted_arguments", "find_branch_end", "find_decoder_layers"]
