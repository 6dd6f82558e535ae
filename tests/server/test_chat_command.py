"""`retro chat` in the terminal, `retro env`, and `retro push` of a model."""

import json
import os
import subprocess
import sys

import pytest
from hub_server import running_hub
from huggingface_hub import ModelCard
from server.serving import make_parts
from typer.testing import CliRunner

from retro_hf_cli.main import app


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """Folders of a model and its store."""
    folder = tmp_path_factory.mktemp("chat")
    made = make_parts(folder)
    made.model.save_pretrained(folder / "model")
    made.tokenizer.save_pretrained(folder / "model")
    made.datastore.append(
        [{"id": "evil", "title": "\x1b[2J", "text": "golden lighthouse \x1b[31m"}], embedder=made.embedder
    )
    return folder


def chat(world, said, *options):
    """What a chat prints."""
    arguments = ["chat", world / "model", "--store", world / "store", "--embedder", world / "encoder", *options]
    return CliRunner().invoke(app, [str(one) for one in arguments], input=said, catch_exceptions=False)


def test_a_chat_answers_and_names_what_was_read(world):
    """With a line for each passage, and nothing from the store that a terminal would obey."""
    result = chat(world, "golden lighthouse \n/off\na king\n\n", "--max-new-tokens", 6)
    assert result.exit_code == 0
    named = [line for line in result.stdout.splitlines() if line.startswith("  [")]
    assert len(named) == 2
    assert "\x1b" not in result.stdout


def test_a_chat_without_room_says_how_to_go_on(world):
    """Instead of cutting the conversation silently."""
    result = chat(world, f"{'king ' * 300}\n/new\na king\n", "--max-new-tokens", 6)
    assert "/new" in result.stderr
    assert any(line.startswith("  [") for line in result.stdout.splitlines())


def test_env_shows_versions_and_no_names():
    """It goes into public bug reports."""
    result = CliRunner().invoke(app, ["env"], catch_exceptions=False)
    assert all(name in result.stdout for name in ("python", "torch", "transformers", "faiss-cpu", "GPU"))
    assert os.path.expanduser("~") not in result.stdout
    assert os.uname().nodename not in result.stdout.split("platform")[0]


def test_a_model_is_pushed_with_its_tokenizer(world):
    """By the command that pushes stores, too."""
    with running_hub() as hub:
        settings = {"HF_ENDPOINT": hub.url, "HF_TOKEN": "hf_test", "HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_XET": "1"}
        command = [sys.executable, "-m", "retro_hf_cli", "push", str(world / "model"), "me/model"]
        result = subprocess.run(command, env={**os.environ, **settings}, capture_output=True, text=True)
        assert result.returncode == 0, result.stderr
        files = hub.files("models/me/model")
    assert {"config.json", "model.safetensors", "tokenizer.json", "README.md"} <= files.keys()
    assert json.loads(files["config.json"])["model_type"] == "retro"
    card = files["README.md"].decode()
    assert ModelCard(card).data.tags == ["retro", "retrieval"]
    assert "| chunks | 8 tokens" in card
    assert "automatically generated" not in card
    assert str(world) not in card
    assert "me/model" in result.stdout
