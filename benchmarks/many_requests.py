"""
What do unequal lengths cost the server? The same engine work, given as 16 equal requests and as 16 unequal ones.

    python benchmarks/many_requests.py     # about 3 minutes of CPU time on one core; writes results/many_requests.json

Both loads have as many tokens in all: prompts of 64 tokens and answers of 32, or prompts of 16 to 112 and answers of 4 to
60, in a fixed random order. All 16 are sent at once to an engine with 8 rows, without HTTP. The value is tokens of answers per
second of CPU time, prompts, look-ups and scheduling included. Each load also runs with the engine of the commit `OLD`, which
generates a whole batch at a time, in turns with the present one: round by round, each in a process of its own.

The base is Llama's architecture with random weights (6 layers, width 256), in float32; all-MiniLM-L6-v2 looks up the store.
"""

import argparse
import json
import os
import platform
import queue
import random
import statistics
import subprocess
import sys
import tempfile
import time
from functools import partial
from importlib.metadata import version
from pathlib import Path


ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "examples"))
os.environ.setdefault("OMP_NUM_THREADS", "1")

OLD = "f8516da"
REQUESTS, ROWS = 16, 8
PROMPT, ANSWER = 64, 32
READERS = ("off", "cross_attention", "parallel_context")
CHUNK_SIZE = 16


def spread(least: int, most: int, seed: int) -> list[int]:
    """Unequal lengths whose sum is that of equal ones of the middle."""
    lengths = [round(least + (most - least) * place / (REQUESTS - 1)) for place in range(REQUESTS)]
    lengths[-1] += (least + most) // 2 * REQUESTS - sum(lengths)
    random.Random(seed).shuffle(lengths)
    return lengths


LOADS = {
    "equal": ([PROMPT] * REQUESTS, [ANSWER] * REQUESTS),
    "unequal": (spread(16, 2 * PROMPT - 16, 0), spread(4, 2 * ANSWER - 4, 1)),
}


def make_world(folder: Path) -> None:
    """A store of a part of the demo's texts."""
    from demo_data import minilm_path
    from transformers import AutoTokenizer

    from retro_hf import RetroDatastore

    tokenizer = AutoTokenizer.from_pretrained(ROOT / "hub_configs/retro-smollm2-135m")
    sizes = {"chunk_size": CHUNK_SIZE, "neighbor_size": 2 * CHUNK_SIZE}
    text = (ROOT / "examples/data/exodus_8_kjv.txt").read_text()
    documents = [{"id": str(number), "text": verse} for number, verse in enumerate(text.split(". "))]
    RetroDatastore.build(documents, folder / "store", tokenizer=tokenizer, embedder=str(minilm_path()), **sizes)


