"""Where cross-attention enters a layer: its output equals one written by hand in the order ATTN → CCA → FFW."""

import copy
from collections.abc import Callable
from typing import NamedTuple

import pytest
import torch

from retro_hf import RetroConfig, RetroForCausalLM
from retro_hf.model.attention_retro import sinusoids_of
from retro_hf.model.backbone_retro import find_decoder_layers

from .tiny import CHUNK_SIZE, ENCODER, FAMILIES, random_ids, random_neighbors, randomize, tiny_retro
from .zoo import tiny_config


def _pre_norm(layer, x, attend, cca, attention, norm, feed_forward, feed_forward_norm, multiplier=1.0):
    """x → x + ATTN(norm x) → CCA → x + FFW(norm x)."""
    x = x + multiplier * attend(getattr(layer, attention), getattr(layer, norm)(x))
    x = x + cca(x)
    return x + multiplier * getattr(layer, feed_forward)(getattr(layer, feed_forward_norm)(x))


def _llama(layer, x, attend, cca, multiplier=1.0):
    return _pre_norm(
        layer, x, attend, cca, "self_attn", "input_layernorm", "mlp", "post_attention_layernorm", multiplier
    )


def _granite(layer, x, attend, cca):
    return _llama(layer, x, attend, cca, multiplier=0.3)


def _gpt2(layer, x, attend, cca):
    return _pre_norm(layer, x, attend, cca, "attn", "ln_1", "mlp", "ln_2")


def _retro_decoder(layer, x, attend, cca):
    return _pre_norm(layer, x, attend, cca, "self_attn", "self_attn_norm", "mlp", "mlp_norm")


def _gemma(layer, x, attend, cca):
    """Both branches are normed at their end, before they are added."""
    x = x + layer.post_attention_layernorm(attend(layer.self_attn, layer.input_layernorm(x)))
    x = x + cca(x)
    return x + layer.post_feedforward_layernorm(layer.mlp(layer.pre_feedforward_layernorm(x)))


def _olmo2(layer, x, attend, cca):
    """Norms at the end of the branches only."""
    x = x + layer.post_attention_layernorm(attend(layer.self_attn, x))
    x = x + cca(x)
    return x + layer.post_feedforward_layernorm(layer.mlp(x))


def _bloom(layer, x, attend, cca):
    """The attention and feed-forward modules add the residual themselves."""
    x = x + attend(layer.self_attention, layer.input_layernorm(x))
    x = x + cca(x)
    return layer.mlp(layer.post_attention_layernorm(x), x)


def _gpt_neox(layer, x, attend, cca):
    """Attention and feed-forward in parallel: both read the layer's input."""
    attention = attend(layer.attention, layer.input_layernorm(x))
    update = cca(x + attention)
    return x + attention + update + layer.mlp(layer.post_attention_layernorm(x))


def _falcon(layer, x, attend, cca):
    """Parallel, with one norm for both."""
    normed = layer.input_layernorm(x)
    attention = attend(layer.self_attention, normed)
    return x + attention + cca(x + attention) + layer.mlp(normed)


def _afmoe(layer, x, attend, cca):
    """As Gemma, under other names."""
    x = x + layer.post_attention_layernorm(attend(layer.self_attn, layer.input_layernorm(x)))
    x = x + cca(x)
    return x + layer.post_mlp_layernorm(layer.mlp(layer.pre_mlp_layernorm(x)))


def _glm4(layer, x, attend, cca):
    """Here `post_attention_layernorm` is the norm before the feed-forward layer."""
    x = x + layer.post_self_attn_layernorm(attend(layer.self_attn, layer.input_layernorm(x)))
    x = x + cca(x)
    return x + layer.post_mlp_layernorm(layer.mlp(layer.post_attention_layernorm(x)))


def _hyperclovax(layer, x, attend, cca):
    """Both branches are normed, then multiplied."""
    x = x + 0.3 * layer.post_norm1(attend(layer.self_attn, layer.input_layernorm(x)))
    x = x + cca(x)
    return x + 0.3 * layer.post_norm2(layer.mlp(layer.post_attention_layernorm(x)))


def _minicpm3(layer, x, attend, cca):
    """The multiplier depends on the number of layers."""
    return _llama(layer, x, attend, cca, multiplier=1.4 / 4**0.5)


def _lfm3(layer, x, attend, cca):
    """A convolution in the place of attention, normed at its end."""
    x = x + layer.post_operator_norm(attend(layer.conv, layer.operator_norm(x)))
    x = x + cca(x)
    return x + layer.post_ffn_norm(layer.feed_forward(layer.ffn_norm(x)))


def _qwen3_next(layer, x, attend, cca):
    """Linear attention in the place of attention, and a mixture of experts."""
    return _pre_norm(layer, x, attend, cca, "linear_attn", "input_layernorm", "mlp", "post_attention_layernorm")


