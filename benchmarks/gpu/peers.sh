#!/usr/bin/env bash
# benchmarks/peers.py on a GPU in bfloat16 autocast, in under 5 minutes. The peer must be importable (see the docstring there).
set -euo pipefail
cd "$(dirname "$0")/../.."
python benchmarks/peers.py --device cuda --batch-size 8 --lengths 2048 --rounds 2 --repeats 10 --out "${1:-benchmarks/results/peers_gpu.json}"
