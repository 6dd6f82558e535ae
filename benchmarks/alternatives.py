"""
RETRO compared to in-context retrieval and kNN-LM: the same text in the store, the same tokens predicted, cost per token.

    python benchmarks/alternatives.py                       # about 10 minutes on 1 core: hub_configs/retro-bible
    python benchmarks/alternatives.py --model smollm2 --books james --documents 8 --tuning-documents 2 --rounds 1

Writes benchmarks/results/alternatives.json, by model; what was expected and what came out is told in
docs/results/alternatives.md. Every method runs in a process of its own, so that its peak memory is its own:

- `off`: the backbone alone, which also serves in-context retrieval and kNN-LM;
- `retro`: neighbors read through chunked cross-attention (only for a RETRO model);
- `in-context`: the same neighbors read as part of the prompt (baselines/in_context.py);
- `knn-lm`: hidden states of the same text, looked up at every token (baselines/knn_lm.py).

Documents are those of the demo: passages in one translation, the store holding the same books in two others. What has
to be chosen for a method (number of passages and what separates them; votes, temperature and their share) is chosen on
other held-out passages. Seconds are those of the processor, one thread, tokenizing and searching included, the median
of `--rounds`; operations are counted by torch, and by hand for FAISS.
"""

import argparse
import json
import math
import os
import platform
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from importlib.metadata import version
from multiprocessing import get_context
from pathlib import Path
from statistics import median


ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "examples"))
os.environ.setdefault("OMP_NUM_THREADS", "1")

import faiss  # noqa: E402
import numpy as np  # noqa: E402
import torch  # noqa: E402
from baselines import in_context, knn_lm  # noqa: E402
from baselines.rows import token_ids  # noqa: E402
from demo_data import load_corpus, minilm_path, split  # noqa: E402
from retrofit_smollm2 import load_base  # noqa: E402
from torch.utils.flop_counter import FlopCounterMode  # noqa: E402
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer  # noqa: E402

from retro_hf import ChunkEmbedder, RetroDatastore, RetroRetriever, __version__  # noqa: E402
from retro_hf.evaluation import bits_per_byte  # noqa: E402


WINDOW, NEIGHBORS, BATCH = 512, 2, 8
COUNTED = 8  # documents whose operations are counted


@dataclass(frozen=True)
class Job:
    """What the processes share: folders, and documents by use."""

    model: Path
    folder: Path
    store: list[dict]
    measured: list[dict]
    tuning: list[dict]
    rounds: int

    def load(self):
        """The tokenizer, the RETRO model or None, and the plain language model."""
        tokenizer = AutoTokenizer.from_pretrained(self.model)
        model = AutoModelForCausalLM.from_pretrained(self.model, dtype=torch.float32).eval()
        is_retro = hasattr(model, "set_retriever")
        return (tokenizer, model, model.model.backbone) if is_retro else (tokenizer, None, model)

    def retriever(self) -> RetroRetriever:
        """What RETRO and in-context retrieval read; nothing is remembered, so that each round searches again."""
        embedder = ChunkEmbedder.from_pretrained(minilm_path())
        datastore = RetroDatastore.load(self.folder / "datastore")
        return RetroRetriever(datastore, embedder=embedder, num_neighbors=NEIGHBORS, cache_size=0)


