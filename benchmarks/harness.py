"""
retro-bible in the lm-evaluation-harness, retrieval on and off, compared to our own evaluation of the same passages.

    pip install "retro-hf[lm-eval]"
    python benchmarks/harness.py              # about 4 minutes on 1 core; writes benchmarks/results/harness.json

Two tasks made of the demo's held-out passages (World English Bible), the datastore holding the same books in two other
translations:

- `bible_text`: bits per byte of each passage, by `loglikelihood_rolling`;
- `bible_next`: which of four endings of twelve words continues a passage of 96 tokens or a little more; the other
  three go on in other passages.

`bits_per_byte` scores the same passages with the harness's separator before them: the two must agree.
"""

import argparse
import json
import os
import platform
import sys
from importlib.metadata import version
from pathlib import Path


ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "examples"))
os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np  # noqa: E402
import torch  # noqa: E402
from demo_data import load_corpus, minilm_path, split  # noqa: E402
from lm_eval import simple_evaluate  # noqa: E402
from lm_eval.tasks import TaskManager  # noqa: E402
from transformers import AutoModelForCausalLM, AutoTokenizer  # noqa: E402

from retro_hf import ChunkEmbedder, RetroDatastore, RetroRetriever, __version__  # noqa: E402
from retro_hf.evaluation import bits_per_byte  # noqa: E402
from retro_hf.evaluation.lm_eval import RetroLM  # noqa: E402


MODEL = ROOT / "hub_configs" / "retro-bible"
CONTEXT, ENDING, CHOICES = 96, 12, 4  # tokens at least, words, endings
TASKS = {
    "bible_text": {
        "output_type": "loglikelihood_rolling",
        "doc_to_text": "",
        "doc_to_target": "{{text}}",
        "metric_list": [{"metric": "bits_per_byte"}],
    },
    "bible_next": {
        "output_type": "multiple_choice",
        "doc_to_text": "{{context}}",
        "doc_to_choice": "{{endings}}",
        "doc_to_target": "{{answer}}",
        "metric_list": [{"metric": "acc"}],
    },
}


def endings(passages: list[dict], tokenizer) -> list[dict]:
    """Questions: a beginning, four ways to go on, and the place of the right one."""
    cuts = []
    for passage in passages:
        offsets = tokenizer(passage["text"], return_offsets_mapping=True)["offset_mapping"]
        if len(offsets) <= CONTEXT:
            continue
        context = passage["text"][: offsets[CONTEXT][1]].rsplit(" ", 1)[0]
        words = passage["text"][len(context) :].split()[:ENDING]
        if len(words) == ENDING:
            cuts.append((context, " ".join(words)))
    generator = np.random.default_rng(0)
    questions = []
    for number, (context, right) in enumerate(cuts):
        others = generator.choice([i for i in range(len(cuts)) if i != number], CHOICES - 1, replace=False)
        answer = int(generator.integers(CHOICES))
        choices = [cuts[other][1] for other in others]
        questions.append(
            {"context": context, "endings": [*choices[:answer], right, *choices[answer:]], "answer": answer}
        )
    return questions


def write_tasks(folder: Path, content: dict[str, list[dict]]) -> None:
    """A JSONL file and a YAML file, which may hold JSON, for each task."""
    for name, rows in content.items():
        data = folder / f"{name}.jsonl"
        data.write_text("".join(json.dumps(row) + "\n" for row in rows))
        source = {"dataset_path": "json", "dataset_kwargs": {"data_files": {"test": str(data)}}, "test_split": "test"}
        (folder / f"{name}.yaml").write_text(json.dumps({"task": name, **source, **TASKS[name]}))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--documents", type=int, default=100)
    parser.add_argument(
        "--work", type=Path, default=ROOT / ".data" / "harness", help="folder for the store and the tasks"
    )
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results" / "harness.json")
    args = parser.parse_args()
    args.work.mkdir(parents=True, exist_ok=True)
    tokenizer = AutoTokenizer.from_pretrained(MODEL)
    model = AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32)
    parts = split(load_corpus("bible"), "test")
    heldout = sorted(parts.heldout, key=lambda document: document["id"])
    passages = heldout[:: max(len(heldout) // args.documents, 1)][: args.documents]
    embedder = ChunkEmbedder.from_pretrained(minilm_path())
    store = args.work / "datastore"
    if store.exists():
        datastore = RetroDatastore.load(store)
    else:
        sizes = {"chunk_size": model.config.chunk_size, "neighbor_size": model.config.neighbor_size}
        datastore = RetroDatastore.build(parts.store, store, tokenizer=tokenizer, embedder=embedder, **sizes)
    retriever = RetroRetriever(datastore, embedder=embedder, num_neighbors=model.config.num_neighbors)

    questions = endings(passages, tokenizer)
    write_tasks(args.work, {"bible_text": [{"text": d["text"]} for d in passages], "bible_next": questions})
    manager = TaskManager(include_path=args.work, include_defaults=False)
    found = {}
    for mode, source in (("on", retriever), ("off", None)):
        lm = RetroLM(model, tokenizer=tokenizer, retriever=source, batch_size=8)
        result = simple_evaluate(lm, tasks=list(TASKS), task_manager=manager, bootstrap_iters=0, log_samples=False)
        found[mode] = {
            "bits_per_byte": result["results"]["bible_text"]["bits_per_byte,none"],
            "accuracy": result["results"]["bible_next"]["acc,none"],
        }
    texts = [passage["text"] for passage in passages]
    modes = ("on", "off")
    ours = bits_per_byte(model, texts, tokenizer, retriever=retriever, modes=modes, window=2048, add_bos=True)
    print("| | bits per byte, harness | bits per byte, ours | right ending of four |\n|---|---|---|---|")
    for mode, row in found.items():
        row["ours"] = ours.bits_per_byte[mode]
        right, spread = row["accuracy"], (row["accuracy"] * (1 - row["accuracy"]) / len(questions)) ** 0.5
        row["accuracy_stderr"] = spread
        print(f"| {mode} | {row['bits_per_byte']:.6f} | {row['ours']:.6f} | {right:.1%} ± {spread:.1%} |")
    record = {
        "command": f"python benchmarks/harness.py --documents {args.documents}",
        "machine": f"{platform.machine()}, {os.environ['OMP_NUM_THREADS']} thread",
        "versions": {"retro-hf": __version__}
        | {name: version(name) for name in ("lm-eval", "torch", "transformers", "faiss-cpu")},
        "passages": len(passages),
        "questions": len(questions),
        "results": found,
    }
    args.output.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
