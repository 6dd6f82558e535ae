"""Saving and loading: whole, in shards, or only what RETRO adds, always through the auto classes."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hub_server import running_hub
from huggingface_hub.constants import HF_HUB_CACHE
from safetensors import safe_open
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, GenerationConfig

from retro_hf import RetroForCausalLM, RetroModel, retrofit

from .hub_cache import put_on_hub
from .tiny import ENCODER, FAMILIES, hash_retriever, random_ids, random_neighbors, randomize, tiny_backbone, tiny_retro
from .zoo import tiny_config


def retrofitted(path, family="llama", **config):
    """A trained-looking RETROfit of a base saved at `path`; its own weights are random, its base's as saved."""
    if not Path(path).exists():
        tiny_backbone(family).save_pretrained(path)
    model = retrofit(path, encoder=ENCODER, chunk_size=4, cross_attention_layers=[1, 3], **config)
    randomize(model.model.retro, seed=3)
    return model


def assert_same(loaded, model):
    """Same class, weights, logits with and without neighbors, frozen parameters and mode."""
    assert type(loaded) is RetroForCausalLM
    assert not loaded.training
    weights = model.state_dict()
    assert set(loaded.state_dict()) == set(weights)
    for name, tensor in loaded.state_dict().items():
        assert torch.equal(tensor, weights[name]), name
    ids, neighbors = random_ids(2, 14), random_neighbors(2, 3)
    torch.testing.assert_close(loaded(ids, **neighbors).logits, model(ids, **neighbors).logits)
    torch.testing.assert_close(loaded(ids).logits, model(ids).logits)
    expected = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    assert {name: parameter.requires_grad for name, parameter in loaded.named_parameters()} == expected


@pytest.mark.parametrize("family", ["retro_decoder", "llama", "gpt2", "gemma3", "qwen3_moe", "opt"])
@pytest.mark.parametrize("shards", [None, "20KB"])
def test_from_scratch(tmp_path, family, shards):
    """A model with weights of its own, whole and in shards; fused experts and tied embeddings included."""
    model = tiny_retro(family)
    model.save_pretrained(tmp_path, **({"max_shard_size": shards} if shards else {}))
    assert (len(list(tmp_path.glob("*.safetensors"))) > 1) == (shards is not None)
    loaded, info = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info.values())
    assert_same(loaded, model)


@pytest.mark.parametrize("family", ["llama", "gpt2", "qwen3_moe"])
@pytest.mark.parametrize("save_backbone", [True, False])
@pytest.mark.parametrize("shards", [None, "4KB"])
def test_retrofit(tmp_path, family, save_backbone, shards):
    """A RETROfit saved whole, or only what it adds, whole and in shards; the freeze holds after loading."""
    model = retrofitted(tmp_path / "base", family)
    model.save_pretrained(
        tmp_path / "model", save_backbone=save_backbone, **({"max_shard_size": shards} if shards else {})
    )
    assert model.config.save_backbone
    names = [name for file in (tmp_path / "model").glob("*.safetensors") for name in safe_open(file, "pt").keys()]  # noqa: SIM118
    assert any(name.startswith("model.backbone.") for name in names) == save_backbone
    assert (len(list((tmp_path / "model").glob("*.safetensors"))) > 1) == (shards is not None)
    assert_same(
        AutoModelForCausalLM.from_pretrained(tmp_path / "model", backbone_name_or_path=tmp_path / "base"), model
    )
    assert_same(RetroForCausalLM.from_pretrained(tmp_path / "model", backbone_name_or_path=tmp_path / "base"), model)


