"""Every family: off it is the base, cached equals full, and the cross-attention sits where the paper puts it."""

import copy

import pytest
import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

from retro_hf import RetroConfig, RetroForCausalLM
from retro_hf.backbone_retro import find_branch_end, find_decoder_layers
from retro_hf.modeling_retro_decoder import position_features

from .tiny import (
    CHUNK_SIZE,
    ENCODER,
    FAMILIES,
    hash_retriever,
    neighbors_from,
    random_ids,
    random_neighbors,
    tiny_backbone,
    tiny_retro,
)


GREEDY = {"do_sample": False, "eos_token_id": None, "pad_token_id": 0}


@pytest.fixture(scope="module", params=list(FAMILIES))
def model(request):
    """One RETRO per family."""
    return tiny_retro(request.param)


def padded_batch():
    """Two rows, the first with five tokens of padding at the left."""
    ids, mask = random_ids(2, 14), torch.ones(2, 14, dtype=torch.long)
    mask[0, :5] = 0
    return {"input_ids": ids.masked_fill(mask == 0, 1), "attention_mask": mask}


class TestEveryFamily:
    """What has to hold whatever the backbone."""

    def test_off_is_the_base(self, model):
        """Logits and loss without neighbors, bit for bit."""
        ids = random_ids(2, 14)
        base = model.model.backbone
        masked = random_neighbors(2, 3)
        masked["neighbor_attention_mask"] *= 0
        for neighbors in ({}, masked):
            out = model(ids, labels=ids, use_cache=False, **neighbors)
            expected = base(ids, labels=ids, use_cache=False)
            assert torch.equal(out.logits, expected.logits)
            assert torch.equal(out.loss, expected.loss)

    def test_cached_is_full(self, model):
        """Logits of a row fed in pieces, against one pass with given neighbors."""
        ids = random_ids(2, 14)
        full = model(ids, use_cache=False, **neighbors_from(hash_retriever(), ids)).logits
        assert (full - model(ids).logits).abs().max() > 0.05
        for splits in ([5, 3, 1, 1, 4], [13, 1]):
            cache, pieces = None, []
            for piece in ids.split(splits, dim=1):
                out = model(piece, past_key_values=cache, use_cache=True, retriever=hash_retriever())
                cache = out.past_key_values
                pieces.append(out.logits)
            torch.testing.assert_close(torch.cat(pieces, dim=1), full, atol=2e-5, rtol=1e-4)

    def test_padded_rows_are_the_rows_alone(self, model):
        """Greedy tokens of a left-padded batch."""
        inputs, options = padded_batch(), dict(retriever=hash_retriever(), max_new_tokens=7, **GREEDY)
        together = model.generate(**inputs, **options)
        assert torch.equal(together[:1, 5:], model.generate(inputs["input_ids"][:1, 5:], **options))
        assert torch.equal(together[1:], model.generate(inputs["input_ids"][1:], **options))

    @pytest.mark.parametrize(
        "variant",
        [{"use_cache": False}, {"cache_implementation": "static"}, {"prefill_chunk_size": 3}],
        ids=lambda variant: next(iter(variant)),
    )
    def test_generates_the_same_however_it_is_cached(self, model, variant):
        """No cache, a static cache and a prompt in pieces, on a left-padded batch."""
        options = dict(retriever=hash_retriever(), max_new_tokens=7, **GREEDY)
        assert torch.equal(
            model.generate(**padded_batch(), **variant, **options), model.generate(**padded_batch(), **options)
        )

    def test_beams(self, model):
        """Beam search with and without a cache."""
        options = dict(retriever=hash_retriever(), max_new_tokens=7, num_beams=3, num_return_sequences=2, **GREEDY)
        cached = model.generate(**padded_batch(), **options)
        assert torch.equal(cached, model.generate(**padded_batch(), use_cache=False, **options))

    def test_prompt_lookup(self, model):
        """Proposed tokens, taken back across chunk borders."""
        prompt = random_ids(1, 7).repeat(1, 2)
        options = dict(retriever=hash_retriever(), max_new_tokens=14, **GREEDY)
        proposed = model.generate(prompt, prompt_lookup_num_tokens=3, **options)
        assert torch.equal(proposed, model.generate(prompt, **options))


# ── placement ─────────────────────────────────────────────────────────────────────────────────────────────────────────


LAYER = 1  # the first layer with cross-attention


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