def peak_mb() -> float:
    """Peak resident memory of this process; `getrusage` would show its parent's, where that was larger."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith("VmHWM")).split()[1]) / 1024


def size_mb(*paths: Path) -> float:
    files = [file for path in paths for file in ([path] if path.is_file() else path.rglob("*"))]
    return sum(file.stat().st_size for file in files if file.is_file()) / 1e6


def measure(job: Job, work, search_flops: float, **facts) -> dict:
    """Run `work(documents)`, which returns nats and tokens per document, in turns; count operations on a few documents."""
    seconds = []
    for _ in range(job.rounds):
        start = time.process_time()
        nats, num_tokens = work(job.measured)
        seconds.append(time.process_time() - start)
    with FlopCounterMode(display=False) as counter:
        _, counted = work(job.measured[:COUNTED])
    flops = counter.get_total_flops() / sum(counted) + search_flops
    return {
        "nats": [float(value) for value in nats],
        "num_tokens": [int(value) for value in num_tokens],
        "ms_per_token": [1000 * value / sum(num_tokens) for value in seconds],
        "mflop_per_token": flops / 1e6,
        "peak_mb": peak_mb(),
        **facts,
    }


def score(model, documents, tokenizer, retriever=None):
    """Our own evaluation in one mode: nats and tokens per document, and bytes."""
    mode = "off" if retriever is None else "on"
    options = {"modes": (mode,), "window": WINDOW, "stride": WINDOW // 2, "batch_size": BATCH, "num_resamples": 1}
    result = bits_per_byte(model, documents, tokenizer, retriever=retriever, show_progress=False, **options)
    return result.nats[mode], result.num_tokens, result.num_bytes.tolist()


def run_off(job: Job) -> dict:
    tokenizer, _, plain = job.load()
    num_bytes = []

    def run(documents):
        nats, num_tokens, sizes = score(plain, documents, tokenizer)
        num_bytes.append(sizes)
        return nats, num_tokens

    facts = {"store_mb": 0.0, "parameters": sum(p.numel() for p in plain.parameters())}
    return measure(job, run, 0.0, **facts) | {"num_bytes": num_bytes[0]}


def run_retro(job: Job) -> dict:
    tokenizer, model, _ = job.load()
    retriever = job.retriever()
    facts = {"store_mb": size_mb(job.folder / "datastore"), "parameters": sum(p.numel() for p in model.parameters())}
    search = chunk_search_flops(retriever)
    return measure(job, lambda documents: score(model, documents, tokenizer, retriever)[:2], search, **facts)


def chunk_search_flops(retriever: RetroRetriever) -> float:
    """Operations per token of exact search for every chunk."""
    store = retriever.datastore
    return 2 * store.num_chunks * store.manifest.dim / store.chunk_size


def run_in_context(job: Job) -> dict:
    tokenizer, _, plain = job.load()
    retriever = job.retriever()

    def run(documents, **choice):
        ids = token_ids(documents, tokenizer)
        nats = in_context.nats_in_context(plain, ids, retriever, window=WINDOW, batch_size=BATCH, **choice)
        return nats, [len(row) - 1 for row in ids]

    tried = []
    for num_passages in (1, 2):
        for separator in ("", "\n"):
            ids = tokenizer(separator, add_special_tokens=False)["input_ids"]
            choice = {"num_passages": num_passages, "separator": ids}
            nats, num_tokens = run(job.tuning, **choice)
            tried.append((float(nats.sum() / sum(num_tokens)), choice))
    choice = min(tried, key=lambda entry: entry[0])[1]
    return measure(
        job,
        lambda documents: run(documents, **choice),
        chunk_search_flops(retriever),
        store_mb=size_mb(job.folder / "datastore"),
        choice=choice,
        tried=tried,
        tokens_read_per_token=read_per_token(job, tokenizer, retriever, choice),
    )


def read_per_token(job: Job, tokenizer, retriever, choice: dict) -> float:
    ids = token_ids(job.measured, tokenizer)
    rows = in_context.prompts(ids, retriever, choice["num_passages"], choice["separator"], WINDOW)[0]
    return sum(map(len, rows)) / sum(len(row) - 1 for row in ids)


def knn_paths(job: Job) -> tuple[Path, Path]:
    return job.folder / "knn.faiss", job.folder / "knn_values.npy"


def build_knn(job: Job) -> dict:
    """Build kNN-LM's datastore unless it is there; what it took and holds."""
    note = job.folder / "knn.json"
    if note.exists():
        return json.loads(note.read_text())
    tokenizer, _, plain = job.load()
    start = time.process_time()
    index, values = knn_lm.build(plain, token_ids(job.store, tokenizer), window=WINDOW, batch_size=BATCH)
    built = {"build_seconds": time.process_time() - start, "vectors": index.ntotal, "lists": index.nlist}
    index_path, values_path = knn_paths(job)
    faiss.write_index(index, str(index_path))
    np.save(values_path, values)
    note.write_text(json.dumps(built))
    return built


