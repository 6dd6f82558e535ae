"""TRL's SFTTrainer: on neighbors through our collator, on a retriever attached to the model, and without retrieval."""

import pytest
import torch
from tiny import tiny_backbone
from tiny_training import CHUNK_SIZE, NEIGHBOR_SIZE, WINDOW, Losses, make_model, make_trainer
from trl import SFTConfig, SFTTrainer

from retro_hf import retrofit
from retro_hf.model.compatibility_retro import CHECKPOINTING
from retro_hf.training import RetroDataCollator


SETTINGS = {
    "per_device_train_batch_size": 8,
    "max_steps": 3,
    "learning_rate": 3e-3,
    "logging_steps": 1,
    "save_strategy": "no",
    "report_to": "none",
    "use_cpu": True,
    "bf16": False,
    "disable_tqdm": True,
    "dataloader_pin_memory": False,
    CHECKPOINTING: False,
}
# What makes SFTTrainer leave a tokenized dataset, and the columns of neighbors in it, as they are.
AS_IT_IS = {"dataset_kwargs": {"skip_prepare_dataset": True}, "remove_unused_columns": False}


def make_sft(model, world, folder, dataset, collator=None, **settings) -> tuple[SFTTrainer, Losses]:
    losses = Losses()
    trainer = SFTTrainer(
        model=model,
        args=SFTConfig(output_dir=str(folder), **{**SETTINGS, **settings}),
        train_dataset=dataset,
        eval_dataset=dataset.select(range(16)),
        data_collator=collator,
        processing_class=world.tokenizer,
        callbacks=[losses],
    )
    return trainer, losses


@pytest.mark.parametrize("live", [False, True])
def test_neighbors_through_our_collator(world, tmp_path, live):
    """The losses and weights are those of plain Trainer, though TRL computes the loss from the hidden states."""
    collator = RetroDataCollator(world.tokenizer, world.retriever if live else world.datastore)
    dataset = world.windows if live else world.dataset
    trainer, losses = make_sft(make_model(), world, tmp_path / "sft", dataset, collator, **AS_IT_IS)
    trainer.train()
    plain, expected = make_trainer(make_model(), world, tmp_path / "plain", max_steps=3)
    plain.train()
    assert list(losses.values.values()) == pytest.approx(list(expected.values.values()), abs=1e-4)
    for (name, left), right in zip(trainer.model.named_parameters(), plain.model.parameters(), strict=True):
        torch.testing.assert_close(left, right, atol=1e-3, rtol=1e-3, msg=name)
    assert trainer.evaluate()["eval_loss"] == pytest.approx(plain.evaluate()["eval_loss"], abs=1e-3)


def test_labels_of_the_answer_only(world, tmp_path):
    """-100 before the answer, as completion-only training has it; the frozen base stays."""
    dataset = world.dataset.filter(lambda row: len(row["input_ids"]) == 32)
    dataset = dataset.map(lambda row: {"labels": [-100] * 20 + row["input_ids"][20:]})
    base = tiny_backbone("llama", vocab_size=400)
    before = {name: value.clone() for name, value in base.state_dict().items()}
    model = retrofit(base, chunk_size=CHUNK_SIZE, neighbor_size=NEIGHBOR_SIZE, cross_attention_layers=[1, 3])
    collator = RetroDataCollator(world.tokenizer, world.datastore)
    trainer, losses = make_sft(model, world, tmp_path, dataset, collator, **AS_IT_IS, max_steps=8, learning_rate=2e-2)
    trainer.train()
    assert losses.values[8] < losses.values[1]
    assert all(torch.equal(value, before[name]) for name, value in model.model.backbone.state_dict().items())


def test_texts_with_an_attached_retriever(world, tmp_path):
    """SFTTrainer's own preparation and collator; each forward pass retrieves, from all documents of the store."""
    from datasets import Dataset
    from datastore.fixtures import corpus

    texts = Dataset.from_list([{"text": row["text"]} for row in corpus()])
    found = {}
    for retriever in (None, world.retriever):
        model = make_model(scale=0.2)
        model.set_retriever(retriever)
        trainer, losses = make_sft(model, world, tmp_path / str(bool(retriever)), texts, max_length=WINDOW)
        trainer.train()
        found[bool(retriever)] = [*losses.values.values(), trainer.evaluate()["eval_loss"]]
        assert all(torch.isfinite(torch.tensor(found[bool(retriever)])))
    assert found[True] != found[False]


@pytest.mark.parametrize("settings", [{"packing": True}, {"padding_free": True, "max_length": None}])
def test_packing_is_an_error_with_the_remedy(world, tmp_path, settings):
    """Several texts in one row, whose chunks can't be told apart."""
    from datasets import Dataset
    from datastore.fixtures import corpus

    texts = Dataset.from_list([{"text": row["text"]} for row in corpus()])
    model = make_model()
    model.set_retriever(world.retriever)
    trainer, _ = make_sft(model, world, tmp_path, texts, **{"max_length": 64, **settings})
    with pytest.raises(ValueError, match=r"restart inside a row.*packing=False"):
        trainer.train()
