"""Decoding with steps that are compiled between chunk borders, compared to eager decoding, in turns in one run.

    python benchmarks/compiled_decoding.py              # about 5 minutes on 1 core; needs a C++ compiler
    python benchmarks/compiled_decoding.py --models 80m-rope --new-tokens 40    # a quick look
    python benchmarks/compiled_decoding.py --device cuda --out benchmarks/results/compiled_decoding_gpu.json

`eager` is `generate` as it is by default, `static` has a static cache, `compiled` the same cache and compiled steps: by
inductor, and on a GPU with CUDA graphs. Neighbors are given, so that no search is measured. `toy` is hub_configs/retro-bible;
`80m-rope` and `80m-paper` are those of benchmarks/peers.py. `narrow` has the layers of `80m-rope` and a width of 64: it computes
next to nothing, so its time is that of the Python code and of the calls of kernels, for which a GPU would wait. One row, a prompt of 64 tokens, random tokens. Time is that of the
processor on one thread, and on a GPU that of the clock. The first call of each kind warms up, and its time is what compiling costs.

Predicted before the first run: on a CPU the toy, whose steps are mostly Python code, decodes 2 times as fast as eager. The models
of 80 million parameters gain nothing (0.95 to 1.1): a trial of 80m-rope had shown 19 to 21 ms with and without. On a GPU, where a
step waits for its launches, 80m-rope decodes 5 times as fast. Before its first run, for `narrow`: 3 times.
"""

import argparse
import json
import os
import platform
import statistics
import time
from pathlib import Path


os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")

import torch  # noqa: E402
import transformers  # noqa: E402
from peers import VOCAB, build_ours  # noqa: E402
from transformers import AutoModelForCausalLM, GPTNeoXConfig  # noqa: E402
from transformers.generation import CompileConfig  # noqa: E402

from retro_hf import RetroConfig, RetroForCausalLM, __version__  # noqa: E402


ROOT = Path(__file__).resolve().parents[1]
MODELS = ("narrow", "toy", "80m-rope", "80m-paper")
PROMPT, SEED = 64, 0


def build(name: str):
    """The model `name` of `MODELS`, ready to generate."""
    torch.manual_seed(SEED)
    if name == "toy":
        return AutoModelForCausalLM.from_pretrained(ROOT / "hub_configs" / "retro-bible", dtype=torch.float32)
    if name == "narrow":
        width, heads = 64, 8
        sizes = {"hidden_size": width, "intermediate_size": 4 * width, "num_attention_heads": heads}
        text_config = GPTNeoXConfig(vocab_size=1000, num_hidden_layers=12, max_position_embeddings=2048, **sizes)
        encoder = {**sizes, "head_dim": width // heads}
        config = RetroConfig(
            text_config=text_config, neighbor_encoder_config=encoder, chunk_size=64, share_embeddings=True
        )
        return RetroForCausalLM(config).eval()
    return build_ours(name.removeprefix("80m-"), 2048).eval()


def measure(name: str, new_tokens: int, rounds: int, device: str) -> dict:
    """Milliseconds per new token of every kind of decoding, and seconds to compile."""
    on_gpu = device != "cpu"
    clock = time.perf_counter if on_gpu else time.process_time
    model = build(name).to(device)
    config = model.config
    length = PROMPT + new_tokens
    size = config.neighbor_size or 2 * config.chunk_size
    ids = torch.randint(3, min(config.vocab_size, VOCAB), (1, PROMPT), device=device)
    shape = (1, length // config.chunk_size, config.num_neighbors, size)
    neighbors = torch.randint(3, min(config.vocab_size, VOCAB), shape, device=device)
    options = {"do_sample": False, "eos_token_id": None, "pad_token_id": 0, "max_new_tokens": new_tokens}
    compiler = CompileConfig(fullgraph=True, mode="reduce-overhead" if on_gpu else "default")
    compiler._compile_all_devices = True
    static = {"cache_implementation": "static"}
    kinds = {
        "eager": {},
        "static": {**static, "disable_compile": True},
        "compiled": {**static, "compile_config": compiler},
    }

    def run(kind: str) -> tuple[float, torch.Tensor]:
        start = clock()
        tokens = model.generate(ids, neighbor_input_ids=neighbors, **options, **kinds[kind])
        if on_gpu:
            torch.cuda.synchronize()
        return clock() - start, tokens

    began = time.perf_counter()
    first = {kind: run(kind)[0] for kind in kinds}
    print(f"{name}: first calls { ({kind: round(value, 1) for kind, value in first.items()}) }", flush=True)
    times: dict[str, list[float]] = {kind: [] for kind in kinds}
    same = True
    for _ in range(rounds):
        tokens = {}
        for kind in kinds:
            seconds, tokens[kind] = run(kind)
            times[kind].append(round(1000 * seconds / new_tokens, 3))
        same = same and all(torch.equal(tokens["eager"], other) for other in tokens.values())
    compiled_gain = [one / other for one, other in zip(times["eager"], times["compiled"], strict=True)]
    return {
        "ms_per_token": times,
        "eager_by_compiled": [round(gain, 3) for gain in compiled_gain],
        "first_call_seconds": {kind: round(value, 1) for kind, value in first.items()},
        "same_tokens": same,
        "clock_seconds": round(time.perf_counter() - began, 1),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=MODELS, default=MODELS)
    parser.add_argument("--new-tokens", type=int, default=200)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "compiled_decoding.json")
    args = parser.parse_args()
    torch.set_num_threads(1)
    found = {name: measure(name, args.new_tokens, args.rounds, args.device) for name in args.models}
    print("| model | eager | static cache | compiled | eager by compiled |\n|---|---|---|---|---|")
    for name, row in found.items():
        cells = [
            f"{statistics.median(values):.1f} ({min(values):.1f}–{max(values):.1f})"
            for values in row["ms_per_token"].values()
        ]
        gains = row["eager_by_compiled"]
        gain = f"{statistics.median(gains):.2f} ({min(gains):.2f}–{max(gains):.2f})"
        print(f"| {name} | {' | '.join(cells)} | {gain} |")
    command = "python benchmarks/compiled_decoding.py" + ("" if args.device == "cpu" else f" --device {args.device}")
    record = {
        "command": f"{command} --new-tokens {args.new_tokens} --rounds {args.rounds}",
        "seed": SEED,
        "machine": f"{platform.machine()}, 1 thread, CPU seconds"
        if args.device == "cpu"
        else torch.cuda.get_device_name(),
        "versions": {
            "retro-hf": __version__,
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "python": platform.python_version(),
        },
        "results": found,
    }
    args.out.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
