"""Exact match and F1 against a naive transcription of their rules; answers with, without and with wrong passages."""

import math
import string
import sys
from collections import Counter

import numpy as np
import pytest
import torch
from datasets import Dataset
from datastore.fixtures import WORDS
from hypothesis import given
from hypothesis import strategies as st
from tiny import tiny_backbone
from tiny_questions import make_questions, tokenized
from tiny_training import CHUNK_SIZE, make_model
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast

from retro_hf import RetroConfig, RetroDecoderConfig, RetroEncoderConfig, RetroForCausalLM
from retro_hf.errors import DatasetError, MissingExtraError
from retro_hf.evaluation import answer_metrics, answer_questions, score_answers
from retro_hf.training import QuestionCollator, generate_answers


@pytest.fixture(scope="module")
def tokenizer(world):
    return world.tokenizer


@pytest.fixture(scope="module")
def questions(tokenizer) -> Dataset:
    return tokenized(tokenizer, make_questions(7))


@pytest.fixture(scope="module")
def model():
    return make_model(scale=0.3)


def ask(model, dataset, tokenizer, **options):
    return answer_questions(model, dataset, tokenizer, **{"max_new_tokens": 6, "num_resamples": 100, **options})


# ── scores ────────────────────────────────────────────────────────────────────────────────────────────────────────────


def naive_words(text: str) -> list[str]:
    """The rule of SQuAD, letter by letter: lower case, no punctuation, no articles, words between white space."""
    kept = "".join(letter for letter in text.lower() if letter not in string.punctuation)
    words, word = [], ""
    for letter in kept + " ":
        if letter.isspace():
            words += [word] if word else []
            word = ""
        else:
            word += letter
    return [word for word in words if word not in ("a", "an", "the")]


def naive_scores(prediction: str, answers: list[str]) -> tuple[float, float]:
    """Of the most similar answer, in percent."""
    exact, f1 = 0.0, 0.0
    given = naive_words(prediction)
    for answer in answers:
        right = naive_words(answer)
        same = sum((Counter(given) & Counter(right)).values())
        exact = max(exact, 100.0 * (given == right))
        if not given or not right:
            f1 = max(f1, 100.0 * (given == right))
        elif same:
            f1 = max(f1, 100 * 2 * same / (len(given) + len(right)))
    return exact, f1


# Articles are words here; within words and between marks of other kinds \b and white space disagree.
phrases = st.lists(
    st.sampled_from(
        ["a", "The", "an", "Theory", "río", "RÍO", "42", "it's", "its", "co-op", "coop", "東京", "...", "-", "!"]
    ),
    max_size=5,
).flatmap(lambda words: st.sampled_from([" ", "  ", "\t", "\n "]).map(lambda gap: gap.join(words)))


@given(prediction=phrases, answers=st.lists(phrases, min_size=1, max_size=3))
def test_scores_equal_a_naive_transcription(prediction, answers):
    """Whatever words, marks and white space."""
    exact_match, f1 = score_answers([prediction], [answers])
    exact, similar = naive_scores(prediction, answers)
    assert exact_match[0] == exact and f1[0] == pytest.approx(similar, rel=1e-5)


@pytest.mark.parametrize(
    ("prediction", "answers", "exact_match", "f1"),
    [
        ("The Eiffel Tower.", ["eiffel tower"], 100, 100),
        ("Eiffel", ["Louvre", "the Eiffel Tower"], 0, 200 / 3),
        ("in 1889", ["1889"], 0, 200 / 3),
        ("", ["1889"], 0, 0),
        ("the", ["a"], 100, 100),
        ("Paris", ["London", "Paris"], 100, 100),
    ],
)
def test_known_scores(prediction, answers, exact_match, f1):
    """By hand."""
    assert [float(part[0]) for part in score_answers([prediction], [answers])] == [exact_match, pytest.approx(f1)]


def test_answers_that_cannot_be_scored_are_an_error():
    """A question without a right answer, a text for a list, other numbers."""
    for predictions, answers in (
        (["Paris"], [[]]),
        (["Paris"], ["Paris"]),
        (["Paris"], [np.array("Paris")]),
        (["a", "b"], [["a"]]),
    ):
        with pytest.raises(DatasetError):
            score_answers(predictions, answers)


def test_missing_package_is_an_error_before_any_work(monkeypatch, tokenizer, questions):
    """`pip install` line and all."""
    monkeypatch.setitem(sys.modules, "torchmetrics.functional.text", None)
    with pytest.raises(MissingExtraError, match=r'pip install "retro-hf\[qa\]"'):
        answer_questions(None, questions, tokenizer)
    with pytest.raises(MissingExtraError):
        answer_metrics(tokenizer, questions)