def _bamba(layer, x, attend, cca):
    """A state space in the place of attention."""
    return _pre_norm(layer, x, attend, cca, "mamba", "input_layernorm", "feed_forward", "pre_ff_layernorm")


def _falcon_h1(layer, x, attend, cca):
    """Attention and a state space in parallel: cross-attention goes beside the latter."""
    normed = layer.input_layernorm(x)
    attention = 0.7 * attend(layer.self_attn, 0.9 * normed)
    x = x + 0.8 * layer.mamba(normed) + attention + cca(x + attention)
    return x + layer.feed_forward(layer.pre_ff_layernorm(x))


def _dbrx(layer, x, attend, cca):
    """The attention is a grandchild of the layer, beside both norms."""
    part = layer.norm_attn_norm
    x = x + attend(part.attn, part.norm_1(x))
    x = x + cca(x)
    return x + layer.ffn(part.norm_2(x))


def _zaya(layer, x, attend, cca):
    """A module of its own scales both, the layer's input and the attention, and adds them."""
    x = layer.post_attention_residual_scale(attend(layer.self_attn, layer.input_layernorm(x)), x)
    x = x + cca(x)
    return layer.post_mlp_residual_scale(layer.mlp(layer.post_attention_layernorm(x), None)[0], x)


def _inkling(layer, x, attend, cca):
    """A convolution at the end of each branch."""
    x = x + layer.attn_sconv(attend(layer.self_attn, layer.input_layernorm(x)))
    x = x + cca(x)
    return x + layer.mlp_sconv(layer.mlp(layer.post_attention_layernorm(x)))


def _bert(layer, x, attend, cca):
    """The attention module adds its input, and norms the sum."""
    x = attend(layer.attention, x)
    x = x + cca(x)
    return layer.output(layer.intermediate(x), x)


class Layout(NamedTuple):
    """How one family's layer is written by hand.

    Args:
        by_hand: takes the layer, its input, a function for the attention branch and CCA; returns the layer's output.
        attention: the module that `by_hand` calls through its third argument.
        layer: index of the layer.
        sizes: fields of the config that matter here.
    """

    by_hand: Callable
    attention: str = "self_attn"
    layer: int = 1
    sizes: dict = {}


HAND_WRITTEN = {
    "retro_decoder": Layout(_retro_decoder),
    "llama": Layout(_llama),
    "qwen3": Layout(_llama),
    "mistral": Layout(_llama),
    "gpt2": Layout(_gpt2, "attn"),
    "gemma2": Layout(_gemma),
    "gemma3": Layout(_gemma),
    "olmo2": Layout(_olmo2),
    "bloom": Layout(_bloom, "self_attention"),
    "gpt_neox": Layout(_gpt_neox, "attention"),
    "falcon": Layout(_falcon, "self_attention"),
    "granite": Layout(_granite),
    "afmoe": Layout(_afmoe),
    "glm4": Layout(_glm4),
    "hyperclovax": Layout(_hyperclovax, sizes={"residual_multiplier": 0.3}),
    "minicpm3": Layout(_minicpm3, sizes={"scale_depth": 1.4}),
    "lfm3": Layout(_lfm3, "conv"),
    "qwen3_next": Layout(_qwen3_next, "linear_attn", layer=0),
    "bamba": Layout(_bamba, "mamba", layer=0),
    "falcon_h1": Layout(
        _falcon_h1,
        sizes={"attention_out_multiplier": 0.7, "attention_in_multiplier": 0.9, "ssm_out_multiplier": 0.8},
    ),
    "dbrx": Layout(_dbrx, "norm_attn_norm.attn"),
    "zaya": Layout(_zaya, layer=0),
    "inkling_text": Layout(_inkling),
    "bert": Layout(_bert, "attention"),
}


def build(family, first_layer=1, sizes=None, **config):
    """A RETRO with random weights over a family of `tiny.py` or `zoo.py`, cross-attention in two layers."""
    config["cross_attention_layers"] = [first_layer, 3]
    if family in FAMILIES:
        return tiny_retro(family, text_config=sizes, **config)
    torch.manual_seed(0)
    retro = RetroConfig(
        text_config=tiny_config(family, **(sizes or {})),
        neighbor_encoder_config=ENCODER,
        chunk_size=CHUNK_SIZE,
        **config,
    )
    return randomize(RetroForCausalLM(retro)).eval()


class _Recorder:
    """Inputs and outputs of modules, by forward hooks."""

    def __init__(self, **modules):
        self.seen = {}
        for name, module in modules.items():
            module.register_forward_hook(
                lambda m, args, kwargs, out, name=name: self.seen.__setitem__(name, (args, kwargs, out)),
                with_kwargs=True,
            )

    def output(self, name):
        out = self.seen[name][2]
        return out[0] if isinstance(out, tuple) else out


