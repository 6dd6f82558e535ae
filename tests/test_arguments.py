"""Arguments of the wrong kind: one rule for numbers, texts and places, and an error that names what was given."""

import dis
import os
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from datasets import Dataset
from transformers import EvalPrediction

from retro_hf import RetroConfig, RetroForCausalLM, RetroRetriever, retrofit
from retro_hf.arguments import flag, numbers, optional_text, path, real, shown, texts, whole
from retro_hf.datastore import (
    ChunkEmbedder,
    EmbeddingSearcher,
    HybridSearcher,
    IndexOptions,
    LexicalSearcher,
    RayExecutor,
    RetroDatastore,
    chunk_texts,
    near_duplicates,
    tokenizer_fingerprint,
)
from retro_hf.datastore.executors import RankExecutor, as_executor
from retro_hf.errors import RetroError
from retro_hf.evaluation import Evaluation, answer_metrics, bits_per_byte, evaluate, score_answers, trace, write_report
from retro_hf.passages import find_passages
from retro_hf.training import (
    QuestionCollator,
    RetroDataCollator,
    generate_answers,
    precompute_neighbors,
    start_by_copying,
    tokenize_documents,
    tokenize_questions,
)

from .tiny import random_ids, tiny_backbone
from .tiny_training import make_model, make_world


# Arrays have no truth value, and those without dimensions cannot be iterated over.
ARRAYS = [np.array(3), np.array([[1, 2]]), torch.tensor(3), torch.tensor([1, 2]), torch.tensor([[1.5]])]
# Python writes out no such integer; arrays of terabytes that take no memory as long as nobody reads them; and tensors without
# rows in memory.
LARGE = [10**5000, np.broadcast_to(np.int64(0), (1 << 8, 1 << 40)), torch.zeros(1, dtype=torch.long).expand(1 << 40)]
NOT_DENSE = [torch.eye(2).to_sparse(), torch.nested.nested_tensor([torch.tensor([3, 4]), torch.tensor([3])])]
_COMPARED = ("embedder", "dtype", "lexical", "retriever, num_neighbors", "executor", "backbone_name_or_path")
NESTED: list = []
for _ in range(3000):
    NESTED = [NESTED]


class Wrong(Exception):
    """Raised by the checks."""


STRANGE = [
    None,
    "x",
    b"x",
    1.5,
    float("nan"),
    object(),
    [None],
    ["x"],
    {"a": 1},
    {},
    np.array([1.5]),
    np.array(["a"]),
    [[1, 2], [3]],
]


@pytest.mark.parametrize("value", [*STRANGE, -1, True, np.float32(2), np.bool_(True), 10**20])
def test_a_whole_number_is_one(value):
    with pytest.raises(Wrong, match="count"):
        whole("count", value, Wrong, most=1 << 60)


@pytest.mark.parametrize("value", [3, np.int64(3), np.uint8(3)])
def test_numbers_of_numpy_count(value):
    found = whole("count", value, Wrong)
    assert found == 3 and type(found) is int
    with pytest.raises(Wrong, match="at least 4 and at most 5"):
        whole("count", value, Wrong, 4, 5)


@pytest.mark.parametrize("value", [*STRANGE[:3], *STRANGE[4:], True, -1, 4, np.float32(4), 10**400, float("inf")])
def test_a_real_number_is_one(value):
    with pytest.raises(Wrong, match="share"):
        real("share", value, Wrong, least=0, most=3)
    assert real("share", np.float32(3), Wrong, least=0, most=3) == real("share", 3, Wrong) == 3.0


@pytest.mark.parametrize("value", [*STRANGE, 0, 1, np.array([True]), torch.tensor(True), torch.tensor([True, False])])
def test_a_flag_is_true_or_false(value):
    with pytest.raises(Wrong, match="verify"):
        flag("verify", value, Wrong)
    assert flag("verify", True, Wrong) is True and flag("verify", np.bool_(False), Wrong) is False


@pytest.mark.parametrize("value", [None, 5, 1.5, b"x", [None], ["a", 5], [["a"]], np.array(5), object()])
def test_texts_are_texts(value):
    with pytest.raises(Wrong, match="Query [01] is of type"):
        texts("Query", value, Wrong)


def test_one_text_is_a_list_of_it():
    assert texts("Query", "ab", Wrong) == ["ab"]
    assert texts("Query", ("a", "b"), Wrong) == texts("Query", np.array(["a", "b"]), Wrong) == ["a", "b"]


