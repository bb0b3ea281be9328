#!/usr/bin/env bash
# For the first minutes on a rented GPU machine without packages or network: the most important measurements first.
# A stage that fails or hangs does not stop the others, and all end at the limit.
#
#   make gpu-wheels                                    # beforehand: downloads the packages that such a machine lacks into .whl
#   OUT=results bash scripts/gpu_first.sh              # on the machine: at most 480 seconds, 4 files in $OUT
#   OUT=results PART=second bash scripts/gpu_first.sh  # in the same session: at most 270 seconds, 4 more files
#   STAGES="train resume" bash scripts/gpu_first.sh    # only these stages, for example after a fix
#   bash scripts/gpu_first.sh --dry-run                # at toy size on the CPU, limits fourfold
#
# Copy .whl, assets/tokenizer and assets/sotu together with the source tree: git ignores them. LIMIT=300 changes the limit.
# $OUT (default build/gpu-first-results) gets first.log with all output, first.json with the machine, versions, exit
# statuses and rows, first.md with the main rows, and the training's first-metrics.jsonl. scripts/gpu_suite.sh is the long
# version, for a GPU that you have for longer.
set -uo pipefail
cd "$(dirname "$0")/.."
PYTHON=${PYTHON:-python3} part=${PART:-first} only=${STAGES:-}

refuse() {
    echo "$1" >&2
    exit 2
}

case $part in
first) limit=480 ;;
second) limit=270 ;;
*) refuse "PART=$part: must be first or second" ;;
esac
case ${1:-} in
--dry-run)
    device=cpu preset=tiny batch=2 length=64 long=128 documents=32 steps=4 rounds=1 dtype=float32 tokens=4 patience=4
    hf=hf text=assets/sotu/1861-Lincoln-1.txt # torch.compile takes minutes on a busy CPU
    export JAX_PLATFORMS=cpu
    ;;
"")
    device=gpu preset=smollm2-135m batch=16 length=2048 long=8192 documents=512 steps=30 rounds=6 dtype=bfloat16 tokens=128
    patience=1 hf=hf-compile text=assets/sotu
    ;;
*) refuse "$1: the only argument is --dry-run" ;;
esac
end=$((${LIMIT:-$limit} * patience)) # seconds
out=${OUT:-build/gpu-first-results} results=$part${only:+-again} work=${WORK:-$PWD/build/gpu-first}
# Only the first call must start with an empty compilation cache; the later ones reuse it.
[ "$part" = second ] || [ -n "$only" ] || rm -rf "$work/cache"
rm -rf "${work:?}/results" "$work/run" "$out/$results".* "$out/$results-metrics.jsonl"
mkdir -p "$work/results" "$out"
export PYTHONUNBUFFERED=1 PYTHONPATH="$work/site:$PWD${PYTHONPATH:+:$PYTHONPATH}"
export JAX_COMPILATION_CACHE_DIR="$work/cache" JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS=0
export JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES=-1

stage() { # name, seconds, command ...
    local name=$1 limit=$(($2 * patience)) began=$SECONDS status=124 from
    shift 2
    [ -z "$only" ] || [[ " wheels machine $only " == *" $name "* ]] || return 0
    local command="${XLA_FLAGS:+XLA_FLAGS='$XLA_FLAGS' }$*"
    echo "== $name: $command" | tee -a "$out/$results.log"
    from=$(wc -c <"$out/$results.log")
    ((limit < end - SECONDS - 7)) || limit=$((end - SECONDS - 7)) # 5 seconds to kill the stage, 2 for the summary
    if ((limit > 0)); then
        timeout --kill-after=5 "$limit" "$@" >>"$out/$results.log" 2>&1 </dev/null
        status=$?
        tail -c "+$((from + 1))" "$out/$results.log" | tail -n "$((status ? 20 : 6))" | cut -c1-180
    fi
    echo "   exit status $status after $((SECONDS - began)) s, at $SECONDS s" | tee -a "$out/$results.log"
    printf '%s\t%s\t%s\t%s\n' "$name" "$status" "$((SECONDS - began))" "$command" >>"$work/results/stages.tsv"
    collect >/dev/null # after each stage, so that results exist if the machine is stopped early
    return "$status"
}

