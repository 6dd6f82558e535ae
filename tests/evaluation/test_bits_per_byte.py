"""Bits per byte: the right tokens, the right bytes, the right neighbors, and honest intervals."""

import math

import numpy as np
import pytest
import torch
from datasets import Dataset
from datastore.fixtures import corpus
from tiny import tiny_backbone
from tiny_training import CHUNK_SIZE, make_model

from retro_hf.datastore import RetroDatastore
from retro_hf.errors import DatasetError, DatastoreMismatchError
from retro_hf.evaluation import bits_per_byte


@pytest.fixture(scope="session")
def model():
    return make_model(scale=0.25)


@pytest.fixture(scope="session")
def held_out() -> list[str]:
    return [row["text"] for row in corpus(10, seed=5)]


def measure(model, documents, world, **options):
    options = {"retriever": world.retriever, "window": 32, "num_resamples": 50, **options}
    return bits_per_byte(model, documents, world.tokenizer, **options)


def nats_by_hand(model, ids: list[int], retriever, window: int, stride: int) -> float:
    """Token by token: the last window that begins early enough to have scored it first."""
    total, scored, start = 0.0, 1, 0
    while scored < len(ids):
        row = torch.tensor([ids[start : start + window]])
        with torch.no_grad():
            logits = model(row, retriever=retriever, use_cache=False).logits[0].double().log_softmax(-1)
        end = min(start + window, len(ids))
        for place in range(scored, end):
            total -= float(logits[place - start - 1, ids[place]])
        scored, start = end, start + stride
    return total


@pytest.mark.parametrize(("window", "stride"), [(32, 16), (32, 24), (64, 8)])
def test_sums_equal_a_live_retriever_window_by_window(world, model, held_out, window, stride):
    """Every token but the first of each document is scored once, with the neighbors generation would use."""
    result = measure(model, held_out, world, window=window, stride=stride, modes=("on", "off"), batch_size=3)
    for number, text in enumerate(held_out):
        ids = world.tokenizer(text, add_special_tokens=False)["input_ids"]
        assert result.num_tokens[number] == len(ids) - 1
        on = nats_by_hand(model, ids, world.retriever, window, stride)
        off = nats_by_hand(model, ids, None, window, stride)
        assert result.nats["on"][number] == pytest.approx(on, rel=1e-4)
        assert result.nats["off"][number] == pytest.approx(off, rel=1e-4)
    assert not np.allclose(result.nats["on"], result.nats["off"], rtol=1e-3)


def test_totals_are_sums_over_documents(world, model, held_out):
    """Bits over bytes of all documents, not a mean of means."""
    result = measure(model, held_out, world)
    for mode in ("on", "off", "random"):
        bits = result.nats[mode].sum() / math.log(2)
        assert result.bits_per_byte[mode] == pytest.approx(bits / result.num_bytes.sum())
    difference, low, high = result.differences["on"]
    assert difference == pytest.approx(result.bits_per_byte["on"] - result.bits_per_byte["off"])
    assert low <= difference <= high and "off" not in result.differences


@pytest.mark.parametrize(
    "text", ["naïve café – 東京の川 🚲🚲", "été " * 9, "🏳️‍🌈 e\u0301e\u0301", "  \n\tthe river  \n", "aéa"]
)
def test_bytes_are_counted_for_the_scored_text_only(world, model, text):
    """Also where a character is many tokens: all bytes but those of the first token's characters."""
    result = measure(model, [text], world, modes=("off",))
    ids = world.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    first = ids["offset_mapping"][0][1]
    assert result.num_bytes.tolist() == [len(text[first:].encode())]
    decoded = world.tokenizer.decode(ids["input_ids"], clean_up_tokenization_spaces=False)
    assert decoded == text


def test_batch_size_changes_nothing(world, model, held_out):
    """Padding is not read, and random neighbors depend on the document only."""
    one = measure(model, held_out, world, batch_size=1)
    many = measure(model, held_out, world, batch_size=16)
    for mode in one.nats:
        np.testing.assert_allclose(one.nats[mode], many.nats[mode], rtol=1e-5)


