"""The example that learns to answer from real articles: its questions, and the loss that it is trained with."""

from collections.abc import Iterator
from itertools import islice
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from datastore.fixtures import make_tokenizer
from tiny import tiny_retro


ARTICLES = [
    {
        "id": "wiki/Ada_Lovelace",
        "title": "Ada Lovelace",
        "text": "Augusta Ada King was an English mathematician and writer. She was born in 1815 in London, as the only child "
        "of the poet Lord Byron. Between 1842 and 1843 she translated an article by Luigi Menabrea.",
        "description": "English mathematician and writer",
        "topic": "People",
    },
    {
        "id": "wiki/Mercury_(planet)",
        "title": "Mercury (planet)",
        "text": "Mercury is the first planet from the Sun and the smallest of the Solar System.",
        "description": "First planet from the Sun",
        "topic": "Physical sciences",
    },
    {
        "id": "wiki/Venus",
        "title": "Venus",
        "text": "Venus is the second planet from the Sun.",
        "description": "Venus, the planet",
        "topic": "Physical sciences",
    },
]


@pytest.fixture(autouse=True)
def examples_on_the_path(monkeypatch) -> Iterator[None]:
    monkeypatch.syspath_prepend(str(Path(__file__).resolve().parents[1] / "examples"))
    yield


def test_questions_ask_for_what_the_article_says():
    from wiki_questions import part_of, questions

    found = {question["id"]: question for question in questions(ARTICLES)}
    # Venus' description would give the answer away, and the planets have no dated sentence.
    assert sorted(found) == ["desc/Ada_Lovelace", "desc/Mercury_(planet)", "year/Ada_Lovelace"]
    year = found["year/Ada_Lovelace"]
    assert year["question"].startswith("Fill in the year (Ada Lovelace): She was born in ____ in London")
    assert year["answers"] == ["1815"] and "1815" not in year["question"]
    assert found["desc/Mercury_(planet)"]["answers"] == ["Mercury"]
    for question in found.values():
        article = next(article for article in ARTICLES if article["id"] == question["article"])
        assert question["part"] == part_of(article)


def test_a_gap_that_is_filled_in_reads_as_the_article_does():
    from wiki_questions import gaps

    texts = {article["title"]: " ".join(article["text"].split()) for article in ARTICLES}
    made = list(islice(gaps(ARTICLES, seed=0), 200))
    assert made == list(islice(gaps(ARTICLES, seed=0), 200)) != list(islice(gaps(ARTICLES, seed=1), 200))
    for question in made:
        head, sentence = question["question"].split("): ", 1)
        title, answer = head.split(" (", 1)[1], question["answers"][0]
        assert sentence.count("____") == 1 and sentence.replace("____", answer) in texts[title], question
        assert 1 <= len(answer.split()) <= 8
    years = {question["answers"][0] for question in made if question["question"].startswith("Fill in the year")}
    assert years == {"1815", "1842", "1843"}


def test_parts_divide_the_articles_by_their_share():
    from wiki_questions import PARTS, part_of

    parts = [part_of({"id": f"wiki/{number}"}) for number in range(4000)]
    assert abs(parts.count("test") / 4000 - PARTS["test"]) < 0.03
    assert abs(parts.count("train") / 4000 - (1 - PARTS["validation"])) < 0.03


@pytest.fixture
def batch():
    """Questions of one and of two chunks, with two passages."""
    from retro_hf.training import QuestionCollator, tokenize_questions

    tokenizer = make_tokenizer()
    rows = [
        {
            "question": "the king",
            "answers": ["seven years ago"],
            "passages": ["the king reads seven years ago", "a river"],
        },
        {
            "question": "the tall queen finds a golden letter",
            "answers": ["near"],
            "passages": ["near the river", "an old train"],
        },
    ]
    tokenized = tokenize_questions(Dataset.from_list(rows), tokenizer, neighbor_size=32)
    return QuestionCollator(tokenizer, chunk_size=16)(list(tokenized))


@pytest.mark.parametrize("mode", ["on", "off", "random"])
def test_the_question_read_without_gradient_gives_the_same_loss_and_gradient(batch, mode):
    """What comes before the last token of a prompt reads no passage, so nothing that is trained stands behind it."""
    from retrofit_qa import answer_loss, in_mode

    model = tiny_retro("llama", {"vocab_size": 400}, chunk_size=16, neighbor_size=32, freeze_backbone=True).train()
    batch = in_mode(batch, mode)
    losses, gradients = [], []
    for loss_of in (lambda: model(**batch).loss, lambda: answer_loss(model, batch)):
        model.zero_grad()
        losses.append(loss_of())
        if mode != "off":
            losses[-1].backward()
            gradients.append([p.grad.clone() for p in model.model.retro.parameters()])
    torch.testing.assert_close(*losses)
    if mode != "off":
        torch.testing.assert_close(*gradients, rtol=1e-4, atol=1e-6)
        assert any(float(gradient.abs().max()) > 1e-4 for gradient in gradients[0])
