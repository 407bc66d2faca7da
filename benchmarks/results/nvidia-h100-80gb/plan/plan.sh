#!/bin/sh
# Makes plan.md, plan.json and plan.png of this folder, and of the one with a host that pauses. Run it in the repository's root.
set -e
here=benchmarks/results/nvidia-h100-80gb/plan
headrace plan --rate 200000 --p99 25ms --network 25Gbps --proxy-rate 12000 --output-dir "$here" --runs $here/runs
headrace plan --rate 200000 --p99 25ms --network 25Gbps --proxy-rate 12000 --output-dir "$here/noisy-host" --runs $here/noisy-host/runs
