"""
A server under load: 64 clients of which some hang up, send garbage or read slowly, and how fast the others are answered.

The model is SmolLM2-135M's architecture, one third as deep, with random weights, reading in parallel context from a store of
the demo's texts; beside it the same base without retrieval, by the same server. Text is drawn at temperature 1 with a fixed seed,
so answers have their full length. Memory is that of the server's process.

    python benchmarks/serving.py --seconds 60   # writes results/serving.json
"""

import argparse
import asyncio
import json
import os
import random
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import httpx


ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "examples"))

CLIENTS, TOKENS = 64, 8
# Of 64: clients that hang up within an answer, send what is no request, or read a byte now and then.
HANG_UP, GARBAGE, SLOW = 6, 6, 4
QUESTION = "And Aaron stretched out his hand over the waters of Egypt, and the frogs came up"


def make_world(folder: Path) -> None:
    """A base with random weights, and a store for its tokenizer."""
    import torch
    from demo_data import minilm_path
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    from retro_hf import RetroDatastore

    tokenizer = AutoTokenizer.from_pretrained(ROOT / "hub_configs/retro-smollm2-135m")
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=49152,
        hidden_size=576,
        intermediate_size=1536,
        num_hidden_layers=10,
        num_attention_heads=9,
        num_key_value_heads=3,
        max_position_embeddings=8192,
        tie_word_embeddings=True,
        bos_token_id=1,
        eos_token_id=None,
        pad_token_id=2,
    )
    LlamaForCausalLM(config).save_pretrained(folder / "base")
    tokenizer.save_pretrained(folder / "base")
    RetroDatastore.build(
        ROOT / "examples/data",
        folder / "store",
        tokenizer=tokenizer,
        embedder=str(minilm_path()),
        chunk_size=32,
        neighbor_size=64,
    )


def memory(process: int) -> float:
    """Resident megabytes of a process that belong to it alone."""
    for line in Path(f"/proc/{process}/smaps_rollup").read_text().splitlines():
        if line.startswith("Anonymous:"):
            return int(line.split()[1]) / 1024
    return float("nan")


class Load:
    """What the clients saw."""

    def __init__(self, url: str, until: float, retrieval: bool) -> None:
        self.url, self.until, self.retrieval = url, until, retrieval
        self.seconds: list[float] = []
        self.first: list[float] = []
        self.tokens = self.refused = self.lost = self.wrong = 0

    async def polite(self, client: httpx.AsyncClient, number: int) -> None:
        """Asks, reads the whole stream, and asks again; waits where the queue is full, as OpenAI's client does."""
        while time.monotonic() < self.until:
            body = {
                "prompt": f"{number}. {QUESTION}",
                "max_tokens": TOKENS,
                "temperature": 1,
                "seed": number,
                "retrieval": self.retrieval,
                "stream": True,
                "stream_options": {"include_usage": True},
            }
            begun, first, usage, ended = time.monotonic(), None, None, False
            try:
                async with client.stream("POST", f"{self.url}/v1/completions", json=body) as answer:
                    if answer.status_code == 429:
                        self.refused += 1
                        await asyncio.sleep(1)
                        continue
                    async for line in answer.aiter_lines():
                        if line == "data: [DONE]":
                            ended = True
                        elif line:
                            event = json.loads(line[6:])
                            if first is None and event.get("choices") and event["choices"][0]["text"]:
                                first = time.monotonic() - begun
                            usage = event.get("usage") or usage
            except httpx.HTTPError:
                ended = False
            if not ended or usage is None:
                self.lost += 1
            elif usage["completion_tokens"] != TOKENS:
                self.wrong += 1
            else:
                self.seconds.append(time.monotonic() - begun)
                self.first.append(first or 0.0)
                self.tokens += TOKENS

    async def hangs_up(self, client: httpx.AsyncClient, number: int) -> None:
        """Leaves in the middle of an answer."""
        while time.monotonic() < self.until:
            body = {"prompt": f"{number} {QUESTION}", "max_tokens": 500, "stream": True, "retrieval": self.retrieval}
            try:
                async with client.stream("POST", f"{self.url}/v1/completions", json=body) as answer:
                    await asyncio.wait_for(anext(answer.aiter_bytes()), 30)
            except (httpx.HTTPError, TimeoutError, StopAsyncIteration):
                pass
            await asyncio.sleep(random.random())

    async def garbage(self, client: httpx.AsyncClient, number: int) -> None:
        """Sends what is no request; anything but an error of the client is wrong."""
        bodies = [b"{", b"[]", b"\xff" * 1000, b"x" * 2_000_000, b'{"prompt": 3}', b'{"prompt": "a", "n": 9}']
        while time.monotonic() < self.until:
            headers = {"Content-Type": random.choice(["application/json", "text/plain"])}
            try:
                answer = await client.post(
                    f"{self.url}/v1/completions", content=random.choice(bodies), headers=headers
                )
                self.wrong += answer.status_code not in (400, 413, 415)
            except httpx.HTTPError:  # the server closes the connection of a body that it does not read
                pass
            await asyncio.sleep(random.random())

    async def slow(self, client: httpx.AsyncClient, number: int) -> None:
        """Reads a line a second."""
        while time.monotonic() < self.until:
            body = {"prompt": QUESTION, "max_tokens": TOKENS, "stream": True, "retrieval": self.retrieval}
            try:
                async with client.stream("POST", f"{self.url}/v1/completions", json=body) as answer:
                    async for _ in answer.aiter_lines():
                        await asyncio.sleep(1)
                        if time.monotonic() > self.until:
                            break
            except httpx.HTTPError:
                pass

    async def run(self) -> None:
        """All clients at once."""
        limits = httpx.Limits(max_connections=CLIENTS + 8)
        async with httpx.AsyncClient(timeout=300, limits=limits, trust_env=False) as client:
            kinds = [self.hangs_up] * HANG_UP + [self.garbage] * GARBAGE + [self.slow] * SLOW
            kinds += [self.polite] * (CLIENTS - len(kinds))
            await asyncio.gather(*(kind(client, number) for number, kind in enumerate(kinds)))


