"""Quantized bases on the CPU: their own output stays theirs, what RETRO adds trains in full precision and is saved alone."""

import json

import pytest
import torch
from safetensors import safe_open
from torch import nn
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, TorchAoConfig

from retro_hf import RetroForCausalLM, retrofit

from .tiny import ENCODER, hash_retriever, random_ids, random_neighbors, randomize, tiny_backbone


# Not in the environment of `make test`: transformers imports both wherever they are installed, which slows down and litters
# the output of every process. `pip install -e ".[quantization]"` makes these tests run.
pytestmark = pytest.mark.slow
KINDS = ["torchao int8", "bitsandbytes int8", "bitsandbytes nf4"]


def quantization(kind: str) -> TorchAoConfig | BitsAndBytesConfig:
    if kind == "torchao int8":
        from torchao.quantization import Int8WeightOnlyConfig

        return TorchAoConfig(Int8WeightOnlyConfig())
    if kind == "bitsandbytes int8":
        return BitsAndBytesConfig(load_in_8bit=True)
    return BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")


@pytest.fixture(params=KINDS)
def kind(request) -> str:
    return request.param


def quantized(kind: str, folder, **options) -> RetroForCausalLM:
    """A RETROfit of a quantized base that is saved, in full precision, in `folder`."""
    if not (folder / "config.json").exists():
        # Blocks of 64 weights: what bitsandbytes packs for the CPU must be a multiple.
        tiny_backbone("llama", hidden_size=64, intermediate_size=128).save_pretrained(folder)
    return retrofit(
        folder,
        encoder=ENCODER,
        chunk_size=4,
        cross_attention_layers=[1, 3],
        base_kwargs={"quantization_config": quantization(kind), "dtype": torch.float32},
        **options,
    )


def values(module: nn.Module) -> dict[str, torch.Tensor]:
    """Weights as numbers, whatever they are stored as."""
    return {name: getattr(p, "dequantize", lambda p=p: p)().detach().clone() for name, p in module.named_parameters()}


def test_nothing_retrieved_is_the_quantized_base(kind, tmp_path):
    """And neighbors before the first step, too: logits, loss and tokens, bit for bit; only the base is quantized."""
    model = quantized(kind, tmp_path)
    base = AutoModelForCausalLM.from_pretrained(tmp_path, quantization_config=quantization(kind), dtype=torch.float32)
    plain = AutoModelForCausalLM.from_pretrained(tmp_path)
    ids = random_ids(2, 14)
    options = dict(max_new_tokens=6, do_sample=False, eos_token_id=None, pad_token_id=0)
    with torch.no_grad():
        expected = base(ids, labels=ids)
        assert not torch.equal(expected.logits, plain(ids).logits)
        for inputs in (random_neighbors(2, 3), {"retriever": hash_retriever()}, {}):
            out = model(ids, labels=ids, **inputs)
            assert torch.equal(out.logits, expected.logits)
            assert torch.equal(out.loss, expected.loss)
    assert torch.equal(model.generate(ids, retriever=hash_retriever(), **options), base.generate(ids, **options))
    assert all(type(p) is nn.Parameter and p.dtype == torch.float32 for p in model.model.retro.parameters())
    assert all(type(m) is nn.Linear for m in model.model.retro.modules() if isinstance(m, nn.Linear))


@pytest.mark.parametrize("checkpointing", [False, True])
def test_gradients_pass_through_quantized_layers(kind, tmp_path, checkpointing):
    """All that was added trains, that below two quantized layers too; the base has no gradient and does not move."""
    model = quantized(kind, tmp_path)
    if checkpointing:
        model.activation_checkpointing_enable()
    before = values(model.model.backbone)
    ids, neighbors = random_ids(2, 14), random_neighbors(2, 3)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    losses = []
    for _ in range(4):
        if kind != "bitsandbytes nf4":  # evaluating packs its weights for the CPU, and training on is wrong then
            with torch.no_grad():
                model.eval()(ids, **neighbors)
        optimizer.zero_grad()
        loss = model.train()(ids, labels=ids, **neighbors).loss
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert [name for name, p in model.model.retro.named_parameters() if p.grad is None or not p.grad.any()] == []
    assert all(p.grad is None for p in model.model.backbone.parameters())
    for name, value in values(model.model.backbone).items():
        assert torch.equal(value, before[name]), name
    assert losses[-1] < losses[0]


def test_what_was_added_is_saved_and_loaded_on_the_quantized_base(kind, tmp_path):
    """Adapter-only without being asked for; the base is quantized again as it was, unless told otherwise."""
    model = quantized(kind, tmp_path / "base")
    randomize(model.model.retro, seed=3)
    model.save_pretrained(tmp_path / "model")
    config = json.loads((tmp_path / "model" / "config.json").read_text())
    assert config["save_backbone"] is False
    names = safe_open(tmp_path / "model" / "model.safetensors", "pt").keys()
    assert all(name.startswith("model.retro.") for name in names)
    ids, neighbors = random_ids(2, 14), random_neighbors(2, 3)
    loaded = AutoModelForCausalLM.from_pretrained(
        tmp_path / "model", backbone_name_or_path=tmp_path / "base", dtype=torch.float32
    )
    with torch.no_grad():
        expected = model(ids, **neighbors).logits
        assert torch.equal(loaded(ids, **neighbors).logits, expected)
        assert torch.equal(loaded(ids).logits, model(ids).logits)
        plain = AutoModelForCausalLM.from_pretrained(
            tmp_path / "model", backbone_name_or_path=tmp_path / "base", quantization_config=None
        )
        base = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
        assert torch.equal(plain(ids).logits, base(ids).logits)
        assert not torch.equal(plain(ids, **neighbors).logits, expected)
    loaded.save_pretrained(tmp_path / "again")
    again = AutoModelForCausalLM.from_pretrained(
        tmp_path / "again", backbone_name_or_path=tmp_path / "base", dtype=torch.float32
    )
    with torch.no_grad():
        assert torch.equal(again(ids, **neighbors).logits, expected)


def test_a_quantized_base_is_not_written(tmp_path):
    """Whole: refused with the remedy, and nothing is written; one without a name can't be saved at all."""
    model = quantized("bitsandbytes nf4", tmp_path / "base")
    with pytest.raises(ValueError, match=r"quantized backbone cannot be written.*`save_backbone=False`"):
        model.save_pretrained(tmp_path / "model", save_backbone=True)
    assert not (tmp_path / "model").exists()
    model.config.backbone_name_or_path = None
    with pytest.raises(ValueError, match=r"`backbone_name_or_path` is None"):
        model.save_pretrained(tmp_path / "model")
