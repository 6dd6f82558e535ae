"""Train an adapter with which a frozen SmolLM2-135M reads any datastore.

    python examples/train_smollm2.py --device cuda                                              # minutes on a large GPU
    python examples/train_smollm2.py --steps 700 --batch-size 8 --learning-rate 5e-4            # two hours on a CPU core

It is trained on 48 books of the Bible in three translations and on the introductions of 6,500 Wikipedia articles. Neighbors come from a datastore
of the same text, but never from a chunk's own document. Most are the same passage in other words, or an article on a similar subject. Some
chunks get random neighbors, so that the adapter does not trust bad ones.

A stopped run resumes: what is in `--output` is not computed again, and training continues from its last checkpoint. `--minutes` stops after
so many minutes; run the same command again to continue. The results of the shipped adapter, also on texts that it has not seen, are in
`hub_configs/retro-smollm2-135m/README.md`.
"""

import argparse
import json
import sys
import time
from functools import cache
from pathlib import Path

import torch
import transformers
from datasets import Dataset
from demo_data import load_corpus, minilm_path, split
from retrofit_qa import Clock
from retrofit_smollm2 import load_base, load_reader
from train_demo import train_on
from transformers import AutoTokenizer, PreTrainedTokenizerBase, Trainer, TrainerCallback, TrainingArguments
from wiki_questions import load_articles, part_of

from retro_hf import (
    ChunkEmbedder,
    RetroDataCollator,
    RetroDatastore,
    RetroForCausalLM,
    RetroRetriever,
    precompute_neighbors,
)
from retro_hf.retrofit import parameter_report
from retro_hf.training import tokenize_documents


CHUNK_SIZE, NEIGHBOR_SIZE, NUM_NEIGHBORS, WINDOW = 32, 128, 2, 256
CROSS_ATTENTION_LAYERS = [0, 8, 12, 16, 20, 24, 28]
WATCHED = 48  # validation windows of each kind whose loss is watched


# ── text ──────────────────────────────────────────────────────────────────────────────────────────────────────────────


@cache
def load_documents() -> dict[str, list[dict]]:
    """Text to train on; and Bible passages for validation, the datastore for them (other translations), and articles."""
    bible = split(load_corpus("bible"), "validation")
    articles = {"train": [], "validation": [], "test": []}
    for article in load_articles():
        articles[part_of(article)].append({name: article[name] for name in ("id", "title", "text")})
    return {
        "train": bible.train + articles["train"],
        "bible": bible.heldout,
        "bible_others": bible.store,
        "wiki": articles["validation"],
    }


def open_datastore(folder: Path, name: str, tokenizer: PreTrainedTokenizerBase) -> RetroDatastore:
    """The datastore of some of the documents, built first if there is none."""
    path = folder / f"{name}_store"
    if not path.exists():
        embedder = ChunkEmbedder.from_pretrained(minilm_path())
        documents = [{key: document[key] for key in ("id", "title", "text")} for document in load_documents()[name]]
        sizes = {"chunk_size": CHUNK_SIZE, "neighbor_size": NEIGHBOR_SIZE}
        RetroDatastore.build(documents, path, tokenizer=tokenizer, embedder=embedder, **sizes)
    return RetroDatastore.load(path)


def open_windows(folder: Path, name: str, datastore: RetroDatastore, tokenizer: PreTrainedTokenizerBase) -> Dataset:
    """Windows of some of the documents with their neighbors, made first if there are none.

    Those of a single chunk read nothing, and are left out.
    """
    path = folder / f"{name}_windows"
    if not path.exists():
        windows = Dataset.from_list(
            [{key: document[key] for key in ("id", "text")} for document in load_documents()[name]]
        )
        windows = tokenize_documents(windows, tokenizer, max_length=WINDOW, chunk_size=CHUNK_SIZE, add_eos=False)
        windows = windows.filter(lambda row: len(row["input_ids"]) > CHUNK_SIZE)
        embedder = ChunkEmbedder.from_pretrained(minilm_path())
        retriever = RetroRetriever(datastore, embedder=embedder, num_neighbors=NUM_NEIGHBORS)
        windows = precompute_neighbors(windows, retriever, tokenizer=tokenizer)
        partial = path.with_suffix(".partial")
        windows.save_to_disk(partial)
        partial.replace(path)
    return Dataset.load_from_disk(str(path))


# ── training ──────────────────────────────────────────────────────────────────────────────────────────────────────────


class Watch(TrainerCallback):
    """Every so many steps the validation loss by text and mode; and the end when the time is over."""

    def __init__(self, batches: dict[str, dict[str, torch.Tensor]], every: int, clock: Clock) -> None:
        self.batches, self.every, self.clock = batches, every, clock

    def on_step_end(self, args, state, control, model=None, **kwargs):
        if state.global_step % self.every == 0 or state.global_step == state.max_steps:
            losses = {name: round(loss_of(model, batch), 4) for name, batch in self.batches.items()}
            state.log_history.append({"step": state.global_step, **losses})
            print(
                f"  {state.global_step}: " + ", ".join(f"{name} {loss:.3f}" for name, loss in losses.items()),
                flush=True,
            )
        if self.clock.is_over():
            control.should_save = control.should_training_stop = True


