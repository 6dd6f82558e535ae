"""Readers beside writers, and memory over many generations: parts of `reliability.py`."""

import multiprocessing
import os
import resource
import time
from pathlib import Path

import numpy as np
import torch

from retro_hf import RetroConfig, RetroForCausalLM, RetroRetriever
from retro_hf.datastore import RetroDatastore


FORK = multiprocessing.get_context("fork")


def _read(path: Path, embedder, until: float, seed: int, counts) -> None:
    """Look up and check that every neighbor is text of its document; `counts` are look-ups, false alarms, wrong texts."""
    generator = np.random.default_rng(seed)
    retriever = RetroRetriever(RetroDatastore.load(path), embedder=embedder)
    while time.monotonic() < until:
        try:
            if generator.random() < 0.2:
                retriever = RetroRetriever(
                    RetroDatastore.load(path, verify=generator.random() < 0.5), embedder=embedder
                )
            elif generator.random() < 0.5:
                retriever.datastore.refresh()
            now = retriever.snapshot()
            store = now.datastore
            chunks = torch.from_numpy(
                store.gather(generator.integers(store.num_chunks, size=4))[0][:, : store.chunk_size]
            )
            found = now.search(chunks).chunk_ids
            tokens, mask = store.gather(found)
            owners = store.document_of(found)
            for place in np.ndindex(found.shape):
                if found[place] >= 0:
                    text = store.tokenizer.decode(tokens[place][mask[place].astype(bool)])
                    counts[2] += text not in store.document(int(owners[place]))["text"]
            counts[0] += 1
        except Exception as error:
            print(f"reader: {type(error).__name__}: {error}", flush=True)
            counts[1] += 1


def _write(path: Path, embedder, documents: list[dict], until: float, counts) -> None:
    """Append, delete and compact without a pause."""
    store, number = RetroDatastore.load(path), 0
    while time.monotonic() < until:
        new = [one | {"id": f"{one['id']}-{number}"} for one in documents]
        try:
            store.append(new, embedder=embedder)
            store.delete([one["id"] for one in new])
            if number % 2:
                store.compact()
            counts[0] += 2 + number % 2
        except Exception as error:
            print(f"writer: {type(error).__name__}: {error}", flush=True)
            counts[1] += 1
        number += 1


def race(path: Path, embedder, documents: list[dict], seconds: float) -> dict:
    """Three readers and a writer on one store for some seconds."""
    until = time.monotonic() + seconds
    reading, writing = multiprocessing.Array("l", 3), multiprocessing.Array("l", 2)
    jobs = [FORK.Process(target=_read, args=(path, embedder, until, seed, reading)) for seed in range(3)]
    jobs.append(FORK.Process(target=_write, args=(path, embedder, documents, until, writing)))
    for job in jobs:
        job.start()
    for job in jobs:
        job.join(seconds + 120)
    dead = sum(job.exitcode != 0 for job in jobs)
    for job in jobs:
        job.kill()
    return {
        "race_seconds": seconds,
        "lookups": reading[0],
        "changes": writing[0],
        "false_alarms": reading[1] + writing[1] + dead,
        "wrong_texts": reading[2],
    }


def leak(path: Path, embedder, generations: int) -> dict:
    """MB by which the process grows per 1,000 generations, by a line through its size every 100, after a warm-up."""
    store = RetroDatastore.load(path)
    retriever = RetroRetriever(store, embedder=embedder, cache_size=64)
    backbone = {"vocab_size": 512, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
    backbone |= {"num_attention_heads": 2, "head_dim": 16, "max_position_embeddings": 256}
    encoder = backbone | {"num_hidden_layers": 1}
    for name in ("vocab_size", "max_position_embeddings"):
        encoder.pop(name)
    config = RetroConfig(
        text_config=backbone,
        neighbor_encoder_config=encoder,
        chunk_size=store.chunk_size,
        neighbor_size=store.neighbor_size,
        cross_attention_layers=[1],
    )
    model = RetroForCausalLM(config).eval()
    generator = torch.Generator().manual_seed(0)
    sizes = []
    for number in range(generations + 200):
        ids = torch.randint(1, 390, (1, 12), generator=generator)
        model.generate(
            ids, attention_mask=torch.ones_like(ids), retriever=retriever, max_new_tokens=8, do_sample=False
        )
        if number >= 200 and number % 100 == 0:
            sizes.append(int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize() / 1e6)
    slope = float(np.polyfit(np.arange(len(sizes)) / 10, sizes, 1)[0])
    return {
        "generations": generations,
        "mb_per_1000_generations": round(slope, 3),
        "open_files": len(os.listdir("/proc/self/fd")),
    }
