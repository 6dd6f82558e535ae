"""Plain `transformers.Trainer` on precomputed neighbors: it learns, accumulates, checkpoints and resumes."""

import copy
from types import SimpleNamespace

import pytest
import torch
from releases import is_checkpointing
from tiny import tiny_backbone
from tiny_training import CHUNK_SIZE, NEIGHBOR_SIZE, make_model, make_trainer

from retro_hf import RetroForCausalLM, retrofit
from retro_hf.model.compatibility_retro import CHECKPOINTING
from retro_hf.training import RetroDataCollator


def parameters_of(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


def assert_same(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor], **tolerance) -> None:
    assert left.keys() == right.keys()
    for name in left:
        torch.testing.assert_close(left[name], right[name], msg=lambda text, name=name: f"{name}: {text}", **tolerance)


EXACT = {"rtol": 0, "atol": 0}


def test_training_and_evaluation_loss_go_down(world, tmp_path):
    """Fifteen steps on a tiny corpus, measured by Trainer on both sides."""
    trainer, losses = make_trainer(make_model(), world, tmp_path, max_steps=15, learning_rate=1e-2)
    before = trainer.evaluate()["eval_loss"]
    trainer.train()
    after = trainer.evaluate()["eval_loss"]
    assert before > 5.5 and after < before - 1
    assert losses.values[15] < losses.values[1] - 1


def test_evaluation_loss_is_the_mean_over_tokens_with_neighbors(world, tmp_path):
    """What Trainer reports is what the model says of one whole batch with its neighbors."""
    model = make_model(scale=0.2)
    collator = RetroDataCollator(world.tokenizer, world.datastore)
    trainer, _ = make_trainer(model, world, tmp_path, per_device_eval_batch_size=16)
    batch = collator([world.dataset[number] for number in range(16)])
    with torch.no_grad():
        with_neighbors = float(model(**batch).loss)
        without = float(model(**{name: batch[name] for name in ("input_ids", "attention_mask", "labels")}).loss)
    loss = trainer.evaluate()["eval_loss"]
    assert loss == pytest.approx(with_neighbors, abs=1e-5) and abs(loss - without) > 1e-3


@pytest.mark.parametrize("labels", ["all", "unequal"])
def test_gradient_accumulation_equals_one_big_batch(world, tmp_path, labels):
    """The loss is normalized by the labels of all micro-batches, although each has another number of them."""
    if labels == "unequal":
        dataset = world.dataset.filter(lambda row: len(row["input_ids"]) == 32)
        masked = [[-100] * (2 + 7 * number % 29) for number in range(len(dataset))]
        dataset = dataset.map(
            lambda row, number: {"labels": masked[number] + row["input_ids"][len(masked[number]) :]}, with_indices=True
        )
        world = SimpleNamespace(**{**vars(world), "dataset": dataset})
    ends = {}
    for name, size, steps in (("big", 8, 1), ("accumulated", 2, 4)):
        trainer, losses = make_trainer(
            make_model(),
            world,
            tmp_path / name,
            per_device_train_batch_size=size,
            gradient_accumulation_steps=steps,
            optim="sgd",
            learning_rate=1.0,
            max_grad_norm=0.0,
            lr_scheduler_type="constant",
            max_steps=2,
        )
        trainer.train()
        ends[name] = losses.values, parameters_of(trainer.model)
    assert ends["accumulated"][0] == pytest.approx(ends["big"][0], abs=1e-5)
    assert_same(ends["accumulated"][1], ends["big"][1], rtol=0, atol=1e-5)


def test_gradient_checkpointing_changes_nothing(world, tmp_path):
    """The same parameters, bit for bit, after steps with and without recomputation."""
    ends = []
    for checkpointing in (False, True):
        model = make_model()
        trainer, losses = make_trainer(
            model, world, tmp_path / str(checkpointing), max_steps=3, **{CHECKPOINTING: checkpointing}
        )
        trainer.train()
        ends.append((losses.values, parameters_of(model)))
        assert is_checkpointing(model) is checkpointing
    assert ends[0][0] == ends[1][0]
    assert_same(ends[0][1], ends[1][1], **EXACT)


