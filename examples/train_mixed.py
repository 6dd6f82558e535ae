"""Train a reader for SmolLM2-135M, which stays frozen, on eighteen kinds of text, so that it reads kinds that it has never seen.

    python examples/train_mixed.py --steps 180 --batch-size 6                    # half an hour on one CPU core
    python examples/train_mixed.py --device cuda --steps 3000 --batch-size 32    # some minutes on a large GPU
    torchrun --nproc_per_node 3 examples/train_mixed.py                          # the batch is divided among processes

The reader begins with `start_by_copying`, so it copies a little before the first step. Each chunk of 32 tokens reads one to three
neighbors from other documents of the same kind, found by BM25 over tokens. In a fifth of the windows one of them is a copy of what
comes next, with errors, so that copying is learned for every kind of text; 25 % of the chunks read random chunks.

Everything is resumed: windows that are in `--output` are not made again, and training goes on from its last checkpoint. `--minutes` breaks
off after so many minutes, to be continued by the same command. `--prepare` only makes the windows, which takes no GPU. Losses of
validation kinds are printed and saved in `training.json`; on kinds held out altogether `benchmarks/readers.py` measures.
"""

import argparse
import hashlib
import json
import math
import os
import random
import sys
import time
from pathlib import Path

import numpy as np
import scipy.sparse
import torch
import torch.distributed as dist
import transformers
from retrofit_smollm2 import load_base
from text_kinds import TRAIN, VALIDATION, in_random_order, load_documents
from torch.nn.functional import cross_entropy
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from retro_hf import RetroEncoderConfig, RetroForCausalLM, retrofit
from retro_hf.retrofit import parameter_report
from retro_hf.training import start_by_copying


CHUNK_SIZE, NEIGHBOR_SIZE, NUM_NEIGHBORS, WINDOW, FOUND = 32, 128, 2, 256, 20
LAYERS = [16, 22, 28]
WINDOWS = dict.fromkeys(TRAIN, 350) | {"bible": 900, "rust": 1000, "linux": 700, "manual": 600, "perl": 500}
WATCHED = 24  # windows of each validation kind
STORED = {"bible": 3_000_000}  # tokens of each kind that neighbors come from
STORED_OTHERWISE = 1_000_000
BIGRAMS = 1 << 19


# ── windows and their neighbors ───────────────────────────────────────────────────────────────────────────────────────


