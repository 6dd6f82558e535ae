"""The benchmark of swapped knowledge: its world holds no answer but on the cards, and the store follows every step."""

import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from datastore.fixtures import make_encoder

from retro_hf import ChunkEmbedder, RetroDatastore, RetroRetriever
from retro_hf.evaluation import score_answers


BENCHMARKS = Path(__file__).resolve().parents[1] / "benchmarks"


@pytest.fixture(autouse=True)
def benchmarks_on_the_path(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))


def test_the_world_is_closed_and_every_card_says_all():
    """Values come from lists of 400; names are cut into known syllables; a card fits into a neighbor but for its full stop."""
    from knowledge_world import VALUES, make_card, make_people, make_questions, make_tokenizer

    people = make_people(300, seed=0)
    assert len({person.name for person in people}) == 300
    assert all(200 <= len(set(values)) <= 1000 for values in VALUES.values())
    tokenizer = make_tokenizer()
    for person in people:
        card = make_card(person)
        assert card == make_card(person)
        assert card["text"].count(person.name) == len(VALUES)
        assert all(person.values[attribute] in VALUES[attribute] for attribute in VALUES)
        assert all(person.values[attribute] in card["text"] for attribute in VALUES)
        assert len(tokenizer(f"title: {card['title']}, source: {card['text']}").input_ids) <= 65
        assert len(tokenizer(person.name).input_ids) == 5
    questions = make_questions(people, seed=0, wordings=5)
    assert len(questions) == len({question["question"] for question in questions}) == 300 * 4 * 5
    texts = [make_card(person)["text"] for person in people] + [question["question"] for question in questions]
    assert not any(tokenizer.unk_token_id in ids for ids in tokenizer(texts).input_ids)
    # The encoder of the datastore reads what was written.
    assert tokenizer.decode(tokenizer(texts[0]).input_ids) == texts[0]


def test_rewriting_changes_every_value_of_exactly_half_of_the_people():
    from knowledge_world import VALUES, make_people, rewrite

    people = make_people(50, seed=0)
    rewritten = rewrite(people, seed=0, share=0.5)
    assert [person.name for person in rewritten] == [person.name for person in people]
    assert sum(new != old for new, old in zip(rewritten, people, strict=True)) == 25
    for new, old in zip(rewritten, people, strict=True):
        assert new == old or not any(new.values[attribute] == old.values[attribute] for attribute in VALUES)
        assert all(new.values[attribute] in VALUES[attribute] for attribute in VALUES)


def test_training_cards_contradict_each_other():
    """The same question has another answer in every edition, and its passages are those found, with the new values."""
    from datasets import Dataset
    from knowledge import in_editions
    from knowledge_world import make_card, make_people, make_questions, make_summaries

    people = make_people(6, seed=0)
    cards = [make_card(person) for person in people]
    asked = make_questions(people, seed=0) + make_summaries(people, seed=0)
    passages = [{"title": card["title"], "text": card["text"]} for card in cards]
    found = Dataset.from_list([row | {"passages": passages} for row in asked])
    rows = in_editions(found, people, editions=3)
    assert len(rows) == 3 * len(found) and rows[: len(found)] == found[:]
    for number, row in enumerate(asked):
        again = [rows[number + edition * len(found)] for edition in range(3)]
        assert {other["question"] for other in again} == {row["question"]}
        first, *later = (other["answers"][0] for other in again)
        assert first not in later
        for other in again:
            own = next(passage["text"] for passage in other["passages"] if passage["title"] == row["name"])
            assert all(value in own for value in other["answers"][0].split(", "))


def test_shares_and_their_intervals_count_people():
    """Four questions a person: the interval is that of the people, however many questions each is asked."""
    from knowledge_report import share

    values = np.repeat([True, True, True, False], 4)
    assert share(values)[0] == 75.0
    assert share(values, counted=~values)[0] == 0.0
    assert share(np.repeat([True, False], 200))[1] < share(np.arange(400) % 2 == 0)[1] == 50.0


