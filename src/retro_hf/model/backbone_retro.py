# Copyright 2026 The retro-hf authors. Apache License 2.0: http://www.apache.org/licenses/LICENSE-2.0
"""Where RETRO enters a backbone: its decoder layers, the end of the self-attention branch in each, and the hooks there."""

import hashlib
import inspect
import re
from collections.abc import Callable, Container
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any, NamedTuple, Protocol

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.utils.output_capturing import CompileableContextVar

from .compatibility_retro import CACHE_NAME
from .configuration_retro import RetroConfig


# The classes that mix tokens in a layer: self-attention, or what replaces it in some layers of a hybrid model.
_ATTENTION = re.compile(r"Attention\d*$")
_HOOKS = ("_cross_attend_after_layer", "_cross_attend_after_attention")
_MIXER = re.compile(r"(Mixer|DeltaNet|ShortConv|MambaLayer)$")
# Families whose attention is not a child of the layer.
_ATTENTION_PATHS = {"dbrx": "norm_attn_norm.attn"}
# Families whose attention module returns residual + attention instead of attention.
_ADDS_RESIDUAL_INSIDE = ("bloom",)
# Modules that end the attention branch, after the attention. Some families give the norm before the feed-forward layer the
# same name, so each is listed with its sibling at the end of the feed-forward branch: only where both are there does it end
# the branch. GLM-4 has the first two names, one for each meaning.
_BRANCH_ENDS = (
    ("post_self_attn_layernorm", "post_mlp_layernorm"),
    ("post_attention_layernorm", "post_mlp_layernorm"),
    ("post_attention_layernorm", "post_feedforward_layernorm"),
    ("post_operator_norm", "post_ffn_norm"),
    ("post_norm1", "post_norm2"),
    ("attn_sconv", "mlp_sconv"),
)
# A module that adds the branch to the layer's input, both scaled.
_RESIDUAL_SUM = "post_attention_residual_scale"
# Attributes of a layer: the factor of the branch when the layer adds it to its input.
_MULTIPLIERS = ("residual_multiplier", "residual_scale", "attn_out_multiplier")
# Attributes of a layer that also scales its input x. Its residual stream is then not x + branch.
_SCALES_INPUT = ("input_residual", "attn_residual_add_idx", "attn_alpha_factor")
# Children of layers that have more than one residual stream.
_STREAMS = ("altup", "attn_hc", "attn_hyper_connection", "mlp_input")
# Fields of a config that say how often the layers run in one pass.
_LOOPS = ("n_recurrent_loops",)
# Prefixes of the names of children that attend to something other than the text.
_OUTSIDE = ("cross", "encoder_attn")


class BranchEnd(NamedTuple):
    """The module whose output is a layer's self-attention branch.

    Args:
        module (`nn.Module`): returns the branch, as a tensor or first in a tuple.
        includes_residual (`bool`): whether it has added the layer's input already.
        multiplier (`float`): the factor of the branch when the layer adds it to its input.
    """

    module: nn.Module
    includes_residual: bool
    multiplier: float


def find_decoder_layers(backbone: PreTrainedModel, path: str | None = None) -> nn.ModuleList:
    """Find the list of decoder layers of a causal language model.

    Args:
        backbone (`PreTrainedModel`): any decoder-only model that follows the conventions of transformers.
        path (`str`, *optional*): dotted path of the list, for a model that does not.
    Returns:
        `nn.ModuleList` of `num_hidden_layers` layers.
    Raises:
        ValueError: if the model is not a causal decoder with a head and a cache, or does not have exactly one such list.
    """
    check_decoder(backbone)
    config = backbone.config.get_text_config(decoder=True)
    # In BART and similar families `num_hidden_layers` counts the encoder's layers, and `decoder_layers` the decoder's.
    num_layers = getattr(config, "decoder_layers", getattr(config, "num_hidden_layers", None))
    layers = _search_layers(backbone, num_layers) if path is None else _named_layers(backbone, path, num_layers)
    _check_layers(backbone, layers)
    return layers


