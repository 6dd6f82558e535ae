"""retro-hf beside retro-pytorch 0.3.9: forward, training, memory and generation, in one run on the same machine.

    python benchmarks/peers.py                      # about 15 minutes on 2 cores; writes benchmarks/results/peers.json
    python benchmarks/peers.py --lengths 256        # a quick look

Every measurement runs in a process of its own, so that its peak memory is its own, and the contestants take turns
`--rounds` times; the table shows medians and, in brackets, the smallest and largest value. The peer needs
`pip install einops && pip install --no-deps retro-pytorch==0.3.9`: its data pipeline no longer imports with NumPy 2, so
the three packages that only this pipeline uses are replaced by empty modules.

Shape: vocabulary 30522, d 512, 12 decoder and 2 encoder layers, 8 heads of 64, feed-forward 4 d, cross-attention in
layers 6, 9, 12 and in encoder layer 1 (counted from 1), chunks of 64, 2 neighbors of 128 tokens, float32, random
weights, random neighbors. Retrieval itself is left out on both sides. `rope` is a GPT-NeoX backbone of the same shape
(rotary positions on half of each head, as the peer has them); `paper` is the paper's decoder.
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
import types
from pathlib import Path


VOCAB, WIDTH, LAYERS, HEADS, CHUNK, NEIGHBORS, SIZE = 30522, 512, 12, 8, 64, 2, 128
CONTESTANTS = ("peer", "rope", "paper")
PROMPT, END = 64, 1024
PROBES = (64, 128, 256, 512, 768, 1023)  # lengths at which the peer's cost per token is measured


def build_peer(max_length: int):
    """The peer's model; `max_length` in tokens."""
    for name in ("autofaiss", "embedding_reader", "sentencepiece"):
        sys.modules[name] = types.ModuleType(name)
    sys.modules["autofaiss"].build_index = None
    from retro_pytorch import RETRO

    return RETRO(
        num_tokens=VOCAB,
        max_seq_len=max_length,
        enc_dim=WIDTH,
        enc_depth=2,
        enc_cross_attn_layers=(1,),
        dec_dim=WIDTH,
        dec_depth=LAYERS,
        dec_cross_attn_layers=(6, 9, 12),
        heads=HEADS,
        dim_head=WIDTH // HEADS,
        chunk_size=CHUNK,
    )


