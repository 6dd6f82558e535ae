"""Errors on the command line name what a user types: commands and options, no functions and arguments of Python."""

import json
import re
import sys

import pytest
import typer
from test_cli import same_loglevel, world
from tiny_training import CHUNK_SIZE

from retro_hf import RetroDatastore
from retro_hf.datastore.compatibility import check_compatible
from retro_hf_cli.main import app, main
from retro_hf_cli.wording import as_typed


__all__ = ["same_loglevel", "world"]

PARAMETERS = {name: command.params for name, command in typer.main.get_command(app).commands.items()}


@pytest.fixture
def told(world, monkeypatch, capsys):
    """A function that makes a mistake on the command line, with the paths of the world in it, and returns the error."""

    def told(command):
        words = [str(world / word[1:]) if word.startswith("@") else word for word in command.split()]
        monkeypatch.setattr(sys, "argv", ["retro", *words])
        with pytest.raises(SystemExit, match="1"):
            main()
        return capsys.readouterr().err.splitlines()[-1]  # after what was logged

    return told


MISTAKES = {
    "search @store king -k 9999999 --embedder @encoder": "-k is 9,999,999",
    "search @store king": "`--embedder FOLDER`",
    "generate @model king --query queen": "pass `--store`",
    "evaluate @model @texts.jsonl --sweep-k 1,2": "Pass `--store`",
    "evaluate @model @texts.jsonl --window 9": "--window",
    f"build @texts.jsonl -o @new --tokenizer @model --embedder @encoder --chunk-size {CHUNK_SIZE} --neighbor-size 1": "--neighbor-size is 1",
    "build @texts.jsonl -o @new --tokenizer @model --embedder @encoder --memory-budget some": "--memory-budget is 'some'",
    "build @texts.jsonl -o @new --tokenizer @model --index Flat --memory-budget 4GB": "--index 'Flat' and --memory-budget '4GB'",
    "append @store @twice.jsonl --embedder @encoder": "`retro append --replace`",
}


@pytest.mark.parametrize("command", MISTAKES)
def test_an_error_says_what_to_type(told, world, command):
    """The option or the command, and nothing that only Python understands."""
    first = RetroDatastore.load(world / "store").document(0)
    (world / "twice.jsonl").write_text(json.dumps({"id": first["id"], "text": "another"}))
    error = told(command)
    assert MISTAKES[command] in error
    assert not re.search(r"\w\(|\w+_\w+ is|\w=", error), error


def test_a_store_of_other_chunks_names_the_command_that_builds_it_again(world):
    """A server has no option for the size of chunks; the command that builds a store has one."""
    with pytest.raises(ValueError) as error:
        check_compatible(RetroDatastore.load(world / "store"), chunk_size=64)
    assert "in Python: `chunk_size=64`" in str(error.value)
    shown = as_typed(str(error.value), PARAMETERS["serve"])
    assert "with `retro build --chunk-size 64`, or use" in shown


def test_a_call_becomes_the_option_that_it_is_about():
    """As for the base of an adapter, which Python passes to `from_pretrained`."""
    message = "Say where it is: `from_pretrained('my', backbone_name_or_path='<folder>')`."
    assert as_typed(message, PARAMETERS["ask"]).startswith("Say where it is: `--base '<folder>'`.")
    assert as_typed("The base is frozen, and `retriever` too.", PARAMETERS["ask"]) == (
        "The base is frozen, and `--store` too."
    )
