"""The page of the server in a real browser: both answers, what was read, changes of the store, and no markup from it."""

import time

import pytest
from browser import Browser
from server.serving import make_parts, serving


pytestmark = pytest.mark.slow

EVIL = '<img src=x onerror="document.title=1">golden lighthouse</script><script>document.title=2</script>'


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A tiny model, and a store with a document that is markup."""
    folder = tmp_path_factory.mktemp("page")
    made = make_parts(folder)
    made.folder = folder
    made.tokenizer.chat_template = None  # a text is looked up chunk by chunk
    made.datastore.append([{"id": EVIL, "title": EVIL, "text": EVIL}], embedder=made.embedder)
    return made


@pytest.fixture(scope="module")
def server(world):
    """A server whose store may be changed."""
    with serving(world, store=world.folder / "store", changes=True) as running:
        yield running


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    """One browser for all tests."""
    with Browser(tmp_path_factory.mktemp("profile")) as started:
        yield started


def wait_for(browser, expression):
    """The first true value of an expression."""
    for _ in range(600):
        if value := browser.evaluate(expression):
            return value
        time.sleep(0.05)
    raise AssertionError(f"{expression} did not become true: {browser.evaluate('document.body.innerText')}")


def ask(browser, text="the golden lighthouse"):
    """Ask the page a question and wait for both answers and the colors."""
    browser.evaluate(
        f"document.getElementById('prompt').value = {text!r}; document.getElementById('tokens').value = 20"
    )
    browser.click("#send")
    wait_for(browser, "!document.getElementById('legend').hidden && !document.getElementById('send').disabled")


@pytest.fixture
def page(browser, server):
    """The page, with an answer."""
    browser.open(server.url)
    wait_for(browser, "document.getElementById('model').textContent == 'tiny'")
    ask(browser)
    return browser


def test_both_answers_are_those_of_the_server(page, server):
    """Side by side, with the tokens colored by what the store saved."""
    body = {"prompt": "the golden lighthouse", "max_tokens": 20, "temperature": 0}
    for side, retrieval in (("off", False), ("on", True)):
        answer = server.client.post("/v1/completions", json={**body, "retrieval": retrieval}).json()
        shown = page.evaluate(f"document.getElementById('{side}').textContent")
        assert shown == answer["choices"][0]["text"]
    assert page.evaluate("document.querySelectorAll('#on .chunk span[title]').length") >= 10
    assert page.evaluate("document.querySelectorAll('#on .chunk').length") == 3


def test_a_chunk_shows_its_passages_by_mouse_and_by_keyboard(page):
    """With document and text."""
    page.click("#on .chunk:nth-of-type(2)")
    assert page.evaluate("document.querySelector('#on .chunk:nth-of-type(2)').getAttribute('aria-expanded')") == "true"
    assert "tokens 9 to 16" in page.evaluate("document.getElementById('passages').textContent")
    page.evaluate("document.querySelector('#on .chunk').focus()")
    page.press("Enter")
    text = page.evaluate("document.getElementById('passages').innerText")
    assert "Looked up: the golden lighthouse" in text
    assert page.evaluate("document.activeElement.id") == "passages"


def test_numbers_are_shown_by_the_details_switch_alone(page):
    """By mouse and by keyboard; colleagues who know nothing of them see none."""
    text = "document.body.innerText"
    assert page.evaluate("document.getElementById('details').checked") is False
    shown = page.evaluate(text)
    assert "score 0." not in shown and " bits" not in shown and "tokens" not in shown
    assert page.evaluate("document.getElementById('seed').checkVisibility()") is False
    page.click("#details")
    shown = page.evaluate(text)
    assert "score 0." in shown and " bits on " in shown and "tokens 1 to 8" in shown
    assert page.evaluate("document.getElementById('seed').checkVisibility()") is True
    page.evaluate("document.getElementById('details').focus()")
    page.press(" ")
    assert "score 0." not in page.evaluate(text)


def test_markup_in_the_store_is_shown_and_not_run(page, server):
    """Neither by the text of a document, nor by its title or id."""
    assert server.client.get(f"/v1/store/documents/{EVIL.replace('/', '%2F')}").status_code in (200, 404)
    ask(page, EVIL)
    assert EVIL in page.evaluate("document.getElementById('passages').textContent")
    assert page.evaluate("document.querySelectorAll('#passages img, #passages script').length") == 0
    assert page.evaluate("document.title") == "tiny – retro"


def test_a_document_can_be_edited_and_deleted_and_the_page_asks_again(page, server):
    """The effect shows at once."""
    page.evaluate("window.confirm = () => true")
    id = page.evaluate("shown.chunk.passages[0].document_id")
    page.click("#passages button")
    wait_for(page, "document.getElementById('editor').open")
    page.evaluate("document.getElementById('edit-text').value = 'the golden lighthouse'")
    page.click("#edit button.main")
    wait_for(page, "!document.getElementById('editor').open && document.getElementById('send').disabled")
    wait_for(page, "!document.getElementById('legend').hidden && !document.getElementById('send').disabled")
    assert server.client.get(f"/v1/store/documents/{id}").json()["text"] == "the golden lighthouse"
    assert page.evaluate("shown.chunk.passages[0].text").strip() == "the golden lighthouse"
    page.click("#passages button:nth-of-type(2)")
    wait_for(page, "document.getElementById('send').disabled")
    wait_for(page, "!document.getElementById('legend').hidden && !document.getElementById('send').disabled")
    assert server.client.get(f"/v1/store/documents/{id}").status_code == 404


def test_the_page_needs_nothing_but_the_server(page, server):
    """No font, script or style from elsewhere, and no error in the console."""
    asked = {e[1]["request"]["url"] for e in page.events if e[0] == "Network.requestWillBeSent"}
    assert all(url.startswith((server.url, "data:", "about:")) for url in asked)
    errors = [e for e in page.events if e[0] in ("Runtime.exceptionThrown", "Log.entryAdded")]
    assert not errors


@pytest.mark.parametrize("width", [320, 390, 1280])
def test_nothing_is_wider_than_the_window(page, width):
    """On a phone the answers are below each other."""
    page.call("Emulation.setDeviceMetricsOverride", mobile=False, width=width, height=900, deviceScaleFactor=1)
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    below = page.evaluate(
        "document.getElementById('on').getBoundingClientRect().top > document.getElementById('off').getBoundingClientRect().bottom"
    )
    assert below == (width < 700)


def test_every_control_has_a_name_for_screen_readers(page):
    """By its text, its label or its `aria-label`."""
    page.click("#details")
    tree = page.call("Accessibility.getFullAXTree")["nodes"]
    roles = ("button", "switch", "textbox", "spinbutton")
    controls = [node for node in tree if node.get("role", {}).get("value") in roles]
    assert {node["role"]["value"] for node in controls} == set(roles)
    assert len(controls) >= 8
    assert all(node["name"]["value"].strip() for node in controls if not node["ignored"])


def test_a_key_is_asked_for_where_one_is_needed(browser, world):
    """And sent with every request from then on."""
    with serving(world, store=world.folder / "store", api_key="secret") as server:
        browser.open(server.url)
        wait_for(browser, "!document.getElementById('key-label').hidden")
        browser.evaluate("const key = document.getElementById('key'); key.value = 'secret'; key.onchange()")
        wait_for(browser, "document.getElementById('model').textContent == 'tiny'")
        ask(browser)