def run_knn(job: Job) -> dict:
    tokenizer, _, plain = job.load()
    index_path, values_path = knn_paths(job)
    index, values = faiss.read_index(str(index_path)), np.load(values_path)
    options = {"window": WINDOW, "batch_size": BATCH}
    probed = index.nprobe
    found = knn_lm.find_votes(plain, token_ids(job.tuning, tokenizer), index, values, max(knn_lm.COUNTS), **options)
    mixture = knn_lm.tune(found)
    index.nprobe = index.nlist
    exact = knn_lm.find_votes(plain, token_ids(job.tuning[:2], tokenizer), index, values, mixture.k, **options)
    index.nprobe = probed
    compared = found.distances[: len(exact.distances), : mixture.k] <= exact.distances[:, -1:] * (1 + 1e-6)

    def run(documents):
        ids = token_ids(documents, tokenizer)
        votes = knn_lm.find_votes(plain, ids, index, values, mixture.k, **options)
        return votes.nats(mixture, len(ids)), [len(row) - 1 for row in ids]

    flops = 2 * index.d * (index.nlist + index.ntotal * probed / index.nlist)
    facts = {"choice": vars(mixture), "recall": float(compared.mean()), "store_mb": size_mb(index_path, values_path)}
    return measure(job, run, flops, **facts)


def build_store(job: Job) -> float:
    """Build the datastore unless it is there; the CPU-seconds it took."""
    note = job.folder / "datastore_seconds.json"
    if note.exists():
        return json.loads(note.read_text())
    tokenizer, model, _ = job.load()
    sizes = {} if model is None else {"neighbor_size": model.config.neighbor_size}
    embedder = ChunkEmbedder.from_pretrained(minilm_path())
    start = time.process_time()
    RetroDatastore.build(
        job.store,
        job.folder / "datastore",
        tokenizer=tokenizer,
        embedder=embedder,
        chunk_size=64 if model is None else model.config.chunk_size,
        **sizes,
    )
    seconds = time.process_time() - start
    note.write_text(json.dumps(seconds))
    return seconds


def in_own_process(function, job: Job):
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        return pool.submit(function, job).result()


