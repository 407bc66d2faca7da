#!/usr/bin/env bash
# The published designs on a host with two GPUs: three runs of every combination, each in fresh processes.
#
#   benchmarks/published-designs.sh DIR [SECONDS]
#
# Four sweeps run side by side, two on each GPU, each with CPUs of its own. Two sweeps of one GPU share a lock file: while
# one measures, the other prepares its next run (imports, payloads), and never do both measure. `a` sweeps measure every
# combination once; the `b` sweeps share one more repeat between the GPUs by batch size. After SECONDS all stop, and the
# same command goes on where they stopped. Compile caches are warmed before.
set -euo pipefail
cd "$(dirname "$0")/.."
root=$1
seconds=${2:-86400}
python=${PYTHON:-python3}
options=${OPTIONS:---no-download --device cuda}
mkdir -p "$root"

headrace() { "$python" -m headrace "$@"; }

cpus() { # the INDEXth of four equal sets of CPUs: "0-7"
    local each=$(($(nproc) / 4))
    ((each > 0)) || each=1
    echo "$(($1 * each % $(nproc)))-$(($1 * each % $(nproc) + each - 1))"
}

warm() { # fill the compile cache for the batch sizes given, on one GPU; nothing of it is kept
    local gpu=$1
    shift
    for size in "$@"; do
        # shellcheck disable=SC2086
        CUDA_VISIBLE_DEVICES=$gpu headrace bench $options --design executor --compile --batch-size "$size" \
            --model-dir "$root" --num-iters 2 --output-dir "$root/warm-$size" --overwrite >"$root/warm-$size.log" 2>&1 &
    done
}

part() { # NAME GPU CPU-SET SEED BATCH-SIZE...
    local name=$1 gpu=$2 set=$3 seed=$4
    shift 4
    # shellcheck disable=SC2086
    CUDA_VISIBLE_DEVICES=$gpu taskset -c "$(cpus "$set")" timeout -s INT -k 30 "$left" \
        "$python" -m headrace sweep $options --model-dir "$root" --repeats 1 --order-seed "$seed" --batch-sizes "$@" \
        --exclusive "$root/gpu$gpu.lock" --output-dir "$root/$name" >"$root/$name.log" 2>&1 &
}

started=$(date +%s)
if [[ ! -e $root/warmed ]]; then
    headrace checkpoint --model-dir "$root"
    warm 0 1 64 256
    warm 1 32 128
    wait
    rm -rf "$root"/warm-*
    touch "$root/warmed"
fi
left=$((seconds - $(date +%s) + started))
part gpu0-a 0 0 1 1 32 64 128 256
part gpu0-b 0 1 2 1 64 256
part gpu1-a 1 2 3 1 32 64 128 256
part gpu1-b 1 3 2 32 128
wait
for name in gpu0-a gpu0-b gpu1-a gpu1-b; do
    echo "$name: $(find "$root/$name/runs" -name summary.json | wc -l) runs; $(tail -n 1 "$root/$name.log")"
done
headrace tables "$root" | tail -n 1
headrace findings "$root" --output "$root/findings.md"
