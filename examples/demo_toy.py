"""Show the toy that `make demo-train` trains from scratch: build a datastore, measure what it brings, and write a text.

    python examples/demo_toy.py

The model in `hub_configs/retro-bible` has 6 million parameters. It was trained from scratch (`make demo-train`) on 48 books
of the Bible in three translations, and has never seen ten other books. Two translations of these ten go into a datastore. The
model must predict the third one, with and without reading the datastore.

Everything but the training is computed on this machine: fetching the text, embedding and indexing, measuring, writing. A
model folder, a datastore folder and `results.json` are written to `demo_output/toy`.
"""

import argparse
import json
import platform
import shutil
import sys
import textwrap
import time
from pathlib import Path

import torch
import transformers
from demo_data import load_corpus, minilm_path, split
from transformers import AutoModelForCausalLM, AutoTokenizer

from retro_hf import ChunkEmbedder, RetroDatastore, RetroRetriever, __version__
from retro_hf.evaluation import bits_per_byte


MODEL = Path(__file__).resolve().parent.parent / "hub_configs" / "retro-bible"
WINDOW = 512
PROMPT_DOCUMENT, PROMPT_TOKENS, NEW_TOKENS = "web/exodus/8.1", 64, 64


def heading(text: str) -> None:
    """Print a line that stands out."""
    print(f"\n\033[1m{text}\033[0m" if sys.stdout.isatty() else f"\n== {text}", flush=True)


def show(text: str, indent: str = "  ") -> None:
    """Print a paragraph, wrapped."""
    print(textwrap.fill(" ".join(text.split()), 108, initial_indent=indent, subsequent_indent=indent))


def main() -> None:
    """Run the demo; exit with 1 if retrieval did not help."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=MODEL, help="model folder")
    parser.add_argument(
        "--output", type=Path, default=Path("demo_output/toy"), help="folder for what the demo leaves behind"
    )
    parser.add_argument("--documents", type=int, default=400, help="how many held-out passages to measure on")
    args = parser.parse_args()
    start = time.perf_counter()
    args.output.mkdir(parents=True, exist_ok=True)

    heading("1. Text: three Bible translations, about 30 MB, and the frozen encoder, 84 MB")
    parts = split(load_corpus("bible"), "test")
    heldout = sorted(parts.heldout, key=lambda document: document["id"])
    step = max(len(heldout) // args.documents, 1)
    measured = heldout[::step][: args.documents]
    print(
        f"  {len(parts.store)} passages for the datastore (KJV, ASV), {len(heldout)} held out (WEB), measured: {len(measured)}"
    )

    heading("2. Datastore: chunks of 32 tokens, their keys and an index")
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32)
    embedder = ChunkEmbedder.from_pretrained(minilm_path())
    store_path = args.output / "datastore"
    if store_path.exists():
        shutil.rmtree(store_path)
    begin = time.perf_counter()
    sizes = {"chunk_size": model.config.chunk_size, "neighbor_size": model.config.neighbor_size}
    datastore = RetroDatastore.build(parts.store, store_path, tokenizer=tokenizer, embedder=embedder, **sizes)
    size = sum(file.stat().st_size for file in store_path.rglob("*") if file.is_file()) / 1e6
    print(f"  {datastore.num_chunks:,} chunks, {size:.0f} MB in {store_path}, {time.perf_counter() - begin:.0f} s")
    retriever = RetroRetriever(datastore, embedder=embedder, num_neighbors=model.config.num_neighbors)

    heading("3. Does retrieval help? Bits per byte on the same held-out tokens")
    result = bits_per_byte(model, measured, tokenizer, retriever=retriever, window=WINDOW, stride=WINDOW // 2)
    print(textwrap.indent(str(result), "  "))

    heading(f"4. The same prompt ({PROMPT_DOCUMENT}, never in the datastore), retrieval off and on")
    document = next(document for document in heldout if document["id"] == PROMPT_DOCUMENT)
    tokens = tokenizer(document["text"], return_tensors="pt").input_ids
    prompt = tokens[:, :PROMPT_TOKENS]
    options = {"max_new_tokens": NEW_TOKENS, "do_sample": False, "return_dict_in_generate": True, "pad_token_id": 0}
    off = model.generate(prompt, retriever=None, **options)
    on = model.generate(prompt, retriever=retriever, **options)
    continuation = tokens[0, PROMPT_TOKENS : PROMPT_TOKENS + NEW_TOKENS]
    print("  prompt:")
    show(tokenizer.decode(prompt[0]), "    ")
    for name, ids in (
        ("retrieval off", off.sequences[0, PROMPT_TOKENS:]),
        ("retrieval on", on.sequences[0, PROMPT_TOKENS:]),
        ("what the held-out text says", continuation),
    ):
        print(f"  {name}:")
        show(tokenizer.decode(ids, skip_special_tokens=True), "    ")
    for chunk in on.retrieval_trace[0]:
        print(f"  neighbors read after chunk {chunk['chunk']}:")
        for neighbor in chunk["neighbors"]:
            show(f"{neighbor.document_id} ({neighbor.score:.2f}): {neighbor.text} → {neighbor.continuation}", "    ")

    model.save_pretrained(args.output / "model")
    tokenizer.save_pretrained(args.output / "model")
    record = result.to_dict() | {
        "command": " ".join(["python", *sys.argv]),
        "seed": 0,
        "seconds": round(time.perf_counter() - start, 1),
        "machine": f"{platform.machine()}, {torch.get_num_threads()} threads",
        "versions": {"retro-hf": __version__, "torch": torch.__version__, "transformers": transformers.__version__},
        "documents": [document["id"] for document in measured],
    }
    (args.output / "results.json").write_text(json.dumps(record, indent=1) + "\n")
    heading(f"Done in {time.perf_counter() - start:.0f} s. Left in {args.output}: model, datastore, results.json")
    bpb = result.bits_per_byte
    if bpb["on"] > 0.95 * bpb["off"] or bpb["random"] < bpb["off"]:
        sys.exit(f"Retrieval did not help as it should: {bpb}. ON must beat OFF by 5 %, RANDOM must not beat OFF.")


if __name__ == "__main__":
    main()