def spread(documents: list[dict], count: int) -> list[dict]:
    """`count` documents, evenly apart; the demo's choice."""
    return documents[:: max(len(documents) // count, 1)][:count]


def make_job(args: argparse.Namespace) -> Job:
    model = Path(args.model)
    if args.model == "smollm2":
        model = load_base(args.work / "smollm2")
    parts = split(load_corpus("bible"), "test")
    if args.books:
        chosen = set(args.books)
        parts = parts._replace(
            **{
                use: [d for d in getattr(parts, use) if d["id"].split("/")[1] in chosen]
                for use in ("store", "heldout")
            }
        )
    heldout = sorted(parts.heldout, key=lambda document: document["id"])
    measured = spread(heldout, args.documents)
    names = {document["id"] for document in measured}
    tuning = spread([document for document in heldout if document["id"] not in names], args.tuning_documents)
    folder = args.work / f"{model.name}-{'-'.join(args.books or ['all'])}"
    folder.mkdir(parents=True, exist_ok=True)
    return Job(model, folder, parts.store, measured, tuning, args.rounds)


def interval(difference: np.ndarray, num_bytes: np.ndarray) -> list[float]:
    """Bits per byte and its 95 % interval over documents drawn again, as `bits_per_byte` has it."""
    generator = np.random.default_rng(0)
    drawn = generator.integers(len(difference), size=(2000, len(difference)))
    means = difference[drawn].sum(1) / num_bytes[drawn].sum(1) / math.log(2)
    return [float(value) for value in np.quantile(means, (0.025, 0.975))]


def summary(results: dict[str, dict]) -> dict[str, dict]:
    """What the table shows of each method."""
    off = results["off"]
    num_bytes, nothing = np.array(off["num_bytes"]), np.array(off["nats"])
    rows = {}
    for name, result in results.items():
        if result["num_tokens"] != off["num_tokens"]:
            raise SystemExit(f"{name} scored other tokens than off: {result['num_tokens']}, {off['num_tokens']}")
        nats = np.array(result["nats"])
        rows[name] = {
            "bits_per_byte": float(nats.sum() / num_bytes.sum() / math.log(2)),
            "difference": float((nats - nothing).sum() / num_bytes.sum() / math.log(2)),
            "interval": interval(nats - nothing, num_bytes),
            "ms_per_token": median(result["ms_per_token"]),
            **{
                key: value
                for key, value in result.items()
                if key not in ("nats", "num_tokens", "num_bytes", "ms_per_token")
            },
            "ms_per_token_rounds": [round(value, 4) for value in result["ms_per_token"]],
        }
    return rows


def table(rows: dict[str, dict]) -> str:
    lines = [
        "| | bits per byte | minus off, 95 % interval | CPU-ms per token | MFLOP per token | store | peak memory | preparing |",
        "|---|---|---|---|---|---|---|---|",
    ]
    off = rows["off"]
    for name, row in rows.items():
        low, high = row["interval"]
        against = f"{row['difference']:+.4f} [{low:+.4f}, {high:+.4f}]" if name != "off" else ""
        cost = f"{row['ms_per_token']:.2f} ({row['ms_per_token'] / off['ms_per_token']:.1f}x)"
        lines.append(
            f"| {name} | {row['bits_per_byte']:.4f} | {against} | {cost} | {row['mflop_per_token']:.0f} | "
            f"{row['store_mb']:.0f} MB | {row['peak_mb']:.0f} MB | {row.get('build_seconds', 0):.0f} CPU-s |"
        )
    return "\n".join(lines)


def arguments(description: str) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=str(ROOT / "hub_configs" / "retro-bible"), help="a folder, or smollm2")
    parser.add_argument("--books", type=lambda names: names.split(","), help="of the test books; all by default")
    parser.add_argument("--documents", type=int, default=60)
    parser.add_argument("--tuning-documents", type=int, default=20)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--work", type=Path, default=ROOT / ".data" / "alternatives", help="folder for the stores")
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results" / "alternatives.json")
    return parser


def main() -> None:
    args = arguments(__doc__).parse_args()
    job = make_job(args)
    build_seconds = in_own_process(build_store, job)
    built = in_own_process(build_knn, job)
    runs = {"off": run_off, "retro": run_retro, "in-context": run_in_context, "knn-lm": run_knn}
    if AutoConfig.from_pretrained(job.model).model_type != "retro":
        del runs["retro"]
    results = {}
    for name, run in runs.items():
        results[name] = in_own_process(run, job)
        if name != "off":
            results[name] |= built if name == "knn-lm" else {"build_seconds": build_seconds}
        print(f"{name}: {1000 * median(results[name]['ms_per_token']):.0f} µs of the processor per token", flush=True)
    rows = summary(results)
    print(table(rows))
    save(args, job, results, rows)


def save(args: argparse.Namespace, job: Job, results: dict, rows: dict) -> None:
    """Put this model's record beside those of others."""
    asked = sys.argv[1:]
    folders = {"--work", "--output"}  # of this machine
    asked = [word for place, word in enumerate(asked) if not {word, *asked[max(0, place - 1) : place]} & folders]
    record = {
        "command": " ".join(["python", "benchmarks/alternatives.py", *asked]),
        "machine": f"{platform.machine()}, {os.environ['OMP_NUM_THREADS']} thread",
        "versions": {"retro-hf": __version__}
        | {name: version(name) for name in ("torch", "transformers", "faiss-cpu", "numpy")},
        "rounds": args.rounds,
        "window": WINDOW,
        "batch_size": BATCH,
        "books": args.books,
        "documents": [document["id"] for document in job.measured],
        "tuning_documents": [document["id"] for document in job.tuning],
        "store_documents": len(job.store),
        "num_tokens": sum(results["off"]["num_tokens"]),
        "num_bytes": sum(results["off"]["num_bytes"]),
        "methods": rows,
    }
    everything = json.loads(args.output.read_text()) if args.output.exists() else {}
    everything[job.folder.name] = record
    args.output.write_text(json.dumps(everything, indent=1) + "\n")


if __name__ == "__main__":
    main()