def test_adapter_is_saved_again_as_an_adapter(tmp_path):
    """The choice is kept in the config; an unfrozen backbone stays unfrozen."""
    model = retrofitted(tmp_path / "base", freeze_backbone=False)
    model.save_pretrained(tmp_path / "first", save_backbone=False)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "first", backbone_name_or_path=tmp_path / "base")
    assert_same(loaded, model)
    loaded.save_pretrained(tmp_path / "second")
    assert json.loads((tmp_path / "second" / "config.json").read_text())["save_backbone"] is False
    sizes = [(tmp_path / name / "model.safetensors").stat().st_size for name in ("first", "second")]
    assert sizes[0] == sizes[1]
    assert_same(
        AutoModelForCausalLM.from_pretrained(tmp_path / "second", backbone_name_or_path=tmp_path / "base"), model
    )


@pytest.mark.parametrize("save_backbone", [True, False])
def test_a_state_dict_handed_over_by_a_trainer(tmp_path, save_backbone):
    """Trainers gather the weights themselves and pass them."""
    model = retrofitted(tmp_path / "base")
    model.config.save_backbone = save_backbone
    model.save_pretrained(tmp_path / "model", state_dict=model.state_dict())
    assert_same(
        AutoModelForCausalLM.from_pretrained(tmp_path / "model", backbone_name_or_path=tmp_path / "base"), model
    )


@pytest.mark.parametrize("save_backbone", [True, False])
def test_dtype(tmp_path, save_backbone):
    """`dtype=` reaches the backbone and what RETRO adds."""
    retrofitted(tmp_path / "base").save_pretrained(tmp_path / "model", save_backbone=save_backbone)
    loaded = AutoModelForCausalLM.from_pretrained(
        tmp_path / "model", backbone_name_or_path=tmp_path / "base", dtype=torch.bfloat16
    )
    assert {parameter.dtype for parameter in loaded.parameters()} == {torch.bfloat16}
    logits = loaded(random_ids(2, 14), **random_neighbors(2, 3)).logits
    assert logits.dtype == torch.bfloat16
    assert logits.isfinite().all()
    generated = loaded.generate(
        random_ids(2, 6), retriever=hash_retriever(), max_new_tokens=6, do_sample=False, pad_token_id=0
    )
    assert generated.shape == (2, 12)


@pytest.mark.parametrize("family", ["gpt2", "retro_decoder"])
def test_tied_embeddings_stay_tied(tmp_path, family):
    """The read-out of a tied backbone is its embedding, and is stored once."""
    model = tiny_retro(family)
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert loaded.get_output_embeddings().weight is loaded.get_input_embeddings().weight
    assert not any("lm_head" in name for name in safe_open(tmp_path / "model.safetensors", "pt").keys())  # noqa: SIM118


@pytest.mark.parametrize("save_backbone", [True, False])
def test_attention_implementation(tmp_path, save_backbone):
    """`attn_implementation=` reaches the backbone, which stays causal under each."""
    model = retrofitted(tmp_path / "base")
    model.save_pretrained(tmp_path / "model", save_backbone=save_backbone)
    ids, neighbors = random_ids(2, 14), random_neighbors(2, 3)
    for name in ("sdpa", "eager"):
        loaded = AutoModelForCausalLM.from_pretrained(
            tmp_path / "model", backbone_name_or_path=tmp_path / "base", attn_implementation=name
        )
        assert loaded.model.backbone.config._attn_implementation == name
        torch.testing.assert_close(loaded(ids, **neighbors).logits, model(ids, **neighbors).logits)


@pytest.mark.parametrize("save_backbone", [True, False])
def test_retriever_and_config_at_loading(tmp_path, save_backbone):
    """`retriever=` is attached, and fields of the config may be overridden."""
    model = retrofitted(tmp_path / "base")
    model.save_pretrained(tmp_path / "model", save_backbone=save_backbone)
    retriever = hash_retriever()
    loaded = AutoModelForCausalLM.from_pretrained(
        tmp_path / "model", backbone_name_or_path=tmp_path / "base", retriever=retriever, num_neighbors=5
    )
    assert loaded.retriever is retriever
    assert loaded.config.num_neighbors == 5
    config = AutoConfig.from_pretrained(tmp_path / "model")
    config.num_neighbors = 7
    assert (
        RetroForCausalLM.from_pretrained(
            tmp_path / "model", backbone_name_or_path=tmp_path / "base", config=config
        ).config.num_neighbors
        == 7
    )
    if save_backbone:
        assert (
            RetroForCausalLM.from_pretrained(
                tmp_path / "model", backbone_name_or_path=tmp_path / "base", num_neighbors=5
            ).config.num_neighbors
            == 5
        )


