"""The kind of index follows size, recall and memory; what cannot fit is refused with what would."""

import numpy as np
import pytest

from retro_hf.datastore import RetroDatastore
from retro_hf.datastore.atomic_files import mapped
from retro_hf.datastore.index import build_index, open_index
from retro_hf.datastore.index_plan import IndexOptions, check_factory, parse_bytes, plan_index
from retro_hf.errors import DatastoreInputError

from .fixtures import corpus


def test_kind_of_index_depends_on_the_size():
    def factory(num_chunks, dim=384):
        return plan_index(num_chunks, dim, IndexOptions()).factory

    assert factory(1) == factory(200_000) == "Flat"
    assert factory(200_001) == "IVF2048,PQ96x4fs,Refine(SQfp16)"
    assert factory(1_000_000) == "IVF4096,PQ96x4fs,Refine(SQfp16)"
    assert factory(20_000_000) == "IVF16384_HNSW32,PQ96x4fs,Refine(SQfp16)"
    assert factory(10**12, 770) == "IVF1048576_HNSW32,SQ8,Refine(SQfp16)"
    for num_chunks in (1, 300_000, 10**7):
        check_factory(factory(num_chunks), num_chunks, 384)


def test_exact_search_is_available_at_any_size():
    assert plan_index(10**7, 384, IndexOptions(recall=1.0)).factory == "Flat"


def test_memory_budget_chooses_the_kind_of_index():
    """150 MB hold 100,000 vectors of dimension 384; with less they are compressed, and with too little refused."""
    assert plan_index(100_000, 384, IndexOptions(memory_budget=160_000_000)).factory == "Flat"
    compressed = plan_index(100_000, 384, IndexOptions(memory_budget=20_000_000))
    assert compressed.factory == "IVF1024,PQ96x4fs,Refine(SQfp16)" and compressed.memory <= 20_000_000
    with pytest.raises(
        DatastoreInputError,
    ):
        plan_index(10**7, 384, IndexOptions(memory_budget=100_000_000))


def test_memory_budget_is_shared_by_the_shards():
    options = IndexOptions(memory_budget=2_000_000_000)
    assert plan_index(10**6, 384, options, total_chunks=10**7).memory <= 200_000_000
    with pytest.raises(DatastoreInputError):
        plan_index(10**6, 384, options, total_chunks=10**8)


def test_index_has_the_planned_size(tmp_path):
    """An index of 20,000 vectors; headers and lists add a little."""
    keys = np.random.default_rng(0).normal(size=(20_000, 64))
    keys = (keys / np.linalg.norm(keys, axis=1, keepdims=True)).astype(np.float16)
    for options in (IndexOptions(recall=1.0), IndexOptions(memory_budget=1_000_000)):
        plan = plan_index(20_000, 64, options)
        build_index(keys, plan.factory, tmp_path / "index", recall=0.5)
        assert open_index(tmp_path / "index", mapped(tmp_path / "index"), plan.factory, 20_000, 64).ntotal == 20_000
        assert abs((tmp_path / "index").stat().st_size - plan.disk) < 0.1 * plan.disk


@pytest.mark.parametrize(
    ("given", "size"),
    [
        (None, None),
        (7000, 7000),
        ("7000", 7000),
        (4e9, 4 * 10**9),
        ("4e9", 4 * 10**9),
        (np.int64(10**12), 10**12),
        ("5000B", 5000),
        ("300MB", 300_000_000),
        ("1.5 GB", 1_500_000_000),
        ("1.5GB", 1_500_000_000),
        (" 2tb ", 2 * 10**12),
        ("4K", 4000),
        ("4KiB", 4096),
        ("4 MiB", 4 * 1024**2),
        ("4GiB", 4 * 1024**3),
        ("0.5 gib", 2**29),
        ("1Ti", 1024**4),
    ],
)
def test_common_spellings_of_sizes_are_parsed(given, size):
    assert parse_bytes(given) == size


@pytest.mark.parametrize(
    "given",
    ["", "many", "-1GB", -5, True, 1.5j, "1.2.3GB", "4 gigabytes", "4iB", "GB", "1,5GB", float("nan"), float("inf")],
)
def test_invalid_size_is_refused(given):
    with pytest.raises(DatastoreInputError):
        parse_bytes(given)


@pytest.mark.parametrize("given", [0, 1.5, "4", 999, "0GB"])
def test_budget_without_its_unit_is_refused(given):
    """No index takes less than a kilobyte; somebody thought in gigabytes."""
    with pytest.raises(DatastoreInputError):
        parse_bytes(given)


@pytest.mark.parametrize("factory", ["flat", "ivf64,pq16x4FS,refine(sqFP16)", "Auto", "ivf99x", "IVF99x", "PQ7", ""])
def test_unknown_factory_string_is_explained_without_faiss_sources(factory):
    with pytest.raises(DatastoreInputError) as error:
        check_factory(factory, None, 64)
    assert repr(factory) in str(error.value) and "index='auto'" in str(error.value)
    assert "Error" not in str(error.value) and ".cpp" not in str(error.value)


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"recall": 0}, "recall is 0"),
        ({"recall": 95}, "recall is 95"),
        ({"memory_budget": "1GB", "factory": "IVF4,Flat"}, "IVF4,Flat.*1GB"),
    ],
)
def test_invalid_options_are_refused(options, named):
    with pytest.raises(DatastoreInputError, match=named):
        IndexOptions(**options)


def test_index_that_is_too_large_is_refused_before_any_work(tmp_path, tokenizer, embedder, monkeypatch):
    monkeypatch.setattr(type(embedder), "embed", lambda *_, **__: pytest.fail("embedded"))
    options = {"tokenizer": tokenizer, "embedder": embedder, "index": IndexOptions(memory_budget=1000)}
    with pytest.raises(DatastoreInputError, match="1.0 KB"):
        RetroDatastore.build(corpus(), tmp_path / "store", **options)
    assert list(tmp_path.iterdir()) == []


def test_requested_recall_is_measured_and_recorded(tmp_path, tokenizer, embedder):
    store = RetroDatastore.build(
        corpus(),
        tmp_path / "store",
        tokenizer=tokenizer,
        embedder=embedder,
        chunk_size=8,
        index=IndexOptions("IVF16,Flat", recall=0.6),
    )
    low = store.manifest.index
    assert low["recall"]["value"] >= 0.6 and low["search"]["nprobe"] < 16
