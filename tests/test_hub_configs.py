"""The presets under hub_configs/: what their files hold, and that each value says where it comes from."""

import hashlib
import json
import re
from dataclasses import fields
from pathlib import Path

import pytest
import torch
import yaml
from huggingface_hub import ModelCard
from safetensors import safe_open
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, GenerationConfig

from retro_hf import RetroConfig, RetroDecoderConfig, RetroEncoderConfig


FOLDER = Path(__file__).resolve().parents[1] / "hub_configs"
PRESETS = ["retro-172m", "retro-425m", "retro-1.5b", "retro-7.5b"]
SUB_CONFIGS = {"text_config": RetroDecoderConfig, "neighbor_encoder_config": RetroEncoderConfig}
ROW = re.compile(r"^\| `(?P<field>[\w.]+)` \| `(?P<value>[^`]+)` \| (?P<source>.+) \|$", re.MULTILINE)
# Where a value comes from: a place in the paper, the reason for a choice, or a class of this package.
SOURCE = re.compile(
    r"[Ss]ections? [\dB]\.\d|Tables? \d+|Algorithm 1|Paper silent: our choice, because .|class of this package"
)


def read(preset: str, file: str) -> dict:
    """A JSON file of a preset."""
    return json.loads((FOLDER / preset / file).read_text())


def flatten(values: dict, prefix: str = "") -> dict:
    """Nested values under dotted names."""
    flat = {}
    for name, value in values.items():
        flat |= flatten(value, f"{prefix}{name}.") if isinstance(value, dict) else {f"{prefix}{name}": value}
    return flat


def test_the_papers_four_sizes_are_there():
    """One folder for each, named by its RETRO size."""
    assert set(PRESETS) <= {path.name for path in FOLDER.iterdir()}


@pytest.mark.parametrize("preset", PRESETS)
def test_every_field_is_known(preset):
    """A misspelt field would be stored and never read."""
    values = read(preset, "config.json")
    known = {field.name for field in fields(RetroConfig)} | {"model_type"}
    assert set(values) <= known
    for name, config_class in SUB_CONFIGS.items():
        assert set(values[name]) <= {field.name for field in fields(config_class)} | {"model_type"}
        assert values[name]["model_type"] == config_class.model_type
    known = set(vars(GenerationConfig()))
    assert set(read(preset, "generation_config.json")) <= known


@pytest.mark.parametrize("preset", PRESETS)
def test_it_loads_and_comes_back_from_disk(preset, tmp_path):
    """As RetroConfig and through AutoConfig; saved and loaded again it is the same, with every value of the file."""
    config = RetroConfig.from_pretrained(FOLDER / preset)
    automatic = AutoConfig.from_pretrained(FOLDER / preset)
    assert type(automatic) is RetroConfig
    assert {**automatic.to_dict(), "_name_or_path": ""} == {**config.to_dict(), "_name_or_path": ""}
    config.save_pretrained(tmp_path)
    assert RetroConfig.from_pretrained(tmp_path).to_dict() == config.to_dict()
    stored = flatten(config.to_dict())
    for name, value in flatten(read(preset, "config.json")).items():
        assert stored[name] == value, name


@pytest.mark.parametrize("preset", PRESETS)
def test_generation_config_loads(preset, tmp_path):
    """And comes back from disk with every value of the file."""
    config = GenerationConfig.from_pretrained(FOLDER / preset)
    config.save_pretrained(tmp_path)
    again = GenerationConfig.from_pretrained(tmp_path)
    for name, value in read(preset, "generation_config.json").items():
        assert getattr(config, name) == getattr(again, name) == value, name


@pytest.mark.parametrize("preset", PRESETS)
def test_every_value_says_where_it_comes_from(preset):
    """The README names each field once, with the value of the file, and its source in the paper or why we chose it."""
    readme = (FOLDER / preset / "README.md").read_text()
    rows = [match.groupdict() for match in ROW.finditer(readme)]
    values = flatten(read(preset, "config.json")) | read(preset, "generation_config.json")
    assert sorted(row["field"] for row in rows) == sorted(values)
    for row in rows:
        assert json.loads(row["value"]) == values[row["field"]], row["field"]
        assert SOURCE.search(row["source"]), row


def test_the_smallest_preset_is_the_default():
    """A config without arguments is the paper's smallest model."""
    preset, default = (flatten(c.to_dict()) for c in (RetroConfig.from_pretrained(FOLDER / PRESETS[0]), RetroConfig()))
    assert {k: v for k, v in preset.items() if k != "architectures"} == {
        k: v for k, v in default.items() if k != "architectures"
    }


