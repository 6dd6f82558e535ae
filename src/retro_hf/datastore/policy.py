"""Which index a datastore gets: by its size, the recall asked for and the memory there is; what it will cost.

The constants are measured (docs/scale.md): d-dimensional keys of a small encoder, one core.
"""

from __future__ import annotations

import math
import re
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from transformers.utils import logging

from ..errors import DatastoreInputError, counted
from .index import BLOCK_ROWS, TRAINING_ROWS_PER_LIST, import_faiss, training_points


if TYPE_CHECKING:
    from .embedder import ChunkEmbedder

__all__ = [
    "DEFAULT_SHARD_CHUNKS",
    "IndexOptions",
    "IndexPlan",
    "check_factory",
    "parse_bytes",
    "plan_index",
    "tell_plan",
]

logger = logging.get_logger(__name__)

# 64 million chunks: 64 GB of keys and 4 GB of codes at dim 384, one machine's worth.
DEFAULT_SHARD_CHUNKS = 1 << 26
# Exact search takes 0.7 ms per query in a batch at 100,000 chunks; above twice that, an approximate index pays.
MAX_FLAT_CHUNKS = 200_000
# From here on, finding the nearest lists by a graph is faster than by comparing with all of them.
_GRAPH_LISTS = 1 << 14
_GRAPH_SECONDS_PER_CHUNK = 1 / 12_000
_FLOPS = 1e11
_KMEANS_ITERATIONS = 10
# Above this many chunks the encoder's speed is measured, to tell the time that embedding will take.
_TIMED_CHUNKS = 5000
_BYTES = re.compile(r"(\d{1,20}(?:\.\d*)?(?:e\+?\d\d?)?)\s*(?:([kmgt])(i?))?b?", re.IGNORECASE)
_LEAST_BUDGET = 1000
# The parts of a factory string, spelled as FAISS wants them.
_FACTORY_NAMES = ("auto", "Flat", "fs", "HNSW", "IVF", "LSH", "OPQ", "PCA", "PQ", "Refine", "RFlat", "SQfp16", "SQ")


@dataclass(frozen=True)
class IndexOptions:
    """What is asked of an index.

    Attributes:
        factory (`str`): FAISS factory string, or `"auto"`.
        recall (`float`): share of the two exact nearest neighbors to find; 1.0 asks for exact search.
        memory_budget (`int`, *optional*): bytes that the index may keep in memory while it is searched.
    """

    factory: str = "auto"
    recall: float = 0.95
    memory_budget: int | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.factory, str):
            raise DatastoreInputError(
                f"index is of type {type(self.factory).__name__}, not a FAISS factory string or 'auto'."
            )
        if isinstance(self.recall, bool) or not isinstance(self.recall, (int, float)) or not 0 < self.recall <= 1:
            raise DatastoreInputError(
                f"recall is {self.recall!r}, but it is a share: above 0, at most 1 (exact search)."
            )
        if self.memory_budget is not None and self.factory != "auto":
            raise DatastoreInputError(
                f"index={self.factory!r} and memory_budget={self.memory_budget:,} contradict each other: a budget chooses "
                "the kind of index. Leave one of them out."
            )


@dataclass(frozen=True)
class IndexPlan:
    """An index to be built: its factory string, and bytes in memory when searched, on disk, in memory when built."""

    factory: str
    memory: int
    disk: int
    build_memory: int
    build_seconds: float


def parse_bytes(size: float | str | None) -> int | None:
    """Bytes from a number, or from a text such as `"300MB"`, `"1.5 GB"` (powers of 1000) or `"4GiB"` (of 1024)."""
    if size is None:
        return None
    match = None if isinstance(size, bool) else _BYTES.fullmatch(str(size).strip())
    if match is None:
        raise DatastoreInputError(
            f"memory_budget is {size!r}, but it must be a number of bytes, such as 4e9, or a text with a unit, such as '4GB' "
            "(powers of 1000) or '4GiB' (of 1024): K, M, G or T."
        )
    number, prefix, binary = match.groups()
    num_bytes = int(float(number) * (1024 if binary else 1000) ** " KMGT".index((prefix or " ").upper()))
    if num_bytes < _LEAST_BUDGET:
        raise DatastoreInputError(
            f"memory_budget is {size!r}, which is {counted(num_bytes, 'byte')}: too little for any index. Without a unit, a "
            "number counts bytes; for gigabytes write '4GB'."
        )
    return num_bytes


