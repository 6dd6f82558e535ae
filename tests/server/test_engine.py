"""The engine: batches whose rows do not know each other, stop words, ends, and what was read for which tokens."""

import contextlib
import queue
import threading
import time

import pytest
import torch
from server.serving import make_parts
from tiny import tiny_backbone

from retro_hf import RetroDatastore, RetroRetriever, answer, retrofit
from retro_hf.passages import find_passages
from retro_hf_server import readers
from retro_hf_server.batches import Batch
from retro_hf_server.engine import Engine
from retro_hf_server.jobs import Delta, Failed, Finished, Job, QueueFullError, Sampling, StoppedError
from retro_hf_server.prompts import Prompts
from retro_hf_server.readers import ChunkRead, Prompt
from retro_hf_server.rows import Row
from retro_hf_server.source import Source
from retro_hf_server.text import TextStream


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A tiny model and its store."""
    folder = tmp_path_factory.mktemp("engine")
    made = make_parts(folder)
    made.folder = folder
    return made


@pytest.fixture
def engine(world):
    """An engine over the store."""
    retriever = RetroRetriever(RetroDatastore.load(world.folder / "store"), embedder=world.embedder)
    running = Engine(world.model, world.tokenizer, Source(retriever, world.tokenizer, world.model.config.chunk_size))
    yield running
    running.close()


@contextlib.contextmanager
def held(engine):
    """While this is open the engine does nothing, so that all that is asked waits together."""
    go = threading.Event()
    engine.call(go.wait)
    yield
    go.set()


class Asked:
    """A request and its events."""

    def __init__(
        self, engine, text, *, query=None, prompt=None, retrieve=True, deadline=float("inf"), at_end=None, **sampling
    ):
        self._events = queue.Queue()
        self._at_end = at_end
        settings = Sampling(**{"max_tokens": 20, **sampling})
        ids = engine.tokenizer(text).input_ids
        self.job = Job(prompt or Prompt(ids, query), settings, self._emit, retrieve, deadline)
        engine.submit(self.job)

    def _emit(self, event):
        self._events.put(event)
        if self._at_end is not None and isinstance(event, (Finished, Failed)):
            self._at_end()

    def result(self):
        """All events."""
        events = []
        while not (events and isinstance(events[-1], (Finished, Failed))):
            events.append(self._events.get(timeout=60))
        return events

    def text(self):
        """The text of the answer."""
        return "".join(event.text for event in self.result() if isinstance(event, Delta))


REQUESTS = [
    ("the river runs over the old castle", {}),
    ("a king", {"temperature": 1.0, "seed": 3}),
    ("the golden lighthouse", {"temperature": 0.8, "top_p": 0.9, "top_k": 50, "seed": 4, "max_tokens": 9}),
    ("a quiet baker", {"max_tokens": 30}),
]
QUESTIONS = [(text, {**options, "query": text}) for text, options in REQUESTS]


@pytest.mark.parametrize("requests", [REQUESTS, QUESTIONS], ids=["texts", "questions"])
def test_requests_of_different_settings_in_one_batch_are_answered_as_each_alone(engine, requests):
    """A row's draws come from its own generator, and its neighbors from its own chunks."""
    alone = [Asked(engine, text, **options).text() for text, options in requests]
    with held(engine):
        together = [Asked(engine, text, **options) for text, options in requests]
    assert [one.text() for one in together] == alone
    assert all(alone)


def test_a_greedy_answer_is_what_generate_writes(world, engine):
    """The engine adds nothing to generation with a retriever but the alignment of the prompt's end."""
    text = "the river runs over the old castle"
    ids = world.tokenizer(text, return_tensors="pt").input_ids
    offset = -ids.shape[1] % world.model.config.chunk_size
    options = {"do_sample": False, "max_new_tokens": 20, "retriever": engine.source.retriever, "chunk_offset": offset}
    expected = world.model.generate(ids, **options)[0, ids.shape[1] :]
    assert Asked(engine, text).text() == world.tokenizer.decode(expected, skip_special_tokens=True)


def test_without_retrieval_an_answer_is_that_of_the_backbone(world, engine):
    """Off is off."""
    ids = world.tokenizer("a king", return_tensors="pt").input_ids
    expected = world.model.model.backbone.generate(ids, do_sample=False, max_new_tokens=20)[0, ids.shape[1] :]
    assert Asked(engine, "a king", retrieve=False).text() == world.tokenizer.decode(expected)


