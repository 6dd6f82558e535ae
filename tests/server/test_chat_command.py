"""`retro chat` in the terminal, `retro env`, and `retro push` of a model."""

import json
import os
import shutil

import pytest
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


def answers(result):
    """The lines of a chat that are answers: each on a line of its own, before its passages."""
    return [line for line in result.stdout.splitlines() if not line.startswith("  ")]


def test_a_chat_with_and_without_the_store_are_two_conversations(world):
    """So that a comparison is fair: what is asked without the store knows no answer that was written with it."""
    options = ("--max-new-tokens", 6)
    both = answers(chat(world, "golden lighthouse\n/off\na king\n/on\na ship\n", *options))
    assert both[1:2] == answers(chat(world, "/off\na king\n", *options))
    assert both[::2] == answers(chat(world, "golden lighthouse\na ship\n", *options))
    assert both[2:] != answers(chat(world, "a ship\n", *options))
    forgotten = answers(chat(world, "golden lighthouse\n/off\na king\n/new\n/on\na ship\n", *options))
    assert forgotten[2:] == answers(chat(world, "a ship\n", *options))


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


@pytest.fixture(scope="module")
def measured(world):
    """The folder of an evaluation, and the model that was measured."""
    options = ("--store", world / "store", "--embedder", world / "encoder", "-o", world / "results")
    (world / "heldout.jsonl").write_text(
        "".join(
            json.dumps(
                {
                    "id": f"held-{n}",
                    "text": f"the old king of number {n} reads seven letters near the golden lighthouse",
                }
            )
            + "\n"
            for n in range(3)
        )
    )
    modes = ("--modes", "off,on,random,in_context")
    arguments = ["evaluate", world / "model", world / "heldout.jsonl", *options, *modes]
    CliRunner().invoke(app, [str(one) for one in arguments], catch_exceptions=False)
    return world / "results"


@pytest.fixture
def pushed(hub):
    """A function that pushes a model: what the command printed, and the files that it has uploaded to me/model."""

    def push(*arguments):
        asked = ["push", *map(str, arguments)]
        return CliRunner().invoke(app, asked, catch_exceptions=False), hub.files("models/me/model")

    return push


def test_the_card_of_a_model_has_the_numbers_of_its_evaluation(world, measured, pushed):
    """Retrieval on, off and random, the rival in the prompt, the datastore, and no path of this machine."""
    card = pushed(world / "model", "me/model", "--evaluation", measured)[1]["README.md"].decode()
    found = json.loads((measured / "evaluation.json").read_text())
    values = {mode["name"]: f"{mode['bits_per_byte']:.4f}" for mode in found["modes"]}
    named = {"nothing": "off", "its datastore": "on", "random passages": "random", "in the prompt": "in_context"}
    rows = [line.split(" | ")[:2] for line in card.splitlines() if line.startswith("| ")]
    rows = {name.removeprefix("| "): value for name, value in rows}
    assert {name: rows[name] for name in named} == {name: values[mode] for name, mode in named.items()}
    assert "`store`, 41 documents" in card and found["verdict"]["text"].split(":")[0] in card
    assert str(world) not in card


def test_the_card_in_the_folder_of_a_model_goes_up(world, tmp_path, pushed):
    """As `retro fit` and people write them."""
    shutil.copytree(world / "model", tmp_path / "model")
    (tmp_path / "model" / "README.md").write_text("# mine\n")
    assert pushed(tmp_path / "model", "me/model")[1]["README.md"] == b"# mine\n"


def test_an_evaluation_of_something_else_is_refused(world, measured, tmp_path):
    """Before anything is uploaded."""
    found = json.loads((measured / "evaluation.json").read_text())
    found["provenance"]["model"]["chunk_size"] = 64
    (tmp_path / "evaluation.json").write_text(json.dumps(found))
    for evaluation in (tmp_path, world / "heldout.jsonl", tmp_path / "nowhere"):
        with pytest.raises((ValueError, OSError)) as error:
            push = ["push", str(world / "model"), "me/model", "--evaluation", str(evaluation)]
            CliRunner().invoke(app, push, catch_exceptions=False)
        assert str(evaluation) in str(error.value)


def test_a_model_is_pushed_with_its_tokenizer(world, pushed):
    """By the command that pushes stores, too."""
    result, files = pushed(world / "model", "me/model")
    assert {"config.json", "model.safetensors", "tokenizer.json", "README.md"} <= files.keys()
    assert json.loads(files["config.json"])["model_type"] == "retro"
    card = files["README.md"].decode()
    assert ModelCard(card).data.tags == ["retro", "retrieval"]
    assert "| chunks | 8 tokens" in card
    assert "automatically generated" not in card
    assert str(world) not in card
    assert "me/model" in result.stdout
