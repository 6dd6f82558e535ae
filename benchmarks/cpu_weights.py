"""Which kind of weights is fast on a CPU? float32, bfloat16 and int8, with retrieval on and off.

    pip install "retro-hf[quantization]"
    python benchmarks/cpu_weights.py              # about 6 minutes of CPU time on one core
    python benchmarks/cpu_weights.py --publish    # the same, and then writes benchmarks/results/cpu_weights.json

The base is SmolLM2-135M-Instruct; it reads two passages of 128 tokens in parallel context, or through the shipped adapter. `prompt`
is the CPU time of a prompt of 512 tokens, `token` that of each of 48 further ones; passages are known. `nats` is the loss on held-out
chapters of the Bible with retrieval off, which shows what rounding costs. All kinds take turns; the table has medians.
"""

import argparse
import json
import platform
import statistics
import sys
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torchao.quantization import Int8WeightOnlyConfig
from transformers import AutoTokenizer, TorchAoConfig


ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "examples"))
from readers import ADAPTERS, BASE, load_parts  # noqa: E402
from retrofit_smollm2 import load_base  # noqa: E402

from retro_hf import RetroForCausalLM, __version__, retrofit  # noqa: E402


KINDS: dict[str, dict[str, Any]] = {
    "float32": {"dtype": torch.float32},
    "bfloat16": {"dtype": torch.bfloat16},
    "int8": {"dtype": torch.float32, "quantization_config": TorchAoConfig(Int8WeightOnlyConfig())},
}
PROMPT, STEPS, PASSAGES, SIZE, CHUNK = 512, 48, 2, 128, 32


def instructions() -> list[str]:
    """Instructions of the processor for short numbers."""
    flags = Path("/proc/cpuinfo").read_text().split()
    return [name for name in ("avx512_bf16", "amx_bf16", "avx512_vnni", "amx_int8") if name in flags] or [
        "no such instructions"
    ]


def load(reader: str, kind: str) -> RetroForCausalLM:
    if reader == "parallel_context":
        return retrofit(BASE, reader=reader, chunk_size=CHUNK, neighbor_size=SIZE, base_kwargs=KINDS[kind]).eval()
    return RetroForCausalLM.from_pretrained(ADAPTERS["retro"], backbone_name_or_path=BASE, **KINDS[kind]).eval()


@torch.no_grad()
def measure(model: RetroForCausalLM, reads: bool) -> dict[str, float]:
    """CPU seconds of a prompt, and milliseconds of a token after it."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(100, 40_000, (1, PROMPT), generator=generator)
    passages = torch.randint(100, 40_000, (1, 1, PASSAGES, SIZE), generator=generator)
    given = {"neighbor_input_ids": passages.expand(1, PROMPT // CHUNK, -1, -1)} if reads else {}
    model(ids[:, :CHUNK], **{name: values[:, :1] for name, values in given.items()}, use_cache=False)  # known passages
    start = time.process_time()
    output = model(ids, **given, use_cache=True, logits_to_keep=1)
    first = time.process_time()
    cache, token = output.past_key_values, output.logits[:, -1:].argmax(dim=-1)
    for _ in range(STEPS):
        token = model(token, past_key_values=cache, use_cache=True).logits[:, -1:].argmax(dim=-1)
    return {"prompt": first - start, "token": (time.process_time() - first) / STEPS * 1000}


@torch.no_grad()
def nats(model: RetroForCausalLM, texts: list[torch.Tensor]) -> float:
    losses = [float(model(ids, labels=ids, retriever=None).loss) * (ids.shape[1] - 1) for ids in texts]
    return sum(losses) / sum(ids.shape[1] - 1 for ids in texts)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--publish", action="store_true")
    args = parser.parse_args()
    torch.set_num_threads(1)
    load_base(BASE)
    tokenizer = AutoTokenizer.from_pretrained(BASE)
    heldout, _ = load_parts("bible", 6)
    texts = [tokenizer(one["text"], return_tensors="pt").input_ids[:, :256] for one in heldout]
    runs: dict[str, list[dict[str, float]]] = {}
    losses = {}
    for reader in ("parallel_context", "cross_attention"):
        models = {kind: load(reader, kind) for kind in KINDS}
        losses |= {f"{reader}, {kind}": nats(model, texts) for kind, model in models.items()}
        for _ in range(args.rounds):
            for kind, model in models.items():
                for way in ("off", "on"):
                    runs.setdefault(f"{reader}, {kind}, {way}", []).append(measure(model, way == "on"))
    table = {}
    for name, rows in runs.items():
        reader, kind, way = name.split(", ")
        row = {key: statistics.median(one[key] for one in rows) for key in rows[0]}
        row |= {f"{key}_spread": [min(one[key] for one in rows), max(one[key] for one in rows)] for key in rows[0]}
        plain = runs[f"{reader}, float32, {way}"]
        for key in rows[0]:
            row[f"{key}_float32_by_this"] = statistics.median(
                a[key] / b[key] for a, b in zip(plain, rows, strict=True)
            )
        table[name] = row
    print(json.dumps({"table": table, "nats": losses}, indent=1))
    if args.publish:
        record = {
            "command": "python benchmarks/cpu_weights.py --publish",
            "seed": 0,
            "versions": {"retro-hf": __version__}
            | {name: version(name) for name in ("torch", "transformers", "torchao")},
            "machine": f"{platform.machine()} with {' and '.join(instructions())}, 1 thread, CPU time",
        }
        path = ROOT / "benchmarks" / "results" / "cpu_weights.json"
        path.write_text(json.dumps(record | {"table": table, "nats": losses}, indent=1) + "\n")


if __name__ == "__main__":
    main()
