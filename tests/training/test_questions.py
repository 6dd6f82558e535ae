"""Questions in the paper's format: where the prompt ends, who reads the passages, what is learned, what is refused."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from datasets import Dataset
from tiny import tiny_backbone
from tiny_questions import make_questions, tokenized
from tiny_training import CHUNK_SIZE, make_model
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast

from retro_hf.errors import DatasetError
from retro_hf.training import QuestionCollator, generate_answers, tokenize_questions
from retro_hf.training.question_trainer import generate_ids


@pytest.fixture(scope="module")
def tokenizer(world) -> PreTrainedTokenizerFast:
    return world.tokenizer


@pytest.fixture(scope="module")
def questions(tokenizer) -> Dataset:
    return tokenized(tokenizer)


@pytest.fixture(scope="module")
def model():
    return make_model(scale=0.25)


def collate(tokenizer, rows, **options) -> dict[str, torch.Tensor]:
    return QuestionCollator(tokenizer, **{"chunk_size": CHUNK_SIZE, **options})(list(rows))


def prompt_length(batch: dict[str, torch.Tensor], row: int) -> int:
    return int(((batch["attention_mask"][row] == 1) & (batch["labels"][row] == -100)).sum())


def other_passages(batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The same batch with other tokens in all passages."""
    return {**batch, "neighbor_input_ids": (batch["neighbor_input_ids"] + 7) % 300 + 3}


# ── the format ────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_text_has_the_format_of_the_paper(tokenizer):
    """Question, answer and passages, word for word; white space is made single, and the answer ends with the end token."""
    row = {
        "id": 7,
        "question": " which  river\nruns ",
        "answers": [" the old  river", "river"],
        "passages": [
            {"title": "River", "text": "the\n river  runs"},
            {"title": None, "text": "a city"},
            {"text": "  "},
        ],
    }
    (made,) = tokenized(tokenizer, Dataset.from_list([row]), neighbor_size=99)
    assert tokenizer.decode(made["prompt_input_ids"]) == "question: which river runs \n answer:"
    assert tokenizer.decode(made["answer_input_ids"]) == " the old river<|endoftext|>"
    texts = [tokenizer.decode(ids) for ids in made["passage_input_ids"]]
    assert texts == ["title: River, source: the river runs", "title: , source: a city"]
    assert (made["id"], made["answers"]) == (7, row["answers"]) and "passages" not in made


def test_texts_are_accepted_as_passages_and_cut_to_size(tokenizer):
    """`neighbor_size` tokens are what the encoder reads of one."""
    row = {"question": "where", "answers": ["here"], "passages": ["the river " * 30, "a city"]}
    (made,) = tokenized(tokenizer, Dataset.from_list([row]), neighbor_size=24)
    whole = tokenizer("title: , source: " + ("the river " * 30).strip())["input_ids"]
    assert made["passage_input_ids"][0] == whole[:24] and len(whole) > 24


def test_prompt_can_be_changed(tokenizer):
    """And the first right answer is the one to learn."""
    row = {"question": "where", "answers": ["there", "here"], "passages": []}
    (made,) = tokenized(tokenizer, Dataset.from_list([row]), prompt="Q: {question} A:")
    assert tokenizer.decode(made["prompt_input_ids"] + made["answer_input_ids"]) == "Q: where A: there<|endoftext|>"


def test_num_passages_keeps_the_best(tokenizer):
    """With 0, closed book, the column need not be there."""
    kept = tokenized(tokenizer, num_passages=2)
    whole = tokenized(tokenizer)
    assert kept["passage_input_ids"][0] == whole["passage_input_ids"][0][:2]
    closed = tokenized(tokenizer, make_questions().remove_columns("passages"), num_passages=0)
    assert all(row == [] for row in closed["passage_input_ids"])


