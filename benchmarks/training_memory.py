"""What training a RETROfit costs in memory and time: frozen base, unfrozen base, activation checkpointing.

    python benchmarks/training_memory.py       # about 4 minutes on 1 core; writes benchmarks/results/training_memory.json

Every measurement runs in a process of its own, so that its peak memory is its own; the contestants take turns `--rounds`
times, and the table shows medians. Two steps of AdamW, of which the second is timed, in seconds of the processor, one
thread. `at rest` is resident memory before the first step, `peak` the largest of the whole process, `optimizer` the size
of AdamW's state.

Shape: a Llama of 18 layers, width 512, vocabulary 16384, with random weights in float32; cross-attention in every third
layer from layer 5 on (the default, counted from 0), or in the last three of these; chunks of 64, 2 neighbors of 128
tokens; two rows of 512 tokens.
"""

import argparse
import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import time
from pathlib import Path


ROWS, LENGTH, CHUNK, NEIGHBORS, STEPS = 2, 512, 64, 2, 2
UPPER = [11, 14, 17]
# What is measured: a label, whether RETRO is added, and how it is trained.
WAYS: dict[str, tuple[str, bool, dict, bool]] = {
    "base": ("base alone, all of it trained", False, {}, False),
    "unfrozen": ("RETROfit, all of it trained", True, {"freeze_backbone": False}, False),
    "unfrozen-checkpointing": ("the same, checkpointing", True, {"freeze_backbone": False}, True),
    "frozen": ("RETROfit, base frozen (default)", True, {}, False),
    "frozen-checkpointing": ("the same, checkpointing", True, {}, True),
    "frozen-upper": ("base frozen, cross-attention from layer 11 on", True, {"cross_attention_layers": UPPER}, False),
    "frozen-upper-checkpointing": ("the same, checkpointing", True, {"cross_attention_layers": UPPER}, True),
}


def resident() -> float:
    """Resident memory of this process now, in MB."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 1e6


def measure(way: str) -> dict:
    """One way in this process."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from retro_hf import retrofit

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=16384,
        hidden_size=512,
        intermediate_size=1408,
        num_hidden_layers=18,
        num_attention_heads=8,
        num_key_value_heads=4,
        max_position_embeddings=2048,
        tie_word_embeddings=True,
    )
    _, retro, settings, checkpointing = WAYS[way]
    model = LlamaForCausalLM(config)
    inputs = {"input_ids": torch.randint(1, config.vocab_size, (ROWS, LENGTH)), "use_cache": False}
    inputs["labels"] = inputs["input_ids"]
    if retro:
        model = retrofit(model, chunk_size=CHUNK, **settings)
        shape = (ROWS, LENGTH // CHUNK, NEIGHBORS, model.config.neighbor_size)
        inputs["neighbor_input_ids"] = torch.randint(1, config.vocab_size, shape)
    model.train()
    if checkpointing:
        model.activation_checkpointing_enable()
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trainable, lr=1e-4)
    at_rest, times = resident(), []
    for _ in range(STEPS):
        start = time.process_time()
        model(**inputs).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        times.append(time.process_time() - start)
    state = [value for entry in optimizer.state.values() for value in entry.values()]
    return {
        "trainable": sum(parameter.numel() for parameter in trainable),
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "at_rest_mb": at_rest,
        "optimizer_mb": sum(value.numel() * value.element_size() for value in state) / 1e6,
        "peak_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e6,
        "seconds": times[-1],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=2, help="how often the contestants take turns")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "training_memory.json")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        print("RESULT" + json.dumps(measure(args.one)))
        return

    environment = os.environ | {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    results: dict[str, list[dict]] = {}
    for _ in range(args.rounds):
        for way in WAYS:
            command = [sys.executable, __file__, "--one", way]
            done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
            if done.returncode:
                sys.exit(f"{way} failed:\n{done.stderr[-2000:]}")
            line = next(line for line in done.stdout.splitlines() if line.startswith("RESULT"))
            results.setdefault(way, []).append(json.loads(line[6:]))
            print(way, results[way][-1], file=sys.stderr, flush=True)

    print("| | trained | at rest | optimizer | peak | step |")
    print("|---|---|---|---|---|---|")
    for way, rows in results.items():
        middle = {key: statistics.median(row[key] for row in rows) for key in rows[0]}
        print(
            f"| {WAYS[way][0]} | {middle['trainable'] / 1e6:.1f} M | {middle['at_rest_mb']:,.0f} MB | "
            f"{middle['optimizer_mb']:,.0f} MB | {middle['peak_mb']:,.0f} MB | {middle['seconds']:.1f} s |"
        )

    import torch
    import transformers

    record = {
        "command": " ".join(["python", *sys.argv]),
        "seed": 0,
        "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
        "machine": f"{platform.machine()}, {os.cpu_count()} cores, 1 thread used",
        "results": results,
    }
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
