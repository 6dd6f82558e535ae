"""The verdict on figures that are given: each outcome is called by its name, and for the right reason."""

import math

import pytest

from retro_hf.evaluation import Interval
from retro_hf.evaluation.result import Bucket, LeakageLevel, Mode, Similarity, SweepPoint
from retro_hf.evaluation.verdict import give_verdict, oracle_notes, sweep_warnings


def around(value: float, half: float = 0.01) -> Interval:
    return Interval(value, value - half, value + half)


def mode(name: str, bits: float, difference: Interval | None) -> Mode:
    return Mode(name, False, 2, bits, 4 * bits, 2 ** (4 * bits), difference, bits, difference)


def verdict(
    on: Interval,
    random: Interval,
    gap: Interval,
    words: float = 0.3,
    copied: float = 0.2,
    documents: int = 100,
    half: float = 0.01,
):
    off = 2.0
    modes = {
        "off": mode("off", off, None),
        "on": mode("on", off + on.value, on),
        "random": mode("random", off + random.value, random),
    }
    runs = [Bucket(0, 4, 100, 0.1, 1 - copied), Bucket(5, None, 100, 0.1, copied)]
    leakage = [LeakageLevel(0.125, 5, 50, 200, {"off": 2.1, "on": 2.0}, {"on": around(-0.1)})]
    similarity = Similarity(0.1 + words, 0.1, around(words, half))
    return give_verdict(modes, gap, similarity, runs, leakage, num_documents=documents)


@pytest.mark.parametrize(
    ("on", "random", "gap", "words", "outcome", "says"),
    [
        (around(-0.5), around(0.1), around(-0.6), 0.3, "helps", "Retrieval helps: 1.5000 bits/byte ON, 2.0000 OFF"),
        (around(0.2), around(0.5), around(-0.3), 0.3, "hurts", "Retrieval hurts"),
        (around(0.0), around(0.5), around(-0.5), 0.3, "nothing", "the interval includes 0"),
        # No better than random: the retriever, if words say so, else the model or the datastore.
        (around(0.1), around(0.1), around(0.0), 0.0, "broken", "The retriever looks broken"),
        (around(-0.1), around(-0.1), around(0.0), 0.0, "broken", "no nearer to the text than random"),
        (around(0.1), around(0.1), around(0.0), 0.3, "hurts", "no more to the model than random"),
        (around(0.0), around(0.0), around(0.001), 0.3, "nothing", "no more to the model than random"),
        (around(-0.1), around(-0.1), around(0.0), 0.3, "nothing", "nothing that random neighbors would not do"),
        # By chance one of the two signs looks right.
        (around(-0.1), around(-0.085), around(-0.015), 0.0, "broken", "The retriever looks broken"),
        # Another language shares no words, and helps beyond doubt.
        (around(-0.5), around(0.1), around(-0.6), 0.0, "helps", "Retrieval helps"),
    ],
)  # fmt: skip
def test_figures_give_the_right_outcome(on, random, gap, words, outcome, says):
    found = verdict(on, random, gap, words)
    assert (found.outcome, says in found.text) == (outcome, True), found.text


def test_copying_is_more_than_half_of_the_gain():
    for share, copying in ((0.49, False), (0.51, True)):
        found = verdict(around(-0.5), around(0.1), around(-0.6), copied=share)
        assert found.copying is copying
        assert ("Mostly copying" in found.text) is copying and f"{share:.0%} of the gain" in found.text


def test_neighbors_without_any_effect_are_reported():
    """A fresh RETROfit: all the same, to the last bit."""
    zero = Interval(0.0, 0.0, 0.0)
    found = verdict(zero, zero, zero)
    assert found.outcome == "nothing" and "to the last bit" in found.text


def test_single_document_gives_no_verdict_and_few_are_called_few():
    lone = Interval(-0.5, math.nan, math.nan)
    assert verdict(lone, lone, lone).outcome == "not_measured"
    few = verdict(around(-0.5), around(0.1), around(-0.6), documents=7)
    assert few.text.startswith("Retrieval helps (only 7 documents, too few to trust an interval): 1.5000 bits/byte ON")
    assert "rest on 7 documents" in few.details[0]
    # Hurts, nothing measurable, no better than random; and broken.
    for on, gap, words in ((0.2, -0.3, 0.3), (0.0, -0.5, 0.3), (0.0, 0.0, 0.3), (0.1, 0.0, -0.05)):
        found = verdict(around(on), around(0.5), around(gap), words, documents=19)
        assert "(only 19 documents, too few to trust an interval):" in found.text
    assert "only" not in verdict(around(-0.5), around(0.1), around(-0.6), documents=20).text


def test_interval_is_shown_or_said_to_be_unknown():
    assert Interval(-0.5, -0.75, -0.25).shown("+.1%") == "-50.0% [-75.0%, -25.0%]"
    assert Interval(-0.5, math.nan, math.nan).shown() == "-0.5000, no interval: one document"
    assert Interval(math.nan, math.nan, math.nan).shown() == "not known: no document"


def test_few_documents_do_not_make_a_retriever_broken():
    """Where their interval holds both: neighbors that are nearer, and neighbors that are not."""
    same = (around(-0.1), around(-0.1), around(0.0))
    found = verdict(*same, words=0.12, documents=4, half=0.15)
    assert found.outcome == "not_measured" and found.text.startswith("Not measured: 4 documents are too few to tell")
    assert "22.0%" in found.text and "10.0%" in found.text and "[-3.0%, +27.0%]" in found.text
    assert verdict(*same, words=0.12, documents=40, half=0.15).outcome == "broken"
    assert verdict(*same, words=-0.05, documents=4).outcome == "broken"


def test_gain_that_random_neighbors_also_bring_is_reported():
    found = verdict(around(-0.5), around(-0.2), around(-0.3))
    assert found.outcome == "helps" and any("40% of what ON gains" in line for line in found.details)
    assert found.text.startswith("Retrieval helps: ")
    found = verdict(around(-0.5), around(-0.4), around(-0.1))
    assert found.text.startswith("Retrieval helps, but random neighbors bring 80% of the gain: ")


def test_on_better_than_the_oracle_is_explained():
    modes = {name: mode(name, bits, None) for name, bits in (("on", 1.5), ("oracle", 1.51))}
    assert "not a bound" in oracle_notes(modes)[0]
    assert not oracle_notes({**modes, "oracle": mode("oracle", 1.4, None)}) and not oracle_notes({"on": modes["on"]})


def test_suspicious_sweeps_give_a_warning():
    def point(number: int, bits: float, fraction: float | None = None, share: float | None = None) -> SweepPoint:
        return SweepPoint(number, fraction, 10, 100, bits, around(-0.1), share)

    assert not sweep_warnings([point(1, 1.5), point(2, 1.4), point(40, 1.6)], [point(2, 1.9, 0.1, 0.2)])
    assert "worse than one" in sweep_warnings([point(2, 1.51), point(1, 1.5)], [])[0]
    assert (
        "10% of the datastore bring 90%" in sweep_warnings([], [point(2, 1.5, 0.1, 0.9), point(2, 1.5, 0.5, 0.95)])[0]
    )
