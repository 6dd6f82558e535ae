"""Documents of every kind become the same windows, with the ids of a datastore, and begin and end as text does."""

import copy
import json
import math

import numpy as np
import pytest
from datasets import Dataset, DatasetDict, IterableDataset, IterableDatasetDict
from datastore.fixtures import corpus
from tiny_training import make_model
from tokenizers import processors

from retro_hf import RetroDatastore
from retro_hf.datastore.bos_eos import Borders
from retro_hf.errors import DatasetError, DatastoreInputError
from retro_hf.evaluation import bits_per_byte
from retro_hf.evaluation.scoring import read_documents
from retro_hf.training import tokenize_documents


SIZES = {"max_length": 16, "chunk_size": 8}
ROWS = [{"id": one["id"], "text": one["text"]} for one in corpus(6, seed=3)]


def windows_of(documents, world, **options):
    rows = list(tokenize_documents(documents, world.tokenizer, **SIZES, **options))
    return [(row["input_ids"], row["document_id"], row["window_start"]) for row in rows]


@pytest.fixture(scope="module")
def bos_tokenizer(world):
    """The same tokenizer, which puts the begin token before a prompt, as those of Llama do."""
    tokenizer = copy.deepcopy(world.tokenizer)
    tokenizer.bos_token = tokenizer.eos_token
    begin = (tokenizer.bos_token, tokenizer.bos_token_id)
    template = processors.TemplateProcessing(single=f"{begin[0]} $A", special_tokens=[begin])
    tokenizer.backend_tokenizer.post_processor = template
    assert tokenizer("the king").input_ids[0] == tokenizer.bos_token_id
    return tokenizer


@pytest.mark.parametrize("kind", ["list", "generator", "stream", "arrow", "numpy", "jsonl", "folder", "pandas"])
def test_every_input_gives_the_same_windows(kind, world, tmp_path):
    dataset = Dataset.from_list(ROWS)
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, ROWS)))
    documents = {
        "list": ROWS,
        "generator": iter(ROWS),
        "stream": dataset.to_iterable_dataset(),
        "arrow": dataset.with_format("arrow"),
        "numpy": dataset.with_format("numpy"),
        "pandas": dataset.to_pandas().to_dict("records"),
        "jsonl": str(tmp_path / "rows.jsonl"),
        "folder": tmp_path,
    }[kind]
    expected = windows_of(dataset, world)
    assert len(expected) > 10
    assert windows_of(documents, world) == expected


def test_splits_stay_splits_and_streams_stay_streams(world):
    dataset = Dataset.from_list(ROWS)
    found = tokenize_documents(DatasetDict(train=dataset, test=dataset.select([0])), world.tokenizer, **SIZES)
    assert isinstance(found, DatasetDict) and list(found) == ["train", "test"]
    assert set(found["test"]["document_id"]) == {ROWS[0]["id"]}
    splits = IterableDatasetDict({"train": dataset.to_iterable_dataset()})
    assert isinstance(tokenize_documents(splits, world.tokenizer, **SIZES), IterableDatasetDict)

    def endless():
        while True:
            yield from ROWS

    stream = tokenize_documents(IterableDataset.from_generator(endless), world.tokenizer, **SIZES)
    assert isinstance(stream, IterableDataset)
    assert next(iter(stream))["document_id"] == ROWS[0]["id"]


@pytest.mark.parametrize("as_dataset", [False, True])
def test_ids_are_those_of_a_datastore_of_the_same_documents(as_dataset, world):
    """Also where they are missing, numbers, or gaps, and where documents have no text."""
    texts = [row["text"] for row in ROWS]
    rows = [{"id": id, "text": text} for id, text in zip([None, "x", None, "", "y", None], texts, strict=True)]
    rows.insert(2, {"id": "empty", "text": None})
    others = [
        [{"text": text} for text in texts],
        [{"id": float(n), "text": text} for n, text in enumerate(texts)],
        rows,
    ]
    for documents in others:
        documents = Dataset.from_list(documents) if as_dataset else documents
        store = RetroDatastore.from_texts(documents, world.tokenizer, embedder=world.embedder, chunk_size=8)
        known = {store.document(number)["id"] for number in range(store.num_documents)}
        assert {id for _, id, _ in windows_of(documents, world)} == known


def test_missing_value_of_pandas_is_not_text(world):
    assert {id for _, id, _ in windows_of([{"text": "the king"}, {"text": math.nan}, "a clock"], world)} == {"0", "2"}


def test_file_is_split_and_decoded(world, tmp_path):
    (tmp_path / "a.txt").write_bytes("the king reads.\n\na café opens.".encode("cp1252"))
    found = windows_of(tmp_path, world, encoding="cp1252", split="paragraph")
    assert [id for _, id, _ in found] == ["a.txt:1", "a.txt:3"]
    with pytest.raises(DatastoreInputError):
        windows_of([{"text": 3}], world)


def test_document_ends_with_the_end_of_text(world, bos_tokenizer):
    """By default, so that a model learns to end; begun as the tokenizer begins a prompt."""
    (text,) = world.tokenizer([ROWS[0]["text"]], add_special_tokens=False)["input_ids"]
    eos = world.tokenizer.eos_token_id

    def joined(tokenizer, **options):
        rows = tokenize_documents(ROWS[:1], tokenizer, **SIZES, **options)
        lengths = [len(row["input_ids"]) for row in rows]
        assert set(lengths[:-1]) <= {16}
        return [token for row in rows for token in row["input_ids"]], list(rows["window_start"])

    assert joined(world.tokenizer)[0] == [*text, eos][: len(joined(world.tokenizer)[0])]
    assert eos not in joined(world.tokenizer, add_eos=False)[0]
    tokens, starts = joined(bos_tokenizer)
    assert tokens[0] == bos_tokenizer.bos_token_id and tokens[1:20] == text[:19] and starts[:2] == [0, 15]
    assert joined(bos_tokenizer, add_bos=False, add_eos=False) == joined(world.tokenizer, add_eos=False)
    plain = type(world.tokenizer)(tokenizer_object=world.tokenizer.backend_tokenizer)
    assert len(tokenize_documents(["the king"], plain, **SIZES, add_bos=False)) == 1
    for option in ("add_bos", "add_eos"):
        with pytest.raises(DatasetError, match=option):
            tokenize_documents(["the king"], plain, **SIZES, **{option: True})


def test_evaluation_reads_the_begin_and_scores_the_end_if_asked(world, bos_tokenizer):
    """After a begin token the first word is predicted, too; an end token has no bytes."""
    text = "the king reads seven letters"
    (plain,) = read_documents([text], world.tokenizer)
    (both,) = read_documents([text], bos_tokenizer, Borders.of(bos_tokenizer, None, True))
    assert both.input_ids.tolist() == [bos_tokenizer.bos_token_id, *plain.input_ids, bos_tokenizer.eos_token_id]
    assert both.num_bytes == len(text) and both.num_scored == len(plain.input_ids) + 1
    assert both.token_texts[0] == both.token_texts[-1] == "" and "".join(both.token_texts) == text
    assert np.diff(both.byte_ends).min() >= 0
    found = bits_per_byte(make_model(), [text], bos_tokenizer, modes=("off",), window=32, num_resamples=10)
    assert found.num_bytes.tolist() == [len(text)]
