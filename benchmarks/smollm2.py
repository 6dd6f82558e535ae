"""What is `hub_configs/retro-smollm2-135m` worth? On, off, random, shuffled and oracle on texts it was not trained on.

    python benchmarks/smollm2.py                     # half an hour to an hour on one core; resumes if it is stopped
    python benchmarks/smollm2.py --documents 10      # a quick look

| text      | held out                                      | datastore                                            |
| --------- | --------------------------------------------- | ---------------------------------------------------- |
| bible     | 10 books never trained on, one translation    | the same books in two other translations             |
| licences  | the beginnings of licences, a kind of text that was never trained on | all other licences            |
| wikipedia | leads of articles never trained on            | the leads of all other articles                      |

From the datastores everything is dropped that nearly equals a held-out text (Jaccard similarity of 13-grams of 0.8, section
2.1 of the paper). Leaves datastores, results and reports in `demo_output/smollm2_texts`; `--publish` writes
`benchmarks/results/smollm2.json`, from which the tables in docs/results/smollm2.md are.
"""

import argparse
import hashlib
import json
import sys
import zipfile
from pathlib import Path

import torch
from transformers import AutoTokenizer


ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "examples"))
from demo_data import fetch, load_corpus, minilm_path, near_duplicates, split  # noqa: E402
from retrofit_smollm2 import load_base  # noqa: E402
from wiki_questions import load_articles, part_of  # noqa: E402

from retro_hf import ChunkEmbedder, RetroDatastore, RetroForCausalLM, RetroRetriever  # noqa: E402
from retro_hf.evaluation import evaluate, write_report  # noqa: E402


MODEL = ROOT / "hub_configs" / "retro-smollm2-135m"
CHARACTERS = 1500  # of a held-out license
PUBLISHED = ("verdict", "modes", "on_minus_random", "leakage", "runs", "offsets", "num_neighbors_sweep")  # no texts
TEXTS = ("bible", "wikipedia", "licences")
DOCUMENTS = {"bible": 100, "licences": 50, "wikipedia": 100}
SWEEPS = {"bible": (1, 4, 8), "licences": (), "wikipedia": ()}


def load_licences() -> list[dict]:
    """2,313 licences from a package for ScanCode: `id`, `title` and `text`."""
    found = []
    with zipfile.ZipFile(fetch("licences")) as archive:
        for name in sorted(archive.namelist()):
            if not name.endswith(".LICENSE"):
                continue
            head, _, text = archive.read(name).decode("utf-8", "replace").partition("\n---\n")
            titles = [line.removeprefix("name:").strip() for line in head.splitlines() if line.startswith("name:")]
            key = name.rsplit("/", 1)[-1].removesuffix(".LICENSE")
            if len(text.split()) >= 30:
                # The ids decide which are held out, so a new spelling would make another benchmark.
                id = f"licence/{key}"  # codespell:ignore licence
                found.append({"id": id, "title": (titles or [key])[0], "text": " ".join(text.split())})
    return found


def load_texts(name: str, count: int) -> tuple[list[dict], list[dict]]:
    """`count` held-out documents of a text, in a fixed order that has nothing to do with it, and those of its datastore."""
    if name == "bible":
        parts = split(load_corpus("bible"), "test")
        heldout, store = parts.heldout, parts.store
    elif name == "wikipedia":
        articles = [{key: one[key] for key in ("id", "title", "text")} for one in load_articles()]
        heldout = [one for one in articles if part_of(one) == "test"]
        store = articles
    else:
        store = load_licences()
        heldout = [one | {"text": one["text"][:CHARACTERS]} for one in store]
    heldout = sorted(heldout, key=lambda one: hashlib.sha256(one["id"].encode()).hexdigest())[:count]
    ids = {one["id"] for one in heldout}
    whole = [one for one in store if one["id"] in ids] or heldout
    store = [one for one in store if one["id"] not in ids]
    dropped = near_duplicates(store, whole)
    store = [one for one in store if one["id"] not in dropped]
    print(
        f"{name}: {len(heldout)} held out, {len(store):,} in the datastore, {len(dropped)} dropped as near-duplicates"
    )
    return heldout, store


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=MODEL, help="folder of the adapter")
    parser.add_argument("--texts", nargs="+", choices=TEXTS, default=TEXTS)
    parser.add_argument("--documents", type=int, help="of each text; by default 100, of licences 50")
    parser.add_argument("--work", type=Path, default=Path("demo_output/smollm2_texts"))
    parser.add_argument("--publish", action="store_true", help="write into benchmarks/results")
    args = parser.parse_args()
    torch.set_num_threads(1)
    base = load_base(Path("demo_output/smollm2/base"))
    model = RetroForCausalLM.from_pretrained(args.model, backbone_name_or_path=base, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    embedder = ChunkEmbedder.from_pretrained(minilm_path())
    published = {}
    for name in args.texts:
        heldout, store = load_texts(name, args.documents or DOCUMENTS[name])
        path = args.work / f"{name}_store"
        if path.exists():
            datastore = RetroDatastore.load(path)
        else:
            sizes = {"chunk_size": model.config.chunk_size, "neighbor_size": model.config.neighbor_size}
            datastore = RetroDatastore.build(store, path, tokenizer=tokenizer, embedder=embedder, **sizes)
        retriever = RetroRetriever(datastore, embedder=embedder, num_neighbors=model.config.num_neighbors)
        results = args.work / f"{name}_results"
        result = evaluate(
            model,
            heldout,
            tokenizer,
            retriever=retriever,
            num_neighbors_sweep=SWEEPS[name],
            window=512,
            output=results,
        )
        print(result)
        print(f"\nReport: {write_report(result, results)}\n", flush=True)
        whole = json.loads((results / "evaluation.json").read_text())
        published[name] = {key: whole[key] for key in PUBLISHED}
    if args.publish:
        path = ROOT / "benchmarks" / "results" / "smollm2.json"
        kept = json.loads(path.read_text()) if path.exists() else {}
        path.write_text(json.dumps(kept | published, indent=1) + "\n")


if __name__ == "__main__":
    main()
