"""A tiny store, windows of its corpus with neighbors, a tiny model: what the tests of training and evaluation share."""

from pathlib import Path
from types import SimpleNamespace

import torch
from datasets import Dataset
from datastore.fixtures import corpus, make_encoder, make_tokenizer
from tiny import tiny_retro
from transformers import Trainer, TrainerCallback, TrainingArguments

from retro_hf import RetroForCausalLM, RetroRetriever
from retro_hf.datastore import ChunkEmbedder, RetroDatastore
from retro_hf.training import RetroDataCollator, precompute_neighbors, tokenize_documents


CHUNK_SIZE = 8
NEIGHBOR_SIZE = 16
WINDOW = 32


def make_world(folder: Path) -> SimpleNamespace:
    """Build a store of 40 documents in `folder`, and windows of the same documents with their neighbors."""
    tokenizer = make_tokenizer()
    embedder = ChunkEmbedder.from_pretrained(make_encoder(folder / "encoder"), dtype=torch.float32)
    datastore = RetroDatastore.build(
        corpus(),
        folder / "store",
        tokenizer=tokenizer,
        embedder=embedder,
        chunk_size=CHUNK_SIZE,
        neighbor_size=NEIGHBOR_SIZE,
    )
    retriever = RetroRetriever(datastore, embedder=embedder)
    windows = tokenize_documents(Dataset.from_list(corpus()), tokenizer, max_length=WINDOW, chunk_size=CHUNK_SIZE)
    return SimpleNamespace(
        tokenizer=tokenizer,
        embedder=embedder,
        datastore=datastore,
        retriever=retriever,
        windows=windows,
        dataset=precompute_neighbors(windows, retriever),
    )


def make_model(seed: int = 0, family: str = "retro_decoder", scale: float = 0.05, **config) -> RetroForCausalLM:
    """A tiny RETRO for that store."""
    sizes = {"chunk_size": CHUNK_SIZE, "neighbor_size": NEIGHBOR_SIZE, **config}
    return tiny_retro(family, {"vocab_size": 400}, seed, scale, **sizes)


class Losses(TrainerCallback):
    """Keeps the loss that Trainer logs at each step."""

    def __init__(self) -> None:
        self.values: dict[int, float] = {}

    def on_log(self, args, state, control, logs, **kwargs):
        if "loss" in logs:
            self.values[state.global_step] = logs["loss"]


def make_trainer(model, world, folder: Path, collator=None, **arguments) -> tuple[Trainer, Losses]:
    """Plain `Trainer` on the CPU, which logs every step; and its losses."""
    settings = {
        "per_device_train_batch_size": 8,
        "max_steps": 6,
        "learning_rate": 3e-3,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "use_cpu": True,
        "disable_tqdm": True,
        "remove_unused_columns": False,
        "dataloader_pin_memory": False,
        **arguments,
    }
    losses = Losses()
    trainer = Trainer(
        model=model,
        args=TrainingArguments(output_dir=str(folder), **settings),
        train_dataset=world.dataset,
        eval_dataset=world.dataset.select(range(16)),
        data_collator=collator or RetroDataCollator(world.tokenizer, world.datastore),
        callbacks=[losses],
    )
    return trainer, losses
