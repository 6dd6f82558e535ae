"""Loading: every class from every form of a saved model, with every argument of `from_pretrained` that a CPU can try."""

import json
import logging

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    GenerationConfig,
    Trainer,
    TrainingArguments,
    default_data_collator,
)

from retro_hf import RetroForCausalLM, RetroModel, retrofit

from .test_saving import assert_same, retrofitted
from .tiny import ENCODER, hash_retriever, random_ids, random_neighbors, randomize, tiny_backbone, tiny_retro


CLASSES = [AutoModel, RetroModel, AutoModelForCausalLM, RetroForCausalLM]
FORMS = ["full", "adapter"]


def saved(folder, form, model=None):
    """A RETROfit, saved in one of the two forms, and the folder."""
    model = retrofitted(folder / "base") if model is None else model
    model.save_pretrained(folder / form, save_backbone=form == "full")
    return model, folder / form


def hidden_states(model, ids, neighbors):
    """Last hidden states of either class."""
    return getattr(model, "model", model)(ids, **neighbors).last_hidden_state


@pytest.mark.parametrize("cls", CLASSES)
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("by", [RetroForCausalLM, RetroModel])
def test_every_class_loads_every_form(tmp_path, cls, form, by):
    """Whichever class saved it: all weights, the retriever, the freeze and evaluation mode; nothing is missing."""
    model = retrofitted(tmp_path / "base")
    saved(tmp_path, form, model if by is RetroForCausalLM else model.model)
    retriever = hash_retriever()
    loaded, info = cls.from_pretrained(
        tmp_path / form, backbone_name_or_path=tmp_path / "base", retriever=retriever, output_loading_info=True
    )
    assert type(loaded) is (RetroModel if cls in (AutoModel, RetroModel) else RetroForCausalLM)
    assert not any(info.values())
    assert not loaded.training
    assert loaded.retriever is retriever
    assert {name for name, p in loaded.named_parameters() if "backbone." in name and p.requires_grad} == set()
    assert all(p.requires_grad for p in loaded.base_model.retro.parameters())
    ids, neighbors = random_ids(2, 14), random_neighbors(2, 3)
    for given in (neighbors, {"retriever": None}):
        torch.testing.assert_close(hidden_states(loaded, ids, given), hidden_states(model, ids, given))
    if cls in (AutoModelForCausalLM, RetroForCausalLM):
        torch.testing.assert_close(loaded(ids, **neighbors).logits, model(ids, **neighbors).logits)


@pytest.mark.parametrize("cls", [AutoModel, AutoModelForCausalLM])
def test_an_unfrozen_backbone_stays_unfrozen(tmp_path, cls):
    """In either form."""
    model = retrofitted(tmp_path / "base", freeze_backbone=False)
    for form in FORMS:
        loaded = cls.from_pretrained(saved(tmp_path, form, model)[1], backbone_name_or_path=tmp_path / "base")
        assert all(p.requires_grad for p in loaded.parameters())


@pytest.mark.parametrize("by", [RetroForCausalLM, RetroModel])
@pytest.mark.parametrize("form", FORMS)
def test_every_class_saves_an_adapter_again(tmp_path, form, by):
    """`save_backbone=False` writes what RETRO adds and nothing else."""
    saved(tmp_path, form)
    by.from_pretrained(tmp_path / form, backbone_name_or_path=tmp_path / "base").save_pretrained(
        tmp_path / "again", save_backbone=False
    )
    weights = load_file(tmp_path / "again" / "model.safetensors")
    assert weights and all("retro." in name and "backbone." not in name for name in weights)
    loaded = RetroForCausalLM.from_pretrained(tmp_path / "again", backbone_name_or_path=tmp_path / "base")
    assert_same(loaded, RetroForCausalLM.from_pretrained(tmp_path / form, backbone_name_or_path=tmp_path / "base"))


def test_the_body_resizes_as_the_whole_does():
    """New tokens reach the embeddings, the head and the neighbor encoder of a `RetroModel`, too."""
    body = tiny_retro("llama").model
    body.resize_token_embeddings(104)
    assert body.config.vocab_size == 104
    assert body.backbone.get_output_embeddings().out_features == 104
    assert body.retro.encoder.embed_tokens.num_embeddings == 104
    ids, neighbors = random_ids(2, 14, vocab_size=104), random_neighbors(2, 3, vocab_size=104)
    assert hidden_states(body, ids, neighbors).isfinite().all()


