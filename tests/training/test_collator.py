"""The collator: padding, labels, neighbor tokens from the store, dropout of neighbors, refusals, worker processes."""

import pickle

import numpy as np
import pytest
import torch
from datastore.fixtures import corpus
from tiny_training import make_model
from torch.utils.data import DataLoader
from transformers import Trainer

from retro_hf.datastore import RetroDatastore
from retro_hf.errors import DatasetError, DatastoreInputError, DatastoreMismatchError
from retro_hf.training import RetroDataCollator, precompute_neighbors


SIZE = 8


@pytest.fixture
def collator(world) -> RetroDataCollator:
    return RetroDataCollator(world.tokenizer, world.datastore)


def rows(world, *numbers: int) -> list[dict]:
    return [world.dataset[number] for number in numbers]


def ragged(world) -> list[dict]:
    """Examples of different lengths, one of them shorter than a chunk."""
    short = next(row for row in world.dataset if len(row["input_ids"]) < SIZE)
    medium = next(row for row in world.dataset if SIZE < len(row["input_ids"]) < 30)
    return [medium, world.dataset[0], short]


def equal(left: dict, right: dict) -> bool:
    return left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)


def test_batch_is_padded_on_the_right_without_labels(world, collator):
    """Tokens, mask and labels, example by example."""
    examples = ragged(world)
    batch = collator(examples)
    assert batch["input_ids"].shape == (3, 32)
    for row, example in enumerate(examples):
        length = len(example["input_ids"])
        assert batch["input_ids"][row, :length].tolist() == example["input_ids"]
        assert batch["attention_mask"][row].tolist() == [1] * length + [0] * (32 - length)
        assert batch["labels"][row].tolist() == example["input_ids"] + [-100] * (32 - length)
    assert all(tensor.dtype == torch.int64 for tensor in batch.values())


def test_neighbor_tokens_are_those_of_the_chunk_ids(world, collator):
    """Chunks that an example does not have are masked."""
    examples = ragged(world)
    batch = collator(examples)
    assert batch["neighbor_input_ids"].shape == batch["neighbor_attention_mask"].shape == (3, 4, 2, 16)
    for row, example in enumerate(examples):
        count = len(example["neighbor_chunk_ids"])
        tokens, mask = world.datastore.gather(np.array(example["neighbor_chunk_ids"], dtype=int).reshape(count, 2))
        np.testing.assert_array_equal(batch["neighbor_input_ids"][row, :count], tokens)
        np.testing.assert_array_equal(batch["neighbor_attention_mask"][row, :count], mask)
        assert not batch["neighbor_attention_mask"][row, count:].any()


def test_given_labels_are_kept(world, collator):
    """Training on a part of the tokens, as in question answering."""
    example = world.dataset[0]
    labels = [-100] * 20 + example["input_ids"][20:]
    assert collator([{**example, "labels": labels}])["labels"].tolist() == [labels]


def test_examples_shorter_than_a_chunk_are_padded_to_one(world, collator):
    """Without a neighbor the model is its backbone; yet every weight takes part, as DDP and FSDP need it."""
    from tiny_training import make_model

    examples = [row for row in world.dataset if len(row["input_ids"]) < SIZE][:2]
    batch = collator(examples)
    assert batch["input_ids"].shape == (2, SIZE) and batch["neighbor_input_ids"].shape == (2, 1, 2, 16)
    assert not batch["neighbor_attention_mask"].any()
    model = make_model().train()
    alone = {name: batch[name] for name in ("input_ids", "attention_mask", "labels")}
    loss = model(**batch).loss
    torch.testing.assert_close(loss, model(**alone).loss)
    loss.backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


def test_fewer_neighbors_than_computed_are_the_best_ones(world):
    """`num_neighbors=1` takes the first of each list."""
    batch = RetroDataCollator(world.tokenizer, world.datastore, num_neighbors=1)(rows(world, 0, 1))
    both = RetroDataCollator(world.tokenizer, world.datastore)(rows(world, 0, 1))
    assert torch.equal(batch["neighbor_input_ids"], both["neighbor_input_ids"][:, :, :1])


