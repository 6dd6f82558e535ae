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

    def install(lacks: str = "", *options: str) -> tuple[list[str], str]:
        places = f"VENV={tmp_path}/venv", f"PYTHON={sys.executable}"
        made = make("install", *places, *options, LOG=f"{tmp_path}/log", LACKS=lacks)
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


def test_verified_installation_takes_what_has_the_recorded_sha256(install):
    commands, _ = install("", "VERIFIED=1")
    assert "--require-hashes -r constraints-hashed.txt" in commands[-2] and "--no-deps" in commands[-2]
    assert "--no-build-isolation" in commands[-1]


def test_every_locked_package_but_torch_has_hashes():
    """And of the same version, so that one file cannot be renewed without the other."""

    def pins(text: str) -> dict[str, str]:
        found = re.findall(r"^([\w.-]+)==(\S+)", text, re.MULTILINE)
        return {re.sub(r"[-_.]+", "-", name).lower(): version for name, version in found}

    hashed = (ROOT / "constraints-hashed.txt").read_text()
    locked = pins((ROOT / "constraints.txt").read_text())
    locked.pop("torch")
    assert pins(hashed) == locked
    entries = re.sub(r"^#.*\n", "", hashed, flags=re.MULTILINE)
    for block in re.split(r"\n(?=\w)", entries):
        assert re.fullmatch(r"\S+==\S+( \\\n    --hash=sha256:[0-9a-f]{64})+\s*", block), block[:60]