def test_random_neighbors_depend_on_the_seed(world, model, held_out):
    """The same seed the same, another seed other neighbors; ON and OFF never change."""
    first, again, other = (measure(model, held_out, world, seed=seed) for seed in (0, 0, 1))
    for mode in ("on", "off", "random"):
        assert np.array_equal(first.nats[mode], again.nats[mode])
        assert np.array_equal(first.nats[mode], other.nats[mode]) is (mode != "random")


def test_document_gets_no_neighbors_from_itself(world, model):
    """Documents of the store are scored as if they weren't in it: their id says which they are, or their text."""
    documents = corpus()[:6]
    named = measure(model, Dataset.from_list(documents), world, modes=("on",))
    nameless = measure(model, [row["text"] for row in documents], world, modes=("on",))
    np.testing.assert_allclose(nameless.nats["on"], named.nats["on"], rtol=1e-5)
    ids = [
        [
            world.datastore.search(
                world.embedder.embed(world.tokenizer.batch_decode([chunk])), 2, exclude_documents=np.array([number])
            )[1][0]
            for chunk in chunks_of(world.tokenizer(row["text"])["input_ids"])
        ]
        for number, row in enumerate(documents)
    ]
    given = measure(model, documents, world, modes=("on",), neighbor_chunk_ids=ids)
    np.testing.assert_allclose(given.nats["on"], named.nats["on"], rtol=1e-5)


