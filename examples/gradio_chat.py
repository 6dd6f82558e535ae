"""Chat with documents on a page made with gradio. Next to each answer are the passages that were read for it.

    pip install retro-hf gradio
    python examples/gradio_chat.py HuggingFaceTB/SmolLM2-135M-Instruct notes/

The model needs no training. In a Space, call `make_page(...).launch()` at the end of `app.py`.
"""

import sys

import gradio as gr
from transformers import AutoTokenizer

from retro_hf import RetroRetriever, answer, retrofit


def make_page(model, retriever, max_new_tokens=128):
    """A page for a model and what it reads."""

    def reply(message, history):
        turns = [{"role": turn["role"], "content": _text(turn["content"])} for turn in history]
        found = answer(model, retriever, [*turns, {"role": "user", "content": message}], max_new_tokens=max_new_tokens)
        return found.text, [[f"{one.score:.2f}", one.title or one.document_id, one.text] for one in found.sources]

    with gr.Blocks(title="retro") as page, gr.Row():
        # A table shows the documents' text as it is; Markdown would show whatever it says.
        sources = gr.Dataframe(headers=["score", "document", "passage"], wrap=True, interactive=False, render=False)
        with gr.Column():
            gr.ChatInterface(reply, additional_outputs=[sources], api_name="chat")
        with gr.Column():
            sources.render()
    return page


def _text(content):
    """The text of a turn, which gradio keeps in parts."""
    return content if isinstance(content, str) else "".join(part.get("text", "") for part in content)


def main(name, documents):
    tokenizer = AutoTokenizer.from_pretrained(name)
    retriever = RetroRetriever.from_texts(documents, tokenizer, embedder="sentence-transformers/all-MiniLM-L6-v2")
    sizes = {"chunk_size": retriever.chunk_size, "neighbor_size": retriever.neighbor_size}
    make_page(retrofit(name, reader="parallel_context", **sizes), retriever).launch()


if __name__ == "__main__":
    main(*sys.argv[1:])
