"""An evaluation as text: the verdict, then tables."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import TYPE_CHECKING

from rich.console import Console, Group, RenderableType
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from ..errors import counted


if TYPE_CHECKING:
    from .interval import Interval
    from .result import Bucket, Evaluation, LeakageLevel, Offsets, SweepPoint

_WIDTH = 110


def plain_text(renderable: RenderableType) -> str:
    """Anything that rich can print, as plain text of 110 columns."""
    console = Console(width=_WIDTH, color_system=None, force_terminal=False, highlight=False)
    with console.capture() as captured:
        console.print(renderable)
    return "\n".join(line.rstrip() for line in captured.get().splitlines())


def number(value: float | None, form: str, missing: str = "") -> str:
    """A number in a format; `missing` if there is none."""
    return missing if value is None or math.isnan(value) else format(value, form)


def layout(evaluation: Evaluation) -> RenderableType:
    """The whole evaluation, for a terminal of any width."""
    verdict = evaluation.verdict
    parts: list[RenderableType] = [Text(verdict.text, style="bold")]
    parts += [Padding(Text(f"- {sentence}"), (0, 0, 0, 2)) for sentence in verdict.details]
    for title, table in _tables(evaluation):
        parts += [Text(), Text(title, style="bold"), table]
    parts += [Text(), *(Text(line) for line in _scored(evaluation))]
    return Group(*parts)


def _tables(evaluation: Evaluation) -> Iterator[tuple[str, Table]]:
    """Each table with its title."""
    off = evaluation.modes[0].bits_per_byte
    yield "Bits per byte", _modes(evaluation)
    if evaluation.leakage:
        title = (
            "By overlap: chunks that share a run of at most α of their tokens with one of their 10 nearest neighbors"
        )
        yield title, _leakage(evaluation.leakage)
    if evaluation.runs:
        yield (
            "Gain by run: tokens in a row, up to the predicted one, that a neighbor has too",
            _buckets(evaluation.runs),
        )
    if evaluation.overlap:
        yield "Gain by the overlap of the chunk", _buckets(evaluation.overlap)
    if evaluation.offsets:
        yield (
            "Bits per token by position in the chunk, without first chunks",
            _positions(evaluation, evaluation.offsets),
        )
    if evaluation.num_neighbors_sweep:
        yield "On with other numbers of neighbors, the same model", _sweep(evaluation.num_neighbors_sweep, off)
    if evaluation.fraction_sweep:
        yield "On with a fraction of the datastore's documents", _sweep(evaluation.fraction_sweep, off)


def _modes(evaluation: Evaluation) -> Table:
    columns = ("k", "bits/byte", "minus off", "95 % interval", "relative", "perplexity", "later chunks")
    table = _table("retrieval", *columns)
    # If no token could read a neighbor, every mode equals OFF.
    for mode in evaluation.modes if evaluation.on_minus_random else evaluation.modes[:1]:
        name = f"{mode.name} (cheating)" if mode.cheating else mode.name
        difference = _difference(mode.difference, evaluation.modes[0].bits_per_byte)
        count = str(mode.num_neighbors) if mode.num_neighbors else ""
        last = f"{mode.perplexity:.2f}", number(mode.later_chunks_bits_per_byte, ".4f")
        table.add_row(name, count, f"{mode.bits_per_byte:.4f}", *difference, *last)
    return table


def _leakage(levels: Sequence[LeakageLevel]) -> Table:
    names = list(levels[0].bits_per_byte)
    table = _table("α", "chunks", *names, "on minus off", "95 % interval", "relative")
    for level in levels:
        values = [number(level.bits_per_byte[name], ".4f") for name in names]
        difference = _difference(level.difference["on"], level.bits_per_byte["off"] or math.nan)
        table.add_row(f"{level.alpha:g}", f"{level.num_chunks:,}", *values, *difference)
    return table


def _buckets(buckets: Sequence[Bucket]) -> Table:
    table = _table("from", "to", "tokens", "gain, bits/token", "share of the gain")
    for bucket in buckets:
        high = "more" if bucket.high is None else f"{bucket.high:g}"
        gain, share = number(bucket.gain, "+.3f"), number(bucket.share, ".1%")
        table.add_row(f"{bucket.low:g}", high, f"{bucket.num_tokens:,}", gain, share)
    return table


def _positions(evaluation: Evaluation, offsets: Offsets) -> Table:
    """The first token on its own, because an error of one position would show there; the rest in four parts."""
    table = _table("token", *(mode.name for mode in evaluation.modes))
    size = len(offsets.num_tokens)
    for begin, end in pairwise(sorted({0, 1, *(1 + round((size - 1) * part / 4) for part in range(1, 5))})):
        counts = offsets.num_tokens[begin:end]
        row = []
        for mode in evaluation.modes:
            bits = offsets.bits_per_token[mode.name][begin:end]
            total = sum((value or 0.0) * count for value, count in zip(bits, counts, strict=True))
            row.append(f"{total / sum(counts):.3f}" if sum(counts) else "")
        table.add_row(str(end) if end == begin + 1 else f"{begin + 1} to {end}", *row)
    return table


def _sweep(points: Sequence[SweepPoint], off: float) -> Table:
    columns = ("documents", "k", "bits/byte", "minus off", "95 % interval", "relative", "share of the gain")
    table = _table("fraction", *columns)
    for point in points:
        fraction = "1" if point.fraction is None else f"{point.fraction:g}"
        row = (fraction, f"{point.num_documents:,}", str(point.num_neighbors), f"{point.bits_per_byte:.4f}")
        table.add_row(*row, *_difference(point.difference, off), number(point.gain_share, ".0%"))
    return table


def _scored(evaluation: Evaluation) -> Iterator[str]:
    inputs = evaluation.inputs
    yield (
        f"Scored: {counted(inputs.num_documents, 'document')}, {counted(inputs.num_tokens, 'token')}, "
        f"{counted(inputs.num_bytes, 'byte')} (all but each document's first token)."
    )
    leaked = [f"{one.id or 'without id'} (as {one.stored_id})" for one in inputs.leaked]
    copies = [f"{one.id} (of {one.copy_of})" for one in inputs.copies]
    for what, names in (
        ("LEAKAGE: documents found in the datastore, not scored", leaked),
        ("COPIES: documents with the text of another one, not scored", copies),
    ):
        if names:
            yield f"{what}: {len(names):,}; {', '.join(names[:3])}{', …' if len(names) > 3 else ''}."
    if inputs.num_same_id:
        yield f"Documents with the id of a stored one but other text, which gave them no neighbors: {inputs.num_same_id:,}."
    if inputs.num_short:
        yield f"Documents no longer than one chunk, for which nothing is retrieved in any mode: {inputs.num_short:,}."
    if inputs.num_unscorable:
        yield f"Documents that are empty, a single token or a single character, left out: {inputs.num_unscorable:,}."


def _table(*columns: str) -> Table:
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    for place, column in enumerate(columns):
        table.add_column(column, justify="right" if place else "left", no_wrap=True)
    return table


def _difference(interval: Interval | None, off: float) -> tuple[str, str, str]:
    if interval is None or math.isnan(interval.value):
        return "", "", ""
    ends = "one document" if math.isnan(interval.low) else f"[{interval.low:+.4f}, {interval.high:+.4f}]"
    return f"{interval.value:+.4f}", ends, f"{interval.value / off:+.1%}"