def make_model(reader: str):
    """A RETRO of random weights, whose answers have their full length."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from retro_hf import retrofit

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=49152,
        hidden_size=256,
        intermediate_size=704,
        num_hidden_layers=6,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=8192,
        tie_word_embeddings=True,
        bos_token_id=1,
        eos_token_id=None,
        pad_token_id=2,
    )
    sizes = {"chunk_size": CHUNK_SIZE, "neighbor_size": 2 * CHUNK_SIZE, "num_neighbors": 2}
    kind = {"reader": reader} if reader == "parallel_context" else {"cross_attention_layers": [2, 5]}
    return retrofit(LlamaForCausalLM(config), **kind, **sizes).eval()


def tell(ends: tuple[type, ...], ended: queue.Queue, event: object) -> None:
    """Put the end of an answer into a queue."""
    if isinstance(event, ends):
        ended.put(event)


def work(folder: Path) -> None:
    """Runs the loads whose names come in, a line each, and prints the CPU seconds of each."""
    import torch
    from demo_data import minilm_path
    from transformers import AutoTokenizer

    from retro_hf import RetroDatastore, RetroRetriever
    from retro_hf_server import engine as module
    from retro_hf_server.source import Source

    try:
        from retro_hf_server import jobs, readers
    except ImportError:  # the old engine has all in one file
        jobs = readers = module
    tokenizer = AutoTokenizer.from_pretrained(ROOT / "hub_configs/retro-smollm2-135m")
    tokenizer.eos_token = None
    retriever = RetroRetriever(RetroDatastore.load(folder / "store"), embedder=str(minilm_path()), tokenizer=tokenizer)
    text = tokenizer((ROOT / "examples/data/exodus_8_kjv.txt").read_text()).input_ids
    engines = {}
    for reader in READERS:
        model = make_model("cross_attention" if reader == "off" else reader)
        engines[reader] = module.Engine(model, tokenizer, Source(retriever, tokenizer, CHUNK_SIZE), max_batch=ROWS)
    torch.set_num_threads(1)
    print("ready", flush=True)
    for line in sys.stdin:
        reader, load, seed = line.split()
        engine, ended = engines[reader], queue.Queue()
        told = partial(tell, (jobs.Finished, jobs.Failed), ended)
        begun = time.process_time()
        for number, (prompt, answer) in enumerate(zip(*LOADS[load], strict=True)):
            start = 13 * (number + REQUESTS * int(seed)) % (len(text) - 2 * PROMPT)
            sampling = jobs.Sampling(answer, temperature=1.0, seed=number)
            engine.submit(jobs.Job(readers.Prompt(text[start : start + prompt]), sampling, told, reader != "off"))
        tokens = sum(ended.get(timeout=600).num_tokens for _ in range(REQUESTS))
        seconds = time.process_time() - begun
        print(json.dumps({"tokens": tokens, "seconds": seconds}), flush=True)


class Worker:
    """A process with one of the engines."""

    def __init__(self, source: Path, folder: Path) -> None:
        path = os.pathsep.join([str(source), os.environ.get("PYTHONPATH", "")])
        command = [sys.executable, __file__, "--work", str(folder)]
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
        self.process = subprocess.Popen(command, env={**os.environ, "PYTHONPATH": path}, **pipes)

    def line(self) -> str:
        """What it says next."""
        line = self.process.stdout.readline()
        if not line:
            raise RuntimeError("A worker has ended; its error is above.")
        return line

    def run(self, reader: str, load: str, seed: int) -> float:
        """Tokens per second of CPU time."""
        self.process.stdin.write(f"{reader} {load} {seed}\n")
        self.process.stdin.flush()
        result = json.loads(self.line())
        if result["tokens"] != sum(LOADS[load][1]):
            raise RuntimeError(f"The answers have {result['tokens']} tokens, not {sum(LOADS[load][1])}.")
        return result["tokens"] / result["seconds"]


def summary(values: list[float]) -> dict[str, float]:
    """Median and range."""
    return {name: round(f(values), 3) for name, f in (("median", statistics.median), ("least", min), ("most", max))}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--old", default=OLD, help="commit of the engine to compare with")
    parser.add_argument("--work", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--output", type=Path, default=ROOT / "benchmarks/results/many_requests.json")
    arguments = parser.parse_args()
    if arguments.work:
        return work(arguments.work)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        make_world(folder)
        archive = subprocess.run(["git", "archive", arguments.old, "src"], cwd=ROOT, check=True, capture_output=True)
        subprocess.run(["tar", "-x", "-C", name], input=archive.stdout, check=True)
        workers = {"old": Worker(folder / "src", folder), "new": Worker(ROOT / "src", folder)}
        try:
            for worker in workers.values():
                worker.line()
            speeds = {reader: {who: {load: [] for load in LOADS} for who in workers} for reader in READERS}
            for worker in workers.values():  # to warm up
                for reader in READERS:
                    worker.run(reader, "equal", 0)
            for seed in range(arguments.rounds):
                for reader in READERS:
                    for load in LOADS:
                        for who, worker in workers.items():
                            speeds[reader][who][load].append(worker.run(reader, load, seed))
        finally:
            for worker in workers.values():
                worker.process.kill()
    result = {
        "command": "python benchmarks/many_requests.py",
        "requests": REQUESTS,
        "rows": ROWS,
        "loads": {load: {"prompts": prompts, "answers": answers} for load, (prompts, answers) in LOADS.items()},
        "rounds": arguments.rounds,
        "old": arguments.old,
        "python": platform.python_version(),
        "torch": version("torch"),
        "transformers": version("transformers"),
        "tokens_per_cpu_second": {},
        "ratios": {},
    }
    for reader, found in speeds.items():
        result["tokens_per_cpu_second"][reader] = {
            who: {load: summary(values) for load, values in loads.items()} for who, loads in found.items()
        }
        ratio = lambda left, right: summary([a / b for a, b in zip(left, right, strict=True)])  # noqa: E731
        result["ratios"][reader] = {
            "old, unequal by equal": ratio(found["old"]["unequal"], found["old"]["equal"]),
            "new, unequal by equal": ratio(found["new"]["unequal"], found["new"]["equal"]),
            "unequal, new by old": ratio(found["new"]["unequal"], found["old"]["unequal"]),
            "equal, new by old": ratio(found["new"]["equal"], found["old"]["equal"]),
        }
        print(reader, json.dumps(result["ratios"][reader]), flush=True)
    arguments.output.write_text(json.dumps(result, indent=1) + "\n")
    return None


if __name__ == "__main__":
    main()