# ── arguments of from_pretrained ──────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("cls", [AutoModel, AutoModelForCausalLM, RetroForCausalLM])
@pytest.mark.parametrize("dtype", ["bfloat16", torch.bfloat16, "auto", None])
def test_dtype(tmp_path, form, cls, dtype):
    """As asked for; by default, and with "auto", as it was saved."""
    model = retrofitted(tmp_path / "base")
    stored = torch.float32 if dtype in ("bfloat16", torch.bfloat16) else torch.bfloat16
    saved(tmp_path, form, model.to(stored))
    loaded = cls.from_pretrained(
        tmp_path / form, backbone_name_or_path=tmp_path / "base", **({} if dtype is None else {"dtype": dtype})
    )
    assert {p.dtype for p in loaded.parameters()} == {torch.bfloat16}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("device_map", ["cpu", {"": "cpu"}, "auto"])
def test_device_map(tmp_path, form, device_map):
    """Where there is one device, everything is on it."""
    model, folder = saved(tmp_path, form)
    loaded = AutoModelForCausalLM.from_pretrained(
        folder, backbone_name_or_path=tmp_path / "base", device_map=device_map
    )
    assert len({p.device for p in loaded.parameters()}) == 1
    assert_same(loaded.to("cpu"), model)


@pytest.mark.parametrize("form", FORMS)
def test_generation_config(tmp_path, form):
    """What is given takes precedence over what was saved."""
    _, folder = saved(tmp_path, form)
    given = GenerationConfig(max_new_tokens=3)
    loaded = AutoModelForCausalLM.from_pretrained(
        folder, backbone_name_or_path=tmp_path / "base", generation_config=given
    )
    assert loaded.generation_config.max_new_tokens == 3


@pytest.mark.parametrize("form", FORMS)
def test_variant(tmp_path, form):
    """Weights saved under the name of a variant are loaded by that name, and by no other."""
    model = retrofitted(tmp_path / "base")
    model.save_pretrained(tmp_path / form, save_backbone=form == "full", variant="fp32")
    assert not (tmp_path / form / "model.safetensors").exists()
    assert_same(
        AutoModelForCausalLM.from_pretrained(tmp_path / form, backbone_name_or_path=tmp_path / "base", variant="fp32"),
        model,
    )
    with pytest.raises(OSError, match=r"model\.safetensors"):
        AutoModelForCausalLM.from_pretrained(tmp_path / form, backbone_name_or_path=tmp_path / "base")


@pytest.mark.parametrize("form", FORMS)
def test_subfolder(tmp_path, form):
    """That of the model; its backbone is not looked for there."""
    model, _ = saved(tmp_path, form)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, backbone_name_or_path=tmp_path / "base", subfolder=form)
    assert_same(loaded, model)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("cls", [AutoModelForCausalLM, RetroForCausalLM, RetroModel])
@pytest.mark.parametrize("name", ["eager", {"": "eager", "text_config": "sdpa"}, {"": "sdpa", "text_config": "eager"}])
def test_attn_implementation(tmp_path, form, cls, name):
    """One for all parts, or one for each."""
    model, folder = saved(tmp_path, form)
    loaded = cls.from_pretrained(folder, backbone_name_or_path=tmp_path / "base", attn_implementation=name)
    expected = dict.fromkeys(("", "text_config"), name) if isinstance(name, str) else name
    assert loaded.config._attn_implementation == expected[""]
    assert loaded.base_model.backbone.config._attn_implementation == expected["text_config"]
    ids, neighbors = random_ids(2, 14), random_neighbors(2, 3)
    torch.testing.assert_close(hidden_states(loaded, ids, neighbors), hidden_states(model, ids, neighbors))


@pytest.mark.parametrize("form", FORMS)
def test_use_safetensors(tmp_path, form):
    """True refuses a backbone that is stored as a pickle."""
    model, folder = saved(tmp_path, form)
    assert_same(
        AutoModelForCausalLM.from_pretrained(folder, backbone_name_or_path=tmp_path / "base", use_safetensors=True),
        model,
    )
    file = (tmp_path / "base" if form == "adapter" else folder) / "model.safetensors"
    torch.save(load_file(file), file.with_name("pytorch_model.bin"))
    file.unlink()
    with pytest.raises(OSError, match=r"model\.safetensors|safetensors"):
        AutoModelForCausalLM.from_pretrained(folder, backbone_name_or_path=tmp_path / "base", use_safetensors=True)


