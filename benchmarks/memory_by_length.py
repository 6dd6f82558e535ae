"""Does memory grow with the length of the text? RETRO's part of the cache, and the peak of a training step.

    python benchmarks/memory_by_length.py              # about 10 minutes on 2 cores; continues if it is stopped
    python benchmarks/memory_by_length.py --publish    # the same; then writes results/memory_by_length.json and docs/memory.svg

A Llama of 6 layers and width 256 with random weights in float32; chunks of 64, 2 neighbors of 128 tokens, one row.

- *Cache*: the text is read in blocks of 512 tokens, each chunk with other neighbors. `keys and values of the text` is the
  cache of the base, `retrieval state` what RETRO keeps beside it: tensors of the last two chunks. In parallel context,
  neighbors are kept for other requests, too, in a cache of their own (`kept neighbors`), which has a bound.
- *Training*: the peak memory of a process that makes two steps of AdamW, less what it had before the first one. The base is
  frozen, as `retrofit` leaves it, and activation checkpointing is on. `base` is the base by itself, all of it trained.
"""

import argparse
import json
import os
import platform
import resource
import subprocess
import sys
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from retro_hf import __version__, retrofit


RESULTS = Path(__file__).parent / "results" / "memory_by_length.json"
PICTURE = Path(__file__).parent.parent / "docs" / "memory.svg"
WORK = Path("demo_output/memory_by_length.json")
LENGTHS = (1024, 2048, 4096, 8192, 16384)
CHUNK, NEIGHBORS, BLOCK = 64, 2, 512
CACHES, TRAINED = ("cross_attention", "parallel_context"), ("base", "cross_attention")


def make_model(reader: str) -> Any:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=16384,
        hidden_size=256,
        intermediate_size=704,
        num_hidden_layers=6,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=LENGTHS[-1],
        tie_word_embeddings=True,
    )
    base = LlamaForCausalLM(config)
    return base if reader == "base" else retrofit(base, chunk_size=CHUNK, reader=reader)


def random_inputs(model: Any, length: int) -> dict[str, torch.Tensor]:
    ids = torch.randint(1, 16384, (1, length))
    size = getattr(model.config, "neighbor_size", None)
    if size is None:
        return {"input_ids": ids}
    return {
        "input_ids": ids,
        "neighbor_input_ids": torch.randint(1, 16384, (1, length // CHUNK, NEIGHBORS, size)),
    }


def megabytes(value: Any, seen: set[int]) -> float:
    """Memory of all tensors that an object holds, each storage counted once."""
    if isinstance(value, torch.Tensor):
        storage = value.untyped_storage()
        is_new = storage.data_ptr() not in seen
        seen.add(storage.data_ptr())
        return storage.nbytes() / 1e6 if is_new else 0.0
    if isinstance(value, dict):
        return sum(megabytes(one, seen) for one in value.values())
    if isinstance(value, (list, tuple)) and not hasattr(value, "__dict__"):
        return sum(megabytes(one, seen) for one in value)
    return megabytes(vars(value), seen) if hasattr(value, "__dict__") and not callable(value) else 0.0


@torch.no_grad()
def measure_cache(reader: str) -> dict[int, dict[str, float]]:
    """Megabytes after each of the lengths."""
    model = make_model(reader).eval()
    text, cache, found = random_inputs(model, LENGTHS[-1]), None, {}
    for start in range(0, LENGTHS[-1], BLOCK):
        # Given neighbors are those of all chunks from the beginning of the text on.
        inputs = text | {"input_ids": text["input_ids"][:, start : start + BLOCK]}
        output = model(**inputs, past_key_values=cache, use_cache=True, logits_to_keep=1)
        cache = output.past_key_values
        if start + BLOCK in LENGTHS:
            seen: set[int] = set()
            found[start + BLOCK] = {
                "retrieval state": megabytes(cache.retrieval_state, seen),
                "keys and values of the text": megabytes([(one.keys, one.values) for one in cache.layers], seen),
            }
            if reader == "parallel_context":
                found[start + BLOCK]["kept neighbors"] = model.model.retro.cache.num_bytes / 1e6
    return found


def measure_training(reader: str, length: int) -> dict[str, float]:
    """Peak megabytes over those at rest, and CPU seconds of the second step; in this process."""
    model = make_model(reader).train()
    model.activation_checkpointing_enable()
    inputs = random_inputs(model, length)
    optimizer = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), lr=1e-4)
    at_rest = int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 1e6
    for _ in range(2):
        start = time.process_time()
        model(**inputs, labels=inputs["input_ids"], use_cache=False).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e6
    return {"megabytes": peak - at_rest, "seconds": time.process_time() - start}


def in_a_process(*arguments: object) -> dict[str, float]:
    done = subprocess.run([sys.executable, __file__, "--one", *map(str, arguments)], capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"{arguments} failed:\n{done.stderr[-2000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def draw(caches: dict, training: dict) -> None:
    import matplotlib.pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.4))
    for reader, label in (("cross_attention", "the paper's reader"), ("parallel_context", "parallel context")):
        sizes = [caches[reader][str(length)]["retrieval state"] for length in LENGTHS]
        left.plot(LENGTHS, sizes, marker="o", label=f"retrieval state, {label}")
    sizes = [caches["cross_attention"][str(length)]["keys and values of the text"] for length in LENGTHS]
    left.plot(LENGTHS, sizes, marker="o", color="gray", label="keys and values of the text")
    for reader, label in (("base", "the base alone, all trained"), ("cross_attention", "RETROfit, the base frozen")):
        right.plot(
            LENGTHS, [training[f"{reader} {length}"]["megabytes"] for length in LENGTHS], marker="o", label=label
        )
    for axis, title in ((left, "MB of one row's cache"), (right, "MB at the peak of a training step")):
        axis.set(title=title, xlabel="tokens", xticks=LENGTHS[1:], ylim=(0, None))
        axis.tick_params(axis="x", labelsize=8)
        axis.legend(fontsize=8)
        axis.spines[["top", "right"]].set_visible(False)
    figure.tight_layout()
    figure.savefig(PICTURE, metadata={"Date": None})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--publish", action="store_true", help="write the results and the picture")
    parser.add_argument("--one", nargs=2, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        print(json.dumps(measure_training(args.one[0], int(args.one[1]))))
        return
    WORK.parent.mkdir(parents=True, exist_ok=True)
    kept = json.loads(WORK.read_text()) if WORK.exists() else {"cache": {}, "training": {}}
    for reader in CACHES:
        if reader not in kept["cache"]:
            kept["cache"][reader] = measure_cache(reader)
            WORK.write_text(json.dumps(kept, indent=1) + "\n")
    for length in LENGTHS:
        for reader in TRAINED:
            name = f"{reader} {length}"
            if name not in kept["training"]:
                kept["training"][name] = in_a_process(reader, length)
                WORK.write_text(json.dumps(kept, indent=1) + "\n")
                print(name, kept["training"][name], flush=True)
    kept = json.loads(WORK.read_text())
    print(json.dumps(kept, indent=1))
    if args.publish:
        record = {
            "command": "python benchmarks/memory_by_length.py --publish",
            "seed": 0,
            "versions": {"retro-hf": __version__} | {name: version(name) for name in ("torch", "transformers")},
            "machine": f"{platform.machine()}, {os.cpu_count()} cores",
        }
        RESULTS.write_text(json.dumps(record | kept, indent=1) + "\n")
        draw(kept["cache"], kept["training"])


if __name__ == "__main__":
    main()
