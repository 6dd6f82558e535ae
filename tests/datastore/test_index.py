"""The index: exact where it can be, measured where it cannot, and the same from threads, forks and memory maps."""

import multiprocessing
import threading
from concurrent.futures import ThreadPoolExecutor

import faiss
import numpy as np
import pytest

from retro_hf.datastore import index as index_module
from retro_hf.datastore.atomic_files import mapped
from retro_hf.datastore.index import (
    build_index,
    exact_search,
    max_effort,
    open_index,
    search_index,
    search_parameters,
)
from retro_hf.datastore.index_plan import check_factory
from retro_hf.errors import DatastoreCorruptError, DatastoreInputError


@pytest.fixture(scope="module")
def keys() -> np.ndarray:
    """3000 unit vectors around 60 centers, as texts cluster."""
    generator = np.random.default_rng(0)
    centers = generator.normal(size=(60, 32))
    rows = centers[generator.integers(60, size=3000)] + 0.5 * generator.normal(size=(3000, 32))
    return (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float16)


@pytest.fixture(scope="module")
def queries(keys) -> np.ndarray:
    generator = np.random.default_rng(1)
    rows = keys[:200].astype(np.float32) + 0.1 * generator.normal(size=(200, 32)).astype(np.float32)
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


def build_and_open(keys, factory, path):
    built = build_index(keys, factory, path)
    return built, open_index(path, mapped(path), factory, *keys.shape)


def test_exact_search_equals_brute_force(keys, queries, monkeypatch):
    monkeypatch.setattr(index_module, "BLOCK_ROWS", 700)
    scores, ids = exact_search(keys, queries, 5)
    everything = queries @ keys.astype(np.float32).T
    np.testing.assert_allclose(scores, -np.sort(-everything, axis=1)[:, :5], atol=1e-6)
    np.testing.assert_allclose(np.take_along_axis(everything, ids, axis=1), scores, atol=1e-6)


@pytest.mark.parametrize("num_queries", [1, 2, 3, 200])
def test_flat_finds_what_exact_search_finds_at_every_batch_size(keys, queries, tmp_path, num_queries):
    built, index = build_and_open(keys, "Flat", tmp_path / "index")
    assert built == {"factory": "Flat", "search": {}, "recall": None}
    scores, ids = search_index(index, queries[:num_queries], 10, None)
    expected, expected_ids = exact_search(keys, queries[:num_queries], 10)
    np.testing.assert_allclose(scores, expected, atol=1e-5)
    assert (ids == expected_ids).mean() > 0.99


@pytest.mark.parametrize(
    "factory",
    ["IVF32,Flat", "IVF32,PQ8x4fs,Refine(SQfp16)", "HNSW16,SQ8", "SQ8", "PCA16,IVF32,SQ8,Refine(Flat)", "PQ8x4fs"],
)
def test_recorded_recall_is_the_true_recall(keys, queries, tmp_path, factory):
    built, index = build_and_open(keys, factory, tmp_path / "index")
    recall = built["recall"]
    assert recall["at"] == 2 and recall["queries"] == min(len(keys), 4000)
    if factory != "PQ8x4fs":  # Codes alone do not tell near neighbors apart.
        assert recall["value"] >= 0.95
    scores, ids = search_index(index, queries, 2, search_parameters(index, built["search"]))
    assert scores.dtype == np.float32 and ids.dtype == np.int64
    exact, _ = exact_search(keys, queries, 2)
    found = np.einsum("qd,qkd->qk", queries, keys[ids].astype(np.float32)) >= exact[:, -1:] - 1e-5
    assert abs(found.mean() - recall["value"]) < 0.12


def test_recall_below_the_target_is_logged(keys, tmp_path, caplog):
    build_index(keys, "PQ2x4", tmp_path / "index")
    assert "95.0%" in caplog.text and "index='Flat'" in caplog.text


def test_search_parameters_do_not_change_the_index(keys, queries, tmp_path):
    _, index = build_and_open(keys, "IVF32,Flat", tmp_path / "index")
    before = index.nprobe
    narrow, wide = (
        search_index(index, queries, 5, search_parameters(index, {"nprobe": count}))[0] for count in (1, 32)
    )
    assert index.nprobe == before and narrow.sum() < wide.sum()
    np.testing.assert_allclose(wide, exact_search(keys, queries, 5)[0], atol=1e-5)
    assert max_effort(index, {"nprobe": 5}) == 7 and max_effort(index, {}) == 1


def test_building_an_index_twice_gives_identical_bytes(keys, tmp_path):
    results = [build_index(keys, "IVF32,PQ8x4fs,Refine(SQfp16)", tmp_path / str(number)) for number in range(2)]
    assert results[0] == results[1]
    assert (tmp_path / "0").read_bytes() == (tmp_path / "1").read_bytes()


