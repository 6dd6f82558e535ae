"""How much of live retrieval a worker process hides behind the model's own work.

    python benchmarks/live_retrieval.py       # about 3 minutes on 2 cores; writes benchmarks/results/live_retrieval.json

The demo's data, encoder (MiniLM) and model (6 million parameters), whose training goes on: windows of 512 tokens of books
that are not in the datastore, so that every chunk is embedded. Plain `Trainer` takes `--steps` steps of `--batch` windows,
`--rounds` times each way, in turn:

- `beforehand`: neighbors that `precompute_neighbors` found;
- `live`: `RetroDataCollator(tokenizer, retriever)` in the training process;
- `live, worker`: the same with `dataloader_num_workers=1`: the next batches are looked up while the model computes.

Model and embedder have one thread each, so that the worker has a core. Measured is how long the model waits for its batches.
Hidden is the share of what retrieval adds to that (live - beforehand) which the worker takes away again (live - live,
worker); its start counts, too.
"""

import argparse
import json
import os
import platform
import statistics
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path


os.environ |= {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1"}
ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "examples"))

import torch  # noqa: E402
from datasets import Dataset  # noqa: E402
from demo_data import load_corpus, minilm_path, split  # noqa: E402
from transformers import AutoTokenizer, Trainer, TrainingArguments  # noqa: E402

from retro_hf import (  # noqa: E402
    ChunkEmbedder,
    RetroConfig,
    RetroDataCollator,
    RetroDatastore,
    RetroForCausalLM,
    RetroRetriever,
    precompute_neighbors,
)
from retro_hf.training import tokenize_documents  # noqa: E402


MODEL, WINDOW, STORED = ROOT / "hub_configs" / "retro-bible", 512, 200
WAYS = {"beforehand": 0, "live": 0, "live, worker": 1}


def books(documents: list[dict]) -> list[dict]:
    """One document per book, so that windows are full."""
    texts: dict[str, list[str]] = {}
    for document in documents:
        texts.setdefault(document["id"].rsplit("/", 1)[0], []).append(document["text"])
    return [{"id": name, "text": " ".join(parts)} for name, parts in texts.items()]


def train(windows: Dataset, collator: RetroDataCollator, workers: int, steps: int, batch: int) -> dict:
    """Seconds of `steps` steps, those of them spent waiting for a batch, and the losses."""
    torch.manual_seed(0)
    model = RetroForCausalLM(RetroConfig.from_pretrained(MODEL))
    with tempfile.TemporaryDirectory() as folder:
        settings = TrainingArguments(
            folder,
            max_steps=steps,
            per_device_train_batch_size=batch,
            learning_rate=1e-3,
            dataloader_num_workers=workers,
            dataloader_pin_memory=False,
            remove_unused_columns=False,
            use_cpu=True,
            logging_steps=1,
            save_strategy="no",
            report_to=[],
            disable_tqdm=True,
        )
        trainer = Trainer(model=model, args=settings, train_dataset=windows, data_collator=collator)
        trainer.log = lambda logs, *_: trainer.state.log_history.append(logs)
        get_batch_samples, waited = trainer.get_batch_samples, []

        def timed(*arguments):
            start = time.perf_counter()
            found = get_batch_samples(*arguments)
            waited.append(time.perf_counter() - start)
            return found

        trainer.get_batch_samples = timed
        start = time.perf_counter()
        trainer.train()
        seconds = time.perf_counter() - start
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    return {"seconds": seconds, "waited": sum(waited), "losses": losses}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "live_retrieval.json")
    args = parser.parse_args()
    torch.set_num_threads(1)
    parts = split(load_corpus())
    tokenizer = AutoTokenizer.from_pretrained(MODEL)
    embedder = ChunkEmbedder.from_pretrained(minilm_path())
    size = RetroConfig.from_pretrained(MODEL).chunk_size
    with tempfile.TemporaryDirectory() as folder:
        store = RetroDatastore.build(
            parts.store[:STORED], Path(folder) / "store", tokenizer=tokenizer, embedder=embedder, chunk_size=size
        )
        retriever = RetroRetriever(store, embedder=embedder)
        texts = Dataset.from_list(books(parts.heldout))
        windows = tokenize_documents(
            texts, tokenizer, max_length=WINDOW, chunk_size=size, add_bos=False, add_eos=False
        )
        windows = windows.select(range(min(len(windows), args.steps * args.batch)))
        found = precompute_neighbors(windows, retriever)
        runs: dict[str, list[dict]] = {way: [] for way in WAYS}
        for _ in range(args.rounds):
            for way, workers in WAYS.items():
                live = way != "beforehand"
                collator = RetroDataCollator(tokenizer, retriever if live else store)
                runs[way].append(train(windows if live else found, collator, workers, args.steps, args.batch))
                print(
                    f"{way:<14} {runs[way][-1]['seconds']:6.1f} s, waited {runs[way][-1]['waited']:6.1f} s", flush=True
                )
        num_chunks = sum(len(row) // size for row in windows["input_ids"])
    waited = {way: statistics.median(run["waited"] for run in rows) for way, rows in runs.items()}
    hidden = (waited["live"] - waited["live, worker"]) / (waited["live"] - waited["beforehand"])
    losses = {tuple(run["losses"]) for rows in runs.values() for run in rows}
    print(f"hidden: {hidden:.0%}; losses equal in all runs: {len(losses) == 1}")
    packages = ("retro-hf", "torch", "transformers", "faiss-cpu", "sentence-transformers")
    record = {
        "command": " ".join(["python", *sys.argv]),
        "machine": f"{platform.machine()}, {os.cpu_count()} cores, one thread per process",
        "versions": {name: version(name) for name in packages},
        "chunks_in_store": len(store),
        "chunks_looked_up": num_chunks,
        "steps": args.steps,
        "batch": args.batch,
        "waited_median": waited,
        "hidden": hidden,
        "losses_equal_in_all_runs": len(losses) == 1,
        "runs": runs,
    }
    args.out.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
