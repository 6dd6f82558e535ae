"""
The FAISS index over the keys: how it is built, tuned and measured, how it is opened and searched.

Similarity is the inner product of unit vectors. The paper's squared L2 distance of such vectors is `d = 2 - 2 * score`, so
both rank alike, and the nearest neighbor has the largest score.
"""

from __future__ import annotations

import math
import os
import re
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from transformers.utils import logging

from ..errors import DatastoreInputError, DatastoreWriteError, counted
from ..locks import Lock
from .atomic_files import mapped, reading
from .index_format import check_index
from .search_excluding import merge_results


logger = logging.get_logger(__name__)

BLOCK_ROWS = 1 << 16
TRAINING_ROWS_PER_LIST = 40
_RECALL_AT = 2
_RECALL_QUERIES = 4000
# Two standard errors of a recall measured on 4,000 queries are 0.007: other queries should reach the target, too.
_RECALL_MARGIN = 0.008
# Lists that are read while the number of re-scored candidates is chosen.
_TUNING_LISTS = 256
_WORTHWHILE_GAIN = 0.005
# Re-scoring a candidate takes as long as reading about a hundred codes (measured).
_CODES_PER_CANDIDATE = 100
_REFINE = ",Refine(SQfp16)"
# Where an index file stores its number of vectors: after four letters and the dimension.
_NTOTAL = slice(8, 16)

# Some settings of FAISS belong to the whole process. They are changed only during a call, under these locks.
_read_lock = Lock()
_blas_lock = Lock()
_blas_users = 0
_blas_default = 0


def import_faiss() -> Any:
    """The module `faiss`, imported on first use."""
    import faiss

    return faiss


def _single_thread_after_fork() -> None:
    global _blas_users
    # The searches of the parent's threads do not go on in the child.
    _blas_users = 0
    # OpenMP's threads do not survive a fork: a child that enters a parallel region of two threads waits for ever.
    import sys

    if "faiss" in sys.modules:
        sys.modules["faiss"].omp_set_num_threads(1)


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_single_thread_after_fork)


def training_points(factory: str) -> int:
    """The least number of vectors that an index can be trained on: one per centroid, or per dimension of a PCA."""
    lists = [int(number) for number in re.findall(r"(?:IVF|PCA[WR]*)(\d+)", factory)]
    # "PQ16" has codes of 8 bits, "PQ16x4" of 4 bits, with one centroid per value.
    bits = [int(number or 8) for number in re.findall(r"PQ\d+(?:_\d+)?(?:x(\d+))?", factory)]
    return max([1, *lists, *(1 << number for number in bits)])


def _short(error: Exception) -> str:
    """The last sentence of a FAISS message, without the place in its sources."""
    return str(error).strip().rsplit("Error: ", 1)[-1].rsplit("failed: ", 1)[-1].rstrip(". ")


# ── building ──────────────────────────────────────────────────────────────────────────────────────────────────────────


def build_index(keys: np.ndarray, factory: str, path: Path, *, recall: float = 0.95) -> dict[str, Any]:
    """Build, write, tune and measure an index.

    Args:
        keys (`np.ndarray` of float16 and shape `(num_chunks, dim)`): memory-mapped; read in blocks of 65,536 rows.
        factory (`str`): FAISS factory string.
        path (`Path`): of the index file.
        recall (`float`, defaults to 0.95): share of the exact neighbors that search parameters are chosen to find.
    Returns:
        `dict` with `factory`, `search` (search parameters) and `recall` (None for an exact index), for the manifest.
    Raises:
        DatastoreInputError: if FAISS cannot train or fill the index.
        DatastoreWriteError: if the disk is full.
    """
    faiss = import_faiss()
    num_chunks, dim = keys.shape
    base = factory.removesuffix(_REFINE)
    index = faiss.index_factory(dim, base, faiss.METRIC_INNER_PRODUCT)
    generator = np.random.default_rng(0)
    try:
        if not index.is_trained:
            num_rows = min(num_chunks, max(TRAINING_ROWS_PER_LIST * training_points(factory), BLOCK_ROWS))
            # In order: random reads of a memory map are slow.
            rows = np.sort(generator.choice(num_chunks, size=num_rows, replace=False))
            index.train(keys[rows].astype(np.float32))
        for start in range(0, num_chunks, BLOCK_ROWS):
            index.add(keys[start : start + BLOCK_ROWS].astype(np.float32))
    except RuntimeError as error:
        raise DatastoreInputError(
            f"FAISS cannot build the index {factory!r} from {counted(num_chunks, 'chunk')}: {_short(error)}. Use "
            "index='Flat', which is exact and needs no training."
        ) from error
    try:
        _write_index(index, keys, path, refined=base != factory)
    except RuntimeError as error:
        raise DatastoreWriteError(
            f"The index {str(path)!r} could not be written: {_short(error)}. Free disk space and repeat the call."
        ) from error
    if factory == "Flat":
        return {"factory": factory, "search": {}, "recall": None}
    # Tuned as it will be searched: through a memory map.
    search, measured = _tune(open_index(path, mapped(path), factory, num_chunks, dim), keys, generator, recall)
    return {"factory": factory, "search": search, "recall": measured}


