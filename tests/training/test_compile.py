"""torch.compile: a training step is one graph, with the loss and the gradients of the uncompiled model."""

import pytest
import torch
from tiny import random_ids, random_neighbors, tiny_retro
from tiny_training import make_model, make_trainer

from retro_hf.model.compatibility_retro import CHECKPOINTING


@pytest.mark.parametrize("family", ["llama", "retro_decoder"])
def test_training_step_is_one_graph(family):
    """`fullgraph=True` allows no break; the evaluation of a loss is one graph as well."""
    model = tiny_retro(family)
    ids = random_ids(2, 16)
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids, **random_neighbors(2, 4)}
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    for training in (True, False):
        model.train(training)
        results = []
        for one in (model, compiled):
            model.zero_grad()
            loss = one(**batch).loss
            loss.backward()
            results.append((loss, {name: p.grad.clone() for name, p in model.named_parameters()}))
        torch.testing.assert_close(results[0][0], results[1][0])
        for name, gradient in results[0][1].items():
            torch.testing.assert_close(results[1][1][name], gradient, atol=1e-5, rtol=1e-4, msg=name)


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
