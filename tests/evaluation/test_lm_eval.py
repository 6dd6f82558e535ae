"""RetroLM in the lm-evaluation-harness: its numbers are the model's own, and ours where both score the same."""

import copy
import json
import sys
from functools import partialmethod

import numpy as np
import pytest
import torch
from datastore.fixtures import corpus, make_tokenizer
from lm_eval import simple_evaluate
from lm_eval.api.instance import Instance
from lm_eval.tasks import TaskManager
from tiny import tiny_backbone
from tiny_training import CHUNK_SIZE, make_model

from retro_hf import RetroRetriever
from retro_hf.errors import DatastoreMismatchError, MissingExtraError
from retro_hf.evaluation import bits_per_byte, lm_eval
from retro_hf.evaluation.lm_eval import RetroLM


@pytest.fixture(scope="module")
def model():
    return make_model(scale=0.25)


@pytest.fixture(scope="module")
def texts() -> list[str]:
    """Of very different lengths, none of them in the datastore."""
    return [row["text"] for row in corpus(7, seed=5)]


@pytest.fixture(params=["on", "off"])
def retriever(request, world):
    return world.retriever if request.param == "on" else None


def harness(model, world, **options) -> RetroLM:
    return RetroLM(model, tokenizer=world.tokenizer, **{"batch_size": 4, **options})


def requests(kind: str, arguments: list[tuple]) -> list[Instance]:
    return [Instance(request_type=kind, doc={}, arguments=parts, idx=0) for parts in arguments]


def log_likelihood(model, ids: list[int], first: int, retriever) -> float:
    """By hand, one row at a time: of the tokens from `first` on."""
    with torch.no_grad():
        logits = model(torch.tensor([ids]), retriever=retriever, use_cache=False).logits[0].double().log_softmax(-1)
    return float(sum(logits[place - 1, ids[place]] for place in range(first, len(ids))))


def our_bits_per_byte(world, model, texts, retriever):
    """Ours, with the harness's separator before each text: the end-of-text token, where there is no begin-of-text token."""
    tokenizer = copy.deepcopy(world.tokenizer)
    tokenizer.bos_token = tokenizer.eos_token
    modes = ("off",) if retriever is None else ("on",)
    return bits_per_byte(model, texts, tokenizer, retriever=retriever, modes=modes, window=256, add_bos=True)


def test_rolling_log_likelihood_equals_bits_per_byte(world, model, texts, retriever):
    """The harness reads a separator before the text, and scores the text's first token, too: so told, so do we."""
    lm = harness(model, world, retriever=retriever)
    scores = lm.loglikelihood_rolling(requests("loglikelihood_rolling", [(text,) for text in texts]))
    mode = "off" if retriever is None else "on"
    ours = our_bits_per_byte(world, model, texts, retriever)
    np.testing.assert_allclose(scores, -ours.nats[mode], rtol=1e-5)
    assert ours.num_bytes.tolist() == [len(text.encode()) for text in texts]


def write_task(folder, texts):
    """Write JSONL, and YAML that makes the task "local_texts" of it."""
    (folder / "texts.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    (folder / "local.yaml").write_text(
        f"""
task: local_texts
dataset_path: json
dataset_kwargs: {{data_files: {{test: {folder}/texts.jsonl}}}}
test_split: test
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{{{text}}}}"
metric_list: [{{metric: bits_per_byte}}]
"""
    )


def test_task_from_a_local_file_reports_the_same_bits_per_byte(world, model, texts, retriever, tmp_path):
    """What a person runs: JSONL and YAML in a folder, the task by its name."""
    write_task(tmp_path, texts)
    lm = harness(model, world, retriever=retriever)
    tasks = TaskManager(include_path=tmp_path, include_defaults=False)
    found = simple_evaluate(lm, tasks=["local_texts"], task_manager=tasks, bootstrap_iters=0)
    mode = "off" if retriever is None else "on"
    ours = our_bits_per_byte(world, model, texts, retriever)
    assert found["results"]["local_texts"]["bits_per_byte,none"] == pytest.approx(ours.bits_per_byte[mode], rel=1e-5)


def test_the_command_knows_the_model_and_its_datastore(world, model, texts, tmp_path, monkeypatch, capsys):
    """As docs/lm_eval.md has it, but for the harness's own tasks, whose 10,000 files take it 15 seconds to read."""
    write_task(tmp_path, texts)
    model.save_pretrained(tmp_path / "model")
    world.tokenizer.save_pretrained(tmp_path / "model")
    monkeypatch.setattr(TaskManager, "__init__", partialmethod(TaskManager.__init__, include_defaults=False))
    encoder = world.datastore.path.parent / "encoder"
    given = f"pretrained={tmp_path}/model,dtype=float32,datastore={world.datastore.path},embedder={encoder}"
    command = (
        f"lm-eval run --model retro --tasks local_texts --include_path {tmp_path} --device cpu --model_args {given}"
    )
    monkeypatch.setattr(sys, "argv", command.split())
    lm_eval.main()
    (row,) = (line for line in capsys.readouterr().out.splitlines() if "local_texts" in line)
    mine = our_bits_per_byte(world, model, texts, world.retriever)
    assert float(row.split("|")[7]) == pytest.approx(mine.bits_per_byte["on"], abs=1e-3)


def test_retrieval_changes_the_score(world, model, texts):
    """So that the tests of ON can fail."""
    asked = requests("loglikelihood_rolling", [(text,) for text in texts])
    on = harness(model, world, retriever=world.retriever).loglikelihood_rolling(asked)
    off = harness(model, world).loglikelihood_rolling(asked)
    long = [len(world.tokenizer(text)["input_ids"]) > 2 * CHUNK_SIZE for text in texts]
    assert sum(long) > 3
    assert all(abs(a - b) > 1e-3 for a, b, is_long in zip(on, off, long, strict=True) if is_long)


