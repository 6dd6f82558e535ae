"""TRL: models that it loads by name, and reference models that it makes itself."""

import pytest
import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM
from trl import DPOConfig, DPOTrainer, SFTConfig, SFTTrainer

from retro_hf import RetroDecoderConfig, RetroDecoderForCausalLM, RetroForCausalLM

from .datastore.fixtures import make_tokenizer
from .test_saving import retrofitted
from .tiny import hash_retriever, tiny_backbone


# TRL 1.16 uses the names of transformers 5.22 and before.
pytestmark = pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.* is deprecated:FutureWarning")

TEXTS = Dataset.from_list([{"text": "the cat sat on the mat"}] * 4)
PAIRS = Dataset.from_list([{"prompt": "the cat ", "chosen": "sat on the mat", "rejected": "ran away"}] * 4)
SETTINGS = {
    "max_steps": 2,
    "per_device_train_batch_size": 2,
    "save_strategy": "no",
    "report_to": [],
    "use_cpu": True,
    "bf16": False,
    "disable_tqdm": True,
}


@pytest.fixture
def tokenizer():
    return make_tokenizer(vocab_size=257)


@pytest.fixture
def fresh(tmp_path, monkeypatch, tokenizer):
    """A RETROfit of a saved base with a tokenizer; the working directory is a temporary one."""
    monkeypatch.chdir(tmp_path)
    tiny_backbone("llama", vocab_size=257).save_pretrained("base")
    tokenizer.save_pretrained("base")
    return retrofitted("base")


def moved(model, before):
    """Names of the weights that have changed."""
    return {name for name, weight in model.state_dict().items() if not torch.equal(weight, before[name])}


def trained(trainer):
    """The names of the weights that training has changed, with a retriever attached."""
    model = trainer.accelerator.unwrap_model(trainer.model)
    model.set_retriever(hash_retriever(vocab_size=257))
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    trainer.train()
    return moved(model, before)


@pytest.mark.parametrize("save_backbone", [True, False])
def test_a_model_given_by_name(fresh, tokenizer, save_backbone):
    """`SFTTrainer("folder")` loads the whole model, its frozen backbone included, and trains what RETRO adds."""
    fresh.save_pretrained("model", save_backbone=save_backbone)
    args = SFTConfig("out", model_init_kwargs={"backbone_name_or_path": "base"}, **SETTINGS)
    trainer = SFTTrainer("model", args=args, train_dataset=TEXTS, processing_class=tokenizer)
    assert type(trainer.model) is RetroForCausalLM
    assert moved(trainer.model, fresh.state_dict()) == set()
    names = trained(trainer)
    assert names and all(".retro." in name for name in names)


def test_the_papers_decoder_given_by_name(tmp_path, monkeypatch, tokenizer):
    """The baseline has a config of its own."""
    monkeypatch.chdir(tmp_path)
    config = RetroDecoderConfig(
        vocab_size=257, hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2, head_dim=16
    )
    RetroDecoderForCausalLM(config).save_pretrained("decoder")
    trainer = SFTTrainer("decoder", args=SFTConfig("out", **SETTINGS), train_dataset=TEXTS, processing_class=tokenizer)
    assert type(trainer.model) is RetroDecoderForCausalLM
    trainer.train()


@pytest.mark.parametrize("save_backbone", [True, False])
def test_a_reference_model_of_a_saved_model(fresh, tokenizer, save_backbone):
    """`DPOTrainer` without `ref_model` loads the same model again."""
    fresh.save_pretrained("model", save_backbone=save_backbone)
    where = {"backbone_name_or_path": "base"}
    model = AutoModelForCausalLM.from_pretrained("model", **where)
    args = DPOConfig("out", model_init_kwargs=where, **SETTINGS)
    trainer = DPOTrainer(model, args=args, train_dataset=PAIRS, processing_class=tokenizer)
    assert type(trainer.ref_model) is RetroForCausalLM
    assert moved(trainer.ref_model, fresh.state_dict()) == set()
    names = trained(trainer)
    assert names and all(".retro." in name for name in names)


def test_a_reference_model_of_a_fresh_retrofit(fresh, tokenizer):
    """The base is the same model, bit for bit; PEFT still takes it for a model without a name."""
    trainer = DPOTrainer(fresh, args=DPOConfig("out", **SETTINGS), train_dataset=PAIRS, processing_class=tokenizer)
    assert moved(trainer.ref_model, fresh.model.backbone.state_dict()) == set()
    assert fresh.name_or_path == ""
    assert trained(trainer)
