"""retrofit(): from a checkpoint or a live model to a RETRO whose base is untouched."""

import logging

import pytest
import torch
from huggingface_hub.errors import StrictDataclassClassValidationError
from torch import nn
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
)

from retro_hf import RetroForCausalLM, retrofit
from retro_hf.errors import PretrainedNotFoundError, RetroError, UnsupportedBackboneError
from retro_hf.retrofit import parameter_report

from .tiny import ENCODER, FAMILIES, hash_retriever, random_ids, random_neighbors, tiny_backbone, tiny_retro
from .zoo import tiny_config


SETTINGS = {"chunk_size": 4, "cross_attention_layers": [1, 3]}


@pytest.mark.parametrize("family", list(FAMILIES))
def test_step_zero_is_the_base(tmp_path, family):
    """From a folder of any family: logits, loss and generated tokens are the base's, bit for bit, with neighbors."""
    base = tiny_backbone(family)
    ids = random_ids(2, 14)
    options = dict(max_new_tokens=6, do_sample=False, eos_token_id=None, pad_token_id=0)
    base.save_pretrained(tmp_path)
    model = retrofit(tmp_path, **SETTINGS)
    base = AutoModelForCausalLM.from_pretrained(tmp_path)
    with torch.no_grad():
        expected = base(ids, labels=ids)
        for inputs in (random_neighbors(2, 3), {"retriever": hash_retriever()}, {}):
            out = model(ids, labels=ids, **inputs)
            assert torch.equal(out.logits, expected.logits)
            assert torch.equal(out.loss, expected.loss)
    assert torch.equal(model.generate(ids, retriever=hash_retriever(), **options), base.generate(ids, **options))


@pytest.mark.parametrize("placement", ["after_attention", "after_layer"])
@pytest.mark.parametrize("family", ["llama", "gemma3", "bloom", "falcon", "granite"])
def test_only_retro_trains_and_all_of_it(family, placement):
    """After two steps every weight of RETRO has a gradient, and the base none and no change."""
    base = tiny_backbone(family)
    before = {name: tensor.clone() for name, tensor in base.state_dict().items()}
    model = retrofit(base, encoder=ENCODER, cross_attention_placement=placement, **SETTINGS).train()
    ids, neighbors = random_ids(2, 14), random_neighbors(2, 3)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    for _ in range(2):  # the first moves only the zero-initialized output projections
        optimizer.zero_grad()
        model(ids, labels=ids, **neighbors).loss.backward()
        optimizer.step()
    silent = [name for name, p in model.model.retro.named_parameters() if p.grad is None or not p.grad.any()]
    assert silent == []
    assert all(p.grad is None for p in model.model.backbone.parameters())
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.model.backbone.state_dict().items())
    model.eval()
    with torch.no_grad():
        assert torch.equal(model(ids).logits, model.model.backbone(ids).logits)
        assert not torch.equal(model(ids, **neighbors).logits, model(ids).logits)


def test_live_model_becomes_part_of_the_result():
    """No copy is made; dtype and attention implementation are the base's."""
    base = tiny_backbone("llama").to(torch.bfloat16)
    base.set_attn_implementation("eager")
    model = retrofit(base, **SETTINGS)
    assert model.model.backbone is base
    assert base.config._attn_implementation == "eager"
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert not model.training


def test_the_live_base_stays_causal():
    """Building a config around a live model must not reset how it attends."""
    base = tiny_backbone("llama")
    ids = random_ids(1, 9)
    expected = base(ids).logits[:, :5]
    model = retrofit(base, **SETTINGS)
    changed = ids.clone()
    changed[:, 5:] = 7
    torch.testing.assert_close(model(changed).logits[:, :5], expected)


def test_unfrozen_and_separate_embeddings():
    """The base may train too, and neighbors may have embeddings of their own."""
    model = retrofit(tiny_backbone("llama"), freeze_backbone=False, share_embeddings=False, **SETTINGS)
    assert all(p.requires_grad for p in model.parameters())
    assert model.model.retro.encoder.embed_tokens.weight.shape[0] == 99


