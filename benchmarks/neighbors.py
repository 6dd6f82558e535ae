"""What `precompute_neighbors` costs compared to FAISS's own search, where stored keys are the queries.

    python benchmarks/neighbors.py            # about 15 minutes on 1 core; writes benchmarks/results/neighbors.json

A store of 102,400 chunks of 64 tokens with keys of 384 numbers: points around 2,000 random centers, in place of an
encoder's output; and one of a million with the keys of `indexes.py` and the index that the policy chooses. One thread. Of
each kind of index the same queries, the store's own chunks, are searched in four ways:

- `faiss`: `index.search` for the 2 wanted neighbors, in batches of 4,096;
- `faiss, over-fetched`: the same for 10, which is what leaving out documents fetches first;
- `datastore.search`: with the query's own document excluded;
- `precompute_neighbors`: from a tokenized dataset on disk to the finished one.

Seconds are those of the processor. The share is the time that `precompute_neighbors` spent inside FAISS's search.
"""

import argparse
import json
import os
import platform
import statistics
import tempfile
import time
from collections.abc import Callable
from functools import partial
from importlib.metadata import version
from pathlib import Path

import faiss
import numpy as np
import torch
from datasets import Dataset
from indexes import DOCUMENT, make_keys, write_store
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

import retro_hf.datastore.shard as shard_module
from retro_hf.datastore import RetroDatastore
from retro_hf.datastore.index import search_index, search_parameters
from retro_hf.training import precompute_neighbors, tokenize_documents


DOCUMENTS, CHUNKS, CHUNK_SIZE, DIM, CENTERS, WORDS = 6400, 16, 64, 384, 2000, 30000
NEIGHBORS, OVER_FETCHED, BATCH, WINDOW = 2, 10, 4096, 1024


class Points:
    """In the place of an embedder: unit vectors around random centers, whatever the text."""

    name_or_path, revision, pooling, prompt, query_prompt, query_encoder = "points", None, "none", "", "", None
    symmetric, dim, dtype, fingerprint = True, DIM, torch.float32, "0" * 64
    query_fingerprint = fingerprint

    def __init__(self) -> None:
        self.generator = np.random.default_rng(0)
        self.centers = self.generator.standard_normal((CENTERS, DIM), dtype=np.float32)

    def embed(self, texts, **options):
        noise = self.generator.standard_normal((len(texts), DIM), dtype=np.float32)
        points = self.centers[self.generator.integers(CENTERS, size=len(texts))] + noise
        return points / np.linalg.norm(points, axis=1, keepdims=True)


