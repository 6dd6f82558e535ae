"""A real language model reads documents, in a few minutes on 2 cores: ask, change a document, ask again, measure.

    make demo              # or: python examples/demo.py

The model is SmolLM2-135M-Instruct. Nothing is trained: with `reader="parallel_context"` it reads the passages that are found.

1. The first datastore holds the introductions of Wikipedia's articles. The model answers questions about some of them, without the datastore
   and with it. Then a document is changed, and the question is asked again.
2. The second datastore holds books of the Bible in two translations. The model predicts the same books in a third one: with reading, without
   it, and with the passages in its prompt.

Everything is computed on this machine. The datastores and `results.json` are written to `demo_output`. `make demo-train` trains another model,
a toy, from scratch.
"""

import argparse
import json
import logging
import platform
import shutil
import sys
import textwrap
import time
from pathlib import Path

import torch
import transformers
from demo_data import load_corpus, minilm_path, split
from retrofit_smollm2 import load_base
from transformers import AutoTokenizer
from wiki_questions import load_articles

from retro_hf import ChunkEmbedder, RetroDatastore, RetroRetriever, __version__, answer, retrofit
from retro_hf.answering import prepare_question
from retro_hf.evaluation import evaluate


QUESTIONS = (
    "What was the population of the Oslo municipality?",
    "How many acres is the complex of the Taj Mahal?",
    "When was the Statue of Liberty dedicated?",
)
CHANGED, BEFORE, AFTER = "wiki/Oslo", "724,290", "731,452"
ASKED = ("wiki/Oslo", "wiki/Taj_Mahal", "wiki/Statue_of_Liberty")
BOOKS = ("exodus", "ruth", "mark")
CHUNK_SIZE, WINDOW = 32, 256


def heading(text: str) -> None:
    """Print a line that stands out."""
    print(f"\n\033[1m{text}\033[0m" if sys.stdout.isatty() else f"\n== {text}", flush=True)


def show(text: str, indent: str = "  ") -> None:
    """Print a paragraph, wrapped."""
    print(textwrap.fill(" ".join(text.split()), 108, initial_indent=indent, subsequent_indent=indent), flush=True)


def build(documents: list[dict], path: Path, tokenizer, embedder: ChunkEmbedder, chunk_size: int) -> RetroRetriever:
    """The retriever of a new datastore."""
    shutil.rmtree(path, ignore_errors=True)
    store = RetroDatastore.build(documents, path, tokenizer=tokenizer, embedder=embedder, chunk_size=chunk_size)
    print(f"  {store.num_documents:,} documents, {store.num_chunks:,} chunks in {path}", flush=True)
    return RetroRetriever(store, embedder=embedder, tokenizer=tokenizer)


def ask(model, retriever: RetroRetriever, question: str) -> dict[str, str]:
    """Ask without retrieval and with it, and show both answers with what was read."""
    asked = prepare_question(model, retriever, question, num_passages=1)
    prompt = {name: asked.inputs[name] for name in ("input_ids", "attention_mask")}
    ids = model.generate(**prompt, retriever=None, max_new_tokens=40, do_sample=False)[0, asked.num_tokens :]
    off = retriever.tokenizer.decode(ids, skip_special_tokens=True).strip()
    on = answer(model, retriever, question, num_passages=1, max_new_tokens=40)
    show(question)
    show(f"off:  {off}", "    ")
    show(f"on:   {on.text}", "    ")
    show(f"read: {on.sources[0].title}: {on.sources[0].text}", "    ")
    return {"question": question, "off": off, "on": on.text, "source": on.sources[0].document_id}


