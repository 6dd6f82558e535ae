"""How much of what RETRO gains from scratch does RETROfit recover, and at what share of the training?

    python benchmarks/retrofit.py --size demo --seeds 0          # about 3 hours on one core; resumes if it is stopped
    benchmarks/gpu/retrofit.sh                                   # all sizes and seeds, minutes on a large GPU

Trained on 48 books of the Bible in three translations as the demo is (`examples/train_demo.py`), and measured on ten others:

| run                | trained                                              | steps, of the baseline's |
| ------------------ | ---------------------------------------------------- | ------------------------ |
| baseline           | the same decoder without any retrieval               | 100 %                    |
| scratch            | RETRO, all of it at once                             | 100 %                    |
| fit-3, -10, -30    | what RETROfit adds to the baseline, which is frozen  | 3, 10 and 30 %           |
| unfrozen-10        | the same with the baseline trained on                | 10 %                     |

recovered = (baseline - fit) / (baseline - scratch) in bits per byte with retrieval on. Learning rates of the fits are chosen
on the validation books. Three stages, each kept in `--work`: `--prepare` makes the data, for which it needs FAISS and the
embedder; training and measuring need neither; the tables come last, `--publish` writes them into benchmarks/results.
"""

import argparse
import json
import platform
import re
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from datasets import Dataset
from transformers import AutoTokenizer, PreTrainedModel, Trainer, TrainingArguments


ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "examples"))
from demo_data import load_corpus, minilm_path, split, train_tokenizer  # noqa: E402
from retrofit_qa import Clock  # noqa: E402
from train_demo import CHUNK, NEIGHBOR_SIZE, NEIGHBORS, WINDOW, demo_config, open_datastore  # noqa: E402

from retro_hf import (  # noqa: E402
    ChunkEmbedder,
    RetroConfig,
    RetroDataCollator,
    RetroDatastore,
    RetroDecoderConfig,
    RetroDecoderForCausalLM,
    RetroEncoderConfig,
    RetroForCausalLM,
    RetroRetriever,
    precompute_neighbors,
    retrofit,
)
from retro_hf.evaluation import bits_per_byte  # noqa: E402
from retro_hf.training import tokenize_documents  # noqa: E402


STEPS, BATCH_SIZE = 800, 16
FITS = [f"{name}@{rate:g}" for name in ("fit-3", "fit-10", "fit-30", "unfrozen-10") for rate in (5e-4, 1e-3, 2e-3)]
DOCUMENTS = {"validation": 100, "test": 400}
PARTS = tuple(DOCUMENTS)


# ── data ──────────────────────────────────────────────────────────────────────────────────────────────────────────────


