"""Which index a datastore gets: by its size, the recall asked for and the memory there is; and what the index will cost.

The constants were measured (docs/scale.md) with keys of a small encoder on one core.
"""

from __future__ import annotations

import math
import re
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

from transformers.utils import logging

from .. import arguments
from ..errors import DatastoreInputError, counted
from .index import BLOCK_ROWS, TRAINING_ROWS_PER_LIST, import_faiss, training_points
from .index_format import parse_factory


if TYPE_CHECKING:
    from .embedder import ChunkEmbedder

logger = logging.get_logger(__name__)

# 64 million chunks: 64 GB of keys and 4 GB of codes at dim 384, which suit one machine.
DEFAULT_SHARD_CHUNKS = 1 << 26
# Exact search takes 0.7 ms per query in a batch at 100,000 chunks. Above twice that, an approximate index pays.
MAX_FLAT_CHUNKS = 200_000
# With this many lists, a graph finds the nearest lists faster than a comparison with all of them.
_GRAPH_LISTS = 1 << 14
_GRAPH_SECONDS_PER_CHUNK = 1 / 12_000
_FLOPS = 1e11
_KMEANS_ITERATIONS = 10
# Above this many chunks the encoder is timed, to estimate how long embedding takes.
_TIMED_CHUNKS = 5000
_LEAST_BUDGET = 1000
_MOST_BUDGET = 1 << 60
_BYTES = re.compile(r"(\d{1,20}(?:\.\d*)?(?:E\+?\d\d?)?)\s*(?:([KMGT])(I?))?B?")


@dataclass(frozen=True)
class IndexOptions:
    """The index that a datastore is to get.

    Args:
        factory (`str`, defaults to `"auto"`): a FAISS factory string such as `"Flat"` or `"IVF64,Flat"`. `"auto"` is exact
            up to 200,000 chunks, and 4-bit IVF-PQ with re-scoring above.
        recall (`float`, defaults to 0.95): share of the two nearest neighbors that an approximate index should find; 1.0
            asks for exact search. Search parameters are chosen for it and measured against exact search, with chunks of
            the store as queries. Recall is lower for queries unlike the stored text.
        memory_budget (`int` or `str`, *optional*): memory that the index may use in search: bytes, or a text such as
            `"4GB"` or `"1.5GiB"`. It chooses the kind of index; an index that is too large is rejected before any work.

    Raises:
        DatastoreInputError: for a value out of range, or a budget together with a factory string.
    """

    factory: str = "auto"
    recall: float = 0.95
    memory_budget: int | float | str | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.factory, str):
            raise DatastoreInputError(
                f"index is of type {type(self.factory).__name__}. Pass a FAISS factory string, 'auto', or IndexOptions."
            )
        if isinstance(self.recall, bool) or not isinstance(self.recall, (int, float)) or not 0 < self.recall <= 1:
            raise DatastoreInputError(
                f"recall is {arguments.shown(self.recall)}. Pass a number above 0 and up to 1 (exact search)."
            )
        if self.memory_budget is not None and self.factory != "auto":
            raise DatastoreInputError(
                f"index={self.factory!r} and memory_budget={arguments.shown(self.memory_budget)} both choose the kind of index. Pass only one."
            )
        object.__setattr__(self, "memory_budget", parse_bytes(self.memory_budget))

    @classmethod
    def of(cls, index: IndexOptions | str) -> IndexOptions:
        """Options as they are, or those with a given factory string."""
        return index if isinstance(index, IndexOptions) else cls(index)


@dataclass(frozen=True)
class IndexPlan:
    """An index to be built: factory string, bytes of memory in search, on disk and of memory while building, seconds."""

    factory: str
    memory: int
    disk: int
    build_memory: int
    build_seconds: float