@torch.no_grad()
def loss_of(model: RetroForCausalLM, batch: dict[str, torch.Tensor]) -> float:
    """Nats per token of a batch."""
    model.eval()
    with torch.autocast(model.device.type, dtype=torch.bfloat16):
        loss = float(model(**{name: value.to(model.device) for name, value in batch.items()}).loss)
    model.train()
    return loss


def in_modes(windows: Dataset, datastore: RetroDatastore, tokenizer: PreTrainedTokenizerBase, name: str, seed: int):
    """A batch of validation windows with their neighbors, with random ones, and without any."""
    rows = [windows[row] for row in range(0, len(windows), max(len(windows) // WATCHED, 1))][:WATCHED]
    batches = {
        f"{name}/{mode}": RetroDataCollator(tokenizer, datastore, random_neighbor_probability=share, seed=seed)(rows)
        for mode, share in (("on", 0.0), ("random", 1.0))
    }
    batches[f"{name}/off"] = {
        key: value for key, value in batches[f"{name}/on"].items() if key in ("input_ids", "attention_mask", "labels")
    }
    return batches


def main() -> None:
    """Prepare, train, save."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--output", type=Path, default=Path("demo_output/smollm2"), help="folder for all results")
    add("--model", type=Path, help="folder of the adapter and its checkpoints, by default in the output folder")
    add("--device", default="cpu")
    add("--minutes", type=float, help="stop after so many minutes")
    add("--prepare", action="store_true", help="only make the datastores and windows, which needs no GPU")
    add("--steps", type=int, default=1200)
    add("--batch-size", type=int, default=64, help=f"windows of up to {WINDOW} tokens")
    add("--learning-rate", type=float, default=1e-3)
    add("--random-neighbors", type=float, default=0.15, help="share of chunks trained with random neighbors")
    add("--watch-steps", type=int, default=100)
    add("--seed", type=int, default=0)
    args = parser.parse_args()
    clock, start = Clock(args.minutes), time.perf_counter()
    folder = args.model or args.output / "model"
    torch.manual_seed(args.seed)

    base_folder = load_base(args.output / "base")
    tokenizer = AutoTokenizer.from_pretrained(base_folder)
    store = open_datastore(args.output, "train", tokenizer)
    windows = open_windows(args.output, "train", store, tokenizer)
    others = open_datastore(args.output, "bible_others", tokenizer)
    watched = {
        name: (open_windows(args.output, name, datastore, tokenizer), datastore)
        for name, datastore in (("bible", others), ("wiki", store))
    }
    if args.prepare:
        return

    batches = {}
    for name, (rows, datastore) in watched.items():
        batches |= in_modes(rows, datastore, tokenizer, name, args.seed)
    model = load_reader(
        base_folder, chunk_size=CHUNK_SIZE, neighbor_size=NEIGHBOR_SIZE, cross_attention_layers=CROSS_ATTENTION_LAYERS
    ).to(args.device)
    print(f"{parameter_report(model)}\n{len(windows):,} windows to train on", flush=True)
    collator = RetroDataCollator(tokenizer, store, random_neighbor_probability=args.random_neighbors, seed=args.seed)
    training = TrainingArguments(
        output_dir=str(folder / "checkpoints"),
        max_steps=args.steps,
        per_device_train_batch_size=args.batch_size,
        learning_rate=args.learning_rate,
        lr_scheduler_type="cosine_with_min_lr",
        lr_scheduler_kwargs={"min_lr_rate": 0.1},
        warmup_steps=30,
        weight_decay=0.0,
        adam_beta2=0.98,
        max_grad_norm=1.0,
        train_sampling_strategy="group_by_length",
        bf16=True,
        use_cpu=args.device == "cpu",
        dataloader_num_workers=0 if args.device == "cpu" else 2,
        logging_steps=10,
        save_steps=100,
        save_total_limit=1,
        remove_unused_columns=False,
        report_to=[],
        seed=args.seed,
    )
    watch = Watch(batches, args.watch_steps, clock)
    trainer = Trainer(model=model, args=training, train_dataset=windows, data_collator=collator, callbacks=[watch])
    train_on(trainer)
    if trainer.state.global_step < args.steps:
        clock.check()

    model.model.retro.to(torch.bfloat16)
    model.save_pretrained(folder, save_backbone=False, max_shard_size="15MB")
    tokenizer.save_pretrained(folder)
    record = {
        "command": " ".join(["python", *sys.argv]),
        "seed": args.seed,
        "seconds": round(time.perf_counter() - start),
        "device": torch.cuda.get_device_name() if args.device.startswith("cuda") else "CPU",
        "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
        "log": trainer.state.log_history,
    }
    (folder / "training.json").write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
