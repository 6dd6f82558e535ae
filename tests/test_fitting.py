"""fit: from texts to a reader that was measured; what is held out stays out, and a killed fit goes on."""

import json

import numpy as np
import pytest
import torch
from datasets import Dataset
from datastore.fixtures import corpus
from safetensors.torch import load_file
from tiny_training import CHUNK_SIZE, make_world
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM
from typer.testing import CliRunner

from retro_hf import RetroDatastore, RetroRetriever, fit, retrofit
from retro_hf.datastore.duplicates import stored_documents
from retro_hf.errors import DatasetError, DatastoreWriteError
from retro_hf.fitting import plan, train
from retro_hf.fitting.recipe import FitCollator
from retro_hf.fitting.texts import split, with_stored_ids
from retro_hf.training import precompute_neighbors, tokenize_documents
from retro_hf_cli.main import app


DOCUMENTS = [one | {"text": f"{one['text']} {one['text']}"} for one in corpus(30, seed=3)]


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A store and its retriever, and the folder of a base with its tokenizer."""
    folder = tmp_path_factory.mktemp("fit")
    made = make_world(folder)
    made.base = folder / "base"
    torch.manual_seed(0)
    sizes = {"hidden_size": 40, "intermediate_size": 16, "num_hidden_layers": 3, "num_attention_heads": 2}
    LlamaForCausalLM(LlamaConfig(vocab_size=400, **sizes)).save_pretrained(made.base)
    made.tokenizer.save_pretrained(made.base)
    made.folder = folder
    return made


def small_fit(world, output, base=None, documents=DOCUMENTS, **options):
    """A fit of two steps, over in seconds."""
    settings = {"retriever": world.retriever, "steps": 2, "num_heldout": 3, "batch_size": 2, **options}
    return fit(base or world.base, documents, output, **settings)


@pytest.fixture(scope="module")
def fitted(world):
    return small_fit(world, world.folder / "fitted")


def weights(folder):
    return load_file(folder / "model.safetensors")


def checkpoint(fit_folder, step):
    return weights(fit_folder / "work" / "checkpoints" / f"checkpoint-{step}")


def assert_same_training(first, here, there):
    """The second step is the same as elsewhere, but for rounding, which depends on where in memory numbers lie."""
    moved = sum(float((there[name] - first[name]).pow(2).sum()) for name in there)
    apart = sum(float((there[name] - here[name]).pow(2).sum()) for name in there)
    assert 0 < moved and apart < 0.01 * moved


def test_it_leaves_a_measured_adapter(world, fitted):
    """The adapter loads, is the base without retrieval, and its card has every reader on the same held-out tokens."""
    model = AutoModelForCausalLM.from_pretrained(fitted.folder, backbone_name_or_path=world.base)
    ids = torch.arange(5, 30).unsqueeze(0)
    with torch.no_grad():
        assert torch.equal(model(ids).logits, AutoModelForCausalLM.from_pretrained(world.base)(ids).logits)
    assert [mode.name for mode in fitted.evaluation.modes] == ["off", "on", "random", "in_context"]
    assert fitted.parallel_context.inputs.num_tokens == fitted.evaluation.inputs.num_tokens > 0
    assert fitted.parallel_context.mode("off").bits_per_byte == pytest.approx(
        fitted.evaluation.mode("off").bits_per_byte
    )
    card = (fitted.folder / "README.md").read_text()
    for _, value, _ in fitted.rows():
        assert f"{value:.4f}" in card and f"{value:.4f}" in str(fitted)
    assert fitted.evaluation.verdict.text in card.replace("\\", "")  # which keeps brackets from being a link
    assert json.loads((fitted.folder / "fit.json").read_text())["steps"] == 2


def test_killed_fit_resumes_to_the_same_weights(world, fitted, monkeypatch):
    """What was done since the last save is all that is lost, and the result is that of a fit that was not killed."""
    monkeypatch.setattr(train, "_SAVE_SECONDS", -1.0)
    tell, folder = train._Clock.tell, world.folder / "killed"

    def killed(self, model, state):
        if state.global_step == 2:
            raise KeyboardInterrupt
        tell(self, model, state)

    monkeypatch.setattr(train._Clock, "tell", killed)
    with pytest.raises(KeyboardInterrupt):
        small_fit(world, folder)
    (folder / "work" / "checkpoints" / "checkpoint-9").mkdir()  # one that was not finished
    assert train.last_checkpoint(folder / "work").name == "checkpoint-1"
    first = checkpoint(folder, 1)
    monkeypatch.setattr(train._Clock, "tell", tell)
    again = small_fit(world, folder)
    assert_same_training(first, checkpoint(folder, 2), checkpoint(fitted.folder, 2))
    assert [entry["step"] for entry in again.settings["log"]] == [0, 1, 2]


def test_same_call_resumes_when_the_time_was_over(world, fitted):
    """An adapter is there after the given time, and the steps that are missing can follow."""
    folder = world.folder / "short"
    short = small_fit(world, folder, minutes=1e-6)
    assert (short.settings["steps"], short.settings["planned"]) == (1, 2)
    first = checkpoint(folder, 1)
    assert small_fit(world, folder).settings["steps"] == 2
    assert_same_training(first, checkpoint(folder, 2), checkpoint(fitted.folder, 2))


def test_adapter_can_be_trained_further(world, fitted):
    """Its reader changes, and its base does not."""
    more = small_fit(world, world.folder / "more", base=fitted.folder, backbone=world.base)
    before, after = weights(fitted.folder), weights(more.folder)
    assert before.keys() == after.keys()
    assert any(not torch.equal(before[name], after[name]) for name in before)
    assert more.settings["backbone"] == fitted.settings["backbone"]


def test_without_a_store_one_is_built_from_the_other_documents(world):
    """No text that is held out can be looked up."""
    made = small_fit(world, world.folder / "own", retriever=None, embedder=world.embedder)
    stored = {id for ids, _ in stored_documents(RetroDatastore.load(made.folder / "store")) for id in ids}
    assert len(stored) == made.settings["num_train"] and made.settings["num_heldout"] == 3


def test_stored_documents_are_recognized_under_any_id(world):
    """A document that lies in the store under another id reads nothing of itself; a like id of another text does not count."""
    stored = [one | {"id": f"doc-{39 - number}"} for number, one in enumerate(corpus())]
    windows = tokenize_documents(Dataset.from_list(stored), world.tokenizer, max_length=32, chunk_size=CHUNK_SIZE)
    named = with_stored_ids(windows, stored, world.datastore, world.tokenizer)
    rows = precompute_neighbors(named, world.retriever, num_neighbors=4)
    for id, own, found in zip(windows["document_id"], named["document_id"], rows["neighbor_chunk_ids"], strict=True):
        true = f"doc-{39 - int(id.removeprefix('doc-'))}"
        assert own == [true]
        numbers = np.array(found).reshape(-1)
        assert world.datastore.document_number(true) not in world.datastore.document_of(numbers[numbers >= 0])


def test_held_out_documents_are_looked_up_without_themselves(world):
    """Documents that lie in the store can be held out: the store that is searched for them has them no more."""
    stored = [one | {"id": f"other-{one['id']}"} for one in corpus()]
    made = small_fit(world, world.folder / "leaky", documents=stored)
    searched = {id for ids, _ in stored_documents(RetroDatastore.load(made.folder / "work" / "store")) for id in ids}
    parts = split(stored, world.tokenizer, num_heldout=3, least=3 * CHUNK_SIZE, window=256, seed=0)
    held = {one["id"].removeprefix("other-") for one in parts.heldout}
    assert len(held) == 3 and searched == {one["id"] for one in corpus()} - held
    assert not made.evaluation.inputs.leaked


def test_near_copies_of_held_out_documents_are_not_trained_on(world):
    """A copy under another name is in neither part."""
    doubled = [*DOCUMENTS, *(one | {"id": f"copy-{one['id']}"} for one in DOCUMENTS)]
    parts = split(doubled, world.tokenizer, num_heldout=5, least=24, window=256, seed=0)
    names = {one["id"].removeprefix("copy-") for one in parts.heldout}
    assert not names & {one["id"].removeprefix("copy-") for one in parts.train}
    assert parts.num_near == 2 * len(names) - len(parts.heldout)


def test_batches_have_neighbors_of_all_sorts(world):
    """From one neighbor to one more than are read, some random, some a copy of what follows; the same in every run."""
    rows = precompute_neighbors(world.windows, world.retriever, num_neighbors=6)
    collator = FitCollator(0, world.datastore, num_neighbors=2, seed=0)
    counts, copies = set(), 0
    for first in range(0, 80, 4):
        examples = [rows[place % len(rows)] for place in range(first, first + 4)]
        batch = collator(examples)
        counts.add(batch["neighbor_input_ids"].shape[2])
        for row, (ids, mask) in enumerate(
            zip(batch["neighbor_input_ids"], batch["neighbor_attention_mask"], strict=True)
        ):
            following = batch["input_ids"][row, CHUNK_SIZE : CHUNK_SIZE + 4].tolist()
            for neighbor, kept in zip(ids[0], mask[0], strict=True):
                text = neighbor[kept.bool()].tolist()
                copies += any(text[place : place + 4] == following for place in range(len(text)))
        again = collator(examples)
        assert all(torch.equal(batch[name], again[name]) for name in batch)
    assert counts == {1, 2, 3} and copies


def test_a_machine_that_is_too_small_is_told_beforehand(world, monkeypatch):
    """Too little time or memory is an error before the training, with what would do."""
    with pytest.raises(ValueError, match="--minutes") as told:
        small_fit(world, world.folder / "slow", steps=None, minutes=1e-4)
    assert str(plan.LEAST_STEPS) in str(told.value) and "parallel context" in str(told.value)
    monkeypatch.setattr(plan.extras, "load", lambda *_: FakeSystem())
    with pytest.raises(ValueError, match="0.0 GB are free"):
        small_fit(world, world.folder / "narrow")
    assert not (world.folder / "narrow").exists()


class FakeSystem:
    """In the place of psutil, on a machine without free memory."""

    available = 0

    def virtual_memory(self):
        return self


def test_a_folder_with_something_else_is_left_alone(world, fitted, tmp_path):
    """Neither a folder of others nor a fit with other settings is overwritten."""
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(FileExistsError, match="not empty"):
        small_fit(world, tmp_path)
    with pytest.raises(FileExistsError, match="seed=0"):
        small_fit(world, fitted.folder, seed=1)


def test_bad_input_is_explained(world):
    """Each says what to do."""
    with pytest.raises(DatasetError, match="Give more or longer texts"):
        small_fit(world, world.folder / "few", documents=DOCUMENTS[:4])
    with pytest.raises(ValueError, match="embedder"):
        small_fit(world, world.folder / "none", retriever=None)
    with pytest.raises(ValueError, match="steps is 0"):
        small_fit(world, world.folder / "zero", steps=0)
    with pytest.raises(ValueError, match="no RETRO adapter"):
        small_fit(world, world.folder / "new", backbone=world.base)
    chunks = world.datastore.num_chunks
    with pytest.raises(DatasetError, match=f"num_neighbors is {chunks}, .*has {chunks} chunks"):
        small_fit(world, world.folder / "few", num_neighbors=chunks)
    with pytest.raises(ValueError, match="fewer neighbors"):
        small_fit(world, world.folder / "many", num_neighbors=1 << 16, batch_size=10_000)


@pytest.mark.parametrize(
    ("name", "values"),
    [
        ("base", [None, 5, "", b"x"]),
        ("output", [None, 5, "", "a\0b", "\udc80"]),
        ("backbone", [5, ""]),
        ("retriever", ["store", 5, object()]),
        ("minutes", ["x", -1, 0, float("nan"), float("inf"), True, [1]]),
        ("steps", ["x", -1, 1.5, True, 10**12]),
        ("num_neighbors", [None, "x", 0, 1.5, 10**12]),
        ("num_heldout", [None, "x", 0, 1.5]),
        ("batch_size", ["x", 0, -1, 1.5, [2]]),
        ("learning_rate", ["x", 0, -1e-3, float("nan")]),
        ("seed", [None, "x", -1, 1.5, 1 << 32]),
    ],
)
def test_arguments_are_checked_before_anything_is_loaded(world, name, values):
    for value in values:
        arguments = {"base": world.base, "output": world.folder / "never", "embedder": world.embedder, name: value}
        with pytest.raises(ValueError, match=name):
            fit(texts=DOCUMENTS, **arguments)
    assert not (world.folder / "never").exists()


def test_an_output_that_is_a_file_is_explained(world, tmp_path):
    (tmp_path / "file").write_text("mine")
    for output in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(DatastoreWriteError, match="file"):
            small_fit(world, output)


@pytest.mark.parametrize("content", ["[]", "", "5", "[" * 100_000])
def test_a_damaged_state_is_explained(world, tmp_path, content):
    (tmp_path / "work").mkdir()
    (tmp_path / "work" / "state.json").write_text(content)
    with pytest.raises(DatasetError, match=r"state\.json"):
        small_fit(world, tmp_path)


def test_the_command_fits_and_prints_the_verdict(world, tmp_path):
    """`retro fit` is the function: the table is printed; a reader without weights is refused by name."""
    (tmp_path / "texts.jsonl").write_text(
        "\n".join(json.dumps({"id": one["id"], "text": one["text"]}) for one in DOCUMENTS)
    )
    options = [
        "--texts",
        tmp_path / "texts.jsonl",
        "--store",
        world.datastore.path,
        "--embedder",
        world.folder / "encoder",
    ]
    command = ["fit", world.base, *options, "--steps", 1, "--held-out", 2, "-o", tmp_path / "adapter"]
    printed = CliRunner().invoke(app, [str(part) for part in command], catch_exceptions=False).stdout
    assert "parallel context" in printed and "in the prompt" in printed
    untrained = tmp_path / "untrained"
    retrofit(world.base, reader="parallel_context", chunk_size=8, neighbor_size=16).save_pretrained(
        untrained, save_backbone=False
    )
    world.tokenizer.save_pretrained(untrained)
    with pytest.raises(ValueError, match="no weights to fit"):
        small_fit(world, tmp_path / "refused", base=untrained)


def test_a_search_that_cannot_leave_documents_out_is_refused(world):
    """Where texts that are held out lie in the store, the search must be one that a store without them can have."""

    class Searcher:
        metric = "own"

        def search(self, texts, num_neighbors, *, exclude_documents=None):
            return np.zeros((len(texts), num_neighbors)), np.zeros((len(texts), num_neighbors), dtype=np.int64)

    with pytest.raises(DatasetError, match="Leave those documents out"):
        small_fit(
            world,
            world.folder / "own-search",
            documents=corpus(),
            retriever=RetroRetriever(world.datastore, searcher=Searcher()),
        )