def test_dropout_replaces_the_given_share(world):
    """Half of the chunks get random neighbors, a quarter none, the rest keep theirs; missing chunks get nothing."""
    plain = RetroDataCollator(world.tokenizer, world.datastore)
    dropping = RetroDataCollator(
        world.tokenizer, world.datastore, random_neighbor_probability=0.5, no_neighbor_probability=0.25
    )
    kept = none = total = 0
    for first in range(0, 120, 8):
        examples = rows(world, *range(first, first + 8))
        before, after = plain(examples), dropping(examples)
        complete = before["neighbor_attention_mask"].flatten(2).any(-1)
        same = (before["neighbor_input_ids"] == after["neighbor_input_ids"]).flatten(2).all(-1)
        empty = ~after["neighbor_attention_mask"].flatten(2).any(-1)
        assert empty[~complete].all()
        kept += int((same & complete).sum())
        none += int((empty & complete).sum())
        total += int(complete.sum())
    assert kept / total == pytest.approx(0.25, abs=0.07) and none / total == pytest.approx(0.25, abs=0.07)


def test_draws_depend_on_seed_and_batch_only(world):
    """Earlier calls, copies and other processes change nothing; seed and examples do."""
    options = {"random_neighbor_probability": 0.5}
    first, second = rows(world, 0, 1, 2), rows(world, 3, 4, 5)
    collator = RetroDataCollator(world.tokenizer, world.datastore, **options)
    expected = collator(first), collator(second)
    again = pickle.loads(pickle.dumps(RetroDataCollator(world.tokenizer, world.datastore, **options)))
    assert equal(again(second), expected[1]) and equal(again(first), expected[0])
    assert not equal(RetroDataCollator(world.tokenizer, world.datastore, seed=1, **options)(first), expected[0])


@pytest.mark.parametrize(("context", "workers"), [("fork", 2), ("spawn", 1)])  # a spawned one imports everything
def test_worker_processes_make_the_same_batches(world, context, workers):
    """Also with random neighbors."""
    collator = RetroDataCollator(world.tokenizer, world.datastore, random_neighbor_probability=0.5)
    data = world.dataset.select(range(12))
    alone = list(DataLoader(data, batch_size=4, collate_fn=collator))
    options = {"num_workers": workers, "multiprocessing_context": context}
    found = DataLoader(data, batch_size=4, collate_fn=collator, **options)
    assert all(equal(left, right) for left, right in zip(alone, found, strict=True))


def test_path_and_pad_id_are_accepted(world, collator):
    """The datastore may be named by its folder, and padding by its id."""
    examples = ragged(world)
    batch = RetroDataCollator(3, world.datastore.path)(examples)
    assert torch.equal(batch["neighbor_input_ids"], collator(examples)["neighbor_input_ids"])
    assert (batch["input_ids"][batch["attention_mask"] == 0] == 3).all()


def test_missing_neighbors_are_an_error_with_the_remedy(world, collator):
    """The commonest mistake: Trainer drops the columns by default."""
    with pytest.raises(DatasetError, match="precompute_neighbors.*remove_unused_columns=False"):
        collator([world.windows[0]])


def test_trainer_that_drops_the_columns_is_an_error(world, collator, tmp_path):
    """And not into a wrong run without neighbors."""
    from tiny_training import make_model, make_trainer

    trainer, _ = make_trainer(make_model(), world, tmp_path, remove_unused_columns=True)
    assert isinstance(trainer, Trainer)
    with pytest.raises(DatasetError):
        trainer.train()