def quantiles(values: list[float]) -> dict[str, float]:
    """The usual three, in seconds."""
    if len(values) < 2:
        return {}
    cuts = statistics.quantiles(values, n=100)
    return {"p50": round(cuts[49], 3), "p95": round(cuts[94], 3), "p99": round(cuts[98], 3)}


def measure(folder: Path, seconds: float, retrieval: bool) -> dict:
    """Start a server, load it, and end it."""
    from demo_data import minilm_path

    command = [sys.executable, "-m", "retro_hf_cli", "serve", str(folder / "base")]
    command += ["--store", str(folder / "store"), "--embedder", str(minilm_path()), "--port", "0"]
    server = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env={**os.environ, "PYTHONUNBUFFERED": "1"})
    try:
        url = server.stdout.readline().split(" at ")[1].split()[0]
        warm = Load(url, time.monotonic() + 5, retrieval)
        asyncio.run(warm.run())
        before = memory(server.pid)
        load = Load(url, time.monotonic() + seconds, retrieval)
        begun = time.monotonic()
        asyncio.run(load.run())
        took, after = time.monotonic() - begun, memory(server.pid)
        health = httpx.get(f"{url}/health", timeout=60, trust_env=False).json()
    finally:
        server.send_signal(signal.SIGTERM)
        code = server.wait(120)
    return {
        "answers": len(load.seconds),
        "lost": load.lost,
        "wrong": load.wrong,
        "told to come back": load.refused,
        "tokens_per_second": round(load.tokens / took, 2),
        "seconds": quantiles(load.seconds),
        "seconds_to_first_text": quantiles(load.first),
        "memory_mb": {"before": round(before, 1), "after": round(after, 1)},
        "health_after": health,
        "exit_code": code,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--output", type=Path, default=ROOT / "benchmarks/results/serving.json")
    arguments = parser.parse_args()
    random.seed(0)
    import torch

    result = {
        "clients": {"all": CLIENTS, "hang up": HANG_UP, "send garbage": GARBAGE, "read slowly": SLOW},
        "tokens_per_answer": TOKENS,
        "seconds_of_load": arguments.seconds,
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        # What other programs were doing; above the number of cores, the times say little.
        "load_average_at_the_start": [round(one, 1) for one in os.getloadavg()],
    }
    with tempfile.TemporaryDirectory() as folder:
        make_world(Path(folder))
        for name, retrieval in (("base", False), ("with the store", True)):
            result[name] = measure(Path(folder), arguments.seconds, retrieval)
            print(name, json.dumps(result[name]), flush=True)
    arguments.output.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
