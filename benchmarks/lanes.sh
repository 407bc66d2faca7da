#!/usr/bin/env bash
# The lanes against what the GPU can do and against the published designs: a fresh process for each run, one GPU each.
#
#   benchmarks/lanes.sh DIR [SECONDS]
#
# `cells.sh` makes the runs in the order below; the same command goes on with those that are missing. A cell's name is
# SERIES-bBATCH, and the number behind the dot is the repeat. `python benchmarks/lanes_report.py DIR` makes the page and
# the chart.
set -euo pipefail
cd "$(dirname "$0")/.."
source benchmarks/cells.sh "$@"

# "bf16" is the model as torch.compile takes it; "fast" is with all rewrites of the model, as they are on by default.
plain="--no-fuse-epilogues --stem keep --no-pointwise-as-matmul"
bf16="--precision bf16 --compile $plain"
fast="--precision bf16 --compile"
fast16="--precision fp16 --compile"
lanes="--design lanes --client zero-copy"
alone="$lanes --no-limits"
cells() { # NAME OPTIONS
    cat <<CELLS
bf16-b32.0 $lanes $bf16 --batch-size 32
bf16-b1.0 $lanes $bf16 --batch-size 1
bf16-b256.0 $lanes $bf16 --batch-size 256
bf16-b8.0 $lanes $bf16 --batch-size 8
fast_fp16_uint8-b256.0 $lanes $fast16 --wire uint8 --batch-size 256 --num-iters 1024
fast_bf16_uint8-b256.0 $lanes $fast --wire uint8 --batch-size 256 --num-iters 1024
tf32-b32.0 $lanes --batch-size 32
tf32-b256.0 $lanes --batch-size 256
dynamic_bf16-b1.0 $lanes $bf16 --batch-size 1 --buckets 1 8 32 128
bf16-b128.0 $lanes $bf16 --batch-size 128
bf16-b64.0 $lanes $bf16 --batch-size 64
tf32-b1.0 $lanes --batch-size 1 --num-iters 20000
tf32-b8.0 $lanes --batch-size 8
tf32-b128.0 $lanes --batch-size 128
copying_bf16-b32.0 --design lanes $bf16 --batch-size 32
latency_bf16-b1.0 $lanes $bf16 --batch-size 1 --ring-slots 1 --num-iters 4000
fast_bf16_uint8-b32.0 $lanes $fast --wire uint8 --batch-size 32 --num-iters 4096
fast_bf16_uint8-b1.0 $lanes $fast --wire uint8 --batch-size 1
fast_bf16-b32.0 $lanes $fast --batch-size 32
fast_bf16-b256.0 $lanes $fast --batch-size 256
fast_dynamic_bf16_uint8-b1.0 $lanes $fast --wire uint8 --batch-size 1 --buckets 1 8 32 128
timeline-b32.0 $alone $bf16 --batch-size 32 --num-iters 60 --profile
bf16-b32.1 $lanes $bf16 --batch-size 32
bf16-b1.1 $lanes $bf16 --batch-size 1
bf16-b256.1 $lanes $bf16 --batch-size 256
bf16-b8.1 $lanes $bf16 --batch-size 8
fast_fp16_uint8-b256.1 $lanes $fast16 --wire uint8 --batch-size 256 --num-iters 1024
fast_bf16_uint8-b256.1 $lanes $fast --wire uint8 --batch-size 256 --num-iters 1024
tf32-b32.1 $lanes --batch-size 32
tf32-b256.1 $lanes --batch-size 256
dynamic_bf16-b1.1 $lanes $bf16 --batch-size 1 --buckets 1 8 32 128
bf16-b32.2 $lanes $bf16 --batch-size 32
bf16-b1.2 $lanes $bf16 --batch-size 1
bf16-b256.2 $lanes $bf16 --batch-size 256
bf16-b8.2 $lanes $bf16 --batch-size 8
fast_fp16_uint8-b256.2 $lanes $fast16 --wire uint8 --batch-size 256 --num-iters 1024
fast_bf16_uint8-b256.2 $lanes $fast --wire uint8 --batch-size 256 --num-iters 1024
tf32-b32.2 $lanes --batch-size 32
tf32-b256.2 $lanes --batch-size 256
dynamic_bf16-b1.2 $lanes $bf16 --batch-size 1 --buckets 1 8 32 128
published-queue-b32.0 --design h2d_d2h_threads --batch-size 32
published-ring-b32.0 --design h2d_d2h_threads --batch-size 32 --transport ring
ablation-no_prefetch-b32.0 $alone $bf16 --batch-size 32 --no-prefetch
ablation-no_graphs-b32.0 $alone $bf16 --batch-size 32 --no-graphs
ablation-no_compile-b32.0 $alone --precision bf16 $plain --batch-size 32
ablation-queue-b32.0 --design lanes --transport queue --no-limits $bf16 --batch-size 32
ablation-1_lane-b32.0 $alone $bf16 --batch-size 32 --num-workers 1
ablation-2_lanes-b32.0 $alone $bf16 --batch-size 32 --num-workers 2
ablation-8_lanes-b32.0 $alone $bf16 --batch-size 32 --num-workers 8
ablation-no_spin-b32.0 $alone $bf16 --batch-size 32 --no-spin
ablation-no_spin-b256.0 $alone $bf16 --batch-size 256 --no-spin
ablation-no_spin-b1.0 $alone $bf16 --batch-size 1 --no-spin
ablation-1_lane-b1.0 $alone $bf16 --batch-size 1 --num-workers 1 --num-iters 20000
ablation-4_lanes-b1.0 $alone $bf16 --batch-size 1 --num-workers 4
ablation-8_lanes-b1.0 $alone $bf16 --batch-size 1 --num-workers 8
ablation-fast_no_fuse-b256.0 $alone $fast16 --wire uint8 --batch-size 256 --no-fuse-epilogues
ablation-fast_keep_stem-b256.0 $alone $fast16 --wire uint8 --batch-size 256 --stem keep
ablation-fast_s2d_stem-b256.0 $alone $fast16 --wire uint8 --batch-size 256 --stem space-to-depth
ablation-fast_no_matmul-b256.0 $alone $fast16 --wire uint8 --batch-size 256 --no-pointwise-as-matmul
ablation-fast_2_lanes-b32.0 $alone $fast --wire uint8 --batch-size 32 --num-workers 2
copying_bf16-b256.0 --design lanes $bf16 --batch-size 256
fast_fp16_uint8-b32.0 $lanes $fast16 --wire uint8 --batch-size 32 --num-iters 4096
CELLS
}


cells | run_cells