def flat_plan(num_chunks: int, dim: int) -> IndexPlan:
    """Exact search: every query is compared with every key."""
    size = 4 * dim * num_chunks
    # FAISS doubles its buffer as it grows, and is handed a block at a time.
    return IndexPlan("Flat", size, size, 2 * size + 4 * dim * BLOCK_ROWS, num_chunks / 1e6)


def ivf_plan(num_chunks: int, dim: int) -> IndexPlan:
    """Lists of 4-bit codes in memory, re-scored from float16 keys that stay on disk.

    Without re-scoring, product quantization loses 40 % of the two nearest neighbors.
    """
    num_lists = min(max(2 ** round(math.log2(4 * math.sqrt(num_chunks))), 1024), 1 << 20)
    codes, code_bytes = (f"PQ{dim // 4}x4fs", dim // 8) if dim % 4 == 0 else ("SQ8", dim)
    graph = "_HNSW32" if num_lists >= _GRAPH_LISTS else ""
    # An id for each code; for each list a centroid (and its links in the graph), and half a block of 32 codes not filled.
    memory = (code_bytes + 8) * num_chunks + (4 * dim + (280 if graph else 0) + 16 * code_bytes) * num_lists
    disk = memory + 2 * dim * num_chunks
    training_rows = min(num_chunks, TRAINING_ROWS_PER_LIST * num_lists)
    train = 2 * dim * num_lists * training_rows * _KMEANS_ITERATIONS / _FLOPS
    assign = num_chunks * (_GRAPH_SECONDS_PER_CHUNK if graph else 2 * dim * num_lists / _FLOPS)
    return IndexPlan(
        f"IVF{num_lists}{graph},{codes},Refine(SQfp16)",
        memory,
        disk,
        memory + 6 * dim * training_rows + 4 * dim * BLOCK_ROWS,
        train + assign,
    )


def plan_index(num_chunks: int, dim: int, options: IndexOptions, total_chunks: int | None = None) -> IndexPlan:
    """Choose the index of a shard of `num_chunks` keys, in a store of `total_chunks`.

    Raises:
        DatastoreInputError: if no kind fits the memory budget; says what would.
    """
    if options.factory != "auto":
        check_factory(options.factory, num_chunks, dim)
        # The factory's own compression is not known here: at most the keys in float32 and in float16.
        size = 6 * dim * num_chunks
        return IndexPlan(options.factory, size, size, size, num_chunks / 1e6)
    share = num_chunks / (total_chunks or num_chunks)
    budget = math.inf if options.memory_budget is None else options.memory_budget * share
    flat, ivf = flat_plan(num_chunks, dim), ivf_plan(num_chunks, dim)
    plans = [flat] if options.recall == 1 else [flat, ivf] if num_chunks <= MAX_FLAT_CHUNKS else [ivf]
    # A compressed index needs as many keys as it has lists to be trained.
    plans = [plan for plan in plans if plan is flat or num_chunks >= training_points(plan.factory)]
    fitting = [plan for plan in plans if plan.memory <= budget]
    if not fitting:
        least = min(plans, key=lambda plan: plan.memory)
        per_chunk = least.memory / num_chunks
        raise DatastoreInputError(
            f"An index of {counted(total_chunks or num_chunks, 'chunk')} of dimension {dim} needs {_size(least.memory / share)} of memory "
            f"({least.factory!r}, {per_chunk:.0f} bytes per chunk), but memory_budget is {_size(options.memory_budget or 0)}. "
            f"That holds {counted(int((options.memory_budget or 0) / per_chunk), 'chunk')}: raise the budget, use fewer documents, an "
            "encoder of smaller dimension"
            + (", a recall below 1" if options.recall == 1 else "")
            + ", or several machines (docs/scale.md)."
        )
    return fitting[0]


def check_factory(factory: str, num_chunks: int | None, dim: int) -> None:
    """Refuse a factory string that FAISS does not know, or that needs more training points than there are chunks.

    Raises:
        DatastoreInputError: before any embedding work is spent.
    """
    if not _is_known(factory, dim):
        right = {name.lower(): name for name in _FACTORY_NAMES}
        respelled = re.sub("|".join(right), lambda found: right[found[0].lower()], factory, flags=re.IGNORECASE)
        if respelled == "auto" or _is_known(respelled, dim):
            remedy = f"Upper and lower case count: use index={respelled!r}."
        else:
            remedy = (
                "Such a string names the parts of an index, with commas between them: 'Flat' is exact, 'IVF1024,Flat' and "
                "'HNSW32' are approximate, 'IVF1024,PQ96x4fs,Refine(SQfp16)' is compressed and re-scored (the number after PQ "
                "must divide the length of the vectors). Use index='auto' to have one chosen by size."
            )
        raise DatastoreInputError(f"FAISS cannot make the index {factory!r} for vectors of length {dim}. {remedy}")
    if "IDMap" in factory:
        raise DatastoreInputError(
            f"The index {factory!r} has ids of its own, but chunks are numbered already. Leave IDMap out."
        )
    # FAISS takes these strings, and fails once it is trained or searched.
    if re.search(r"IVF0+(?!\d)", factory):
        raise DatastoreInputError(
            f"The index {factory!r} has no list to put a chunk in. Write IVF1 or more, or use index='auto'."
        )
    wide = max([0, *map(int, re.findall(r"PCA[WR]*(\d+)", factory))])
    if wide > dim:
        raise DatastoreInputError(
            f"The index {factory!r} keeps {wide} dimensions of vectors that have {dim}. Write a number below {dim} after PCA, "
            "or leave it out."
        )
    needed = training_points(factory)
    if num_chunks is not None and num_chunks < needed:
        raise DatastoreInputError(
            f"The index {factory!r} is trained on at least {counted(needed, 'chunk')}, but the documents make {num_chunks:,}. "
            "Use index='Flat', which is exact and needs no training."
        )


def _is_known(factory: str, dim: int) -> bool:
    faiss = import_faiss()
    try:
        faiss.index_factory(dim, factory, faiss.METRIC_INNER_PRODUCT)
    except (RuntimeError, TypeError, ValueError):
        return False
    return True


def tell_plan(num_chunks: int, embedder: ChunkEmbedder, plans: list[IndexPlan], batch_size: int) -> None:
    """Say what is about to be computed and written, before the long part of the work."""
    shards = f" in {len(plans)} shards" if len(plans) > 1 else ""
    logger.info(
        f"{counted(num_chunks, 'chunk')}{shards}: {_size(2 * embedder.dim * num_chunks)} of keys, index "
        f"{' + '.join(dict.fromkeys(plan.factory for plan in plans))} of {_size(sum(plan.disk for plan in plans))}, of which "
        f"{_size(sum(plan.memory for plan in plans))} in memory when searched. Building needs up to "
        f"{_size(max(plan.build_memory for plan in plans))} of memory for the index."
    )
    if num_chunks > _TIMED_CHUNKS:
        texts = ["the size of a usual chunk is about fifty words " * 6] * batch_size
        embedder.embed(texts, batch_size=batch_size)
        start = time.perf_counter()
        embedder.embed(texts, batch_size=batch_size)
        rate = batch_size / (time.perf_counter() - start)
        logger.info(
            f"Embedding takes about {_duration(num_chunks / rate)} ({rate:,.0f} chunks per second and process), indexing "
            f"about {_duration(sum(plan.build_seconds for plan in plans))} on one core."
        )


def _size(num_bytes: float) -> str:
    """Bytes in words, such as 1.5 GB."""
    unit = int(np.clip(math.log10(max(num_bytes, 1)) // 3, 1, 4))
    return f"{num_bytes / 1000**unit:,.1f} {'B KB MB GB TB'.split()[unit]}"


def _duration(seconds: float) -> str:
    """Seconds in words, such as 3 min."""
    for name, size in (("h", 3600), ("min", 60)):
        if seconds >= 1.5 * size:
            return f"{seconds / size:,.0f} {name}"
    return f"{max(seconds, 1):.0f} s"