def make_tokenizer() -> PreTrainedTokenizerFast:
    vocab = {f"w{number}": number for number in range(WORDS)}
    backend = Tokenizer(models.WordLevel(vocab, unk_token="w0"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="w0", unk_token="w0")


def batches(array: np.ndarray):
    return (array[start : start + BATCH] for start in range(0, len(array), BATCH))


def seconds(work) -> float:
    start = time.process_time()
    work()
    return time.process_time() - start


def build(factory: str, folder: Path) -> tuple[RetroDatastore, Dataset]:
    """A datastore of 102,400 chunks, and its documents as windows."""
    words = np.random.default_rng(1).integers(1, WORDS, size=(DOCUMENTS, CHUNKS * CHUNK_SIZE))
    documents = [{"id": f"d{n}", "text": " ".join(f"w{word}" for word in row)} for n, row in enumerate(words)]
    tokenizer = make_tokenizer()
    store = RetroDatastore.build(
        documents, folder / "store", tokenizer=tokenizer, embedder=Points(), chunk_size=CHUNK_SIZE, index=factory
    )
    return store, tokenize_documents(
        Dataset.from_list(documents), tokenizer, max_length=WINDOW, chunk_size=CHUNK_SIZE, add_eos=False
    )


def build_big(num_chunks: int, folder: Path) -> tuple[RetroDatastore, Dataset]:
    """A datastore of drawn keys with the index that the policy chooses, and its first documents as windows."""
    write_store(folder, make_keys(num_chunks, 1))
    return open_big(folder)


def open_big(folder: Path) -> tuple[RetroDatastore, Dataset]:
    store = RetroDatastore.load(folder / "store")
    size = DOCUMENT * CHUNK_SIZE
    windows = {
        "input_ids": [store.shards[0].tokens[first : first + size].tolist() for first in range(0, 5000 * size, size)],
        "document_id": [str(number) for number in range(5000)],
        "window_start": [0] * 5000,
    }
    return store, Dataset.from_dict(windows)


def measure(store: RetroDatastore, windows: Dataset, num_queries: int, rounds: int, folder: Path) -> dict:
    per_window = len(windows[0]["input_ids"]) // CHUNK_SIZE
    num_queries -= num_queries % per_window
    windows.select(range(num_queries // per_window)).save_to_disk(folder / "windows")
    shard, rows = store.shards[0], np.arange(num_queries)
    queries, own = store.keys_of(rows), store.document_of(rows)
    parameters = store.manifest.index["search"]
    inside = 0.0

    def timed(*arguments):
        nonlocal inside
        start = time.process_time()
        found = search_index(*arguments)
        inside += time.process_time() - start
        return found

    def plain(count: int):
        # As the store asks for it: re-scored are as many as the wanted results need.
        search = dict(parameters)
        if "k_factor" in search:
            search["k_factor"] = max(1.0, search["k_factor"] * NEIGHBORS / count)
        prepared = search_parameters(shard.index, search)
        return lambda: [search_index(shard.index, batch, count, prepared) for batch in batches(queries)]

    times: dict[str, list[float]] = {}
    shares = []
    for turn in range(rounds):
        windows = Dataset.load_from_disk(folder / "windows")
        ways = {
            "faiss": plain(NEIGHBORS),
            "faiss, over-fetched": plain(OVER_FETCHED),
            "datastore.search": lambda: [
                store.search(batch, NEIGHBORS, exclude_documents=numbers)
                for batch, numbers in zip(batches(queries), batches(own), strict=True)
            ],
            "precompute_neighbors": partial(
                precompute_neighbors, windows, store, cache_dir=folder / f"cache{turn}", show_progress=False
            ),
        }
        for name, work in ways.items():
            inside = 0.0
            shard_module.search_index = timed if name == "precompute_neighbors" else search_index
            times.setdefault(name, []).append(seconds(work))
        shares.append(inside / times["precompute_neighbors"][-1])
        shard_module.search_index = search_index
    rates = {name: round(num_queries / statistics.median(values), 1) for name, values in times.items()}
    return {
        "chunks": store.num_chunks,
        "index": store.manifest.index,
        "queries": num_queries,
        "queries_per_core_second": rates,
        "precompute_neighbors / datastore.search": round(rates["precompute_neighbors"] / rates["datastore.search"], 3),
        "precompute_neighbors / faiss": round(rates["precompute_neighbors"] / rates["faiss"], 3),
        "share_inside_faiss": round(statistics.median(shares), 3),
        "seconds": {name: [round(value, 2) for value in values] for name, values in times.items()},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results" / "neighbors.json")
    options = parser.parse_args()
    torch.set_num_threads(1)
    faiss.omp_set_num_threads(1)
    results = []
    stores: list[tuple[Callable[[Path], tuple[RetroDatastore, Dataset]], int]] = [
        (partial(build, "Flat"), 2048),
        (partial(build, "IVF1024,PQ96x4fs,Refine(SQfp16)"), 65_536),
        (partial(build_big, 1_000_000), 65_536),
    ]
    for make, num_queries in stores:
        with tempfile.TemporaryDirectory() as folder:
            results.append(measure(*make(Path(folder)), num_queries, options.rounds, Path(folder)))
        print(json.dumps(results[-1], indent=2), flush=True)
    packages = ("retro-hf", "faiss-cpu", "datasets", "numpy", "pyarrow")
    content = {
        "command": "python benchmarks/neighbors.py",
        "machine": f"{platform.machine()}, {os.cpu_count()} cores, one thread used",
        "versions": {name: version(name) for name in packages} | {"python": platform.python_version()},
        "dim": DIM,
        "neighbors": NEIGHBORS,
        "rounds": options.rounds,
        "results": results,
    }
    options.output.write_text(json.dumps(content, indent=2) + "\n")


if __name__ == "__main__":
    main()