def _named_layers(backbone: PreTrainedModel, path: str, num_layers: int | None) -> nn.ModuleList:
    """The list at a path; ValueError if there is none of the right length."""
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


def _search_layers(backbone: PreTrainedModel, num_layers: int | None) -> nn.ModuleList:
    """The only list that looks like the decoder layers; ValueError if there is not exactly one."""
    family = backbone.config.model_type
    if num_layers is None:
        raise ValueError(
            f"The config of the family '{family}' has no `num_hidden_layers`, so it is not a stack of decoder layers. "
            "RETRO needs a decoder-only causal language model such as Llama or GPT-2."
        )
    found = {
        name: module
        for name, module in backbone.named_modules()
        if isinstance(module, nn.ModuleList)
        and len(module) == num_layers
        and all(isinstance(layer, GradientCheckpointingLayer) for layer in module)
    }
    if len(found) > 1:  # the other one may belong to an image encoder
        inside = set(backbone.get_decoder().modules())
        found = {name: module for name, module in found.items() if module in inside} or found
    if len(found) != 1:
        raise ValueError(
            f"Cannot tell the decoder layers of the family '{family}': looked in {type(backbone).__name__} for one "
            f"nn.ModuleList of {num_layers} GradientCheckpointingLayer, found {sorted(found) or 'none'}. Name it: "
            "`retrofit(..., backbone_layers='model.layers')`, or choose another backbone."
        )
    return next(iter(found.values()))


def _check_layers(backbone: PreTrainedModel, layers: nn.ModuleList) -> None:
    """Raise a ValueError unless the layers have self-attention, one residual stream, and attend to the text alone."""
    family = backbone.config.model_type
    if not hasattr(backbone.config.get_text_config(decoder=True).per_layer_config[0], "num_attention_heads"):
        raise ValueError(
            f"'{family}' has no self-attention, but cross-attention must follow one. Choose a backbone with self-attention, "
            "such as Llama or GPT-2."
        )
    children = sorted({name for layer in layers for name, _ in layer.named_children()})
    for name in children:
        if name in _STREAMS:
            raise ValueError(
                f"The layers of the family '{family}' have several residual streams (`{name}`), but RETRO can add to one "
                "only. Choose a backbone whose layers have one residual stream, such as Llama or GPT-2."
            )
        if name.startswith(_OUTSIDE):
            raise ValueError(
                f"The layers of the family '{family}' also attend to an encoder or an image (`{name}`); RETRO needs a "
                "decoder-only causal language model such as Llama or GPT-2."
            )


def check_decoder(backbone: PreTrainedModel) -> None:
    """Raise a ValueError for a model that is not a causal decoder, or that does not use a cache of transformers."""
    family, config = backbone.config.model_type, backbone.config
    if getattr(config, "is_encoder_decoder", False):
        raise ValueError(
            f"'{family}' is an encoder-decoder; RETRO needs a decoder-only causal language model such as Llama or GPT-2."
        )
    # BERT and similar families are causal only if their config says so. GPT-NeoX has only the first field, and is causal.
    if all(getattr(config, name, None) is False for name in ("is_decoder", "add_cross_attention")):
        raise ValueError(
            f"'{family}' attends in both directions (`is_decoder=False`); RETRO needs a decoder-only causal language model "
            "such as Llama or GPT-2."
        )
    if not backbone.can_generate():
        raise ValueError(
            f"{type(backbone).__name__} has no language-model head, which RETRO needs to predict tokens. Load the base with "
            "`AutoModelForCausalLM`."
        )
    own_cache = not getattr(backbone, "_supports_default_dynamic_cache", lambda: True)()
    if own_cache or CACHE_NAME not in accepted_arguments(backbone):
        raise ValueError(
            f"'{family}' keeps its history in its own kind of state, but RETRO needs a `DynamicCache` that "
            f"{type(backbone).__name__} takes as `{CACHE_NAME}`. Choose a backbone that does, such as Llama or GPT-2."
        )
    text_config = config.get_text_config(decoder=True)
    loops = next((name for name in _LOOPS if getattr(text_config, name, 1) > 1), None)
    if loops is not None:
        raise ValueError(
            f"'{family}' runs some layers more than once in a pass (`{loops}={getattr(text_config, loops)}`), but RETRO reads "
            "neighbors once per layer. Choose a backbone that runs each layer once, such as Llama or GPT-2."
        )