@pytest.mark.parametrize("save_backbone", [True, False])
def test_generation_config(tmp_path, save_backbone):
    """A RETROfit starts with its base's generation config; a changed one is saved and loaded."""
    base = tiny_backbone("llama")
    base.generation_config = GenerationConfig(max_new_tokens=7)
    base.save_pretrained(tmp_path / "base")
    model = retrofitted(tmp_path / "base")
    assert model.generation_config.max_new_tokens == 7
    model.generation_config.max_new_tokens = 9
    model.save_pretrained(tmp_path / "model", save_backbone=save_backbone)
    assert (
        AutoModelForCausalLM.from_pretrained(
            tmp_path / "model", backbone_name_or_path=tmp_path / "base"
        ).generation_config.max_new_tokens
        == 9
    )


def test_body_alone(tmp_path):
    """`AutoModel` loads the model without its head's loss."""
    model = tiny_retro("llama")
    model.save_pretrained(tmp_path)
    body = AutoModel.from_pretrained(tmp_path)
    assert type(body) is RetroModel
    ids, neighbors = random_ids(2, 14), random_neighbors(2, 3)
    states = body(ids, **neighbors).last_hidden_state
    torch.testing.assert_close(model.model.backbone.lm_head(states), model(ids, **neighbors).logits)


def test_adapter_of_a_local_base_is_loaded_where_the_caller_says(tmp_path, monkeypatch):
    """No saved file names a folder of this machine; the error names the adapter and what to give."""
    monkeypatch.chdir(tmp_path)
    model = retrofitted("base")
    model.save_pretrained("model", save_backbone=False)
    for file in Path("model").rglob("*"):
        assert file.is_dir() or str(tmp_path).encode() not in file.read_bytes(), file
    with pytest.raises(
        OSError, match=r"'model' holds only what RETRO adds .*from_pretrained\('model', backbone_name_or_path="
    ):
        AutoModelForCausalLM.from_pretrained("model")
    for cls in (AutoModelForCausalLM, RetroForCausalLM):
        for name in ("base", Path("base"), tmp_path / "base"):
            assert_same(cls.from_pretrained("model", backbone_name_or_path=name), model)
    again = AutoModelForCausalLM.from_pretrained("model", backbone_name_or_path="base")
    again.save_pretrained("whole", save_backbone=True)
    assert_same(AutoModelForCausalLM.from_pretrained("whole"), model)
    with pytest.raises(OSError, match=r"'elsewhere'[\s\S]*backbone_name_or_path="):
        AutoModelForCausalLM.from_pretrained("model", backbone_name_or_path="elsewhere")