def test_parameter_report(caplog):
    """One line says what is added and what trains."""
    caplog.set_level(logging.INFO, logger="retro_hf.retrofit")
    base = tiny_backbone("llama")
    num_base = sum(p.numel() for p in base.parameters())
    model = retrofit(base, encoder=ENCODER, **SETTINGS)
    num_retro = sum(p.numel() for p in model.model.retro.parameters())
    report = parameter_report(model)
    assert report.startswith(f"base {num_base:,} + retro {num_retro:,} ({num_retro / num_base:.1%}) | ")
    assert report.endswith(
        f"trainable {num_retro:,} of {num_base + num_retro:,} ({num_retro / (num_base + num_retro):.1%})"
    )
    assert "\n" not in report


def test_retro_cannot_be_retrofitted(tmp_path):
    """A RETRO model is one already, loaded or named."""
    model = tiny_retro("llama")
    model.save_pretrained(tmp_path)
    for base in (model, tmp_path):
        with pytest.raises(ValueError, match=r"RETRO model already.*`model.backbone`"):
            retrofit(base)


def test_base_and_revision_are_recorded(tmp_path):
    """The result knows where its base came from."""
    tiny_backbone("llama").save_pretrained(tmp_path)
    assert retrofit(tmp_path, **SETTINGS).config.backbone_name_or_path == str(tmp_path)
    base = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert retrofit(base, **SETTINGS).config.backbone_name_or_path == str(tmp_path)
    assert retrofit(tiny_backbone("llama"), **SETTINGS).config.backbone_name_or_path is None


class _Nameless(nn.Module):
    """A layer that does not look like one."""

    def __init__(self, layer):
        super().__init__()
        self.layer = layer


def test_unknown_family():
    """The error is ours, a `ValueError` too, and says how to name the layers."""
    base = tiny_backbone("llama")
    base.model.layers = nn.ModuleList([_Nameless(layer) for layer in base.model.layers])
    with pytest.raises(UnsupportedBackboneError, match=r"family 'llama'.*backbone_layers='model.layers'") as caught:
        retrofit(base, **SETTINGS)
    assert isinstance(caught.value, RetroError)
    assert isinstance(caught.value, ValueError)
    with pytest.raises(UnsupportedBackboneError, match=r"self-attention of _Nameless.*backbone_attention"):
        retrofit(base, backbone_layers="model.layers", **SETTINGS)
    assert (
        type(retrofit(base, backbone_layers="model.layers", backbone_attention="layer.self_attn", **SETTINGS))
        is RetroForCausalLM
    )


def test_encoder_decoder(tmp_path):
    """T5 has no place for RETRO, loaded or named."""
    config = AutoConfig.for_model(
        "t5", vocab_size=99, d_model=32, d_kv=8, d_ff=32, num_layers=2, num_heads=4, decoder_start_token_id=0
    )
    base = AutoModelForSeq2SeqLM.from_config(config)
    base.save_pretrained(tmp_path)
    for given in (base, tmp_path):
        with pytest.raises(UnsupportedBackboneError, match=r"decoder-only causal language model such as Llama"):
            retrofit(given, chunk_size=4)


@pytest.mark.parametrize("auto", [AutoModel, AutoModelForSequenceClassification])
def test_a_base_without_its_head(auto):
    """Loaded by another class than the one that predicts tokens."""
    base = auto.from_config(tiny_backbone("gpt2").config)
    with pytest.raises(UnsupportedBackboneError, match=r"GPT2\w+ has no language-model head.*`AutoModelForCausalLM`"):
        retrofit(base, **SETTINGS)


@pytest.mark.parametrize(
    ("base", "message"),
    [
        (None, "got None"),
        (nn.Linear(2, 2), r"\(`PreTrainedModel`\), got Linear"),
        (tiny_config("llama"), r"got LlamaConfig.*`retrofit\(AutoModelForCausalLM.from_config\(config\)\)`"),
    ],
    ids=["none", "module", "config"],
)
def test_invalid_base_is_refused(base, message):
    """It is said what a base is, and how to make one of a config."""
    with pytest.raises(UnsupportedBackboneError, match=f"must be a folder, .*{message}"):
        retrofit(base)