@pytest.mark.parametrize("value", [None, "x", 1.5, [None], [[1, 2], [3]], np.array([1.5]), 6, -2, 10**20, True])
def test_numbers_in_a_range(value):
    with pytest.raises(Wrong, match="Ids"):
        numbers("Ids", value, Wrong, -1, 5)
    assert numbers("Ids", [[0, np.int32(5)]], Wrong, -1, 5).dtype == np.int64


def test_numbers_do_not_wrap_around():
    """2**64 - 1 would be -1 as int64: no neighbor at all."""
    with pytest.raises(Wrong, match="18446744073709551615"):
        numbers("Ids", np.array([2**64 - 1], dtype=np.uint64), Wrong, -1, 5)


@pytest.mark.parametrize("value", [*STRANGE, *ARRAYS, NESTED, "", "\udc80", "a\0b", b"store", "ab/\udcff"])
def test_a_path_is_one_that_every_library_can_open(value):
    value = 5 if isinstance(value, str) and value == "x" else value  # which is a path
    with pytest.raises(Wrong, match="output"):
        path("output", value, Wrong)


@pytest.mark.parametrize("value", [*STRANGE[2:], *ARRAYS, NESTED, "\udc80", b"main"])
def test_a_text_that_may_be_left_out(value):
    with pytest.raises(Wrong, match="revision"):
        optional_text("revision", value, Wrong)
    assert optional_text("revision", None, Wrong) is None
    assert optional_text("revision", "größer", Wrong) == "größer"


def test_messages_quote_whatever_was_given():
    """Quoting it must neither fail nor fill the screen."""
    itself: list = []
    itself.append(itself)
    for value in (NESTED, itself, "x" * 10_000, b"x" * 10_000, list(range(10_000)), 10**5000):
        assert len(shown(value)) <= 200


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    made = make_world(tmp_path_factory.mktemp("world"))
    rows = [{"question": "who reads?", "answers": ["the king"], "passages": ["the king reads"]}] * 2
    made.questions = tokenize_questions(Dataset.from_list(rows), made.tokenizer, neighbor_size=8)
    made.collator = QuestionCollator(made.tokenizer, chunk_size=8)
    return made