def main() -> None:
    """Run the demo; exit with 1 if retrieval did not do what it should."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("demo_output"), help="folder for what is left behind")
    parser.add_argument("--articles", type=int, default=500, help="how many articles to look things up in")
    parser.add_argument("--documents", type=int, default=20, help="how many held-out passages to measure on")
    args = parser.parse_args()
    start = time.perf_counter()
    logging.getLogger("retro_hf").setLevel(logging.ERROR)
    transformers.utils.logging.disable_progress_bar()
    args.output.mkdir(parents=True, exist_ok=True)

    heading("1. SmolLM2-135M-Instruct (93 MB), MiniLM, which finds passages (84 MB), and Wikipedia's leads (5 MB)")
    base = load_base(args.output / "smollm2" / "base")
    tokenizer = AutoTokenizer.from_pretrained(base)
    model = retrofit(base, reader="parallel_context")
    embedder = ChunkEmbedder.from_pretrained(minilm_path())
    articles = load_articles()
    named = [one for one in articles if one["id"] in ASKED]
    others = [one for one in articles if one["id"] not in ASKED]
    kept = named + others[:: max(len(others) // args.articles, 1)][: args.articles]
    retriever = build(kept, args.output / "articles", tokenizer, embedder, model.config.chunk_size)

    heading("2. Questions, without retrieval and with it")
    answers = [ask(model, retriever, question) for question in QUESTIONS]

    heading(f"3. A document is changed: {CHANGED} says {AFTER} instead of {BEFORE}. The same model, asked again")
    old = next(one for one in named if one["id"] == CHANGED)
    retriever.datastore.delete([CHANGED])
    new = old | {"id": f"{CHANGED}-changed", "text": old["text"].replace(BEFORE, AFTER)}
    retriever.datastore.append([new], embedder=embedder)
    answers.append(ask(model, retriever, QUESTIONS[0]))

    heading(
        "4. Does it help to predict text? Three Bible translations (30 MB): two in the datastore, the third to predict"
    )
    parts = split(load_corpus("bible"), "test")
    store = [one for one in parts.store if one["id"].split("/")[1] in BOOKS]
    heldout = sorted((one for one in parts.heldout if one["id"].split("/")[1] in BOOKS), key=lambda one: one["id"])
    measured = heldout[:: max(len(heldout) // args.documents, 1)][: args.documents]
    model.config.chunk_size = CHUNK_SIZE
    verses = build(store, args.output / "verses", tokenizer, embedder, CHUNK_SIZE)
    modes = ("off", "on", "random", "in_context")
    result = evaluate(model, measured, tokenizer, retriever=verses, modes=modes, window=WINDOW, stride=WINDOW // 2)
    for line in (result.verdict.text, *result.verdict.details):
        show(line)
    off = result.mode("off").bits_per_byte
    print(f"\n  bits per byte of {result.inputs.num_documents} passages, {result.inputs.num_tokens:,} tokens")
    for mode in result.modes:
        name = "in the prompt" if mode.name == "in_context" else mode.name
        print(f"    {name:<14} {mode.bits_per_byte:.4f}  {mode.bits_per_byte / off - 1:+.1%}")

    record = {
        "command": " ".join(["python", *sys.argv]),
        "seconds": round(time.perf_counter() - start, 1),
        "machine": f"{platform.machine()}, {torch.get_num_threads()} threads",
        "versions": {"retro-hf": __version__, "torch": torch.__version__, "transformers": transformers.__version__},
        "answers": answers,
        "evaluation": result.to_dict(),
    }
    (args.output / "results.json").write_text(json.dumps(record, indent=1, ensure_ascii=False) + "\n")
    heading(f"Done in {time.perf_counter() - start:.0f} s. Left in {args.output}: two datastores, results.json")
    print(
        "  Next: retro fit BASE --texts FOLDER -o ADAPTER fits a reader to your documents, which is cheaper to read with."
    )
    if AFTER not in answers[-1]["on"] or result.verdict.outcome != "helps":
        sys.exit(
            f"Retrieval did not do what it should: {answers[-1]['on']!r} should have {AFTER}; {result.verdict.text}"
        )


if __name__ == "__main__":
    main()
