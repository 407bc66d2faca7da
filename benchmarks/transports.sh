#!/usr/bin/env bash
# What the ring is worth against the published queue, where the model costs nothing: runs of both, in turn.
#
#   benchmarks/transports.sh DIR [REPEATS]
set -euo pipefail
cd "$(dirname "$0")/.."
root=$1
python=${PYTHON:-python3}
options=${OPTIONS:---device cpu}
for repeat in $(seq "${2:-5}"); do
    for design in original h2d_d2h_threads; do
        for batch_size in 1 32; do
            for transport in queue ring; do
                # shellcheck disable=SC2086
                "$python" -m headrace bench $options --design "$design" --transport "$transport" --batch-size "$batch_size" \
                    --num-iters 60 --model benchmarks/tiny_model.py:build --reference-cache "$root/references" \
                    --output-dir "$root/$transport/runs/r$repeat-b$batch_size-$design" >/dev/null
            done
        done
    done
done
rm -rf "$root/references"
for design in original h2d_d2h_threads; do
    "$python" -m headrace compare "$root/queue:$design" "$root/ring:$design-ring" >"$root/$design.md"
done
