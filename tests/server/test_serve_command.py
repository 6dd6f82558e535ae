"""`retro serve` as a process: it starts, answers, finishes what runs when it is told to end, and explains what is wrong."""

import json
import os
import re
import signal
import socket
import subprocess
import sys
from contextlib import contextmanager

import httpx
import pytest
from server.serving import make_parts
from tiny import tiny_backbone
from typer.testing import CliRunner

from retro_hf_cli.main import app


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """Folders of a model, a base without retrieval, an encoder and a store."""
    folder = tmp_path_factory.mktemp("command")
    made = make_parts(folder)
    made.model.save_pretrained(folder / "model")
    tiny_backbone("llama", vocab_size=400, max_position_embeddings=256).save_pretrained(folder / "base")
    for name in ("model", "base"):
        made.tokenizer.save_pretrained(folder / name)
    return folder


def started(*arguments):
    """A running server and its address."""
    command = [sys.executable, "-m", "retro_hf_cli", "serve", *map(str, arguments), "--port", "0"]
    environment = {**os.environ, "PYTHONUNBUFFERED": "1"}
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment)
    lines = []
    for line in process.stdout:
        lines.append(line)
        if found := re.search(r"http://127\.0\.0\.1:\d+", line):
            return process, found[0]
    raise AssertionError("".join(lines))


@contextmanager
def long_answer(url):
    """The lines of an answer of 240 tokens that has begun."""
    body = {"prompt": "a king", "max_tokens": 240, "stream": True}
    with (
        httpx.Client(timeout=120, trust_env=False) as client,
        client.stream("POST", f"{url}/v1/completions", json=body) as answer,
    ):
        lines = answer.iter_lines()
        next(lines)
        yield lines


def test_a_server_finishes_what_runs_when_it_is_told_to_end(world):
    """The client gets the whole answer, and the process ends without an error."""
    process, url = started(world / "model", "--store", world / "store", "--embedder", world / "encoder")
    try:
        with long_answer(url) as lines:
            process.send_signal(signal.SIGTERM)
            rest = [line for line in lines if line]
        assert rest[-1] == "data: [DONE]"
        assert json.loads(rest[-2].removeprefix("data: "))["choices"][0]["finish_reason"] == "length"
        assert process.wait(60) == 0
    finally:
        process.kill()
        process.stdout.close()


def test_a_second_signal_ends_a_server_at_once(world):
    """An answer may take minutes; whoever does not want to wait need not kill the process."""
    process, url = started(world / "model", "--store", world / "store", "--embedder", world / "encoder")
    try:
        with long_answer(url):
            for number in (signal.SIGTERM, signal.SIGINT):  # at once, so that the answer does not end in between
                process.send_signal(number)
            assert process.wait(30) in (128 + signal.SIGTERM, 128 + signal.SIGINT)
            assert "1 answer" in process.stdout.readline()
    finally:
        process.kill()
        process.stdout.close()


def test_a_base_without_retrieval_is_served_and_ends_while_clients_keep_their_connections(world):
    """By the reader that needs no training, with the sizes of the store; an idle connection does not hold the process."""
    process, url = started(world / "base", "--store", world / "store", "--embedder", world / "encoder")
    try:
        with httpx.Client(base_url=url, timeout=60, trust_env=False) as client:
            body = {"messages": [{"role": "user", "content": "golden lighthouse"}], "max_tokens": 10}
            answer = client.post("/v1/chat/completions", json=body).json()
            assert answer["retrieval"]["status"] == "on"
            assert answer["model"] == "base"
            process.send_signal(signal.SIGTERM)
            assert process.wait(30) == 0
    finally:
        process.kill()
        process.stdout.close()


def refused(*arguments):
    """The error of a server that does not start."""
    with pytest.raises((ValueError, OSError)) as error:
        CliRunner().invoke(app, ["serve", *map(str, arguments)], catch_exceptions=False)
    return str(error.value)


def test_what_cannot_be_served_is_explained(world, tmp_path):
    """With the remedy, before or after the model is loaded."""
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        assert "--port" in refused(world / "model", "--port", port)
    assert "--api-key" in refused(world / "model", "--host", "0.0.0.0", "--port", 0)
    assert "--store" in refused(world / "base", "--port", 0)


def test_a_store_of_another_tokenizer_or_chunk_size_is_refused_with_the_remedy(world, tmp_path):
    """Before any request."""
    from tiny import tiny_retro
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(world / "model")
    tiny_retro("llama", {"vocab_size": 401}, chunk_size=4, neighbor_size=8).save_pretrained(tmp_path / "sizes")
    tokenizer.save_pretrained(tmp_path / "sizes")
    store = ("--store", world / "store", "--embedder", world / "encoder", "--port", 0)
    assert "chunk_size=8" in refused(tmp_path / "sizes", *store)
    tiny_retro("llama", {"vocab_size": 401}, chunk_size=8, neighbor_size=16).save_pretrained(tmp_path / "other")
    tokenizer.add_tokens(["new"])
    tokenizer.save_pretrained(tmp_path / "other")
    assert "retokenize" in refused(tmp_path / "other", *store)