# ── the batch ─────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_every_prompt_ends_a_chunk_and_all_answers_begin_in_one_column(tokenizer):
    """Also prompts of several chunks; the last token of a prompt is the last of "answer:"."""
    questions = tokenized(tokenizer, make_questions(24))
    batch = collate(tokenizer, questions)
    lengths = [len(row["prompt_input_ids"]) for row in questions]
    assert (
        len({length // CHUNK_SIZE for length in lengths}) > 3 and len({length % CHUNK_SIZE for length in lengths}) > 3
    )
    for row, length in enumerate(lengths):
        offset = int(batch["chunk_offset"][row])
        assert 0 <= offset < CHUNK_SIZE and (offset + length) % CHUNK_SIZE == 0
        assert (
            batch["input_ids"][row, max(lengths) - length : max(lengths)].tolist()
            == questions[row]["prompt_input_ids"]
        )
        assert tokenizer.decode(batch["input_ids"][row, max(lengths) - 7 : max(lengths)]).endswith("answer:")
    (first,) = {int((labels != -100).long().argmax()) for labels in batch["labels"]}
    assert first == max(lengths)
    assert all(tensor.dtype == torch.int64 for tensor in batch.values())


@torch.no_grad()
def test_only_the_answer_and_its_end_token_are_learned(tokenizer, questions, model):
    """Labels decode to the answers; the loss is the mean over their tokens alone."""
    batch = collate(tokenizer, questions)
    nats, count = 0.0, 0
    for row, example in enumerate(questions):
        labels = batch["labels"][row]
        assert tokenizer.decode(labels[labels != -100]) == f" {example['answers'][0]}<|endoftext|>"
        alone = collate(tokenizer, [example])
        logits = model(**{name: value for name, value in alone.items() if name != "labels"}).logits[0]
        start = prompt_length(alone, 0)
        for place, token in enumerate(example["answer_input_ids"]):
            nats -= float(logits[start + place - 1].log_softmax(-1)[token])
            count += 1
    assert float(model(**batch).loss) == pytest.approx(nats / count, rel=1e-5)


@pytest.mark.parametrize("family", ["retro_decoder", "llama", "gpt2"])
def test_row_in_a_padded_batch_equals_the_row_alone(tokenizer, questions, family):
    """Padding on both sides, of passages too, changes no logit; also where positions are absolute."""
    model = make_model(family=family, scale=0.25)
    batch = collate(tokenizer, questions)
    together = model(**batch).logits
    for row, example in enumerate(questions):
        alone = model(**collate(tokenizer, [example])).logits[0]
        torch.testing.assert_close(together[row][batch["attention_mask"][row] == 1], alone, rtol=1e-4, atol=1e-4)


def test_the_answer_reads_the_passages_and_the_question_does_not(tokenizer, model):
    """Other passages change the logits from the last token of the prompt on, to the end, and none before it."""
    rows = [{**row, "answers": ["the river runs over the old bridge near the castle"]} for row in make_questions(3)]
    batch = collate(tokenizer, tokenized(tokenizer, Dataset.from_list(rows)))
    before, after = model(**batch).logits, model(**other_passages(batch)).logits
    start = int((batch["labels"][0] != -100).long().argmax())
    for row in range(3):
        real = batch["attention_mask"][row] == 1
        changed = (before[row] != after[row]).any(dim=-1) & real
        assert not changed[: start - 1].any() and changed[start - 1 :][real[start - 1 :]].all()
        answer = int((batch["labels"][row] != -100).sum())
        assert prompt_length(batch, row) > CHUNK_SIZE and answer > CHUNK_SIZE


def test_only_chunks_with_passages_are_computed(tokenizer, questions, model, monkeypatch):
    """The chunks of a long question before its last cost nothing; loss and gradients are as if they were computed."""
    batch = collate(tokenizer, questions)
    encoder, encoded = model.model.retro.encoder, []
    forward = encoder.forward
    monkeypatch.setattr(encoder, "forward", lambda *args: encoded.append(len(args[0])) or forward(*args))

    def gradients(batch) -> list[torch.Tensor]:
        model.zero_grad()
        model(**batch, use_cache=False).loss.backward()
        return [parameter.grad.clone() for parameter in model.parameters()]

    few = gradients(batch)
    with monkeypatch.context() as patched:  # every chunk, with neighbors or without
        patched.setattr(torch.Tensor, "nonzero", lambda self: torch.arange(self.numel())[:, None])
        every = gradients(batch)
    number = len(questions) * batch["neighbor_input_ids"].shape[1]
    assert encoded == [int(batch["neighbor_attention_mask"].any(-1).any(-1).sum()), number] and encoded[0] < number / 2
    for one, other in zip(few, every, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)


@torch.no_grad()
def test_more_passages_than_in_training_and_fewer_are_masked(tokenizer, model):
    """Twenty at once, one at test; a question with fewer has masked ones."""
    questions = tokenized(tokenizer, make_questions(3, num_passages=20))
    batch = collate(tokenizer, questions)
    assert batch["neighbor_input_ids"].shape[2] == 20
    shown = batch["neighbor_attention_mask"][:, -1].any(dim=-1).sum(dim=-1)
    assert shown.tolist() == [20, 19, 18] == [len(row["passage_input_ids"]) for row in questions]
    one = collate(tokenizer, questions, num_passages=1)
    width = one["neighbor_input_ids"].shape[-1]
    assert torch.equal(one["neighbor_input_ids"], batch["neighbor_input_ids"][:, :, :1, :width])
    assert len({float(model(**made).loss) for made in (batch, one)}) == 2


def test_questions_without_passages_are_answered_by_the_backbone_alone(tokenizer, model):
    """Bit for bit, whether the passages are empty in the dataset or left out of the batch."""
    questions = tokenized(tokenizer, Dataset.from_list([{**row, "passages": []} for row in make_questions(3)]))
    batch = collate(tokenizer, questions)
    assert batch["neighbor_input_ids"].shape[2:] == (1, 1) and not batch["neighbor_attention_mask"].any()
    closed = collate(tokenizer, questions, num_passages=0)
    assert "neighbor_input_ids" not in closed and "chunk_offset" not in closed
    assert torch.equal(model(**batch).logits, model.model.backbone(**closed).logits)


def test_best_passage_is_in_the_prompt(tokenizer, questions, model):
    """RETRO++: before the question, in the same chunk grid; the encoder still reads all."""
    batch = collate(tokenizer, questions, passages_in_prompt=1)
    for row, example in enumerate(questions):
        real = batch["input_ids"][row][(batch["attention_mask"][row] == 1) & (batch["labels"][row] == -100)].tolist()
        best = [tokenizer.decode(ids) + "\n" for ids in example["passage_input_ids"][:1]]
        assert tokenizer.decode(real) == "".join(best) + tokenizer.decode(example["prompt_input_ids"])
        assert (int(batch["chunk_offset"][row]) + len(real)) % CHUNK_SIZE == 0
    plain = collate(tokenizer, questions)
    assert torch.equal(batch["neighbor_input_ids"][:, -1], plain["neighbor_input_ids"][:, -1])
    assert torch.isfinite(model(**batch).loss)


def test_plain_language_model_reads_passages_in_its_prompt(tokenizer, questions):
    """The baseline: no retrieval in the batch."""
    plain = tiny_backbone("gpt2", vocab_size=400)
    batch = collate(tokenizer, questions, num_passages=0, passages_in_prompt=1)
    assert set(batch) == {"input_ids", "attention_mask", "position_ids", "labels"}
    assert torch.isfinite(plain(**batch).loss)
    assert len(generate_answers(plain, batch, tokenizer, max_new_tokens=3)) == len(questions)


# ── random passages and none ──────────────────────────────────────────────────────────────────────────────────────────


def test_dropout_replaces_the_given_share(tokenizer):
    """Half of the questions get those of a question of the set, a quarter none, the rest their own, also in the prompt."""
    rows = [{**row, "passages": [f"city {number}"]} for number, row in enumerate(make_questions(200))]
    questions = tokenized(tokenizer, Dataset.from_list(rows))
    others = tokenized(tokenizer, Dataset.from_list([{**rows[0], "passages": ["castle"]}]))
    collator = QuestionCollator(
        tokenizer,
        chunk_size=CHUNK_SIZE,
        passages_in_prompt=1,
        random_passage_probability=0.5,
        no_passage_probability=0.25,
        random_passages=others,
    )
    counts = {"own": 0, "other": 0, "none": 0}
    batch = collator(list(questions))
    for row, example in enumerate(questions):
        ids, mask = batch["neighbor_input_ids"][row, -1, 0], batch["neighbor_attention_mask"][row, -1, 0]
        read = ids[mask == 1].tolist()
        known = {"own": example["passage_input_ids"][0], "other": others[0]["passage_input_ids"][0], "none": []}
        (kind,) = (name for name, tokens in known.items() if tokens == read)
        counts[kind] += 1
        in_prompt = prompt_length(batch, row) - len(example["prompt_input_ids"])
        assert in_prompt == (len(read) + 1 if read else 0)
    assert 75 <= counts["other"] <= 125 and 30 <= counts["none"] <= 70
    assert all(torch.equal(value, collator(list(questions))[name]) for name, value in batch.items())
    evaluated = collator.for_evaluation()(list(questions))
    assert torch.equal(evaluated["input_ids"], collate(tokenizer, questions, passages_in_prompt=1)["input_ids"])


# ── generation ────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("family", ["retro_decoder", "gpt2"])
def test_left_padded_batch_generates_what_each_row_generates_alone(tokenizer, questions, family):
    """Over chunk borders, where the same passages are read on; each step is that of a pass over the whole text."""
    model = make_model(family=family, scale=0.25)
    length = 2 * CHUNK_SIZE + 3
    options = {"max_new_tokens": length, "min_new_tokens": length}
    together = generate_ids(model, collate(tokenizer, questions), tokenizer, **options)
    for row, example in enumerate(questions):
        alone = generate_ids(model, collate(tokenizer, [example]), tokenizer, **options)
        assert together[row].tolist() == alone[0].tolist()
        written = {**example, "answer_input_ids": alone[0].tolist()}
        logits = model(**collate(tokenizer, [written])).logits[0, -length - 1 : -1]
        logits[:, tokenizer.eos_token_id] = -torch.inf
        assert logits.argmax(-1).tolist() == alone[0].tolist()


def test_generation_does_not_see_the_answers(tokenizer, model):
    """Batches with and without answers generate the same."""
    rows = make_questions()
    known = collate(tokenizer, tokenized(tokenizer, rows))
    unknown = collate(tokenizer, tokenized(tokenizer, rows.remove_columns("answers"), with_answers=False))
    assert "labels" not in unknown
    answers = [generate_answers(model, batch, tokenizer, max_new_tokens=12) for batch in (known, unknown)]
    assert answers[0] == answers[1] and any(answers[0])


def test_attached_retriever_is_not_used(tokenizer, questions, world):
    """The passages are the question's, also beyond the first chunk of an answer."""
    model = make_model(scale=0.25)
    batch = collate(tokenizer, questions)
    before = generate_answers(model, batch, tokenizer, max_new_tokens=20)

    def refuse(chunk_input_ids, chunk_attention_mask):
        raise AssertionError("asked")

    model.set_retriever(refuse)
    assert generate_answers(model, batch, tokenizer, max_new_tokens=20) == before


def test_answer_ends_at_the_end_token_or_the_line(tokenizer):
    """What comes after is not the answer's."""
    from retro_hf.training.question_trainer import decode_answers

    rows = [" city<|endoftext|> river", "\n city \n river", " city", "<|endoftext|> city"]
    ids = [tokenizer(text)["input_ids"] for text in rows]
    assert decode_answers(tokenizer, [*ids[:3], [*ids[2], -100], ids[3]]) == ["city", "city", "city", "city", ""]


# ── bad input ─────────────────────────────────────────────────────────────────────────────────────────────────────────


GOOD = {"question": "where", "answers": ["here"], "passages": [{"title": "a", "text": "b"}]}


@pytest.mark.parametrize(
    ("row", "value"),
    [
        ({"question": " "}, "' '"),
        ({"question": None}, "None"),
        ({"answers": []}, "None"),
        ({"answers": None}, "None"),
        ({"answers": ["", "  "]}, "None"),
        ({"answers": [1975]}, "1975"),
        ({"answers": {"text": ["here"], "answer_start": [0]}}, "SQuAD"),
        ({"answers": "here"}, "'here'"),
        ({"passages": [{"title": "a"}]}, "'a'"),
        ({"passages": [{"title": 3, "text": "b"}]}, "3"),
        ({"passages": "a text"}, "'a text'"),
        ({"passages": {"title": ["a"], "text": ["b"]}}, "'b'"),
    ],
)
def test_invalid_row_is_reported_with_its_number_and_value(tokenizer, row, value):
    with pytest.raises(DatasetError, match=f"row 0 .*{value}"):
        tokenized(tokenizer, Dataset.from_list([{**GOOD, **row}]))


def test_passages_may_be_missing_in_a_row(tokenizer):
    """None and an empty list are accepted: nothing was found."""
    for passages in (None, [], [{"title": "a", "text": ""}]):
        (made,) = tokenized(tokenizer, Dataset.from_list([GOOD, {**GOOD, "passages": passages}])).select([1])
        assert made["passage_input_ids"] == []


def test_dataset_without_any_passage_is_warned_about(tokenizer, caplog):
    """It would be answered without retrieval, which nobody who has not said `num_passages=0` may have meant."""
    rows = Dataset.from_list([{**GOOD, "passages": None}, {**GOOD, "passages": []}])
    tokenized(tokenizer, rows, num_passages=0)
    assert not caplog.records
    tokenized(tokenizer, rows)
    assert "retrieve_passages" in caplog.text


@pytest.mark.parametrize("column", ["question", "answers", "passages"])
def test_missing_column_is_an_error_that_names_it(tokenizer, column):
    with pytest.raises(DatasetError, match=f"'{column}'"):
        tokenized(tokenizer, Dataset.from_list([GOOD]).remove_columns(column))


def test_question_beyond_the_context_is_an_error(tokenizer):
    """By `max_length`, with the number of tokens; without it, by the model."""
    rows = Dataset.from_list([GOOD, {**GOOD, "question": "the river " * 80}])
    with pytest.raises(DatasetError, match="Question 1 .*max_length=64"):
        tokenized(tokenizer, rows, max_length=64)
    batch = collate(tokenizer, tokenized(tokenizer, rows))
    with pytest.raises(ValueError):
        make_model(family="gpt2")(**batch)


def test_list_of_questions_is_an_error(tokenizer):
    with pytest.raises(DatasetError, match="list"):
        tokenize_questions([GOOD], tokenizer, neighbor_size=16)


def test_prompt_needs_a_place_for_the_question_and_a_boundary(tokenizer):
    with pytest.raises(DatasetError):
        tokenized(tokenizer, prompt="Q: A:")
    letters = {letter: number for number, letter in enumerate("abcdefghijklmnopqrstuvwxyz: \n,")}
    joining = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.BPE({**letters, ": ": len(letters)}, [(":", " ")])), eos_token="a"
    )
    with pytest.raises(DatasetError, match="row 0"):
        tokenized(joining, Dataset.from_list([GOOD]))


