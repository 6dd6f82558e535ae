"""The report of an evaluation: one HTML page that needs no network, and its charts as PNG."""

from __future__ import annotations

import base64
import difflib
import hashlib
import math
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from ...arguments import listed, path, shown
from ...datastore.atomic_files import make_folder, write_file
from ...outside import printable
from ..neighbors import MODES
from ..text import number
from ..trace import FULL_BITS, Trace, bits
from .charts import charts_of, to_png, to_svg


if TYPE_CHECKING:
    from ..interval import Interval
    from ..result import Evaluation

_TEMPLATES = Path(__file__).parent / "templates"
_SHARED_WORDS = 3


def write_report(result: Evaluation, folder: str | os.PathLike[str], *, traces: Sequence[Trace] = ()) -> Path:
    """Write `report.html`, `report.png` with all charts, and a PNG of each chart.

    The page begins with the verdict. It loads nothing, allows no script but its own, and escapes every text.

    Args:
        result ([`Evaluation`]): what was measured.
        folder (`str` or `Path`): where to write; created on demand.
        traces (sequence of [`Trace`], *optional*): texts to show token by token.
    Returns:
        `Path` of the page.
    Raises:
        MissingExtraError: without matplotlib.
    """
    folder = path("folder", folder, ValueError)
    if not hasattr(result, "verdict"):
        raise ValueError(f"The result is {shown(result)}. Pass what `evaluate` returned.")
    if (given := listed(traces)) is None or not all(isinstance(one, Trace) for one in given):
        raise ValueError(f"traces are {shown(traces)}. Pass a list of what `trace` returned.")
    make_folder(folder)
    charts = charts_of(result)
    if charts:
        write_file(folder / "report.png", to_png(charts, heading=result.verdict.text))
    for chart in charts:
        write_file(folder / f"{chart.name}.png", to_png([chart]))
    page = folder / "report.html"
    write_file(page, render_page(result, given).encode("utf-8", "replace"))
    return page


def render_page(result: Evaluation, traces: Sequence[Trace] = ()) -> str:
    """The page as HTML."""
    environment = Environment(
        loader=FileSystemLoader(_TEMPLATES),
        autoescape=True,
        finalize=lambda value: printable(value) if type(value) is str else value,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=StrictUndefined,
    )
    environment.filters |= {"bits": bits, "ends": _ends, "marked": _marked, "number": _number, "odds": _odds}
    environment.filters["strength"] = _strength
    style, script = ((_TEMPLATES / name).read_text(encoding="utf-8") for name in ("report.css", "report.js"))
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    return environment.get_template("report.html").render(
        result=result,
        off=next((mode.bits_per_byte for mode in result.modes if mode.name == "off"), math.nan),
        charts=[(chart, Markup(to_svg(chart))) for chart in charts_of(result)],
        traces=traces,
        meanings=MODES,
        provenance=list(_flat(result.provenance)),
        full=FULL_BITS,
        # The browser itself makes sure that nothing is loaded and that no text of a datastore runs as a script.
        policy=f"default-src 'none'; style-src 'unsafe-inline'; script-src 'sha256-{digest}'",
        style=Markup(style),
        script=Markup(script),
    )


def _number(value: float | None, form: str = ".4f") -> str:
    """A number with a typographic minus and no sign at zero; a dash if there is none."""
    shown = number(value, form, missing="–")
    return shown.replace("-", "−") if shown.strip("+-0.%") else shown.lstrip("+-")


def _ends(interval: Interval) -> str:
    """The ends of the 95 % interval, or why there is none."""
    if math.isnan(interval.low):
        return "no interval: one document"
    return f"{_number(interval.low, '+.4f')} to {_number(interval.high, '+.4f')}"


def _strength(gain: float) -> str:
    """The opacity of a token's color, from 0 to 1, for a gain in bits."""
    return f"{min(abs(gain) / FULL_BITS, 1):.2f}".removesuffix(".00")


def _odds(trace: Trace, token: int) -> str:
    """The probability of a token without and with retrieval."""
    off, on = trace.nats_off[token], trace.nats_on[token]
    if off is None or on is None:
        return "the first token, which nothing predicts"
    return f"off {math.exp(-off):.2%} → on {math.exp(-on):.2%}, {_number(bits(off - on), '+.2f')} bits saved"


def _marked(text: str, reading: str) -> Iterator[tuple[str, bool]]:
    """A passage in pieces, each with whether the chunk that reads it has the same words in a row."""
    pieces = re.findall(r"\s*\S+\s*", text)
    words = [re.sub(r"\W", "", piece).lower() for piece in pieces]
    others = re.sub(r"[^\w\s]", "", reading).lower().split()
    start = 0
    for block in difflib.SequenceMatcher(None, words, others, autojunk=False).get_matching_blocks():
        if block.size >= _SHARED_WORDS:
            yield "".join(pieces[start : block.a]), False
            start = block.a + block.size
            yield "".join(pieces[block.a : start]), True
    yield "".join(pieces[start:]), False


def _flat(values: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """Name and value of everything that is known; what belongs together in one line."""
    for name, value in values.items():
        if isinstance(value, Mapping):
            yield name, " · ".join(f"{key} {part}" for key, part in value.items() if part is not None)
        elif value is not None:
            yield name, str(value)