def _write_index(base: Any, keys: np.ndarray, path: Path, refined: bool) -> None:
    faiss = import_faiss()
    if not refined:
        faiss.write_index(base, str(path))
        return
    # `IndexRefine(base, float16 keys)`, byte for byte as FAISS writes it, but without a copy of all keys in memory: float16
    # is what FAISS' quantizer stores. All other bytes are taken from an empty quantizer.
    num_keys, dim = keys.shape
    empty = faiss.serialize_index(faiss.IndexScalarQuantizer(dim, faiss.ScalarQuantizer.QT_fp16, base.metric_type))
    refine = bytearray(empty.tobytes())
    refine[_NTOTAL] = struct.pack("<q", num_keys)
    refine[-8:] = struct.pack("<q", keys.nbytes)
    with path.open("wb") as file:
        file.write(b"IxRF" + struct.pack("<iqqq?i", dim, num_keys, 1 << 20, 1 << 20, True, base.metric_type))
        file.flush()
        faiss.write_index(base, faiss.PyCallbackIOWriter(file.write))
        file.write(refine)
        for start in range(0, num_keys, BLOCK_ROWS):
            file.write(np.ascontiguousarray(keys[start : start + BLOCK_ROWS]).tobytes())
        file.write(struct.pack("<f", 1.0))


def _tune(
    index: Any, keys: np.ndarray, generator: np.random.Generator, target: float
) -> tuple[dict[str, int], dict[str, Any]]:
    """The cheapest search parameters that reach the target recall, and the recall measured with them."""
    num_chunks = len(keys)
    sure = min(1.0, target + _RECALL_MARGIN)
    num_queries, at = min(_RECALL_QUERIES, num_chunks), min(_RECALL_AT, num_chunks - 1)
    # The queries are keys of the store; each ignores itself.
    rows = np.sort(generator.choice(num_chunks, size=num_queries, replace=False))
    queries = keys[rows].astype(np.float32)
    exact, exact_ids = exact_search(keys, queries, at + 1)
    threshold = _without_own(exact, exact_ids, rows, at)[:, -1:]

    def measure(search: dict[str, int]) -> float:
        _, ids = search_index(index, queries, at + 1, search_parameters(index, search))
        kept = _without_own(_scores_of(keys, queries, ids), ids, rows, at)
        # By score, not by id: a copy of a chunk is as good as the chunk. The tolerance is for sums in another order.
        return float((kept >= threshold - 1e-5).mean()) if at else 1.0

    efforts, factors = _search_grid(index)
    # How many candidates must be re-scored hardly depends on how many lists are read. So first find the number of candidates
    # with many lists, then the number of lists.
    thorough = [effort for effort in efforts if effort.get("nprobe", 0) <= _TUNING_LISTS][-1]
    factor, recall, search = factors[0], 0.0, {}
    for candidate in factors:
        found = measure({**thorough, **candidate})
        if found < recall + _WORTHWHILE_GAIN:
            break
        factor, recall = candidate, found
        if found >= sure:
            break
    place = 0
    while (recall := measure(search := {**efforts[place], **factor})) < sure and place + 1 < len(efforts):
        place += 1
    # With more candidates, fewer lists may suffice. So for each larger number of candidates, find the fewest lists that do.
    list_size = num_chunks / efforts[-1].get("nprobe", 1)
    costs = [_cost(search, list_size)]
    for candidate in factors[factors.index(factor) + 1 :]:
        if recall < sure or "nprobe" not in search or _cost({"nprobe": 0, **candidate}, list_size) > min(costs):
            break
        while place and (found := measure({**efforts[place - 1], **candidate})) >= sure:
            place -= 1
            costs.append(_cost({**efforts[place], **candidate}, list_size))
            if costs[-1] == min(costs):
                search, recall = {**efforts[place], **candidate}, found
    if recall < target:
        logger.warning(
            f"The index finds {recall:.1%} of the {counted(at, 'nearest neighbor')}, less than the {target:.1%} asked for. "
            "Use index='Flat' for exact search."
        )
    return search, {"at": at, "value": round(recall, 4), "queries": num_queries}


