"""The neighbors in the prompt of the base: scored as by hand, on the same tokens, with what does not fit reported."""

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from datastore.fixtures import corpus
from tiny import tiny_backbone
from tiny_training import CHUNK_SIZE, make_model

from retro_hf.evaluation import Evaluation, Interval, evaluate
from retro_hf.evaluation.report.page import render_page
from retro_hf.evaluation.result import InContext, Mode
from retro_hf.evaluation.verdict import in_context_note


MODES = ["off", "on", "random", "in_context"]


@pytest.fixture(scope="module")
def documents() -> list[dict]:
    return [{"id": f"new-{number}", "text": row["text"]} for number, row in enumerate(corpus(6, seed=5))]


def measure(model, documents, world, folder, **options) -> tuple[Evaluation, dict[str, np.ndarray]]:
    options = {"retriever": world.retriever, "modes": MODES, "num_resamples": 50, "output": folder, **options}
    result = evaluate(model, documents, world.tokenizer, **options)
    columns = pq.read_table(folder / "tokens.parquet").to_pydict()
    return result, {name: np.array(values) for name, values in columns.items()}


def nats_by_hand(model, world, ids: list[int], place: int, start: int) -> float:
    """Of the token at `place`: the neighbors of the chunk before its own, nearest last, then the text from `start` on."""
    chunk = place // CHUNK_SIZE - 1
    rows = torch.tensor([ids[chunk * CHUNK_SIZE : (chunk + 1) * CHUNK_SIZE]])
    neighbors, mask = world.retriever(rows)
    line = world.tokenizer("\n")["input_ids"]
    prompt = [[*tokens[kept == 1].tolist(), *line] for tokens, kept in zip(neighbors[0], mask[0], strict=True)]
    row = torch.tensor([[token for part in reversed(prompt) for token in part] + ids[start : place + 1]])
    with torch.no_grad():
        logits = model.model.backbone(row[:, :-1]).logits[0, -1].double().log_softmax(-1)
    return -float(logits[row[0, -1]])


def test_prompts_are_scored_as_by_hand(world, documents, tmp_path):
    """With windows of 32 tokens every 16, so that the text before a token is that of the other modes."""
    model = make_model(scale=0.25)
    _, table = measure(model, documents, world, tmp_path, window=32, stride=16, batch_size=3)
    for number, document in enumerate(documents):
        ids = world.tokenizer(document["text"])["input_ids"]
        rows = np.flatnonzero(table["document"] == number)
        for row in rows[::5]:
            place = int(table["position"][row])
            # The first window scores up to 32 tokens, each later one 16 more.
            start = 0 if place < 32 else (place // 16 - 1) * 16
            if place < CHUNK_SIZE:
                assert table["nats_in_context"][row] == table["nats_off"][row], "nothing is read for the first chunk"
            else:
                assert table["nats_in_context"][row] == pytest.approx(
                    nats_by_hand(model, world, ids, place, start), rel=1e-4
                )


def test_row_cost_and_comparison_are_reported(world, documents, tmp_path):
    model = make_model(scale=0.25)
    result, table = measure(model, documents, world, tmp_path, window=32)
    bits = {name: table[f"nats_{name}"].sum() / np.log(2) / table["num_bytes"].sum() for name in ("on", "in_context")}
    assert result.mode("in_context").bits_per_byte == pytest.approx(bits["in_context"], rel=1e-6)
    found = result.in_context
    assert found.on_minus_in_context.value == pytest.approx(bits["on"] - bits["in_context"], rel=1e-4)
    assert found.num_cut == 0 and found.num_read > 2 * found.num_read_off > 0
    assert Evaluation.load(tmp_path) == result
    assert any(line.startswith("in_context") for line in str(result).splitlines())
    assert "in its prompt" in str(result) and "in_context" in render_page(result)


def test_tokens_whose_prompt_does_not_fit_are_counted(world, documents, tmp_path):
    """A context of 128 tokens cannot take a window of 128 and the neighbors before it."""
    model = make_model(family="gpt2", scale=0.25)
    assert model.model.backbone.config.max_position_embeddings == 128
    text = " ".join(document["text"] for document in documents)
    result, table = measure(model, [text, *documents], world, tmp_path, window=128)
    assert 0 < result.in_context.num_cut < result.inputs.num_tokens
    assert np.isfinite(table["nats_in_context"]).all()


def test_default_modes_leave_it_out_because_it_is_slow(world, documents):
    model = make_model(scale=0.25)
    options = {"retriever": world.retriever, "num_resamples": 5, "window": 32}
    result = evaluate(model, documents[:2], world.tokenizer, **options)
    assert [mode.name for mode in result.modes] == ["off", "on", "random", "shuffled", "oracle"]
    assert result.in_context is None


def test_model_without_a_base_is_an_error(world, documents):
    with pytest.raises(ValueError):
        evaluate(tiny_backbone("gpt2", vocab_size=400), documents, world.tokenizer, modes=["in_context"])


@pytest.mark.parametrize(
    ("difference", "word"),
    [
        (Interval(-0.2, -0.3, -0.1), "better"),
        (Interval(0.2, 0.1, 0.3), "worse"),
        (Interval(0.0, -0.1, 0.1), "not measurably"),
    ],
)
def test_note_says_which_reading_is_better(difference, word):
    mode = Mode("in_context", False, 2, 1.0, 4.0, 16.0, None, None, None)
    note = in_context_note({"in_context": mode}, InContext(difference, 500, 100, 7))
    assert f"ON is {word}" in note and "5.0 times" in note and "7 tokens" in note