HAND_WRITTEN = {
    "retro_decoder": _retro_decoder,
    "llama": _llama,
    "qwen3": _llama,
    "mistral": _llama,
    "gpt2": _gpt2,
    "gemma2": _gemma,
    "gemma3": _gemma,
    "olmo2": _olmo2,
    "bloom": _bloom,
    "gpt_neox": _gpt_neox,
    "falcon": _falcon,
    "granite": _granite,
}


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


def run_layer(model, ids, neighbors):
    """One pass; what went into and out of the first layer with cross-attention, its attention and its CCA."""
    layers = find_decoder_layers(model.model.backbone)
    layer = layers[LAYER]
    attention = next(child for child in layer.children() if "Attention" in type(child).__name__)
    recorder = _Recorder(layer=layer, attention=attention)
    model(ids, use_cache=False, **neighbors)
    args, kwargs, _ = recorder.seen["layer"]
    return layer, args[0] if args else kwargs["hidden_states"], recorder


def cross_attention_by_hand(model, ids, neighbors):
    """CCA of the tested layer as a function of the residual stream, without hooks, cache or grid pass."""
    cross = model.model.retro.cross_attention[str(LAYER)]
    mask = neighbors["neighbor_attention_mask"].bool()
    batch_size, num_chunks, num_neighbors, size = mask.shape
    m = CHUNK_SIZE

    def cca(stream):
        update = torch.zeros_like(stream)
        steps = torch.arange(m + size - 1)
        features = position_features(2 * m - 2 - steps, stream.shape[-1], stream.dtype)
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
                    features,
                    mask[row, u].flatten()[None, None, None],
                    num_repeats=num_neighbors,
                )
                update[row, start : start + m] = out[0, : len(queries)]
        return update

    return cca


@pytest.mark.parametrize("family", list(HAND_WRITTEN))
def test_cross_attention_comes_after_attention_and_before_feed_forward(family):
    """The layer's output equals one written by hand in the order ATTN → CCA → FFW."""
    model = tiny_retro(family, text_config={"attention_dropout": 0.0})
    ids, neighbors = random_ids(2, 14), random_neighbors(2, 3)
    with torch.no_grad():
        layer, x, recorder = run_layer(model, ids, neighbors)
        attention = recorder.seen["attention"]
        got = recorder.output("layer")

        def attend(module, hidden_states):
            """The attention branch on its own, with the arguments that the layer gave it, without residual or hooks."""
            alone = copy.deepcopy(module)
            alone._forward_hooks.clear()
            args, kwargs, _ = attention
            if args:
                args = (hidden_states, *args[1:])
            else:
                kwargs = {**kwargs, "hidden_states": hidden_states}
            if family == "bloom":
                args = (hidden_states, torch.zeros_like(hidden_states), *args[2:])
            out = alone(*args, **kwargs)
            return out[0] if isinstance(out, tuple) else out

        expected = HAND_WRITTEN[family](
            layer_without_hooks(layer), x, attend, cross_attention_by_hand(model, ids, neighbors)
        )
    assert (expected - x).abs().max() > 0.05
    torch.testing.assert_close(got, expected, atol=2e-5, rtol=1e-4)
    with torch.no_grad():
        off = HAND_WRITTEN[family](layer_without_hooks(layer), x, attend, torch.zeros_like)
    assert (got - off).abs().max() > 0.01


def layer_without_hooks(layer):
    """A copy of a layer whose modules can be called by hand."""
    twin = copy.deepcopy(layer)
    for module in twin.modules():
        module._forward_hooks.clear()
        module._forward_pre_hooks.clear()
    return twin


@pytest.mark.parametrize("family", ["llama", "gpt2", "bloom", "gpt_neox"])
def test_after_layer_adds_to_what_the_layer_returns(family):
    """`after_layer`: the layer of the base, then CCA, whatever is inside."""
    model = tiny_retro(family, cross_attention_placement="after_layer")
    ids, neighbors = random_ids(2, 14), random_neighbors(2, 3)
    with torch.no_grad():
        layer, x, recorder = run_layer(model, ids, neighbors)
        args, kwargs, _ = recorder.seen["layer"]
        plain = layer_without_hooks(layer)(*args, **kwargs)
        plain = plain[0] if isinstance(plain, tuple) else plain
        expected = plain + cross_attention_by_hand(model, ids, neighbors)(plain)
    torch.testing.assert_close(recorder.output("layer"), expected, atol=2e-5, rtol=1e-4)
    assert model.config.cross_attention_placement == "after_layer"


