#!/usr/bin/env bash
# All GPU checks and benchmarks in one command. Each stage has its own time limit; a failed stage loses one row of the
# result, not the run.
#
#   bash scripts/gpu_suite.sh                # on a machine with a CUDA GPU: the full 134.5M shape, under 25 minutes
#   PART=speed bash scripts/gpu_suite.sh     # or correctness, kernels, sweep: less than 10 minutes each
#   bash scripts/gpu_suite.sh --dry-run      # at toy size on the CPU, limits fourfold, with one of the speed stages
#
# LIMIT=900 ends it after 900 seconds: stages that have not started by then get exit status 124, the sweep first.
#
# Works from the source tree, without installing the package: PYTHON names the interpreter. Needs assets/tokenizer and
# assets/sotu; weights are random with a fixed seed, in the full shape, so that no large file has to be copied. Writes
# benchmarks/results/<device>-<date>/: a log per stage, the parity report, summary.json with versions, exit statuses and
# all rows, and table.md with the main rows, such as our best batch size compared with the best of transformers. Stages
# that are estimated not to fit this GPU's memory are skipped and listed in both. For a few rented minutes use
# scripts/gpu_first.sh.
set -uo pipefail
cd "$(dirname "$0")/.."
PYTHON=${PYTHON:-python3}
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1
# The stages share a compilation cache, except for the startup stage.
if [ -z "${JAX_COMPILATION_CACHE_DIR:-}" ]; then
    JAX_COMPILATION_CACHE_DIR=$(mktemp -d)
    trap 'rm -rf "$JAX_COMPILATION_CACHE_DIR"' EXIT
    export JAX_COMPILATION_CACHE_DIR
fi

refuse() {
    echo "$1" >&2
    exit 2
}

case ${1:-} in
--dry-run)
    device=cpu on=cpu preset=tiny length=64 documents=32 steps=4 bound=1e-3 patience=4 name=${2:-dry-run}
    export JAX_PLATFORMS=cpu
    ;;
"")
    device=gpu on=cuda preset=smollm2-135m length=2048 documents=512 steps=20 bound=2e-2 patience=1
    name=$(nvidia-smi --query-gpu=name --format=csv,noheader 2>/dev/null | head -1 | tr 'A-Z ' 'a-z-')
    [ -n "$name" ] || refuse "no GPU: nvidia-smi lists none; --dry-run works without one"
    ;;
*) refuse "$1: the only argument is --dry-run" ;;
esac
gigabytes=$([ "$device" = cpu ] || nvidia-smi --query-gpu=memory.total --format=csv,noheader,nounits 2>/dev/null |
    awk 'NR == 1 && /^[0-9]+$/ { print $1 * 1048576 / 1e9 }')
part=${PART:-all}
case $part in all | correctness | speed | kernels | sweep) ;; *)
    refuse "PART=$part: must be correctness, speed, kernels, sweep or unset"
    ;;
esac
end=$((${LIMIT:-1490} * patience)) # seconds
out="benchmarks/results/$name-$(date +%Y-%m-%d)${PART:+-$PART}"
rm -rf "$out"
mkdir -p "$out"

stage() { # name, seconds, command ...
    local title=$1 limit=$(($2 * patience)) began=$SECONDS status=124
    shift 2
    echo "== $title: $*"
    ((limit < end - SECONDS)) || limit=$((end - SECONDS))
    if ((limit > 0)); then
        timeout --kill-after=10 "$limit" "$@" >"$out/$title.log" 2>&1
        status=$?
        tail -n 4 "$out/$title.log" | cut -c1-200
    fi
    echo "   exit status $status after $((SECONDS - began)) s"
    printf '%s\t%s\t%s\t%s\n' "$title" "$status" "$((SECONDS - began))" "$*" >>"$out/stages.tsv"
}

benchmark() { # name, seconds, arguments ...
    local title=$1 limit=$2 message
    shift 2
    case ${gigabytes:+$1} in train | memory)
        message=$("$PYTHON" -m benchmarks.room "$gigabytes" "$@" --preset "$preset")
        if [ $? = 3 ]; then # it does not fit; any other status is a failure of benchmarks.room
            echo "$title skipped: $message" | tee -a "$out/left-out.txt"
            return
        fi
        ;;
    esac
    stage "$title" "$limit" "$PYTHON" scripts/benchmark.py "$@" --preset "$preset" --out "$out/$title.json"
    grep -sE "^(tokens/s|ceiling|peak GB|cold|warm)" "$out/$title.log"
}