def find_branch_end(backbone: PreTrainedModel, layer: nn.Module, path: str | None = None) -> BranchEnd:
    """Find where a layer's self-attention branch ends, before it is added to the residual stream.

    In a hybrid model, a layer without self-attention mixes tokens in another way, such as a state space or a convolution;
    the branch is then that one's. If a layer has both in parallel, cross-attention follows the self-attention.

    Args:
        backbone (`PreTrainedModel`): the model that `layer` belongs to.
        layer (`nn.Module`): one decoder layer.
        path (`str`, *optional*): dotted path inside the layer, for a family that does not follow the conventions.
    Returns:
        [`BranchEnd`].
    Raises:
        ValueError: if not exactly one module looks like the layer's self-attention, or the layer does more than add its
            output to the input.
    """
    family = backbone.config.get_text_config(decoder=True).model_type
    scales = [name for name in _SCALES_INPUT if hasattr(layer, name)]
    if scales:
        raise ValueError(
            f"{type(layer).__name__} (family '{family}') scales its input before it adds the self-attention to it "
            f"(`{scales[0]}`), so cross-attention cannot be added between the two. Use "
            "`cross_attention_placement='after_layer'`."
        )
    multiplier = next((float(getattr(layer, name)) for name in _MULTIPLIERS if hasattr(layer, name)), 1.0)
    inside = family in _ADDS_RESIDUAL_INSIDE
    if path is not None:
        try:
            return BranchEnd(layer.get_submodule(path), inside, multiplier)
        except AttributeError as error:
            raise ValueError(
                f"`backbone_attention='{path}'` is not a module of {type(layer).__name__}: {error}."
            ) from None
    if family in _ATTENTION_PATHS:
        return BranchEnd(layer.get_submodule(_ATTENTION_PATHS[family]), inside, multiplier)
    children = dict(layer.named_children())
    if _RESIDUAL_SUM in children:
        return BranchEnd(children[_RESIDUAL_SUM], True, multiplier)
    for name, sibling in _BRANCH_ENDS:
        if name in children and sibling in children:
            return BranchEnd(children[name], inside, multiplier)
    attention = {name: child for name, child in children.items() if _ATTENTION.search(type(child).__name__)}
    mixers = {name: child for name, child in children.items() if _MIXER.search(type(child).__name__)}
    found = attention or mixers
    if len(found) != 1:
        raise ValueError(
            f"Cannot tell the self-attention of {type(layer).__name__} (family '{family}'): looked for one child whose "
            f"class name ends in 'Attention', found {sorted(found) or 'none'} among {sorted(children)}. Name it: "
            "`retrofit(..., backbone_attention='self_attn')`, choose other `cross_attention_layers`, or use "
            "`cross_attention_placement='after_layer'`."
        )
    end = next(iter(found.values()))
    # In BERT and similar families the module `output` inside the attention adds the layer's input.
    inside = inside or {"self", "output"} <= {name for name, _ in end.named_children()}
    return BranchEnd(end, inside, multiplier)


def accepted_arguments(module: nn.Module) -> tuple[str, ...]:
    """The names of the arguments of a module's `forward`. Some families take no `position_ids` or `logits_to_keep`."""
    return tuple(inspect.signature(module.forward).parameters)


def learned_positions(backbone: PreTrainedModel) -> range | None:
    """The positions that the backbone's table has; None if it has no table."""
    limit = getattr(backbone.config.get_text_config(decoder=True), "max_position_embeddings", None)
    tables = [
        m for m in backbone.modules() if isinstance(m, nn.Embedding) and m is not backbone.get_input_embeddings()
    ]
    extra = [table.num_embeddings - limit for table in tables] if limit else []
    extra = [rows for rows in extra if 0 <= rows <= 2]
    return range(-extra[0], limit) if extra else None  # what is extra comes first, as in OPT