def prepare(work: Path) -> None:
    """Tokenizer, training windows with their neighbors, held-out documents with theirs, and the datastores of all."""
    if (work / "heldout.json").exists():
        return
    work.mkdir(parents=True, exist_ok=True)
    corpus = load_corpus("bible")
    parts = {part: split(corpus, part) for part in PARTS}
    train = parts["validation"].train
    embedder = ChunkEmbedder.from_pretrained(minilm_path())
    tokenizer = train_tokenizer(train)
    tokenizer.save_pretrained(work / "tokenizer")
    store = open_datastore(work / "train_store", train, tokenizer, embedder)
    windows = tokenize_documents(
        Dataset.from_list(train), tokenizer, max_length=WINDOW, chunk_size=CHUNK, add_bos=False, add_eos=False
    )
    windows = precompute_neighbors(windows, store, num_neighbors=NEIGHBORS, tokenizer=tokenizer)
    windows.save_to_disk(work / "windows")
    heldout = {}
    for part, count in DOCUMENTS.items():
        store = open_datastore(work / f"{part}_store", parts[part].store, tokenizer, embedder)
        documents = sorted(parts[part].heldout, key=lambda document: document["id"])
        documents = documents[:: max(len(documents) // count, 1)][:count]
        # One window for each document, however long.
        rows = tokenize_documents(
            Dataset.from_list(documents),
            tokenizer,
            max_length=64 * WINDOW,
            chunk_size=CHUNK,
            add_bos=False,
            add_eos=False,
        )
        retriever = RetroRetriever(store, embedder=embedder, num_neighbors=NEIGHBORS)
        rows = precompute_neighbors(rows, retriever, tokenizer=tokenizer)
        found = {row["document_id"]: row["neighbor_chunk_ids"] for row in rows}
        heldout[part] = [
            {"id": one["id"], "text": one["text"], "neighbors": found.get(one["id"], [])} for one in documents
        ]
    (work / "heldout.json").write_text(json.dumps(heldout) + "\n")


@dataclass
class Data:
    """What [`prepare`] made."""

    tokenizer: Any
    store: RetroDatastore
    windows: Dataset
    heldout: dict[str, list[dict]]
    stores: dict[str, RetroDatastore]

    @classmethod
    def load(cls, work: Path) -> "Data":
        return cls(
            AutoTokenizer.from_pretrained(work / "tokenizer"),
            RetroDatastore.load(work / "train_store"),
            Dataset.load_from_disk(str(work / "windows")),
            json.loads((work / "heldout.json").read_text()),
            {part: RetroDatastore.load(work / f"{part}_store") for part in PARTS},
        )


# ── models ────────────────────────────────────────────────────────────────────────────────────────────────────────────


def size_config(size: str, tokenizer) -> tuple[RetroConfig, float]:
    """The configuration of RETRO from scratch at a size, and the learning rate of what is trained from scratch."""
    ids = tokenizer.pad_token_id, tokenizer.bos_token_id, tokenizer.eos_token_id
    config = demo_config(len(tokenizer), *ids)
    if size == "demo":
        return config, 1e-3
    scale = 512**-0.5
    decoder = RetroDecoderConfig(
        vocab_size=len(tokenizer),
        hidden_size=512,
        intermediate_size=1536,
        num_hidden_layers=8,
        num_attention_heads=8,
        head_dim=64,
        initializer_range=scale,
        pad_token_id=ids[0],
        bos_token_id=ids[1],
        eos_token_id=ids[2],
    )
    encoder = RetroEncoderConfig(
        hidden_size=512,
        intermediate_size=1024,
        num_hidden_layers=2,
        num_attention_heads=8,
        head_dim=64,
        initializer_range=scale,
    )
    values = config.to_dict() | {
        "text_config": decoder,
        "neighbor_encoder_config": encoder,
        "cross_attention_layers": [1, 4, 6],
        "initializer_range": scale,
    }
    return RetroConfig(**{key: value for key, value in values.items() if key != "model_type"}), 5e-4


def fit_to(baseline: PreTrainedModel, config: RetroConfig, frozen: bool) -> RetroForCausalLM:
    """The baseline with all that `config` adds."""
    return retrofit(
        baseline,
        encoder=config.neighbor_encoder_config,
        freeze_backbone=frozen,
        share_embeddings=True,
        chunk_size=CHUNK,
        neighbor_size=NEIGHBOR_SIZE,
        num_neighbors=NEIGHBORS,
        cross_attention_layers=config.cross_attention_layers,
        initializer_range=config.initializer_range,
    )


# ── a run ─────────────────────────────────────────────────────────────────────────────────────────────────────────────


def train(model: PreTrainedModel, data: Data, work: Path, args, *, steps: int, rate: float, seed: int) -> list[dict]:
    """Train as the demo was; a decoder alone gets the same windows without neighbors. Returns the log."""
    collator: Callable = RetroDataCollator(
        data.tokenizer, data.store, random_neighbor_probability=0.15, no_neighbor_probability=0.15, seed=seed
    )
    if isinstance(model, RetroDecoderForCausalLM):
        read, names = collator, ("input_ids", "attention_mask", "labels")

        def collator(rows):
            return {name: value for name, value in read(rows).items() if name in names}

    training = TrainingArguments(
        output_dir=str(work / "trainer"),
        max_steps=steps,
        per_device_train_batch_size=BATCH_SIZE,
        learning_rate=rate,
        lr_scheduler_type="cosine_with_min_lr",
        lr_scheduler_kwargs={"min_lr_rate": 0.1},
        warmup_steps=min(100, steps // 4),
        weight_decay=0.1,
        adam_beta2=0.95,
        max_grad_norm=1.0,
        train_sampling_strategy="group_by_length",
        bf16=True,
        use_cpu=args.device == "cpu",
        logging_steps=max(steps // 20, 1),
        save_strategy="no",
        remove_unused_columns=False,
        disable_tqdm=True,
        report_to=[],
        seed=seed,
    )
    trainer = Trainer(model=model.train(), args=training, train_dataset=data.windows, data_collator=collator)
    trainer.train()
    trainer.accelerator.unwrap_model(trainer.model, keep_fp32_wrapper=False)  # autocast stays in `forward` otherwise
    return trainer.state.log_history


def measure(model: PreTrainedModel, data: Data) -> dict[str, dict]:
    """Bits per byte of the held-out documents of each part, in float32."""
    model.eval().float()
    found = {}
    for part in PARTS:
        documents = data.heldout[part]
        options: dict[str, Any] = {"modes": ("off",)}
        if isinstance(model, RetroForCausalLM):
            options = {
                "retriever": data.stores[part],
                "neighbor_chunk_ids": [np.array(one["neighbors"]).reshape(-1, NEIGHBORS) for one in documents],
            }
        result = bits_per_byte(model, documents, data.tokenizer, window=WINDOW, batch_size=32, **options)
        found[part] = result.to_dict() | {
            "nats": {mode: [round(float(one), 4) for one in values] for mode, values in result.nats.items()},
            "bytes": result.num_bytes.tolist(),
        }
    return found


def kept(path: Path, clock: Clock, provenance: dict, make: Callable[[], dict]) -> dict:
    """A run's result in `path`, made now if it is not there."""
    if not path.exists():
        clock.check()
        start = time.perf_counter()
        result = make()
        result |= {"seconds": round(time.perf_counter() - start, 1)} | provenance
        partial = path.with_suffix(".partial")
        partial.write_text(json.dumps(result) + "\n")
        partial.replace(path)
        bits = {mode: round(value, 4) for mode, value in result["measured"]["validation"]["bits_per_byte"].items()}
        print(f"{path.stem}: validation {bits}, {result['seconds']} s", flush=True)
    return json.loads(path.read_text())


def run_seed(work: Path, seed: int, args, clock: Clock) -> None:
    """Everything of one size and seed."""
    data = Data.load(work)
    config, rate = size_config(args.size, data.tokenizer)
    folder = work / args.size / str(seed)
    folder.mkdir(parents=True, exist_ok=True)
    device = torch.device(args.device)
    provenance = {
        "device": torch.cuda.get_device_name() if device.type == "cuda" else platform.machine(),
        "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
    }

    def run(model: PreTrainedModel, steps: int, rate: float) -> dict:
        model.to(device)
        log = train(model, data, folder, args, steps=steps, rate=rate, seed=seed)
        return {"steps": steps, "learning_rate": rate, "log": log, "measured": measure(model, data)}

    def baseline() -> dict:
        torch.manual_seed(seed)
        model = RetroDecoderForCausalLM(config.text_config)
        result = run(model, args.steps, rate)
        model.save_pretrained(folder / "baseline")
        return result

    def scratch() -> dict:
        torch.manual_seed(seed)
        return run(RetroForCausalLM(config), args.steps, rate)

    def fit(name: str) -> dict:
        kind, percent, rate = re.split("[-@]", name, maxsplit=2)
        torch.manual_seed(seed)
        model = fit_to(RetroDecoderForCausalLM.from_pretrained(folder / "baseline"), config, kind == "fit")
        result = run(model, max(args.steps * int(percent) // 100, 1), float(rate))
        before = RetroDecoderForCausalLM.from_pretrained(folder / "baseline").to(device).eval()
        windows = [torch.tensor([row["input_ids"]], device=device) for row in data.windows.select(range(8))]
        with torch.no_grad():
            result["off_is_baseline"] = all(torch.equal(model(one).logits, before(one).logits) for one in windows)
        return result

    kept(folder / "baseline.json", clock, provenance, baseline)
    for name in args.fits:
        kept(folder / f"{name}.json", clock, provenance, lambda name=name: fit(name))
    kept(folder / "scratch.json", clock, provenance, scratch)


# ── tables ────────────────────────────────────────────────────────────────────────────────────────────────────────────


@cache
def read(path: Path) -> dict:
    return json.loads(path.read_text())


def bits(result: dict, part: str, mode: str) -> float:
    return result["measured"][part]["bits_per_byte"][mode]


def best_rates(folders: list[Path], fits: list[str]) -> dict[str, str]:
    """For each fit the file with the learning rate that was best on the validation books, on average over the seeds."""
    best: dict[str, str] = {}
    means = {
        fit: np.mean([bits(read(folder / f"{fit}.json"), "validation", "on") for folder in folders]) for fit in fits
    }
    for fit in sorted(fits, key=means.__getitem__):
        best.setdefault(fit.split("@")[0], fit)
    return {name: best[name] for name in dict.fromkeys(fit.split("@")[0] for fit in fits)}


def summary(work: Path, size: str, seeds: list[int], fits: list[str]) -> dict:
    """Bits per byte on the test books by run and mode, and the share of the gain that is recovered: a list over seeds."""
    folders = [work / size / str(seed) for seed in seeds]
    runs = {"baseline": "baseline", "scratch": "scratch"} | best_rates(folders, fits)
    table: dict[str, dict] = {}
    for name, file in runs.items():
        results = [read(folder / f"{file}.json") for folder in folders]
        modes = results[0]["measured"]["test"]["bits_per_byte"]
        table[name] = {
            "steps": results[0]["steps"],
            "learning_rate": results[0]["learning_rate"],
            "seconds": [result["seconds"] for result in results],
            **{mode: [round(bits(result, "test", mode), 4) for result in results] for mode in modes},
        }
        if "off_is_baseline" in results[0]:
            table[name]["off_is_baseline"] = [result["off_is_baseline"] for result in results]
    for row in table.values():
        if "on" in row:
            gains = zip(table["baseline"]["off"], row["on"], table["scratch"]["on"], strict=True)
            row["recovered"] = [round((base - fit) / (base - scratch), 4) for base, fit, scratch in gains]
    return table


def show(size: str, table: dict) -> None:
    """The table of a size, means over the seeds; in brackets the smallest and the largest."""
    from rich.console import Console
    from rich.table import Table

    def cell(row: dict, name: str, form: str) -> str:
        if name not in row:
            return ""
        low, high = min(row[name]), max(row[name])
        spread = f" [{low:{form}}, {high:{form}}]" if len(row[name]) > 1 else ""
        return f"{np.mean(row[name]):{form}}{spread}"

    shown = Table(title=f"{size}: bits per byte on the test books", title_justify="left")
    for head in ("run", "steps", "rate", "on", "off", "random", "recovered", "off = baseline"):
        shown.add_column(head, justify="left" if head == "run" else "right")
    for name, row in table.items():
        numbers = [cell(row, mode, ".4f") for mode in ("on", "off", "random")]
        same = str(all(row["off_is_baseline"])) if "off_is_baseline" in row else ""
        rate = f"{row['learning_rate']:g}"
        shown.add_row(name, str(row["steps"]), rate, *numbers, cell(row, "recovered", ".0%"), same)
    Console(width=150, highlight=False).print(shown)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--work", type=Path, default=Path("demo_output/retrofit"))
    add("--size", choices=("demo", "d512"), default="demo")
    add("--seeds", type=int, nargs="+", default=[0])
    add("--steps", type=int, default=STEPS, help="of the baseline")
    add("--fits", nargs="+", default=FITS, help="`fit-` or `unfrozen-`, percent of the steps, `@` learning rate")
    add("--device", default="cpu")
    add("--minutes", type=float, help="break off after so many minutes, between two runs")
    add("--prepare", action="store_true", help="make the data only")
    add("--publish", action="store_true", help="write into benchmarks/results")
    args = parser.parse_args()
    clock = Clock(args.minutes)
    prepare(args.work)
    if args.prepare:
        return
    for seed in args.seeds:
        run_seed(args.work, seed, args, clock)
    table = summary(args.work, args.size, args.seeds, args.fits)
    show(args.size, table)
    if args.publish:
        path = ROOT / "benchmarks" / "results" / "retrofit.json"
        published = json.loads(path.read_text()) if path.exists() else {}
        first = read(args.work / args.size / str(args.seeds[0]) / "baseline.json")
        published[f"{args.size}, {first['device']}"] = {
            "seeds": args.seeds,
            "versions": first["versions"],
            "rates tried": args.fits,
            "runs": table,
        }
        path.write_text(json.dumps(published, indent=1) + "\n")


if __name__ == "__main__":
    main()
