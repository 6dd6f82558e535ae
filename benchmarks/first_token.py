"""What does it cost to read k passages? In the prompt, in parallel context, and through the shipped adapter.

    python benchmarks/first_token.py              # about 15 minutes of CPU time on one core; continues if it is stopped
    python benchmarks/first_token.py --publish    # the same, and then writes benchmarks/results/first_token.json

A text of 1,024 tokens is given, and 1, 5 or 20 passages of 128 tokens; and one of 4,096 tokens with 20. The next token depends on all of them:

| reader        | how the passages are read                                                                                   |
| ------------- | ----------------------------------------------------------------------------------------------------------- |
| `off`         | not at all                                                                                                  |
| `in_context`  | as the beginning of the prompt                                                                              |
| `cold`        | `reader="parallel_context"`, from the last 64 tokens of the text on, as a question is read; new passages    |
| `warm`        | the same, when the passages were encoded for an earlier request                                             |
| `retro`       | `hub_configs/retro-smollm2-135m-mixed`, by the text's last token, which completes a chunk                   |
| `exchange`    | `in_context` and `warm` and `retro` again, where a chunk ends and other passages take the place of the first |

`first_token` is the CPU time from the text to the scores of the next token, `next_token` that of each of 16 further ones, and
`exchange` that of the first token that reads other passages: the prompt is computed again as a whole, a reader keeps the text.
`megabytes` are the keys and values of one request; `shared_megabytes` those of passages that other requests use, too.
The base is SmolLM2-135M-Instruct in float32, tokens are random, and searching costs all readers the same.
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


ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "examples"))
from readers import BASE, CHUNK_SIZE, NEIGHBOR_SIZE, load  # noqa: E402
from retrofit_smollm2 import load_base  # noqa: E402

from retro_hf import __version__  # noqa: E402
from retro_hf.model.neighbor_cache_retro import NeighborCache  # noqa: E402


CASES = ((1024, 1), (1024, 5), (1024, 20), (4096, 20))  # tokens of text, and passages
QUESTION, STEPS = 64, 16
READERS = {
    "off": "off",
    "in_context": "in_context",
    "cold": "parallel_context",
    "warm": "parallel_context",
    "retro": "retro",
}


def neighbors(passages: torch.Tensor, num_chunks: int, first: int) -> dict[str, torch.Tensor]:
    """The passages (k, R) as neighbors of the chunks from `first` on."""
    ids = passages.expand(1, num_chunks, -1, -1)
    reads = (torch.arange(num_chunks) >= first)[None, :, None, None]
    return {"neighbor_input_ids": ids, "neighbor_attention_mask": reads.expand_as(ids).long()}


def num_bytes(tensors: Any) -> int:
    """Memory that some tensors hold, with the room in their buffers."""
    return sum(tensor.untyped_storage().nbytes() for tensor in tensors)


@torch.no_grad()
def measure(reader: str, model: Any, text: torch.Tensor, passages: torch.Tensor) -> dict[str, float]:
    """One reader once: CPU seconds, and megabytes."""
    num_chunks = text.shape[1] // CHUNK_SIZE
    given: dict[str, torch.Tensor] = {}
    inputs = text
    if reader == "in_context":
        inputs = torch.cat([passages.flatten(), text[0]]).unsqueeze(0)
    elif reader == "retro":
        given = neighbors(passages, num_chunks, num_chunks - 1)
    elif reader != "off":
        given = neighbors(passages, num_chunks, (text.shape[1] - QUESTION) // CHUNK_SIZE - 1)
        if reader == "cold":
            model.model.retro.cache = NeighborCache()
        else:
            model(text[:, :CHUNK_SIZE], **neighbors(passages, 1, 0), use_cache=False)  # an earlier request
    start = time.process_time()
    output = model(inputs, **given, use_cache=True, logits_to_keep=1)
    first = time.process_time()
    cache, token = output.past_key_values, output.logits[:, -1:].argmax(dim=-1)
    for _ in range(STEPS):
        token = model(token, past_key_values=cache, use_cache=True).logits[:, -1:].argmax(dim=-1)
    result = {"first_token": first - start, "next_token": (time.process_time() - first) / STEPS}
    size = num_bytes(part for layer in cache.layers for part in (layer.keys, layer.values))
    if reader == "retro":
        size += num_bytes(part for pair in cache.retrieval_state.key_values.values() for part in pair)
    result["megabytes"] = size / 1e6
    result["shared_megabytes"] = model.model.retro.cache.num_bytes / 1e6 if given and reader != "retro" else 0.0
    return result


@torch.no_grad()
def exchange(reader: str, model: Any, text: torch.Tensor, passages: torch.Tensor) -> float:
    """CPU seconds of the first token that reads `passages` after a text that read others."""
    others = passages.flip(1)
    if reader == "in_context":
        inputs = torch.cat([passages.flatten(), text[0]]).unsqueeze(0)
        start = time.process_time()
        model(inputs, use_cache=True, logits_to_keep=1)
        return time.process_time() - start
    num_chunks = text.shape[1] // CHUNK_SIZE
    known = neighbors(passages, num_chunks, num_chunks - 1)
    if reader == "warm":
        model(text[:, :CHUNK_SIZE], **neighbors(passages, 1, 0), use_cache=False)
    earlier = neighbors(others, num_chunks - 1, num_chunks - 2)
    cache = model(text[:, :-1], **earlier, use_cache=True, logits_to_keep=1).past_key_values
    start = time.process_time()
    model(text[:, -1:], **known, past_key_values=cache, use_cache=True)
    return time.process_time() - start


def run(context: int, count: int, models: dict[str, Any], seed: int) -> dict[str, dict[str, float]]:
    """All readers once, in turn."""
    generator = torch.Generator().manual_seed(seed)
    text = torch.randint(100, 40_000, (1, context), generator=generator)
    passages = torch.randint(100, 40_000, (count, NEIGHBOR_SIZE), generator=generator)
    results = {}
    for reader, name in READERS.items():
        results[reader] = measure(reader, models[name], text, passages)
        if reader in ("in_context", "warm", "retro"):
            results[reader]["exchange"] = exchange(reader, models[name], text, passages)
    return results


def summary(runs: list[dict]) -> dict[str, dict[str, Any]]:
    """Medians of all runs, with the smallest and the largest time, and what the prompt costs beside them."""
    table: dict[str, dict[str, Any]] = {}
    for reader in READERS:
        row = table[reader] = {}
        for key in runs[0][reader]:
            values = [one[reader][key] for one in runs]
            row[key] = statistics.median(values)
            if "megabytes" not in key:
                row[f"{key}_spread"] = [min(values), max(values)]
        row["prompt_by_this"] = statistics.median(
            one["in_context"]["first_token"] / one[reader]["first_token"] for one in runs
        )
    return table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--publish", action="store_true", help="write benchmarks/results/first_token.json")
    args = parser.parse_args()
    torch.set_num_threads(1)
    load_base(BASE)
    models = {name: load(name) for name in dict.fromkeys(READERS.values())}
    path = Path("demo_output/readers/first_token.json")
    path.parent.mkdir(parents=True, exist_ok=True)
    kept: dict[str, list] = json.loads(path.read_text()) if path.exists() else {}
    for repeat in range(args.repeats):
        for context, count in CASES:
            runs = kept.setdefault(f"{context}_tokens_{count}_passages", [])
            if len(runs) <= repeat:
                runs.append(run(context, count, models, seed=repeat))
                path.write_text(json.dumps(kept, indent=1) + "\n")
                seconds = {name: round(row["first_token"], 3) for name, row in runs[-1].items()}
                print(f"{context} tokens, {count} passages: {seconds}", flush=True)
    tables = {name: summary(runs) for name, runs in kept.items()}
    print(json.dumps(tables, indent=1))
    if args.publish:
        published = {
            "command": f"python benchmarks/first_token.py --repeats {args.repeats} --publish",
            "machine": f"{platform.machine()}, 1 thread, float32, CPU seconds",
            "versions": {"retro-hf": __version__} | {name: version(name) for name in ("torch", "transformers")},
            "tables": tables,
        }
        path = ROOT / "benchmarks" / "results" / "first_token.json"
        path.write_text(json.dumps(published, indent=1) + "\n")


if __name__ == "__main__":
    main()
