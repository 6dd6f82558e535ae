"""train_pointer: a new reader learns where to look before it is trained as a part of the model."""

import pytest
import torch

from retro_hf.training import start_by_copying, train_pointer
from retro_hf.training.pointer import _attended, _gain, _record

from .test_copy_start import copied, new_reader, random_text


def batch_of(ids: torch.Tensor, neighbors: torch.Tensor) -> dict[str, torch.Tensor]:
    return {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "labels": ids,
        "neighbor_input_ids": neighbors,
        "neighbor_attention_mask": torch.ones_like(neighbors),
    }


def copies(model, seed: int) -> dict[str, torch.Tensor]:
    """Random text, of which half of the rows read what comes next, and half what another row says."""
    ids = torch.randint(5, model.config.vocab_size, (8, 32), generator=torch.Generator().manual_seed(seed))
    neighbors = copied(ids)
    return batch_of(ids, torch.cat([neighbors[:4], neighbors[4:].flip(0)]))


def test_it_learns_what_to_copy():
    """The last steps gain more than the first ones, and the model predicts text better that a neighbor repeats."""
    model = new_reader()
    start_by_copying(model, random_text(model, 200))
    given = copies(model, seed=100)
    with torch.no_grad():
        before = float(model(**given).loss)
    gains = train_pointer(model, [copies(model, seed) for seed in range(20)])
    with torch.no_grad():
        after = float(model(**given).loss)
    assert len(gains) == 60 and sum(gains[-20:]) > sum(gains[:20])
    assert after < before - 0.05


def test_the_gain_is_that_of_raised_logits():
    """The sum over the neighbors' tokens equals a softmax over the whole vocabulary."""
    model = new_reader()
    start_by_copying(model, random_text(model, 200))
    given = copies(model, seed=0)
    given["neighbor_input_ids"][:, :, :, 3] = given["neighbor_input_ids"][
        :, :, :, 7
    ]  # a token that stands there twice
    given["neighbor_attention_mask"][:, 1, :, -4:] = 0
    batch = _record(model, given)
    raised = 5 * _attended(model, 2, batch).detach()
    found = float(_gain(raised, batch))
    logits = model(given["input_ids"]).logits.log_softmax(dim=-1)
    expected = []
    for row in range(8):
        for chunk in range(3):
            place = row * 4 + chunk if len(batch.is_scored) == 32 else row * 3 + chunk
            for query in range(8 if chunk < 3 else 0):
                token = chunk * 8 + 7 + query
                if token + 1 >= 32:
                    continue
                boosted = logits[row, token].clone()
                boosted.index_add_(0, batch.neighbor_ids[place], raised[place, query])
                following = given["input_ids"][row, token + 1]
                expected.append(boosted.log_softmax(dim=-1)[following] - logits[row, token, following])
    assert len(expected) == int(batch.is_scored.sum())
    assert found == pytest.approx(float(torch.stack(expected).mean()), abs=2e-3)


def test_only_where_it_looks_and_how_strongly_is_trained():
    """The base, the encoder and the values stay as they are; without neighbors the model is the base, bit for bit."""
    model = new_reader()
    start_by_copying(model, random_text(model, 200))
    ids = random_text(model, 4)
    expected = model(ids).logits
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    train_pointer(model, [copies(model, 0)])
    changed = {
        name.rpartition("cross_attention.")[2]
        for name, weight in model.state_dict().items()
        if not torch.equal(weight, before[name])
    }
    kinds = ("attention.q_proj.weight", "attention.k_proj.weight", "attention.position_bias.weight", "null_logits")
    assert changed <= {f"{layer}.{kind}" for layer in (2, 3) for kind in kinds} | {"3.attention.o_proj.weight"}
    assert {f"{layer}.null_logits" for layer in (2, 3)} <= changed
    assert torch.equal(model(ids).logits, expected)
    assert all(weight.grad is None for weight in model.parameters())


def test_a_reader_in_float32_on_a_base_in_bfloat16():
    """As `fit` has them on a GPU."""
    model = new_reader()
    model.model.backbone.to(torch.bfloat16)
    start_by_copying(model, random_text(model, 200))
    gains = train_pointer(model, [copies(model, seed) for seed in range(20)])
    assert sum(gains[-20:]) > sum(gains[:20])
    assert {weight.dtype for weight in model.model.retro.parameters()} == {torch.float32}


def test_batches_that_read_nothing_are_refused():
    """The message says what to give."""
    model = new_reader()
    given = copies(model, 0)
    given["neighbor_attention_mask"].zero_()
    with pytest.raises(ValueError, match="neighbor"):
        train_pointer(model, [given])
    with pytest.raises(ValueError, match="neighbor"):
        train_pointer(model, [])


@pytest.mark.parametrize(
    "name", ["input_ids", "attention_mask", "labels", "neighbor_input_ids", "neighbor_attention_mask"]
)
def test_a_batch_without_what_it_needs_is_refused(name):
    """Whether it lacks a tensor, or has one of another shape; nothing is trained."""
    model = new_reader()
    given = copies(model, 0)
    before = model.model.retro.cross_attention["2"].attention.q_proj.weight.clone()
    for odd in (
        {key: values for key, values in given.items() if key != name},
        given | {name: given[name][:, :-1]},
        given | {name: None},
        [1],
    ):
        with pytest.raises(ValueError, match="RetroDataCollator"):
            train_pointer(model, [odd])
    assert torch.equal(model.model.retro.cross_attention["2"].attention.q_proj.weight, before)


def test_tokens_without_a_label_are_not_scored():
    """As the tokens of a question, or of a prompt."""
    model = new_reader()
    given = copies(model, 0)
    labels = given["labels"].clone()
    labels[:, :20] = -100
    assert int(_record(model, given | {"labels": labels}).is_scored.sum()) == 8 * 12


def test_a_model_that_is_no_copier_is_refused():
    """The same conditions as for `start_by_copying`."""
    model = new_reader(cross_attention_null_key=False)
    with pytest.raises(ValueError, match="null_key"):
        train_pointer(model, [copies(model, 0)])