# Each stage ends at its own limit, all end at `end`. The limits of a part add up to less than 600 seconds.
if [ "$part" = all ] || [ "$part" = correctness ]; then
    stage weights 40 "$PYTHON" scripts/random_weights.py --preset "$preset" --out "$out/weights" --tokenizer assets/tokenizer
    stage parity 170 "$PYTHON" scripts/parity_report.py --weights "$out/weights" --out "$out/parity" --device "$device"
    # cuDNN's attention against XLA's, packed documents against separate ones, both against float32 on the CPU.
    stage attention-check 50 "$PYTHON" -m benchmarks.check_attention --preset "$preset" --sequence-length "$length" \
        --document-tokens "$documents" --out "$out/attention-check.json"
    train=("$PYTHON" scripts/train_jax.py --preset "$preset" --tokenizer assets/tokenizer --log-every 1)
    more=$((steps + 5))
    dtype=$([ "$device" = gpu ] && echo bfloat16 || echo float32) # a CPU's default depends on the CPU
    stage train 80 "${train[@]}" --steps "$steps" --sequence-length "$length" --dtype "$dtype" --out "$out/run"
    stage train-twin 70 "$PYTHON" scripts/train_torch.py --like "$out/run" --out "$out/run-twin" --device "$on"
    stage curves 10 "$PYTHON" -m benchmarks.check_curves "$out/run" "$out/run-twin" --steps "$steps" \
        --bound "$bound" --out "$out/curves.json"
    stage train-resumed 50 "${train[@]}" --steps "$more" --out "$out/run" --resume
    stage generate 50 "$PYTHON" scripts/generate.py --weights "$out/run" --prompt "Fellow citizens" --max-new-tokens 64
fi
if [ "$device" = cpu ] && [ "$part" != correctness ]; then
    benchmark speed-1 120 train --rounds 1 --sequence-length 32
fi
training=(train --dtype bfloat16 --rounds 10)
if [ "$device" = gpu ] && { [ "$part" = all ] || [ "$part" = speed ]; }; then
    benchmark speed-16 130 "${training[@]}" --sequence-length 2048 --batch-size 16 --against hf-compile
    benchmark speed-16-max 130 "${training[@]}" --sequence-length 2048 --batch-size 16 --against hf-compile-max
    benchmark speed-16-twin 100 "${training[@]}" --sequence-length 2048 --batch-size 16 --against twin-compile
    benchmark speed-32 110 "${training[@]}" --sequence-length 2048 --batch-size 32 --against hf-compile
    benchmark speed-8 110 "${training[@]}" --sequence-length 2048 --batch-size 8 --against hf-compile
fi
if [ "$device" = gpu ] && { [ "$part" = all ] || [ "$part" = kernels ]; }; then
    shape=(--dtype bfloat16 --sequence-length 2048 --batch-size 8)
    # Where the time goes; compare with the roofline that scripts/compile_for_gpu.py estimates.
    stage profile 60 "$PYTHON" scripts/profile_train.py "${shape[@]}" --out "$out/trace"
    benchmark gemm 40 gemm "${shape[@]}"
    benchmark attention 40 attention "${shape[@]}"
    benchmark loss 40 loss "${shape[@]}" --against hf-compile
    benchmark packed 30 packed "${shape[@]}"
    # "-compile": a static cache and transformers' own compiled decoding.
    benchmark decode-1 100 decode --dtype bfloat16 --new-tokens 128 --rounds 3 --against hf hf-compile
    benchmark decode-64 100 decode --dtype bfloat16 --new-tokens 128 --rounds 3 --batch-size 64 --against hf hf-compile
    # 65k tokens per step, where memory is the limit. hf eager is not measured: it would hold all logits.
    benchmark memory 60 memory --dtype bfloat16 --rounds 1 --sequence-length 2048 --batch-size 32 --against hf-compile
    benchmark startup 120 startup --dtype bfloat16 --rounds 1 --sequence-length 2048 --batch-size 8 --against
fi
if [ "$device" = gpu ] && { [ "$part" = all ] || [ "$part" = sweep ]; }; then
    benchmark speed-16-remat-dots 80 "${training[@]}" --sequence-length 2048 --batch-size 16 --remat dots --against
    benchmark long-2 100 "${training[@]}" --sequence-length 8192 --batch-size 2 --against hf-compile
    benchmark long-4 70 "${training[@]}" --sequence-length 8192 --batch-size 4 --against
    benchmark speed-16-unroll-1 60 "${training[@]}" --sequence-length 2048 --batch-size 16 --unroll 1 --against
    benchmark speed-32-remat-dots 80 "${training[@]}" --sequence-length 2048 --batch-size 32 --remat dots --against
    benchmark long-2-unroll-1 60 "${training[@]}" --sequence-length 8192 --batch-size 2 --unroll 1 --against
    benchmark long-1 70 "${training[@]}" --sequence-length 8192 --batch-size 1 --against
fi

rm -rf "$out"/weights "$out"/trace "$out"/run*/checkpoints "$out"/run*/*.safetensors # large, and reproducible from their seed
"$PYTHON" -m benchmarks.summary "$out" "bash scripts/gpu_suite.sh${1:+ $1}"
