#!/usr/bin/env bash
# The lanes against what the GPU can do and against the published designs: a fresh process for each run, one GPU each.
#
#   benchmarks/lanes.sh DIR [SECONDS]
#
# Runs are made in the order below, side by side on as many GPUs as there are, each with CPUs of its own; after SECONDS no
# new one begins, and the same command goes on with those that are missing. A cell's name is SERIES-bBATCH, and the number
# behind the dot is the repeat. `python benchmarks/lanes_report.py DIR` makes the page and the chart.
set -euo pipefail
cd "$(dirname "$0")/.."
export root=$1
export deadline=$(($(date +%s) + ${2:-86400}))
export python=${PYTHON:-python3}
export options=${OPTIONS:---no-download --device cuda}
gpus=${GPUS:-$(nvidia-smi -L 2>/dev/null | wc -l)}
export gpus=$((gpus > 0 ? gpus : 1))
mkdir -p "$root/runs" "$root/logs"

bf16="--precision bf16 --compile"
fp16="--precision fp16 --compile"
lanes="--design lanes --client zero-copy"
cells() { # NAME OPTIONS
    cat <<CELLS
bf16-b32.0 $lanes $bf16 --batch-size 32
bf16-b1.0 $lanes $bf16 --batch-size 1
bf16-b256.0 $lanes $bf16 --batch-size 256
fp16_uint8-b256.0 $lanes $fp16 --batch-size 256 --wire uint8
tf32-b32.0 $lanes --batch-size 32
dynamic_bf16-b1.0 $lanes $bf16 --batch-size 1 --buckets 1 8 32 128
copying_bf16-b32.0 --design lanes $bf16 --batch-size 32
bf16-b8.0 $lanes $bf16 --batch-size 8
bf16-b128.0 $lanes $bf16 --batch-size 128
bf16-b64.0 $lanes $bf16 --batch-size 64
tf32-b1.0 $lanes --batch-size 1 --num-iters 20000
tf32-b256.0 $lanes --batch-size 256
tf32-b8.0 $lanes --batch-size 8
tf32-b128.0 $lanes --batch-size 128
ablation-no_prefetch-b32.0 $lanes $bf16 --batch-size 32 --no-prefetch
ablation-no_graphs-b32.0 $lanes $bf16 --batch-size 32 --no-graphs
ablation-no_compile-b32.0 $lanes --precision bf16 --batch-size 32
ablation-queue-b32.0 --design lanes --transport queue $bf16 --batch-size 32
ablation-1_lane-b32.0 $lanes $bf16 --batch-size 32 --num-workers 1
ablation-2_lanes-b32.0 $lanes $bf16 --batch-size 32 --num-workers 2
ablation-2_lanes-b256.0 $lanes $bf16 --batch-size 256 --num-workers 2
ablation-3_lanes-b32.0 $lanes $bf16 --batch-size 32 --num-workers 3
ablation-8_lanes-b32.0 $lanes $bf16 --batch-size 32 --num-workers 8
ablation-no_spin-b32.0 $lanes $bf16 --batch-size 32 --no-spin
ablation-no_spin-b256.0 $lanes $bf16 --batch-size 256 --no-spin
ablation-no_spin-b1.0 $lanes $bf16 --batch-size 1 --no-spin
published-queue-b32.0 --design h2d_d2h_threads --batch-size 32
published-ring-b32.0 --design h2d_d2h_threads --batch-size 32 --transport ring
latency_bf16-b1.0 $lanes $bf16 --batch-size 1 --ring-slots 1 --num-iters 4000
copying_bf16-b256.0 --design lanes $bf16 --batch-size 256
fast_start_fp16-b256.0 $lanes --precision fp16 --batch-size 256 --wire uint8
fp16_uint8-b32.0 $lanes $fp16 --batch-size 32 --wire uint8
bf16-b32.1 $lanes $bf16 --batch-size 32
bf16-b1.1 $lanes $bf16 --batch-size 1
bf16-b256.1 $lanes $bf16 --batch-size 256
fp16_uint8-b256.1 $lanes $fp16 --batch-size 256 --wire uint8
dynamic_bf16-b1.1 $lanes $bf16 --batch-size 1 --buckets 1 8 32 128
bf16-b32.2 $lanes $bf16 --batch-size 32
bf16-b1.2 $lanes $bf16 --batch-size 1
bf16-b256.2 $lanes $bf16 --batch-size 256
fp16_uint8-b256.2 $lanes $fp16 --batch-size 256 --wire uint8
tf32-b32.1 $lanes --batch-size 32
tf32-b256.1 $lanes --batch-size 256
timeline-b32.0 $lanes $bf16 --batch-size 32 --num-iters 60 --no-limits --profile
ablation-1_lane-b1.0 $lanes $bf16 --batch-size 1 --num-workers 1 --num-iters 20000
ablation-4_lanes-b1.0 $lanes $bf16 --batch-size 1 --num-workers 4
ablation-8_lanes-b1.0 $lanes $bf16 --batch-size 1 --num-workers 8
published-ring-b256.0 --design h2d_d2h_threads --batch-size 256 --transport ring
dynamic_tf32-b1.0 $lanes --batch-size 1 --buckets 1 8 32 128
tf32-b32.2 $lanes --batch-size 32
tf32-b256.2 $lanes --batch-size 256
CELLS
}

run_cell() { # SLOT NAME OPTIONS...
    local slot=$1 name=$2 each
    shift 2
    [[ -e $root/runs/$name/summary.json ]] && return
    (($(date +%s) + 25 < deadline)) || return 0
    each=$(($(nproc) / gpus))
    CUDA_VISIBLE_DEVICES=$((slot % gpus)) taskset -c "$((slot * each))-$((slot * each + each - 1))" \
        timeout -k 5 90 "$python" -m headrace bench $options --model-dir "$root" --reference-cache "$root/references" \
        --output-dir "$root/runs/$name" --overwrite "$@" >"$root/logs/$name.log" 2>&1 ||
        echo "$name: $(tail -n 1 "$root/logs/$name.log")"
}
export -f run_cell

"$python" -m headrace checkpoint --model-dir "$root" >/dev/null
cells | xargs -P "$gpus" --process-slot-var=SLOT -I{} bash -c 'run_cell "$SLOT" {}'
rm -rf "$root/references"
echo "$(find "$root/runs" -name summary.json | wc -l) of $(cells | wc -l) runs"
