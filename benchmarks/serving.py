"""
A server under load: 64 clients of which some hang up, send garbage or read slowly, and how fast the others are answered.

The model is SmolLM2-135M's architecture, one third as deep, with random weights, reading in parallel context from a store of
the demo's texts. Beside it are the same base without retrieval, by the same server, and by `transformers serve`, with its
defaults and with continuous batching: 16 clients that all read to the end ask one after the other, in short rounds, so that the
rows share whatever else the machine does. The 64 clients then load our server alone. Text is drawn at temperature 1 with a
fixed seed, so answers have their full length. Memory and CPU time are those of the server's process.

    python benchmarks/serving.py --seconds 180   # writes results/serving.json
"""

import argparse
import asyncio
import copy
import json
import os
import random
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path

import httpx


ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "examples"))

CLIENTS, TOKENS = 64, 16
# Clients of a comparison, none of which misbehaves.
COMPARED = 16
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

    def __init__(self, url: str, options: dict) -> None:
        self.url, self.options = url, options
        self.until = 0.0
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
                "stream": True,
            } | self.options
            begun, first, usage, ended = time.monotonic(), None, None, False
            try:
                async with client.stream("POST", f"{self.url}/v1/completions", json=body) as answer:
                    if answer.status_code == 429:
                        self.refused += 1
                        await asyncio.sleep(1)
                        continue
                    async for line in answer.aiter_lines():
                        if line.startswith("data: {"):
                            event = json.loads(line[6:])
                            if first is None and event.get("choices") and event["choices"][0]["text"]:
                                first = time.monotonic() - begun
                            usage = event.get("usage") or usage
                    ended = True
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
            body = {"prompt": f"{number} {QUESTION}", "max_tokens": 500, "stream": True} | self.options
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
                self.wrong += answer.status_code not in (400, 413, 415, 422)
            except httpx.HTTPError:  # the server closes the connection of a body that it does not read
                pass
            await asyncio.sleep(random.random())

    async def slow(self, client: httpx.AsyncClient, number: int) -> None:
        """Reads a line a second."""
        while time.monotonic() < self.until:
            body = {"prompt": QUESTION, "max_tokens": TOKENS, "stream": True} | self.options
            try:
                async with client.stream("POST", f"{self.url}/v1/completions", json=body) as answer:
                    async for _ in answer.aiter_lines():
                        await asyncio.sleep(1)
                        if time.monotonic() > self.until:
                            break
            except httpx.HTTPError:
                pass

    async def run(self, seconds: float, *, mixed: bool) -> None:
        """All clients at once, with those that misbehave or without. Every answer that was begun is read to its end."""
        self.until = time.monotonic() + seconds
        limits = httpx.Limits(max_connections=CLIENTS + 8)
        async with httpx.AsyncClient(timeout=300, limits=limits, trust_env=False) as client:
            kinds = [self.polite] * COMPARED
            if mixed:
                kinds = [self.hangs_up] * HANG_UP + [self.garbage] * GARBAGE + [self.slow] * SLOW
                kinds += [self.polite] * (CLIENTS - len(kinds))
            await asyncio.gather(*(kind(client, number) for number, kind in enumerate(kinds)))


def quantiles(values: list[float]) -> dict[str, float]:
    """The usual three, in seconds."""
    if len(values) < 2:
        return {}
    cuts = statistics.quantiles(values, n=100)
    return {"p50": round(cuts[49], 3), "p95": round(cuts[94], 3), "p99": round(cuts[98], 3)}


