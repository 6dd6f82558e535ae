"""One store, many readers: threads, forked and spawned processes, DataLoader workers give the single-thread answers."""

import multiprocessing
import threading
from concurrent.futures import ThreadPoolExecutor

import faiss
import numpy as np
import pytest
import torch

from retro_hf.datastore import RetroDatastore

from .fixtures import corpus


@pytest.fixture(scope="module", params=["Flat", "IVF16,PQ8x4fs,Refine(SQfp16)"])
def store(request, tokenizer, embedder, tmp_path_factory) -> RetroDatastore:
    """Two shards, some documents deleted: every path of a search."""
    path = tmp_path_factory.mktemp("processes") / "store"
    store = RetroDatastore.build(
        corpus(), path, tokenizer=tokenizer, embedder=embedder, chunk_size=8, neighbor_size=20, index=request.param
    )
    store.append([document | {"id": f"new-{document['id']}"} for document in corpus(5, 3)], embedder=embedder)
    store.delete(["doc-3", "doc-8"])
    return store


def work(store: RetroDatastore, rows: np.ndarray) -> tuple[np.ndarray, ...]:
    """Everything a reader does."""
    queries = store.keys_of(rows)
    scores, ids = store.search(queries, 3, exclude_documents=store.document_of(rows))
    return scores, ids, *store.gather(ids), store.document_numbers([store.document(int(n) % 3)["id"] for n in rows])


def check(found, expected) -> None:
    # Matrix products of other shapes add in another order: the last bit of a score may differ.
    np.testing.assert_allclose(found[0], expected[0], atol=1e-6)
    for one, other in zip(found[1:], expected[1:], strict=True):
        np.testing.assert_array_equal(one, other)


def test_sixteen_threads_get_the_answers_of_one(store):
    rows = np.arange(0, store.num_chunks, 3)
    expected = work(store, rows)
    fresh = RetroDatastore.load(store.path)
    barrier = threading.Barrier(16)

    def run(_: int) -> list:
        # All at once, on a store that has opened nothing yet.
        barrier.wait()
        return [work(fresh, rows) for _ in range(2)]

    with ThreadPoolExecutor(16) as pool:
        for results in pool.map(run, range(16)):
            for found in results:
                check(found, expected)


def _answer(store, rows, results) -> None:
    results.put(work(store, rows))


@pytest.mark.timeout(120)
def test_eight_forked_processes_get_the_answers_of_one(store):
    """The parent has used FAISS with two threads, which a child must not try to use again."""
    rows = np.arange(0, store.num_chunks, 3)
    before = faiss.omp_get_max_threads()
    faiss.omp_set_num_threads(2)
    try:
        expected = work(store, rows)
        context = multiprocessing.get_context("fork")
        results = context.Queue()
        children = [context.Process(target=_answer, args=(store, rows, results)) for _ in range(8)]
        for child in children:
            child.start()
        answers = [results.get(timeout=60) for _ in children]
        for child in children:
            child.join()
    finally:
        faiss.omp_set_num_threads(before)
    for found in answers:
        check(found, expected)


class Searches(torch.utils.data.Dataset):
    """Neighbors looked up live, in whatever process asks."""

    def __init__(self, store: RetroDatastore) -> None:
        self.store = store

    def __len__(self) -> int:
        return 12

    def __getitem__(self, number: int) -> tuple[np.ndarray, ...]:
        return work(self.store, np.array([number, number + 20, number + 40]))


@pytest.mark.timeout(300)
@pytest.mark.parametrize("start", ["fork", pytest.param("spawn", marks=pytest.mark.slow)])
def test_workers_of_a_dataloader_get_the_same_answers(store, start):
    dataset = Searches(store)
    expected = [dataset[number] for number in range(len(dataset))]
    loader = torch.utils.data.DataLoader(
        dataset, batch_size=None, num_workers=2, multiprocessing_context=start, collate_fn=None
    )
    for found, wanted in zip(loader, expected, strict=True):
        check([np.asarray(part) for part in found], wanted)