def test_a_decoder_with_fewer_layers_in_its_encoder():
    """BART's decoder alone: refused for attending to an encoder, not for the number of layers."""
    base = from_config("bart", encoder_layers=2, decoder_layers=4)
    with pytest.raises(UnsupportedBackboneError, match="also attend to an encoder or an image"):
        retrofit(base, **SETTINGS)


def test_wrong_settings_keep_their_own_error():
    """What is wrong with the settings is not blamed on the base."""
    with pytest.raises(ValueError, match="Did you mean 'chunk_size'"):
        retrofit(tiny_backbone("llama"), chunk_len=4)
    with pytest.raises(StrictDataclassClassValidationError, match=r"counted from 0 to 3, got \[4\]"):
        retrofit(tiny_backbone("llama"), cross_attention_layers=[4])


def test_a_reader_that_is_no_name_is_no_fault_of_the_base():
    with pytest.raises(ValueError) as caught:
        retrofit(tiny_backbone("llama"), reader=["cross_attention"])
    assert not isinstance(caught.value, UnsupportedBackboneError)


def from_config(family, **fields):
    """A live base of a family in `zoo.py`."""
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(tiny_config(family, **fields)).eval()


def test_embeddings_of_another_width_than_the_layers():
    """OPT-350m embeds in 512 dimensions and computes in 1024; neighbors are read through the same table."""
    model = retrofit(from_config("opt", word_embed_proj_dim=24), **SETTINGS)
    assert model.model.retro.encoder.embed_proj.in_features == 24
    ids, neighbors = random_ids(2, 14), random_neighbors(2, 3)
    with torch.no_grad():
        assert torch.equal(model(ids, **neighbors).logits, model(ids).logits)


def test_configs_without_a_padding_token():
    """Not every config has the field."""
    base = from_config("codegen")
    assert not hasattr(base.config, "pad_token_id")
    assert retrofit(base, **SETTINGS).config.pad_token_id is None


def test_heads_that_differ_between_layers():
    """Gemma 4's head_dim does; cross-attention takes that of the first layer."""
    base = from_config("gemma4_text", head_dim=8, global_head_dim=16)
    assert retrofit(base, **SETTINGS).config.cross_attention_head_dim == 8


def test_a_live_base_of_several_parts_keeps_how_each_attends():
    """GOT-OCR 2's image encoder has no sdpa, its language model has."""
    base = from_config("got_ocr2")
    before = base.config._attn_implementation, base.config.text_config._attn_implementation
    assert before[0] != before[1]
    retrofit(base, **SETTINGS)
    assert (base.config._attn_implementation, base.config.text_config._attn_implementation) == before


def test_a_recurrent_state_is_not_taken_back():
    """Assisted decoding is refused for a base with a recurrent state, as it is by the base."""
    base = from_config("qwen3_next")
    with pytest.raises(ValueError, match="not supported with stateful models, such as RetroForCausalLM"):
        retrofit(base, **SETTINGS).generate(
            random_ids(1, 7).repeat(1, 2), prompt_lookup_num_tokens=3, max_new_tokens=4, pad_token_id=0
        )


@pytest.mark.parametrize("name", ["org/no-such-model", "./nowhere/at/all"])
def test_a_base_that_is_not_there(name):
    """Our own error, whatever the Hub's client says; a path is not looked for there."""
    with pytest.raises(PretrainedNotFoundError, match=f"There is no folder '{name}'"):
        retrofit(name)


def test_a_folder_without_a_model(tmp_path):
    """An empty folder is explained, too."""
    with pytest.raises(PretrainedNotFoundError, match=f"The folder '{tmp_path}' holds no model that can be loaded"):
        retrofit(tmp_path)


def test_base_of_another_retro_is_refused():
    """The layers would read twice, and both models fail at their next pass."""
    base = tiny_backbone("llama")
    first = retrofit(base, chunk_size=4, cross_attention_layers=[1])
    for layers in ([1], [2]):
        with pytest.raises(ValueError, match="another RETRO"):
            retrofit(base, chunk_size=4, cross_attention_layers=layers)
    first(random_ids(1, 9), **random_neighbors(1, 2))
