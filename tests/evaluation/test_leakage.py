"""Documents in the datastore: the shares of 13-grams are those counted by hand."""

import pytest
from datastore.fixtures import corpus
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from retro_hf.datastore.duplicates import stored_documents
from retro_hf.evaluation.leakage import copied_documents, leaked_documents
from retro_hf.evaluation.scoring import read_documents


def grams(tokens: list[int]) -> set[tuple[int, ...]]:
    """A short document is one gram."""
    return {tuple(tokens[start : start + 13]) for start in range(max(1, len(tokens) - 12))}


@given(
    parts=st.lists(st.tuples(st.integers(0, 39), st.floats(0, 1), st.floats(0, 1)), min_size=1, max_size=4),
    words=st.integers(0, 20),
)
@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_shares_equal_a_count_by_hand(world, parts, words):
    """Stretches of stored documents put together, with new words at the end."""
    texts = [row["text"] for row in corpus()]
    pieces = []
    for number, start, end in parts:
        split = texts[number].split()
        first, last = sorted((round(start * len(split)), round(end * len(split))))
        pieces += split[first:last]
    text = " ".join([*pieces, *["umbrella"] * words])
    documents = [one for one in read_documents([text, texts[0]], world.tokenizer) if len(one.input_ids)]
    stored = {
        id: tokens.tolist()
        for ids, rows in stored_documents(world.datastore)
        for id, tokens in zip(ids, rows, strict=True)
    }
    found = leaked_documents(documents, world.datastore)
    assert len(stored) == 40
    for place, document in enumerate(documents):
        own = grams(document.input_ids.tolist())
        shares = {id: len(own & grams(tokens)) / len(own) for id, tokens in stored.items()}
        best = max(shares.values())
        assert (place in found) == (best >= 0.8)
        if place in found:
            assert found[place].contained == pytest.approx(best, abs=1e-4)
            assert shares[found[place].stored_id] == best


def test_deleted_documents_are_not_leaks(world, tmp_path):
    """And nothing is looked for where there is nothing."""
    store = world.datastore.subset(tmp_path / "store", ids=["doc-1", "doc-2"])
    documents = list(read_documents([row["text"] for row in corpus()[:3]], world.tokenizer))
    assert {one.stored_id for one in leaked_documents(documents, store).values()} == {"doc-1", "doc-2"}
    store.delete(["doc-1"])
    assert {one.stored_id for one in leaked_documents(documents, store).values()} == {"doc-2"}
    assert not leaked_documents([], store)


def test_copies_are_found_by_their_text(world):
    """Of a copy, a part, and one with a word changed the longest is kept; of equal ones the first."""
    texts = [row["text"] for row in corpus(40, seed=3) if len(row["text"].split()) > 60][:4]
    words = texts[2].split()
    inputs = [
        " ".join(words[:40]),
        *texts,
        texts[0],
        " ".join([*texts[1].split()[:-1], "lighthouse"]),
        "the river",
        "the river",
        "a river",
    ]
    documents = list(read_documents(inputs, world.tokenizer))
    names = [f"number {place}" for place in range(len(inputs))]
    found = {place: one.copy_of for place, one in copied_documents(documents, names).items()}
    assert found == {0: "number 3", 5: "number 1", 6: "number 2", 8: "number 7"}
    assert not copied_documents(list(read_documents(texts, world.tokenizer)), names)
