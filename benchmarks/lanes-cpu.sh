#!/usr/bin/env bash
# The lanes beside the published designs on a machine without a GPU: every run a fresh process, interleaved.
#
#   benchmarks/lanes-cpu.sh DIR [REPEATS]
set -euo pipefail
cd "$(dirname "$0")/.."
root=$1
"${PYTHON:-python3}" -m headrace sweep --device cpu --designs original executor h2d_d2h_threads lanes --workers 1 \
    --batch-sizes 1 8 --compile off --repeats "${2:-5}" --num-iters 12 --output-dir "$root" --model-dir "$root"
for design in original executor h2d_d2h_threads; do
    "${PYTHON:-python3}" -m headrace compare "$root:$design" "$root:1_lanes-ring" >"$root/$design.md"
done
rm -rf "$root"/references "$root"/*.pth "$root"/runs/*.log
