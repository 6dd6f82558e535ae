"""Neighbors looked up while training: the batches are those of neighbors computed beforehand, wherever they are made."""

import logging
import pickle

import pytest
import torch
from datasets import Dataset
from datastore.fixtures import corpus
from tiny_training import CHUNK_SIZE, WINDOW, make_model, make_trainer
from torch.utils.data import DataLoader

from retro_hf.errors import DatastoreMismatchError
from retro_hf.training import RetroDataCollator, precompute_neighbors, tokenize_documents


def equal(left: dict, right: dict) -> bool:
    return left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)


def batches(dataset, size: int = 8) -> list[list[dict]]:
    return [
        [dataset[number] for number in range(first, min(first + size, len(dataset)))]
        for first in range(0, len(dataset), size)
    ]


@pytest.mark.parametrize(
    "options",
    [{}, {"num_neighbors": 1}, {"random_neighbor_probability": 0.3, "no_neighbor_probability": 0.2}],
    ids=["all", "one", "dropout"],
)
def test_batches_equal_precomputed_ones(world, options):
    """Windows of the store's own documents, none of which finds itself."""
    live = RetroDataCollator(world.tokenizer, world.retriever, **options)
    beforehand = RetroDataCollator(world.tokenizer, world.datastore, **options)
    for windows, examples in zip(batches(world.windows), batches(world.dataset), strict=True):
        assert equal(live(windows), beforehand(examples))


def test_documents_outside_the_store_are_embedded(world):
    """Their chunks are embedded; several documents of a window are left out together."""
    documents = [{**row, "id": f"new-{row['id']}"} for row in corpus(num_documents=12, seed=5)]
    windows = tokenize_documents(
        Dataset.from_list(documents), world.tokenizer, max_length=WINDOW, chunk_size=CHUNK_SIZE
    )
    windows = windows.remove_columns("document_id").add_column(
        "document_id", [[f"doc-{number}", "new-doc-1"] for number in range(len(windows))]
    )
    live = RetroDataCollator(world.tokenizer, world.retriever)
    beforehand = RetroDataCollator(world.tokenizer, world.datastore)
    dataset = precompute_neighbors(windows, world.retriever, batch_size=8)
    for left, right in zip(batches(windows), batches(dataset), strict=True):
        assert equal(live(left), beforehand(right))


def test_missing_document_ids_are_warned_about(world, caplog):
    """With a warning that says what to do about it. The text itself then tells which document the chunks are from."""
    caplog.set_level(logging.WARNING, logger="retro_hf.training.collator")
    collator = RetroDataCollator(world.tokenizer, world.retriever)
    examples = [{"input_ids": world.windows[0]["input_ids"]}]
    batch = collator(examples)
    assert "remove_unused_columns=False" in caplog.text
    named = collator([world.windows[0]])
    assert torch.equal(batch["neighbor_input_ids"], named["neighbor_input_ids"])
    for chunk in range(WINDOW // CHUNK_SIZE):
        own = batch["input_ids"][0, chunk * CHUNK_SIZE : (chunk + 1) * CHUNK_SIZE]
        assert not (batch["neighbor_input_ids"][0, chunk, :, :CHUNK_SIZE] == own).all(dim=-1).any()


def test_worker_process_makes_the_same_batches(world):
    """Ahead of the model: embedder and index are used in the worker, forked after its parent used them, or unpickled."""
    collator = RetroDataCollator(world.tokenizer, world.retriever)
    # Ids that the store does not have: everything must be embedded.
    data = world.windows.select(range(24)).remove_columns(["document_id", "window_start"])
    data = data.add_column("document_id", ["unknown"] * len(data))
    alone = list(DataLoader(data, batch_size=8, collate_fn=collator))
    worker = DataLoader(data, batch_size=8, collate_fn=collator, num_workers=1)
    assert all(equal(left, right) for left, right in zip(alone, worker, strict=True))
    assert equal(pickle.loads(pickle.dumps(collator))(batches(data)[0]), alone[0])


@pytest.mark.parametrize("workers", [0, 1])
def test_trainer_trains_as_on_precomputed_neighbors(world, tmp_path, workers):
    """The same losses, evaluation included."""
    losses = {}
    for name, source in (("live", world.retriever), ("beforehand", world.datastore)):
        collator = RetroDataCollator(world.tokenizer, source)
        trainer, found = make_trainer(
            make_model(), world, tmp_path / name, collator, max_steps=3, dataloader_num_workers=workers
        )
        if name == "live":
            trainer.train_dataset = world.windows
            trainer.eval_dataset = world.windows.select(range(16))
        trainer.train()
        losses[name] = [*found.values.values(), trainer.evaluate()["eval_loss"]]
    assert losses["live"] == losses["beforehand"]


def test_other_tokenizer_is_an_error(world):
    """As it is with a datastore."""
    from datastore.fixtures import make_tokenizer

    with pytest.raises(DatastoreMismatchError):
        RetroDataCollator(make_tokenizer(vocab_size=300), world.retriever)
