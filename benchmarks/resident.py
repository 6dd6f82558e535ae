"""How little memory must a million chunks have to be searched one query at a time?

    python benchmarks/resident.py                 # about 10 minutes on one core, most of them to make the datastore

The index keeps lists and codes in memory of its own; the keys that re-score its candidates are mapped from the file. Pages of
it that were read count as resident until the system wants them back. So the same queries are asked twice: as the process
is, and with the mapped pages given back every so many queries (`madvise(MADV_DONTNEED)`, as a system short of memory would),
from where they come back through the disk cache. Resident is what /proc says: own (RssAnon) and mapped (RssFile), above what the
process had after its imports, before it opened the datastore.
"""

import argparse
import ctypes
import json
import time
from pathlib import Path

import faiss
import numpy as np
from indexes import make_keys, resident_mb, write_store


QUERIES, EVERY, NEIGHBORS, MADV_DONTNEED = 5000, 10, 2, 4


def give_back(path: Path) -> None:
    """Drop the pages of a mapped file from this process."""
    libc = ctypes.CDLL(None, use_errno=True)
    for line in Path("/proc/self/maps").read_text().splitlines():
        if line.endswith(str(path)):
            first, last = (int(end, 16) for end in line.split()[0].split("-"))
            if libc.madvise(ctypes.c_void_p(first), ctypes.c_size_t(last - first), MADV_DONTNEED):
                raise OSError(ctypes.get_errno(), "madvise")


def ask(store, queries: np.ndarray, index_path: Path, every: int | None, before: np.ndarray) -> dict:
    """One query after the other: CPU milliseconds each, and the most that was resident."""
    most, seconds = np.zeros(2), []
    give_back(index_path)
    for number, query in enumerate(queries):
        begin = time.process_time()
        store.search(query[None], NEIGHBORS)
        seconds.append(time.process_time() - begin)
        if (number + 1) % EVERY == 0:
            now = resident_mb() - before
            most = now if now.sum() > most.sum() else most
            if every is not None:
                give_back(index_path)
    milliseconds = 1e3 * np.array(seconds)
    return {
        "most_own_mb": round(float(most[0])),
        "most_mapped_mb": round(float(most[1])),
        "ms_mean": round(float(milliseconds.mean()), 3),
        "ms_median": round(float(np.median(milliseconds)), 3),
        "ms_99": round(float(np.quantile(milliseconds, 0.99)), 3),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--chunks", type=int, default=1_000_000)
    parser.add_argument("--work", type=Path, default=Path("demo_output/resident"))
    args = parser.parse_args()
    from retro_hf.datastore import RetroDatastore

    faiss.omp_set_num_threads(1)
    if not (args.work / "store").exists():
        args.work.mkdir(parents=True, exist_ok=True)
        write_store(args.work, make_keys(args.chunks, 1))
    queries = make_keys(QUERIES, 2).astype(np.float32)
    queries /= np.linalg.norm(queries, axis=1, keepdims=True)
    before = resident_mb()
    store = RetroDatastore.load(args.work / "store")
    index_path = next((args.work / "store").glob("index-*.faiss")).resolve()
    store.search(queries[:1], NEIGHBORS)
    for every in (None, EVERY):
        found = ask(store, queries, index_path, every, before)
        print(
            json.dumps({"given back every": every, "index": store.manifest.shards[0].index["search"], **found}),
            flush=True,
        )


if __name__ == "__main__":
    main()
