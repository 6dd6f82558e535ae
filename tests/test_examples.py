"""The examples that need a download of their own, run as a user runs them: `make test-slow`."""

import os
import subprocess
import sys
from pathlib import Path

import pytest


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