class Kind:
    """The chunks of a kind of text, windows of it, and the chunks that are nearest to each of a window's chunks."""

    def __init__(self, path: Path):
        with np.load(path) as arrays:
            self.tokens, self.starts, self.ends = arrays["tokens"], arrays["starts"], arrays["ends"]
            self.windows, self.sources, self.nearest = arrays["windows"], arrays["sources"], arrays["nearest"]

    def gather(self, chunks: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Tokens and mask of chunks with what follows them, `(..., NEIGHBOR_SIZE)`; nothing where the number is -1."""
        start = self.starts[np.maximum(chunks, 0)]
        length = np.minimum(self.ends[np.maximum(chunks, 0)] - start, NEIGHBOR_SIZE)
        mask = (np.arange(NEIGHBOR_SIZE) < length[..., None]) & (chunks >= 0)[..., None]
        at = np.minimum(start[..., None] + np.arange(NEIGHBOR_SIZE), len(self.tokens) - 1)
        return np.where(mask, self.tokens[at], 0).astype(np.int64), mask

    def copy_with_errors(
        self, window: int, chunk: int, draw: np.random.Generator, errors: float = 0.12
    ) -> tuple[np.ndarray, np.ndarray]:
        """What a window says around the end of a chunk, with some tokens left out and some replaced."""
        source = self.sources[window]
        text = self.windows[window] if source < 0 else self.tokens[source : source + WINDOW + NEIGHBOR_SIZE]
        first = max((chunk + 1) * CHUNK_SIZE - int(draw.integers(0, 64)), 0)
        copy = text[first : first + NEIGHBOR_SIZE + 16].astype(np.int64)
        copy = copy[draw.random(len(copy)) > 0.4 * errors]
        others = self.tokens[draw.integers(0, len(self.tokens), len(copy))]
        copy = np.where(draw.random(len(copy)) < 0.6 * errors, others, copy)[:NEIGHBOR_SIZE]
        return np.pad(copy, (0, NEIGHBOR_SIZE - len(copy))), np.arange(NEIGHBOR_SIZE) < len(copy)


def _features(rows: list[np.ndarray]) -> scipy.sparse.csr_matrix:
    """Which tokens and which pairs of tokens (by their hash) each row has."""
    found = []
    for row in rows:
        ids = row.astype(np.int64)
        found.append(np.unique(np.concatenate([ids, 65536 + (ids[:-1] * 31337 + ids[1:]) % BIGRAMS])))
    ends = np.cumsum([0, *map(len, found)])
    ones = np.ones(ends[-1], dtype=np.float32)
    return scipy.sparse.csr_matrix((ones, np.concatenate(found), ends), shape=(len(rows), 65536 + BIGRAMS))


def _bm25(chunks: list[np.ndarray]) -> scipy.sparse.csr_matrix:
    """Weights by feature and chunk; what stands in more than a tenth of the chunks counts nothing."""
    features = _features(chunks)
    frequency = np.asarray((features > 0).sum(axis=0)).ravel()
    weight = np.log(1 + (len(chunks) - frequency + 0.5) / (frequency + 0.5)).astype(np.float32)
    weight[frequency > 0.1 * len(chunks)] = 0
    length = np.asarray(features.sum(axis=1)).ravel()
    scale = 1 / (1 + 1.2 * (0.25 + 0.75 * length / length.mean()))
    return (scipy.sparse.diags(scale) @ features @ scipy.sparse.diags(weight)).T.tocsr()


def make_windows(kind: str, count: int, path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    """Windows of a kind with the nearest chunks of other documents; long documents are cut, short ones joined."""
    draw, documents, total = random.Random(kind), [], 0
    texts = [document["text"] for document in in_random_order(load_documents(kind))]
    draw.shuffle(texts)
    for first in range(0, len(texts), 256):
        for ids in tokenizer(texts[first : first + 256], add_special_tokens=False).input_ids:
            if len(ids) >= 24:
                documents.append(np.array(ids[:12_000], dtype=np.uint16))
                total += len(documents[-1])
        if total > STORED.get(kind, STORED_OTHERWISE):
            break
    offsets = np.cumsum([0, *map(len, documents)])
    owner = np.concatenate([np.full(-(-len(ids) // CHUNK_SIZE), number) for number, ids in enumerate(documents)])
    starts = np.concatenate(
        [np.arange(offset, offset + len(ids), CHUNK_SIZE) for offset, ids in zip(offsets, documents, strict=False)]
    )
    tokens, ends = np.concatenate(documents), offsets[owner + 1]
    index = _bm25([tokens[a : min(a + CHUNK_SIZE, b)] for a, b in zip(starts, ends, strict=True)])

    windows, members, sources = [], [], []
    joined, joined_documents = np.empty(0, dtype=np.uint16), []
    order = list(range(len(documents)))
    draw.shuffle(order)
    for number in order:
        ids = documents[number]
        if len(ids) >= WINDOW + CHUNK_SIZE:
            for _ in range(min(3, 1 + len(ids) // 4000)):
                at = draw.randrange((len(ids) - WINDOW) // CHUNK_SIZE + 1) * CHUNK_SIZE
                windows.append(ids[at : at + WINDOW])
                members.append([number])
                sources.append(offsets[number] + at)
        else:
            joined = np.concatenate([joined, ids, np.zeros(1, dtype=np.uint16)])  # <|endoftext|>
            joined_documents.append(number)
            if len(joined) >= WINDOW:
                windows.append(joined[:WINDOW])
                members.append(joined_documents)
                sources.append(-1)
                joined, joined_documents = joined[:0], []
        if len(windows) >= 1.3 * count:
            break
    chosen = draw.sample(range(len(windows)), min(count, len(windows)))
    nearest = np.full((len(chosen), WINDOW // CHUNK_SIZE, FOUND), -1, dtype=np.int32)
    for row, window in enumerate(chosen):
        scores = (_features([*windows[window].reshape(-1, CHUNK_SIZE)]) @ index).toarray()
        scores[:, np.isin(owner, members[window])] = 0
        best = np.argsort(-scores, axis=1)[:, :FOUND]
        nearest[row] = np.where(np.take_along_axis(scores, best, axis=1) > 0, best, -1)
    partial = path.with_suffix(".partial.npz")
    np.savez(
        partial,
        tokens=tokens,
        starts=starts,
        ends=ends,
        windows=np.array([windows[window] for window in chosen]),
        sources=np.array([sources[window] for window in chosen]),
        nearest=nearest,
    )
    partial.replace(path)
    print(f"{kind}: {len(documents):,} documents, {len(starts):,} chunks, {len(chosen):,} windows", flush=True)


def make_batch(
    kinds: dict[str, Kind], rows: list[tuple[str, int]], draw: np.random.Generator, mode: str, shares: dict[str, float]
) -> dict[str, torch.Tensor]:
    """A batch of windows. `mode` is "on", "random" or "off", or "train" for neighbors of all sorts."""
    count = int(draw.choice([1, 2, 2, 2, 2, 2, 2, 3])) if mode == "train" else NUM_NEIGHBORS
    ids, neighbors, masks = [], [], []
    for name, window in rows:
        kind = kinds[name]
        ids.append(kind.windows[window].astype(np.int64))
        chunks = kind.nearest[window][:, :count].copy()
        if mode == "train":
            if draw.random() < 0.3:  # not always the best ones
                chunks = kind.nearest[window][:, np.sort(draw.permutation(2 * count)[:count])]
            wrong = draw.random(len(chunks)) < shares["random"]
            chunks[wrong] = draw.integers(0, len(kind.starts), (int(wrong.sum()), count))
        elif mode == "random":
            chunks = draw.integers(0, len(kind.starts), chunks.shape)
        tokens, mask = kind.gather(chunks)
        if mode == "train" and draw.random() < shares["copies"]:
            for chunk in np.flatnonzero(draw.random(len(chunks)) < 0.8):
                place = int(draw.integers(count))
                tokens[chunk, place], mask[chunk, place] = kind.copy_with_errors(window, chunk, draw)
        neighbors.append(tokens)
        masks.append(mask)
    batch = {"input_ids": np.stack(ids)}
    if mode != "off":
        batch |= {
            "neighbor_input_ids": np.stack(neighbors),
            "neighbor_attention_mask": np.stack(masks).astype(np.int64),
        }
    return {name: torch.from_numpy(values) for name, values in batch.items()}


# ── training ──────────────────────────────────────────────────────────────────────────────────────────────────────────


def loss_of(model: RetroForCausalLM, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """Nats per token after the first chunk, which reads nothing."""
    batch = {name: tensor.to(model.device) for name, tensor in batch.items()}
    with torch.autocast(model.device.type, dtype=torch.bfloat16):
        states = model.model(**batch, use_cache=False).last_hidden_state[:, CHUNK_SIZE - 1 : -1]
        logits = model.get_output_embeddings()(states)
    return cross_entropy(logits.float().flatten(0, 1), batch["input_ids"][:, CHUNK_SIZE:].flatten())


@torch.no_grad()
def watch(model: RetroForCausalLM, kinds: dict[str, Kind], count: int, shares: dict[str, float]) -> dict[str, float]:
    """Loss of the validation kinds, on, random and off."""
    losses = {}
    for name in VALIDATION:
        for mode in ("off", "on", "random"):
            draw, values = np.random.default_rng(1), []
            for first in range(0, count, 4):
                rows = [(name, row) for row in range(first, min(first + 4, count))]
                values.append(float(loss_of(model, make_batch(kinds, rows, draw, mode, shares))))
            losses[f"{name}/{mode}"] = round(sum(values) / len(values), 4)
    return losses


def new_reader(base: Path, kinds: dict[str, Kind], device: str) -> RetroForCausalLM:
    """The base in bfloat16, frozen, and a reader in float32 that begins by copying."""
    encoder = RetroEncoderConfig(
        hidden_size=512,
        intermediate_size=512,
        num_attention_heads=8,
        head_dim=64,
        cross_attention_layers=[1],
        initializer_range=512**-0.5,
    )
    model = retrofit(
        base,
        encoder=encoder,
        chunk_size=CHUNK_SIZE,
        neighbor_size=NEIGHBOR_SIZE,
        cross_attention_layers=LAYERS,
        cross_attention_null_key=True,
        initializer_range=576**-0.5,
        base_kwargs={"dtype": torch.bfloat16},
        save_backbone=False,
    ).to(device)
    model.model.retro.float()
    rows = np.concatenate([kinds[name].windows[:10] for name in TRAIN]).astype(np.int64)
    start_by_copying(model, torch.from_numpy(rows).to(device))
    return model


def train(model: RetroForCausalLM, kinds: dict[str, Kind], args: argparse.Namespace, folder: Path) -> list[dict]:
    """Train to the end, or until the time is over; returns the log."""
    rank, world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    shares = {"random": args.random_neighbors, "copies": args.copies}
    parameters = [weight for weight in model.model.retro.parameters() if weight.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=args.learning_rate, betas=(0.9, 0.98), weight_decay=0.0)
    order = [(name, row) for name in TRAIN for row in range(len(kinds[name].windows))]
    random.Random(args.seed).shuffle(order)
    checkpoint, step, log, begin = folder / "checkpoint.pt", 0, [], time.perf_counter()
    if checkpoint.exists():
        saved = torch.load(checkpoint, map_location=model.device, weights_only=True)
        model.model.retro.load_state_dict(saved["reader"])
        optimizer.load_state_dict(saved["optimizer"])
        step, log = saved["step"], json.loads((folder / "log.json").read_text())
    for weight in model.model.retro.parameters() if world > 1 else ():
        dist.broadcast(weight.data, 0)
    if step == 0:
        model.eval()
        log.append({"step": 0, **watch(model, kinds, args.watched, shares)})
        if rank == 0:
            print(log[-1], flush=True)
    model.train()
    while step < args.steps and not (args.minutes and time.perf_counter() - begin > 60 * args.minutes):
        rate = min(1, (step + 1) / 10) * (0.1 + 0.45 * (1 + math.cos(math.pi * step / args.steps)))
        for group in optimizer.param_groups:
            group["lr"] = args.learning_rate * rate
        rows = [order[(step * args.batch_size + row) % len(order)] for row in range(args.batch_size)]
        draw = np.random.default_rng([args.seed, step, rank])
        loss = loss_of(model, make_batch(kinds, rows[rank::world], draw, "train", shares))
        loss.backward()
        for weight in parameters if world > 1 else ():
            dist.all_reduce(weight.grad)
            weight.grad /= world
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        step += 1
        if step % 10 == 0 and rank == 0:
            print(f"{step}: {float(loss.detach()):.3f}, {time.perf_counter() - begin:.0f} s", flush=True)
        if step % args.watch_steps == 0 or step == args.steps:
            model.eval()
            log.append({"step": step, **watch(model, kinds, args.watched, shares)})
            model.train()
            if rank == 0:
                print(log[-1], flush=True)
                state = {"reader": model.model.retro.state_dict(), "optimizer": optimizer.state_dict(), "step": step}
                torch.save(state, checkpoint.with_suffix(".partial"))
                os.replace(checkpoint.with_suffix(".partial"), checkpoint)
                (folder / "log.json").write_text(json.dumps(log))
    return log if step == args.steps else []


def main() -> None:
    """Prepare, train, save."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--output", type=Path, default=Path("demo_output/mixed"), help="folder of all that is made")
    add("--device", default="cpu")
    add("--minutes", type=float, help="break off after so many minutes")
    add("--prepare", action="store_true", help="make the windows only, which takes no GPU")
    add("--steps", type=int, default=180)
    add("--batch-size", type=int, default=6, help=f"windows of {WINDOW} tokens, of all processes together")
    add("--learning-rate", type=float, default=1e-3)
    add("--random-neighbors", type=float, default=0.25, help="share of chunks with random neighbors")
    add("--copies", type=float, default=0.2, help="share of windows that find copies of themselves, with errors")
    add("--watch-steps", type=int, default=40)
    add("--watched", type=int, default=8, help=f"windows of each validation kind, at most {WATCHED}")
    add("--seed", type=int, default=0)
    args = parser.parse_args()
    begin = time.perf_counter()
    if "RANK" in os.environ:
        dist.init_process_group("nccl" if args.device == "cuda" else "gloo")
    if args.device == "cpu":
        torch.set_num_threads(1)
    torch.manual_seed(args.seed)
    folder, first = args.output / "windows", int(os.environ.get("RANK", 0)) == 0
    folder.mkdir(parents=True, exist_ok=True)
    base = load_base(Path("demo_output/smollm2/base"))
    tokenizer = AutoTokenizer.from_pretrained(base)
    for name in (*TRAIN, *VALIDATION) if first else ():
        if not (folder / f"{name}.npz").exists():
            make_windows(name, WINDOWS.get(name, WATCHED), folder / f"{name}.npz", tokenizer)
    if dist.is_initialized():
        dist.barrier()
    if args.prepare:
        return
    kinds = {name: Kind(folder / f"{name}.npz") for name in (*TRAIN, *VALIDATION)}
    model = new_reader(base, kinds, args.device)
    if first:
        print(parameter_report(model), flush=True)
    log = train(model, kinds, args, args.output)
    if not log:
        sys.exit("The time is over; the same command goes on.")
    if first:
        model.model.retro.to(torch.bfloat16)
        model.save_pretrained(args.output / "model", save_backbone=False)
        tokenizer.save_pretrained(args.output / "model")
        windows = hashlib.sha256(b"".join(kinds[name].windows.tobytes() for name in kinds)).hexdigest()
        record = {
            "command": " ".join(["python", *sys.argv]),
            "seconds": round(time.perf_counter() - begin),
            "windows_sha256": windows,
            "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
            "log": log,
        }
        (args.output / "model" / "training.json").write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
