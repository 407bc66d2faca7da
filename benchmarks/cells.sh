# Sourced with DIR [SECONDS] by scripts that make many runs of `headrace bench`: `run_cells` reads a line `NAME OPTIONS` for each.
#
# Runs go side by side on as many GPUs as there are (GPUS changes that), each with CPUs of its own, in a fresh process. After SECONDS
# no new one begins, and runs that are there are not made again. OPTIONS and PYTHON may be set.
export root=$1
export deadline=$(($(date +%s) + ${2:-86400}))
export python=${PYTHON:-python3}
export options=${OPTIONS:---no-download --device cuda}
gpus=${GPUS:-$({ nvidia-smi -L 2>/dev/null || true; } | wc -l)}
export gpus=$((gpus > 0 ? gpus : 1))

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

run_cells() {
    local all
    all=$(cat)
    mkdir -p "$root/runs" "$root/logs"
    "$python" -m headrace checkpoint --model-dir "$root" >/dev/null
    xargs -P "$gpus" --process-slot-var=SLOT -I{} bash -c 'run_cell "$SLOT" {}' <<<"$all"
    rm -rf "$root/references"
    echo "$(find "$root/runs" -name summary.json | wc -l) of $(wc -l <<<"$all") runs"
}