def test_neighbors_of_another_datastore_are_an_error(world, tmp_path):
    """Other chunk size, other text of the same sizes, other number of neighbors."""

    def store(name: str, **options) -> RetroDatastore:
        sizes = {"chunk_size": SIZE, "neighbor_size": 16, **options}
        documents = sizes.pop("documents", corpus())
        path = tmp_path / name
        return RetroDatastore.build(documents, path, tokenizer=world.tokenizer, embedder=world.embedder, **sizes)

    coarse = RetroDataCollator(world.tokenizer, store("coarse", chunk_size=16))
    with pytest.raises(DatastoreMismatchError, match="chunk_size=8"):
        coarse(rows(world, 0))
    other = RetroDataCollator(world.tokenizer, store("other", documents=corpus(seed=1)))
    with pytest.raises(DatastoreMismatchError):
        other(rows(world, 0))
    with pytest.raises(DatastoreMismatchError):
        RetroDataCollator(world.tokenizer, world.datastore, num_neighbors=3)(rows(world, 0))
    # A longer continuation is another reading of the same chunks.
    longer = RetroDataCollator(world.tokenizer, store("longer", neighbor_size=24))(rows(world, 0))
    assert longer["neighbor_input_ids"].shape[-1] == 24


def test_copy_of_the_datastore_is_accepted(world, collator, tmp_path):
    """What counts is the content, not the folder."""
    world.datastore.save(tmp_path / "copy")
    copy = RetroDataCollator(world.tokenizer, tmp_path / "copy")
    assert equal(copy(rows(world, 0, 1)), collator(rows(world, 0, 1)))


@pytest.mark.parametrize(
    "changes",
    [
        {"input_ids": list(range(20))},
        {"neighbor_chunk_ids": None},
        {"neighbor_source": None},
        {"attention_mask": [1] * 31 + [0]},
        {"labels": [1, 2, 3]},
    ],
    ids=lambda changes: next(iter(changes)),
)
def test_example_that_does_not_fit_is_an_error(world, collator, changes):
    example = world.dataset[0]
    with pytest.raises(DatasetError):
        collator([example, {**example, **changes}])


def test_missing_tokens_and_unknown_chunk_ids_are_an_error(world, collator):
    with pytest.raises(DatasetError, match="tokenize_documents"):
        collator([{"text": "not tokenized"}])
    beyond = {**world.dataset[0], "neighbor_chunk_ids": [[0, len(world.datastore)]] * 4}
    with pytest.raises(DatastoreInputError):
        collator([beyond])


@pytest.mark.parametrize(
    "options", [{"random_neighbor_probability": 0.6, "no_neighbor_probability": 0.5}, {"num_neighbors": 0}]
)
def test_option_out_of_range_is_an_error(world, options):
    with pytest.raises(ValueError):
        RetroDataCollator(world.tokenizer, world.datastore, **options)


@pytest.mark.parametrize("first", [-100, 5])
def test_example_without_a_label_is_an_error(world, collator, first):
    """Its loss would be 0 / 0; the label of the first token doesn't count, since nothing predicts it."""
    example = world.dataset[0]
    masked = {**example, "labels": [first] + [-100] * 31}
    with pytest.raises(DatasetError):
        collator([example, masked])
    collator([example, {**masked, "labels": [-100] * 31 + [5]}])


def test_other_tokenizer_is_an_error(world):
    """Its ids would not be the store's."""
    from datastore.fixtures import make_tokenizer

    with pytest.raises(DatastoreMismatchError):
        RetroDataCollator(make_tokenizer(vocab_size=300), world.datastore)


def test_precomputing_again_replaces_the_column(world, collator):
    """A dataset that was searched before can be searched anew."""
    again = precompute_neighbors(world.dataset, world.retriever, num_neighbors=1)
    assert again.column_names == world.dataset.column_names
    assert collator([again[0]])["neighbor_input_ids"].shape[2] == 1


def test_model_with_other_chunks_rejects_the_batch(world, collator):
    """Neighbors of longer chunks are of text that the model is yet to predict; nothing in their shape says so."""
    batch = collator(rows(world, 0, 1))
    assert batch["neighbor_chunk_size"].tolist() == [SIZE, SIZE]
    model = make_model(chunk_size=SIZE // 2)
    with pytest.raises(ValueError):
        model(**batch)