@pytest.mark.parametrize("family", ["retro_decoder", "llama"])
def test_bfloat16_training_follows_float32(world, tmp_path, family):
    """Autocast on the CPU: finite losses near those of float32, going down."""
    values = {}
    for bf16 in (False, True):
        trainer, losses = make_trainer(make_model(family=family), world, tmp_path / str(bf16), max_steps=4, bf16=bf16)
        trainer.train()
        values[bf16] = losses.values
    assert values[True] != values[False]
    assert values[True] == pytest.approx(values[False], abs=0.1)
    assert values[True][4] < values[True][1]


@pytest.mark.parametrize("workers", [0, 2])
def test_resumed_run_equals_an_unbroken_one(world, tmp_path, workers):
    """Losses and parameters bit for bit, through an epoch's end, with random neighbors and dropped ones."""
    settings = {
        "max_steps": 22,
        "save_strategy": "steps",
        "save_steps": 5,
        "per_device_train_batch_size": 8,
        "dataloader_num_workers": workers,
    }

    def trainer_of(folder: str):
        collator = RetroDataCollator(
            world.tokenizer, world.datastore, random_neighbor_probability=0.3, no_neighbor_probability=0.1
        )
        return make_trainer(make_model(), world, tmp_path / folder, collator, **settings)

    unbroken, expected = trainer_of("unbroken")
    unbroken.train()
    resumed, found = trainer_of("resumed")
    resumed.train(resume_from_checkpoint=str(tmp_path / "unbroken" / "checkpoint-5"))
    assert found.values == {step: expected.values[step] for step in range(6, 23)}
    assert_same(parameters_of(resumed.model), parameters_of(unbroken.model), **EXACT)


def test_trained_model_loads_from_its_folder(world, tmp_path):
    """`save_model` and `from_pretrained`: the same loss on the same batch."""
    trainer, _ = make_trainer(make_model(), world, tmp_path / "run", max_steps=3)
    trainer.train()
    trainer.save_model(str(tmp_path / "model"))
    loaded = RetroForCausalLM.from_pretrained(tmp_path / "model")
    batch = RetroDataCollator(world.tokenizer, world.datastore)([world.dataset[number] for number in range(4)])
    trainer.model.eval()
    with torch.no_grad():
        assert torch.equal(loaded(**batch).logits, trainer.model(**batch).logits)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_retrofit_trains_only_what_it_added(world, tmp_path, checkpointing):
    """The base stays bit for bit, every added parameter moves, and the loss goes down."""
    base = tiny_backbone("llama", vocab_size=400)
    before = copy.deepcopy(base.state_dict())
    model = retrofit(base, chunk_size=CHUNK_SIZE, neighbor_size=NEIGHBOR_SIZE, cross_attention_layers=[1, 3])
    start = parameters_of(model)
    trainer, losses = make_trainer(
        model, world, tmp_path, max_steps=12, learning_rate=2e-2, **{CHECKPOINTING: checkpointing}
    )
    trainer.train()
    for name, value in model.model.backbone.state_dict().items():
        assert torch.equal(value, before[name]), name
    moved = {name for name, value in parameters_of(model).items() if not torch.equal(value, start[name])}
    assert moved == {name for name, _ in model.named_parameters() if name.startswith("model.retro.")}
    assert losses.values[12] < losses.values[1]


def test_worker_processes_change_nothing(world, tmp_path):
    """Batches made in two worker processes train the same model."""
    ends = []
    for workers in (0, 2):
        collator = RetroDataCollator(world.tokenizer, world.datastore, random_neighbor_probability=0.5)
        trainer, _ = make_trainer(
            make_model(), world, tmp_path / str(workers), collator, max_steps=3, dataloader_num_workers=workers
        )
        trainer.train()
        ends.append(parameters_of(trainer.model))
    assert_same(*ends, **EXACT)
