"""Numbers of a config that no model has: refused by folder and field, before layers are counted and memory is taken."""

import json
import resource
import time
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from retro_hf import retrofit
from retro_hf.datastore import ChunkEmbedder
from retro_hf.errors import MissingExtraError, PretrainedNotFoundError
from retro_hf.fitting.recipe import is_adapter
from retro_hf.model.names_retro import check_sizes
from retro_hf_cli.model import load_model

from .datastore.fixtures import make_encoder
from .tiny import tiny_backbone, tiny_retro


@pytest.fixture
def folder(tmp_path) -> Path:
    return make_encoder(tmp_path / "encoder")


def change(folder: Path, file: str = "config.json", **values) -> None:
    path = folder / file
    path.write_text(json.dumps((json.loads(path.read_text()) if path.exists() else {}) | values))


NUMBERS = [
    ("num_hidden_layers", 10**12), ("num_hidden_layers", 1000), ("num_hidden_layers", -1), ("num_hidden_layers", 1.5),
    ("hidden_size", 10**12), ("hidden_size", "32"), ("hidden_size", True), ("intermediate_size", 10**7),
    ("num_attention_heads", -2), ("num_attention_heads", 0), ("num_labels", 10**9), ("vocab_size", 10**30),
    ("max_position_embeddings", 10**12), ("type_vocab_size", [2, 10**12]),
]  # fmt: skip


@pytest.mark.parametrize(("field", "value"), NUMBERS)
def test_embedder_with_a_number_that_no_model_has(folder, field, value):
    before, started = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.monotonic()
    change(folder, **{field: value})
    with pytest.raises(PretrainedNotFoundError) as caught:
        ChunkEmbedder.from_pretrained(folder)
    assert str(folder) in str(caught.value) and repr(field) in str(caught.value)
    assert time.monotonic() - started < 1
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 100 << 10  # kilobytes


@pytest.mark.parametrize(
    ("field", "value", "said"),
    [
        ("hidden_size", 200_000, "describes 360,107,800,128 weights"),
        ("max_position_embeddings", 10**8, "describes 3,200,022,496 weights"),
        ("intermediate_size", 128, r"shape \(128,\), but these weights have the shape \(64,\)"),
        ("num_hidden_layers", 3, "which are not there"),
    ],
)
def test_embedder_with_other_weights_than_its_config_says(folder, field, value, said):
    """A layer without weights would be random, and the keys of each process others."""
    change(folder, **{field: value})
    with pytest.raises(PretrainedNotFoundError, match=said):
        ChunkEmbedder.from_pretrained(folder)


def test_embedder_may_lack_the_pooler_which_is_not_read(folder):
    weights = load_file(folder / "model.safetensors")
    expected = ChunkEmbedder.from_pretrained(folder).fingerprint
    kept = {name: tensor for name, tensor in weights.items() if "pooler" not in name}
    assert len(kept) < len(weights)
    save_file(kept, folder / "model.safetensors", {"format": "pt"})
    assert ChunkEmbedder.from_pretrained(folder).fingerprint == expected


@pytest.mark.parametrize(
    ("file", "field"), [("sentence_bert_config.json", "max_seq_length"), ("tokenizer_config.json", "model_max_length")]
)
@pytest.mark.parametrize("value", [-1, 1.5, "x", [1]])
def test_embedder_with_a_length_that_is_none(folder, file, field, value):
    change(folder, file, **{field: value})
    with pytest.raises(PretrainedNotFoundError, match=f"{field} of {file}"):
        ChunkEmbedder.from_pretrained(folder)


@pytest.mark.parametrize(("field", "value"), [("chunk_size_feed_forward", 3), ("return_dict", False)])
def test_embedder_that_cannot_read_a_text(folder, field, value):
    change(folder, **{field: value})
    with pytest.raises(PretrainedNotFoundError):
        ChunkEmbedder.from_pretrained(folder)


@pytest.mark.parametrize("field", ["in_features", "out_features"])
@pytest.mark.parametrize("value", [10**12, -1, 1.5])
def test_module_of_an_embedder_with_a_number_that_none_has(folder, field, value):
    kind = "sentence_transformers.models."
    modules = [{"path": "", "type": kind + "Transformer"}, {"path": "1_Dense", "type": kind + "Dense"}]
    (folder / "modules.json").write_text(json.dumps(modules))
    (folder / "1_Dense").mkdir()
    change(folder, "1_Dense/config.json", **{"in_features": 32, "out_features": 32, field: value})
    with pytest.raises(PretrainedNotFoundError, match=rf"1_Dense/config.json has .* in '{field}'"):
        ChunkEmbedder.from_pretrained(folder)


def test_embedder_that_needs_a_package(folder):
    change(folder, quantization_config={"quant_method": "hqq"})
    with pytest.raises((MissingExtraError, PretrainedNotFoundError), match="encoder"):
        ChunkEmbedder.from_pretrained(folder)


@pytest.mark.parametrize("field", ["num_hidden_layers", "hidden_size"])
def test_base_with_a_number_that_no_model_has(tmp_path, field):
    tiny_backbone("llama").save_pretrained(tmp_path)
    change(tmp_path, **{field: 10**12})
    with pytest.raises(ValueError, match=field):
        retrofit(tmp_path)
    with pytest.raises(PretrainedNotFoundError, match=field):  # the first look of `fit`
        is_adapter(tmp_path)


def test_model_with_a_number_that_no_model_has(tmp_path):
    """Also in a config inside of the config."""
    tiny_retro("llama").save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    change(tmp_path, text_config=config["text_config"] | {"num_hidden_layers": 10**12})
    with pytest.raises(ValueError, match="num_hidden_layers"):
        AutoModelForCausalLM.from_pretrained(tmp_path)
    with pytest.raises(PretrainedNotFoundError, match="num_hidden_layers"):
        load_model(str(tmp_path))


def test_sizes_that_models_have():
    check_sizes(
        {"text_config": {"num_hidden_layers": 128, "n_inner": None, "intermediate_size": [64, 128]}, "vocab_size": 0}
    )
