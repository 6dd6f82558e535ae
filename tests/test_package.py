"""The package as a whole: what importing it costs and does, and what it promises to export."""

import json
import re
import subprocess
import sys
from importlib.metadata import entry_points, version
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

import retro_hf


ROOT = Path(__file__).resolve().parents[1]


def run_python(code: str) -> str:
    """Run code in a fresh interpreter and return what it prints."""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    return result.stdout.strip()


def test_version_is_the_installed_one():
    assert retro_hf.__version__ == version("retro-hf")


@pytest.mark.parametrize("name", retro_hf.__all__)
def test_every_public_name_exists_and_is_documented(name):
    public = getattr(retro_hf, name)
    assert callable(public)
    assert public.__doc__, f"{name} has no docstring"


def test_public_names_are_listed_before_they_are_imported():
    assert set(retro_hf.__all__) <= set(dir(retro_hf))


def test_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="no attribute 'RetroForImages'"):
        _ = retro_hf.RetroForImages


@pytest.fixture(scope="module")
def fresh() -> dict:
    """What an interpreter knows that has imported the package, and first a module of it that has a function's name.

    Then it imports the rest; what was printed before the last line is under "printed".
    """
    code = """
import json, sys, retro_hf.retrofit, retro_hf
from transformers import AutoConfig
known = {
    "retrofit": type(retro_hf.retrofit).__name__,
    "modules": list(sys.modules),
    "families": [AutoConfig.for_model(name).model_type for name in ("retro", "retro_decoder")],
}
import retro_hf.datastore, retro_hf.retriever, retro_hf.training, retro_hf.evaluation, retro_hf_cli.main
print(json.dumps(known))
"""
    *printed, known = run_python(code).splitlines()
    return json.loads(known) | {"printed": printed}


def test_retrofit_stays_the_function(fresh):
    """A module of the same name must not take the function's place."""
    assert fresh["retrofit"] == "function"


def test_import_needs_no_faiss_and_no_encoders(fresh):
    assert not {"faiss", "sentence_transformers"} & set(fresh["modules"])


def test_bare_import_registers_with_the_auto_classes(fresh):
    assert fresh["families"] == ["retro", "retro_decoder"]


def test_import_prints_nothing(fresh):
    """Standard output belongs to whoever imports it: `retro inspect --json` must print JSON alone."""
    assert fresh["printed"] == []


@pytest.mark.parametrize(
    ("config", "base_model", "causal_lm"),
    [
        (retro_hf.RetroConfig, retro_hf.RetroModel, retro_hf.RetroForCausalLM),
        (retro_hf.RetroDecoderConfig, retro_hf.RetroDecoderModel, retro_hf.RetroDecoderForCausalLM),
    ],
)
def test_auto_classes_know_both_model_types(config, base_model, causal_lm):
    assert type(AutoConfig.for_model(config.model_type)) is config
    assert AutoModel._model_mapping[config] is base_model
    assert AutoModelForCausalLM._model_mapping[config] is causal_lm
    assert MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[config.model_type] == causal_lm.__name__


def test_saved_model_loads_through_the_auto_class(tmp_path):
    config = retro_hf.RetroDecoderConfig(
        vocab_size=32, hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2, head_dim=8
    )
    model = AutoModelForCausalLM.from_config(config).eval()
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    input_ids = torch.arange(8)[None]
    assert type(loaded) is retro_hf.RetroDecoderForCausalLM
    torch.testing.assert_close(loaded(input_ids).logits, model(input_ids).logits, rtol=0, atol=0)


def test_command_line_help_waits_for_no_heavy_import():
    """`retro --help` must be quick: it imports neither torch nor transformers."""
    (command,) = entry_points(group="console_scripts", name="retro")
    code = (
        f"import sys, importlib; importlib.import_module({command.module!r});"
        "print([m for m in ('torch', 'transformers', 'faiss', 'datasets', 'retro_hf') if m in sys.modules])"
    )
    assert run_python(code) == "[]"


def test_every_module_is_in_the_map_of_files():
    """CONTRIBUTING.md says in a line what each file is for."""
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    tree = text[text.index("src/retro_hf/") : text.index("benchmarks/  ")]
    modules = [file for file in (ROOT / "src").rglob("*.py") if not file.stem.startswith("__")]
    assert not [str(file) for file in modules if not re.search(rf"\b{file.stem}\b", tree)]
