"""The trace of a text: the same losses as bits per byte, and what each single neighbor brings, checked another way."""

import json

import numpy as np
import pytest
import torch
from datastore.fixtures import corpus
from rich.console import Console
from tiny_training import CHUNK_SIZE, NEIGHBOR_SIZE, make_model

from retro_hf.errors import DatasetError, DatastoreMismatchError
from retro_hf.evaluation import bits_per_byte, trace


@pytest.fixture(scope="module")
def model():
    return make_model(scale=0.25)


@pytest.fixture(scope="module")
def text(world) -> str:
    """Held out, four chunks and a rest."""
    return next(
        row["text"]
        for row in corpus(20, seed=5)
        if 4 * CHUNK_SIZE < len(world.tokenizer(row["text"])["input_ids"]) < 5 * CHUNK_SIZE
    )


def tracing(model, document, world, **options):
    return trace(model, document, world.tokenizer, retriever=world.retriever, **options)


def test_half_characters_are_replaced_as_in_a_datastore(world, model, text):
    """In the text as in the id, whose document is left out; a title is kept as it is."""
    broken = {"id": "\udc80", "title": "\udc80", "text": f"{text} \udc80"}
    seen = tracing(model, broken, world)
    assert "".join(seen.tokens) == f"{text} \ufffd" and seen.document_id == "\ufffd"
    assert seen.nats_on == tracing(model, f"{text} \ufffd", world).nats_on


def test_losses_equal_those_of_bits_per_byte(world, model, text):
    """On and off, over the same tokens."""
    seen = tracing(model, text, world)
    measured = bits_per_byte(model, [text], world.tokenizer, retriever=world.retriever, modes=("on", "off"))
    assert seen.nats_on[0] is None and seen.nats_off[0] is None
    assert sum(seen.nats_on[1:]) == pytest.approx(measured.nats["on"][0], rel=1e-5)
    assert sum(seen.nats_off[1:]) == pytest.approx(measured.nats["off"][0], rel=1e-5)
    assert sum(seen.gains) == pytest.approx(sum(seen.nats_off[1:]) - sum(seen.nats_on[1:]))


def test_gain_of_a_neighbor_is_the_loss_without_it(world, model, text):
    """Left out by hand: the other neighbor takes its place, which changes no softmax over the two."""
    ids = torch.tensor([world.tokenizer(text)["input_ids"]])
    num_chunks = ids.shape[1] // CHUNK_SIZE
    neighbors, mask = world.retriever(ids[0, : num_chunks * CHUNK_SIZE].view(num_chunks, CHUNK_SIZE))

    def losses(neighbors, mask):
        given = {"neighbor_input_ids": neighbors[None], "neighbor_attention_mask": mask[None]}
        with torch.no_grad():
            logits = model(ids, **given, use_cache=False).logits[0, :-1].double()
        return torch.nn.functional.cross_entropy(logits, ids[0, 1:], reduction="none")

    seen = tracing(model, text, world)
    on = losses(neighbors, mask)
    for u in range(num_chunks):
        for k, neighbor in enumerate(seen.chunks[u].neighbors):
            without, its_mask = neighbors.clone(), mask.clone()
            without[u, k], its_mask[u, k] = neighbors[u, 1 - k], mask[u, 1 - k]
            brought = losses(without, its_mask) - on
            first = (u + 1) * CHUNK_SIZE - 1  # the loss of the next chunk's first token
            assert brought[:first].abs().max() == 0
            expected = brought[first:]
            np.testing.assert_allclose(neighbor.gains, expected[:CHUNK_SIZE], atol=1e-4)
            assert neighbor.later_gain == pytest.approx(float(expected[CHUNK_SIZE:].sum()), abs=1e-3)
            assert np.abs(neighbor.gains).max() > 0.01


def test_neighbors_are_those_of_the_retriever(world, model, text):
    """With score, document, text and continuation; as many as asked for."""
    seen = tracing(model, text, world, num_neighbors=3)
    rows = torch.tensor(world.tokenizer(text)["input_ids"][: 4 * CHUNK_SIZE]).view(4, CHUNK_SIZE)
    expected = world.retriever.trace(rows, num_neighbors=3)
    assert [(chunk.start, chunk.end) for chunk in seen.chunks[:4]] == [(0, 8), (8, 16), (16, 24), (24, 32)]
    for chunk, neighbors in zip(seen.chunks, expected, strict=False):
        assert len(chunk.neighbors) == 3
        for neighbor, other in zip(chunk.neighbors, neighbors, strict=True):
            assert other.__dict__.items() <= neighbor.__dict__.items()
    assert seen.chunks[-1].end == len(seen.tokens) and not seen.chunks[-1].neighbors


