"""The datastore compared to plain FAISS, `datasets`, usearch and autofaiss: build time, latency, recall, memory, gathering.

    python benchmarks/indexes.py                   # 100,000 and 1,000,000 chunks, about 25 minutes on 2 cores
    python benchmarks/indexes.py --chunks 20000    # a quick look

Keys are synthetic: unit vectors of dimension 384 around cluster centers, with the local intrinsic dimension that
MiniLM's have (about 25), for documents of 20 chunks. Every contestant indexes the same keys and answers the same 1,000
held-out queries for two neighbors. Recall counts an answer as found if its exact score reaches that of the second exact
neighbor. Each contestant runs in a process of its own, so that its memory is its own; times are the CPU time of one
thread (`--threads`), since cores are shared. Writes benchmarks/results/indexes.json.

- `retro-hf`: `RetroDatastore.search`, the index that the policy chooses.
- `faiss`: the same index file, read with `faiss.read_index` and searched with the same parameters: what retro-hf adds.
- `faiss, exact`: `IndexFlatIP` with FAISS' own settings.
- `datasets`: `Dataset.add_faiss_index`, with the factory string that retro-hf uses and its search
  parameters.
- `usearch`: HNSW in float16, its defaults; `expansion_search` doubled until recall reaches 0.95.
- `autofaiss`: the index that it chooses, where it can be imported.
"""

import argparse
import importlib.metadata
import json
import os
import platform
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import numpy as np


DIM, CHUNK, DOCUMENT, QUERIES, NEIGHBORS = 384, 64, 20, 1000, 2
BATCHES = (1, 32, 1000)
PACKAGES = ("faiss-cpu", "numpy", "datasets", "usearch", "autofaiss")
RECALL = 0.95  # that retro-hf is tuned for
TRAINING_ROWS = 200_000  # that `datasets` trains an index with
CONTESTANTS = ("retro-hf", "faiss", "faiss, exact", "datasets", "usearch", "autofaiss")


def make_keys(num_rows: int, seed: int) -> np.ndarray:
    """Unit vectors, float16: 25 directions of their own per cluster, in clusters of about 200."""
    generator = np.random.default_rng(0)
    num_clusters = 5000
    centers = generator.normal(size=(num_clusters, DIM)).astype(np.float32)
    bases = generator.normal(size=(64, 25, DIM)).astype(np.float32) / np.sqrt(25)
    generator = np.random.default_rng(seed)
    keys = np.empty((num_rows, DIM), dtype=np.float16)
    for start in range(0, num_rows, 50_000):
        count = min(50_000, num_rows - start)
        cluster = generator.integers(num_clusters, size=count)
        local = generator.normal(size=(count, 25)).astype(np.float32)
        rows = centers[cluster]
        for basis in range(len(bases)):
            here = cluster % len(bases) == basis
            rows[here] += 1.2 * local[here] @ bases[basis]
        keys[start : start + count] = rows / np.linalg.norm(rows, axis=1, keepdims=True)
    return keys


