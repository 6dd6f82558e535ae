"""The baselines beside RETRO: they score the tokens that `bits_per_byte` scores, and do what their papers say."""

from pathlib import Path

import numpy as np
import pytest
import torch
from datastore.fixtures import corpus
from tiny import tiny_backbone
from tiny_training import CHUNK_SIZE, make_world

from retro_hf.evaluation import bits_per_byte


WINDOW = 32


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return make_world(tmp_path_factory.mktemp("world"))


@pytest.fixture(scope="module")
def model():
    return tiny_backbone("llama", vocab_size=400, max_position_embeddings=1024)


@pytest.fixture
def baselines(monkeypatch):
    monkeypatch.syspath_prepend(str(Path(__file__).resolve().parents[1] / "benchmarks"))
    from baselines import in_context, knn_lm, rows

    return in_context, knn_lm, rows


@pytest.fixture
def documents(world, baselines) -> list[np.ndarray]:
    """Token ids of texts that the store does not hold: longer than the window, shorter than a chunk, and between."""
    texts = [*corpus(8, seed=5), {"text": "the river"}]
    ids = baselines[2].token_ids(texts, world.tokenizer)
    assert min(map(len, ids)) < CHUNK_SIZE and max(map(len, ids)) > 2 * WINDOW
    return ids


def off(model, documents, world, window: int) -> np.ndarray:
    texts = [world.tokenizer.decode(ids) for ids in documents]
    return bits_per_byte(model, texts, world.tokenizer, window=window, stride=window // 2).nats["off"]


def test_without_passages_in_context_retrieval_is_the_model_alone(world, model, baselines, documents):
    """The same tokens, each after all of its document."""
    found = baselines[0].nats_in_context(model, documents, world.retriever, num_passages=0, window=1024)
    np.testing.assert_allclose(found, off(model, documents, world, window=1024), rtol=1e-5)


def test_a_chunk_is_read_after_the_passages_of_the_chunk_before(world, model, baselines, documents):
    """By hand: the nearest passage next to the text, the separator after each, nothing before the first chunk."""
    separator = [5, 6]
    options = {"num_passages": 2, "separator": separator, "window": WINDOW, "batch_size": 3}
    found = baselines[0].nats_in_context(model, documents, world.retriever, **options)
    for ids, nats in zip(documents, found, strict=True):
        total = 0.0
        for start in range(0, len(ids), CHUNK_SIZE):
            end = min(start + CHUNK_SIZE, len(ids))
            prompt = []
            if start:
                tokens, mask = world.retriever(torch.tensor(ids[None, start - CHUNK_SIZE : start]))
                for place in (1, 0):
                    prompt += [*tokens[0, place][mask[0, place] == 1].tolist(), *separator]
            begin = next(b for b in range(0, end, CHUNK_SIZE) if end - b <= WINDOW)
            row = [*prompt, *ids[begin:end].tolist()]
            with torch.no_grad():
                logits = model(torch.tensor([row])).logits[0].double().log_softmax(-1)
            first = len(row) - (end - max(start, 1))
            total -= float(sum(logits[place - 1, row[place]] for place in range(first, len(row))))
        assert nats == pytest.approx(total, rel=1e-5)


def test_without_votes_knn_lm_is_the_model_alone(world, model, baselines, documents):
    """In the windows of `bits_per_byte`."""
    _, knn_lm, rows = baselines
    store = rows.token_ids(corpus(), world.tokenizer)
    index, values = knn_lm.build(model, store, window=WINDOW)
    votes = knn_lm.find_votes(model, documents, index, values, 8, window=WINDOW, batch_size=3)
    found = votes.nats(knn_lm.Mixture(8, 1.0, 0.0), len(documents))
    np.testing.assert_allclose(found, off(model, documents, world, window=WINDOW), rtol=1e-5)


def test_a_stored_text_votes_for_its_own_next_token(world, model, baselines):
    """Its state is in the store, and the token that followed it: with a low temperature all votes are its own."""
    _, knn_lm, rows = baselines
    store = rows.token_ids(corpus(), world.tokenizer)
    index, values = knn_lm.build(model, store, window=256)
    assert index.ntotal == len(values) == sum(len(ids) - 1 for ids in store)
    index.nprobe = index.nlist
    votes = knn_lm.find_votes(model, store[:5], index, values, 4, window=256)
    assert votes.share_of_votes(4, 1e-4).mean() > 0.95
    again = votes.nats(knn_lm.Mixture(4, 1e-4, 0.9), 5).sum()
    assert again < 0.2 * votes.nats(knn_lm.Mixture(4, 1e-4, 0.0), 5).sum()


def test_tuning_finds_what_predicts_best(baselines):
    """Votes that are always right deserve the largest share, votes that never are get none."""
    knn_lm = baselines[1]
    document, own = np.zeros(50, np.int64), np.full(50, np.log(0.1))
    distances = np.tile(np.arange(8, dtype=np.float32), (50, 1))
    right = knn_lm.tune(knn_lm.Votes(document, own, distances, np.ones((50, 8), bool)))
    wrong = knn_lm.tune(knn_lm.Votes(document, own, distances, np.zeros((50, 8), bool)))
    assert right.share == pytest.approx(0.95) and wrong.share == 0
    nearest = np.zeros((50, 8), bool)
    nearest[:, 0] = True
    assert knn_lm.tune(knn_lm.Votes(document, own, distances, nearest)).temperature < 1