def parse_bytes(size: float | str | None) -> int | None:
    """A number of bytes, from a number or a text such as `"300MB"`, `"1.5 GB"` or `"4GiB"`."""
    if size is None:
        return None
    match, num_bytes = None, 0
    if isinstance(size, str) or abs(arguments.real("memory_budget", size, DatastoreInputError)) < _MOST_BUDGET:
        match = _BYTES.fullmatch(str(size).strip().upper())
    if match and not isinstance(size, bool):
        number, prefix, binary = match.groups()
        num_bytes = int(min(float(number) * (1024 if binary else 1000) ** " KMGT".index(prefix or " "), _MOST_BUDGET))
    if num_bytes < _LEAST_BUDGET:
        raise DatastoreInputError(
            f"memory_budget is {arguments.shown(size)}, but an index needs at least {_LEAST_BUDGET:,} bytes. Pass a number of bytes, or a text "
            "such as '300MB', '4GB' or '4GiB'."
        )
    return num_bytes


def flat_plan(num_chunks: int, dim: int) -> IndexPlan:
    """Exact search: every query is compared with every key."""
    size = 4 * dim * num_chunks
    # FAISS doubles its buffer as it grows, and gets one block at a time.
    return IndexPlan("Flat", size, size, 2 * size + 4 * dim * BLOCK_ROWS, num_chunks / 1e6)


