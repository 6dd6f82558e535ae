"""Bases in half precision, and bases that accelerate has placed: on the CPU, in part on the disk."""

import pytest
import torch
from transformers import AutoModelForCausalLM

from retro_hf import retrofit

from .tiny import ENCODER, hash_retriever, random_ids, random_neighbors, randomize, tiny_backbone


SETTINGS = {"encoder": ENCODER, "chunk_size": 4, "cross_attention_layers": [1, 3]}
PLACES = {
    "cpu": "cpu",
    "one entry": {"": "cpu"},
    "layers on disk": {
        "model.embed_tokens": "cpu",
        "model.layers.0": "cpu",
        "model.layers.1": "disk",
        "model.layers.2": "cpu",
        "model.layers.3": "disk",
        "model.norm": "cpu",
        "model.rotary_emb": "cpu",
        "lm_head": "cpu",
    },
    "first weights on disk": {
        "model.embed_tokens": "disk",
        "model.layers": "cpu",
        "model.norm": "cpu",
        "model.rotary_emb": "cpu",
        "lm_head": "disk",
    },
}


@pytest.fixture
def base(tmp_path):
    tiny_backbone("llama").save_pretrained(tmp_path / "base")
    return tmp_path / "base"


def placed(place: str, folder) -> dict:
    return {"device_map": PLACES[place], "offload_folder": str(folder / "offload")}


@pytest.mark.parametrize("place", list(PLACES))
def test_a_base_with_a_device_map(base, tmp_path, place):
    """Equal to the base in memory, off and with neighbors; what was added trains; generation retrieves."""
    expected = retrofit(base, **SETTINGS)
    model = retrofit(base, base_kwargs=placed(place, tmp_path), **SETTINGS)
    for one in (expected, model):
        randomize(one.model.retro, seed=3)
    ids, neighbors = random_ids(2, 14), random_neighbors(2, 3)
    with torch.no_grad():
        assert torch.equal(model(ids).logits, expected(ids).logits)
        assert torch.equal(model(ids, **neighbors).logits, expected(ids, **neighbors).logits)
    options = dict(max_new_tokens=6, do_sample=False, eos_token_id=None, pad_token_id=0, retriever=hash_retriever())
    assert torch.equal(model.generate(ids, **options), expected.generate(ids, **options))
    gradients = []
    for one in (expected, model):
        one.train()(ids, labels=ids, **neighbors).loss.backward()
        gradients.append({name: p.grad for name, p in one.model.retro.named_parameters()})
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, msg=name)
        assert gradient.any()


@pytest.mark.parametrize("place", list(PLACES))
def test_an_adapter_is_loaded_onto_a_placed_base(base, tmp_path, place):
    """`device_map` of an adapter-only folder is the base's, whose names it has; what was added lies in memory."""
    model = retrofit(base, **SETTINGS)
    randomize(model.model.retro, seed=3)
    model.save_pretrained(tmp_path / "model", save_backbone=False)
    loaded = AutoModelForCausalLM.from_pretrained(
        tmp_path / "model", backbone_name_or_path=base, **placed(place, tmp_path)
    )
    ids, neighbors = random_ids(2, 14), random_neighbors(2, 3)
    with torch.no_grad():
        assert torch.equal(loaded(ids, **neighbors).logits, model(ids, **neighbors).logits)
    assert {p.device.type for p in loaded.model.retro.parameters()} == {"cpu"}


def test_a_whole_model_is_loaded_onto_the_disk(tmp_path):
    """Also what was added may lie there; names are those of the whole model."""
    model = retrofit(tiny_backbone("llama"), **SETTINGS)
    randomize(model.model.retro, seed=3)
    model.save_pretrained(tmp_path / "model")
    places = {f"model.backbone.{name}": place for name, place in PLACES["layers on disk"].items()}
    places |= {"model.retro.encoder": "disk", "model.retro.cross_attention": "cpu"}
    loaded = AutoModelForCausalLM.from_pretrained(
        tmp_path / "model", device_map=places, offload_folder=str(tmp_path / "offload")
    )
    assert {p.device.type for p in loaded.model.retro.encoder.parameters()} == {"meta"}
    ids, neighbors = random_ids(2, 14), random_neighbors(2, 3)
    with torch.no_grad():
        torch.testing.assert_close(loaded(ids, **neighbors).logits, model(ids, **neighbors).logits)
        assert torch.equal(loaded(ids).logits, model(ids).logits)


@pytest.mark.parametrize(
    "places", [{"": "disk"}, {"model.backbone": "disk", "model.retro": "cpu"}], ids=["all", "base"]
)
def test_shared_embeddings_of_a_whole_model_can_be_on_disk(tmp_path, places):
    """The encoder of neighbors reads through them, wherever it lies itself."""
    model = retrofit(tiny_backbone("llama"), **SETTINGS)
    randomize(model.model.retro, seed=3)
    model.save_pretrained(tmp_path / "model")
    loaded = AutoModelForCausalLM.from_pretrained(
        tmp_path / "model", device_map=places, offload_folder=str(tmp_path / "offload")
    )
    ids, neighbors = random_ids(2, 14), random_neighbors(2, 3)
    with torch.no_grad():
        torch.testing.assert_close(loaded(ids, **neighbors).logits, model(ids, **neighbors).logits)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_base_in_half_precision(base, dtype):
    """What is added has the base's dtype; off and the first step are the base's, bit for bit; all of it trains."""
    model = retrofit(base, base_kwargs={"dtype": dtype}, **SETTINGS)
    half = AutoModelForCausalLM.from_pretrained(base, dtype=dtype)
    assert {p.dtype for p in model.parameters()} == {dtype}
    ids, neighbors = random_ids(2, 14), random_neighbors(2, 3)
    with torch.no_grad():
        for inputs in ({}, neighbors):
            assert torch.equal(model(ids, **inputs).logits, half(ids).logits)
    randomize(model.model.retro, seed=3)
    loss = model.train()(ids, labels=ids, **neighbors).loss
    loss.backward()
    assert loss.isfinite()
    for name, parameter in model.model.retro.named_parameters():
        assert parameter.grad.isfinite().all() and parameter.grad.any(), name


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_full_precision_weights_on_a_base_in_half_precision(base, dtype):
    """As PEFT does for its adapters: small updates would be lost in half precision. Autocast joins the two."""
    model = retrofit(base, base_kwargs={"dtype": dtype}, **SETTINGS).train()
    model.model.retro.float()
    ids, neighbors = random_ids(2, 14), random_neighbors(2, 3)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for _ in range(6):
        optimizer.zero_grad()
        with torch.autocast("cpu", dtype=dtype):
            loss = model(ids, labels=ids, **neighbors).loss
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 0.01
    assert {p.grad.dtype for p in model.model.retro.parameters()} == {torch.float32}
    assert {p.dtype for p in model.model.backbone.parameters()} == {dtype}