def test_every_chunk_tells_which_tokens_were_written_while_its_passages_were_read(world, engine):
    """The prompt ends a chunk, so passages change every `chunk_size` tokens of the answer from its first token on."""
    reads = [one for one in Asked(engine, "the river runs over the old castle").result() if isinstance(one, ChunkRead)]
    size = world.model.config.chunk_size
    answered = [one for one in reads if one.is_read]
    assert [one.first_token for one in answered] == [0, size, 2 * size]
    assert all(len(one.passages) == 2 and one.passages[0]["document_id"] for one in reads)


def test_a_question_is_looked_up_once_and_its_passages_are_read_to_the_end(engine):
    """In a chat that is the last turn of the user, not the marks that open the answer."""
    text = "golden lighthouse"
    (read,) = [one for one in Asked(engine, "a king", query=text).result() if isinstance(one, ChunkRead)]
    assert (read.query, read.first_token, read.is_read) == (text, 0, True)
    (found,) = find_passages(engine.source.retriever, [text], 2)
    assert [one["text"] for one in read.passages] == [one.text for one in found]


def test_an_answer_to_a_question_is_that_of_answer(world, engine):
    """The server and Python say the same."""
    base = retrofit(tiny_backbone("llama", vocab_size=400), reader="parallel_context", chunk_size=8, neighbor_size=16)
    retriever = RetroRetriever(world.datastore, embedder=world.embedder, tokenizer=world.tokenizer)
    messages = [{"role": "system", "content": "be brief"}, {"role": "user", "content": "golden lighthouse"}]
    expected = answer(base, retriever, messages, max_new_tokens=20).text
    other = Engine(base, world.tokenizer, Source(retriever, world.tokenizer, 8))
    prompt = Prompts(other, 20).prompt(messages, "golden lighthouse")
    asked = Asked(other, "", prompt=prompt)
    assert asked.text().strip() == expected
    other.close()


def test_questions_with_the_same_end_in_one_batch_read_their_own_passages(engine):
    """Rows are not told apart by their tokens."""
    with held(engine):
        asked = [Asked(engine, "a king", query=text) for text in ("golden lighthouse", "quiet baker")]
    found = [next(e for e in one.result() if isinstance(e, ChunkRead)) for one in asked]
    assert [one.query for one in found] == ["golden lighthouse", "quiet baker"]
    assert found[0].passages != found[1].passages


def test_an_answer_ends_before_a_stop_word_which_is_never_shown(engine):
    """Not even its beginning, while it could still become the stop word."""
    text = Asked(engine, "the river runs", temperature=1.0, seed=1).text()
    stop = text[5:9]
    asked = Asked(engine, "the river runs", temperature=1.0, seed=1, stop=(stop,))
    events = asked.result()
    shown = "".join(event.text for event in events if isinstance(event, Delta))
    assert shown == text[: text.index(stop)]
    assert events[-1].reason == "stop"


def test_an_answer_of_an_end_token_ends_there(world, engine):
    """And its token is counted, but not shown."""
    expected = Asked(engine, "a king").result()
    before = world.model.generation_config.eos_token_id
    world.model.generation_config.eos_token_id = world.tokenizer.encode(
        "".join(e.text for e in expected if isinstance(e, Delta))
    )[0]
    try:
        events = Asked(engine, "a king").result()
    finally:
        world.model.generation_config.eos_token_id = before
    assert events[-1].reason == "stop"
    assert events[-1].num_tokens == 1


def test_a_cancelled_answer_ends_and_the_others_go_on(engine):
    """A client that hangs up costs nothing more."""
    with held(engine):
        first, second = Asked(engine, "a king", max_tokens=200), Asked(engine, "the river", max_tokens=12)
        first.job.canceled = True
    assert second.result()[-1].num_tokens == 12
    assert first.result()[-1].reason == "canceled"


def test_an_answer_past_its_deadline_ends_whether_it_waits_or_runs(engine):
    """A limit on time holds in the queue, too."""
    assert Asked(engine, "a king", deadline=time.monotonic() - 1).result()[-1].reason == "timeout"
    running = Asked(engine, "a king", max_tokens=200, deadline=time.monotonic() + 0.1).result()[-1]
    assert running.reason == "timeout"
    assert running.num_tokens < 200


