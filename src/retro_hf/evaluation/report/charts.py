"""The charts of an evaluation: their numbers, their words, and how matplotlib draws them as SVG and PNG."""

from __future__ import annotations

import io
import math
import re
import textwrap
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ... import extras
from ..text import number


if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from ..interval import Interval
    from ..result import Bucket, Evaluation, Mode, SweepPoint

# The colors of the light page. Each is replaced by a variable of the page's style sheet, which also has dark ones.
_COLORS = {
    "fg": "#1b1d21",
    "muted": "#5d6371",
    "line": "#dfe2e6",
    "on": "#1d63b8",
    "off": "#6b7281",
    "random": "#b45309",
    "shuffled": "#8a3ffc",
    "oracle": "#0f766e",
    "in_context": "#be185d",
}
# Modes differ in more than their color.
_STROKES: dict[str, dict[str, Any]] = {
    "on": {"marker": "o"},
    "off": {"linestyle": "--"},
    "random": {"marker": "^", "linestyle": ":"},
    "shuffled": {"marker": "v", "linestyle": "-."},
    "oracle": {"marker": "s", "linewidth": 1.0},
    "in_context": {"marker": "D", "linestyle": "--"},
}
_STYLE: dict[Any, Any] = {
    "font.size": 10.5,
    "axes.edgecolor": _COLORS["muted"],
    "axes.grid": True,
    "axes.grid.axis": "y",
    "axes.axisbelow": True,
    "axes.labelcolor": _COLORS["muted"],
    "axes.spines.left": False,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "axes.titlelocation": "left",
    "axes.titleweight": "bold",
    "grid.color": _COLORS["line"],
    "legend.frameon": False,
    "legend.fontsize": 9.5,
    "lines.linewidth": 1.8,
    "lines.markersize": 4,
    "text.color": _COLORS["fg"],
    "xtick.color": _COLORS["muted"],
    "ytick.color": _COLORS["muted"],
    "ytick.left": False,
    # Text stays text, and the same numbers give the same bytes.
    "svg.fonttype": "none",
    "svg.hashsalt": "retro-hf",
}
_SIZE = (4.8, 2.9)


@dataclass(frozen=True)
class Chart:
    """One chart.

    Attributes:
        name (`str`): name of its PNG.
        title, caption (`str`): what it shows, and how to read it.
        header (`list[str]`), rows (`list[list[str]]`): its numbers as a table.
        draw (`Callable`): draws on matplotlib `Axes`.
    """

    name: str
    title: str
    caption: str
    header: list[str]
    rows: list[list[str]]
    draw: Callable[[Axes], None]


def charts_of(result: Evaluation) -> list[Chart]:
    """The charts that an evaluation has numbers for."""
    return [chart for make in (_modes, _leakage, _buckets, _offsets, _sweeps) for chart in make(result)]


def _modes(result: Evaluation) -> Iterator[Chart]:
    if len(result.modes) < 2:
        return

    def draw(axes: Axes) -> None:
        for place, mode in enumerate(result.modes):
            if mode.difference is None:
                axes.axvline(0, color=_COLORS["muted"], linewidth=1)
                continue
            value, color = mode.difference.value, _COLORS[mode.name]
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

    caption = (
        "Bits per byte of each mode, and the difference from off with its 95 % interval over documents; left of zero it "
        "helps."
    )
    rows = [[mode.name, _number(mode.bits_per_byte), _interval(mode.difference)] for mode in result.modes]
    header = ["retrieval", "bits per byte", "minus off [95 % interval]"]
    yield Chart("modes", "Against no retrieval", caption, header, rows, draw)


def _leakage(result: Evaluation) -> Iterator[Chart]:
    levels = result.leakage
    if not levels:
        return
    modes = [mode for mode in _STROKES if any(level.bits_per_byte.get(mode) is not None for level in levels)]
    alphas = [level.alpha for level in levels]

    def draw(axes: Axes) -> None:
        for mode in modes:
            _draw_line(axes, mode, alphas, [level.bits_per_byte.get(mode) for level in levels])
        known = [level for level in levels if level.bits_per_byte.get("off") is not None and "on" in level.difference]
        offs, differences = (
            [level.bits_per_byte["off"] or 0.0 for level in known],
            [level.difference["on"] for level in known],
        )
        axes.fill_between(
            [level.alpha for level in known],
            [off + interval.low for off, interval in zip(offs, differences, strict=True)],
            [off + interval.high for off, interval in zip(offs, differences, strict=True)],
            color=_COLORS["on"],
            alpha=0.18,
            linewidth=0,
        )
        axes.set_xticks(alphas, [f"{alpha:g}" for alpha in alphas])
        axes.set_xlabel("α: largest share of a chunk that is in a neighbor")
        axes.set_ylabel("bits per byte")
        _draw_legend(axes)

    caption = (
        "Only chunks that share a run of at most α of their tokens with one of their 10 nearest neighbors; α = 1 is all of "
        "them. A gain that remains at a small α is more than copying. The band is the 95 % interval of on minus off."
    )
    rows = []
    for level in levels:
        values = [_number(level.bits_per_byte.get(mode)) for mode in modes]
        rows.append([f"{level.alpha:g}", f"{level.num_chunks:,}", *values, _interval(level.difference.get("on"))])
    header = ["α", "chunks", *modes, "on minus off [95 % interval]"]
    yield Chart("leakage", "Without near-copies", caption, header, rows, draw)


