"""The answer in words: whether retrieval helps, does nothing or hurts, whether the retriever works, and what is copied."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import pairwise

from ..errors import counted
from .interval import Interval
from .result import Bucket, InContext, LeakageLevel, Mode, Similarity, SweepPoint, Verdict


# A token that ends a run of this many tokens from a neighbor counts as copied.
_COPIED_RUN = 5
_MOSTLY = 0.5
# Percentile intervals of few documents are too narrow. In 2,000 trials they held the truth 51 % of the time with 2
# documents, 84 % with 5, 91 % with 10, 92 % with 20 and 94 % with 30 (normal differences); 45, 79, 87, 90 and 92 % with
# skewed ones. From 20 documents on, an interval that excludes 0 can be trusted.
_FEW_DOCUMENTS = 20
# A tenth of a datastore should not bring 80 % of the gain, and more neighbors should not be worse than one.
_SMALL_FRACTION, _LARGE_SHARE = 0.1, 0.8
_WORSE_WITH_MORE = 0.005


def not_measured(reason: str) -> Verdict:
    """The verdict if there is nothing to compare."""
    return Verdict("not_measured", None, f"Not measured: {reason}", [])


def nothing_found(num_chunks: int) -> Verdict:
    """The verdict on a retriever that has no neighbor for any chunk."""
    text = f"The retriever looks broken: it found nothing for any of {counted(num_chunks, 'chunk')} that could read, so ON is OFF."
    detail = 'Is there anything left in the datastore? Look at what it finds: `retro search STORE "some text"`.'
    return Verdict("broken", None, text, [detail])


def give_verdict(
    modes: Mapping[str, Mode],
    on_minus_random: Interval,
    similarity: Similarity,
    runs: Sequence[Bucket],
    leakage: Sequence[LeakageLevel],
    *,
    num_documents: int,
) -> Verdict:
    """Compare OFF, ON and RANDOM.

    Two signs must agree before ON is called better than random: the model predicts better with the neighbors, and the
    neighbors share more tokens with the text. A retriever that returns random chunks shows neither; each happens by
    chance once in 40 times. Where words cannot agree (another language), a difference far outside its interval is enough.

    Args:
        modes (`dict[str, Mode]`): with `off`, `on` and `random`.
        num_documents (`int`): documents of which a token could read a neighbor, which intervals draw.
    """
    off, on, random = (modes[name] for name in ("off", "on", "random"))
    # Every mode but off has a difference.
    difference = on.difference or Interval(math.nan, math.nan, math.nan)
    cost = random.difference or Interval(math.nan, math.nan, math.nan)
    figures = (
        f"{on.bits_per_byte:.4f} bits/byte ON, {off.bits_per_byte:.4f} OFF ({_relative(difference, off)}), "
        f"{random.bits_per_byte:.4f} RANDOM"
    )
    if math.isnan(difference.low):
        return not_measured(
            "of the documents only one goes beyond its first chunk, where reading begins, and one gives no interval "
            f"({figures}). Score more documents."
        )
    details, few = [], ""
    if num_documents < _FEW_DOCUMENTS:
        few = f" (only {counted(num_documents, 'document')}, too few to trust an interval)"
        details.append(
            f"The intervals rest on {counted(num_documents, 'document')}, and those of few are too narrow: with 5 documents "
            f"they hold the truth about 4 times in 5. Score {_FEW_DOCUMENTS} or more that are longer than a chunk."
        )
    if difference == cost == Interval(0.0, 0.0, 0.0):
        text = f"Retrieval does nothing{few}: ON, OFF and RANDOM are the same to the last bit ({figures})."
        details.append(
            "What is retrieved does not reach the output. A fresh RETROfit is like that until it is trained."
        )
        return Verdict("nothing", None, text, details)
    # `beyond_doubt`: the interval is farther from 0 than it is wide.
    model_says = on_minus_random.high < 0
    beyond_doubt = on_minus_random.high < on_minus_random.low - on_minus_random.high
    if not beyond_doubt and not (model_says and similarity.difference.low > 0):
        if num_documents < _FEW_DOCUMENTS and similarity.difference.low <= 0 < similarity.difference.high:
            return not_measured(
                f"{counted(num_documents, 'document')} are too few to tell whether the retriever works. Its neighbors "
                f"{_shares(similarity)}; {figures}. Score more documents."
            )
        gap = f"ON minus RANDOM {on_minus_random.shown()}"
        outcome, text, detail = _no_better_than_random(difference, gap, similarity, few, figures)
        return Verdict(outcome, None, text, [*details, detail])
    # Some models predict better after any text. A gain that random neighbors bring, too, is not due to the retriever.
    blind = ""
    if cost.high < 0:
        part = cost.value / difference.value if difference.value < 0 else math.nan
        if _MOSTLY < part:
            blind = f", but random neighbors bring {part:.0%} of the gain"
        details.append(
            f"RANDOM neighbors beat OFF, too, by {-cost.value:.4f} bits/byte"
            + (f", {part:.0%} of what ON gains: that part owes nothing to what was retrieved." if part < 1 else ".")
        )
    if difference.low > 0:
        details.append(
            "The retriever works (ON beats RANDOM), but the model predicts better without: the datastore may be of another "
            "domain than these documents, or the model has learned to trust whatever it reads (train with "
            "`random_neighbor_probability`)."
        )
        return Verdict("hurts", None, f"Retrieval hurts{few}: {figures}.", details)
    if difference.high >= 0:
        details.append("The retriever works (ON beats RANDOM). More documents make the interval narrower.")
        text = f"Retrieval does nothing measurable{few}: {figures}; the interval includes 0."
        return Verdict("nothing", None, text, details)
    copied = sum(bucket.share or 0.0 for bucket in runs if bucket.low >= _COPIED_RUN)
    copying = copied > _MOSTLY
    text = (
        f"Retrieval helps{blind}{few}: {figures}. {'Mostly' if copying else 'Partly'} copying: {copied:.0%} of the gain is on "
        f"tokens that end a run of {_COPIED_RUN} or more tokens which a neighbor has word for word."
    )
    details.append(_little_overlap(leakage[0]))
    if cost.low > 0:
        details.append(
            f"RANDOM neighbors cost {cost.value:.4f} bits/byte against OFF: the model trusts what it reads, so a bad "
            "retriever would do harm."
        )
    return Verdict("helps", copying, text, details)


def in_context_note(modes: Mapping[str, Mode], found: InContext) -> str:
    """ON beside the base with the neighbors in its prompt, and the cost of that."""
    difference, rival = found.on_minus_in_context, modes["in_context"].bits_per_byte
    level = "better" if difference.high < 0 else "worse" if difference.low > 0 else "not measurably better or worse"
    cut = f" {counted(found.num_cut, 'token')} had less text before them, to fit the context." if found.num_cut else ""
    return (
        f"The base with the same neighbors in its prompt has {rival:.4f} bits/byte: ON is {level} ({difference.shown()}). The "
        f"prompts send {found.num_read / max(found.num_read_off, 1):.1f} times the tokens of OFF through the base.{cut}"
    )


def oracle_notes(modes: Mapping[str, Mode]) -> list[str]:
    """What it means that ON is better than the oracle, if it is."""
    if "oracle" not in modes or modes["on"].bits_per_byte >= modes["oracle"].bits_per_byte:
        return []
    return [
        "ON is better than the oracle, which is not a bound: it looks up the answer instead of the question, and the chunks "
        "most like an answer are not always those that help most to predict it."
    ]


def sweep_warnings(num_neighbors: Sequence[SweepPoint], fractions: Sequence[SweepPoint]) -> list[str]:
    """Warnings about what sweeps should not show, if they do."""
    found = []
    for fewer, more in pairwise(sorted(num_neighbors, key=lambda point: point.num_neighbors)):
        if fewer.num_neighbors == 1 and more.bits_per_byte > fewer.bits_per_byte + _WORSE_WITH_MORE:
            found.append(
                f"{more.num_neighbors} neighbors are worse than one by {more.bits_per_byte - fewer.bits_per_byte:.4f} "
                "bits/byte: the model does not merge neighbors well, or those after the first are bad."
            )
    found += [
        f"{point.fraction:.0%} of the datastore bring {point.gain_share:.0%} of the gain: little of it comes from the size "
        "of the datastore."
        for point in fractions
        if point.fraction and point.fraction <= _SMALL_FRACTION and (point.gain_share or 0.0) > _LARGE_SHARE
    ]
    return found


def _no_better_than_random(
    difference: Interval, gap: str, similarity: Similarity, few: str, figures: str
) -> tuple[str, str, str]:
    """Outcome, text and detail if ON is not better than RANDOM: is it the retriever or the model?"""
    words = f"they {_shares(similarity)}"
    if similarity.difference.low <= 0:
        level = "worse than" if difference.low > 0 else "better than" if difference.high < 0 else "level with"
        text = (
            f"The retriever looks broken, or the datastore is of another domain{few}: its neighbors are no nearer to the text "
            f"than random chunks ({words}). ON is {level} OFF: {figures}."
        )
        return "broken", text, f'{gap} bits/byte. Look at what it finds: `retro search STORE "some text"`.'
    outcome, effect = "nothing", "does nothing measurable"
    if difference.low > 0:
        outcome, effect = "hurts", "hurts"
    elif difference.high < 0:
        effect = "does nothing that random neighbors would not do"
    text = (
        f"Retrieval {effect}{few}: the neighbors are worth no more to the model than random ones ({gap}). {figures}."
    )
    detail = (
        f"The retriever does find nearer chunks ({words}), so either the model does not use what it reads (an untrained or "
        "broken path), or the datastore has nothing to say on these documents (another domain)."
    )
    return outcome, text, detail


def _shares(similarity: Similarity) -> str:
    return (
        f"share {similarity.on:.1%} of a chunk's tokens, random ones {similarity.random:.1%}, difference "
        f"{similarity.difference.shown('+.1%')}"
    )


def _relative(difference: Interval, off: Mode) -> str:
    value, low, high = (part / off.bits_per_byte for part in (difference.value, difference.low, difference.high))
    return f"{value:+.1%}" if math.isnan(low) else f"{value:+.1%}, 95 % interval {low:+.1%} to {high:+.1%}"


def _little_overlap(level: LeakageLevel) -> str:
    on, off = level.bits_per_byte["on"], level.bits_per_byte["off"]
    if not on or not off:
        return (
            f"No chunk shares as little as {level.alpha:.1%} of its length with the datastore: this text repeats it."
        )
    return (
        f"Where a chunk shares at most {level.alpha:.1%} of its length with its nearest neighbors "
        f"({counted(level.num_chunks, 'chunk')}), ON is {on:.4f} and OFF {off:.4f} bits/byte "
        f"({level.difference['on'].shown()})."
    )