class Server:
    """A server's process, and what its clients have seen so far."""

    def __init__(self, command: list[str], url: str, options: dict) -> None:
        self.command, self.process = command, subprocess.Popen(command, stdout=subprocess.DEVNULL)
        self.load = Load(url, options)
        self.took = self.cpu = 0.0
        self.memory: list[float] = []

    def wait(self) -> None:
        """Wait until it answers, then warm it up."""
        deadline = time.monotonic() + 600
        while self.process.poll() is None and time.monotonic() < deadline:
            try:
                httpx.get(f"{self.load.url}/health", timeout=60, trust_env=False)
                break
            except httpx.HTTPError:
                time.sleep(0.5)
        body = {"prompt": QUESTION, "max_tokens": TOKENS} | self.load.options | {"stream_options": None}
        body = {name: value for name, value in body.items() if value is not None}
        httpx.post(f"{self.load.url}/v1/completions", json=body, timeout=300, trust_env=False).raise_for_status()
        self.memory.append(memory(self.process.pid))

    def round(self, seconds: float, *, mixed: bool = False) -> None:
        """Load it for a while."""
        begun, cpu = time.monotonic(), cpu_seconds(self.process.pid)
        asyncio.run(self.load.run(seconds, mixed=mixed))
        self.took += time.monotonic() - begun
        self.cpu += cpu_seconds(self.process.pid) - cpu
        self.memory.append(memory(self.process.pid))

    def report(self) -> dict:
        """What was measured."""
        load = self.load
        health = httpx.get(f"{load.url}/health", timeout=60, trust_env=False).json()
        return {
            "answers": len(load.seconds),
            "lost": load.lost,
            "wrong": load.wrong,
            "told to come back": load.refused,
            "tokens_per_second": round(load.tokens / self.took, 2),
            "tokens_per_cpu_second": round(load.tokens / self.cpu, 2),
            "seconds": quantiles(load.seconds),
            "seconds_to_first_text": quantiles(load.first),
            "memory_mb": [round(one, 1) for one in self.memory],
            "health_after": health,
        }


def cpu_seconds(process: int) -> float:
    """CPU time of a process and its threads."""
    fields = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def free_port() -> int:
    """A port that nobody listens on."""
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        return listening.getsockname()[1]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--seconds", type=float, default=180, help="of load for each server")
    parser.add_argument("--rounds", type=int, default=6, help="in how many turns")
    parser.add_argument("--output", type=Path, default=ROOT / "benchmarks/results/serving.json")
    arguments = parser.parse_args()
    random.seed(0)
    import torch
    from demo_data import minilm_path

    result = {
        "clients": {
            "all": CLIENTS,
            "hang up": HANG_UP,
            "send garbage": GARBAGE,
            "read slowly": SLOW,
            "compared": COMPARED,
        },
        "tokens_per_answer": TOKENS,
        "seconds_of_load": arguments.seconds,
        "rounds": arguments.rounds,
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "transformers": version("transformers"),
        # What other programs were doing; above the number of cores, only the ratios of the rows say something.
        "load_average_at_the_start": [round(one, 1) for one in os.getloadavg()],
    }
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        make_world(folder)
        ports = [free_port(), free_port(), free_port()]
        retro = [sys.executable, "-m", "retro_hf_cli", "serve", str(folder / "base"), "--port", str(ports[0])]
        retro += ["--store", str(folder / "store"), "--embedder", str(minilm_path())]
        transformers = [str(Path(sys.executable).with_name("transformers")), "serve", str(folder / "base")]
        transformers += ["--host", "127.0.0.1", "--port"]
        continuous = [*transformers, str(ports[2]), "--continuous-batching"]
        usage = {"stream_options": {"include_usage": True}}
        address = f"http://127.0.0.1:{ports[0]}"
        ours = Server(retro, address, {"retrieval": True, **usage})
        theirs = Server([*transformers, str(ports[1])], f"http://127.0.0.1:{ports[1]}", {})
        batched = Server(continuous, f"http://127.0.0.1:{ports[2]}", {})
        base, all_clients = copy.copy(ours), copy.copy(ours)
        base.load, base.memory = Load(address, {"retrieval": False, **usage}), []
        all_clients.load, all_clients.memory = Load(address, ours.load.options), []
        compared = {
            "with the store": ours,
            "base": base,
            "transformers serve, base": theirs,
            "transformers serve, base, continuous batching": batched,
        }
        try:
            for server in (*compared.values(), all_clients):
                server.wait()
            for _ in range(arguments.rounds):
                for server in compared.values():
                    server.round(arguments.seconds / arguments.rounds)
            all_clients.round(arguments.seconds, mixed=True)
            for name, server in {**compared, "all clients": all_clients}.items():
                result[name] = server.report()
                print(name, json.dumps(result[name]), flush=True)
            ours.process.send_signal(signal.SIGTERM)
            result["exit_code"] = ours.process.wait(120)
        finally:
            for server in (ours, theirs, batched):
                server.process.kill()
    for way in ("", ", continuous batching"):
        rival = result[f"transformers serve, base{way}"]
        result[f"share_of_transformers_serve{way}"] = {
            name: round(result["with the store"][name] / rival[name], 2)
            for name in ("tokens_per_second", "tokens_per_cpu_second")
        }
        print(result[f"share_of_transformers_serve{way}"])
    arguments.output.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
