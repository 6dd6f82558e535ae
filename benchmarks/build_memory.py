"""The largest memory of a whole build from a stream, documents in and datastore out, beside the size of what is built.

    python benchmarks/build_memory.py                     # 10^5 and 10^6 chunks, about 10 minutes on one core
    python benchmarks/build_memory.py --chunks 20000

Documents of 20 chunks of 64 words come from a generator, one by one. Random vectors (those of `neighbors.py`) take the place of
an encoder's output, so only the memory of the datastore is measured; an encoder takes its own, and activations for one batch.
Memory is the process's own (RssAnon); pages mapped from files belong to the disk cache.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np


DOCUMENT_WORDS, CHUNK_SIZE = 20 * 64, 64


def stream(num_chunks: int) -> Iterator[dict]:
    """Documents that nothing holds on to."""
    generator = np.random.default_rng(0)
    for number in range(num_chunks // 20):
        yield {
            "id": str(number),
            "text": " ".join(f"w{word}" for word in generator.integers(1, 30_000, DOCUMENT_WORDS)),
        }


def measure(num_chunks: int) -> dict:
    """Build in this process."""
    from indexes import PeakMemory, resident_mb
    from neighbors import Points, make_tokenizer

    from retro_hf.datastore import RetroDatastore

    embedder, tokenizer = Points(), make_tokenizer()
    with tempfile.TemporaryDirectory() as folder:
        before, begin = resident_mb()[0], time.process_time()
        with PeakMemory() as peak:
            store = RetroDatastore.build(
                stream(num_chunks), f"{folder}/store", tokenizer=tokenizer, embedder=embedder, chunk_size=CHUNK_SIZE
            )
        size = sum(file.stat().st_size for file in Path(folder, "store").iterdir())
        return {
            "chunks": store.num_chunks,
            "index": store.manifest.index["factory"],
            "before_mb": round(float(before)),
            "peak_above_mb": round(peak.mb),
            "store_mb": round(size / 1e6),
            "core_seconds": round(time.process_time() - begin),
        }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--chunks", type=int, nargs="+", default=[100_000, 1_000_000])
    parser.add_argument("--here", action="store_true", help="in this process, and print JSON")
    args = parser.parse_args()
    if args.here:
        print(json.dumps(measure(args.chunks[0])))
        return
    for num_chunks in args.chunks:  # each in a process of its own, so that its peak is its own
        command = [sys.executable, __file__, "--here", "--chunks", str(num_chunks)]
        print(subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()[-1], flush=True)


if __name__ == "__main__":
    main()
