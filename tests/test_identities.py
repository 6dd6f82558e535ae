"""RETRO without neighbors is its backbone, and a fresh retrofit is its base: bit for bit."""

import copy

import pytest
import torch

from retro_hf import retrofit

from .tiny import ENCODER, hash_retriever, random_ids, random_neighbors, tiny_backbone, tiny_retro


# A family for each way in which an attention branch ends, and both kinds of placement.
BACKBONES = ["retro_decoder", "llama", "gpt2", "gemma3", "bloom", "falcon", "granite", "qwen3_moe"]
PLACEMENTS = ["after_attention", "after_layer"]
GENERATE = {"max_new_tokens": 9, "pad_token_id": 0, "eos_token_id": None}


def masked_neighbors(batch_size: int, num_chunks: int) -> dict[str, torch.Tensor]:
    """Neighbors of which every token is padding."""
    neighbors = random_neighbors(batch_size, num_chunks)
    return {**neighbors, "neighbor_attention_mask": torch.zeros_like(neighbors["neighbor_attention_mask"])}


def tiny_retrofit(family: str = "llama", **config):
    """A fresh retrofit, and the base as it was before."""
    base = tiny_backbone(family)
    config = {"chunk_size": 4, "cross_attention_layers": [1, 3], "encoder": ENCODER, **config}
    return retrofit(copy.deepcopy(base), **config), base


def assert_same_output(output, reference) -> None:
    """Loss and logits are equal in every bit."""
    assert torch.equal(output.logits, reference.logits)
    assert torch.equal(output.loss, reference.loss)


# ── off is the backbone ───────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("placement", PLACEMENTS)
@pytest.mark.parametrize("family", BACKBONES)
def test_without_neighbors_it_is_the_backbone(family, placement):
    """No neighbors, masked ones, and a retriever that finds nothing: logits and loss of the backbone, bit for bit."""
    model = tiny_retro(family, cross_attention_placement=placement)
    ids = random_ids(2, 14)

    def nothing(chunk_input_ids, chunk_attention_mask):
        found = chunk_input_ids.new_zeros(len(chunk_input_ids), 2, 8)
        return found, found

    for grad in (False, True):
        for use_cache in (False, True):
            with torch.set_grad_enabled(grad):
                expected = model.model.backbone(ids, labels=ids, use_cache=use_cache)
                for neighbors in ({}, masked_neighbors(2, 3), {"retriever": None}, {"retriever": nothing}):
                    assert_same_output(model(ids, labels=ids, use_cache=use_cache, **neighbors), expected)


@pytest.mark.parametrize("family", ["retro_decoder", "llama", "gpt2"])
def test_without_neighbors_a_padded_batch_is_the_backbones(family):
    """A padding mask changes nothing about that, on either side."""
    model, ids = tiny_retro(family), random_ids(2, 14)
    for columns in (slice(0, 5), slice(9, 14)):
        mask = torch.ones_like(ids)
        mask[0, columns] = 0
        positions = (mask.cumsum(-1) - 1).clamp(min=0)
        inputs = {"input_ids": ids, "attention_mask": mask, "position_ids": positions, "labels": ids}
        with torch.no_grad():
            expected = model.model.backbone(**inputs)
            for neighbors in ({}, masked_neighbors(2, 3)):
                assert_same_output(model(**inputs, **neighbors), expected)


def test_without_neighbors_training_is_the_backbones():
    """In training mode, with dropout and the same seed, masked neighbors draw no random number and give no gradient."""
    model = tiny_retro("gpt2").train()
    ids = random_ids(2, 14)
    losses, gradients = [], []
    for neighbors in ({}, masked_neighbors(2, 3)):
        model.zero_grad()
        torch.manual_seed(1)
        loss = model(ids, labels=ids, **neighbors).loss
        loss.backward()
        losses.append(loss.detach())
        gradients.append([p.grad.clone() for p in model.model.backbone.parameters()])
    assert torch.equal(*losses)
    for one, other in zip(*gradients, strict=True):
        torch.testing.assert_close(one, other, atol=1e-7, rtol=1e-5)  # summed in another order


@pytest.mark.parametrize("settings", [{}, {"do_sample": True}, {"num_beams": 3}], ids=["greedy", "sampling", "beams"])
@pytest.mark.parametrize("family", BACKBONES)
def test_without_neighbors_it_generates_as_the_backbone(family, settings):
    """The same tokens from logits that are equal bit for bit, without neighbors and with masked ones."""
    model, ids = tiny_retro(family), random_ids(2, 7)
    kwargs = {"do_sample": False, **GENERATE, **settings, "return_dict_in_generate": True, "output_logits": True}
    torch.manual_seed(5)
    expected = model.model.backbone.generate(ids, **kwargs)
    for neighbors in ({}, masked_neighbors(2, 4), {"retriever": None}):
        torch.manual_seed(5)
        output = model.generate(ids, **kwargs, **neighbors)
        assert torch.equal(output.sequences, expected.sequences)
        for one, other in zip(output.logits, expected.logits, strict=True):
            assert torch.equal(one, other)