# ── answers ───────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_answers_in_a_batch_equal_those_of_each_question_alone(model, tokenizer, questions):
    """On, off and random; in the order of the dataset, whatever the batches."""
    result = ask(model, questions, tokenizer, batch_size=3)
    collator = QuestionCollator(tokenizer, chunk_size=CHUNK_SIZE)
    for number, row in enumerate(questions):
        alone = {"on": row, "off": {**row, "passage_input_ids": []}}
        for mode, example in alone.items():
            (answer,) = generate_answers(model, collator([example]), tokenizer, max_new_tokens=6)
            assert result.predictions[mode][number] == answer
        others = [
            generate_answers(
                model,
                collator([{**row, "passage_input_ids": other["passage_input_ids"]}]),
                tokenizer,
                max_new_tokens=6,
            )[0]
            for place, other in enumerate(questions)
            if place != number
        ]
        assert result.predictions["random"][number] in others
    again = ask(model, questions, tokenizer, batch_size=1)
    assert again.predictions == result.predictions
    other_seed = ask(model, questions, tokenizer, seed=1)
    assert other_seed.predictions["on"] == result.predictions["on"]
    assert other_seed.predictions["random"] != result.predictions["random"]


def test_number_of_passages_and_one_in_the_prompt(model, tokenizer, questions):
    """`num_passages=1` is a dataset with one; off has none in the prompt, either."""
    one = ask(model, questions, tokenizer, num_passages=1, modes=("on",))
    cut = tokenized(tokenizer, make_questions(7), num_passages=1)
    assert one.predictions == ask(model, cut, tokenizer, modes=("on",)).predictions and one.num_passages == 1
    plus = ask(model, questions, tokenizer, passages_in_prompt=1)
    plain = ask(model, questions, tokenizer)
    assert plus.predictions["off"] == plain.predictions["off"] and plus.predictions["on"] != plain.predictions["on"]


def test_plain_language_model_answers(tokenizer, questions):
    """Closed book, and with a passage in its prompt; it is left in the mode it was in."""
    plain = tiny_backbone("gpt2", vocab_size=400, n_positions=256).train()
    closed = ask(plain, questions, tokenizer, modes=("off",))
    assert closed.predictions.keys() == {"off"} and plain.training
    prompted = ask(plain, questions, tokenizer, num_passages=0, passages_in_prompt=1)
    assert prompted.predictions["off"] == closed.predictions["off"] and prompted.num_passages == 1


def test_table_and_json_have_the_numbers(model, tokenizer, questions):
    """Means over questions, with intervals around them; differences are paired."""
    result = ask(model, questions, tokenizer)
    for score, values in (("exact_match", result.exact_match), ("f1", result.f1)):
        for mode, row in values.items():
            expected = score_answers(result.predictions[mode], questions["answers"])[score == "f1"]
            np.testing.assert_array_equal(row, expected)
            mean, low, high = result.intervals[score][mode]
            assert mean == pytest.approx(row.mean()) and low <= mean <= high
        assert result.differences[score].keys() == {"on", "random"}
        assert result.differences[score]["on"][0] == pytest.approx((values["on"] - values["off"]).mean())
    lines = str(result).splitlines()
    assert [line.split()[0] for line in lines[1:4]] == ["on", "off", "random"]
    assert f"{result.f1['on'].mean():.1f}" in lines[1] and "7 questions, 3 passages" in lines[-1]
    content = result.to_dict()
    assert content["num_questions"] == 7 and content["f1"]["on"]["mean"] == pytest.approx(result.f1["on"].mean())
    assert content["exact_match_minus_off"].keys() == {"on", "random"}


def test_single_question_has_no_interval(model, tokenizer, questions):
    """Nothing to draw from."""
    result = ask(model, questions.select([0]), tokenizer, modes=("on", "off"))
    assert all(math.isnan(end) for end in result.intervals["f1"]["on"][1:])


def test_questions_that_a_mode_cannot_use_are_an_error(model, tokenizer, questions):
    """Modes, missing passages, missing answers, nothing at all."""
    with pytest.raises(ValueError, match="onn"):
        ask(model, questions, tokenizer, modes=("onn",))
    closed = tokenized(tokenizer, num_passages=0)
    assert ask(model, closed, tokenizer).predictions.keys() == {"off"}
    with pytest.raises(DatasetError, match="retrieve_passages"):
        ask(model, closed, tokenizer, modes=("on",))
    with pytest.raises(DatasetError):
        ask(model, questions.select([0]), tokenizer)
    with pytest.raises(DatasetError):
        ask(model, questions.remove_columns("answers"), tokenizer)
    with pytest.raises(DatasetError):
        ask(model, make_questions(), tokenizer)
    with pytest.raises(DatasetError):
        ask(model, questions.select([]), tokenizer)


