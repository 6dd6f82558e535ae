"""Rows that come and go: each is written as it would be alone, whatever the model keeps of its past."""

from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from server.serving import make_parts
from tiny import randomize, tiny_backbone
from transformers import AutoModelForCausalLM

from retro_hf import RetroRetriever, retrofit
from retro_hf_server import batches
from retro_hf_server.batches import Batch, grouped, regrouped
from retro_hf_server.jobs import Job, Sampling
from retro_hf_server.readers import ChunkRead, Prompt, reader_for
from retro_hf_server.rows import Row
from retro_hf_server.source import Source

from ..zoo import tiny_config


TEXTS = ["a king", "the river runs over the old castle and the quiet baker sings", "golden", "the old lighthouse"]
LENGTHS = [12, 3, 17, 9]


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A tokenizer and a store."""
    return make_parts(tmp_path_factory.mktemp("batches"))


def make_model(base, reader):
    """A RETRO of every weight at random."""
    sizes = {"chunk_size": 8, "neighbor_size": 16, "num_neighbors": 2}
    if reader == "parallel_context":
        return retrofit(base, reader=reader, **sizes).eval()
    model = retrofit(base, cross_attention_layers=[1, 3], **sizes)
    randomize(model.model.retro)
    return model.eval()


class Written(list):
    """Rows over the store, and what was told of each."""

    def __init__(self, world, model, retriever):
        super().__init__()
        source = None if retriever is None else Source(retriever, world.tokenizer, 8)
        self.told = []
        for seed, (text, length) in enumerate(zip(TEXTS, LENGTHS, strict=True)):
            prompt, events = Prompt(world.tokenizer(text).input_ids), []
            sampling = Sampling(length, temperature=1.0, seed=seed)
            reader = None
            if source is not None:
                reader = reader_for(source, model, prompt, world.tokenizer, length)
            self.append(Row(Job(prompt, sampling, events.append), world.tokenizer, reader))
            self.told.append(events)

    def reads(self):
        """What was read for which tokens of each row."""
        return [
            [(one.query, one.first_token, one.is_read, one.passages) for one in told if isinstance(one, ChunkRead)]
            for told in self.told
        ]


def run(model, running, num_tokens):
    """Some tokens more, or fewer if a row ends."""
    for batch in running:
        steps = iter(range(1, num_tokens))
        batch.run(model, set(), lambda steps=steps: next(steps, None) is None)


def alone(model, rows):
    """Each row to its end."""
    for row in rows:
        running = [Batch.of(model, [row], set())]
        while running := regrouped(running):
            run(model, running, 100)


def check_come_and_go(world, model, retriever):
    """Rows enter one by one, and leave when they have ended."""
    expected, found = Written(world, model, retriever), Written(world, model, retriever)
    alone(model, expected)
    running, entering = [], list(found)
    while entering or running:
        if entering:
            running.append(Batch.of(model, [entering.pop(0)], set()))
        running = regrouped(running)
        assert len(running) <= 1
        for batch in running:  # what has left takes no memory
            assert batch.cache.get_seq_length() == max(len(row.tokens) for row in batch.rows) - 1
        run(model, running, 3)
    assert [row.tokens for row in found] == [row.tokens for row in expected]
    assert found.reads() == expected.reads()
    assert [len(row.tokens) - len(row.job.prompt.tokens) for row in found] == LENGTHS


@pytest.mark.parametrize(
    ("family", "reader"),
    [
        ("llama", "cross_attention"),
        ("llama", "parallel_context"),
        ("gemma2", "cross_attention"),
        pytest.param("gemma2", "parallel_context", marks=pytest.mark.slow),
    ],
)
def test_rows_that_come_and_go_are_written_as_each_alone(world, family, reader):
    """With retrieval; every other layer of Gemma 2 has a window, which has moved past the beginning of a long row."""
    model = make_model(tiny_backbone(family, vocab_size=400), reader)
    check_come_and_go(world, model, RetroRetriever(world.datastore, embedder=world.embedder))


@pytest.mark.slow
@pytest.mark.parametrize("family", ["gpt2", "bloom"])
def test_positions_of_every_kind_are_those_of_the_row_alone(world, family):
    """A table of them, and slopes."""
    model = make_model(tiny_backbone(family, vocab_size=400), "cross_attention")
    check_come_and_go(world, model, None)


@pytest.mark.parametrize("family", ["lfm2", pytest.param("falcon_h1", marks=pytest.mark.slow)])
def test_states_of_linear_attention_come_and_go_with_their_rows(world, family):
    """They have no columns, and no padding reaches them."""
    torch.manual_seed(0)
    base = AutoModelForCausalLM.from_config(tiny_config(family, vocab_size=400)).eval()
    model = make_model(base, "cross_attention")
    check_come_and_go(world, model, RetroRetriever(world.datastore, embedder=world.embedder))


def test_rows_whose_cache_cannot_be_divided_run_one_beside_the_other(world, monkeypatch):
    """Some families have layers of their own in their caches."""
    monkeypatch.setattr(batches, "is_divisible", lambda _: False)
    model = make_model(tiny_backbone("llama", vocab_size=400), "cross_attention")
    expected, found = Written(world, model, None), Written(world, model, None)
    alone(model, expected)
    running = [Batch.of(model, [row], set()) for row in found]
    while running := regrouped(running):
        assert all(len(batch.rows) == 1 for batch in running)
        run(model, running, 3)
    assert [row.tokens for row in found] == [row.tokens for row in expected]


def test_what_the_generation_config_asks_for_holds_for_each_row_alone(world):
    """Its counts begin with the row, and its penalties see no padding."""
    model = make_model(tiny_backbone("llama", vocab_size=400), "cross_attention")
    model.generation_config.repetition_penalty = 1.7
    model.generation_config.no_repeat_ngram_size = 2
    model.generation_config.min_new_tokens = 3
    check_come_and_go(world, model, None)


@pytest.mark.parametrize(
    ("family", "reader"),
    [
        ("llama", "cross_attention"),
        ("llama", "parallel_context"),
        ("gpt2", "cross_attention"),
        ("lfm2", "cross_attention"),
    ],
)
def test_prompts_that_are_computed_together_are_answered_as_each_alone(world, family, reader):
    """With padding before the shorter ones, and chunks that begin at different places."""
    torch.manual_seed(0)
    base = AutoModelForCausalLM.from_config(tiny_config(family, vocab_size=400)).eval()
    model, retriever = make_model(base, reader), RetroRetriever(world.datastore, embedder=world.embedder)
    expected, found = Written(world, model, retriever), Written(world, model, retriever)
    alone(model, expected)
    running = [Batch.of(model, list(found), set())]
    assert running[0].takes_others
    while running := regrouped(running):
        run(model, running, 100)
    assert [row.tokens for row in found] == [row.tokens for row in expected]
    assert found.reads() == expected.reads()


@given(
    lengths=st.lists(st.integers(1, 3000), max_size=20), sizes=st.lists(st.sampled_from([None, 16, 32]), min_size=20)
)
def test_groups_of_prompts_have_every_row_once_and_little_padding(lengths, sizes):
    """Rows with and without retrieval are apart, and so are short prompts and long ones."""
    rows = [
        SimpleNamespace(tokens=[0] * length, neighbor_size=size) for length, size in zip(lengths, sizes, strict=False)
    ]
    groups = grouped(rows)
    assert sorted(id(row) for group in groups for row in group) == sorted(map(id, rows))
    for group in groups:
        longest, shortest = (f(len(row.tokens) for row in group) for f in (max, min))
        assert longest <= 2 * shortest
        assert len(group) == 1 or longest * len(group) <= 2048
        assert len({row.neighbor_size for row in group}) == 1


def test_prompts_are_not_computed_together_if_the_generation_config_counts_from_their_end(world):
    """Nor if a row could not leave the others' cache."""
    model = make_model(tiny_backbone("llama", vocab_size=400), "cross_attention")
    assert Batch.of(model, [Written(world, model, None)[0]], set()).takes_others
    model.generation_config.min_new_tokens = 3
    model.generation_config.eos_token_id = 5
    assert not Batch.of(model, [Written(world, model, None)[0]], set()).takes_others
