"""Slips on the command line: they are answered at once, without the imports that take seconds."""

import subprocess
import sys
from typing import get_args

import pytest

from retro_hf import outside
from retro_hf.datastore.document_splitting import SPLITS
from retro_hf.datastore.manifest import MANIFEST_NAME
from retro_hf.evaluation.neighbors import MODES
from retro_hf_cli import evaluate, options, paths


SLIPS = {
    "no datastore": ("inspect nothing", "There is no datastore at 'nothing': the folder does not exist"),
    "a folder of something else": ("append texts texts", "There is no datastore at 'texts': the folder has no"),
    "a file as a store": ("search texts/a.txt who", "There is no datastore at 'texts/a.txt': it is a file"),
    "no store": ("ask model who --store nothing", "There is no datastore at 'nothing': the folder does not exist"),
    "a path as a store": ("chat model --store ./nothing", "There is no datastore at './nothing'"),
    "a folder as a store": ("serve model --store texts", "There is no datastore at 'texts': the folder has no"),
    "a folder for an agent": ("mcp texts", "There is no datastore at 'texts'"),
    "no documents": ("build nothing -o new --tokenizer t", "There is nothing at"),
    "built already": ("build texts -o store --tokenizer t", "'store' already exists"),
    "no tokenizer": (
        "build texts -o new --tokenizer ./nothing",
        "There is no folder './nothing'. Check the path of the tok",
    ),
    "no encoder": (
        "search store who --embedder ./nothing",
        "There is no folder './nothing'. Check the path of the embedder",
    ),
    "nothing to append": ("append store nothing", "There is nothing at 'nothing'"),
    "nothing to evaluate": ("evaluate model nothing", "There is nothing at 'nothing'"),
    "nothing to ask about": ("ask model who --texts nothing", "There is nothing at 'nothing'"),
    "no model": ("generate ./nothing who", "There is no folder './nothing'. Check the path of the model"),
    "a folder as a model": (
        "fit texts --texts texts -o new",
        "The folder 'texts' holds no model: it has no config.json",
    ),
    "no base": (
        "ask model who --store store --base ./nothing",
        "There is no folder './nothing'. Check the path of the base",
    ),
    "a base without a store": ("serve model", "'model' is a model of the family 'llama', not a RETRO model"),
    "a file as a folder": ("retrofit model -o texts/a.txt", "'texts/a.txt' is a file, but a folder"),
    "nothing to push": ("push texts me/it", "'texts' is neither a datastore"),
    "no evaluation": ("push model me/it --evaluation nothing", "There is nothing at 'nothing'. Pass the folder that"),
    "an open server": ("serve model --store store --host 0.0.0.0", "On the address 0.0.0.0, other machines"),
}
WRONG_VALUES = {
    "--dtype": "serve model --store store --dtype int8",
    "--split": "build texts -o new --tokenizer t --split word",
    "--encoding": "build texts -o new --tokenizer t --encoding klingon",
    "--modes": "evaluate model texts --modes off,sideways",
}


@pytest.fixture
def answered_at_once(tmp_path):
    """A function that runs a command, which loads nothing heavy: its exit code, and what it has printed as an error."""
    (tmp_path / "texts").mkdir()
    (tmp_path / "texts" / "a.txt").write_text("the king")
    for folder, name in (("store", "datastore.json"), ("model", "config.json")):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / name).write_text('{"model_type": "llama"}')

    def run(command):
        arguments = [sys.executable, "-X", "importtime", "-m", "retro_hf_cli", *command.split()]
        failed = subprocess.run(arguments, cwd=tmp_path, capture_output=True, text=True, check=False)
        lines = failed.stderr.splitlines()
        loaded = {line.rsplit("|", 1)[-1].strip() for line in lines if line.startswith("import time:")}
        assert not loaded & {"torch", "transformers", "numpy", "retro_hf"}, failed.stderr[-2000:]
        return failed.returncode, [line for line in lines if not line.startswith("import time:")]

    return run


@pytest.mark.parametrize("slip", SLIPS)
def test_a_slip_in_a_path_is_answered_before_anything_is_loaded(answered_at_once, slip):
    """torch and transformers take seconds, an encoder more: neither is needed to see that a path is wrong."""
    command, answer = SLIPS[slip]
    code, (line,) = answered_at_once(command)
    assert code == 1 and line.startswith(f"Error: {answer}")


@pytest.mark.parametrize("option", WRONG_VALUES)
def test_a_wrong_value_is_answered_before_anything_is_loaded(answered_at_once, option):
    """With the name of the option, and what it takes."""
    code, lines = answered_at_once(WRONG_VALUES[option])
    assert code == 2 and f"'{option}'" in "".join(lines)


def test_the_command_line_knows_what_the_package_knows():
    """It has copies of a few names, because the package takes seconds to import."""
    assert paths.MANIFEST == MANIFEST_NAME
    assert evaluate.MODES == tuple(MODES)
    assert get_args(get_args(get_args(options.Split)[0])[0]) == SPLITS
    for name in ("org/name", "name", "./name", "~/name", "/name", "name/", "a/b/c"):
        assert paths.is_path(name) == outside.is_path(name)
