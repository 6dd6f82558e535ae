#!/usr/bin/env bash
# Compiled decoding on a GPU: its tests, then its speed compared to eager decoding.
set -euo pipefail
cd "$(dirname "$0")/../.."
python -m pytest -q -m gpu tests/test_cuda.py -k one_cuda_graph
python benchmarks/compiled_decoding.py --device cuda --models narrow 80m-rope 80m-paper \
  --out "${1:-benchmarks/results/compiled_decoding_gpu.json}"