def calls(world, lexical):
    """Public functions of a datastore, of retrieval and of training, each with one argument that may be strange."""
    store, retriever, tokenizer = world.datastore, world.retriever, world.tokenizer
    dense = EmbeddingSearcher(store, world.embedder)
    hybrid = HybridSearcher(dense, lexical)
    ids = torch.zeros(1, 8, dtype=torch.long)
    collator = RetroDataCollator(tokenizer, store)
    return {
        "first_chunks": store.first_chunks,
        "document": store.document,
        "document_id": store.document_id,
        "document_number": store.document_number,
        "document_numbers": store.document_numbers,
        "restricted_to": store.restricted_to,
        "random_chunks": lambda value: store.random_chunks(value, (2,)),
        "random_chunks, shape": lambda value: store.random_chunks(np.random.default_rng(0), value),
        "search": lambda value: store.search(store.keys_of([0]), value),
        "delete": store.delete,
        "merge": lambda value: store.merge(value, "never"),
        "embed": world.embedder.embed,
        "embed, batch_size": lambda value: world.embedder.embed(["a"], batch_size=value),
        "embedder": lambda value: ChunkEmbedder.of(value) if value != "x" else whole("x", value, RetroError),
        "dtype": lambda value: ChunkEmbedder.from_pretrained(world.embedder.name_or_path, dtype=value or "x"),
        "LexicalSearcher": LexicalSearcher.build,
        "EmbeddingSearcher": lambda value: EmbeddingSearcher(value, world.embedder),
        "lexical": lambda value: lexical.search(value, 2) if value not in ("x", ["x"], {"a": 1}, {}) else store.document(value),
        "hybrid": lambda value: hybrid.search(["a"], value),
        "RetroRetriever": lambda value: RetroRetriever(value, embedder=world.embedder),
        "cache_size": lambda value: RetroRetriever(store, embedder=world.embedder, cache_size=value),
        "retriever": retriever,
        "retriever, num_neighbors": lambda value: retriever.search(ids, num_neighbors=value or "x"),
        "find_passages": lambda value: find_passages(value, ["a"], 1),
        "find_passages, num_passages": lambda value: find_passages(retriever, ["a"], value),
        "chunk_texts": lambda value: chunk_texts(tokenizer, value),
        "precompute_neighbors": lambda value: precompute_neighbors(world.windows, value),
        "tokenize_documents": lambda value: tokenize_documents(["a"], tokenizer, max_length=8, chunk_size=value),
        "tokenize_questions": lambda value: tokenize_questions(world.windows, tokenizer, neighbor_size=value),
        "collator": collator,
        "collator, row": lambda value: collator([{**world.dataset[0], "input_ids": value}]),
        "collator, neighbors": lambda value: collator([{**world.dataset[0], "neighbor_chunk_ids": value}]),
        "collator, labels": lambda value: collator([{**world.dataset[0], "labels": value}]),
        "cache_size, later": lambda value: setattr(RetroRetriever(store, embedder=world.embedder), "cache_size", value),
        "last_turns": lambda value: retriever.last_turns(value, value),
        "fraction": lambda value: store.subset("never", fraction=value),
        "seed": lambda value: store.subset("never", fraction=0.0, seed=value),
        "push_to_hub": store.push_to_hub,
        "timeout": lambda value: RankExecutor(0, 1, timeout=value),
        "executor": lambda value: as_executor(value if value != "x" else None),
        "add_bos": lambda value: tokenize_documents(["a"], tokenizer, max_length=8, chunk_size=8, add_bos=value),
        "with_answers": lambda value: tokenize_questions(
            world.questions, tokenizer, neighbor_size=8, with_answers=False if value is None else value
        ),
        "random_passages": lambda value: QuestionCollator(
            tokenizer, chunk_size=8, random_passage_probability=0.5, random_passages=value
        ),
        "random_passage_probability": lambda value: QuestionCollator(
            tokenizer, chunk_size=8, random_passage_probability=value
        ),
        "questions": world.collator,
        "questions, passages": lambda value: world.collator([{**world.questions[0], "passage_input_ids": value}]),
        "questions, passage": lambda value: world.collator([{**world.questions[0], "passage_input_ids": [value]}]),
        "generate_answers": lambda value: generate_answers(
            None, {**world.collator([world.questions[0]]), "input_ids": value}, tokenizer
        ),
        "answer_metrics": lambda value: answer_metrics(value, world.questions),
        "answer_metrics, dataset": lambda value: answer_metrics(tokenizer, value),
        "answer_metrics, prediction": answer_metrics(tokenizer, world.questions),
        "answer_metrics, labels": lambda value: answer_metrics(tokenizer, world.questions)(
            EvalPrediction(predictions=value, label_ids=value)
        ),
        "score_answers": lambda value: score_answers(["a"], value),
    } | calls_of_later_checks(world)  # fmt: skip


