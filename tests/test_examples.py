"""The examples: a real checkpoint as a user retrofits it (`make test-slow`), and going on with a broken-off training."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tiny_training import make_model, make_trainer, make_world
from transformers import AutoConfig


EXAMPLES = Path(__file__).resolve().parents[1] / "examples"


@pytest.mark.slow
def test_a_real_checkpoint_is_retrofitted(tmp_path):
    """SmolLM2-135M: off and the first step equal the base bit for bit; full and adapter-only saves load again."""
    command = [sys.executable, "retrofit_smollm2.py", "--output", str(tmp_path)]
    environment = os.environ | {"HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, cwd=EXAMPLES, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "off = base, bit for bit: True" in done.stdout
    assert "on = base before training, bit for bit: True" in done.stdout
    assert done.stdout.count("loads again with the same weights: True") == 2


def test_a_finished_training_is_loaded_and_one_broken_off_goes_on(tmp_path, monkeypatch):
    """`Trainer` alone would take one more step after the last."""
    monkeypatch.syspath_prepend(str(EXAMPLES))
    from train_demo import train_on

    world = make_world(tmp_path)

    def run(seed: int, max_steps: int):
        settings = {"max_steps": max_steps, "save_strategy": "steps", "save_steps": 2}
        trainer, losses = make_trainer(make_model(seed), world, tmp_path / "run", **settings)
        train_on(trainer)
        return trainer, list(losses.values)

    first, steps = run(seed=0, max_steps=2)
    assert steps == [1, 2]
    again, steps = run(seed=1, max_steps=2)
    assert steps == [] and again.state.global_step == 2 and len(again.state.log_history) == 2
    for name, value in first.model.state_dict().items():
        assert torch.equal(again.model.state_dict()[name], value), name
    longer, steps = run(seed=1, max_steps=3)
    assert steps == [3] and longer.state.global_step == 3


def test_the_shipped_config_is_what_the_training_makes(monkeypatch):
    """So the card and the config say what the demo's datastore holds, neighbors of 128 tokens among it."""
    monkeypatch.syspath_prepend(str(EXAMPLES))
    from train_demo import demo_config

    shipped = AutoConfig.from_pretrained(EXAMPLES.parent / "hub_configs" / "retro-bible")
    made = demo_config(shipped.vocab_size, shipped.pad_token_id, shipped.bos_token_id, shipped.eos_token_id)
    written_by_saving = {"_name_or_path", "architectures", "dtype", "transformers_version"}
    for one, other in (
        (shipped, made),
        (shipped.text_config, made.text_config),
        (shipped.neighbor_encoder_config, made.neighbor_encoder_config),
    ):
        fields = {name for name, value in one.to_dict().items() if not isinstance(value, dict)} - written_by_saving
        assert {name: getattr(one, name) for name in fields} == {name: getattr(other, name) for name in fields}
    assert shipped.neighbor_size == 128