def test_an_attached_retriever_can_be_turned_off():
    """`retriever=None` is the backbone though a retriever is attached, and detaching it is too."""
    model, ids = tiny_retro(), random_ids(2, 14)
    with torch.no_grad():
        off = model(ids).logits
        model.set_retriever(hash_retriever())
        assert not torch.equal(model(ids).logits, off)
        assert torch.equal(model(ids, retriever=None).logits, off)
        model.set_retriever(None)
        assert torch.equal(model(ids).logits, off)


@pytest.mark.parametrize("family", BACKBONES)
def test_neighbors_do_change_the_logits(family):
    """Otherwise all of this would hold for a model that never reads; the first m - 1 positions keep theirs bit for bit."""
    model, ids = tiny_retro(family), random_ids(2, 14)
    with torch.no_grad():
        off, on = model(ids).logits, model(ids, **random_neighbors(2, 3)).logits
    # Experts compute the tokens of all places together, so what other tokens are moves the last bits, with several threads.
    torch.testing.assert_close(on[:, :3], off[:, :3], rtol=0, atol=1e-5 if family.endswith("moe") else 0)
    assert (on[:, 3:] - off[:, 3:]).abs().amax(-1).min() > 1e-2


def test_the_backbone_keeps_its_names_and_weights():
    """The tree and the weights of the backbone are those of the model that was given, and stay usable without us."""
    model, base = tiny_retrofit()
    ids = random_ids(2, 14)
    inside = model.model.backbone.state_dict()
    assert list(inside) == list(base.state_dict())
    assert all(torch.equal(inside[name], tensor) for name, tensor in base.state_dict().items())
    with torch.no_grad():
        model(ids, **random_neighbors(2, 3))
        assert torch.equal(model.model.backbone(ids).logits, base(ids).logits)


# ── a fresh retrofit is its base ──────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("placement", PLACEMENTS)
@pytest.mark.parametrize("family", BACKBONES)
def test_a_fresh_retrofit_is_its_base(family, placement):
    """Before the first step, with and without neighbors: the base's logits and loss, bit for bit."""
    model, base = tiny_retrofit(family, cross_attention_placement=placement)
    ids = random_ids(2, 14)
    for grad in (False, True):
        with torch.set_grad_enabled(grad):
            expected = base(ids, labels=ids)
            for neighbors in ({}, random_neighbors(2, 3, ragged=True), {"retriever": hash_retriever()}):
                assert_same_output(model(ids, labels=ids, **neighbors), expected)


@pytest.mark.parametrize("family", BACKBONES)
def test_a_fresh_retrofit_generates_as_its_base(family):
    """With a retriever that finds neighbors, too."""
    model, base = tiny_retrofit(family)
    ids, retriever = random_ids(2, 7), hash_retriever()
    output = model.generate(ids, do_sample=False, retriever=retriever, **GENERATE)
    assert torch.equal(output, base.generate(ids, do_sample=False, **GENERATE))
    assert retriever.calls


@pytest.mark.parametrize("share_embeddings", [True, False])
@pytest.mark.parametrize("family", BACKBONES)
def test_only_what_retro_adds_is_trained(family, share_embeddings):
    """The base is frozen; zero projections learn first, from the second step on everything that was added does."""
    model, base = tiny_retrofit(family, share_embeddings=share_embeddings)
    added = dict(model.model.retro.named_parameters())
    assert {p for p in model.parameters() if p.requires_grad} == set(added.values())
    model.train()
    ids, neighbors = random_ids(2, 14), random_neighbors(2, 3)
    optimizer = torch.optim.SGD((p for p in model.parameters() if p.requires_grad), lr=0.5)
    for step in range(3):
        optimizer.zero_grad()
        model(ids, labels=ids, **neighbors).loss.backward()
        for name, parameter in added.items():
            assert parameter.grad is not None and parameter.grad.isfinite().all(), name
            expected = step > 0 or name.endswith("attention.o_proj.weight") and name.startswith("cross_attention.")
            assert bool(parameter.grad.any()) == expected, f"{name} in step {step}"
        optimizer.step()
    assert all(p.grad is None for p in model.model.backbone.parameters())
    model.eval()
    with torch.no_grad():
        off, expected = model(ids, labels=ids), base(ids, labels=ids)
        assert not torch.equal(model(ids, **neighbors).logits, off.logits)
    assert_same_output(off, expected)


def test_an_unfrozen_retrofit_trains_everything():
    """With `freeze_backbone=False` the base gets gradients as well."""
    model, _ = tiny_retrofit(freeze_backbone=False)
    ids = random_ids(2, 14)
    model(ids, labels=ids, **random_neighbors(2, 3)).loss.backward()
    assert all(p.requires_grad and p.grad is not None for p in model.parameters())


def test_from_scratch_everything_is_trained_at_once():
    """A model from scratch starts with projections that are not zero: every parameter has a gradient in the first step."""
    torch.manual_seed(0)
    model = type(tiny_retro())(tiny_retro().config).train()
    ids = random_ids(2, 14)
    model(ids, labels=ids, **random_neighbors(2, 3)).loss.backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None and parameter.grad.any(), name