def calls_of_later_checks(world):
    """The same for arguments that may be left out: there None stands for a text."""
    store, retriever, tokenizer = world.datastore, world.retriever, world.tokenizer
    model = make_model()
    ids, keys = torch.zeros(1, 8, dtype=torch.long), store.keys_of([0])
    documents = ["the river falls over the bridge and opens near the old castle again"]
    later = RetroDataCollator(tokenizer, retriever)

    def given(value):
        return "x" if value is None else value

    def unless_text(value, other):
        return other if value is None or isinstance(value, (str, float)) else value

    def scored(**options):
        return bits_per_byte(model, documents, tokenizer, retriever=retriever, **options)

    def evaluated(**options):
        return evaluate(model, documents, tokenizer, retriever=retriever, **options)

    return {
        "exclude_documents": lambda value: store.search(keys, 1, exclude_documents=given(value)),
        "retriever, exclude_documents": lambda value: retriever.search(ids, exclude_documents=given(value)),
        "verify": lambda value: RetroDatastore.load(store.path, verify=value),
        "replace": lambda value: store.append(documents, embedder=world.embedder, replace=value),
        "private": lambda value: store.push_to_hub("a/b", private=given(value)),
        "token": lambda value: store.push_to_hub("a/b", token=unless_text(value, 5)),
        "revision": lambda value: RetroDatastore.from_pretrained("a/b", revision=unless_text(value, 5)),
        "exclude_near_duplicates": lambda value: precompute_neighbors(
            world.windows, retriever, exclude_near_duplicates=value
        ),
        "cache_dir": lambda value: precompute_neighbors(
            world.windows, retriever, cache_dir=unless_text(value, b"")
        ),
        "seed of a collator": lambda value: RetroDataCollator(tokenizer, store, seed=value),
        "seed of questions": lambda value: QuestionCollator(tokenizer, chunk_size=8, seed=value),
        "num_workers": lambda value: RayExecutor(given(value)),
        "num_cpus_per_worker": lambda value: RayExecutor(num_cpus_per_worker=value),
        "num_gpus_per_worker": lambda value: RayExecutor(num_gpus_per_worker=value),
        "prompt": lambda value: ChunkEmbedder(world.embedder.name_or_path, prompt=unless_text(value, 5)),
        "window_start": lambda value: later([world.dataset[0] | {"window_start": value}]),
        "document_id": lambda value: later([world.dataset[0] | {"document_id": unless_text(value, 1.5)}]),
        "chunk ids": lambda value: scored(neighbor_chunk_ids=given(value)),
        "chunk ids of a document": lambda value: scored(neighbor_chunk_ids=[value]),
        "chunk ids of a chunk": lambda value: scored(neighbor_chunk_ids=[[value]]),
        "num_resamples": lambda value: scored(num_resamples=10**12 if value is None else value),
        "num_neighbors_sweep": lambda value: evaluated(num_neighbors_sweep=[10**12 if value is None else value]),
        "output": lambda value: evaluated(output=unless_text(value, "\udc80")),
        "text of a trace": lambda value: trace(model, {"text": unless_text(value, 5)}, tokenizer, retriever=retriever),
        "title of a trace": lambda value: trace(
            model, {"text": documents[0], "title": unless_text(value, 5)}, tokenizer, retriever=retriever
        ),
        "id of a trace": lambda value: trace(
            model, {"text": documents[0], "id": unless_text(value, 1.5)}, tokenizer, retriever=retriever
        ),
        "report": lambda value: write_report(value, "never"),
        "shard_chunks": lambda value: store.compact(shard_chunks=value),
        "documents": lambda value: store.compare(value if isinstance(value, torch.Tensor) else 5),
        "recall": lambda value: IndexOptions(recall=value),
        "memory_budget": lambda value: IndexOptions(memory_budget=given(value)),
        "query_encoder": lambda value: ChunkEmbedder(world.embedder.name_or_path, query_encoder=given(value)),
        "embedder of a manifest": ChunkEmbedder.of_datastore,
        "name of an embedder": lambda value: ChunkEmbedder.of_datastore(store.manifest.embedder, given(value)),
        "near_duplicates": lambda value: near_duplicates(value, store),
        "threshold": lambda value: near_duplicates(["a"], store, threshold=value),
        "fingerprint": lambda value: tokenizer_fingerprint(tokenizer, unless_text(value, 5)),
        "index": lambda value: EmbeddingSearcher(store, world.embedder, given(value)),
        "searchers": lambda value: HybridSearcher(value, value),
        "over": EmbeddingSearcher(store, world.embedder).over,
        "address": lambda value: RayExecutor(address=unless_text(value, 5)),
        "evaluation": lambda value: Evaluation.load(unless_text(value, 5)),
    }  # fmt: skip


def is_raised_by_us(error):
    """By a `raise` in our code, not by a message that cannot quote what was given."""
    traced = error.__traceback__
    while traced.tb_next:
        traced = traced.tb_next
    code = traced.tb_frame.f_code
    raises = code.co_code[traced.tb_lasti] == dis.opmap["RAISE_VARARGS"]
    return raises and "/retro_hf/" in code.co_filename


def test_public_functions_explain_strange_arguments(world):
    """Whatever is passed, the error is ours: a RetroError, or a ValueError that a check of ours has raised."""
    assert_explained(calls(world, LexicalSearcher.build(world.datastore)))