@pytest.mark.parametrize("family", ["llama", "gemma3", "falcon"])
def test_after_layer_generates_the_same_with_a_cache(family):
    """The other placement has the same contracts."""
    model = tiny_retro(family, cross_attention_placement="after_layer")
    options = dict(retriever=hash_retriever(), max_new_tokens=9, **GREEDY)
    cached = model.generate(**padded_batch(), **options)
    assert torch.equal(cached, model.generate(**padded_batch(), use_cache=False, **options))
    assert not torch.equal(cached, model.generate(**padded_batch(), max_new_tokens=9, **GREEDY))


# ── families that the rule does not know ──────────────────────────────────────────────────────────────────────────────


def build(text_config, **kwargs):
    """A RETRO around a config."""
    return RetroForCausalLM(
        RetroConfig(
            text_config=text_config,
            neighbor_encoder_config=ENCODER,
            chunk_size=4,
            cross_attention_layers=[1],
            **kwargs,
        )
    )


def test_encoder_decoders_are_refused():
    """RETRO needs a decoder-only model."""
    backbone = AutoModelForCausalLM.from_config(
        AutoConfig.for_model(
            "bart",
            vocab_size=99,
            d_model=32,
            decoder_layers=4,
            encoder_layers=4,
            decoder_ffn_dim=32,
            num_hidden_layers=4,
        )
    )
    backbone.config.is_encoder_decoder = True
    with pytest.raises(ValueError, match=r"'bart' is an encoder-decoder; RETRO needs a decoder-only"):
        find_decoder_layers(backbone)


class _Strange(nn.Module):
    """A layer without any module that is called attention."""

    def __init__(self, layer):
        super().__init__()
        self.mixer, self.rest = nn.Sequential(layer.self_attn), nn.ModuleList([layer.mlp])


def test_layers_that_are_not_found():
    """The error says what was looked for, what was found, and how to name it."""
    backbone = tiny_backbone("llama")
    backbone.model.layers = nn.ModuleList([_Strange(layer) for layer in backbone.model.layers])
    message = (
        r"decoder layers of the family 'llama': looked in LlamaForCausalLM for one nn.ModuleList of 4 .*found none.*"
    )
    with pytest.raises(ValueError, match=message + r"backbone_layers='model.layers'"):
        find_decoder_layers(backbone)
    assert find_decoder_layers(backbone, "model.layers") is backbone.model.layers


def test_two_lists_that_could_be_the_layers():
    """Ambiguity is told with both names."""
    backbone = tiny_backbone("llama")
    backbone.draft = nn.ModuleList(backbone.model.layers)
    with pytest.raises(ValueError, match=r"found \['draft', 'model.layers'\].*Name it"):
        find_decoder_layers(backbone)


def test_attention_that_is_not_found():
    """The error names the children, and both ways out."""
    backbone = tiny_backbone("llama")
    layer = _Strange(backbone.model.layers[0])
    with pytest.raises(
        ValueError, match=r"self-attention of _Strange .*found none among \['mixer', 'rest'\].*after_layer"
    ):
        find_branch_end(backbone, layer)
    assert find_branch_end(backbone, layer, "mixer").module is layer.mixer


@pytest.mark.parametrize(
    ("names", "message"),
    [
        ({"backbone_layers": "model.blocks"}, r"`backbone_layers='model.blocks'` is not a module of LlamaForCausalLM"),
        (
            {"backbone_layers": "model"},
            r"`backbone_layers='model'` must be an nn.ModuleList of 4 layers, found LlamaModel",
        ),
        ({"backbone_attention": "attn"}, r"`backbone_attention='attn'` is not a module of LlamaDecoderLayer"),
    ],
)
def test_wrong_names(names, message):
    """Names given by hand are checked."""
    with pytest.raises(ValueError, match=message):
        build(FAMILIES["llama"], **names)


def test_names_given_by_hand():
    """Layers and attention named by hand give the model that the rule gives."""
    named = tiny_retro("llama", backbone_layers="model.layers", backbone_attention="self_attn")
    ids, neighbors = random_ids(2, 14), random_neighbors(2, 3)
    assert torch.equal(named(ids, **neighbors).logits, tiny_retro("llama")(ids, **neighbors).logits)


def test_the_backbone_stays_as_it_was():
    """Module tree and names of the backbone are those of the base."""
    base = tiny_backbone("llama")
    names, keys = [name for name, _ in base.named_modules()], list(base.state_dict())
    model = tiny_retro("llama")
    assert [name for name, _ in model.model.backbone.named_modules()] == names
    assert list(model.model.backbone.state_dict()) == keys
