"""torch.compile: logits, loss and gradients are those of the uncompiled model, whatever can and cannot be compiled."""

import pytest
import torch
from tiny import hash_retriever, random_ids, random_neighbors, two_layer_retro
from tiny_training import make_model, make_trainer

from retro_hf.model.compatibility_retro import CHECKPOINTING


def logits_and_gradients(model, run, batch):
    model.zero_grad()
    outputs = run(**batch)
    outputs.loss.backward()
    return outputs.logits.detach(), {name: p.grad.clone() for name, p in model.named_parameters()}


def assert_compiled_equals_eager(model, batch, **options):
    """Equal logits and gradients, and RETRO's weights have a gradient."""
    torch.compiler.reset()
    compiled = torch.compile(model, backend="eager", **options)
    logits, gradients = logits_and_gradients(model, model, batch)
    found, found_gradients = logits_and_gradients(model, compiled, batch)
    torch.testing.assert_close(found, logits)
    assert all(gradients[name].abs().max() > 0 for name in gradients if "retro.cross_attention" in name)
    for name, gradient in gradients.items():
        torch.testing.assert_close(found_gradients[name], gradient, atol=1e-5, rtol=1e-4, msg=name)


def labeled(batch_size=2, num_tokens=16):
    ids = random_ids(batch_size, num_tokens)
    return {"input_ids": ids, "labels": ids}


# What may come with given neighbors; `QuestionCollator` gives a `chunk_offset` and a `neighbor_chunk_size`.
RIGHT = {
    "chunk_offset": torch.tensor([0, 3]),
    "position_ids": torch.arange(16).expand(2, -1),
    "neighbor_chunk_size": torch.tensor([4, 4]),
}
WRONG = {
    "chunk_offset": torch.tensor([0, 4]),
    "position_ids": torch.arange(16).expand(2, -1) % 8,
    "neighbor_chunk_size": torch.tensor([4, 8]),
}


@pytest.mark.parametrize("names", [("chunk_offset", "neighbor_chunk_size"), ("position_ids",)])
def test_tensors_that_come_with_given_neighbors_stay_in_one_graph(names):
    batch = {**labeled(), **random_neighbors(2, 4), **{name: RIGHT[name] for name in names}}
    assert_compiled_equals_eager(two_layer_retro("llama").train(), batch, fullgraph=True)


def test_wrong_values_are_refused_inside_a_graph_too():
    """In the graph that takes the right ones."""
    torch.compiler.reset()
    model = two_layer_retro("llama")
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    batch = {**labeled(), **random_neighbors(2, 4), **RIGHT}
    torch.testing.assert_close(compiled(**batch).loss, model(**batch).loss)
    for name, wrong in WRONG.items():
        with pytest.raises(RuntimeError):
            compiled(**{**batch, name: wrong})


@pytest.mark.parametrize("training", [True, False])
def test_a_live_retriever_is_read_by_a_compiled_model(training):
    model = two_layer_retro("llama").train(training)
    model.set_retriever(hash_retriever())
    assert_compiled_equals_eager(model, labeled())


def test_a_backbone_that_breaks_the_graph_still_reads():
    """A warning of transformers inside the backbone is a graph break."""
    assert_compiled_equals_eager(two_layer_retro("gpt2"), {**labeled(), **random_neighbors(2, 4)})


# Given neighbors are compiled anew in every step, until PyTorch's limit.
@pytest.mark.parametrize("live", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_generation_with_a_compiled_forward_equals_eager(live):
    """Through the boundary of a chunk, with a cache."""
    torch.compiler.reset()
    model = two_layer_retro("llama")
    read = {"retriever": hash_retriever()} if live else random_neighbors(2, 4)
    options = {**read, "max_new_tokens": 7, "do_sample": False, "output_logits": True, "return_dict_in_generate": True}
    expected = model.generate(random_ids(2, 6), **options)
    model.compile(backend="eager")
    found = model.generate(random_ids(2, 6), **options)
    torch.testing.assert_close(torch.stack(found.logits), torch.stack(expected.logits))


def test_layers_that_are_compiled_one_by_one_are_refused():
    """They would share the code of a layer without cross-attention."""
    torch.compiler.reset()
    model = two_layer_retro("llama")
    for layer in model.model.backbone.model.layers:
        layer.compile(backend="eager")
    with pytest.raises(RuntimeError):
        model(**labeled(), **random_neighbors(2, 4))


@pytest.mark.parametrize("family", ["llama", "retro_decoder"])
def test_training_step_is_one_graph(family):
    """`fullgraph=True` allows no break; the evaluation of a loss is one graph as well."""
    torch.compiler.reset()
    model = two_layer_retro(family)
    ids = random_ids(2, 16)
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids, **random_neighbors(2, 4)}
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    results = []
    for one in (model.train(), compiled):
        model.zero_grad()
        loss = one(**batch).loss
        loss.backward()
        results.append((loss, {name: p.grad.clone() for name, p in model.named_parameters()}))
    torch.testing.assert_close(results[0][0], results[1][0])
    for name, gradient in results[0][1].items():
        torch.testing.assert_close(results[1][1][name], gradient, atol=1e-5, rtol=1e-4, msg=name)
    model.eval()
    with torch.no_grad():
        torch.testing.assert_close(compiled(**batch).loss, model(**batch).loss)


@pytest.mark.slow
@pytest.mark.parametrize("settings", [{}, {"bf16": True}, {CHECKPOINTING: True}])
def test_trainer_with_torch_compile(world, tmp_path, settings):
    """Inductor's own kernels; batches of other lengths are compiled anew. A C++ compiler must be there."""
    found = {}
    for compiled in (False, True):
        trainer, losses = make_trainer(
            make_model(), world, tmp_path / str(compiled), max_steps=4, torch_compile=compiled, **settings
        )
        trainer.train()
        found[compiled] = [*losses.values.values(), trainer.evaluate()["eval_loss"]]
    assert found[True] == pytest.approx(found[False], abs=2e-2 if "bf16" in settings else 1e-4)