def test_tokenizer_needs_an_end_token():
    with pytest.raises(DatasetError):
        tokenized(SimpleNamespace(eos_token_id=None))


def test_neighbor_size_must_be_positive(tokenizer):
    with pytest.raises(ValueError):
        tokenized(tokenizer, neighbor_size=0)


@pytest.mark.parametrize(
    "options",
    [
        {"num_passages": -1},
        {"random_passage_probability": 0.6, "no_passage_probability": 0.6},
        {"random_passage_probability": 0.5},
    ],
)
def test_collator_option_out_of_range_is_an_error(tokenizer, options):
    with pytest.raises(ValueError):
        QuestionCollator(tokenizer, chunk_size=8, **options)


@pytest.mark.parametrize("example", [{"input_ids": [1]}, {"prompt_input_ids": [1]}])
def test_example_without_its_columns_is_an_error(tokenizer, example):
    with pytest.raises(DatasetError):
        QuestionCollator(tokenizer, chunk_size=8)([example])


def test_labels_are_never_all_masked(tokenizer):
    """An answer has at least its end token, however little its text says."""
    made = tokenized(tokenizer, Dataset.from_list([{**GOOD, "answers": ["."]}]))
    learned = collate(tokenizer, made)["labels"]
    assert learned[learned != -100].tolist() == made[0]["answer_input_ids"]
    assert made[0]["answer_input_ids"][-1] == tokenizer.eos_token_id


def test_datastore_may_have_another_tokenizer_than_the_model(world, tokenizer):
    """Passages are text."""
    from datastore.fixtures import make_tokenizer

    from retro_hf.training import retrieve_passages

    raw = Dataset.from_list([{"question": "the river runs", "answers": ["here"]}])
    raw = retrieve_passages(raw, world.retriever, num_passages=2)
    other = make_tokenizer(300)
    (made,) = tokenized(other, raw, neighbor_size=64)
    assert len(other) == 300 and np.max(np.concatenate(made["passage_input_ids"])) < 300
    texts = [other.decode(ids) for ids in made["passage_input_ids"]]
    assert texts[0].startswith("title: Title") and raw[0]["passages"][0]["text"][:20] in texts[0]
