"""`trust_remote_code`: a saved folder brings its code along, for a process that has no retro-hf."""

import json
import subprocess
import sys
from pathlib import Path

import torch

from retro_hf import RetroConfig, RetroForCausalLM

from .tiny import ENCODER, random_ids, random_neighbors, randomize, tiny_retro


MODEL_FILES = {
    "adapter_retro.py",
    "attention_retro.py",
    "attention_routing_retro.py",
    "backbone_retro.py",
    "cache_retro.py",
    "card_retro.py",
    "compiled_steps_retro.py",
    "compatibility_retro.py",
    "configuration_retro.py",
    "generation_retro.py",
    "planning_retro.py",
    "chunking_retro.py",
    "retriever_protocol_retro.py",
    "modeling_retro.py",
    "modeling_retro_decoder.py",
    "inputs_retro.py",
    "names_retro.py",
    "values_retro.py",
    "neighbor_cache_retro.py",
    "parallel_context_retro.py",
    "readers_retro.py",
    "segments_retro.py",
}

LOAD = """
import sys
from importlib.util import find_spec

# An editable installation is a path, or a finder: both are taken away.
sys.path = [path for path in sys.path if not path.rstrip("/").endswith("src")]
sys.meta_path = [finder for finder in sys.meta_path if "editable" not in repr(finder).lower()]
assert find_spec("retro_hf") is None, "retro_hf can be imported, so this would prove nothing"

import torch
from transformers import AutoConfig, AutoModelForCausalLM

retriever = lambda ids, mask: (torch.stack([ids.repeat(1, 2), ids.flip(1).repeat(1, 2)], dim=1), None)
for folder in sys.argv[1:]:
    try:
        AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=False)
    except ValueError as error:
        assert "trust_remote_code" in str(error), error
    else:
        raise AssertionError("loaded without trust")

    model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
    name = folder.rsplit("/", 1)[1]
    assert type(model).__module__.startswith(f"transformers_modules.{name}."), type(model).__module__
    assert "retro_hf" not in sys.modules
    data = torch.load(folder + "/data.pt")
    logits = model(data["ids"], **data["neighbors"]).logits
    torch.testing.assert_close(logits, data["logits"])
    torch.testing.assert_close(model(data["ids"]).logits, data["off"])

    out = model.generate(
        data["ids"], retriever=retriever, max_new_tokens=9, do_sample=False, eos_token_id=None, pad_token_id=0,
        return_dict_in_generate=True,
    )
    assert torch.equal(out.sequences, data["generated"]), (out.sequences, data["generated"])
    assert [entry["chunk"] for entry in out.retrieval_trace[0]] == [0, 1, 2, 3, 4]

    model.save_pretrained(folder + "/again")
    again = AutoModelForCausalLM.from_pretrained(folder + "/again", trust_remote_code=True)
    torch.testing.assert_close(again(data["ids"], **data["neighbors"]).logits, data["logits"])
    print("loaded", name, type(model.config).__name__)
"""


def run(code, *args, cwd, home):
    """Run code in a fresh, isolated interpreter, away from this folder and its environment variables."""
    environment = {
        "HF_HUB_OFFLINE": "1",
        "HF_HOME": str(home),
        "HOME": str(home),
        "PATH": "/usr/bin:/bin",
        "OMP_NUM_THREADS": "1",
    }
    result = subprocess.run(
        [sys.executable, "-I", "-c", code, *map(str, args)],
        cwd=cwd,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stderr[-3000:]
    return result.stdout


def save_with_code(folder, family, reader):
    """Save a model with its code, and beside it what the process that loads it must compute."""
    model = tiny_retro(family, neighbor_encoder_config=ENCODER, reader=reader)
    model.save_pretrained(folder)
    assert {path.name for path in folder.glob("*.py")} == MODEL_FILES
    config = json.loads((folder / "config.json").read_text())
    assert config["auto_map"] == {
        "AutoConfig": "configuration_retro.RetroConfig",
        "AutoModelForCausalLM": "modeling_retro.RetroForCausalLM",
    }

    ids, neighbors = random_ids(2, 9), random_neighbors(2, 2)

    def retriever(ids, mask):
        return torch.stack([ids.repeat(1, 2), ids.flip(1).repeat(1, 2)], dim=1), None

    with torch.no_grad():
        data = {
            "ids": ids,
            "neighbors": neighbors,
            "logits": model(ids, **neighbors).logits,
            "off": model(ids).logits,
            "generated": model.generate(
                ids, retriever=retriever, max_new_tokens=9, do_sample=False, eos_token_id=None, pad_token_id=0
            ),
        }
    torch.save(data, folder / "data.pt")


def test_a_process_without_the_package_loads_and_generates(tmp_path, monkeypatch):
    """Code, weights and config of the folder are all that is needed, for each backbone and each reader."""
    for cls in (RetroConfig, RetroForCausalLM):
        monkeypatch.setattr(cls, "_auto_class", None)  # put back after the test, so that other tests save no code
    RetroConfig.register_for_auto_class()
    RetroForCausalLM.register_for_auto_class("AutoModelForCausalLM")
    models = {
        "decoder": ("retro_decoder", "cross_attention"),
        "backbone": ("llama", "cross_attention"),
        "without_training": ("llama", "parallel_context"),
    }
    for name, (family, reader) in models.items():
        save_with_code(tmp_path / name, family, reader)
    (tmp_path / "elsewhere").mkdir()
    folders = [tmp_path / name for name in models]
    printed = run(LOAD, *folders, cwd=tmp_path / "elsewhere", home=tmp_path / "home")
    assert printed.splitlines() == [f"loaded {name} RetroConfig" for name in models]


def test_model_files_import_only_each_other():
    """What would be copied needs nothing of the package beside it, and nothing optional."""
    source = Path(sys.modules["retro_hf"].__file__).parent / "model"
    for name in MODEL_FILES:
        text = (source / name).read_text()
        siblings = {line.split()[1][1:] + ".py" for line in text.splitlines() if line.startswith("from .")}
        assert siblings <= MODEL_FILES, name
        assert "from . import" not in text
        assert "import retro_hf" not in text
        assert "from retro_hf" not in text


def test_saving_from_the_package_copies_no_code(tmp_path):
    """Checkpoints stay free of code unless it is asked for."""
    randomize(tiny_retro("llama")).save_pretrained(tmp_path)
    assert list(tmp_path.glob("*.py")) == []
    assert "auto_map" not in json.loads((tmp_path / "config.json").read_text())