def run_layer(model, layer, attention, ids, neighbors):
    """One pass; the layer's input, and what went into and out of it and its attention."""
    recorder = _Recorder(layer=layer, attention=layer.get_submodule(attention))
    model(ids, use_cache=False, **neighbors)
    args, kwargs, _ = recorder.seen["layer"]
    return args[0] if args else kwargs["hidden_states"], recorder


def cross_attention_by_hand(model, layer_idx, ids, neighbors):
    """CCA of one layer as a function of the residual stream, without hooks, cache or grid pass."""
    cross = model.model.retro.cross_attention[str(layer_idx)]
    mask = neighbors["neighbor_attention_mask"].bool()
    batch_size, num_chunks, num_neighbors, size = mask.shape
    m = CHUNK_SIZE

    def cca(stream):
        update = torch.zeros_like(stream)
        steps = torch.arange(m + size - 1)
        sinusoids = sinusoids_of(2 * m - 2 - steps, stream.shape[-1], stream.dtype)
        for row in range(batch_size):
            for u in range(num_chunks):
                encoded = model.model.retro.encoder(
                    neighbors["neighbor_input_ids"][row, u][None],
                    mask[row, u][None],
                    stream[row, u * m : (u + 1) * m][None],
                    torch.ones(1, m, dtype=torch.bool),
                    model.get_input_embeddings(),
                )
                keys = cross.attention.project_key_value(encoded)
                start = u * m + m - 1
                queries = stream[row, start : start + m]
                padded = torch.zeros(1, m, stream.shape[-1])
                padded[0, : len(queries)] = queries
                out, _ = cross.attention.attend(
                    cross.norm(padded),
                    *keys,
                    sinusoids,
                    mask[row, u].flatten()[None, None, None],
                    num_repeats=num_neighbors,
                )
                update[row, start : start + m] = out[0, : len(queries)]
        return update

    return cca


@pytest.mark.parametrize("family", list(HAND_WRITTEN))
def test_cross_attention_comes_after_attention_and_before_feed_forward(family):
    """The layer's output equals one written by hand in the order ATTN → CCA → FFW."""
    by_hand, path, layer_idx, sizes = HAND_WRITTEN[family]
    model = build(family, layer_idx, {"attention_dropout": 0.0, **sizes})
    ids, neighbors = random_ids(2, 14), random_neighbors(2, 3)
    layer = find_decoder_layers(model.model.backbone)[layer_idx]
    with torch.no_grad():
        x, recorder = run_layer(model, layer, path, ids, neighbors)
        attention = recorder.seen["attention"]
        got = recorder.output("layer")

        def attend(module, hidden_states):
            """The attention branch on its own, with the arguments that the layer gave it, without residual or hooks."""
            args, kwargs, _ = attention
            if args:
                args = (hidden_states, *args[1:])
            else:
                kwargs = {**kwargs, "hidden_states": hidden_states}
            if family == "bloom":
                args = (hidden_states, torch.zeros_like(hidden_states), *args[2:])
            out = module(*args, **kwargs)
            return out[0] if isinstance(out, tuple) else out

        plain = without_hooks(layer)
        expected = by_hand(plain, x, attend, cross_attention_by_hand(model, layer_idx, ids, neighbors))
        off = by_hand(plain, x, attend, torch.zeros_like)
    assert (expected - x).abs().max() > 0.05
    torch.testing.assert_close(got, expected, atol=2e-5, rtol=1e-4)
    assert (got - off).abs().max() > 0.01


def without_hooks(layer):
    """A copy of a layer whose modules can be called by hand."""
    twin = copy.deepcopy(layer)
    for module in twin.modules():
        module._forward_hooks.clear()
        module._forward_pre_hooks.clear()
    return twin


@pytest.mark.parametrize("family", ["llama", "gpt2", "bloom", "gpt_neox"])
def test_after_layer_adds_to_what_the_layer_returns(family):
    """`after_layer`: the layer of the base, then CCA, whatever is inside."""
    model = build(family, cross_attention_placement="after_layer")
    ids, neighbors = random_ids(2, 14), random_neighbors(2, 3)
    layer = find_decoder_layers(model.model.backbone)[1]
    with torch.no_grad():
        x, recorder = run_layer(model, layer, HAND_WRITTEN[family].attention, ids, neighbors)
        args, kwargs, _ = recorder.seen["layer"]
        plain = without_hooks(layer)(*args, **kwargs)
        plain = plain[0] if isinstance(plain, tuple) else plain
        expected = plain + cross_attention_by_hand(model, 1, ids, neighbors)(plain)
    torch.testing.assert_close(recorder.output("layer"), expected, atol=2e-5, rtol=1e-4)
    assert model.config.cross_attention_placement == "after_layer"