collect() {
    "$PYTHON" -m benchmarks.summary "$work/results" "${only:+STAGES='$only' }PART=$part bash scripts/gpu_first.sh"
    local status=$?
    cp "$work/results/summary.json" "$out/$results.json"
    cp "$work/results/table.md" "$out/$results.md"
    [ ! -f "$work/run/metrics.jsonl" ] || cp "$work/run/metrics.jsonl" "$out/$results-metrics.jsonl"
    return "$status"
}

benchmark() { # name, seconds, arguments ...
    local name=$1 seconds=$2
    shift 2
    stage "$name" "$seconds" "$PYTHON" scripts/benchmark.py "$@" --preset "$preset" --out "$work/results/$name.json"
}

compgen -G ".whl/*.whl" >/dev/null && stage wheels 40 "$PYTHON" -m pip install --quiet --no-index --no-deps --no-compile \
    --no-cache-dir --upgrade --target "$work/site" .whl/*.whl
train=("$PYTHON" scripts/train_jax.py --preset "$preset" --tokenizer assets/tokenizer --data "$text" --log-every 5)
cold=("${train[@]}" --steps "$steps" --batch-size "$batch" --sequence-length "$length" --dtype "$dtype")
cold+=(--eval-every "$steps" --save-every "$steps" --out "$work/run")
training=(train --dtype "$dtype" --rounds "$rounds" --batch-size "$batch" --sequence-length "$length")
decoding=(decode --dtype "$dtype" --new-tokens "$tokens" --rounds "$((rounds / 2 + 1))")

stage machine 40 "$PYTHON" -m benchmarks.machine "$work/results/machine.json"
if [ "$part" = first ]; then
    # The trainer from a cold start: whether cuDNN accepts it, seconds to the first step, tokens/s, loss, save, validation.
    stage train 150 "${cold[@]}"
    case $? in 0 | 124 | 137) ;; *) # retry without cuDNN, which may be the cause
        rm -rf "$work/run"
        stage train-xla 100 "${cold[@]}" --attention xla
        ;;
    esac
    benchmark speed 190 "${training[@]}" --against "$hf"
    benchmark remat-dots 70 "${training[@]}" --remat dots --against # the default policy stores more where memory allows
    # Attention by cuDNN and by XLA, causal and packed, and its gradients, against float32 on the CPU.
    stage attention 70 "$PYTHON" -m benchmarks.check_attention --preset "$preset" --sequence-length "$((length / 2))" \
        --document-tokens "$documents" --out "$work/results/attention.json"
    stage profile 60 "$PYTHON" scripts/profile_train.py --preset "$preset" --dtype "$dtype" --batch-size "$batch" \
        --sequence-length "$length" --instructions 40 --out "$work/trace"
    stage resume 60 "${train[@]}" --steps "$((steps + 5))" --out "$work/run" --resume
    benchmark decode 60 "${decoding[@]}" --against
    # With loops inside CUDA graphs, which is not XLA's default; an XLA without this option fails at once.
    XLA_FLAGS="${XLA_FLAGS:-} --xla_gpu_enable_command_buffer=+WHILE" benchmark decode-loops 60 "${decoding[@]}" --against
else
    benchmark batch-32 70 "${training[@]}" --batch-size "$((2 * batch))" --against
    benchmark unroll-1 60 "${training[@]}" --unroll 1 --against
    benchmark decode-hf 90 "${decoding[@]}" --against "$hf"
    stage weights 30 "$PYTHON" scripts/random_weights.py --preset "$preset" --out "$work/weights" --tokenizer assets/tokenizer
    stage parity 150 "$PYTHON" scripts/parity_report.py --weights "$work/weights" --out "$work/results/parity" --device "$device"
    benchmark long 100 train --dtype "$dtype" --rounds "$rounds" --batch-size 2 --sequence-length "$long" --against "$hf"
fi
nvidia-smi --query-gpu=name,memory.used,clocks.sm,temperature.gpu --format=csv 2>/dev/null | tee -a "$out/$results.log"
rm -rf "$work/run/checkpoints" "$work/trace" "$work/weights" # large
collect | tee -a "$out/$results.log"
status=${PIPESTATUS[0]}
cat "$out/$results.md"
[ "$part" = second ] || echo "next, in the same session: PART=second bash scripts/gpu_first.sh" | tee -a "$out/$results.log" "$out/$results.md"
exit "$status"