@pytest.mark.parametrize("form", FORMS)
def test_a_config_of_the_callers_own(tmp_path, form):
    """An object, or the name of a folder that has one."""
    model, folder = saved(tmp_path, form)
    config = AutoConfig.from_pretrained(folder)
    config.num_neighbors = 7
    before = config.to_dict()
    for cls in (AutoModel, RetroModel, AutoModelForCausalLM, RetroForCausalLM):
        assert (
            cls.from_pretrained(folder, backbone_name_or_path=tmp_path / "base", config=config).config.num_neighbors
            == 7
        )
        assert config.to_dict() == before, "the caller's own object must stay as it is"
    config.save_pretrained(tmp_path / "config")
    assert (
        RetroForCausalLM.from_pretrained(
            folder, backbone_name_or_path=tmp_path / "base", config=tmp_path / "config"
        ).config.num_neighbors
        == 7
    )
    assert_same(RetroForCausalLM.from_pretrained(folder, backbone_name_or_path=tmp_path / "base"), model)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("cls", [AutoModel, AutoModelForCausalLM, RetroForCausalLM])
@pytest.mark.parametrize(
    "given", [{"max_position_embeddings": 77}, {"text_config": {"max_position_embeddings": 77}}, {"rope_theta": 5.0}]
)
def test_fields_of_the_backbone_reach_it(tmp_path, form, cls, given):
    """Given to the whole model, or as `text_config`; the backbone that runs has them."""
    _, folder = saved(tmp_path, form)
    if "rope_theta" in given:
        given = {"rope_parameters": {"rope_type": "default", "rope_theta": 5.0}}
    loaded = cls.from_pretrained(folder, backbone_name_or_path=tmp_path / "base", use_cache=False, **given)
    running = loaded.base_model.backbone.config
    assert running is loaded.config.text_config
    assert running.use_cache is False
    name, value = next(iter(given.get("text_config", given).items()))
    assert getattr(running, name) == value


@pytest.mark.parametrize("form", FORMS)
def test_unknown_argument_is_refused(tmp_path, form):
    """Raises, as transformers does."""
    _, folder = saved(tmp_path, form)
    with pytest.raises(TypeError, match="not_an_argument"):
        AutoModelForCausalLM.from_pretrained(folder, backbone_name_or_path=tmp_path / "base", not_an_argument=1)