def test_a_full_queue_and_a_stopped_engine_refuse_work(world):
    """And a stopped engine finishes what it has taken."""
    engine = Engine(world.model, world.tokenizer, max_queue=2)
    engine.call(lambda: time.sleep(0.5))
    time.sleep(0.1)
    asked = [Asked(engine, "a king", max_tokens=5) for _ in range(2)]
    with pytest.raises(QueueFullError):
        Asked(engine, "a king")
    engine.close()
    assert [one.result()[-1].num_tokens for one in asked] == [5, 5]
    with pytest.raises(StoppedError):
        Asked(engine, "a king")


def test_a_failing_batch_is_reported_and_the_engine_goes_on(world, engine, monkeypatch):
    """One bad request must not end the server."""
    with monkeypatch.context() as patch:
        patch.setattr(type(world.model), "generate", lambda *_, **__: 1 / 0)
        assert isinstance(Asked(engine, "a king").result()[-1], Failed)
    assert Asked(engine, "a king", max_tokens=3).result()[-1].num_tokens == 3


@pytest.mark.parametrize("query", [None, "golden lighthouse"])
def test_an_answer_says_that_retrieval_failed_and_is_written_without(engine, monkeypatch, query):
    """Never silently."""
    with monkeypatch.context() as patch:
        patch.setattr(RetroRetriever, "trace", lambda *_, **__: 1 / 0)
        patch.setattr(readers, "find_passages", lambda *_, **__: 1 / 0)
        events = Asked(engine, "a king", query=query).result()
    assert events[-1].retrieval == "unavailable"
    assert "ZeroDivisionError" in events[-1].message
    assert "".join(e.text for e in events if isinstance(e, Delta)) == Asked(engine, "a king", retrieve=False).text()
    assert Asked(engine, "a king").result()[-1].retrieval == "on"


def test_draws_follow_the_softmax_of_the_scores(world):
    """At temperature 1, and at another with the likeliest tokens only."""
    scores = torch.tensor([2.0, 1.0, 0.0, -1.0])
    for options, kept in (({}, 4), ({"top_p": 0.9}, 2), ({"top_k": 3}, 3)):
        row = Row(Job(Prompt([1]), Sampling(1, temperature=0.5, seed=0, **options), print), world.tokenizer)
        counts = torch.bincount(torch.stack([row.draw(scores).argmax() for _ in range(4000)]), minlength=4)
        expected = (scores / 0.5)[:kept].softmax(-1)
        assert (counts[kept:] == 0).all()
        assert torch.allclose(counts[:kept] / 4000, expected, atol=0.03)


def test_text_comes_whole_character_by_whole_character(world):
    """All pieces together are the decoded text, and none ends inside a character."""
    text = "the king — 日本語 ✨ golden"
    stream = TextStream(world.tokenizer)
    pieces = [stream.add(token) for token in world.tokenizer(text).input_ids] + [stream.finish()]
    assert "".join(pieces) == text
    assert stream.length == len(text)
    assert not any("�" in piece for piece in pieces)


def test_a_row_is_free_as_soon_as_its_answer_ends(world):
    """Short answers and canceled ones make room for what waits, while the long one goes on."""
    engine = Engine(world.model, world.tokenizer, max_batch=2)
    long, canceled = Asked(engine, "a king", max_tokens=200), Asked(engine, "the river", max_tokens=200)
    cancel = lambda: setattr(long.job, "canceled", True)  # noqa: E731
    short = [Asked(engine, "a baker", max_tokens=5, at_end=end) for end in (None, None, cancel)]
    canceled.job.canceled = True
    assert [one.result()[-1].num_tokens for one in short] == [5, 5, 5]
    assert canceled.result()[-1].reason == "canceled"
    assert long.result()[-1].reason == "canceled"
    engine.close()


