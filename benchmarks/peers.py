"""retro-hf compared to retro-pytorch 0.3.9: forward, training, memory and generation, in turns on the same machine.

    python benchmarks/peers.py                      # about 15 minutes on 2 cores; writes benchmarks/results/peers.json
    python benchmarks/peers.py --lengths 256        # a quick look
    python benchmarks/peers.py --device cuda --batch-size 8 --out benchmarks/results/peers_gpu.json   # bfloat16 autocast

An interrupted run resumes where it stopped. Every measurement runs in a process of its own, so that its peak memory
is its own, and the contestants take turns `--rounds` times; the table shows medians and, in brackets, the smallest and
largest value. The peer needs `pip install einops && pip install --no-deps retro-pytorch==0.3.9`: its data pipeline no
longer imports with NumPy 2, so the three packages that only this pipeline uses are replaced by empty modules.

Shape: vocabulary 30522, d 512, 12 decoder and 2 encoder layers, 8 heads of 64, feed-forward 4 d, cross-attention in
layers 6, 9, 12 and in encoder layer 1 (counted from 1), chunks of 64, 2 neighbors of 128 tokens, float32, random
weights, random neighbors. Retrieval itself is left out on both sides. `rope` is a GPT-NeoX backbone of the same shape
(rotary positions on half of each head, as the peer has them); `paper` is the paper's decoder; `off` is `rope` without
neighbors, so that the difference is what reading them costs.
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
CONTESTANTS = ("peer", "rope", "paper", "off")
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
    """Our model over `backbone`, "rope" or "paper"; "off" has that of "rope"."""
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
    if backbone != "paper":
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


def seconds(function, repeats: int, finish) -> float:
    """Median time of `repeats` calls after one to warm up; `finish` waits for the device."""
    function()
    times = []
    for _ in range(repeats):
        finish()
        start = time.perf_counter()
        function()
        finish()
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def measure(who: str, task: str, length: int, repeats: int, device: str, batch_size: int) -> dict:
    """One measurement in this process: seconds, and peak memory in MB, resident on the CPU, allocated on a GPU.

    On a GPU in bfloat16 autocast, as training is done there; generation in float32 and of one row, as everywhere.
    """
    import torch

    on_gpu = device != "cpu"
    finish = torch.cuda.synchronize if on_gpu else lambda: None
    rows = 1 if task == "generate" else batch_size
    torch.manual_seed(0)
    model = (build_peer(max(length, END)) if who == "peer" else build_ours(who, 2048)).to(device)
    tokens = torch.randint(1, VOCAB, (rows, length + 1)).to(device)
    neighbors = torch.randint(1, VOCAB, (rows, max(length, END) // CHUNK, NEIGHBORS, SIZE)).to(device)
    if who == "off":
        neighbors = None
    now = None if neighbors is None else neighbors[:, : length // CHUNK]
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    result = {"parameters": sum(p.numel() for p in model.parameters())}

    if task == "forward":
        model.eval()

        def run():
            with torch.no_grad(), torch.autocast(device, torch.bfloat16, enabled=on_gpu):
                if who == "peer":
                    return model(tokens[:, :-1], retrieved=now)
                return model(tokens[:, :-1], neighbor_input_ids=now, use_cache=False)

        result["seconds"] = seconds(run, repeats, finish)
    elif task == "train":
        model.train()

        def run():
            model.zero_grad(set_to_none=True)
            with torch.autocast(device, torch.bfloat16, enabled=on_gpu):
                if who == "peer":
                    loss = model(tokens, retrieved=now, return_loss=True)
                else:
                    # The peer predicts token t + 1 from t over `length` positions; labels are shifted inside our loss.
                    labels = torch.cat([tokens[:, :1], tokens[:, 1:]], dim=1)[:, :-1]
                    loss = model(tokens[:, :-1], labels=labels, neighbor_input_ids=now, use_cache=False).loss
            loss.backward()

        result["seconds"] = seconds(run, repeats, finish)
    elif task == "generate" and who == "peer":
        # The peer recomputes the whole sequence for every token, so its cost is measured at some lengths and summed.
        model.eval()
        per_token = {}
        for probe in PROBES:
            part, seen = tokens[:, :probe], neighbors[:, : probe // CHUNK]

            def run(part=part, seen=seen):
                with torch.no_grad():
                    return model(part, retrieved=seen)

            per_token[probe] = seconds(run, repeats, finish)
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
    if on_gpu:
        result["peak_mb"] = torch.cuda.max_memory_allocated() / 2**20
    else:
        result["peak_mb"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
        result["before_mb"] = before
    return result


def spread(values: list[float]) -> str:
    """Median with smallest and largest value."""
    return f"{statistics.median(values):.4g} [{min(values):.4g}–{max(values):.4g}]"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lengths", type=int, nargs="+", default=[1024, 2048], help="sequence lengths in tokens")
    parser.add_argument("--rounds", type=int, default=3, help="how often the contestants take turns")
    parser.add_argument("--repeats", type=int, default=3, help="calls per measurement")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--batch-size", type=int, default=1, help="sequences per call, but for generation")
    parser.add_argument("--skip-generate", action="store_true")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/peers.json"))
    parser.add_argument("--one", nargs=3, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        who, task, length = args.one
        print("RESULT" + json.dumps(measure(who, task, int(length), args.repeats, args.device, args.batch_size)))
        return

    threads = str(args.threads)
    environment = os.environ | {"OMP_NUM_THREADS": threads, "MKL_NUM_THREADS": threads, "HF_HUB_OFFLINE": "1"}
    tasks = [(task, length) for length in args.lengths for task in ("forward", "train")]
    tasks += [] if args.skip_generate else [("generate", END)]
    partial = args.out.with_suffix(".partial.json")  # of a run that was broken off
    args.out.parent.mkdir(parents=True, exist_ok=True)
    results: dict[str, dict[str, list[dict]]] = json.loads(partial.read_text()) if partial.exists() else {}
    for task, length in tasks:
        for number in range(1 if task == "generate" else args.rounds):
            for who in CONTESTANTS:
                rows = results.setdefault(f"{task} {length}", {}).setdefault(who, [])
                if number < len(rows):
                    continue
                command = [sys.executable, __file__, "--one", who, task, str(length), "--repeats", str(args.repeats)]
                command += ["--device", args.device, "--batch-size", str(args.batch_size)]
                done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
                if done.returncode:
                    sys.exit(f"{who} {task} {length} failed:\n{done.stderr[-2000:]}")
                line = next(line for line in done.stdout.splitlines() if line.startswith("RESULT"))
                rows.append(json.loads(line[6:]))
                partial.write_text(json.dumps(results))

    print(
        f"| {'measurement':<24} | {' | '.join(f'{who:>24}' for who in CONTESTANTS)} | peer / rope | peer / paper | rope / off |"
    )
    print("|---" * (len(CONTESTANTS) + 4) + "|")
    for name, rows in results.items():
        for key, unit in (("seconds", "s"), ("peak_mb", "MB")):
            values = {who: [row[key] for row in rows[who]] for who in CONTESTANTS}
            middle = {who: statistics.median(values[who]) for who in CONTESTANTS}
            cells = " | ".join(f"{spread(values[who]):>24}" for who in CONTESTANTS)
            ratios = [
                middle["peer"] / middle["rope"],
                middle["peer"] / middle["paper"],
                middle["rope"] / middle["off"],
            ]
            print(f"| {name + ', ' + unit:<24} | {cells} | {' | '.join(f'{ratio:.2f}x' for ratio in ratios)} |")
    if "generate 1024" in results:
        print("\nmilliseconds per token at length", *PROBES)
        for who in CONTESTANTS:
            per_token = results["generate 1024"][who][0]["per_token"]
            print(f"  {who:<6}", *(f"{1000 * value:.1f}" for value in per_token.values()))

    import torch
    import transformers

    machine = f"{platform.processor() or platform.machine()}, {args.threads} threads"
    if args.device != "cpu":
        machine = f"{torch.cuda.get_device_name()}, bfloat16 autocast, {args.batch_size} sequences a call"
    record = {
        "command": " ".join(["python", *sys.argv]),
        "seed": 0,
        "versions": {"torch": torch.__version__, "transformers": transformers.__version__, "retro-pytorch": "0.3.9"},
        "machine": machine,
        "results": results,
    }
    args.out.write_text(json.dumps(record, indent=1) + "\n")
    partial.unlink()


if __name__ == "__main__":
    main()