def _cost(search: dict[str, int], list_size: float) -> float:
    """What a query costs, in codes read."""
    if "nprobe" not in search:
        return 0.0
    return search["nprobe"] * list_size + _CODES_PER_CANDIDATE * _RECALL_AT * search.get("k_factor", 0)


def _search_grid(index: Any) -> tuple[list[dict[str, int]], list[dict[str, int]]]:
    """Search parameters from cheap to thorough: how much of the index is read, and how much is re-scored."""
    faiss = import_faiss()
    refined = isinstance(index, faiss.IndexRefine)
    base = faiss.downcast_index(index.base_index) if refined else index
    if isinstance(base, faiss.IndexPreTransform):
        base = faiss.downcast_index(base.index)
    efforts: list[dict[str, int]] = [{}]
    if isinstance(base, faiss.IndexIVF):
        # 8, 12, 16, 24, 32 and so on up to all lists: a query costs about as much as the lists it reads.
        counts = [count << step for step in range(base.nlist.bit_length()) for count in (8, 12)]
        efforts = [{"nprobe": count} for count in [*(count for count in counts if count < base.nlist), base.nlist]]
    elif isinstance(base, faiss.IndexHNSW):
        efforts = [{"efSearch": 1 << step} for step in range(5, 11)]
    return efforts, [{"k_factor": factor} for factor in (5, 10, 25, 50, 100)] if refined else [{}]


def _scores_of(keys: np.ndarray, queries: np.ndarray, ids: np.ndarray) -> np.ndarray:
    """Exact scores of approximate results, -inf where there is none."""
    scores = np.einsum("qd,qkd->qk", queries, keys[np.maximum(ids, 0)].astype(np.float32))
    return np.where(ids >= 0, scores, -np.inf)


def _without_own(scores: np.ndarray, ids: np.ndarray, own: np.ndarray, keep: int) -> np.ndarray:
    """The `keep` best scores of each row that are not the query's own, best first."""
    return np.sort(np.where(ids == own[:, None], -np.inf, scores), axis=1)[:, ::-1][:, :keep]


def exact_search(keys: np.ndarray, queries: np.ndarray, num_neighbors: int) -> tuple[np.ndarray, np.ndarray]:
    """Exact search without an index, block by block: float32 scores and int64 ids of shape `(num_queries, k)`."""
    faiss = import_faiss()
    scores = np.full((len(queries), num_neighbors), -np.inf, dtype=np.float32)
    ids = np.full((len(queries), num_neighbors), -1, dtype=np.int64)
    for start in range(0, len(keys), BLOCK_ROWS):
        block = keys[start : start + BLOCK_ROWS].astype(np.float32)
        with _blas_from_three_queries(keys.shape[1]):
            found, rows = faiss.knn(queries, block, num_neighbors, metric=faiss.METRIC_INNER_PRODUCT)
        here = np.where(rows < 0, -np.inf, found), np.where(rows < 0, -1, rows + start)
        scores, ids = merge_results([(scores, ids), here])
    return scores, ids


# ── opening and searching ─────────────────────────────────────────────────────────────────────────────────────────────


