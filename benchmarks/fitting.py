"""A reader fitted to C++'s documentation: what some minutes of `retro fit` are worth.

    python benchmarks/fitting.py --steps 36     # eight minutes of one CPU core, and as many to measure

The texts are the first 1,500 characters of 800 pages of cppreference, a kind that the shipped adapter has never seen
(`examples/text_kinds.py`). The fit continues the training of that adapter, `hub_configs/retro-smollm2-135m-mixed`, or
begins with what `--base` names. What was measured is in benchmarks/results/fitting.json.
"""

import argparse
import logging
from pathlib import Path

from readers import ROOT, load_parts

from retro_hf import fit


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", default=str(ROOT / "hub_configs" / "retro-smollm2-135m-mixed"))
    parser.add_argument("--steps", type=int, default=36)
    parser.add_argument("--held-out", type=int, default=20)
    parser.add_argument("--output", type=Path, default=Path("demo_output/fitting"))
    args = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    texts = load_parts("cpp", 8)[1]
    embedder = "sentence-transformers/all-MiniLM-L6-v2"
    print(fit(args.base, texts, args.output, embedder=embedder, steps=args.steps, num_heldout=args.held_out))


if __name__ == "__main__":
    main()
