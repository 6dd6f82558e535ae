"""The report in a real browser: nothing is loaded, chunks open by mouse and keyboard, both themes are readable."""

import re
import time
from pathlib import Path

import pytest
from browser import Browser
from evaluation.samples import VERDICT, sample_evaluation, sample_trace

from retro_hf.evaluation import write_report


pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def path(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("report")
    return write_report(sample_evaluation(folder), folder, traces=[sample_trace()])


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    with Browser(tmp_path_factory.mktemp("profile")) as started:
        yield started


def is_open(browser: Browser, chunk: str) -> bool:
    return browser.evaluate(f"document.querySelector('{chunk}').open")


def opens(browser: Browser, chunk: str) -> bool:
    """Following a link is an event of its own, which comes after the click."""
    for _ in range(100):
        if is_open(browser, chunk):
            return True
        time.sleep(0.05)
    return False


def luminance(color: tuple[float, ...]) -> float:
    """Of WCAG 2.2, for red, green and blue from 0 to 255."""
    parts = [
        value / 255 / 12.92 if value / 255 <= 0.04045 else ((value / 255 + 0.055) / 1.055) ** 2.4 for value in color
    ]
    return 0.2126 * parts[0] + 0.7152 * parts[1] + 0.0722 * parts[2]


def numbers(color: str) -> tuple[float, ...]:
    """`rgb(1, 2, 3)` or `rgba(1, 2, 3, 0.5)` with its opacity, 1 by default."""
    parts = tuple(map(float, re.findall(r"[\d.]+", color)))
    return parts if len(parts) == 4 else (*parts, 1.0)


def contrast(browser: Browser, selector: str) -> float:
    """Of an element's text on its background, which may let the page's shine through."""
    style = f"getComputedStyle(document.querySelector({selector!r}))"
    text, own = (numbers(browser.evaluate(f"{style}.{name}")) for name in ("color", "backgroundColor"))
    page = numbers(browser.evaluate("getComputedStyle(document.body).backgroundColor"))
    seen = tuple(own[3] * mine + (1 - own[3]) * below for mine, below in zip(own[:3], page[:3], strict=True))
    bright, dark = sorted((luminance(text[:3]), luminance(seen)), reverse=True)
    return (bright + 0.05) / (dark + 0.05)


def test_nothing_is_loaded_and_nothing_foreign_runs(browser, path):
    """One request, for the page itself; no violation of its policy, no error, no script of a neighbor."""
    browser.events.clear()
    browser.open(path)
    assert browser.evaluate("document.title") == VERDICT
    assert browser.evaluate("document.body.innerText.trim().split('\\n')[0]") == VERDICT
    requests = [params["request"]["url"] for method, params in browser.events if method == "Network.requestWillBeSent"]
    assert set(requests) <= {"about:blank", path.as_uri()} and requests[-1] == path.as_uri()
    complaints = [event for event in browser.events if event[0] in ("Log.entryAdded", "Runtime.exceptionThrown")]
    assert not complaints
    assert browser.evaluate("typeof window.pwned + document.scripts.length + document.images.length") == "undefined10"


def test_script_from_outside_is_blocked(browser, path, tmp_path):
    """Were some text not escaped, the browser would still not run it."""
    broken = tmp_path / "broken.html"
    broken.write_text(path.read_text().replace("<main>", "<main><script>window.pwned = 1</script>", 1))
    browser.open(broken)
    assert browser.evaluate("document.scripts.length") == 2
    assert browser.evaluate("typeof window.pwned") == "undefined"


def test_click_on_a_chunk_shows_its_neighbors(browser, path):
    """And another one hides them."""
    browser.open(path)
    chunk = "#trace-1-chunk-0"
    shown = f"document.querySelector('{chunk} .found').checkVisibility()"
    assert not is_open(browser, chunk) and not browser.evaluate(shown)
    browser.click(f"{chunk} > summary")
    assert is_open(browser, chunk) and browser.evaluate(shown)
    text = browser.evaluate(f"document.querySelector('{chunk} .found').innerText")
    for words in (
        "score 0.790",
        "And the river shall bring forth frogs",
        "which shall go up",
        "Leaving it out costs 3.5 of",
    ):
        assert words in text
    browser.click(f"{chunk} > summary")
    assert not is_open(browser, chunk)


def test_link_opens_its_chunk(browser, path):
    """To show somebody else a place in a text."""
    browser.open(path, "trace-1-chunk-1")
    assert is_open(browser, "#trace-1-chunk-1") and not is_open(browser, "#trace-1-chunk-0")
    top = browser.evaluate("document.querySelector('#trace-1-chunk-1').getBoundingClientRect().top")
    assert -1 < top < 900  # scrolled to, within a pixel


def test_keyboard_opens_chunks(browser, path):
    """Tab reaches a chunk, Enter opens it, arrows go on to the next."""
    browser.open(path)
    focused = "document.activeElement.closest('.chunk')?.id"
    for _ in range(60):
        browser.press("Tab")
        if browser.evaluate(focused) == "trace-1-chunk-0":
            break
    assert browser.evaluate(focused) == "trace-1-chunk-0"
    browser.press("Enter")
    assert is_open(browser, "#trace-1-chunk-0")
    browser.press("ArrowDown")
    assert browser.evaluate(focused) == "trace-1-chunk-1"
    browser.press("ArrowUp")
    assert browser.evaluate(focused) == "trace-1-chunk-0"


def test_button_opens_all_chunks_and_tokens_show_their_numbers(browser, path):
    """What the script adds."""
    browser.open(path)
    browser.click("button.all")
    assert browser.evaluate("document.querySelectorAll('.trace .chunk[open]').length") == 3
    browser.click("button.all")
    assert browser.evaluate("document.querySelectorAll('.trace .chunk[open]').length") == 0
    browser.click("#trace-1-chunk-1 > summary")
    browser.click("#trace-1-chunk-1 .found a")
    assert opens(browser, "#trace-1-chunk-0")
    browser.click("#trace-1-chunk-1 .token:nth-child(2)")
    assert "bits saved" in browser.evaluate("document.getElementById('readout').innerText")


@pytest.mark.parametrize("dark", [False, True])
def test_both_themes_are_readable(browser, path, dark):
    """Text on its background at 4.5 or more (WCAG 2.2 AA), tokens of the strongest colors, too."""
    browser.open(path, dark=dark)
    page = numbers(browser.evaluate("getComputedStyle(document.body).backgroundColor"))
    assert (luminance(page[:3]) < 0.1) is dark
    browser.evaluate("document.querySelector('#trace-1-chunk-0').open = true")
    for selector in (
        "body", ".note", "h1", "td", ".provenance th", ".sum", "mark", ".continuation",
        ".legend .token.up:last-of-type", ".legend .token.down:first-of-type", "button.all",
    ):  # fmt: skip
        assert contrast(browser, selector) >= 4.5, selector
    # The charts follow the theme.
    line = browser.evaluate(
        "getComputedStyle(document.querySelector('#chart-leakage svg path[style*=\"--on\"]')).stroke"
    )
    assert contrast_of(numbers(line), page) >= 3


def contrast_of(one: tuple[float, ...], other: tuple[float, ...]) -> float:
    bright, dark = sorted((luminance(one[:3]), luminance(other[:3])), reverse=True)
    return (bright + 0.05) / (dark + 0.05)


def test_phone_does_not_scroll_sideways(browser, path):
    """Only wide tables scroll, within themselves."""
    browser.open(path, width=360)
    browser.evaluate("document.querySelectorAll('details').forEach((part) => { part.open = true; })")
    assert browser.evaluate("document.scrollingElement.scrollWidth") <= 360
