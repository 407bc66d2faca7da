#!/bin/sh
# Makes plan.md, plan.json and plan.png of this folder from its runs. Run it in the repository's root.
set -e
here=benchmarks/results/cpu-intel-xeon-2/plan
headrace plan --rate 2000 --p99 100ms --output-dir "$here" --runs $here/runs