NAMES = [
    "{tmp}/base", "./base", "../base", "base/../base", "base", "~/base", "//host/base", "\\\\host\\base", "C:/base", "a//b",
    "/dev/stdin", "/dev/null", "org/na..me", "org/name/more", "", ".hidden", 5, ["base"],
]  # fmt: skip


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("field", ["backbone_name_or_path", "retriever_name_or_path"])
def test_names_in_a_strangers_config_are_on_the_hub(tmp_path, monkeypatch, name, field):
    """A folder of this machine is never opened because a config names it, even if it fits."""
    monkeypatch.chdir(tmp_path)
    model = retrofitted("base")
    model.save_pretrained("model", save_backbone=False)
    config = json.loads(Path("model/config.json").read_text())
    config[field] = name.replace("{tmp}", str(tmp_path)) if isinstance(name, str) else name
    Path("model/config.json").write_text(json.dumps(config))
    opened = []
    monkeypatch.setattr("retro_hf.model.adapter_retro._load_backbone", lambda *_: opened.append(_))
    for cls in (AutoModelForCausalLM, AutoModel, RetroForCausalLM, AutoConfig):
        with pytest.raises(ValueError, match=field):
            cls.from_pretrained("model")
    Path("model/.cache/huggingface").mkdir(parents=True)
    Path("model/.cache/huggingface/retro.json").write_text(json.dumps({field: str(tmp_path / "base")}))
    config[field] = None
    Path("model/config.json").write_text(json.dumps(config))
    assert AutoConfig.from_pretrained("model").local_paths() == {}
    assert not opened


def test_other_names_of_a_strangers_model(tmp_path, monkeypatch):
    """A revision that is a path, a weight map that names other folders, and a pipe are refused at once."""
    monkeypatch.chdir(tmp_path)
    model = retrofitted("base")
    model.save_pretrained("model", max_shard_size="4KB")
    file = Path("model/model.safetensors.index.json")
    content = json.loads(file.read_text())
    weight = next(iter(content["weight_map"]))
    for name in (str(tmp_path / "model.safetensors"), "../base/model.safetensors", "..", "a\\b", "", 5):
        file.write_text(json.dumps(content | {"weight_map": content["weight_map"] | {weight: name}}))
        with pytest.raises(ValueError, match="weight map"):
            AutoModelForCausalLM.from_pretrained("model")
    for broken in ("[]", "{}", "[" * 100_000, '{"weight_map": 3}', "no"):
        file.write_text(broken)
        with pytest.raises(ValueError, match="weight map"):
            AutoModelForCausalLM.from_pretrained("model")
    file.write_text(json.dumps(content))
    os.mkfifo("model/pipe.safetensors")
    with pytest.raises(ValueError, match="pipe"):
        RetroForCausalLM.from_pretrained("model")
    os.remove("model/pipe.safetensors")
    config = json.loads(Path("model/config.json").read_text())
    for revision in ("../../main", "/etc", "a/../b", "", 5):
        Path("model/config.json").write_text(json.dumps(config | {"backbone_revision": revision}))
        with pytest.raises(ValueError, match="backbone_revision"):
            AutoConfig.from_pretrained("model")


@pytest.mark.parametrize("load", [RetroForCausalLM.from_pretrained, retrofit])
def test_weight_map_of_a_hub_repository_names_its_own_files(tmp_path, load):
    """No file outside of the repository is opened, also where the client of the Hub finds everything in its cache."""
    (retrofitted(tmp_path / "base") if load is not retrofit else tiny_backbone("llama")).save_pretrained(
        tmp_path / "model", max_shard_size="16KB"
    )
    file = tmp_path / "model" / "model.safetensors.index.json"
    content = json.loads(file.read_text())
    weight, own = next(iter(content["weight_map"].items()))
    outside = Path(HF_HUB_CACHE) / "outside.safetensors"
    outside.parent.mkdir(parents=True, exist_ok=True)
    shutil.copy(tmp_path / "model" / own, outside)
    for name in (str(outside), "../../../outside.safetensors", "..\\..\\outside.safetensors", 5, None, ["a"]):
        file.write_text(json.dumps(content | {"weight_map": content["weight_map"] | {weight: name}}))
        with pytest.raises((ValueError, OSError), match="weight map"):
            load(put_on_hub("org/shards", tmp_path / "model"))
    file.write_text(json.dumps(content))
    load(put_on_hub("org/shards", tmp_path / "model"))


