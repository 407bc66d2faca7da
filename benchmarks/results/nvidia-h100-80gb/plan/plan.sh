#!/bin/sh
# Makes plan.md, plan.json and plan.png of this folder from committed runs. Run it in the repository's root.
set -e
runs=benchmarks/results/nvidia-h100-80gb/lanes/runs
here=benchmarks/results/nvidia-h100-80gb/plan
exec headrace plan --rate 200000 --p99 25ms --network 25Gbps --proxy-rate 12000 --output-dir "$here" --runs \
    $runs/latency_bf16-b1.0 $runs/ablation-1_lane-b* $runs/ablation-2_lanes-b32.0 $runs/ablation-4_lanes-b1.0 \
    $runs/ablation-8_lanes-b* $runs/bf16-b* $runs/dynamic_bf16-b1.* benchmarks/results/nvidia-h100-80gb/open-load/[cp]*