@pytest.mark.parametrize("reader", ["cross_attention", "parallel_context"])
def test_requests_of_every_kind_share_rows_and_are_answered_as_each_alone(world, reader):
    """Texts, questions and requests without retrieval, of all lengths, more than there are rows."""
    model = world.model
    if reader == "parallel_context":
        model = retrofit(tiny_backbone("llama", vocab_size=400), reader=reader, chunk_size=8, neighbor_size=16)
    source = Source(RetroRetriever(world.datastore, embedder=world.embedder), world.tokenizer, 8)
    engine = Engine(model, world.tokenizer, source, max_batch=3)
    requests = [*REQUESTS, ("the king sings", {"retrieve": False, "max_tokens": 25}), QUESTIONS[2], QUESTIONS[1]]
    alone = [Asked(engine, text, **options).result() for text, options in requests]
    together = [Asked(engine, text, **options) for text, options in requests]
    assert [one.result() for one in together] == alone
    engine.close()


def test_requests_that_wait_together_are_begun_in_one_pass(world, monkeypatch):
    """From the second time on: the first answer shows whether the model allows it."""
    engine, sizes = Engine(world.model, world.tokenizer), []
    begin = Batch.of
    monkeypatch.setattr(Batch, "of", lambda model, rows, ends: sizes.append(len(rows)) or begin(model, rows, ends))
    for expected in ([1, 1, 1], [3]):
        with held(engine):
            asked = [Asked(engine, "a king", max_tokens=3) for _ in range(3)]
        assert [one.result()[-1].num_tokens for one in asked] == [3, 3, 3]
        assert sizes == expected
        sizes.clear()
    engine.close()


def test_a_prompt_that_fails_among_others_hurts_its_own_row_alone(world, monkeypatch):
    """The others are computed again, with the same random numbers."""
    engine = Engine(world.model, world.tokenizer)
    texts = ["a king", "the king", "golden castle"]
    expected = [Asked(engine, text, temperature=1.0, seed=1).text() for text in texts]
    begin, bad = Batch.of, engine.tokenizer(texts[1]).input_ids

    def of(model, rows, ends):
        batch = begin(model, rows[:1], ends) if len(rows) == 1 else None
        if any(row.job.prompt.tokens == bad for row in rows) or batch is None:
            raise RuntimeError("no memory")
        return batch

    monkeypatch.setattr(Batch, "of", of)
    with held(engine):
        first, failed, last = [Asked(engine, text, temperature=1.0, seed=1) for text in texts]
    assert "no memory" in failed.result()[-1].message
    assert [first.text(), last.text()] == [expected[0], expected[2]]
    engine.close()


@pytest.mark.parametrize("place", [0, 1], ids=["prompt", "answer"])
def test_a_lookup_that_fails_hurts_its_own_row_alone(engine, monkeypatch, place):
    """Rows that are looked up together are looked up again one by one."""
    texts = ["a quiet baker", "the king", "the small castle sings"]
    trace, seen = RetroRetriever.trace, []

    def failing(retriever, ids, mask=None):
        seen.append(ids.tolist())
        if bad in seen[-1]:
            raise OSError("gone")
        return trace(retriever, ids, mask)

    bad = None
    monkeypatch.setattr(RetroRetriever, "trace", failing)
    expected = [Asked(engine, text).result() for text in texts]
    (bad,) = seen[3 + place]  # the first answer has three
    seen.clear()
    with held(engine):
        asked = [Asked(engine, text) for text in texts]
    found = [one.result() for one in asked]
    assert [found[0], found[2]] == [expected[0], expected[2]]
    assert found[1][-1].retrieval == "unavailable"
    assert "OSError" in found[1][-1].message
    assert [len(chunks) for chunks in seen if bad in chunks] == [[1], [3, 1]][place]


def test_an_answer_reads_the_store_as_it_was_when_the_answer_began(world, tmp_path):
    """A change between two tokens is for the next answer."""
    world.datastore.save(tmp_path / "store")
    retriever = RetroRetriever(RetroDatastore.load(tmp_path / "store"), embedder=world.embedder)
    engine = Engine(world.model, world.tokenizer, Source(retriever, world.tokenizer, 8))
    expected = Asked(engine, "a king", max_tokens=60).result()
    running = Asked(engine, "a king", max_tokens=60)
    begun = running._events.get(timeout=60)
    engine.call(lambda: engine.source.upsert([{"id": "new", "text": "a king " * 9}])).result(60)
    assert [begun, *running.result()] == expected
    assert Asked(engine, "a king", max_tokens=1).result()[-1].store["generation"] == 2
    engine.close()
