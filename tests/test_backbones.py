"""Every family: off it is the base, and cached equals full; families that cannot be served are told why."""

import json
import re
import runpy
from pathlib import Path

import pytest
import torch
import transformers
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

from retro_hf import RetroConfig, RetroForCausalLM
from retro_hf.errors import UnsupportedBackboneError
from retro_hf.model.backbone_retro import find_branch_end, find_decoder_layers
from retro_hf.model.compatibility_retro import CACHE_NAME

from .tiny import (
    ENCODER,
    FAMILIES,
    hash_retriever,
    neighbors_from,
    random_ids,
    random_neighbors,
    tiny_backbone,
    tiny_retro,
)
from .zoo import FAMILIES as ZOO
from .zoo import check_family, tiny_config


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
                cache = out[CACHE_NAME]
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


@pytest.mark.parametrize("family", ["llama", "gemma3", "falcon"])
def test_after_layer_generates_the_same_with_a_cache(family):
    """The other placement has the same contracts."""
    model = tiny_retro(family, cross_attention_placement="after_layer")
    options = dict(retriever=hash_retriever(), max_new_tokens=9, **GREEDY)
    cached = model.generate(**padded_batch(), **options)
    assert torch.equal(cached, model.generate(**padded_batch(), use_cache=False, **options))
    assert not torch.equal(cached, model.generate(**padded_batch(), max_new_tokens=9, **GREEDY))


# ── the zoo ───────────────────────────────────────────────────────────────────────────────────────────────────────────


ROOT = Path(__file__).parents[1]
RECORD = json.loads((ROOT / "benchmarks" / "results" / "backbones.json").read_text())
RESULTS = RECORD["families"]
# One of each kind; the rest takes minutes.
QUICK = (
    *("afmoe", "bert", "codegen", "deepseek_v3", "falcon_h1", "gemma4", "got_ocr2", "gpt_oss", "lfm2", "llama4_text"),
    *("mixtral", "qwen3_5_text", "zaya", "doge", "deepseek_v4", "mamba", "whisper"),
)


IS_RECORDED = RECORD["transformers"] == transformers.__version__


@pytest.mark.skipif(not IS_RECORDED, reason=f"the results are those of transformers {RECORD['transformers']}")
def test_the_results_cover_every_family():
    """A new version in constraints.txt needs a new run of `benchmarks/backbones.py`."""
    assert sorted(RESULTS) == list(ZOO)
    assert set(QUICK) <= set(RESULTS)
    assert "fails" not in {row["status"] for row in RESULTS.values()}


def test_the_pages_say_what_the_results_say():
    """`python benchmarks/backbones.py --page` writes the page."""
    script = runpy.run_path(str(ROOT / "benchmarks" / "backbones.py"))
    assert (ROOT / "docs" / "backbones.md").read_text() == script["page"](RECORD)
    works = sum(row["works"] for row in RESULTS.values())
    assert f"{works} of the {len(RESULTS)} families" in " ".join((ROOT / "docs" / "retrofit.md").read_text().split())


@pytest.mark.parametrize(
    "family", [family if family in QUICK else pytest.param(family, marks=pytest.mark.slow) for family in RESULTS]
)
def test_family_is_as_docs_backbones_says(family, tmp_path):
    """It works, with cross-attention where the page says, or is refused with the error of the results."""
    row = RESULTS[family]
    if row["status"] == "works":
        found = check_family(family, tmp_path, row["placement"])
        assert found["check_placement"] == row["where"]
        assert found["check_rollback"] == row["rollback"]
    elif row["status"] == "refused":
        with pytest.raises(UnsupportedBackboneError, match=re.escape(row["reason"]) if IS_RECORDED else None):
            check_family(family, tmp_path)
    else:
        pytest.skip(row["reason"])


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
    backbone.model.draft = nn.ModuleList(backbone.model.layers)
    with pytest.raises(ValueError, match=r"found \['model.draft', 'model.layers'\].*Name it"):
        find_decoder_layers(backbone)


def test_a_list_outside_the_decoder_is_not_its_layers():
    """An image encoder may be as deep as the decoder."""
    backbone = tiny_backbone("llama")
    backbone.vision = nn.ModuleList(backbone.model.layers)
    assert find_decoder_layers(backbone) is backbone.model.layers


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


@pytest.mark.parametrize(
    ("family", "message"),
    [
        ("gemma3n_text", r"'gemma3n_text' have several residual streams \(`altup`\)"),
        (
            "minimax",
            rf"'minimax' keeps its history in its own kind of state, .* Mini.*{CACHE_NAME}",
        ),
        ("rwkv", r"'rwkv' keeps its history in its own kind of state"),
        ("blt", r"The config of the family 'blt' has no `num_hidden_layers`"),
    ],
)
def test_families_that_cannot_be_served(family, message):
    """The error names the family and what stands in the way."""
    with torch.device("meta"):
        backbone = AutoModelForCausalLM.from_config(tiny_config(family))
    with pytest.raises(ValueError, match=message):
        find_decoder_layers(backbone)


@pytest.mark.parametrize(("family", "attribute"), [("doge", "input_residual"), ("beam", "attn_residual_add_idx")])
def test_layers_that_scale_their_input(family, attribute):
    """x + branch is not their stream, so cross-attention can go after them only."""
    with torch.device("meta"):
        backbone = AutoModelForCausalLM.from_config(tiny_config(family))
    layer = find_decoder_layers(backbone)[1]
    with pytest.raises(ValueError, match=rf"family '{family}'\) scales its input .*`{attribute}`.*after_layer"):
        find_branch_end(backbone, layer, "self_attn")


def test_layers_with_more_vectors_than_tokens():
    """CPM-Ant puts a learned prompt before the text, so its layers count other positions than the chunks do."""
    config = tiny_config("cpmant")
    model = build(config, backbone_layers="cpmant.encoder.layers", cross_attention_placement="after_layer").eval()
    with pytest.raises(
        ValueError, match=r"layer 1 has the shape \(2, 46, 32\), but the input has 2 rows of 14 tokens"
    ):
        model(random_ids(2, 14), use_cache=False, **random_neighbors(2, 3))
