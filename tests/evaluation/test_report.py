"""The report: the verdict first, every number there, nothing loaded, every text escaped; and its PNGs."""

import re
import struct
import sys
from html.parser import HTMLParser

import matplotlib
import pytest
from evaluation.samples import HOSTILE, NO_CURVES, VERDICT, sample_evaluation, sample_trace

from retro_hf.errors import MissingExtraError
from retro_hf.evaluation import write_report
from retro_hf.evaluation.report.page import render_page


CHARTS = ["modes", "leakage", "overlap", "runs", "offsets", "neighbors", "fractions"]
_VOID = {"meta", "br", "img", "link", "input", "hr", "source", "base"}
_INLINE = {"a", "b", "code", "mark", "span", "strong"}


class Page(HTMLParser):
    """Checks that tags are balanced; keeps them, and the text that a reader sees, in order."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[str] = []
        self.feed(text)
        self.close()
        assert not self.open, self.open
        self.text = " ".join("".join(self.texts).split())

    def handle_starttag(self, tag, attributes):
        names = [name for name, _ in attributes]
        assert len(set(names)) == len(names), (tag, names)
        self.tags.append((tag, dict(attributes)))
        if tag not in _VOID:
            self.open.append(tag)
        if tag not in _INLINE:
            self.texts.append(" ")

    def handle_startendtag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if not {"style", "script", "title"} & set(self.open):
            self.texts.append(data)

    def count(self, tag: str, **attributes: str) -> int:
        return sum(name == tag and attributes.items() <= found.items() for name, found in self.tags)


@pytest.fixture(scope="module")
def html(tmp_path_factory) -> str:
    return render_page(sample_evaluation(tmp_path_factory.mktemp("evaluation")), [sample_trace()])


@pytest.fixture(scope="module")
def page(html) -> Page:
    return Page(html)


def test_verdict_is_the_first_line(page, html):
    """Of what is read, and of the window."""
    assert page.text.startswith(VERDICT)
    assert f"<title>{VERDICT}</title>" in html


@pytest.mark.parametrize("outcome", ["broken", "hurts", "nothing", "not_measured"])
def test_every_verdict_comes_first(tmp_path, outcome):
    """The page takes the words of the evaluation, and its outcome shows."""
    verdict = {"outcome": outcome, "copying": None, "text": f"It is {outcome}.", "details": []}
    page = Page(render_page(sample_evaluation(tmp_path, verdict=verdict, **NO_CURVES)))
    assert page.text.startswith(f"It is {outcome}.")
    assert page.count("header", **{"class": f"verdict {outcome}"}) == 1


def test_page_loads_nothing(page, html):
    """No address in any attribute that loads, no style that does; the browser is told to refuse the rest."""
    loading = {"src", "srcset", "data", "poster", "action", "formaction", "background", "xlink:href", "href"}
    for tag, attributes in page.tags:
        assert tag not in {"link", "img", "iframe", "object", "embed", "base", "form", "audio", "video"}
        for name, value in attributes.items():
            assert name not in loading or (value or "").startswith("#"), (tag, name, value)
            assert not name.startswith("on"), (tag, name)
    styles = re.findall(r"<style.*?</style>", html, flags=re.DOTALL)
    assert styles and not any(word in style for style in styles for word in ("@import", "url(", "http"))
    assert all(value.startswith("#") for value in re.findall(r"url\(([^)]*)\)", html))
    policy = next(found["content"] for tag, found in page.tags if found.get("http-equiv") == "Content-Security-Policy")
    assert policy.startswith("default-src 'none'") and "script-src 'sha256-" in policy


def test_every_text_from_outside_is_escaped(page, html):
    """Ids, titles, passages, tokens, the command: shown as they are, run nowhere."""
    assert page.count("script") == 1 and "<script>window" not in html
    # Leaked document and the one it is found in, copy and what it is of, command, model; of the example: id, context, token, and the neighbor's id,
    # title, text and continuation; of the trace: title, id, token and a row of numbers; of its two neighbors: id, title, text.
    assert page.text.count("window.pwned = 1</script>") >= 6 + 7 + 4 + 2 * 3
    joined = "".join(page.texts)
    assert HOSTILE in joined


def test_ids_in_the_page_are_unique(page, html):
    """Also those of the charts, which matplotlib names alike."""
    ids = [found["id"] for _, found in page.tags if "id" in found]
    assert len(ids) == len(set(ids))
    for name in re.findall(r'(?:href="#|url\(#|aria-labelledby=")([^")]+)', html):
        assert name in ids


def test_table_has_every_mode(page):
    """With its interval; the oracle is called what it is."""
    assert page.count("tr", **{"class": "mode"}) == 5
    assert "1.1900 −0.5154 −0.5354 to −0.4954 −30.2%" in page.text
    assert "oracle (cheats)" in page.text and "1.8388" in page.text
    assert "On minus random: −0.6488" in page.text and "Neighbors share 61%" in page.text


@pytest.mark.parametrize("name", CHARTS)
def test_each_chart_is_drawn_and_has_its_numbers(page, html, name):
    """An SVG in the page's own colors, for a dark page, too; and a table below it."""
    figure = html[html.index(f'id="chart-{name}"') :]
    figure = figure[: figure.index("</figure>")]
    svg = figure[figure.index("<svg") : figure.index("</svg>")]
    assert "var(--on)" in svg and "<text" in svg and svg.count("<path") > 3
    assert not re.search(r"(?:fill|stroke): #(?!000000|ffffff)", svg)
    assert figure.count("<tr>") >= 3 and not re.search(r"\bnan\b", figure.lower())