@pytest.mark.parametrize(
    ("factory", "least"), [("IVF64,Flat", 64), ("PQ8", 256), ("IVF16,PQ8x4", 16), ("PQ4x10", 1024)]
)
def test_too_few_training_chunks_are_refused(factory, least):
    check_factory(factory, least, 32)
    with pytest.raises(DatastoreInputError):
        check_factory(factory, least - 1, 32)


def test_faiss_training_failure_is_reported(keys, tmp_path):
    with pytest.raises(DatastoreInputError):
        build_index(keys[:10], "RQ4x8", tmp_path / "index")


def test_an_index_of_other_vectors_is_refused(keys, tmp_path):
    build_index(keys, "Flat", tmp_path / "index")
    for shape in ((2999, 32), (3000, 16)):
        with pytest.raises(DatastoreCorruptError):
            open_index(tmp_path / "index", mapped(tmp_path / "index"), "Flat", *shape)
    faiss.write_index(faiss.index_factory(32, "Flat", faiss.METRIC_L2), str(tmp_path / "l2"))
    with pytest.raises(DatastoreCorruptError):
        open_index(tmp_path / "l2", mapped(tmp_path / "l2"), "Flat", 0, 32)
    (tmp_path / "index").write_bytes((tmp_path / "index").read_bytes()[:1000])
    with pytest.raises(DatastoreCorruptError):
        open_index(tmp_path / "index", mapped(tmp_path / "index"), "Flat", 3000, 32)


def test_opening_an_index_restores_faiss_settings(keys, tmp_path):
    before = faiss.get_deserialization_vector_byte_limit()
    build_and_open(keys, "Flat", tmp_path / "index")
    (tmp_path / "index").write_bytes(b"nonsense")
    with pytest.raises(DatastoreCorruptError):
        open_index(tmp_path / "index", mapped(tmp_path / "index"), "Flat", 3000, 32)
    assert faiss.get_deserialization_vector_byte_limit() == before


def test_threads_get_single_thread_answers_and_restore_the_blas_setting(keys, queries, tmp_path):
    _, index = build_and_open(keys, "Flat", tmp_path / "index")
    before = faiss.cvar.distance_compute_blas_threshold
    expected, expected_ids = search_index(index, queries, 4, None)
    barrier = threading.Barrier(8)

    def work(_: int) -> None:
        barrier.wait()
        for _ in range(5):
            scores, ids = search_index(index, queries, 4, None)
            # Threads of different widths add in another order: the last bit of a score may differ, no neighbor does.
            np.testing.assert_allclose(scores, expected, atol=1e-6)
            np.testing.assert_array_equal(ids, expected_ids)

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(work, range(8)))
    assert faiss.cvar.distance_compute_blas_threshold == before


def _search_in_child(datastore, queries, results) -> None:
    results.put((faiss.omp_get_max_threads(), datastore.search(queries, 2)[1]))


@pytest.mark.timeout(60)
def test_forked_child_can_search_after_its_parent_used_two_threads(datastore):
    """With two threads in the child this deadlocks: the parent's OpenMP pool does not survive a fork."""
    before = faiss.omp_get_max_threads()
    faiss.omp_set_num_threads(2)
    try:
        queries = np.repeat(datastore.keys_of(np.arange(datastore.num_chunks)), 20, axis=0)
        expected = datastore.search(queries, 2)[1]
        context = multiprocessing.get_context("fork")
        results = context.Queue()
        child = context.Process(target=_search_in_child, args=(datastore, queries, results))
        child.start()
        threads, found = results.get(timeout=30)
        child.join()
    finally:
        faiss.omp_set_num_threads(before)
    assert threads == 1
    np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize("base", ["IVF32,PQ8x4fs", "IVF16,SQ8", "PQ8x4fs"])
def test_refined_index_is_byte_identical_to_one_written_by_faiss(keys, tmp_path, base):
    """Byte for byte, though the keys are never copied into memory."""
    built = build_index(keys, f"{base},Refine(SQfp16)", tmp_path / "ours")
    index = faiss.index_factory(32, f"{base},Refine(SQfp16)", faiss.METRIC_INNER_PRODUCT)
    rows = np.sort(np.random.default_rng(0).choice(len(keys), size=len(keys), replace=False))
    index.train(keys[rows].astype(np.float32))
    index.add(keys.astype(np.float32))
    faiss.write_index(index, str(tmp_path / "theirs"))
    assert (tmp_path / "ours").read_bytes() == (tmp_path / "theirs").read_bytes()
    assert built["search"]["k_factor"] >= 1
