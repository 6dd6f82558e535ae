"""The example at the end of every `retro COMMAND --help` runs as it is written, in a folder that has what it names."""

import json
import os
import subprocess
import sys

from datastore.fixtures import corpus, make_encoder, make_tokenizer
from hub_server import running_hub
from server.serving import TEMPLATE
from tiny import tiny_backbone, tiny_retro


PROGRAM = """
import logging, shlex
from pathlib import Path
import mcp.server
import typer
from huggingface_hub import create_repo, upload_folder
from typer.testing import CliRunner
import retro_hf
from retro_hf_cli.main import app
from retro_hf_server import run

for name, folder in (("sentence-transformers/all-MiniLM-L6-v2", "encoder"), ("org/base", "base"),
                     ("HuggingFaceTB/SmolLM2-135M-Instruct", "base")):
    create_repo(name)
    upload_folder(repo_id=name, folder_path=folder)

logging.raiseExceptions = False  # each command has an output of its own, which its logger keeps
# These three go on until somebody ends them, or for half an hour; what they are given has been opened by then.
ended = []
run.serve = lambda model, tokenizer, retriever, listening, **options: ended.append((model, retriever, options["name"]))
mcp.server.MCPServer.run = lambda server, transport: ended.append((server, transport))
retro_hf.fit = lambda base, texts, output, **options: ended.append((base, texts, output))

commands = typer.main.get_command(app).commands
order = ["build", "append", "sync", "search", "inspect", "delete", "compact", "push", "retrofit", "generate", "ask", "chat",
         "evaluate", "serve", "mcp", "fit", "env"]
assert sorted(order) == sorted(commands), set(commands) ^ set(order)
for name in order:
    result = CliRunner().invoke(app, shlex.split(commands[name].epilog)[1:], input="a king\\n")
    assert result.exit_code == 0, (name, result.output, result.stderr, result.exception)
    assert result.output or name in ("serve", "mcp", "fit"), name
    print("ran", name)
assert len(ended) == 3 and ended[0][2] == "model" and ended[0][1].datastore.num_documents == 4, ended
assert Path("my-retro/config.json").exists() and Path("results/evaluation.json").exists()
"""


def test_the_example_of_every_command_runs(tmp_path):
    """With tiny models under the names that the examples have."""
    tokenizer = make_tokenizer()
    tokenizer.chat_template = TEMPLATE
    make_encoder(tmp_path / "encoder")
    sizes = {"vocab_size": 400, "max_position_embeddings": 1024}
    tiny_backbone("llama", **sizes).save_pretrained(tmp_path / "base")
    tiny_retro("llama", sizes, chunk_size=64, neighbor_size=128).save_pretrained(tmp_path / "model")
    for folder in ("base", "model", "my-model"):
        tokenizer.save_pretrained(tmp_path / folder)
    text = "the old king reads seven letters under the bridge near the golden lighthouse and frogs came up "
    (tmp_path / "notes").mkdir()
    for name in ("one", "two", "three"):
        (tmp_path / "notes" / f"{name}.txt").write_text(f"{name}: {text * 8}")
    rows = [json.dumps({"id": f"doc-{number}", "text": f"{number} {text * 10}"}) for number in (7, 8, 9)]
    (tmp_path / "more.jsonl").write_text("\n".join(rows))
    others = [" ".join(one["text"] for one in corpus()[start : start + 4]) for start in (0, 4)]
    (tmp_path / "heldout.jsonl").write_text("\n".join(json.dumps({"text": one}) for one in others))
    with running_hub() as server:
        settings = {"HF_ENDPOINT": server.url, "HF_HUB_OFFLINE": "0", "HF_HOME": str(tmp_path / "home")}
        environment = os.environ | settings | {"HF_TOKEN": "hf_test", "HF_HUB_DISABLE_XET": "1"}
        command = [sys.executable, "-c", PROGRAM]
        ran = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stdout[-500:] + ran.stderr[-3000:]