def test_adapter_with_an_empty_base(tmp_path):
    """The folder of the base is there, but nothing in it: explained as a missing one is."""
    retrofitted(tmp_path / "base").save_pretrained(tmp_path / "model", save_backbone=False)
    for file in (tmp_path / "base").iterdir():
        file.unlink()
    with pytest.raises(OSError, match=r"holds only what RETRO adds to '.*base'.*backbone_name_or_path="):
        AutoModelForCausalLM.from_pretrained(tmp_path / "model", backbone_name_or_path=tmp_path / "base")


def test_adapter_that_was_cut_off(tmp_path):
    """Half a file of weights, as an interrupted copy leaves: the error names the folder and the remedy."""
    retrofitted(tmp_path / "base").save_pretrained(tmp_path / "model", save_backbone=False)
    weights = tmp_path / "model" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[: weights.stat().st_size // 2])
    with pytest.raises(OSError, match=r"model' are damaged or not complete: .*download them again"):
        AutoModelForCausalLM.from_pretrained(tmp_path / "model", backbone_name_or_path=tmp_path / "base")


@pytest.mark.parametrize(
    ("field", "value"), [("hidden_size", 48), ("num_hidden_layers", 5), ("vocab_size", 101), ("model_type", "qwen3")]
)
def test_adapter_with_another_base(tmp_path, field, value):
    """A base that has changed in the meantime is refused with both values."""
    retrofitted(tmp_path / "base").save_pretrained(tmp_path / "model", save_backbone=False)
    if field == "model_type":
        tiny_backbone(value).save_pretrained(tmp_path / "base")
    else:
        tiny_backbone("llama", **{field: value}).save_pretrained(tmp_path / "base")
    before = "llama" if field == "model_type" else FAMILIES["llama"][field]
    with pytest.raises(ValueError, match=rf"{field}={before}, but .*base'.* has {value}.*backbone_revision"):
        AutoModelForCausalLM.from_pretrained(tmp_path / "model", backbone_name_or_path=tmp_path / "base")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_adapter_with_other_weights_of_the_same_shape(tmp_path, dtype):
    """One layer of the base was trained a little since: refused, with both fingerprints; read if told to."""
    model = retrofitted(tmp_path / "base")
    model.save_pretrained(tmp_path / "model", save_backbone=False)
    base = tiny_backbone("llama")
    with torch.no_grad():
        base.model.layers[2].mlp.up_proj.weight.mul_(1.01)
    base.save_pretrained(tmp_path / "base")
    with pytest.raises(
        ValueError, match=r"backbone_fingerprint=\w{64}, but .* has \w{64}\..*`backbone_fingerprint=None`"
    ):
        AutoModelForCausalLM.from_pretrained(tmp_path / "model", backbone_name_or_path=tmp_path / "base", dtype=dtype)
    config = json.loads((tmp_path / "model" / "config.json").read_text())
    config["backbone_fingerprint"] = None
    (tmp_path / "model" / "config.json").write_text(json.dumps(config))
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "model", backbone_name_or_path=tmp_path / "base")
    assert torch.equal(loaded(random_ids(2, 14)).logits, base(random_ids(2, 14)).logits)


def test_adapter_of_a_base_that_was_trained(tmp_path):
    """Its new weights would be lost: refused before anything is written."""
    model = retrofitted(tmp_path / "base", freeze_backbone=False)
    with torch.no_grad():
        model.model.backbone.model.layers[2].mlp.up_proj.weight.mul_(1.01)
    with pytest.raises(ValueError, match=r"no longer those of '.*base'.*`save_backbone=True`"):
        model.save_pretrained(tmp_path / "model", save_backbone=False)
    assert not (tmp_path / "model").exists()
    model.save_pretrained(tmp_path / "model")
    assert_same(
        AutoModelForCausalLM.from_pretrained(tmp_path / "model", backbone_name_or_path=tmp_path / "base"), model
    )


