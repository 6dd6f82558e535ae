"""LoRA on the backbone, trained together with what RETRO adds: `get_peft_model(..., modules_to_save=["retro"])`."""

import copy
from pathlib import Path

import peft
import pytest
import torch
from datasets import Dataset
from packaging.version import Version
from peft import (
    AutoPeftModelForCausalLM,
    LoraConfig,
    PeftModel,
    PromptEncoderConfig,
    PromptTuningConfig,
    get_peft_model,
)
from transformers import AutoModel, AutoModelForCausalLM, Trainer, TrainingArguments
from transformers.integrations.peft import MIN_PEFT_VERSION

from retro_hf import ChunkEmbedder, RetroForCausalLM, RetroRetriever, answer, retrofit
from retro_hf.evaluation import answer_questions, bits_per_byte, profile
from retro_hf.training import QuestionCollator, tokenize_questions

from .datastore.fixtures import make_encoder, make_tokenizer
from .hub_cache import put_on_hub
from .tiny import ENCODER, hash_retriever, random_ids, random_neighbors, randomize, tiny_backbone


SETTINGS = {"encoder": ENCODER, "chunk_size": 4, "cross_attention_layers": [1, 3]}
LORA = {"target_modules": r".*backbone.*\.(q_proj|v_proj)", "modules_to_save": ["retro"], "r": 2}

# transformers 5.24 asks for a PEFT that is not out. Its `add_adapter` raises then, and these tests must fail; `get_peft_model` works.
adds_an_adapter = pytest.mark.xfail(
    Version(peft.__version__) < Version(MIN_PEFT_VERSION),
    raises=ValueError,
    reason=f"add_adapter of transformers asks for PEFT {MIN_PEFT_VERSION}",
)


@pytest.fixture
def base(tmp_path):
    tiny_backbone("llama").save_pretrained(tmp_path / "base")
    return tmp_path / "base"


def train(model, steps: int = 4) -> list[float]:
    ids, neighbors = random_ids(2, 14), random_neighbors(2, 3)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    model.train()
    for _ in range(steps):
        optimizer.zero_grad()
        loss = model(input_ids=ids, labels=ids, **neighbors).loss
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    model.eval()
    return losses


def test_step_zero_is_the_base(base):
    """LoRA and cross-attention both begin at zero."""
    plain = retrofit(base, **SETTINGS)
    ids, neighbors = random_ids(2, 14), random_neighbors(2, 3)
    model = get_peft_model(retrofit(base, **SETTINGS), LoraConfig(**LORA)).eval()
    with torch.no_grad():
        for inputs in ({}, neighbors):
            assert torch.equal(model(input_ids=ids, **inputs).logits, plain(ids).logits)


def test_only_lora_and_retro_weights_train(base):
    """The base's own weights stay, LoRA's and RETRO's move, and the loss goes down."""
    retro = retrofit(base, **SETTINGS)
    model = get_peft_model(retro, LoraConfig(**LORA))
    trainable = {name for name, p in model.named_parameters() if p.requires_grad}
    assert {("lora_" in name, ".retro.modules_to_save." in name) for name in trainable} == {
        (True, False),
        (False, True),
    }
    assert not any("retro" in name and "lora_" in name for name in trainable)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    losses = train(model)
    assert losses[-1] < losses[0]
    moved = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    assert moved == trainable


def test_saved_and_loaded(base, tmp_path):
    """On a RETROfit made anew from the same base: equal outputs, generation with a retriever included."""
    model = get_peft_model(retrofit(base, **SETTINGS), LoraConfig(**LORA))
    train(model)
    model.save_pretrained(tmp_path / "lora")
    torch.manual_seed(99)  # what is added starts with other random weights
    again = PeftModel.from_pretrained(retrofit(base, **SETTINGS), tmp_path / "lora")
    ids, neighbors = random_ids(2, 14), random_neighbors(2, 3)
    options = dict(max_new_tokens=6, do_sample=False, eos_token_id=None, pad_token_id=0)
    with torch.no_grad():
        for inputs in ({}, neighbors):
            assert torch.equal(again(input_ids=ids, **inputs).logits, model(input_ids=ids, **inputs).logits)
        assert not torch.equal(again(input_ids=ids, **neighbors).logits, again(input_ids=ids).logits)
        with again.disable_adapter():
            assert torch.equal(again(input_ids=ids, **neighbors).logits, retrofit(base, **SETTINGS)(ids).logits)
    assert torch.equal(
        again.generate(input_ids=ids, retriever=hash_retriever(), **options),
        model.generate(input_ids=ids, retriever=hash_retriever(), **options),
    )


