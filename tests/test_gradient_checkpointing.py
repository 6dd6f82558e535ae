"""Gradient checkpointing saves memory and changes no gradient."""

import pytest
import torch
from torch import nn

from retro_hf import retrofit

from .releases import disable_checkpointing, enable_checkpointing, is_checkpointing
from .tiny import ENCODER, hash_retriever, random_ids, random_neighbors, randomize, tiny_backbone, tiny_retro


def without_dropout(model):
    """A model in training mode whose dropout is off."""
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        if isinstance(getattr(module, "dropout", None), float):
            module.dropout = 0.0
    return model.train()


def gradients(model, **inputs):
    """Loss and gradients of one step."""
    model.zero_grad()
    loss = model(**inputs).loss
    loss.backward()
    return loss, {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def assert_equal_gradients(model, inputs, **settings):
    """One step without and one with checkpointing."""
    loss, expected = gradients(model, **inputs)
    enable_checkpointing(model, **settings)
    assert is_checkpointing(model)
    again, found = gradients(model, **inputs)
    assert torch.equal(loss, again)
    assert set(found) == set(expected)
    for name, gradient in expected.items():
        assert torch.equal(gradient, found[name]), name
    return expected


@pytest.mark.parametrize("placement", ["after_attention", "after_layer"])
@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("family", ["retro_decoder", "llama", "gpt2"])
def test_gradients_are_the_same(family, frozen, placement):
    """Of the backbone and of what RETRO adds, from given neighbors and from a retriever."""
    model = without_dropout(tiny_retro(family, cross_attention_placement=placement, freeze_backbone=frozen))
    ids = random_ids(2, 14)
    for neighbors in (random_neighbors(2, 3, ragged=True), {"retriever": hash_retriever()}):
        disable_checkpointing(model)
        names = assert_equal_gradients(model, {"input_ids": ids, "labels": ids, **neighbors})
        assert any("retro.encoder" in name for name in names)
        assert any("backbone" in name for name in names) == (not frozen)


def test_as_a_trainer_turns_it_on():
    """With keyword arguments, cache off, and a wish for inputs that require gradients, which a frozen base need not."""
    model = retrofit(tiny_backbone("llama"), encoder=ENCODER, chunk_size=4, cross_attention_layers=[1, 3])
    randomize(model.model.retro, seed=3)
    without_dropout(model)
    model.enable_input_require_grads()
    ids = random_ids(2, 14)
    inputs = {"input_ids": ids, "labels": ids, "use_cache": False, **random_neighbors(2, 3)}
    names = assert_equal_gradients(model, inputs, use_reentrant=False)
    assert not any("backbone" in name for name in names)
    disable_checkpointing(model)
    assert not is_checkpointing(model)


def test_two_passes_before_one_backward():
    """Each recomputation finds its own pass, with its own neighbors."""
    model = without_dropout(tiny_retro("llama"))
    ids = random_ids(2, 14)
    inputs = [{"input_ids": ids, "labels": ids, **random_neighbors(2, 3, seed=seed)} for seed in (1, 2)]

    def step():
        model.zero_grad()
        losses = [model(**one).loss for one in inputs]
        (losses[0] - 2 * losses[1]).backward()
        return {name: p.grad.clone() for name, p in model.named_parameters()}

    expected = step()
    enable_checkpointing(model)
    found = step()
    for name, gradient in expected.items():
        assert torch.equal(gradient, found[name]), name


def test_layers_are_really_recomputed():
    """Checkpointing is on in the backbone and in the neighbor encoder."""
    model = without_dropout(tiny_retro("llama"))
    counts = {"backbone": 0, "encoder": 0}

    def count(name):
        counts[name] += 1

    model.model.backbone.model.layers[0].self_attn.register_forward_hook(lambda *_: count("backbone"))
    model.model.retro.encoder.layers[0].self_attn.register_forward_hook(lambda *_: count("encoder"))
    ids = random_ids(2, 14)
    enable_checkpointing(model)
    gradients(model, input_ids=ids, labels=ids, **random_neighbors(2, 3))
    assert counts["backbone"] == 2
    assert counts["encoder"] >= 2


def test_reentrant_mode_is_refused():
    """It would lose gradients; the error names the setting that works."""
    model = tiny_retro("llama").train()
    with pytest.raises(ValueError, match=r"Reentrant .*lose the gradient.*\{'use_reentrant': False\}"):
        enable_checkpointing(model, use_reentrant=True)
    assert not is_checkpointing(model)


def test_evaluation_is_untouched():
    """In evaluation mode nothing changes, and generation works."""
    model = tiny_retro("llama")
    ids, neighbors = random_ids(2, 14), random_neighbors(2, 3)
    expected = model(ids, **neighbors).logits
    enable_checkpointing(model)
    assert torch.equal(model(ids, **neighbors).logits, expected)
    options = dict(max_new_tokens=6, do_sample=False, eos_token_id=None, pad_token_id=0)
    generated = model.generate(ids, retriever=hash_retriever(), **options)
    disable_checkpointing(model)
    assert torch.equal(generated, model.generate(ids, retriever=hash_retriever(), **options))
