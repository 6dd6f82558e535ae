"""The charts of an evaluation: which numbers each shows, in which words, and how it is drawn."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING

from .drawing import COLORS, STROKES, Chart, draw_legend, draw_line


if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from .bootstrap import Interval
    from .result import Bucket, Evaluation, Mode, SweepPoint

__all__ = ["charts_of"]


def charts_of(result: Evaluation) -> list[Chart]:
    """The charts that an evaluation has numbers for."""
    return [chart for make in (_differences, _leakage, _buckets, _offsets, _sweeps) for chart in make(result)]


def _number(value: float | None, form: str = ".4f") -> str:
    return "–" if value is None or math.isnan(value) else format(value, form)


def _interval(interval: Interval | None) -> str:
    return "–" if interval is None or math.isnan(interval.value) else interval.shown()


def _differences(result: Evaluation) -> Iterator[Chart]:
    if len(result.modes) < 2:
        return

    def draw(axes: Axes) -> None:
        for place, mode in enumerate(result.modes):
            if mode.difference is None:
                axes.axvline(0, color=COLORS["muted"], linewidth=1)
                continue
            value, color = mode.difference.value, COLORS[mode.name]
            axes.plot(value, place, "o", color=color, markersize=6)
            axes.plot([mode.difference.low, mode.difference.high], [place, place], color=color, linewidth=2.5)
            text = f"{value:+.4f}".replace("-", "−")
            axes.annotate(text, (value, place), (0, 7), textcoords="offset points", ha="center", fontsize=9)
        axes.set_yticks(range(len(result.modes)), [f"{mode.name} {mode.bits_per_byte:.4f}" for mode in result.modes])
        axes.set_ylim(len(result.modes) - 0.5, -0.7)
        axes.grid(axis="x")
        axes.grid(visible=False, axis="y")
        axes.margins(x=0.12)
        axes.set_xlabel("bits per byte minus off (left: retrieval helps)")

    yield Chart(
        "modes",
        "Against no retrieval",
        "Bits per byte of each mode, and how many it has more than off, with 95 % intervals over documents; left of zero "
        "it helps.",
        ["retrieval", "bits per byte", "minus off [95 % interval]"],
        [[mode.name, _number(mode.bits_per_byte), _interval(mode.difference)] for mode in result.modes],
        draw,
    )


def _leakage(result: Evaluation) -> Iterator[Chart]:
    levels = result.leakage
    if not levels:
        return
    modes = [mode for mode in STROKES if any(level.bits_per_byte.get(mode) is not None for level in levels)]
    alphas = [level.alpha for level in levels]

    def draw(axes: Axes) -> None:
        for mode in modes:
            draw_line(axes, mode, alphas, [level.bits_per_byte.get(mode) for level in levels])
        known = [level for level in levels if level.bits_per_byte.get("off") is not None and "on" in level.difference]
        edges = [(level.bits_per_byte["off"] or 0.0, level.difference["on"]) for level in known]
        axes.fill_between(
            [level.alpha for level in known],
            [off + interval.low for off, interval in edges],
            [off + interval.high for off, interval in edges],
            color=COLORS["on"],
            alpha=0.18,
            linewidth=0,
        )
        axes.set_xticks(alphas, [f"{alpha:g}" for alpha in alphas])
        axes.set_xlabel("α: at most so much of a chunk is in a neighbor")
        axes.set_ylabel("bits per byte")
        draw_legend(axes)

    yield Chart(
        "leakage",
        "Without near-copies",
        "Only chunks of which at most the share α stands, in a row, in one of their 10 nearest neighbors; α = 1 is all of "
        "them. A gain that is left at a small α is more than copying. The band is the 95 % interval of on minus off.",
        ["α", "chunks", *modes, "on minus off [95 % interval]"],
        [
            [
                f"{level.alpha:g}",
                f"{level.num_chunks:,}",
                *(_number(level.bits_per_byte.get(mode)) for mode in modes),
                _interval(level.difference.get("on")),
            ]
            for level in levels
        ],
        draw,
    )


def _buckets(result: Evaluation) -> Iterator[Chart]:
    yield from _bars(
        "overlap",
        "Gain by overlap",
        "Bits per token that retrieval saves, by how much of the token's chunk stands, in a row, in one of its 10 nearest "
        "neighbors. Above each bar: its share of the whole gain.",
        "overlap of the chunk, up to (%)",
        result.overlap,
        [f"{100 * (bucket.high or 0):g}" for bucket in result.overlap],
    )
    yield from _bars(
        "runs",
        "Gain by copied run",
        "Bits per token that retrieval saves, by how many tokens in a row, up to this one, a neighbor has that the model "
        "reads. Above each bar: its share of the whole gain.",
        "tokens in a row that a neighbor has",
        result.runs,
        [_span(bucket) for bucket in result.runs],
    )


def _span(bucket: Bucket) -> str:
    if bucket.high is None:
        return f"{bucket.low:g}+"
    return f"{bucket.low:g}" if bucket.low == bucket.high else f"{bucket.low:g}–{bucket.high:g}"


def _bars(
    name: str, title: str, caption: str, label: str, buckets: Sequence[Bucket], names: list[str]
) -> Iterator[Chart]:
    if not buckets:
        return

    def draw(axes: Axes) -> None:
        gains = [bucket.gain or 0.0 for bucket in buckets]
        colors = [COLORS["on"] if gain >= 0 else COLORS["random"] for gain in gains]
        bars = axes.bar(range(len(gains)), gains, color=colors, width=0.7)
        shares = ["" if bucket.share is None else f"{bucket.share:.0%}" for bucket in buckets]
        axes.bar_label(bars, shares, padding=2, fontsize=9, color=COLORS["muted"])
        axes.axhline(0, color=COLORS["muted"], linewidth=1)
        axes.margins(y=0.15)
        axes.set_xticks(range(len(names)), names)
        axes.set_xlabel(label)
        axes.set_ylabel("bits per token saved")

    rows = [
        [place, f"{bucket.num_tokens:,}", _number(bucket.gain, "+.3f"), _number(bucket.share, ".1%")]
        for place, bucket in zip(names, buckets, strict=True)
    ]
    yield Chart(name, title, caption, [label, "tokens", "bits per token saved", "share of the gain"], rows, draw)


def _offsets(result: Evaluation) -> Iterator[Chart]:
    offsets = result.offsets
    if offsets is None:
        return
    modes = [mode for mode in STROKES if mode in offsets.bits_per_token]
    places = range(1, len(offsets.num_tokens) + 1)

    def draw(axes: Axes) -> None:
        for mode in modes:
            stroke = {**STROKES[mode], "marker": None}
            values = [math.nan if value is None else value for value in offsets.bits_per_token[mode]]
            axes.plot(places, values, label=mode, color=COLORS[mode], **stroke)
        axes.set_xlabel("place of the token in its chunk")
        axes.set_ylabel("bits per token")
        draw_legend(axes)

    rows = [
        [
            str(place),
            f"{offsets.num_tokens[place - 1]:,}",
            *(_number(offsets.bits_per_token[mode][place - 1], ".3f") for mode in modes),
        ]
        for place in places
    ]
    yield Chart(
        "offsets",
        "Within the chunk",
        "Bits per token by the place in the chunk, in the chunks after the first. The first token of a chunk reads the "
        "neighbors, too: a gap that opens only after it would be an error of alignment.",
        ["place", "tokens", *modes],
        rows,
        draw,
    )


def _sweeps(result: Evaluation) -> Iterator[Chart]:
    if result.num_neighbors_sweep:
        yield _sweep(
            result,
            "neighbors",
            "By neighbors per chunk",
            "Bits per byte of on with more or fewer neighbors, the model as it is; and 95 % intervals.",
            "neighbors per chunk",
            {float(point.num_neighbors): point for point in result.num_neighbors_sweep},
            float(result.mode("on").num_neighbors),
        )
    if result.fraction_sweep:
        yield _sweep(
            result,
            "fractions",
            "By size of the datastore",
            "Bits per byte of on with a random part of the datastore's documents; and 95 % intervals.",
            "share of the datastore's documents",
            {point.fraction or 1.0: point for point in result.fraction_sweep},
            1.0,
        )


def _sweep(
    result: Evaluation,
    name: str,
    title: str,
    caption: str,
    label: str,
    swept: Mapping[float, SweepPoint],
    place_of_on: float,
) -> Chart:
    off, on = result.mode("off").bits_per_byte, result.mode("on")
    # The mode itself is a point, too.
    measured: dict[float, SweepPoint | Mode] = {place_of_on: on}
    measured.update(swept)
    places = sorted(measured)
    points = [measured[place] for place in places]

    def draw(axes: Axes) -> None:
        draw_line(axes, "on", places, [point.bits_per_byte for point in points])
        for place, point in zip(places, points, strict=True):
            if point.difference is not None:
                ends = [off + point.difference.low, off + point.difference.high]
                axes.plot([place, place], ends, color=COLORS["on"], linewidth=2.5, alpha=0.5)
        axes.axhline(off, label="off", color=COLORS["off"], linestyle="--")
        axes.set_xscale("log", base=2)
        axes.set_xticks(places, [f"{place:g}" for place in places])
        axes.minorticks_off()
        axes.set_xlabel(label)
        axes.set_ylabel("bits per byte")
        draw_legend(axes)

    gain = off - on.bits_per_byte
    rows = [
        [
            f"{place:g}",
            _number(point.bits_per_byte),
            _interval(point.difference),
            _number((off - point.bits_per_byte) / gain if gain > 0 else None, ".0%"),
        ]
        for place, point in zip(places, points, strict=True)
    ]
    header = [label, "bits per byte", "minus off [95 % interval]", "share of the gain"]
    return Chart(name, title, caption, header, rows, draw)