def chunks_of(ids: list[int]) -> list[list[int]]:
    return [ids[start : start + CHUNK_SIZE] for start in range(0, len(ids) // CHUNK_SIZE * CHUNK_SIZE, CHUNK_SIZE)]


def test_precomputed_neighbors_need_no_embedder(world, model, held_out):
    """A datastore and chunk ids: the same as the search; all -1 the same as off."""
    live = measure(model, held_out, world, modes=("on", "off"))
    ids, none = [], []
    for text in held_out:
        chunks = chunks_of(world.tokenizer(text)["input_ids"])
        found = world.retriever.search(torch.tensor(chunks)).chunk_ids if chunks else []
        ids.append(found)
        none.append(np.full_like(found, -1) if len(found) else [])
    given = measure(model, held_out, world, retriever=world.datastore, neighbor_chunk_ids=ids, modes=("on",))
    np.testing.assert_allclose(given.nats["on"], live.nats["on"], rtol=1e-5)
    fewer = [[row[:1] for row in rows] for rows in ids]
    one = measure(model, held_out, world, retriever=world.datastore, neighbor_chunk_ids=fewer, modes=("on",))
    first = measure(model, held_out, world, modes=("on",), num_neighbors=1)
    assert (given.num_neighbors, one.num_neighbors, first.num_neighbors) == (2, 1, 1)
    np.testing.assert_allclose(one.nats["on"], first.nats["on"], rtol=1e-5)
    nothing = measure(model, held_out, world, retriever=world.datastore, neighbor_chunk_ids=none, modes=("on",))
    np.testing.assert_allclose(nothing.nats["on"], live.nats["off"], rtol=1e-5)


def test_given_neighbors_are_chunk_ids(world, model, held_out):
    """Of the right type and shape, for every document, and not fewer than are reported."""
    counts = [len(world.tokenizer(text)["input_ids"]) // CHUNK_SIZE for text in held_out]
    right = [np.zeros((count, 2), dtype=int) for count in counts]
    assert measure(model, held_out, world, neighbor_chunk_ids=right).num_neighbors == 2
    wrong = {
        "floats": [rows + 0.5 for rows in right],
        "texts": [rows.astype(str) for rows in right],
        "beyond the last": [rows + world.datastore.num_chunks for rows in right],
        "one number a chunk": [rows[:, 0] for rows in right],
        "a number": 3,
        "one document": right[:1],
    }
    for ids in wrong.values():
        with pytest.raises(DatasetError):
            measure(model, held_out, world, neighbor_chunk_ids=ids)
    with pytest.raises(DatasetError, match="3 neighbors"):
        measure(model, held_out, world, neighbor_chunk_ids=right, num_neighbors=3)
    with pytest.raises(DatasetError, match="retriever="):
        measure(model, held_out, world, neighbor_chunk_ids=right, retriever=None)


def test_model_without_retrieval_is_measured_the_same_way(world, model, held_out):
    """Any causal language model has an OFF: RETRO's is its backbone's."""
    plain = bits_per_byte(tiny_backbone("gpt2", vocab_size=400), held_out, world.tokenizer, window=32)
    assert plain.bits_per_byte.keys() == {"off"} and not plain.differences
    backbone = bits_per_byte(model.model.backbone, held_out, world.tokenizer, window=32, stride=16)
    retro = measure(model, held_out, world, modes=("off",), stride=16)
    np.testing.assert_allclose(backbone.nats["off"], retro.nats["off"], rtol=1e-6)


def test_off_ignores_an_attached_retriever(world, held_out):
    """And measuring leaves the model as it was."""
    model = make_model(scale=0.25)
    expected = measure(model, held_out, world, modes=("off",))
    model.set_retriever(world.retriever)
    model.train()
    assert np.array_equal(measure(model, held_out, world, modes=("off",)).nats["off"], expected.nats["off"])
    assert model.training and model.retriever is world.retriever


def test_the_interval_covers_a_known_difference(world):
    """Of 100 draws of documents with a true difference, about 95 intervals hold it."""
    from retro_hf.evaluation.interval import Bootstrap

    generator = np.random.default_rng(0)
    held = 0
    for draw in range(100):
        num_bytes = generator.integers(50, 150, size=60)
        differences = num_bytes * (-0.1 + generator.normal(0, 0.2, size=60))
        interval = Bootstrap(300, draw).interval(differences, num_bytes)
        held += interval.low <= -0.1 <= interval.high
    assert 88 <= held <= 100


def test_table_and_json_have_the_numbers(world, model, held_out):
    """What a reader sees, and what `results.json` needs."""
    result = measure(model, held_out, world)
    table = str(result)
    for mode, value in result.bits_per_byte.items():
        assert any(line.split()[:2] == [mode, f"{value:.4f}"] for line in table.splitlines())
    assert f"{result.num_bytes.sum():,} bytes" in table and "first token" in table
    content = result.to_dict()
    assert content["bits_per_byte"].keys() == {"on", "off", "random"}
    assert content["num_documents"] == 10 and content["num_neighbors"] == 2


def test_single_document_has_no_interval(world, model):
    """Nothing to draw from: NaN rather than a false zero width."""
    result = measure(model, ["the river runs over the old bridge today"], world)
    assert all(math.isnan(end) for end in result.differences["on"][1:])


def test_documents_with_nothing_to_score_are_left_out(world, model):
    """Empty and one-token documents don't count; if there is nothing else, that is an error."""
    result = measure(model, ["", "a", "the river runs", "a"], world)
    assert len(result.num_tokens) == 1
    with pytest.raises(DatasetError):
        measure(model, ["", "a"], world)


@pytest.mark.parametrize(
    ("options", "suggested"),
    [
        ({"window": 20}, 16),
        ({"stride": 12}, 8),
        ({"window": 8}, 16),
        ({"window": 24, "stride": 24}, 16),
    ],
)
def test_window_off_the_chunk_grid_is_an_error_that_suggests_another(world, model, held_out, options, suggested):
    with pytest.raises(ValueError, match=f"Use (at most )?{suggested}"):
        measure(model, held_out, world, **options)


@pytest.mark.parametrize("options", [{"modes": ("onn",)}, {"retriever": None, "modes": ("on",)}, {"stride": -8}])
def test_option_out_of_range_is_an_error(world, model, held_out, options):
    with pytest.raises(ValueError):
        measure(model, held_out, world, **options)


def test_neighbors_must_be_available_for_every_document(world, model, held_out):
    with pytest.raises(DatasetError):
        measure(model, [{"body": "x"}], world)
    with pytest.raises(DatasetError):
        measure(model, held_out, world, neighbor_chunk_ids=[[]])
    with pytest.raises(DatasetError, match="RetroRetriever"):
        measure(model, held_out, world, retriever=world.datastore)


def test_datastore_with_other_chunks_is_an_error(world, model, held_out, tmp_path):
    coarse = RetroDatastore.build(
        corpus(4),
        tmp_path / "coarse",
        tokenizer=world.tokenizer,
        embedder=world.embedder,
        chunk_size=16,
        neighbor_size=16,
    )
    with pytest.raises(DatastoreMismatchError):
        measure(model, held_out, world, retriever=coarse)