def test_merged_it_is_a_retro_model(base, tmp_path):
    """`merge_and_unload` leaves a RetroForCausalLM, which is saved whole: its backbone is no longer the base."""
    model = get_peft_model(retrofit(base, **SETTINGS), LoraConfig(**LORA))
    train(model)
    ids, neighbors = random_ids(2, 14), random_neighbors(2, 3)
    with torch.no_grad():
        expected = model(input_ids=ids, **neighbors).logits
        merged = model.merge_and_unload()
        assert type(merged) is RetroForCausalLM
        merged.save_pretrained(tmp_path / "merged")
        loaded = RetroForCausalLM.from_pretrained(tmp_path / "merged")
        torch.testing.assert_close(loaded(ids, **neighbors).logits, expected, atol=1e-5, rtol=1e-5)


def test_lora_on_a_saved_retro(base, tmp_path):
    """A RETRO model that was trained and saved adapter-only is a base by name; PEFT finds it again by itself."""
    retro = retrofit(base, **SETTINGS)
    randomize(retro.model.retro, seed=3)
    retro.save_pretrained(tmp_path / "retro", save_backbone=False)
    options = {**LORA, "task_type": "CAUSAL_LM"}
    model = get_peft_model(
        RetroForCausalLM.from_pretrained(tmp_path / "retro", backbone_name_or_path=base), LoraConfig(**options)
    )
    train(model)
    model.save_pretrained(tmp_path / "lora")
    again = AutoPeftModelForCausalLM.from_pretrained(tmp_path / "lora", backbone_name_or_path=base)
    ids, neighbors = random_ids(2, 14), random_neighbors(2, 3)
    with torch.no_grad():
        assert torch.equal(again(input_ids=ids, **neighbors).logits, model(input_ids=ids, **neighbors).logits)


@pytest.mark.parametrize("cls", [AutoPeftModelForCausalLM, AutoModelForCausalLM, RetroForCausalLM])
@pytest.mark.parametrize("save_backbone", [True, False])
@pytest.mark.parametrize("way", ["get_peft_model", pytest.param("add_adapter", marks=adds_an_adapter)])
def test_a_folder_of_peft_over_a_saved_retro(base, tmp_path, monkeypatch, cls, save_backbone, way):
    """Whichever way the adapter was added, and whether or not the model below it holds its backbone."""
    monkeypatch.chdir(tmp_path)
    retro = retrofit(base, **SETTINGS)
    randomize(retro.model.retro, seed=3)
    retro.save_pretrained("retro", save_backbone=save_backbone)
    model = RetroForCausalLM.from_pretrained(put_on_hub("org/retro", Path("retro")), backbone_name_or_path=base)
    config = LoraConfig(**LORA, task_type="CAUSAL_LM")
    if way == "get_peft_model":
        model = get_peft_model(model, config)
    else:
        model.add_adapter(config)
    train(model)
    model.save_pretrained("lora")
    assert not (tmp_path / "lora" / "model.safetensors").exists()
    retriever = hash_retriever()
    options = {} if cls is AutoPeftModelForCausalLM else {"retriever": retriever}
    again = cls.from_pretrained("lora", backbone_name_or_path=base, **options)
    assert options == {} or again.retriever is retriever
    ids, neighbors = random_ids(2, 14), random_neighbors(2, 3)
    with torch.no_grad():
        for inputs in ({"retriever": None}, neighbors):
            found, expected = again(input_ids=ids, **inputs).logits, model(input_ids=ids, **inputs).logits
            torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("cls", [AutoModelForCausalLM, RetroForCausalLM])
def test_a_folder_of_peft_names_no_folder_of_this_machine(base, tmp_path, cls):
    """A stranger may have made it. The caller loads the model and puts the adapter on it."""
    retrofit(base, **SETTINGS).save_pretrained(tmp_path / "retro")
    model = RetroForCausalLM.from_pretrained(tmp_path / "retro")
    get_peft_model(model, LoraConfig(**LORA, task_type="CAUSAL_LM")).save_pretrained(tmp_path / "lora")
    with pytest.raises(ValueError, match="names the model .*retro"):
        cls.from_pretrained(tmp_path / "lora")
    PeftModel.from_pretrained(RetroForCausalLM.from_pretrained(tmp_path / "retro"), tmp_path / "lora")