def test_questions_for_another_reader_are_an_error(model, tokenizer, questions):
    """They are written otherwise, and read from another token on; without passages any model may answer them."""
    other = tokenized(tokenizer, reader="parallel_context")
    for ask_other in (
        lambda: ask(model, other, tokenizer),
        lambda: QuestionCollator(tokenizer, chunk_size=8)([questions[0], other[0]]),
    ):
        with pytest.raises(DatasetError, match="reader"):
            ask_other()
    assert ask(model, other, tokenizer, num_passages=0, modes=("off",)).predictions["off"]


@pytest.mark.parametrize("value", ["a", 1, None, [-1], [0.5], ["a"], [None], {"a": 1}], ids=str)
@pytest.mark.parametrize("name", ["prompt_input_ids", "passage_input_ids"])
def test_a_column_of_something_else_is_an_error_that_names_it(model, tokenizer, questions, name, value):
    """As of a dataset that was made in another way."""
    other = questions.remove_columns(name).add_column(name, [value] * len(questions))
    with pytest.raises(DatasetError, match=name):
        ask(model, other, tokenizer)


def test_dataset_of_another_tokenizer_is_an_error(model, tokenizer, questions):
    """All answers would be silently wrong. A question that the tokenizer cannot spell is accepted."""
    words = ["<end>", "<unk>", *(f"word{number}" for number in range(398))]
    backend = Tokenizer(models.WordLevel({word: id for id, word in enumerate(words)}, unk_token="<unk>"))
    other = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<end>", unk_token="<unk>")
    for refused in (lambda: ask(model, questions, other), lambda: answer_metrics(other, questions)):
        with pytest.raises(DatasetError):
            refused()
    rows = [{**row, "question": row["question"] + " 東京\u0301"} for row in make_questions(2)]
    ask(model, tokenized(tokenizer, Dataset.from_list(rows)), tokenizer, modes=("off",))


def test_question_longer_than_the_context_is_an_error(tokenizer, questions):
    """Whatever the positions: what was never trained answers nothing. Padding does not count."""
    model = tiny_backbone("llama", vocab_size=400, max_position_embeddings=64)
    longest = max(len(row["prompt_input_ids"]) for row in questions)
    ask(model, questions, tokenizer, modes=("off",), max_new_tokens=64 - longest)
    with pytest.raises(DatasetError, match=f"{longest} tokens"):
        ask(model, questions, tokenizer, modes=("off",), max_new_tokens=65 - longest)


# ── it works ──────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_tiny_model_learns_answers_that_are_only_in_the_passages(tokenizer):
    """20 times the same question: without passages one answer is as good as another, with another's passages it is wrong."""
    words = list(dict.fromkeys(word for word in WORDS if len(tokenizer.encode(" " + word)) == 1))[:20]
    rows = [
        {
            "question": "which",
            "answers": [word],
            "passages": [{"title": "x", "text": f"the {word} is"}, {"title": "x", "text": "nothing"}],
        }
        for word in words
    ]
    questions = tokenized(tokenizer, Dataset.from_list(rows), neighbor_size=32)
    torch.manual_seed(0)
    sizes = {"num_attention_heads": 4, "head_dim": 16, "initializer_range": 0.1}
    model = RetroForCausalLM(
        RetroConfig(
            text_config=RetroDecoderConfig(
                vocab_size=400, hidden_size=64, intermediate_size=128, num_hidden_layers=2, **sizes
            ),
            neighbor_encoder_config=RetroEncoderConfig(
                hidden_size=64, intermediate_size=128, num_hidden_layers=1, **sizes
            ),
            chunk_size=16,
            neighbor_size=32,
            cross_attention_layers=[0, 1],
            initializer_range=0.1,
        )
    ).train()
    batch = QuestionCollator(tokenizer, chunk_size=16)(list(questions))
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for _ in range(150):
        loss = model(**batch).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    result = answer_questions(model, questions, tokenizer, max_new_tokens=4, batch_size=20)
    mean = {mode: scores.mean() for mode, scores in result.exact_match.items()}
    assert mean["on"] >= 95 and mean["off"] <= 10 and mean["random"] <= 10, (mean, float(loss))
    difference, low, _ = result.differences["exact_match"]["on"]
    assert difference >= 85 and low >= 70