def test_a_quantized_base_is_not_written(tmp_path):
    """Only its name is, unless asked; asked to write it, nothing is written. Real ones are in `test_quantized.py`."""
    tiny_backbone("llama").save_pretrained(tmp_path / "base")
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    base.hf_quantizer = object()
    model = retrofit(base, encoder=ENCODER, chunk_size=4, cross_attention_layers=[1, 3])
    with pytest.raises(ValueError, match=r"quantized backbone cannot be written.*`save_backbone=False`"):
        model.save_pretrained(tmp_path / "model", save_backbone=True)
    assert not (tmp_path / "model").exists()
    model.save_pretrained(tmp_path / "model")
    assert_same(
        AutoModelForCausalLM.from_pretrained(tmp_path / "model", backbone_name_or_path=tmp_path / "base"), model
    )


def test_adapter_with_missing_weights(tmp_path):
    """A folder whose weights do not belong to its config is refused with their names."""
    retrofitted(tmp_path / "base").save_pretrained(tmp_path / "model", save_backbone=False)
    config = json.loads((tmp_path / "model" / "config.json").read_text())
    config["cross_attention_layers"] = [1, 2]
    (tmp_path / "model" / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=r"do not fit its config: missing \['model.retro.cross_attention.2"):
        AutoModelForCausalLM.from_pretrained(tmp_path / "model", backbone_name_or_path=tmp_path / "base")


def test_adapter_of_a_nameless_base(tmp_path):
    """What has no name cannot be referred to; nothing is written, and the model can be saved whole."""
    model = tiny_retro("llama")
    with pytest.raises(ValueError, match=r"`backbone_name_or_path` is None.*`save_backbone=True`"):
        model.save_pretrained(tmp_path / "model", save_backbone=False)
    assert not (tmp_path / "model").exists()
    model.save_pretrained(tmp_path / "model")
    assert_same(
        AutoModelForCausalLM.from_pretrained(tmp_path / "model", backbone_name_or_path=tmp_path / "base"), model
    )


def test_resized_embeddings(tmp_path):
    """New tokens reach the backbone and the neighbor encoder, and are saved."""
    model = tiny_retro("llama")
    model.resize_token_embeddings(104)
    assert model.config.vocab_size == 104
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    ids = random_ids(2, 14, vocab_size=104)
    neighbors = random_neighbors(2, 3, vocab_size=104)
    torch.testing.assert_close(loaded(ids, **neighbors).logits, model(ids, **neighbors).logits)


def test_resized_embeddings_without_a_head():
    """The model without a head is resized as the one with a head is: neighbors of new tokens can be read."""
    model = tiny_retro("llama").model
    model.resize_token_embeddings(104)
    assert model.retro.encoder.embed_tokens.num_embeddings == 104
    model(random_ids(2, 14, vocab_size=104), **random_neighbors(2, 3, vocab_size=104))


def test_values_that_a_backbone_computes_on_loading_are_kept(tmp_path):
    """Falcon-H1's multipliers are in no file: the backbone's own initialization fills them in."""
    model = retrofit(AutoModelForCausalLM.from_config(tiny_config("falcon_h1")), chunk_size=4)
    model.save_pretrained(tmp_path)
    loaded = dict(AutoModelForCausalLM.from_pretrained(tmp_path).named_buffers())
    for name, buffer in model.named_buffers():
        assert torch.equal(loaded[name], buffer), name