@adds_an_adapter
@pytest.mark.parametrize("cls", [AutoModel, AutoModelForCausalLM])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_an_adapter_on_the_backbone_alone(base, tmp_path, monkeypatch, cls, dtype):
    """It is not lost without a word; the way that the error names brings it back."""
    monkeypatch.chdir(tmp_path)
    model = retrofit(put_on_hub("org/base", base), base_kwargs={"dtype": dtype}, **SETTINGS)
    randomize(model.model.retro, seed=3)
    model.model.backbone.add_adapter(LoraConfig(target_modules=["q_proj"], r=2, init_lora_weights=False))
    for save_backbone in (True, False):
        with pytest.raises(ValueError, match="adapters of PEFT"):
            model.save_pretrained("model", save_backbone=save_backbone)
    assert not (tmp_path / "model").exists()
    model.base_model.backbone.save_pretrained("lora")
    model.config.backbone_name_or_path = "lora"
    model.config.backbone_fingerprint = None
    model.save_pretrained("model", save_backbone=False)
    again = cls.from_pretrained("model", backbone_name_or_path="lora")
    expected = dict(model.model.named_parameters())
    found = dict(again.base_model.named_parameters())
    assert set(found) == set(expected)
    for name, weight in found.items():
        assert torch.equal(weight, expected[name]), name


@pytest.mark.parametrize("config", [PromptTuningConfig, PromptEncoderConfig])
def test_virtual_tokens_with_given_neighbors_are_refused(base, config):
    """They shift the text, so that its first token would read neighbors of its own chunk."""
    model = get_peft_model(retrofit(base, **SETTINGS), config(task_type="CAUSAL_LM", num_virtual_tokens=3))
    ids, neighbors = random_ids(2, 14), random_neighbors(2, 3)
    for more in ({}, {"chunk_offset": torch.tensor([0, 0]), "neighbor_chunk_size": torch.tensor([4, 4])}):
        with pytest.raises(ValueError, match="virtual tokens"):
            model(input_ids=ids, labels=ids, **neighbors, **more)
    assert model(input_ids=ids, labels=ids).loss.isfinite()


def test_lora_learns_to_answer_in_parallel_context(tmp_path):
    """Three questions alike, whose answers are only in the passages; saved, loaded and merged, the model answers as before."""
    tokenizer = make_tokenizer()
    model = retrofit(
        tiny_backbone("llama", vocab_size=len(tokenizer)), reader="parallel_context", chunk_size=8, neighbor_size=16
    )
    rows = [
        {"question": "which", "answers": [word], "passages": [f"{word} is it"]}
        for word in ("sailor", "garden", "queen")
    ]
    sizes = {"neighbor_size": 16, "reader": model.config.reader}
    questions = tokenize_questions(Dataset.from_list(rows), tokenizer, **sizes)
    torch.manual_seed(0)
    names = r".*backbone.*\.(q_proj|k_proj|v_proj|o_proj|gate_proj|up_proj|down_proj)"
    tuned = get_peft_model(copy.deepcopy(model), LoraConfig(r=8, lora_alpha=16, target_modules=names))
    arguments = TrainingArguments(
        str(tmp_path / "run"),
        max_steps=40,
        learning_rate=2e-2,
        per_device_train_batch_size=3,
        remove_unused_columns=False,
        use_cpu=True,
        report_to=[],
        save_strategy="no",
        disable_tqdm=True,
    )
    collator = QuestionCollator(tokenizer, chunk_size=8)
    Trainer(model=tuned, args=arguments, train_dataset=questions, data_collator=collator).train()
    options = {"modes": ("on", "off"), "max_new_tokens": 4}
    result = answer_questions(tuned, questions, tokenizer, **options)
    assert result.exact_match["on"].tolist() == [100.0] * 3 and result.exact_match["off"].sum() <= 100.0
    # Also before it is merged: the layers of LoRA are in the model that PEFT has wrapped.
    retriever = RetroRetriever.from_texts(
        ["sailor is it"],
        tokenizer,
        embedder=ChunkEmbedder.from_pretrained(make_encoder(tmp_path / "encoder")),
        chunk_size=8,
    )
    assert answer(tuned, retriever, "which", num_passages=1, max_new_tokens=1).text == "sailor"
    with profile(tuned) as spent:
        bits_per_byte(tuned, ["the sailor crosses the harbor"], tokenizer)
    assert sum(spent.seconds.values()) > 0
    tuned.save_pretrained(tmp_path / "lora")
    merged = PeftModel.from_pretrained(model, tmp_path / "lora").merge_and_unload()
    assert isinstance(merged, RetroForCausalLM)
    assert answer_questions(merged, questions, tokenizer, **options).predictions == result.predictions