def test_document_is_not_its_own_neighbor(world, model):
    """If the datastore has its id."""
    document = corpus()[1]
    seen = tracing(model, document, world)
    assert (seen.document_id, seen.title) == (document["id"], document["title"])
    found = [neighbor.document_id for chunk in seen.chunks for neighbor in chunk.neighbors]
    assert found and document["id"] not in found
    nameless = tracing(model, document["text"], world)
    assert document["id"] in [chunk.neighbors[0].document_id for chunk in nameless.chunks if chunk.neighbors]


@pytest.mark.parametrize("text", ["naïve café – 東京の川 🚲🚲 runs over the old bridge", "the\n\triver  runs"])
def test_tokens_join_to_the_text(world, model, text):
    """Put together they are what was given, and everything is ready for JSON."""
    seen = tracing(model, text, world)
    assert "".join(seen.tokens) == text
    assert json.loads(json.dumps(seen.to_dict())) == seen.to_dict()


def test_batch_size_and_the_rest_of_the_text_change_nothing(world, model, text):
    """Rows are independent, and the beginning of a text does not depend on its end."""
    seen, one = tracing(model, text, world), tracing(model, text, world, batch_size=1)
    np.testing.assert_allclose(one.nats_on[1:], seen.nats_on[1:], rtol=1e-5)
    start = tracing(model, text, world, max_tokens=20)
    assert (len(start.tokens), start.num_tokens) == (20, len(seen.tokens))
    np.testing.assert_allclose(start.nats_on[1:], seen.nats_on[1:20], rtol=1e-5)
    assert [len(chunk.neighbors) for chunk in start.chunks] == [2, 2, 0]
    assert len(start.chunks[1].neighbors[0].gains) == 4


def test_neighbors_of_the_last_chunk_have_no_gain(world, model, text):
    """Its neighbors would be read for a token that isn't there; a text shorter than a chunk has none at all."""
    seen = tracing(model, text, world, max_tokens=2 * CHUNK_SIZE)
    assert [[neighbor.gains for neighbor in chunk.neighbors] for chunk in seen.chunks[1:]] == [[[], []]]
    short = tracing(model, "the old bridge", world)
    assert short.gains == [0] * len(short.tokens) and not short.chunks[0].neighbors


def test_print_shows_text_and_neighbors(world, model, text):
    """Without colors by `print`, with them by rich; text that looks like markup stays as it is."""
    seen = tracing(model, {"text": f"[bold]the {text}", "id": "held-out"}, world)
    printed = str(seen)
    assert printed.startswith("held-out: ") and "\x1b" not in printed and "[bold]the" in printed
    for chunk in seen.chunks:
        for neighbor in chunk.neighbors:
            assert f"{neighbor.score:.3f} {neighbor.document_id}" in printed
            assert neighbor.text.split()[-1] in printed
    console = Console(width=110, force_terminal=True, color_system="truecolor")
    with console.capture() as capture:
        console.print(seen)
    assert "\x1b[" in capture.get()


def test_model_is_left_as_it_was(world, text):
    """In its mode, with its retriever, which plays no part."""
    model = make_model(scale=0.25)
    expected = tracing(model, text, world)
    model.set_retriever(world.retriever)
    model.train()
    assert tracing(model, text, world) == expected
    assert model.training and model.retriever is world.retriever


@pytest.mark.parametrize("document", ["a", {"body": "the river"}, None])
def test_text_without_anything_to_predict_is_an_error(world, model, document):
    with pytest.raises(DatasetError):
        tracing(model, document, world)


def test_trace_needs_a_retriever(world, model, text):
    for other in (None, world.datastore):
        with pytest.raises(DatasetError, match=type(other).__name__):
            trace(model, text, world.tokenizer, retriever=other)


@pytest.mark.parametrize(
    "options", [{"max_tokens": 1}, {"max_tokens": -1}, {"batch_size": 0}, {"num_neighbors": -1}], ids=str
)
def test_number_out_of_range_is_an_error(world, model, text, options):
    with pytest.raises(ValueError):
        tracing(model, text, world, **options)


def test_model_must_have_retrieval_and_fit_the_datastore(world, model, text):
    with pytest.raises(ValueError):
        tracing(model.model.backbone, text, world)
    with pytest.raises(DatastoreMismatchError):
        tracing(make_model(chunk_size=4, neighbor_size=NEIGHBOR_SIZE), text, world)
