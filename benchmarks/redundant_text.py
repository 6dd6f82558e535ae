"""The toy of `hub_configs/retro-bible` on much-repeated text: modes, numbers of neighbors, sizes of the store, and copying.

    python benchmarks/redundant_text.py                     # about 15 minutes on one core; resumes if it is stopped
    python benchmarks/redundant_text.py --documents 20      # a quick look

`hub_configs/retro-bible` predicts held-out passages of ten books in one translation, with the other two in the datastore
(the data of `make demo`). Leaves the datastore, the results and the report in `demo_output/redundant_text`; `--publish`
copies the values into benchmarks/results and the curves into docs/results.
"""

import argparse
import shutil
import sys
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer


ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "examples"))
from demo_data import load_corpus, minilm_path, split  # noqa: E402

from retro_hf import ChunkEmbedder, RetroDatastore, RetroRetriever  # noqa: E402
from retro_hf.evaluation import evaluate, trace, write_report  # noqa: E402


MODEL = ROOT / "hub_configs" / "retro-bible"
NUM_NEIGHBORS = (1, 3, 5, 10, 20)
FRACTIONS = (0.01, 0.03, 0.1, 0.3, 0.5)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--documents", type=int, default=150)
    parser.add_argument("--work", type=Path, default=Path("demo_output/redundant_text"))
    parser.add_argument("--publish", action="store_true", help="write into docs/results and benchmarks/results")
    args = parser.parse_args()
    torch.set_num_threads(1)
    tokenizer = AutoTokenizer.from_pretrained(MODEL)
    model = AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32)
    embedder = ChunkEmbedder.from_pretrained(minilm_path())
    parts = split(load_corpus("bible"), "test")
    heldout = sorted(parts.heldout, key=lambda document: document["id"])
    measured = heldout[:: max(len(heldout) // args.documents, 1)][: args.documents]

    path = args.work / "datastore"
    if path.exists():
        datastore = RetroDatastore.load(path)
    else:
        sizes = {"chunk_size": model.config.chunk_size, "neighbor_size": model.config.neighbor_size}
        datastore = RetroDatastore.build(parts.store, path, tokenizer=tokenizer, embedder=embedder, **sizes)
    retriever = RetroRetriever(datastore, embedder=embedder, num_neighbors=model.config.num_neighbors)
    results = args.work / "results"
    result = evaluate(
        model,
        measured,
        tokenizer,
        retriever=retriever,
        num_neighbors_sweep=NUM_NEIGHBORS,
        fractions=FRACTIONS,
        window=512,
        output=results,
    )
    traced = [document for document in heldout if document["id"] in ("web/exodus/8.1", "web/exodus/20.1")]
    page = write_report(result, results, traces=[trace(model, one, tokenizer, retriever=retriever) for one in traced])
    print(result)
    print(f"\nReport: {page}")
    if args.publish:
        shutil.copy(results / "evaluation.json", ROOT / "benchmarks" / "results" / "redundant_text.json")
        shutil.copy(results / "report.png", ROOT / "docs" / "results" / "redundant_text.png")


if __name__ == "__main__":
    main()
