"""Two processes on the CPU: DDP by `accelerate launch` and Trainer, and FSDP2, give what one process gives."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from launched import BATCH, DDP, FSDP, TRAINING, fsdp_batches, fsdp_model, fsdp_steps, load_world
from tiny import tiny_backbone
from tiny_training import make_model, make_trainer
from transformers import AutoModelForCausalLM


TESTS = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def launched(world, tmp_path_factory):
    """The folder in which two processes have trained, and what they wrote down; one start for all tests."""
    folder = tmp_path_factory.mktemp("launched")
    (folder / "store").symlink_to(world.datastore.path)
    world.dataset.save_to_disk(folder / "windows")
    tiny_backbone("llama", vocab_size=400).save_pretrained(folder / "base")
    paths = [str(TESTS), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join(paths),
        "OMP_NUM_THREADS": "1",
        "ACCELERATE_USE_CPU": "1",
    }
    command = [sys.executable, "-m", "accelerate.commands.accelerate_cli", "launch", "--multi_gpu"]
    command += (
        "--num_processes 2 --num_machines 1 --mixed_precision no --dynamo_backend no --main_process_port 0".split()
    )
    command += [str(TESTS / "launched.py"), str(folder)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=500)
    errors = [line for line in done.stderr.splitlines() if line.startswith("[rank")]  # torchrun's own come after
    assert done.returncode == 0, "\n".join(errors) or done.stderr[-4000:]
    return folder, json.loads((folder / "results.json").read_text())


@pytest.mark.parametrize("name", list(DDP))
def test_two_processes_give_the_losses_and_weights_of_one(launched, tmp_path, name):
    """At an equal global batch of windows of unequal lengths, also in micro-batches and with checkpointing."""
    folder, results = launched
    trainer, losses = make_trainer(
        make_model(), load_world(folder), tmp_path, per_device_train_batch_size=BATCH, **TRAINING
    )
    trainer.train()
    assert results[name] == pytest.approx(list(losses.values.values()), abs=2e-5)
    weights = AutoModelForCausalLM.from_pretrained(folder / "ddp" / name).state_dict()
    for key, value in trainer.model.state_dict().items():
        torch.testing.assert_close(weights[key], value, atol=1e-5, rtol=1e-4, msg=key)


@pytest.mark.parametrize("kind", FSDP)
def test_fsdp2_trains_and_saves_what_one_process_does(launched, kind):
    """Losses, weights and the saved folder; the hooks of cross-attention fire in sharded layers."""
    folder, results = launched
    assert {"RetroEncoderLayer", "RetroChunkedCrossAttention"} < set(results[f"sharded {kind}"])
    assert {"LlamaDecoderLayer", "RetroDecoderLayer"} & set(results[f"sharded {kind}"])
    model = fsdp_model(kind, folder).train()
    start = {key: value.clone() for key, value in model.state_dict().items()}
    batches = fsdp_batches(load_world(folder))
    assert results[f"fsdp {kind}"] == pytest.approx(fsdp_steps(model, batches, range(2)), abs=2e-5)
    loaded = AutoModelForCausalLM.from_pretrained(folder / "fsdp" / kind, backbone_name_or_path=folder / "base")
    for key, value in model.state_dict().items():
        torch.testing.assert_close(loaded.state_dict()[key], value, atol=1e-5, rtol=1e-4, msg=key)
    moved = {key for key, value in model.state_dict().items() if not torch.equal(value, start[key])}
    assert any("retro.encoder" in key for key in moved)
    assert any("backbone" in key for key in moved) == (kind == "whole")
    batch = batches[0][0]
    with torch.no_grad():
        torch.testing.assert_close(loaded(**batch).loss, model.eval()(**batch).loss, atol=1e-5, rtol=1e-5)
