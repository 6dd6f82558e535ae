"""What a datastore of any size costs, computed from the costs of one chunk: the tables of docs/scale.md.

    python benchmarks/scale.py                                 # all tables, for both encoders
    python benchmarks/scale.py --chunks 3e8 --encoder bert     # your own size

Unit costs are measured or assumed, and say which. Sizes of indexes come from the library's own plan, so they are those that
a build announces. Nothing here is a promise: above 4 million chunks everything is extrapolated.
"""

import argparse
import math
from typing import NamedTuple

from retro_hf.datastore.index_plan import DEFAULT_SHARD_CHUNKS, MAX_FLAT_CHUNKS, flat_plan, ivf_plan


class Unit(NamedTuple):
    """A unit cost and where it comes from: `measured` on one core of an x86-64 server CPU, `assumed`, or the `format`."""

    value: float
    unit: str
    origin: str
    note: str


UNITS = {
    "chunk_tokens": Unit(64, "tokens per chunk", "assumed", "the paper's size"),
    "token_bytes": Unit(2, "bytes per token", "format", "uint16; 4 for vocabularies above 65,536"),
    "text_bytes": Unit(275, "bytes of text per chunk", "assumed", "4.3 characters per token"),
    "text_ratio": Unit(0.4, "compressed / raw text", "assumed", "zstd on prose"),
    "document_chunks": Unit(16, "chunks per document", "assumed", "1,000 tokens"),
    "document_bytes": Unit(32, "bytes per document", "format", "borders, lengths, hashes of ids"),
    "read_rate": Unit(
        170e6, "bytes of text per core-s", "measured", "JSONL read, hashed and handed out by one driver"
    ),
    "tokenize_rate": Unit(2.1e6, "bytes of text per core-s", "measured", "a byte-level BPE"),
    "minilm_core": Unit(169, "chunks per core-s", "measured", "MiniLM-L6 (d 384), torch bf16"),
    "minilm_gpu": Unit(138e3, "chunks per GPU-s", "assumed", "1.446 GFLOP per chunk at 200 TFLOP/s"),
    "bert_core": Unit(27.7, "chunks per core-s", "measured", "BERT-base (d 768), torch bf16"),
    "bert_gpu": Unit(30.7e3, "chunks per GPU-s", "assumed", "11.39 GFLOP per chunk at 350 TFLOP/s"),
    "flat_rate": Unit(105e9, "FLOP per core-s", "measured", "exact search in batches"),
    "graph_seconds": Unit(1 / 12_200, "core-s per query", "measured", "nearest lists by HNSW, 8,192 lists"),
    "code_seconds": Unit(2.35e-9, "core-s per 48-byte code", "measured", "1.5 to 3.2 ns"),
    "other_seconds": Unit(155e-6, "core-s per query and shard", "measured", "the rest of 0.23 ms at 4 million chunks"),
    "probes": Unit(64, "lists read per query and shard", "assumed", "16 sufficed for recall@2 0.96 at 4 million"),
    "page_seconds": Unit(160e-6, "s per page not in memory", "measured", "one at a time; 20 per query and shard"),
    "ray_seconds": Unit(10e-3, "s per search through Ray", "measured", "4 to 15 ms, 2 to 4 actors on 2 cores"),
    "trained_tokens": Unit(419_430_400_000, "tokens of training text", "assumed", "the paper's"),
    "id_bytes": Unit(16, "bytes per chunk of it", "format", "ids of two neighbors"),
    "node_cores": Unit(32, "cores per machine", "assumed", "256 GB of memory, of which 192 for indexes"),
    "node_memory": Unit(192e9, "bytes for indexes per machine", "assumed", ""),
    "core_price": Unit(0.05, "$ per core-hour", "assumed", ""),
    "gpu_price": Unit(3.0, "$ per GPU-hour", "assumed", ""),
    "node_price": Unit(2.4, "$ per machine-hour", "assumed", ""),
}
VALUE = {name: unit.value for name, unit in UNITS.items()}
DIMS = {"minilm": 384, "bert": 768}
SIZES = (1e5, 1e7, 1e8, 1e9, 1e10, 28e9)


