#!/usr/bin/env bash
# benchmarks/retrofit.py on a GPU, all seeds and sizes at once, in under 8 minutes; if it was interrupted, the same command resumes it.
# A machine without a network needs what `--prepare` made, packed by pack.py.
set -uo pipefail
cd "$(dirname "$0")/../.."
work="${1:-demo_output/retrofit}"
for seed in 0 1 2; do
  python benchmarks/retrofit.py --work "$work" --size demo --seeds $seed --device cuda --minutes 7 &
done
python benchmarks/retrofit.py --work "$work" --size d512 --seeds 0 --device cuda --minutes 7 &
wait