PUSH_AND_PULL = """
import json
import torch
from huggingface_hub import hf_hub_download
from safetensors import safe_open
from transformers import AutoModel, AutoModelForCausalLM
import retro_hf

def refused(push):
    try:
        push()
    except ValueError as error:
        return "folder of this machine" in str(error)

model = retro_hf.retrofit("base", chunk_size=4, cross_attention_layers=[1, 3])
model.config.retriever_name_or_path = "./store"
model.push_to_hub("me/full")  # its paths stay here
config = open(hf_hub_download("me/full", "config.json")).read()
assert not json.loads(config)["backbone_name_or_path"] and "store" not in config and "/base" not in config, config
assert model.config.backbone_name_or_path.endswith("/base") and model.config.retriever_name_or_path == "./store"

model.config.save_backbone = False
assert refused(lambda: model.push_to_hub("me/adapter"))
assert refused(lambda: model.save_pretrained("copy", push_to_hub=True, repo_id="me/adapter"))
model.model.backbone.push_to_hub("me/base")
model.config.backbone_name_or_path = "me/base"
model.push_to_hub("me/adapter")
assert "/base" not in open(hf_hub_download("me/adapter", "config.json")).read().replace("me/base", "")
model.save_pretrained("copy", push_to_hub=True, repo_id="me/copy")

ids = torch.randint(3, 99, (1, 20))
commit = hf_hub_download("me/adapter", "config.json").split("/snapshots/")[1].split("/")[0]
settings = {"cache_dir": "cache", "revision": commit, "token": "hf_test"}
for name, given in (("me/full", {}), ("me/adapter", {}), ("me/copy", {}), ("me/adapter", settings)):
    again = AutoModelForCausalLM.from_pretrained(name, **given)
    assert torch.equal(model(ids).logits, again(ids).logits), name
    body = AutoModel.from_pretrained(name, **given)
    assert torch.equal(model.model(ids).last_hidden_state, body(ids).last_hidden_state), name
with safe_open(hf_hub_download("me/adapter", "model.safetensors"), "pt") as weights:
    assert all(name.startswith("model.retro.") for name in weights.keys())
# From the two caches, without asking the Hub.
for given in ({}, settings):
    AutoModelForCausalLM.from_pretrained("me/adapter", local_files_only=True, **given)
"""


TRAIN_AND_PUSH = """
import os
import torch
from huggingface_hub import create_repo, snapshot_download, upload_folder
from transformers import AutoConfig, AutoModelForCausalLM, Trainer, TrainingArguments
import retro_hf

model = retro_hf.retrofit("base", chunk_size=4, cross_attention_layers=[1, 3])
os.mkdir("store")
model.config.retriever_name_or_path = "./store"
ids = torch.arange(3, 23)
rows = [{"input_ids": ids, "labels": ids, "neighbor_input_ids": ids[:8].expand(5, 2, 8)}] * 2
settings = {"max_steps": 1, "save_steps": 1, "report_to": [], "use_cpu": True, "push_to_hub": True, "disable_tqdm": True}
for name, save_backbone in (("me/whole", True), ("me/part", False)):
    model.config.save_backbone = save_backbone
    arguments = TrainingArguments(name[3:], hub_model_id=name, hub_strategy="all_checkpoints", **settings)
    trainer = Trainer(model, arguments, train_dataset=rows)
    trainer.train()
    trainer.push_to_hub()
    again = AutoModelForCausalLM.from_pretrained(name[3:], backbone_name_or_path="base")
    assert again.config.backbone_name_or_path == os.path.abspath("base"), again.config
    create_repo(f"{name}-by-hand")
    upload_folder(repo_id=f"{name}-by-hand", folder_path=name[3:], allow_patterns=["*.json", "*.md"])
model.config.push_to_hub("me/config")
os.chdir("part")
model.config.push_to_hub("me/config-from-elsewhere")

for name in ("me/whole", "me/part", "me/whole-by-hand", "me/part-by-hand", "me/config", "me/config-from-elsewhere"):
    folder = snapshot_download(name)
    config = AutoConfig.from_pretrained(folder)
    assert config.backbone_name_or_path is None and config.retriever_name_or_path is None, config
    for where, _, files in os.walk(folder):
        for file in files:
            content = open(os.path.join(where, file), "rb").read()
            assert b"/base" not in content and b'"base"' not in content and b"/store" not in content, file
AutoModelForCausalLM.from_pretrained("me/whole")
try:
    AutoModelForCausalLM.from_pretrained("me/part")
except OSError as error:
    assert "backbone_name_or_path=" in str(error)
AutoModelForCausalLM.from_pretrained("me/part", backbone_name_or_path="../base")
"""