def perfect_reader(model, questions, tokenizer, modes, **options):
    """Stands in for `answer_questions`: says what the passages say of the person, and nothing where they are silent."""
    from knowledge_world import VALUES

    def read(row) -> str:
        cards = [tokenizer.decode(ids) for ids in row["passage_input_ids"]]
        own = next((card for card in cards if card.startswith(f"title : {row['name']},")), "")
        return next((value for value in VALUES[row["attribute"]] if value in own), "")

    predictions = {mode: [read(row) if mode == "on" else "" for row in questions] for mode in modes}
    exact = {mode: score_answers(texts, questions["answers"])[0] for mode, texts in predictions.items()}
    return SimpleNamespace(predictions=predictions, exact_match=exact)


def test_a_perfect_reader_follows_every_change_of_the_store(tmp_path, monkeypatch):
    """Its answers are right exactly where the card is found: the new values after rewriting, none after deleting."""
    import knowledge
    from knowledge_world import make_card, make_people, make_tokenizer

    monkeypatch.setattr(knowledge, "answer_questions", perfect_reader)
    people = make_people(24, seed=0)
    embedder = ChunkEmbedder.from_pretrained(make_encoder(tmp_path / "encoder"), dtype=torch.float32)
    cards = [make_card(person) for person in people[8:]]
    sizes = {"chunk_size": knowledge.CHUNK, "neighbor_size": knowledge.NEIGHBOR}
    store = RetroDatastore.build(cards, tmp_path / "store", tokenizer=make_tokenizer(), embedder=embedder, **sizes)
    ask = knowledge.Examiner(None, RetroRetriever(store, embedder=embedder), num_passages=4, seed=0)
    swapped = knowledge.swap(ask, people[:8], embedder, seed=0)
    for label, row in swapped["rows"].items():
        assert row["on"] == ([0, 0, 0] if "old values" in label else row["found"]), label
    found = {label: row["found"][0] for label, row in swapped["rows"].items()}
    assert found["their cards are not in the store"] == found["their cards are deleted"] == 0
    assert 0 < found["their cards are appended"] == found["the first cards are restored"] < 100
    assert found["half of the cards are rewritten: new values of these"] > 0
    assert found["- the person's own card alone"] == 100
    assert swapped["answers_changed_by_restoring"] == 0


def test_store_follows_every_step_and_a_second_run_resumes(tmp_path):
    """A model of two training steps knows nothing, but cards come, change, go and come back, and so do its answers."""
    from knowledge import main

    def run(steps: int) -> dict:
        small = "--entities 24 --held-out 2 --hidden-size 16 --batch-size 4 --eval-steps 1 --passages 3".split()
        folders = {"--work": "work", "--out": "result.json", "--plot": "curves.png"}
        paths = [text for flag, name in folders.items() for text in (flag, str(tmp_path / name))]
        main([*small, *paths, "--steps", str(steps), "--embedder", str(encoder)])
        return json.loads((tmp_path / "result.json").read_text())

    torch.set_num_threads(1)
    encoder = make_encoder(tmp_path / "encoder")
    record = run(steps=2)
    rows = record["rows"]
    assert record["num_people"] == 6 and record["num_questions"] == 24
    assert rows["their cards are not in the store"]["found"] == rows["their cards are deleted"]["found"] == [0, 0, 0]
    assert rows["their cards are appended"]["found"][0] > 0
    assert rows["the first cards are restored"] == {
        name: rows["their cards are appended"][name] for name in ("found", "on")
    }
    assert record["answers_changed_by_restoring"] == 0
    assert set(record["predictions"]) and (tmp_path / "curves.png").stat().st_size > 1000

    # Two steps are not made again, and the same weights give the same table.
    again = run(steps=2)
    assert [entry for entry in again["log"] if "loss_on" in entry] == [e for e in record["log"] if "loss_on" in e]
    assert again["rows"] == rows
    longer = run(steps=3)
    assert [entry["step"] for entry in longer["log"] if "loss_on" in entry] == [1, 2, 3]