def write_store(folder: Path, keys: np.ndarray) -> None:
    """A datastore with given keys: the last stage of a build, with documents that say nothing."""
    import pyarrow as pa

    from retro_hf.datastore.atomic_files import hash_of
    from retro_hf.datastore.index_plan import IndexOptions, plan_index
    from retro_hf.datastore.manifest import DatastoreManifest
    from retro_hf.datastore.shard import DOCUMENT_SCHEMA, Piece, ShardWriter

    plan = plan_index(len(keys), DIM, IndexOptions())
    begin = time.process_time()
    with ShardWriter(folder / "shard", "00000", np.dtype(np.uint16), DIM) as writer:
        for start in range(0, len(keys), DOCUMENT * 512):
            part = keys[start : start + DOCUMENT * 512]
            count = len(part) // DOCUMENT
            names = [str(start // DOCUMENT + number) for number in range(count)]
            table = pa.table({name: names if name != "metadata" else [None] * count for name in DOCUMENT_SCHEMA.names})
            tokens = np.random.default_rng(start).integers(1, 50_000, size=len(part) * CHUNK).astype(np.uint16)
            sizes = np.full(count, DOCUMENT)
            hashes = np.array([hash_of(name) for name in names], dtype=np.uint64)
            writer.add(Piece(tokens, sizes * CHUNK, sizes, hashes, part, table.cast(DOCUMENT_SCHEMA)))
        built = writer.finish(plan.factory, 0.95)
    seconds = time.process_time() - begin
    store = folder / "store"
    store.mkdir()
    built.link_into(store)
    fingerprint = {"fingerprint": "0" * 64, "name": "synthetic", "revision": None}
    DatastoreManifest(
        chunk_size=CHUNK,
        neighbor_size=2 * CHUNK,
        token_dtype="uint16",
        tokenizer=fingerprint | {"vocab_size": 50_000},
        embedder=fingerprint | {"dim": DIM, "pooling": "mean", "dtype": "float32"},
        shards=(built.entry,),
        files=built.files,
    ).write(store)
    (folder / "build_seconds").write_text(str(seconds))


def resident_mb() -> np.ndarray:
    """Resident memory of this process in MB: its own, and pages mapped from files, which others share."""
    lines = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return np.array([int(lines[name].split()[0]) / 1e3 for name in ("RssAnon", "RssFile")])


class PeakMemory:
    """The largest memory of its own that this process has while the block runs, in MB above that before."""

    def __enter__(self) -> "PeakMemory":
        self.mb, self._done, self._before = 0.0, threading.Event(), resident_mb()[0]
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()
        return self

    def _watch(self) -> None:
        while not self._done.wait(0.02):
            self.mb = max(self.mb, resident_mb()[0] - self._before)

    def __exit__(self, *_) -> None:
        self._done.set()
        self._thread.join()


def measure_build(folder: Path) -> dict:
    """CPU seconds and memory of the stage of a build that makes the index, from keys on the disk."""
    from retro_hf.datastore import RetroDatastore
    from retro_hf.datastore.index import build_index
    from retro_hf.datastore.index_plan import IndexOptions, plan_index

    shard = RetroDatastore.load(folder / "store").shards[0]
    plan = plan_index(shard.num_chunks, DIM, IndexOptions())
    begin = time.process_time()
    with PeakMemory() as peak:
        built = build_index(shard.keys, plan.factory, folder / "again.faiss")
    seconds = time.process_time() - begin
    (folder / "again.faiss").unlink()
    planned = {"planned_mb": plan.build_memory / 1e6, "planned_core_seconds": plan.build_seconds}
    return {"core_seconds": seconds, "peak_mb": peak.mb, **planned, "index": built}


def contestant(who: str, folder: Path):
    """A search function `queries -> ids`, the CPU seconds it took to build, and the seconds to open."""
    import faiss

    from retro_hf.datastore import RetroDatastore
    from retro_hf.datastore.atomic_files import mapped
    from retro_hf.datastore.index import open_index

    store_path = folder / "store"
    faiss.omp_set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    before = resident_mb()
    if who == "retro-hf":
        start = time.perf_counter()
        store = RetroDatastore.load(store_path)
        opened = time.perf_counter() - start
        _ = store.shards[0].index
        return lambda q: store.search(q, NEIGHBORS)[1], float((folder / "build_seconds").read_text()), opened, before
    store = RetroDatastore.load(store_path)
    entry = store.shards[0].entry
    keys = store.shards[0].keys
    begin, start = time.process_time(), time.perf_counter()
    params = None
    if entry.index["search"]:
        ivf = faiss.SearchParametersIVF(nprobe=int(entry.index["search"]["nprobe"]))
        params = faiss.IndexRefineSearchParameters(
            k_factor=float(entry.index["search"]["k_factor"]), base_index_params=ivf
        )
    if who == "faiss":
        path = store_path / "index-00000.faiss"
        index = open_index(path, mapped(path), entry.index["factory"], len(keys), DIM)
        if params:
            return lambda q: index.search(q, NEIGHBORS, params=params)[1], None, time.perf_counter() - start, before

        def flat(q):
            # FAISS' own setting for matrix products from 3 queries on, so that both do the same work.
            faiss.cvar.distance_compute_blas_threshold = 3 * DIM
            return index.search(q, NEIGHBORS)[1]

        return flat, None, time.perf_counter() - start, before
    if who == "faiss, exact":
        index = faiss.IndexFlatIP(DIM)
        index.add(keys.astype(np.float32))
        return lambda q: index.search(q, NEIGHBORS)[1], time.process_time() - begin, None, before
    if who == "datasets":
        import datasets
        import pyarrow as pa

        vectors = pa.FixedSizeListArray.from_arrays(pa.array(keys.astype(np.float32).ravel()), DIM)
        dataset = datasets.Dataset(pa.table({"key": vectors}))
        dataset.add_faiss_index(
            "key",
            string_factory=entry.index["factory"],
            metric_type=faiss.METRIC_INNER_PRODUCT,
            train_size=min(len(keys), TRAINING_ROWS),
        )
        index = dataset.get_index("key")

        def search_batch(q):
            return index.search_batch(q, NEIGHBORS, params=params).total_indices

        return search_batch, time.process_time() - begin, None, before
    if who == "usearch":
        from usearch.index import Index

        index = Index(ndim=DIM, metric="ip", dtype="f16")
        index.add(np.arange(len(keys)), np.asarray(keys), threads=int(os.environ["OMP_NUM_THREADS"]))
        built = time.process_time() - begin

        def search_graph(q):
            return np.atleast_2d(index.search(q, NEIGHBORS, threads=1).keys).astype(np.int64)

        # Until it finds what retro-hf aims at, on the very queries that it is measured with.
        while index.expansion_search < 4096 and recall_of(search_graph, folder) < RECALL:
            index.expansion_search *= 2
        return search_graph, built, None, before
    from autofaiss import build_index

    index, _ = build_index(keys.astype(np.float32), save_on_disk=False, metric_type="ip", verbose=40)
    return lambda q: index.search(q, NEIGHBORS)[1], time.process_time() - begin, None, before


def recall_of(search, folder: Path) -> float:
    """Share of the answers whose exact score reaches that of the last exact neighbor."""
    queries = np.load(folder / "queries.npy").astype(np.float32)
    keys = np.memmap(next((folder / "store").glob("keys-*")), dtype=np.float16, mode="r", offset=256).reshape(-1, DIM)
    ids = search(queries)
    scores = np.einsum("qd,qkd->qk", queries, keys[np.maximum(ids, 0)].astype(np.float32))
    return float((np.where(ids >= 0, scores, -np.inf) >= np.load(folder / "exact.npy") - 1e-4).mean())


def measure(who: str, folder: Path) -> dict:
    """Recall, CPU milliseconds per query by batch size, and memory of one contestant in this process."""
    queries = np.load(folder / "queries.npy").astype(np.float32)
    search, build_seconds, open_seconds, before = contestant(who, folder)
    result = {"build_core_seconds": build_seconds, "open_ms": None if open_seconds is None else 1000 * open_seconds}
    for batch in BATCHES:
        search(queries[:batch])
        rounds = max(3, 200 // batch)
        times, walls = [], []
        for number in range(rounds):
            part = queries[(number * batch) % len(queries) :][:batch]
            begin, start = time.process_time(), time.perf_counter()
            search(part)
            times.append((time.process_time() - begin) / len(part))
            walls.append((time.perf_counter() - start) / len(part))
        result[f"core_ms_{batch}"] = 1000 * float(np.median(times))
        result[f"wall_ms_{batch}"] = 1000 * float(np.median(walls))
        if batch == 1:
            result["memory_mb"] = (resident_mb() - before).tolist()
    result["recall"] = recall_of(search, folder)
    return result


def measure_overhead(folder: Path) -> dict:
    """CPU time of `RetroDatastore.search` over that of FAISS' own `search`, taking turns on one opened index.

    Both answer every query, never one right after the other: what it reads would lie in the processor's cache by then.
    """
    from retro_hf.datastore import RetroDatastore
    from retro_hf.datastore.index import search_index, search_parameters

    store = RetroDatastore.load(folder / "store")
    index, search = store.shards[0].index, store.shards[0].entry.index["search"]
    parameters = search_parameters(index, search)
    queries = np.load(folder / "queries.npy").astype(np.float32)
    calls = {
        # Exact search with our setting of FAISS' threshold, so that both do the same work.
        "faiss": lambda part: (
            index.search(part, NEIGHBORS, params=parameters)
            if search
            else search_index(index, part, NEIGHBORS, parameters)
        ),
        "retro-hf": lambda part: store.search(part, NEIGHBORS),
    }
    result = {}
    for batch in BATCHES:
        times: dict[str, list[float]] = {who: [] for who in calls}
        parts = [queries[start:][:batch] for start in range(0, len(queries) - batch + 1, batch)][:500]
        for turn in range(4 if batch == 1 else max(8, 64 // len(parts))):
            for number, part in enumerate(parts):
                who = tuple(calls)[(turn + number) % 2]
                begin = time.process_time()
                calls[who](part)
                times[who].append(time.process_time() - begin)
        result[str(batch)] = float(np.median(times["retro-hf"]) / np.median(times["faiss"]))
    return result


def measure_gather(folder: Path) -> dict:
    """Rows per core-second of reading neighbors' tokens: our stream, and an Arrow table of the same rows."""
    import datasets

    from retro_hf.datastore import RetroDatastore

    store = RetroDatastore.load(folder / "store")
    generator = np.random.default_rng(0)
    some = np.arange(min(store.num_chunks, 100_000))
    rows = store.gather(some)[0].astype(np.uint16)
    features = datasets.Features({"tokens": datasets.List(datasets.Value("uint16"), length=2 * CHUNK)})
    table = datasets.Dataset.from_dict({"tokens": list(rows)}, features=features).with_format("numpy")
    result = {}
    for batch in (64, 1024):
        for who, read in (("retro-hf", store.gather), ("datasets", lambda ids: table[ids.tolist()])):
            ids = generator.integers(len(some), size=(30, batch))
            read(ids[0])
            times = []
            for part in ids:
                begin = time.process_time()
                read(part)
                times.append(time.process_time() - begin)
            result[f"{who}, {batch} rows"] = batch / float(np.median(times))
    return result


def prepare(folder: Path, count: int) -> None:
    """Make keys, held-out queries, their exact scores and the datastore."""
    from retro_hf.datastore.index import exact_search

    folder.mkdir(parents=True, exist_ok=True)
    keys = make_keys(count // DOCUMENT * DOCUMENT, seed=1)
    queries = make_keys(QUERIES, seed=2)
    write_store(folder, keys)
    np.save(folder / "queries.npy", queries)
    np.save(folder / "exact.npy", exact_search(keys, queries.astype(np.float32), NEIGHBORS)[0][:, -1:])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--chunks", type=int, nargs="+", default=[100_000, 1_000_000])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--folder", type=Path, help="keep the datastores here and use those that are there")
    parser.add_argument("--only", nargs="+", choices=CONTESTANTS, default=list(CONTESTANTS))
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/indexes.json"))
    parser.add_argument("--one", nargs=2, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        who, folder = args.one
        folder = Path(folder)
        others = {"gather": measure_gather, "build": measure_build, "overhead": measure_overhead}
        found = others[who](folder) if who in others else measure(who, folder)
        print("RESULT" + json.dumps(found))
        return

    environment = os.environ | {name: str(args.threads) for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS")}
    environment |= {"HF_HUB_OFFLINE": "1"}
    # Sizes and contestants of earlier runs stay in the record.
    results: dict[str, dict] = json.loads(args.out.read_text())["results"] if args.out.exists() else {}
    packages = {one.metadata["Name"]: one.version for one in importlib.metadata.distributions()}
    record = {
        "command": " ".join(["python", *sys.argv]),
        "seed": 0,
        "versions": {name: packages[name] for name in PACKAGES if name in packages},
        "machine": f"{platform.processor() or platform.machine()}, {args.threads} thread(s) of {os.cpu_count()}",
        "results": results,
    }
    args.out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as temporary:
        for count in args.chunks:
            folder = (args.folder or Path(temporary)) / str(count)
            if not (folder / "exact.npy").exists():
                prepare(folder, count)
            rows = results.setdefault(str(count), {})
            for who in (*args.only, "overhead", "gather", "build"):
                command = [sys.executable, __file__, "--one", who, str(folder)]
                done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
                line = next((line for line in done.stdout.splitlines() if line.startswith("RESULT")), None)
                rows[who] = (
                    json.loads(line[6:]) if line else {"failed": (done.stderr.strip().splitlines() or ["?"])[-1]}
                )
                args.out.write_text(json.dumps(record, indent=1) + "\n")
                print(count, who, rows[who], flush=True)

    for count, rows in results.items():
        print(f"\n{int(count):,} chunks of dimension {DIM}, CPU milliseconds of {args.threads} thread(s) per query")
        print(
            "| | recall@2 | batch 1 | batch 32 | batch 1000 | own memory, MB | mapped, MB | build, core-s | open, ms |"
        )
        print("|---|---|---|---|---|---|---|---|---|")
        for who, row in rows.items():
            if "recall" in row:
                speeds = " | ".join(f"{row[f'core_ms_{batch}']:.3f}" for batch in BATCHES)
                cells = [f"{row['recall']:.3f}", speeds, *(f"{value:.0f}" for value in row["memory_mb"])]
                cells += [
                    "" if row[name] is None else f"{row[name]:.1f}" for name in ("build_core_seconds", "open_ms")
                ]
                print(f"| {who} | {' | '.join(cells)} |")
            elif "failed" in row:
                print(f"| {who} | {row['failed']} |")


if __name__ == "__main__":
    main()