def _buckets(result: Evaluation) -> Iterator[Chart]:
    if result.overlap:
        caption = (
            "Bits per token that retrieval saves, by the share of the token's chunk that is, in a row, in one of its 10 "
            "nearest neighbors. Above each bar: its share of the whole gain."
        )
        names = [f"{100 * (bucket.high or 0):g}" for bucket in result.overlap]
        label = "overlap of the chunk, up to (%)"
        yield _bars("overlap", ("Gain by overlap", caption, label), result.overlap, names)
    if result.runs:
        caption = (
            "Bits per token that retrieval saves, by how many tokens in a row, up to this one, are also in a neighbor that "
            "the model reads. Above each bar: its share of the whole gain."
        )
        label = "tokens in a row that a neighbor has"
        yield _bars(
            "runs", ("Gain by copied run", caption, label), result.runs, [_span(bucket) for bucket in result.runs]
        )


def _span(bucket: Bucket) -> str:
    if bucket.high is None:
        return f"{bucket.low:g}+"
    return f"{bucket.low:g}" if bucket.low == bucket.high else f"{bucket.low:g}–{bucket.high:g}"


def _bars(name: str, words: tuple[str, str, str], buckets: Sequence[Bucket], names: list[str]) -> Chart:
    """A chart with one bar for each bucket; `words` are its title, its caption, and what the buckets are of."""
    title, caption, label = words

    def draw(axes: Axes) -> None:
        gains = [bucket.gain or 0.0 for bucket in buckets]
        colors = [_COLORS["on"] if gain >= 0 else _COLORS["random"] for gain in gains]
        bars = axes.bar(range(len(gains)), gains, color=colors, width=0.7)
        shares = [number(bucket.share, ".0%") for bucket in buckets]
        axes.bar_label(bars, shares, padding=2, fontsize=9, color=_COLORS["muted"])
        axes.axhline(0, color=_COLORS["muted"], linewidth=1)
        axes.margins(y=0.15)
        axes.set_xticks(range(len(names)), names)
        axes.set_xlabel(label)
        axes.set_ylabel("bits per token saved")

    rows = [
        [place, f"{bucket.num_tokens:,}", _number(bucket.gain, "+.3f"), _number(bucket.share, ".1%")]
        for place, bucket in zip(names, buckets, strict=True)
    ]
    return Chart(name, title, caption, [label, "tokens", "bits per token saved", "share of the gain"], rows, draw)


def _offsets(result: Evaluation) -> Iterator[Chart]:
    offsets = result.offsets
    if offsets is None:
        return
    bits = {mode: offsets.bits_per_token[mode] for mode in _STROKES if mode in offsets.bits_per_token}
    places = range(1, len(offsets.num_tokens) + 1)

    def draw(axes: Axes) -> None:
        for mode, values in bits.items():
            _draw_line(axes, mode, places, values, marker=None)
        axes.set_xlabel("position of the token in its chunk")
        axes.set_ylabel("bits per token")
        _draw_legend(axes)

    rows = []
    for place in places:
        values = [_number(bits[mode][place - 1], ".3f") for mode in bits]
        rows.append([str(place), f"{offsets.num_tokens[place - 1]:,}", *values])
    caption = (
        "Bits per token by position in the chunk, in the chunks after the first. The first token of a chunk reads the "
        "neighbors, too: a gap that opens only after it would be an error of alignment."
    )
    yield Chart("offsets", "Within the chunk", caption, ["position", "tokens", *bits], rows, draw)


def _sweeps(result: Evaluation) -> Iterator[Chart]:
    if result.num_neighbors_sweep:
        caption = "Bits per byte of on with more or fewer neighbors, the same model, with 95 % intervals."
        words = "By neighbors per chunk", caption, "neighbors per chunk"
        swept: dict[float, SweepPoint | Mode] = {float(result.mode("on").num_neighbors): result.mode("on")}
        swept |= {float(point.num_neighbors): point for point in result.num_neighbors_sweep}
        yield _sweep("neighbors", words, result.mode("off").bits_per_byte, result.mode("on").bits_per_byte, swept)
    if result.fraction_sweep:
        caption = "Bits per byte of on with a random part of the datastore's documents, with 95 % intervals."
        words = "By size of the datastore", caption, "share of the datastore's documents"
        swept = {1.0: result.mode("on")} | {point.fraction or 1.0: point for point in result.fraction_sweep}
        yield _sweep("fractions", words, result.mode("off").bits_per_byte, result.mode("on").bits_per_byte, swept)