def calls_of_models(folder):
    """What makes, loads, changes and uploads a model, and shows its evaluation, each with one argument that may be strange."""
    base, adapter = folder / "base", folder / "adapter"
    tiny_backbone("llama").save_pretrained(base)
    model = retrofit(base, chunk_size=4, cross_attention_layers=[1])
    model.save_pretrained(adapter, save_backbone=False)

    def unless(value, *kinds):
        return 5 if isinstance(value, (type(None), *kinds)) else value

    def loaded(**options):
        return RetroForCausalLM.from_pretrained(adapter, **{"backbone_name_or_path": base, **options})

    class Retriever:
        def __init__(self, size):
            self.chunk_size = size

        def __call__(self, ids, mask):
            return self.chunk_size, None

    return {
        "revision": lambda value: retrofit(base, revision=unless(value, str)),
        "base_kwargs": lambda value: retrofit(base, base_kwargs=unless(value, dict)),
        "base_kwargs of a model": lambda value: retrofit(model.model.backbone, base_kwargs=unless(value)),
        "chunk_size of a retriever": lambda value: model.set_retriever(Retriever(unless(value))),
        "answer of a retriever": lambda value: model(random_ids(1, 9), retriever=lambda ids, mask: (value, None)),
        "backbone_name_or_path": lambda value: loaded(backbone_name_or_path=unless(value, str)),
        "config": lambda value: loaded(config=unless(value, str)),
        "reader": lambda value: loaded(reader=unless(value)),
        "folder to save in": lambda value: model.save_pretrained(unless(value, str)),
        "input_ids": lambda value: start_by_copying(model, value),
        "repo_id": lambda value: model.push_to_hub(unless(value, str)),
        "evaluation": lambda value: model.push_to_hub("org/name", evaluation=unless(value)),
        "a field of the backbone": lambda value: RetroConfig(vocab_size=value),
        "id2label": lambda value: RetroConfig(id2label=unless(value, dict)),
        "num_labels": lambda value: RetroConfig(num_labels=-1 if value is None else value),
        "traces": lambda value: write_report(SimpleNamespace(verdict=None), folder / "report", traces=value),
    }


def test_models_explain_strange_arguments(tmp_path):
    assert_explained(calls_of_models(tmp_path))


def test_what_would_be_left_out_or_wait_is_refused(tmp_path):
    """Arguments that nothing reads, sizes that nobody checks, and a pipe, which is read until somebody writes."""
    model = retrofit(tiny_backbone("llama"), chunk_size=4, cross_attention_layers=[1])
    with pytest.raises(ValueError, match="loaded already"):
        retrofit(model.model.backbone, base_kwargs={"dtype": "bfloat16"})
    model.config.save_pretrained(tmp_path)
    for name in ("chunk_size", "num_neighbors", "neighbor_size"):
        with pytest.raises(ValueError, match=f"`{name}` must be at least 1, got -1"):
            RetroConfig.from_pretrained(tmp_path, **{name: -1})
    with pytest.raises(ValueError, match="folder of the model"):
        model.save_pretrained("a\0b")
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(ValueError, match="holds no evaluation"):
        model.push_to_hub("org/name", evaluation=tmp_path / "pipe")
    with pytest.raises(ValueError, match="attention_mask"):
        model(random_ids(1, 4), attention_mask={"full_attention": 1})


def assert_explained(calls):
    """The error of each call with each strange value is a RetroError, or a ValueError that a check of ours has raised."""
    raw = []
    for name, call in calls.items():
        for value in [*STRANGE, *LARGE[:1], NESTED, *([] if name in _COMPARED else ARRAYS + LARGE[1:] + NOT_DENSE)]:
            try:
                call(value)
            except Exception as error:
                is_ours = isinstance(error, ValueError) and is_raised_by_us(error)
                if not isinstance(error, RetroError) and not is_ours:
                    raw.append((name, shown(value), repr(error)))
    assert raw == []


@pytest.mark.parametrize("token", [-1, 1 << 62])
def test_ids_that_no_tokenizer_knows(world, token):
    with pytest.raises(RetroError, match=f"token id.*{token}"):
        chunk_texts(world.tokenizer, np.array([[3, token]]))
    assert chunk_texts(world.tokenizer, np.array([[3, token]]), np.array([[1, 0]]))
    with pytest.raises(RetroError, match=f"token id.*{token}"):
        world.retriever(torch.tensor([[3] * 7 + [token]]))


@pytest.mark.parametrize("field", [10**5000, NESTED, {1: 1, "a": 2}], ids=["digits", "deep", "keys"])
def test_fields_that_no_store_can_keep(world, field):
    """They are refused with the document's number before anything is embedded, and not when they are read again."""
    for fields in ({"more": field}, {"id": field}):
        with pytest.raises(RetroError, match="(fields 'more' of|id of) [dD]ocument 0"):
            RetroDatastore.from_texts(
                [{"text": "the river"} | fields],
                world.tokenizer,
                embedder=world.embedder,
                chunk_size=8,
                neighbor_size=16,
            )