class Cost(NamedTuple):
    """What a datastore of one size costs; bytes, seconds of one core or GPU, and seconds of latency."""

    chunks: int
    shards: int
    factory: str
    tokens: float
    text: float
    keys: float
    documents: float
    index_disk: float
    index_memory: float
    build_memory: float
    machines: int
    read: float
    tokenize: float
    embed_core: float
    embed_gpu: float
    index_core: float
    query_core: float
    latency_warm: float
    latency_cold: float


def cost(chunks: float, encoder: str) -> Cost:
    """The cost of a datastore of `chunks` chunks."""
    v, dim = VALUE, DIMS[encoder]
    chunks = int(chunks)
    shards = -(-chunks // DEFAULT_SHARD_CHUNKS)
    size = chunks / shards
    plan = flat_plan(int(size), dim) if chunks <= MAX_FLAT_CHUNKS else ivf_plan(int(size), dim)
    if chunks <= MAX_FLAT_CHUNKS:
        per_shard = 2 * dim * size / v["flat_rate"]
        pages = 0
    else:
        lists = int(plan.factory.split(",")[0].removeprefix("IVF").split("_")[0])
        coarse = v["graph_seconds"] if "HNSW" in plan.factory else 2 * dim * lists / v["flat_rate"]
        code = v["code_seconds"] * dim / 384
        per_shard = coarse + v["probes"] * size / lists * code + v["other_seconds"]
        pages = 20
    memory = shards * plan.memory
    machines = max(1, math.ceil(memory / v["node_memory"]))
    # One process searches shard after shard; on a cluster each core has a shard, or a few in turn.
    turns = shards if machines == 1 else math.ceil(shards / (machines * v["node_cores"]))
    warm = turns * per_shard + (v["ray_seconds"] if machines > 1 else 0)
    return Cost(
        chunks=chunks,
        shards=shards,
        factory=plan.factory,
        tokens=chunks * v["chunk_tokens"] * v["token_bytes"],
        text=chunks * v["text_bytes"] * v["text_ratio"],
        keys=chunks * dim * 2,
        documents=chunks / v["document_chunks"] * v["document_bytes"],
        index_disk=shards * plan.disk,
        index_memory=memory,
        build_memory=plan.build_memory,
        machines=machines,
        read=chunks * v["text_bytes"] / v["read_rate"],
        tokenize=chunks * v["text_bytes"] / v["tokenize_rate"],
        embed_core=chunks / v[f"{encoder}_core"],
        embed_gpu=chunks / v[f"{encoder}_gpu"],
        index_core=shards * plan.build_seconds,
        query_core=shards * per_shard,
        latency_warm=warm,
        latency_cold=warm + turns * pages * v["page_seconds"],
    )


def amount(value: float, units: tuple[str, ...] = ("B", "KB", "MB", "GB", "TB", "PB")) -> str:
    """A number of bytes in words."""
    step = 0
    while value >= 1000 and step < len(units) - 1:
        value, step = value / 1000, step + 1
    return f"{value:.3g} {units[step]}"


def rounded(value: float) -> str:
    """Two digits, without an exponent."""
    return f"{float(f'{value:.2g}'):,g}"


def duration(seconds: float) -> str:
    """Seconds, minutes or hours in words."""
    for name, size in (("h", 3600), ("min", 60)):
        if seconds >= size:
            return f"{rounded(seconds / size)} {name}"
    return f"{rounded(seconds)} s"


def name_of(chunks: int) -> str:
    """10^7, 2.8·10^10."""
    power = int(math.log10(chunks))
    factor = chunks / 10**power
    return f"10^{power}" if factor == 1 else f"{factor:g}·10^{power}"


def print_table(
    title: str, header: tuple[str, ...], rows: list[tuple[str, ...]], left: tuple[int, ...] = (0,)
) -> None:
    widths = [max(len(row[column]) for row in (header, *rows)) for column in range(len(header))]
    print(f"\n{title}")
    for row in (header, *rows):
        cells = zip(row, widths, strict=True)
        aligned = (cell.ljust(w) if column in left else cell.rjust(w) for column, (cell, w) in enumerate(cells))
        print("  ".join(aligned).rstrip())


def print_units() -> None:
    rows = [(name, f"{unit.value:.3g}", unit.unit, unit.origin, unit.note) for name, unit in UNITS.items()]
    print_table("unit costs", ("name", "value", "unit", "origin", "note"), rows, left=(0, 2, 3, 4))


def print_tables(costs: list[Cost], encoder: str) -> None:
    v = VALUE
    label = {"minilm": "MiniLM-L6, d = 384", "bert": "BERT-base, d = 768"}[encoder]
    print_table(
        f"{label}: what lies on the disk",
        ("chunks", "shards", "tokens", "text", "keys", "documents", "index", "together"),
        [
            (
                name_of(c.chunks),
                f"{c.shards}",
                *(amount(x) for x in (c.tokens, c.text, c.keys, c.documents, c.index_disk)),
                amount(c.tokens + c.text + c.keys + c.documents + c.index_disk),
            )
            for c in costs
        ],
    )
    print_table(
        f"{label}: building",
        (
            "chunks",
            "driver reads",
            "tokenize",
            "embed, CPU",
            "embed, GPU",
            "index",
            "memory for it",
            "$ on CPUs",
            "$ with GPUs",
        ),
        [
            (
                name_of(c.chunks),
                duration(c.read),
                duration(c.tokenize),
                duration(c.embed_core),
                duration(c.embed_gpu),
                duration(c.index_core),
                amount(c.build_memory),
                rounded((c.tokenize + c.embed_core + c.index_core) / 3600 * v["core_price"]),
                rounded(((c.tokenize + c.index_core) * v["core_price"] + c.embed_gpu * v["gpu_price"]) / 3600),
            )
            for c in costs
        ],
    )
    print_table(
        f"{label}: searching",
        (
            "chunks",
            "index of a shard",
            "in memory",
            "machines",
            "core-ms/query",
            "queries/s",
            "latency",
            "cold",
            "$/month",
            "$/10^9 queries",
        ),
        [
            (
                name_of(c.chunks),
                c.factory.split(",")[0],
                amount(c.index_memory),
                f"{c.machines}",
                rounded(1000 * c.query_core),
                rounded(c.machines * v["node_cores"] / c.query_core),
                f"{rounded(1000 * c.latency_warm)} ms",
                f"{rounded(1000 * c.latency_cold)} ms",
                rounded(c.machines * v["node_price"] * 730),
                rounded(c.query_core * 1e9 / 3600 * v["core_price"]),
            )
            for c in costs
        ],
    )
    queries = v["trained_tokens"] / v["chunk_tokens"]
    print_table(
        f"{label}: looking up the neighbors of a training text, once: {queries / 1e9:.2f} billion queries",
        ("chunks", "search", "$ on CPUs", "embed, GPU", "$ for that", "their ids"),
        [
            (
                name_of(c.chunks),
                duration(queries * c.query_core),
                rounded(queries * c.query_core / 3600 * v["core_price"]),
                duration(queries / v[f"{encoder}_gpu"]),
                rounded(queries / v[f"{encoder}_gpu"] / 3600 * v["gpu_price"]),
                amount(queries * v["id_bytes"]),
            )
            for c in costs
        ],
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--chunks", type=float, nargs="+", default=SIZES, help="sizes of the datastore")
    parser.add_argument("--encoder", choices=sorted(DIMS), help="by default both")
    arguments = parser.parse_args()
    print_units()
    for encoder in [arguments.encoder] if arguments.encoder else ("minilm", "bert"):
        print_tables([cost(chunks, encoder) for chunks in arguments.chunks], encoder)


if __name__ == "__main__":
    main()
