"""A frozen base costs neither gradients nor optimizer state, and no backward pass below the first cross-attention."""

import pytest
import torch
from releases import enable_checkpointing
from tiny import ENCODER, random_ids, random_neighbors, tiny_backbone
from tiny_training import CHUNK_SIZE, NEIGHBOR_SIZE, make_trainer
from transformers.utils import logging

from retro_hf import retrofit
from retro_hf.model.backbone_retro import find_decoder_layers


def saved_tensors_by_layer(model, inputs) -> tuple[list[int], list[bool]]:
    """For each decoder layer how many tensors its forward keeps for the backward pass, and if its output needs one."""
    counts, needs = [], []
    active: list[int] = []

    def pack(tensor):
        if active:
            counts[active[-1]] += 1
        return tensor

    def enter(module, args):
        active.append(len(counts))
        counts.append(0)

    def leave(module, args, output):
        active.pop()
        needs.append((output[0] if isinstance(output, tuple) else output).requires_grad)

    for layer in find_decoder_layers(model.model.backbone):
        layer.register_forward_pre_hook(enter, prepend=True)
        layer.register_forward_hook(leave)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        model(**inputs).loss.backward()
    return counts, needs


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("placement", ["after_attention", "after_layer"])
@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma3"])
def test_nothing_is_kept_below_the_first_cross_attention(family, placement, checkpointing):
    """Layers 0 and 1 run without a graph; with an unfrozen base they have one."""
    ids = random_ids(2, 14)
    inputs = {"input_ids": ids, "labels": ids, **random_neighbors(2, 3)}
    for frozen in (True, False):
        model = retrofit(
            tiny_backbone(family),
            encoder=ENCODER,
            chunk_size=4,
            cross_attention_layers=[2, 3],
            cross_attention_placement=placement,
            freeze_backbone=frozen,
        ).train()
        if checkpointing:
            enable_checkpointing(model)
        counts, needs = saved_tensors_by_layer(model, inputs)
        assert needs == [not frozen, not frozen, True, True]
        if not checkpointing:  # which keeps tensors by hooks of its own
            assert all((count == 0) == frozen for count in counts[:2]) and all(counts[2:])
        gradients = [p.grad is not None for p in model.model.backbone.parameters()]
        assert not any(gradients) if frozen else all(gradients)


def test_optimizer_state_covers_trained_weights_only(world, tmp_path):
    """AdamW's two moments per trained weight, as Trainer sets it up; what a checkpoint holds of them, too."""
    model = retrofit(
        tiny_backbone("llama", vocab_size=400),
        chunk_size=CHUNK_SIZE,
        neighbor_size=NEIGHBOR_SIZE,
        cross_attention_layers=[1, 3],
    )
    trainer, _ = make_trainer(model, world, tmp_path, max_steps=2, save_strategy="steps", save_steps=2)
    trainer.train()
    trained = sum(p.numel() for p in model.model.retro.parameters())
    state = trainer.optimizer.state_dict()["state"]
    assert sum(entry[name].numel() for entry in state.values() for name in ("exp_avg", "exp_avg_sq")) == 2 * trained
    saved = torch.load(tmp_path / "checkpoint-2" / "optimizer.pt", weights_only=True)["state"]
    assert sum(entry["exp_avg"].numel() for entry in saved.values()) == trained


def test_base_unfrozen_later_trains(world, tmp_path):
    """First what was added, then all of it: `model.model.backbone.requires_grad_(True)`."""
    base = tiny_backbone("llama", vocab_size=400)
    model = retrofit(base, chunk_size=CHUNK_SIZE, neighbor_size=NEIGHBOR_SIZE, cross_attention_layers=[1, 3])
    trainer, first = make_trainer(model, world, tmp_path / "first", max_steps=4, learning_rate=2e-2)
    trainer.train()
    before = {name: value.clone() for name, value in base.state_dict().items()}
    model.model.backbone.requires_grad_(True)
    model.config.freeze_backbone = False
    trainer, second = make_trainer(model, world, tmp_path / "second", max_steps=4, learning_rate=2e-2)
    trainer.train()
    assert all(not torch.equal(value, before[name]) for name, value in base.named_parameters())
    assert second.values[4] < first.values[4]


def test_a_batch_without_neighbors_is_explained(caplog):
    """PyTorch's own error, which follows in `backward`, does not say what is missing."""
    model = retrofit(tiny_backbone("llama"), chunk_size=4, encoder=ENCODER).train()
    ids = random_ids(2, 14)
    logging.get_logger().warning_once.cache_clear()
    with caplog.at_level("WARNING"):
        caplog.clear()
        loss = model(ids, labels=ids, **random_neighbors(2, 3)).loss
        assert loss.requires_grad and not caplog.records
        loss = model(ids, labels=ids).loss
    assert not loss.requires_grad
    assert "neighbor_input_ids" in caplog.text
