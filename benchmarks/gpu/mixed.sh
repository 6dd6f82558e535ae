#!/usr/bin/env bash
# examples/train_mixed.py on a GPU, in under 8 minutes; if it was interrupted, the same command resumes it.
# A machine without a network needs the folder that `--prepare` filled (packed by pack.py) and, in .data/wheels, those of SmolLM2 and MiniLM.
set -euo pipefail
cd "$(dirname "$0")/../.."
python examples/train_mixed.py --minutes 5 --output "${1:-demo_output/mixed}"
