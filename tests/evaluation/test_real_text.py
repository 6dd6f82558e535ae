"""A trained model on real text: does the evaluation see that retrieval helps, and what is wrong where it does not?

The model of `hub_configs/retro-bible` predicts 20 passages of Exodus in one translation, which it has never seen, while
the datastore holds them in another; it finds them by their words.
"""

import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from datastore.fixtures import corpus, make_encoder
from transformers import AutoModelForCausalLM, AutoTokenizer

from retro_hf import RetroDatastore, RetroRetriever
from retro_hf.datastore import ChunkEmbedder, LexicalSearcher
from retro_hf.evaluation import evaluate, trace
from retro_hf.evaluation.report.page import render_page


ROOT = Path(__file__).resolve().parents[2]
MODEL = ROOT / "hub_configs/retro-bible"
pytestmark = pytest.mark.weights


class RandomSearcher:
    """The broken retriever: any chunk will do."""

    metric = "none"

    def __init__(self, datastore: RetroDatastore, seed: int = 0) -> None:
        self.datastore = datastore
        self.generator = np.random.default_rng(seed)

    def search(self, texts, num_neighbors, *, exclude_documents=None):
        shape = (len(texts), num_neighbors)
        return np.zeros(shape, dtype=np.float32), self.generator.integers(self.datastore.num_chunks, size=shape)


@pytest.fixture(scope="module")
def setting(tmp_path_factory):
    """Model, tokenizer, held-out passages, and a datastore of the same passages in other words."""
    folder = tmp_path_factory.mktemp("bible")
    tokenizer = AutoTokenizer.from_pretrained(MODEL)
    model = AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32)
    passages = [json.loads(line) for line in (ROOT / "tests/data/exodus.jsonl").read_text().splitlines()]
    embedder = ChunkEmbedder.from_pretrained(make_encoder(folder / "encoder"), dtype=torch.float32)

    def build(name, documents):
        sizes = {"chunk_size": model.config.chunk_size, "neighbor_size": model.config.neighbor_size}
        return RetroDatastore.build(documents, folder / name, tokenizer=tokenizer, embedder=embedder, **sizes)

    datastore = build("store", [one for one in passages if one["id"].startswith("kjv")])
    web = [one for one in passages if one["id"].startswith("web")][:20]
    return model, tokenizer, web, datastore, folder, build


def measure(setting, searcher, datastore=None, **options):
    model, tokenizer, documents, own, folder, _ = setting
    retriever = RetroRetriever(datastore or own, searcher=searcher)
    # One folder for all of a datastore, so that what two have in common is scored once.
    output = folder / ("results" if datastore is None else "results_of_another")
    options = {"window": 256, "num_resamples": 500, "output": output, **options}
    return evaluate(model, documents, tokenizer, retriever=retriever, **options)


@pytest.fixture(scope="module")
def good(setting):
    return measure(setting, LexicalSearcher.build(setting[3]), num_neighbors_sweep=[1])


def test_retrieval_helps_in_the_expected_order(good):
    """on < off <= random, shuffled between on and random (experiment E2).

    A passage in other words is as good as any oracle could bring, so ON is level with it.
    """
    assert good.verdict.outcome == "helps" and good.verdict.text.startswith("Retrieval helps: ")
    assert good.verdict.copying is not None
    bits = {mode.name: mode.bits_per_byte for mode in good.modes}
    assert bits["on"] < bits["off"] <= bits["random"]
    assert bits["oracle"] < bits["on"] + 0.1 * (bits["off"] - bits["on"])
    assert bits["on"] < bits["shuffled"] < bits["random"] + 0.02
    assert good.similarity.on > good.similarity.random


def test_gain_grows_with_overlap(good):
    """Word for word there, gained; not there, hardly (experiment E6)."""
    gains = [bucket.gain for bucket in good.runs if bucket.num_tokens > 50]
    assert len(gains) >= 4 and gains == sorted(gains)
    shares = [bucket.share for bucket in good.runs if bucket.share is not None]
    assert sum(shares) == pytest.approx(1, abs=0.01)
    levels = [level for level in good.leakage if level.num_tokens > 200]
    relative = [level.difference["on"].value / level.bits_per_byte["off"] for level in levels]
    assert relative[0] > relative[-1]


def test_trace_shows_what_retrieval_saves(setting):
    """Of the tokens that can read something most gain, and what is retrieved is the same passage in other words."""
    model, tokenizer, documents, datastore, *_ = setting
    retriever = RetroRetriever(datastore, searcher=LexicalSearcher.build(datastore))
    seen = trace(model, documents[0], tokenizer, retriever=retriever)
    gains = seen.gains[seen.chunk_size :]
    assert sum(gains) > 0.2 * sum(seen.nats_off[seen.chunk_size :]) and not any(seen.gains[: seen.chunk_size])
    found = [neighbor.document_id for chunk in seen.chunks for neighbor in chunk.neighbors]
    assert found.count(documents[0]["id"].replace("web", "kjv")) >= len(found) / 3
    assert sum(sum(neighbor.gains) for chunk in seen.chunks for neighbor in chunk.neighbors) > 0


def test_every_position_of_a_chunk_gains(good):
    """Also the first token of a chunk, which an error of one place would leave without neighbors (experiment E1)."""
    offsets = good.offsets.bits_per_token
    gain = np.array(offsets["off"]) - np.array(offsets["on"])
    counts = np.array(good.offsets.num_tokens)
    assert gain[0] > 0.3 * np.average(gain, weights=counts)


@pytest.mark.parametrize("seed", range(2))
def test_retriever_that_returns_random_chunks_is_called_broken(setting, seed):
    """By the first line of the report, although every tensor has its shape and the model runs."""
    result = measure(setting, RandomSearcher(setting[3], seed), modes=["off", "on", "random"])
    assert result.verdict.outcome == "broken"
    assert str(result).startswith("The retriever looks broken")
    page = re.sub(r"<style>.*?</style>|<[^>]*>", "", render_page(result).partition("<body>")[2], flags=re.DOTALL)
    assert page.strip().startswith("The retriever looks broken")


def test_datastore_of_another_domain_does_not_help(setting):
    """Sentences of random words: found by their words, and worse than nothing."""
    other = setting[-1]("other", corpus(30))
    result = measure(setting, LexicalSearcher.build(other), datastore=other, modes=["off", "on", "random"])
    assert result.mode("on").difference.low > 0
    printed = " ".join(str(result).split())
    assert "another domain" in printed and ("ON is worse than OFF" in printed or printed.startswith("Retrieval hurts"))