def ivf_plan(num_chunks: int, dim: int) -> IndexPlan:
    """Lists of 4-bit codes in memory, re-scored from float16 keys on the disk.

    Without re-scoring, product quantization loses 40 % of the two nearest neighbors.
    """
    num_lists = min(max(2 ** round(math.log2(4 * math.sqrt(num_chunks))), 1024), 1 << 20)
    codes, code_bytes = (f"PQ{dim // 4}x4fs", dim // 8) if dim % 4 == 0 else ("SQ8", dim)
    graph = "_HNSW32" if num_lists >= _GRAPH_LISTS else ""
    # Per code its id (8 bytes); per list its centroid, its links in the graph, and on average half an unfilled block of 32.
    memory = (code_bytes + 8) * num_chunks + (4 * dim + (280 if graph else 0) + 16 * code_bytes) * num_lists
    training_rows = min(num_chunks, TRAINING_ROWS_PER_LIST * num_lists)
    train = 2 * dim * num_lists * training_rows * _KMEANS_ITERATIONS / _FLOPS
    assign = num_chunks * (_GRAPH_SECONDS_PER_CHUNK if graph else 2 * dim * num_lists / _FLOPS)
    return IndexPlan(
        f"IVF{num_lists}{graph},{codes},Refine(SQfp16)",
        memory,
        memory + 2 * dim * num_chunks,
        memory + 6 * dim * training_rows + 4 * dim * BLOCK_ROWS,
        train + assign,
    )


def plan_index(num_chunks: int, dim: int, options: IndexOptions, total_chunks: int | None = None) -> IndexPlan:
    """Choose the index of a shard of `num_chunks` keys, in a store of `total_chunks`.

    Raises:
        DatastoreInputError: if no kind fits the memory budget, or the factory string is invalid.
    """
    if options.factory != "auto":
        check_factory(options.factory, num_chunks, dim)
        # An upper bound, since the compression of the factory string is not known here: keys in float32 and in float16.
        size = 6 * dim * num_chunks
        return IndexPlan(options.factory, size, size, size, num_chunks / 1e6)
    share = num_chunks / (total_chunks or num_chunks)
    budget = math.inf if options.memory_budget is None else float(options.memory_budget)
    flat, ivf = flat_plan(num_chunks, dim), ivf_plan(num_chunks, dim)
    plans = [flat] if options.recall == 1 else [flat, ivf] if num_chunks <= MAX_FLAT_CHUNKS else [ivf]
    # A compressed index can only be trained on as many keys as it has lists.
    plans = [plan for plan in plans if plan is flat or num_chunks >= training_points(plan.factory)]
    fitting = [plan for plan in plans if plan.memory <= budget * share]
    if fitting:
        return fitting[0]
    least = min(plans, key=lambda plan: plan.memory)
    holds = counted(int(budget * num_chunks / least.memory), "chunk")
    raise DatastoreInputError(
        f"An index of {counted(total_chunks or num_chunks, 'chunk')} of dimension {dim} needs {_size(least.memory / share)} of "
        f"memory ({least.factory!r}), but memory_budget is {_size(budget)}, which holds {holds}. Raise the budget, or use "
        f"fewer documents, {'a recall below 1, ' if options.recall == 1 else ''}a smaller encoder or several machines."
    )


def check_factory(factory: str, num_chunks: int | None, dim: int) -> None:
    """Check a factory string before any work.

    Raises:
        DatastoreInputError: if FAISS does not know it, or it cannot be built for these vectors.
    """
    faiss = import_faiss()
    try:
        # First: FAISS would take the memory for any number of lists.
        if parse_factory(factory) is None:
            raise ValueError("a datastore does not have indexes of this kind")
        faiss.index_factory(dim, factory, faiss.METRIC_INNER_PRODUCT)
    except (RuntimeError, TypeError, ValueError) as error:
        raise DatastoreInputError(
            f"There is no index {factory!r} for vectors of length {dim}. Use index='auto', or a factory string such as "
            "'Flat', 'IVF1024,Flat', 'HNSW32' or 'IVF1024,PQ96x4fs,Refine(SQfp16)'; case counts, and the number after PQ must "
            "divide the length."
        ) from error
    # FAISS accepts the following strings, and fails when the index is trained or searched.
    reason, needed = "", training_points(factory)
    if max([0, *map(int, re.findall(r"PCA[WR]*(\d+)", factory))]) > dim:
        reason = f"keeps more dimensions than the {dim} of the vectors. Use a smaller number after PCA"
    elif num_chunks is not None and num_chunks < needed:
        reason = f"is trained on at least {counted(needed, 'chunk')}, but the documents make {num_chunks:,}. Use index='Flat'"
    if reason:
        raise DatastoreInputError(f"The index {factory!r} {reason}.")


def tell_plan(num_chunks: int, embedder: ChunkEmbedder, plans: list[IndexPlan], batch_size: int) -> None:
    """Log what is about to be computed and written, before the long part of the work."""
    shards = f" in {len(plans)} shards" if len(plans) > 1 else ""
    logger.info(
        f"{counted(num_chunks, 'chunk')}{shards}: {_size(2 * embedder.dim * num_chunks)} of keys, index "
        f"{' + '.join(dict.fromkeys(plan.factory for plan in plans))} of {_size(sum(plan.disk for plan in plans))}, of which "
        f"{_size(sum(plan.memory for plan in plans))} in memory when searched. Building the index needs up to "
        f"{_size(max(plan.build_memory for plan in plans))} of memory."
    )
    if num_chunks > _TIMED_CHUNKS:
        texts = ["the size of a usual chunk is about fifty words " * 6] * batch_size
        embedder.embed(texts, batch_size=batch_size)  # the first call is slower
        start = time.perf_counter()
        embedder.embed(texts, batch_size=batch_size)
        rate = batch_size / (time.perf_counter() - start)
        logger.info(
            f"Embedding takes about {duration(num_chunks / rate)} ({rate:,.0f} chunks per second and process), indexing "
            f"about {duration(sum(plan.build_seconds for plan in plans))} on one core."
        )


def _size(num_bytes: float) -> str:
    """Bytes in words, such as 1.5 GB."""
    unit = min(max(int(math.log10(max(num_bytes, 1)) // 3), 1), 4)
    return f"{num_bytes / 1000**unit:,.1f} {'B KB MB GB TB'.split()[unit]}"


def duration(seconds: float) -> str:
    """Seconds in words, such as "3 minutes"."""
    if seconds < 90:
        return f"{max(seconds, 1):.0f} seconds"
    return f"{seconds / 60:.0f} minutes" if seconds < 5400 else f"{seconds / 3600:,.1f} hours"
