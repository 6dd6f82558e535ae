"""The page of examples/gradio_chat.py, by the real gradio and its own client."""

from pathlib import Path

import pytest
from server.serving import TEMPLATE
from tiny import tiny_backbone
from tiny_training import make_world

from retro_hf import answer, retrofit


pytestmark = pytest.mark.slow  # gradio is in no extra: it needs an older pillow than the tests

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"


def test_the_page_answers_and_shows_what_was_read(tmp_path, monkeypatch):
    """In a second turn, too."""
    pytest.importorskip("gradio", reason="`make test-slow` installs it")
    gradio_client = pytest.importorskip("gradio_client")
    monkeypatch.syspath_prepend(EXAMPLES)
    from gradio_chat import make_page

    world = make_world(tmp_path)
    world.tokenizer.chat_template = TEMPLATE
    world.retriever = type(world.retriever)(world.datastore, embedder=world.embedder, tokenizer=world.tokenizer)
    model = retrofit(tiny_backbone("llama", vocab_size=400), reader="parallel_context", chunk_size=8, neighbor_size=16)
    page = make_page(model, world.retriever, max_new_tokens=8)
    _, url, _ = page.launch(prevent_thread_lock=True, quiet=True, server_name="127.0.0.1")
    try:
        client = gradio_client.Client(url, verbose=False)
        turns = []
        for question in ("golden lighthouse", "quiet baker"):
            text, table = client.predict(question, api_name="/chat")
            turns.append({"role": "user", "content": question})
            expected = answer(model, world.retriever, turns, max_new_tokens=8)
            assert text == expected.text
            shown = [row[1:] for row in table]
            assert shown == [[one.title or one.document_id, one.text] for one in expected.sources]
            turns.append({"role": "assistant", "content": expected.text})
    finally:
        page.close()
