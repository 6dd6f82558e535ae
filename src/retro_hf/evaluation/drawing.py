"""Charts drawn once by matplotlib: as SVG for the page, which colours them, and as PNG."""

from __future__ import annotations

import io
import math
import re
import textwrap
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from .. import extras


if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["COLORS", "STROKES", "Chart", "draw_legend", "draw_line", "to_png", "to_svg"]

# The colours of the light page. Each stands for one variable of the page's style sheet, which knows the dark ones, too.
COLORS = {
    "fg": "#1b1d21",
    "muted": "#5d6371",
    "line": "#dfe2e6",
    "on": "#1d63b8",
    "off": "#6b7281",
    "random": "#b45309",
    "shuffled": "#8a3ffc",
    "oracle": "#0f766e",
}
# Modes differ by more than their colour.
STROKES: dict[str, dict[str, Any]] = {
    "on": {"marker": "o"},
    "off": {"linestyle": "--"},
    "random": {"marker": "^", "linestyle": ":"},
    "shuffled": {"marker": "v", "linestyle": "-."},
    "oracle": {"marker": "s", "linewidth": 1.0},
}
_STYLE: dict[Any, Any] = {
    "font.size": 10.5,
    "axes.edgecolor": COLORS["muted"],
    "axes.grid": True,
    "axes.grid.axis": "y",
    "axes.axisbelow": True,
    "axes.labelcolor": COLORS["muted"],
    "axes.spines.left": False,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "axes.titlelocation": "left",
    "axes.titleweight": "bold",
    "grid.color": COLORS["line"],
    "legend.frameon": False,
    "legend.fontsize": 9.5,
    "lines.linewidth": 1.8,
    "lines.markersize": 4,
    "text.color": COLORS["fg"],
    "xtick.color": COLORS["muted"],
    "ytick.color": COLORS["muted"],
    "ytick.left": False,
    # Text stays text, and the same numbers give the same bytes.
    "svg.fonttype": "none",
    "svg.hashsalt": "retro-hf",
}
_SIZE = (4.8, 2.9)


@dataclass(frozen=True)
class Chart:
    """One chart: its words, its numbers as a table, and how it is drawn.

    Attributes:
        name (`str`): of its PNG.
        title, caption (`str`): what it shows, and how to read it.
        header (`list[str]`), rows (`list[list[str]]`): the numbers.
        draw (`Callable`): draws on matplotlib `Axes`.
    """

    name: str
    title: str
    caption: str
    header: list[str]
    rows: list[list[str]]
    draw: Callable[[Axes], None]


def to_svg(chart: Chart) -> str:
    """A chart as an `<svg>` element for the page: as wide as its place, coloured by `var(--on)` and its like."""
    figure = _figure([chart], title=False)
    # Unknown metadata and the date would change from run to run.
    buffer = _saved(
        figure, format="svg", transparent=True, metadata=dict.fromkeys(("Creator", "Date", "Format", "Type"))
    )
    svg = buffer.decode()
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg[svg.index("<svg") :], flags=re.DOTALL)
    start, end, rest = svg.partition(">")
    svg = re.sub(r' (width|height|xmlns(:xlink)?)="[^"]*"', "", start) + end + rest
    # Names are unique in a page of many charts.
    svg = re.sub(r'( id="|url\(#|href="#)', rf"\1{chart.name}-", svg)
    for name, color in COLORS.items():
        svg = svg.replace(color, f"var(--{name})")
    return svg


def to_png(charts: Sequence[Chart], heading: str | None = None) -> bytes:
    """Charts side by side as a PNG on white, for a README.

    Args:
        heading (`str`, *optional*): a line above them all.
    """
    return _saved(_figure(charts, heading=heading), format="png", dpi=160)


def _figure(charts: Sequence[Chart], *, title: bool = True, heading: str | None = None) -> Any:
    style = extras.load("matplotlib.style", "The report")
    figures = extras.load("matplotlib.figure", "The report")
    columns = min(3, len(charts))
    rows = math.ceil(len(charts) / max(columns, 1))
    # Not in the style that its user has set up for plots.
    with style.context(["default", _STYLE]):
        figure = figures.Figure(figsize=(_SIZE[0] * columns, _SIZE[1] * rows), layout="constrained")
        for number, chart in enumerate(charts, start=1):
            axes = figure.add_subplot(rows, columns, number)
            if title:
                axes.set_title(chart.title, pad=24)  # room for the legend
            chart.draw(axes)
        if heading:
            figure.suptitle(textwrap.fill(heading, 50 * columns), x=0.01, horizontalalignment="left")
    return figure


def _saved(figure: Any, **options: Any) -> bytes:
    from matplotlib import style

    buffer = io.BytesIO()
    with style.context(["default", _STYLE]):
        figure.savefig(buffer, **options)
    return buffer.getvalue()


def draw_legend(axes: Axes) -> None:
    """The modes of a chart, above it."""
    axes.legend(
        loc="lower left", bbox_to_anchor=(-0.02, 1.0), ncols=5, columnspacing=1.0, handlelength=1.8, handletextpad=0.5
    )


def draw_line(axes: Axes, mode: str, xs: Sequence[float], ys: Sequence[float | None], **options: Any) -> None:
    """One mode as a line; there is none where a value is missing."""
    axes.plot(
        xs, [math.nan if y is None else y for y in ys], label=mode, color=COLORS[mode], **STROKES[mode], **options
    )