def _sweep(
    name: str, words: tuple[str, str, str], off: float, on: float, swept: dict[float, SweepPoint | Mode]
) -> Chart:
    """A chart of ON at several places; `words` are its title, its caption, and what the places are."""
    title, caption, label = words
    places = sorted(swept)
    points = [swept[place] for place in places]

    def draw(axes: Axes) -> None:
        _draw_line(axes, "on", places, [point.bits_per_byte for point in points])
        for place, point in zip(places, points, strict=True):
            if point.difference is not None:
                ends = [off + point.difference.low, off + point.difference.high]
                axes.plot([place, place], ends, color=_COLORS["on"], linewidth=2.5, alpha=0.5)
        axes.axhline(off, label="off", color=_COLORS["off"], linestyle="--")
        axes.set_xscale("log", base=2)
        axes.set_xticks(places, [f"{place:g}" for place in places])
        axes.minorticks_off()
        axes.set_xlabel(label)
        axes.set_ylabel("bits per byte")
        _draw_legend(axes)

    rows = []
    for place, point in zip(places, points, strict=True):
        share = _number((off - point.bits_per_byte) / (off - on) if off > on else None, ".0%")
        rows.append([f"{place:g}", _number(point.bits_per_byte), _interval(point.difference), share])
    header = [label, "bits per byte", "minus off [95 % interval]", "share of the gain"]
    return Chart(name, title, caption, header, rows, draw)


def _number(value: float | None, form: str = ".4f") -> str:
    return number(value, form, missing="–")


def _interval(interval: Interval | None) -> str:
    return "–" if interval is None or math.isnan(interval.value) else interval.shown()


def _draw_legend(axes: Axes) -> None:
    """The modes of a chart, above it."""
    axes.legend(
        loc="lower left", bbox_to_anchor=(-0.02, 1.0), ncols=5, columnspacing=1.0, handlelength=1.8, handletextpad=0.5
    )


def _draw_line(axes: Axes, mode: str, xs: Sequence[float], ys: Sequence[float | None], **stroke: Any) -> None:
    """One mode as a line, with a gap where a value is missing."""
    values = [math.nan if y is None else y for y in ys]
    axes.plot(xs, values, label=mode, color=_COLORS[mode], **{**_STROKES[mode], **stroke})


def to_svg(chart: Chart) -> str:
    """A chart as an `<svg>` element for the page, as wide as its place and colored by variables such as `var(--on)`."""
    # A date would change from run to run.
    metadata = dict.fromkeys(("Creator", "Date", "Format", "Type"))
    svg = _drawn([chart], title=False, format="svg", transparent=True, metadata=metadata).decode()
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg[svg.index("<svg") :], flags=re.DOTALL)
    start, end, rest = svg.partition(">")
    svg = re.sub(r' (width|height|xmlns(:xlink)?)="[^"]*"', "", start) + end + rest
    # Ids must be unique in a page of many charts.
    svg = re.sub(r'( id="|url\(#|href="#)', rf"\1{chart.name}-", svg)
    for name, color in _COLORS.items():
        svg = svg.replace(color, f"var(--{name})")
    return svg


def to_png(charts: Sequence[Chart], heading: str | None = None) -> bytes:
    """Charts side by side as a PNG on white, with an optional line above them all."""
    return _drawn(charts, heading=heading, format="png", dpi=160)


def _drawn(charts: Sequence[Chart], *, title: bool = True, heading: str | None = None, **options: Any) -> bytes:
    style = extras.load("matplotlib.style", "The report")
    figures = extras.load("matplotlib.figure", "The report")
    columns = min(3, len(charts))
    rows = math.ceil(len(charts) / columns)
    buffer = io.BytesIO()
    # The user's own plot style must not show in the report.
    with style.context(["default", _STYLE]):
        figure = figures.Figure(figsize=(_SIZE[0] * columns, _SIZE[1] * rows), layout="constrained")
        for place, chart in enumerate(charts, start=1):
            axes = figure.add_subplot(rows, columns, place)
            if title:
                axes.set_title(chart.title, pad=24)  # room for the legend
            chart.draw(axes)
        if heading:
            figure.suptitle(textwrap.fill(heading, 50 * columns), x=0.01, horizontalalignment="left")
        figure.savefig(buffer, **options)
    return buffer.getvalue()