def open_index(path: Path, data: np.ndarray, factory: str, num_chunks: int, dim: int) -> Any:
    """Open an index in a memory map, from which FAISS reads its vectors without a copy.

    Args:
        path (`Path`): of the file, for messages.
        data (`np.ndarray` of uint8): the file, as [`mapped`] gives it. The index keeps it.
        factory (`str`), num_chunks (`int`), dim (`int`): what the index must be.
    Raises:
        DatastoreCorruptError: if it is another index, or FAISS cannot read it.
    """
    faiss = import_faiss()
    with reading(path):
        check_index(data, factory, num_chunks, dim)
        try:
            with _bounded_reading(len(data)):
                # From the bytes that were checked, not by the name: FAISS opens no file.
                index = faiss.read_index(
                    faiss.ZeroCopyIOReader(faiss.swig_ptr(data), len(data)), faiss.IO_FLAG_MMAP_IFC
                )
        except RuntimeError as error:
            raise ValueError(f"FAISS says {_short(error)}") from error
        # As FAISS itself keeps what an index was made from.
        index.referenced_objects = [data]
    return index


@contextmanager
def _bounded_reading(size: int) -> Iterator[None]:
    """Refuse arrays that claim to be longer than the file; by default FAISS believes a file up to 1 TB."""
    faiss = import_faiss()
    with _read_lock:
        default = faiss.get_deserialization_vector_byte_limit()
        faiss.set_deserialization_vector_byte_limit(min(default, max(8 * size, 1 << 20)))
        try:
            yield
        finally:
            faiss.set_deserialization_vector_byte_limit(default)


def search_parameters(index: Any, search: dict[str, Any]) -> Any:
    """Search parameters as FAISS takes them for one call. The index itself is never changed, so threads can share it."""
    faiss = import_faiss()
    if isinstance(index, faiss.IndexRefine):
        base = search_parameters(faiss.downcast_index(index.base_index), search)
        return faiss.IndexRefineSearchParameters(k_factor=float(search.get("k_factor", 1)), base_index_params=base)
    if isinstance(index, faiss.IndexPreTransform):
        inner = search_parameters(faiss.downcast_index(index.index), search)
        return None if inner is None else faiss.SearchParametersPreTransform(index_params=inner)
    if isinstance(index, faiss.IndexIVF) and "nprobe" in search:
        return faiss.SearchParametersIVF(nprobe=int(min(search["nprobe"], index.nlist)))
    if isinstance(index, faiss.IndexHNSW) and "efSearch" in search:
        return faiss.SearchParametersHNSW(efSearch=int(search["efSearch"]))
    return None


def max_effort(index: Any, search: dict[str, Any]) -> int:
    """The factor on `nprobe` at which all lists of an index are read; 1 for other kinds."""
    faiss = import_faiss()
    if isinstance(index, (faiss.IndexRefine, faiss.IndexPreTransform)):
        inner = index.base_index if isinstance(index, faiss.IndexRefine) else index.index
        return max_effort(faiss.downcast_index(inner), search)
    return math.ceil(index.nlist / search["nprobe"]) if isinstance(index, faiss.IndexIVF) and "nprobe" in search else 1


def search_index(
    index: Any, queries: np.ndarray, num_neighbors: int, parameters: Any
) -> tuple[np.ndarray, np.ndarray]:
    """Nearest keys of each query: float32 scores, best first, and int64 ids, negative where there is none.

    `parameters` come from [`search_parameters`].
    """
    num_neighbors = int(num_neighbors)  # FAISS takes no number of numpy
    if isinstance(index, import_faiss().IndexFlat):
        with _blas_from_three_queries(index.d):
            scores, ids = index.search(queries, num_neighbors)
    else:
        scores, ids = index.search(queries, num_neighbors, params=parameters)
    return scores, ids


@contextmanager
def _blas_from_three_queries(dim: int) -> Iterator[None]:
    """Let FAISS multiply matrices for 3 queries or more (up to 8 times faster); by default from 333 at d=384.

    The first thread that enters saves the setting of the process, and the last one that leaves restores it.
    """
    global _blas_users, _blas_default
    variables = import_faiss().cvar
    with _blas_lock:
        if not _blas_users:
            _blas_default = variables.distance_compute_blas_threshold
        _blas_users += 1
        variables.distance_compute_blas_threshold = 3 * dim
    try:
        yield
    finally:
        with _blas_lock:
            _blas_users -= 1
            if not _blas_users:
                variables.distance_compute_blas_threshold = _blas_default
