#!/usr/bin/env bash
# Runs from which `headrace plan` is made, and its errors are found: sizes of requests, numbers of lanes, and loads.
#
#   benchmarks/planning.sh DIR [SECONDS] [cuda|cpu]
#
# `cells.sh` makes the runs in the order below; the same command goes on with those that are missing. A cell's name says the
# rows of a request, the lanes, and the load; the number behind the dot is the repeat.
set -euo pipefail
cd "$(dirname "$0")/.."
[[ ${3:-cuda} == cuda ]] || export OPTIONS="--no-download --device cpu --image-size 64"
source benchmarks/cells.sh "$@"
lanes="--design lanes --client zero-copy"
fast="$lanes --precision bf16 --compile"

cuda_cells() { # REPEAT
    local poisson="--load poisson --load-seed $1 --duration 4s --rate" closed="--load closed --duration 3s --concurrency"
    local fast="$fast $([[ $1 == 0 ]] && echo --limits || echo --no-limits)" # once is enough
    cat <<CELLS
b1-16_lanes-burst.$1 $fast --batch-size 1 --num-workers 16 --num-iters 50000
b1-16_lanes-poisson_5000.$1 $fast --batch-size 1 --num-workers 16 $poisson 5000
b1-16_lanes-poisson_11000.$1 $fast --batch-size 1 --num-workers 16 $poisson 11000
b1-16_lanes-poisson_16000.$1 $fast --batch-size 1 --num-workers 16 $poisson 16000
b1-16_lanes-constant_2000.$1 $fast --batch-size 1 --num-workers 16 --load constant --duration 4s --rate 2000
b1-16_lanes-closed_1.$1 $fast --batch-size 1 --num-workers 16 $closed 1
b1-16_lanes-closed_8.$1 $fast --batch-size 1 --num-workers 16 $closed 8
b1-8_lanes-burst.$1 $fast --batch-size 1 --num-workers 8 --num-iters 40000
b1-4_lanes-burst.$1 $fast --batch-size 1 --num-workers 4 --num-iters 30000
b1-2_lanes-burst.$1 $fast --batch-size 1 --num-workers 2 --num-iters 20000
b1-1_lane-burst.$1 $fast --batch-size 1 --num-workers 1 --num-iters 12000
to8-2_lanes-poisson_11000.$1 $fast --batch-size 1 --max-batch-size 8 --num-workers 2 $poisson 11000
to8-4_lanes-poisson_11000.$1 $fast --batch-size 1 --max-batch-size 8 --num-workers 4 $poisson 11000
to8-4_lanes-poisson_20000.$1 $fast --batch-size 1 --max-batch-size 8 --num-workers 4 $poisson 20000
to8-4_lanes-burst.$1 $fast --batch-size 1 --max-batch-size 8 --num-workers 4 --num-iters 60000
to128-4_lanes-poisson_20000.$1 $fast --batch-size 1 --buckets 1 8 32 128 --num-workers 4 $poisson 20000
to128-4_lanes-burst.$1 $fast --batch-size 1 --buckets 1 8 32 128 --num-workers 4 --num-iters 80000
to128-4_lanes-closed_64.$1 $fast --batch-size 1 --buckets 1 8 32 128 --num-workers 4 $closed 64
b8-4_lanes-burst.$1 $fast --batch-size 8 --num-workers 4 --num-iters 10000
b8-1_lane-burst.$1 $fast --batch-size 8 --num-workers 1 --num-iters 6000
b8-4_lanes-poisson_2000.$1 $fast --batch-size 8 --num-workers 4 $poisson 2000
b32-4_lanes-burst.$1 $fast --batch-size 32 --num-workers 4 --num-iters 3000
b32-2_lanes-burst.$1 $fast --batch-size 32 --num-workers 2 --num-iters 3000
b32-2_lanes-poisson_700.$1 $fast --batch-size 32 --num-workers 2 $poisson 700
b128-4_lanes-burst.$1 $fast --batch-size 128 --num-workers 4 --num-iters 1000
b128-2_lanes-burst.$1 $fast --batch-size 128 --num-workers 2 --num-iters 1000
CELLS
}

cpu_cells() { # REPEAT
    local poisson="--load poisson --load-seed $1 --duration 12s --rate" closed="--load closed --duration 8s --concurrency"
    cat <<CELLS
b1-1_lane-burst.$1 $lanes --batch-size 1 --num-workers 1 --num-iters 1500
b1-1_lane-closed_1.$1 $lanes --batch-size 1 --num-workers 1 $closed 1
b1-1_lane-poisson_100.$1 $lanes --batch-size 1 --num-workers 1 $poisson 100
b1-2_lanes-burst.$1 $lanes --batch-size 1 --num-workers 2 --num-iters 1500
b2-1_lane-burst.$1 $lanes --batch-size 2 --num-workers 1 --num-iters 800
b4-1_lane-burst.$1 $lanes --batch-size 4 --num-workers 1 --num-iters 500
b4-2_lanes-burst.$1 $lanes --batch-size 4 --num-workers 2 --num-iters 500
b8-1_lane-burst.$1 $lanes --batch-size 8 --num-workers 1 --num-iters 300
b8-2_lanes-burst.$1 $lanes --batch-size 8 --num-workers 2 --num-iters 300
b16-1_lane-burst.$1 $lanes --batch-size 16 --num-workers 1 --num-iters 150
b16-2_lanes-burst.$1 $lanes --batch-size 16 --num-workers 2 --num-iters 150
to8-1_lane-burst.$1 $lanes --batch-size 1 --max-batch-size 8 --num-workers 1 --num-iters 2000
to8-1_lane-closed_6.$1 $lanes --batch-size 1 --max-batch-size 8 --num-workers 1 $closed 6
to8-1_lane-poisson_200.$1 $lanes --batch-size 1 --max-batch-size 8 --num-workers 1 $poisson 200
to8-1_lane-poisson_300.$1 $lanes --batch-size 1 --max-batch-size 8 --num-workers 1 $poisson 300
to8-1_lane-constant_50.$1 $lanes --batch-size 1 --max-batch-size 8 --num-workers 1 --load constant --duration 12s --rate 50
CELLS
}

for repeat in 0 1; do "${3:-cuda}_cells" $repeat; done | run_cells
