"""The benchmark of questions that people ask: how they are made, and what counts as following a changed fact."""

import json
from pathlib import Path

import numpy as np
import pytest


@pytest.fixture(autouse=True)
def benchmarks_on_the_path(monkeypatch):
    root = Path(__file__).resolve().parents[1]
    for folder in ("examples", "benchmarks"):
        monkeypatch.syspath_prepend(str(root / folder))


@pytest.mark.parametrize(
    ("title", "text", "question", "year"),
    [
        (
            "Serengeti National Park",
            "A park in Tanzania. The park was established in 1940.",
            "In which year was Serengeti National Park established?",
            "1940",
        ),
        (
            "Thriller (album)",
            "It was released on November 29, 1982, through Epic Records.",
            "In which year was Thriller released?",
            "1982",
        ),
        (
            "The Marriage of Figaro",
            "It premiered at the Burgtheater in Vienna on 1 May 1786.",
            "In which year did The Marriage of Figaro premiere at the Burgtheater in Vienna?",
            "1786",
        ),
    ],
)
def test_a_sentence_is_turned_around(title, text, question, year):
    from natural_questions import year_question

    assert year_question({"title": title, "text": text}) == (question, year)


@pytest.mark.parametrize(
    "text",
    [
        "It was built in 1900 and destroyed in 1950.",  # which of the two?
        "Of the three houses, one was built in 1900.",  # not the article's subject
        "It was built of stone.",
    ],
)
def test_no_question_where_the_answer_would_be_unclear(text):
    from natural_questions import year_question

    assert year_question({"title": "A house", "text": text}) is None


def test_changed_years_count_where_the_best_passage_has_them(tmp_path, monkeypatch):
    import questions

    monkeypatch.setattr(questions, "WORK", tmp_path)
    (tmp_path / "changed.json").write_text(json.dumps({"a": "1901", "b": "1902", "c": "1903"}))
    rows = [{"question": name, "answers": [year]} for name, year in (("a", "1801"), ("b", "1802"), ("c", "1803"))]
    row = {
        "answers": ["It was in 1901.", "1802", "1803"],
        "found": [0, 0, 1],  # the third question read another passage first
        "first_token": [1.0, 2.0, 3.0],
        "seconds": [2.0, 3.0, 4.0],
        "warm_first_token": [],
        "warm": [],
        "peak_mb": 10.0,
    }
    scored = questions.score(row, rows, changed=True)
    assert (scored["count"], scored["new"][0], scored["old"][0]) == (2, 50.0, 50.0)
    assert (scored["first_token"], scored["seconds"]) == (2.0, 3.0)


def test_answers_are_scored_by_kind(tmp_path):
    import questions

    rows = [{"kind": "year", "answers": ["1801"]}, {"kind": "name", "answers": ["Ada Lovelace"]}]
    row = {"answers": ["In 1801.", "Ada Lovelace"], "found": [0, None], "peak_mb": 10.0}
    row |= {name: [] for name in ("first_token", "seconds", "warm_first_token", "warm")}
    scored = questions.score(row, rows, changed=False)
    assert [scored[kind]["exact_match"][0] for kind in ("year", "name", "all")] == [0.0, 100.0, 50.0]
    assert scored["all"]["contains"][0] == 100.0
    assert (scored["all"]["found"], scored["year"]["count"]) == (50.0, 1)


def test_the_interval_is_of_the_mean():
    from questions import interval

    mean, low, high = interval(np.array([0.0, 100.0] * 50))
    assert mean == 50.0 and 35 < low < 45 and 55 < high < 65