@pytest.mark.weights
def test_the_adapter_is_small_and_says_what_it_is_worth():
    """At most 40 MB, only what RETRO adds, and a card with the measured table."""
    folder = FOLDER / "retro-smollm2-135m"
    assert sum(file.stat().st_size for file in folder.glob("*.safetensors")) < 40e6
    with safe_open(folder / "model.safetensors", "pt") as weights:
        assert all(name.startswith("model.retro.") for name in weights.keys())  # noqa: SIM118
        assert {weights.get_slice(name).get_dtype() for name in weights.keys()} == {"BF16"}  # noqa: SIM118
    config = AutoConfig.from_pretrained(folder)
    assert not config.save_backbone
    measured = json.loads((FOLDER.parent / "benchmarks" / "results" / "smollm2.json").read_text())
    card = (folder / "README.md").read_text()
    for name, result in measured.items():
        for mode in result["modes"]:
            assert f"{mode['bits_per_byte']:.4f}" in card, f"{name}, {mode['name']}"


@pytest.mark.weights
def test_the_mixed_adapter_is_small_and_says_what_it_is_worth():
    """At most 40 MB, only what RETRO adds, and a card with the measured table and the file's checksum."""
    folder = FOLDER / "retro-smollm2-135m-mixed"
    weights, card = folder / "model.safetensors", (folder / "README.md").read_text()
    assert weights.stat().st_size < 40e6
    assert hashlib.sha256(weights.read_bytes()).hexdigest() in card
    with safe_open(weights, "pt") as tensors:
        assert all(name.startswith("model.retro.") for name in tensors.keys())  # noqa: SIM118
    assert not AutoConfig.from_pretrained(folder).save_backbone
    measured = json.loads((FOLDER.parent / "benchmarks" / "results" / "readers.json").read_text())
    for readers in measured["texts"].values():
        for reader in ("off", "retro"):
            assert f"{readers[reader]['bits_per_byte']:.4f}" in card


@pytest.mark.parametrize("card", sorted(FOLDER.glob("*/README.md")), ids=lambda card: card.parent.name)
def test_card_says_what_the_model_is_for(card):
    """The Hub lists a model under its task only if the card names it."""
    _, metadata, _ = card.read_text(encoding="utf-8").split("---\n", 2)
    values = yaml.safe_load(metadata)
    assert values["pipeline_tag"] == "text-generation"
    assert values["library_name"] == "transformers" and values["license"] == "apache-2.0"


@pytest.mark.parametrize(
    "folder", sorted(path for path in FOLDER.iterdir() if path.is_dir()), ids=lambda path: path.name
)
def test_no_folder_of_this_machine_is_named(folder):
    """A base is named by its repository on the Hub, the one that the card names; nothing else names a path."""
    values = flatten(json.loads((folder / "config.json").read_text()))
    names = {name: value for name, value in values.items() if name.endswith("name_or_path") and value}
    card = ModelCard.load(folder / "README.md").data
    assert card.pipeline_tag == "text-generation" and card.library_name == "transformers" and card.license
    assert names.pop("backbone_name_or_path", None) == card.base_model
    assert {name for name in names if not name.endswith("_model_name_or_path")} == set()


def test_the_adapter_loads_with_a_base_of_its_shape(tmp_path):
    """A local path comes from the caller alone; here a base of the same shape with random weights."""
    folder = FOLDER / "retro-smollm2-135m"
    base = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder).text_config, dtype=torch.bfloat16)
    base.save_pretrained(tmp_path / "base")
    for cls in (AutoModel, AutoModelForCausalLM):
        model, info = cls.from_pretrained(folder, backbone_name_or_path=tmp_path / "base", output_loading_info=True)
        assert not any(info.values())
        assert {weight.dtype for weight in model.parameters()} == {torch.bfloat16}


@pytest.mark.weights
@pytest.mark.parametrize("file", sorted(FOLDER.glob("*/*.safetensors")), ids=lambda file: file.parent.name)
def test_the_card_of_weights_tells_where_they_come_from(file):
    """Their sha256, the commit of the code, the data, and why the license is what it is; pinned wheels as they are fetched."""
    card = (file.parent / "README.md").read_text(encoding="utf-8")
    recorded = re.search(rf"\| sha256 \| `{file.name}`: ([0-9a-f]{{64}}) \|", card)
    assert recorded[1] == hashlib.sha256(file.read_bytes()).hexdigest()
    rows = {
        line.split("|")[1].strip(): line.split("|")[2].strip() for line in card.splitlines() if line.count("|") == 3
    }
    assert re.search(r"commit [0-9a-f]{7}", rows["code"]) and rows["data"]
    assert "license" in rows or "## License" in card
    pinned = re.search(r"WHEELS = \{.*?\n\}", (FOLDER.parent / "examples" / "demo_data.py").read_text(), re.DOTALL)[0]
    for wheel, digest in re.findall(r"`([\w.-]+==[\w.-]+)` ([0-9a-f]{64})", rows["data"]):
        assert re.search(rf'"{re.escape(wheel)}",\s+"{digest}"', pinned), wheel