def test_a_model_goes_to_the_hub_and_comes_back(tmp_path):
    """Against a local Hub: no path of this machine goes up; the names find model and backbone again, whole or in parts.

    Pushed by `push_to_hub` and `save_pretrained`, then by a Trainer: a new process for both, since its client of the Hub reads
    the environment when it is imported.
    """
    tiny_backbone("llama").save_pretrained(tmp_path / "base")
    with running_hub() as server:
        settings = {"HF_ENDPOINT": server.url, "HF_HUB_OFFLINE": "0", "HF_HOME": str(tmp_path / "home")}
        environment = os.environ | settings | {"HF_TOKEN": "hf_test", "HF_HUB_DISABLE_XET": "1"}
        command = [sys.executable, "-c", PUSH_AND_PULL + TRAIN_AND_PUSH]
        done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_a_model_is_not_saved_into_a_file(tmp_path):
    """Transformers would save nothing, and only log it."""
    (tmp_path / "file").write_text("mine")
    with pytest.raises(FileExistsError, match="file"):
        tiny_retro("llama").save_pretrained(tmp_path / "file")
    assert (tmp_path / "file").read_text() == "mine"
    for nothing in (None, 3, "", []):
        with pytest.raises(ValueError, match="folder of the model"):
            tiny_retro("llama").save_pretrained(nothing)
    for nothing in (3, 2**70, 1.5, "", []):
        with pytest.raises(ValueError, match="folder of the model"):
            RetroForCausalLM.from_pretrained(nothing)


NO_CONFIGS = ["[]", "5", "null", '"x"', "", "NaN", "\x00", "[" * 100_000, '{"a":' * 100_000 + "1" + "}" * 100_000]


@pytest.mark.parametrize("where", ["folder", "hub", "retrofit"])
@pytest.mark.parametrize("name", ["config.json", "generation_config.json"])
def test_configs_that_are_none(tmp_path, name, where):
    """Transformers raises anything for JSON that is no object, or reads ten gigabytes of zeros first."""
    model = tiny_retro("llama") if where != "retrofit" else tiny_backbone("llama")
    model.save_pretrained(tmp_path / "model")
    load = retrofit if where == "retrofit" else RetroForCausalLM.from_pretrained
    for content in NO_CONFIGS:
        (tmp_path / "model" / name).write_text(content)
        with pytest.raises(ValueError, match="configuration"):
            load(put_on_hub("org/configs", tmp_path / "model") if where == "hub" else tmp_path / "model")
    if where != "hub":
        os.truncate(tmp_path / "model" / name, 10 << 30)
        with pytest.raises(ValueError, match="10,737,418,240 bytes"):
            load(tmp_path / "model")


@pytest.mark.parametrize("dtype", [5, "x", [], [None], True])
def test_values_that_a_config_cannot_have(tmp_path, dtype):
    """A dtype that is none raised from deep inside; in a config of ours as in that of a base."""
    for load, model in ((RetroForCausalLM.from_pretrained, tiny_retro("llama")), (retrofit, tiny_backbone("llama"))):
        model.save_pretrained(tmp_path / "model")
        file = tmp_path / "model" / "config.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | {"dtype": dtype}))
        with pytest.raises(ValueError, match="dtype|cannot be loaded"):
            load(tmp_path / "model")


@pytest.mark.parametrize("change", [{"weight_map": {}}, {"metadata": None}, {"metadata": 5}, {"metadata": []}])
def test_weight_maps_that_are_none(tmp_path, change):
    tiny_retro("llama").save_pretrained(tmp_path, max_shard_size="16KB")
    file = tmp_path / "model.safetensors.index.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | change))
    with pytest.raises(ValueError, match="weight map"):
        RetroForCausalLM.from_pretrained(tmp_path)