@pytest.mark.parametrize("form", FORMS)
def test_weights_that_do_not_fit_the_config(tmp_path, form):
    """A weight of another shape is refused; with `ignore_mismatched_sizes` it is reported and begins anew."""
    _, folder = saved(tmp_path, form)
    weights = load_file(folder / "model.safetensors")
    name = "model.retro.cross_attention.1.norm.weight"
    save_file(weights | {name: torch.ones(3)}, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(RuntimeError):
        AutoModelForCausalLM.from_pretrained(folder, backbone_name_or_path=tmp_path / "base")
    loaded, info = AutoModelForCausalLM.from_pretrained(
        folder, backbone_name_or_path=tmp_path / "base", ignore_mismatched_sizes=True, output_loading_info=True
    )
    assert [entry[0] for entry in info["mismatched_keys"]] == [name]
    assert torch.equal(loaded.get_parameter(name), torch.ones(32))


def test_another_backbone_of_the_callers(tmp_path):
    """Its revision is the caller's as well: that of the saved name says nothing about another one."""
    model = retrofitted(tmp_path / "base")
    model.config.backbone_revision = "0123456789"
    model.save_pretrained(tmp_path / "adapter", save_backbone=False)
    (tmp_path / "base").rename(tmp_path / "moved")
    for cls in (AutoModel, AutoModelForCausalLM, RetroForCausalLM):
        loaded = cls.from_pretrained(tmp_path / "adapter", backbone_name_or_path=tmp_path / "moved")
        assert loaded.config.backbone_revision is None
        assert loaded.config.backbone_name_or_path == str(tmp_path / "moved")


# ── attention of each part ────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("cls", ["whole", "body"])
def test_attention_is_set_for_each_part(cls):
    """A dict names parts; what it does not name stays as it is."""
    model = tiny_retro("llama")
    model = model if cls == "whole" else model.model
    ids, neighbors = random_ids(2, 14), random_neighbors(2, 3)
    before = hidden_states(model, ids, neighbors)

    def parts():
        config = model.config
        found = config, model.base_model.backbone.config, config.neighbor_encoder_config
        return [part._attn_implementation for part in found]

    model.set_attn_implementation("sdpa")
    assert parts() == ["sdpa", "sdpa", "sdpa"]
    model.set_attn_implementation({"text_config": "eager"})
    assert parts() == ["sdpa", "eager", "sdpa"]
    torch.testing.assert_close(hidden_states(model, ids, neighbors), before)
    model.set_attn_implementation({"neighbor_encoder_config": "eager"})
    assert parts() == ["sdpa", "eager", "eager"]
    model.set_attn_implementation({"": "eager", "text_config": "sdpa", "neighbor_encoder_config": "sdpa"})
    assert parts() == ["eager", "sdpa", "sdpa"]
    torch.testing.assert_close(hidden_states(model, ids, neighbors), before)
    model.set_attn_implementation("eager")
    assert parts() == ["eager", "eager", "eager"]
    with pytest.raises(ValueError, match="'backbone'"):
        model.set_attn_implementation({"backbone": "sdpa"})


# ── checkpoints of a Trainer ──────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("shards", [None, "16KB"])
def test_resuming_an_adapter_reports_nothing_missing(tmp_path, caplog, monkeypatch, shards):
    """The backbone is not in the checkpoint, and need not be; the resumed run ends as an uninterrupted one does."""
    rows = []
    for seed in range(4):
        ids = random_ids(1, 12, seed=seed)[0]
        rows.append(
            {"input_ids": ids, "labels": ids} | {k: v[0] for k, v in random_neighbors(1, 3, seed=seed).items()}
        )
    tiny_backbone("llama").save_pretrained(tmp_path / "base")
    if shards:
        original = RetroForCausalLM.save_pretrained
        monkeypatch.setattr(
            RetroForCausalLM, "save_pretrained", lambda *a, **k: original(*a, **k, max_shard_size=shards)
        )

    def run(steps, folder, resume=False):
        torch.manual_seed(0)
        model = retrofit(tmp_path / "base", encoder=ENCODER, chunk_size=4, cross_attention_layers=[1, 3])
        randomize(model.model.retro, seed=3)
        model.config.save_backbone = False
        trainer = Trainer(
            model=model,
            args=TrainingArguments(
                str(tmp_path / folder),
                max_steps=steps,
                save_steps=1,
                lr_scheduler_type="constant",
                remove_unused_columns=False,
                use_cpu=True,
                report_to=[],
                disable_tqdm=True,
            ),
            train_dataset=rows,
            data_collator=default_data_collator,
        )
        trainer.train(resume_from_checkpoint=resume)
        return model

    whole = run(2, "whole")
    run(1, "parts")
    weights = [load_file(file) for file in (tmp_path / "parts" / "checkpoint-1").glob("*.safetensors")]
    assert (len(weights) > 1) == (shards is not None)
    assert not any("backbone." in name for part in weights for name in part)
    caplog.clear()
    with caplog.at_level(logging.WARNING):
        resumed = run(2, "parts", resume=True)
    assert not [record for record in caplog.records if "missing" in record.getMessage()]
    for name, weight in whole.state_dict().items():
        assert torch.equal(resumed.state_dict()[name], weight), name


# ── the fingerprint of the backbone ───────────────────────────────────────────────────────────────────────────────────


def test_a_few_trained_rows_are_not_lost(tmp_path):
    """One value of one row of the embeddings is enough to refuse `save_backbone=False`."""
    model = retrofitted(tmp_path / "base")
    with torch.no_grad():
        model.model.backbone.get_input_embeddings().weight[37, 5] += 0.5
    with pytest.raises(ValueError, match=r"no longer those of '.*base'"):
        model.save_pretrained(tmp_path / "adapter", save_backbone=False)


@pytest.mark.parametrize("cls", [AutoModel, AutoModelForCausalLM])
def test_a_fingerprint_of_an_older_version_loads(tmp_path, cls):
    """16 digits, of a sample: still checked as they were, and replaced by one of all values."""
    base = tiny_backbone("llama")
    with torch.no_grad():
        for weight in base.parameters():
            weight.copy_((torch.arange(weight.numel()) % 97 / 97 - 0.5).view_as(weight))
    base.save_pretrained(tmp_path / "base")
    model, folder = saved(tmp_path, "adapter")
    assert len(model.config.backbone_fingerprint) == 64
    file = folder / "config.json"
    config = json.loads(file.read_text())
    file.write_text(json.dumps(config | {"backbone_fingerprint": "434ff9fc9cd768f5"}))
    with pytest.raises(ValueError, match="434ff9fc9cd768f5.*434ff9fc9cd768f4"):
        cls.from_pretrained(folder, backbone_name_or_path=tmp_path / "base")
    file.write_text(json.dumps(config | {"backbone_fingerprint": "434ff9fc9cd768f4"}))
    assert (
        cls.from_pretrained(folder, backbone_name_or_path=tmp_path / "base").config.backbone_fingerprint
        == model.config.backbone_fingerprint
    )