def build_ours(backbone: str, max_length: int):
    """Our model over `backbone`, "rope" or "paper"."""
    from transformers import GPTNeoXConfig

    from retro_hf import RetroConfig, RetroDecoderConfig, RetroForCausalLM

    shape = {
        "vocab_size": VOCAB,
        "hidden_size": WIDTH,
        "intermediate_size": 4 * WIDTH,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": HEADS,
        "max_position_embeddings": max_length,
        "tie_word_embeddings": False,
    }
    if backbone == "rope":
        rope = {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.5}
        text_config = GPTNeoXConfig(
            **shape, use_parallel_residual=False, rope_parameters=rope, bos_token_id=0, eos_token_id=0
        )
    else:
        text_config = RetroDecoderConfig(**shape, head_dim=WIDTH // HEADS)
    encoder = {"hidden_size": WIDTH, "intermediate_size": 4 * WIDTH, "num_attention_heads": HEADS, "head_dim": 64}
    return RetroForCausalLM(
        RetroConfig(text_config=text_config, neighbor_encoder_config=encoder, chunk_size=CHUNK, share_embeddings=True)
    )


def seconds(function, repeats: int) -> float:
    """Median time of `repeats` calls after one to warm up."""
    function()
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        function()
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def measure(who: str, task: str, length: int, repeats: int) -> dict:
    """One measurement in this process: seconds, and peak resident memory in MB."""
    import torch

    torch.manual_seed(0)
    model = build_peer(max(length, END)) if who == "peer" else build_ours(who, 2048)
    tokens = torch.randint(1, VOCAB, (1, length + 1))
    neighbors = torch.randint(1, VOCAB, (1, max(length, END) // CHUNK, NEIGHBORS, SIZE))
    now = neighbors[:, : length // CHUNK]
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    result = {"parameters": sum(p.numel() for p in model.parameters())}

    if task == "forward":
        model.eval()

        def run():
            with torch.no_grad():
                if who == "peer":
                    return model(tokens[:, :-1], retrieved=now)
                return model(tokens[:, :-1], neighbor_input_ids=now, use_cache=False)

        result["seconds"] = seconds(run, repeats)
    elif task == "train":
        model.train()

        def run():
            model.zero_grad(set_to_none=True)
            if who == "peer":
                model(tokens, retrieved=now, return_loss=True).backward()
            else:
                # The peer predicts token t + 1 from t over `length` positions; labels are shifted inside our loss.
                labels = torch.cat([tokens[:, :1], tokens[:, 1:]], dim=1)[:, :-1]
                model(tokens[:, :-1], labels=labels, neighbor_input_ids=now, use_cache=False).loss.backward()

        result["seconds"] = seconds(run, repeats)
    elif task == "generate" and who == "peer":
        # The peer recomputes the whole sequence for every token, so its cost is measured at some lengths and summed.
        model.eval()
        per_token = {}
        for probe in PROBES:
            part, seen = tokens[:, :probe], neighbors[:, : probe // CHUNK]

            def run(part=part, seen=seen):
                with torch.no_grad():
                    return model(part, retrieved=seen)

            per_token[probe] = seconds(run, repeats)
        points = sorted(per_token)
        total = sum((per_token[a] + per_token[b]) / 2 * (b - a) for a, b in zip(points, points[1:], strict=False))
        result |= {"seconds": total, "per_token": per_token, "extrapolated": True}
    else:
        model.eval()
        stamps = []

        class Clock:
            def put(self, value):
                stamps.append(time.perf_counter())

            def end(self):
                pass

        for _ in range(2):  # the first run warms up
            stamps.clear()
            model.generate(
                tokens[:, :PROMPT],
                neighbor_input_ids=neighbors,
                max_new_tokens=END - PROMPT,
                do_sample=False,
                eos_token_id=None,
                pad_token_id=0,
                streamer=Clock(),
            )
        steps = [b - a for a, b in zip(stamps, stamps[1:], strict=False)]
        per_token = {p: statistics.median(steps[max(p - PROMPT - 32, 1) : p - PROMPT + 32]) for p in PROBES}
        result |= {"seconds": stamps[-1] - stamps[0], "per_token": per_token, "extrapolated": False}
    result["peak_mb"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    result["before_mb"] = before
    return result


def spread(values: list[float]) -> str:
    """Median with smallest and largest value."""
    return f"{statistics.median(values):.2f} [{min(values):.2f}–{max(values):.2f}]"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lengths", type=int, nargs="+", default=[1024, 2048], help="sequence lengths in tokens")
    parser.add_argument("--rounds", type=int, default=3, help="how often the contestants take turns")
    parser.add_argument("--repeats", type=int, default=3, help="calls per measurement")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--skip-generate", action="store_true")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/peers.json"))
    parser.add_argument("--one", nargs=3, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        who, task, length = args.one
        print("RESULT" + json.dumps(measure(who, task, int(length), args.repeats)))
        return

    threads = str(args.threads)
    environment = os.environ | {"OMP_NUM_THREADS": threads, "MKL_NUM_THREADS": threads, "HF_HUB_OFFLINE": "1"}
    tasks = [(task, length) for length in args.lengths for task in ("forward", "train")]
    tasks += [] if args.skip_generate else [("generate", END)]
    results: dict[str, dict[str, list[dict]]] = {}
    for task, length in tasks:
        for _ in range(1 if task == "generate" else args.rounds):
            for who in CONTESTANTS:
                command = [sys.executable, __file__, "--one", who, task, str(length), "--repeats", str(args.repeats)]
                done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
                if done.returncode:
                    sys.exit(f"{who} {task} {length} failed:\n{done.stderr[-2000:]}")
                line = next(line for line in done.stdout.splitlines() if line.startswith("RESULT"))
                results.setdefault(f"{task} {length}", {}).setdefault(who, []).append(json.loads(line[6:]))

    print(f"| {'measurement':<24} | {'peer':>22} | {'rope':>22} | {'paper':>22} | peer / rope | peer / paper |")
    print("|---|---|---|---|---|---|")
    for name, rows in results.items():
        for key, unit in (("seconds", "s"), ("peak_mb", "MB")):
            values = {who: [row[key] for row in rows[who]] for who in CONTESTANTS}
            ratios = [statistics.median(values["peer"]) / statistics.median(values[who]) for who in ("rope", "paper")]
            cells = " | ".join(f"{spread(values[who]):>22}" for who in CONTESTANTS)
            print(f"| {name + ', ' + unit:<24} | {cells} | {ratios[0]:>10.2f}x | {ratios[1]:>11.2f}x |")
    if "generate 1024" in results:
        print("\nmilliseconds per token at length", *PROBES)
        for who in CONTESTANTS:
            per_token = results["generate 1024"][who][0]["per_token"]
            print(f"  {who:<6}", *(f"{1000 * value:.1f}" for value in per_token.values()))

    import torch
    import transformers

    record = {
        "command": " ".join(["python", *sys.argv]),
        "seed": 0,
        "versions": {"torch": torch.__version__, "transformers": transformers.__version__, "retro-pytorch": "0.3.9"},
        "machine": f"{platform.processor() or platform.machine()}, {args.threads} threads",
        "results": results,
    }
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
