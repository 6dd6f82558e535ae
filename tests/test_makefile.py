"""The Makefile: what it says of itself, and which build of PyTorch it installs."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest


ROOT = Path(__file__).resolve().parents[1]
# Stands in for the Python of .venv: writes down what it is asked for, and fails where an argument has a word of $LACKS.
PYTHON = """#!/usr/bin/env bash
echo "$*" >> "$LOG"
for word in $LACKS; do
  [[ "$*" != *"$word"* ]] || exit 1
done
"""


def make(*arguments: str, **environment: str) -> subprocess.CompletedProcess:
    """Run make in the repository."""
    command = ["make", "--silent", "--no-print-directory", *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=os.environ | environment)


@pytest.fixture
def install(tmp_path):
    """A function that runs `make install` with a Python that only writes down what it should do."""
    python = tmp_path / "venv/bin/python"
    python.parent.mkdir(parents=True)
    python.write_text(PYTHON)
    python.chmod(0o755)

    def install(lacks: str = "") -> tuple[list[str], str]:
        made = make("install", f"VENV={tmp_path}/venv", f"PYTHON={sys.executable}", LOG=f"{tmp_path}/log", LACKS=lacks)
        assert made.returncode == 0, made.stderr
        return (tmp_path / "log").read_text().splitlines(), made.stderr

    return install


def test_help_names_every_target():
    targets = re.search(r"^\.PHONY: (.*)$", (ROOT / "Makefile").read_text(), re.MULTILINE)[1].split()
    printed = make().stdout
    assert [line.split()[0] for line in printed.splitlines()[1:]] == targets


def test_installation_takes_the_cpu_build_that_pip_has(install):
    commands, warnings = install()
    torch = [command for command in commands if "torch==" in command]
    assert len(torch) == 1 and "+cpu" in torch[0]
    assert not warnings and commands[-1].endswith("-e .[dev]")


def test_installation_asks_the_index_of_pytorch_before_it_takes_another_build(install):
    commands, warnings = install(lacks="+cpu")
    torch = [command for command in commands if "torch==" in command]
    assert len(torch) == 2 and "--index-url https://" in torch[1]
    assert not warnings and commands[-1].endswith("-e .[dev]")


def test_installation_says_loudly_that_it_takes_a_big_build(install):
    commands, warnings = install(lacks="+cpu --index-url")
    torch = [command for command in commands if "torch==" in command]
    assert len(torch) == 3 and "index" not in torch[2]
    assert "CUDA" in warnings and "GB" in warnings and "TORCH_CPU_INDEX=" in warnings
    assert commands[-1].endswith("-e .[dev]")


def test_installation_adds_pip_to_an_environment_that_has_none(install):
    commands, _ = install(lacks="--version")
    assert "-m ensurepip" in commands[1]