def placement(backbone: nn.Module) -> tuple[torch.device, torch.dtype]:
    """The device and dtype for weights that are added to a backbone: those of its first floating-point weight.

    Quantized weights may be integers. Offloaded weights are on the meta device, so the device of another weight is taken.
    """
    weights = [weight for weight in backbone.parameters() if weight.is_floating_point()]
    device = next((weight.device for weight in weights if weight.device.type != "meta"), torch.device("cpu"))
    return device, weights[0].dtype


def fingerprint(backbone: nn.Module, sampled: bool = False) -> str | None:
    """A hash that tells a checkpoint from others of the same shape.

    Values are rounded to bfloat16, so a checkpoint has the same fingerprint in float32 and in bfloat16.

    Args:
        backbone (`nn.Module`): its parameters are read.
        sampled (`bool`, defaults to `False`): read only up to 64 values of each weight. Folders saved by early versions of
            retro-hf have such a fingerprint, of 16 digits.
    Returns:
        `str` of 64 hexadecimal digits that depends on every value (16 if sampled); None for weights that are quantized, in
        float16, offloaded or sharded.
    """
    weights = [(name, weight.detach()) for name, weight in sorted(backbone.named_parameters())]
    for _, weight in weights:
        if type(weight) is not torch.Tensor or weight.is_meta or weight.dtype not in (torch.float32, torch.bfloat16):
            return None

    def digest(weight: torch.Tensor) -> bytes:
        values = weight.reshape(-1)
        if sampled:
            values = values[:: max(len(values) // 64, 1)][:64]
        content = memoryview(values.to("cpu", torch.bfloat16).view(torch.int16).numpy())
        return content.tobytes() if sampled else hashlib.sha256(content).digest()

    whole = hashlib.sha256()
    with ThreadPoolExecutor() as pool:
        for (name, weight), part in zip(weights, pool.map(digest, [weight for _, weight in weights]), strict=True):
            whole.update(f"{name} {tuple(weight.shape)}".encode() + part)
    return whole.hexdigest()[: 16 if sampled else 64]


# ── hooks ─────────────────────────────────────────────────────────────────────────────────────────────────────────────


class _PassVar(CompileableContextVar):
    """A separate class, because output capturing looks for its own collector by class."""


active_pass = _PassVar("retro_pass")
"""The pass that is running, a [`HookedPass`] or an [`AttendingPass`], for the parts of a backbone that ask for it."""


class HookedPass(Protocol):
    """A pass that the hooks of decoder layers call, as chunked cross-attention needs it."""

    layer_inputs: dict[int, torch.Tensor]
    """The input (B, T, hidden_size) of each layer with a hook, from which the residual stream is made."""

    def __call__(self, layer_idx: int, hidden_states: torch.Tensor) -> torch.Tensor:
        """What to add to the residual stream (B, T, hidden_size) of a layer."""


class AttendingPass(Protocol):
    """A pass that computes the attention of some layers itself, as reading in parallel context needs it."""

    @property
    def layers(self) -> Container[int]:
        """The layers whose attention it computes."""

    def attend(
        self, function: Callable, module: Any, query: Any, key: Any, value: Any, mask: Any, **kwargs: Any
    ) -> Any:
        """The result of `function`, an attention function of transformers, in the layer `module`."""


def _record_layer_input(module: nn.Module, args: tuple, kwargs: dict, *, layer_idx: int, name: str) -> None:
    retro_pass = active_pass.get()
    if retro_pass is not None:
        retro_pass.layer_inputs[layer_idx] = args[0] if args else kwargs[name]


def _cross_attend_after_attention(
    module: nn.Module, args: tuple, output: Any, *, layer_idx: int, includes_residual: bool, multiplier: float
) -> Any:
    """The paper's order ATTN → CCA → FFW: add CCA(x + branch) to the end of the self-attention branch."""
    retro_pass = active_pass.get()
    if retro_pass is None:
        return None
    branch = output[0] if isinstance(output, tuple) else output
    if includes_residual:
        hidden_states = branch
    else:
        hidden_states = torch.add(retro_pass.layer_inputs[layer_idx], branch, alpha=multiplier)
    branch = torch.add(branch, retro_pass(layer_idx, hidden_states), alpha=1 / multiplier)
    return (branch, *output[1:]) if isinstance(output, tuple) else branch


def _cross_attend_after_layer(module: nn.Module, args: tuple, output: Any, *, layer_idx: int) -> Any:
    retro_pass = active_pass.get()
    if retro_pass is None:
        return None
    hidden_states = output[0] if isinstance(output, tuple) else output
    hidden_states = hidden_states + retro_pass(layer_idx, hidden_states)
    return (hidden_states, *output[1:]) if isinstance(output, tuple) else hidden_states


def attach_hooks(backbone: PreTrainedModel, config: RetroConfig) -> None:
    """Make each layer of `config.cross_attention_layers` call the active pass, if there is one, and add what it returns.

    The hooks keep no state. The pass is a context variable, so that threads, recomputation, and several forward passes before
    one backward pass do not mix.

    Raises:
        ValueError: if a layer is not there, or the backbone has the hooks of another model.
    """
    for module in backbone.modules():
        for hook in module._forward_hooks.values():
            # By name: a model that was loaded with its own code has copies of these functions.
            if isinstance(hook, partial) and hook.func.__name__ in _HOOKS:
                raise ValueError(
                    "The base is part of another RETRO model already, which reads neighbors in its layers. Load the base again, "
                    "and give that one."
                )
    layers = find_decoder_layers(backbone, config.backbone_layers)
    if max(config.cross_attention_layers, default=0) >= len(layers):
        raise ValueError(
            f"`cross_attention_layers` is {config.cross_attention_layers}, but the backbone has the layers 0 to {len(layers) - 1}. "
            "Leave `num_hidden_layers` out, or give `cross_attention_layers` that it has."
        )
    for idx in config.cross_attention_layers:
        if config.cross_attention_placement == "after_layer":
            layers[idx].register_forward_hook(partial(_cross_attend_after_layer, layer_idx=idx))
            continue
        end = find_branch_end(backbone, layers[idx], config.backbone_attention)
        # The name of the layer's first argument, in nearly all families `hidden_states`.
        record = partial(_record_layer_input, layer_idx=idx, name=accepted_arguments(layers[idx])[0])
        layers[idx].register_forward_pre_hook(record, with_kwargs=True)
        end.module.register_forward_hook(
            partial(
                _cross_attend_after_attention,
                layer_idx=idx,
                includes_residual=end.includes_residual,
                multiplier=end.multiplier,
            )
        )


def run_within(retro_pass: HookedPass | AttendingPass | None, module: nn.Module, inputs: dict[str, Any]) -> Any:
    """Run `module(**inputs)`, the backbone or its body, while `retro_pass` is the active pass; None is none."""
    # If `torch.compile` has given up on the caller, it would still compile the backbone, where it does not see the pass.
    run = _call if torch.compiler.is_compiling() else _call_outside_graphs
    token = active_pass.set(retro_pass)
    try:
        return run(module, inputs)
    finally:
        active_pass.reset(token)


def _call(module: nn.Module, inputs: dict[str, Any]) -> Any:
    return module(**inputs)


_call_outside_graphs = torch.compiler.disable(_call)


def checkpoint_within_pass(checkpoint: Callable, function: Callable, *args: Any) -> Any:
    """Checkpoint a layer so that its recomputation in the backward pass finds the pass that it belongs to."""
    retro_pass = active_pass.get()

    def run(*inputs: Any) -> Any:
        token = active_pass.set(retro_pass)
        try:
            return function(*inputs)
        finally:
            active_pass.reset(token)

    return checkpoint(run, *args)