def test_long_text_is_read_in_the_harness_windows(world, model, texts):
    """Windows that don't overlap and each begin the chunks anew: other numbers than ours, computed here by hand."""
    text, length = max(texts, key=len), 32
    lm = harness(model, world, retriever=world.retriever, max_length=length)
    (score,) = lm.loglikelihood_rolling(requests("loglikelihood_rolling", [(text,)]))
    ids = [world.tokenizer.eos_token_id, *world.tokenizer(text)["input_ids"]]
    assert len(ids) > 2 * length
    total, scored = 0.0, 1
    while scored < len(ids):
        end = min(scored + length, len(ids))
        # The last window reaches back to be as long as the others.
        row = ids[max(0, end - length - 1) : end]
        total += log_likelihood(model, row, len(row) - (end - scored), world.retriever)
        scored = end
    assert score == pytest.approx(total, rel=1e-5)


def test_choices_in_a_batch_score_as_alone(world, model, texts, retriever):
    """Rows of all lengths in one batch, padded by the harness without a mask: each as if it were alone."""
    pairs = [
        (text[: len(text) * part // 4].rstrip(), end)
        for text in texts
        for part in (1, 3)
        for end in (" the river runs.", " a golden clock sings today because.")
    ]
    lm = harness(model, world, retriever=retriever, batch_size=8)
    found = lm.loglikelihood(requests("loglikelihood", pairs))
    for (context, end), (score, _) in zip(pairs, found, strict=True):
        ids = world.tokenizer(context + end)["input_ids"]
        first = len(world.tokenizer(context)["input_ids"])
        assert score == pytest.approx(log_likelihood(model, ids, first, retriever), rel=1e-4)


def test_generation_equals_the_model(world, model, texts, retriever):
    """Prompts of different lengths, padded on the left."""
    prompts = [text[: 15 + 20 * place] for place, text in enumerate(texts[:3])]
    settings = {"until": ["<never>"], "max_gen_toks": 12, "do_sample": False}
    lm = harness(model, world, retriever=retriever)
    found = lm.generate_until(requests("generate_until", [(prompt, dict(settings)) for prompt in prompts]))
    for prompt, text in zip(prompts, found, strict=True):
        inputs = world.tokenizer(prompt, return_tensors="pt")
        output = model.generate(**inputs, retriever=retriever, max_new_tokens=12, do_sample=False, pad_token_id=0)
        expected = output[0, inputs.input_ids.shape[1] :]
        assert text == world.tokenizer.decode(expected, skip_special_tokens=True)


def test_context_shorter_than_a_chunk_reads_nothing(world, model):
    """What the documentation warns of: below one chunk, ON is OFF."""
    pair = ("the river", " runs")
    assert len(world.tokenizer("".join(pair))["input_ids"]) <= CHUNK_SIZE
    on, off = (
        harness(model, world, retriever=source).loglikelihood(requests("loglikelihood", [pair]))
        for source in (world.retriever, None)
    )
    assert on == off


def test_folders_and_strings_work_as_arguments(world, model, texts, tmp_path):
    """Strings for everything, and numbers as numbers."""
    model.save_pretrained(tmp_path / "model")
    world.tokenizer.save_pretrained(tmp_path / "model")
    embedder = world.embedder.name_or_path
    named = {"datastore": str(world.datastore.path), "embedder": str(embedder), "num_neighbors": 1}
    lm = RetroLM(str(tmp_path / "model"), device="cpu", dtype="float32", batch_size=2, **named)
    assert lm.retriever.num_neighbors == 1
    asked = requests("loglikelihood_rolling", [(text,) for text in texts[:3]])
    retriever = RetroRetriever.from_pretrained(world.datastore.path, embedder=str(embedder), num_neighbors=1)
    expected = harness(model, world, retriever=retriever).loglikelihood_rolling(asked)
    np.testing.assert_allclose(lm.loglikelihood_rolling(asked), expected, rtol=1e-5)


def test_attached_retriever_is_neither_used_nor_lost(world, texts):
    """OFF is off."""
    model = make_model(scale=0.25)
    asked = requests("loglikelihood_rolling", [(texts[0],)])
    expected = harness(model, world).loglikelihood_rolling(asked)
    model.set_retriever(world.retriever)
    assert harness(model, world).loglikelihood_rolling(asked) == expected
    assert model.retriever is world.retriever


def test_model_without_retrieval_is_an_error(world):
    with pytest.raises(ValueError, match="--model hf"):
        harness(tiny_backbone("gpt2", vocab_size=400), world)


def test_two_sources_of_neighbors_are_an_error(world, model):
    with pytest.raises(ValueError):
        harness(model, world, retriever=world.retriever, datastore=str(world.datastore.path))


def test_datastore_of_another_tokenizer_is_an_error(world, model):
    other = make_tokenizer(vocab_size=300)
    with pytest.raises(DatastoreMismatchError):
        RetroLM(model, tokenizer=other, datastore=str(world.datastore.path), embedder=world.embedder)


def test_missing_package_is_an_error_that_names_the_extra(monkeypatch):
    """`pip install "retro-hf[lm-eval]"`."""
    monkeypatch.delitem(sys.modules, "retro_hf.evaluation.lm_eval")
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    with pytest.raises(MissingExtraError, match=r'pip install "retro-hf\[lm-eval\]"'):
        import retro_hf.evaluation.lm_eval  # noqa: F401