def test_trace_shows_chunks_and_the_gain_of_each_neighbor(page, html):
    """Chunks are disclosures that work without a script; tokens keep their white space."""
    assert page.count("details", **{"class": "chunk"}) == 3
    assert page.count("section", **{"class": "neighbor"}) == 2 + 1
    for words in (
        "score 0.790 (inner product)",
        "score 0.710 (inner product)",
        "Found for this chunk, read while the next one was predicted.",
        "Nothing was found for this chunk.",
        "The text ends before this chunk is complete",
        "Leaving it out costs 3.5 of the 27.1 bits saved in the next chunk, −0.4 after it:",
    ):
        assert words in page.text
    # The words that the reading chunk has, too.
    assert "<mark>which shall go up and come</mark>" in html
    trace = sample_trace()
    texts = re.findall(r'<span class="text" dir="auto">(.*?)</span>\n<span class="sum"', html, flags=re.DOTALL)
    for chunk, shown in zip(trace.chunks, texts, strict=False):
        written = "".join(trace.tokens[chunk.start : chunk.end]).replace("\ud800", "\\ud800")
        assert "".join(Page(shown).texts) == written
    titles = [found.get("title") for _, found in page.tags]
    assert "off 2.47% → on 36.79%, +3.90 bits saved" in titles


def test_example_underlines_copied_runs(page):
    """Tokens in a run of five or more that a neighbor has are underlined."""
    assert page.count("details", **{"class": "chunk example"}) == 1
    assert page.count("span", **{"class": "token up run"}) == 1
    assert "−1.50 bits saved" in [found.get("title") for _, found in page.tags]


def test_inputs_and_provenance_are_at_the_end(page):
    """What was left out, the command, the seed, versions and revisions."""
    for words in (
        "400 documents of 2,101 chunks",
        "1 left out",
        "2 no longer than a chunk",
        "3 have the id",
        "1 are in the datastore",
        "1 are copies of another document",
    ):
        assert words in page.text
    assert page.text.index("seed 0") > page.text.index("3 have the id")
    assert "versions torch 2.13.0" in page.text and "revision" not in page.text


def test_report_writes_a_page_and_a_png_of_each_chart(tmp_path):
    """The page, all curves, and each of them; the same evaluation gives the same page, whatever its user's plots look like."""
    result = sample_evaluation(tmp_path)
    page = write_report(result, tmp_path / "report", traces=[sample_trace()])
    assert page == tmp_path / "report" / "report.html"
    names = {f"{name}.png" for name in ("report", *CHARTS)}
    assert {file.name for file in page.parent.iterdir()} == names | {"report.html"}
    for name in names:
        content = (page.parent / name).read_bytes()
        assert content.startswith(b"\x89PNG") and min(struct.unpack(">II", content[16:24])) > 400
    with matplotlib.rc_context({"axes.facecolor": "red", "text.usetex": True, "svg.fonttype": "path"}):
        again = render_page(result, [sample_trace()])
    # Half a character, which JSON can hold and UTF-8 cannot, is written out.
    assert "\\ud800" in again and "\ud800" not in again
    assert page.read_text() == again


def test_evaluation_without_retrieval_has_a_page(tmp_path):
    """OFF alone: a table of one row, no curves, nothing that fails."""
    nothing = dict.fromkeys(("on_minus_random", "similarity"))
    result = sample_evaluation(tmp_path, **NO_CURVES, **nothing)
    page = Page(render_page(result))
    assert page.count("tr", **{"class": "mode"}) == 1 and not page.count("figure")
    write_report(result, tmp_path)
    assert (tmp_path / "report.html").exists() and not (tmp_path / "report.png").exists()


def test_unknown_interval_is_not_shown_as_nan(tmp_path):
    """One document has none: NaN, which no chart may choke on."""
    unknown = {"value": -0.5, "low": None, "high": None}
    modes = [
        {
            "name": name,
            "cheating": False,
            "num_neighbors": 2,
            "bits_per_byte": 1.7,
            "bits_per_token": 6.6,
            "perplexity": 97.0,
        }
        | {"difference": difference, "later_chunks_bits_per_byte": None, "later_chunks_difference": difference}
        for name, difference in (("off", None), ("on", unknown))
    ]
    page = Page(render_page(sample_evaluation(tmp_path, **NO_CURVES | {"modes": modes})))
    assert "−0.5000 no interval: one document" in page.text and not re.search(r"\bnan\b", page.text.lower())


def test_missing_matplotlib_is_an_error_that_names_the_extra(tmp_path, monkeypatch):
    """An extra, so that measuring needs no plots."""
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(MissingExtraError, match=r"retro-hf\[plot\]"):
        write_report(sample_evaluation(tmp_path), tmp_path)
