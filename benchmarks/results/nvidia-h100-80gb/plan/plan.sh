#!/bin/sh
# Makes plan.md, plan.json and plan.png of this folder from its runs. Run it in the repository's root.
set -e
here=benchmarks/results/nvidia-h100-80gb/plan
exec headrace plan --rate 200000 --p99 25ms --network 25Gbps --proxy-rate 12000 --output-dir "$here" --runs $here/runs
