#!/usr/bin/env bash
# Everything worth seeing on a GPU, in one command; each stage has its own time limit and loses one row, not the run.
#
#   bash scripts/gpu_suite.sh                # on a machine with a CUDA GPU: the full 134.5M shape, under 25 minutes
#   PART=speed bash scripts/gpu_suite.sh     # or PART=correctness: where one command may not take that long
#   bash scripts/gpu_suite.sh --dry-run      # at toy size on the CPU, with two of the speed stages
#
# Works from the source tree, without installing the package: PYTHON names the interpreter. Needs assets/tokenizer and
# assets/sotu; weights are seeded random ones of the full shape, so that no large file has to travel. Writes
# benchmarks/<device>-<date>/: a log a stage, the parity report, and summary.json with versions and every exit status.
set -uo pipefail
cd "$(dirname "$0")/.."
PYTHON=${PYTHON:-python3}
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1

if [ "${1:-}" = "--dry-run" ]; then
    device=cpu preset=tiny length=64 steps=4 name=${2:-dry-run}
    export JAX_PLATFORMS=cpu
else
    device=gpu preset=smollm2-135m length=2048 steps=20
    name=$(nvidia-smi --query-gpu=name --format=csv,noheader | head -1 | tr 'A-Z ' 'a-z-')
fi
part=${PART:-all}
out="benchmarks/$name-$(date +%Y-%m-%d)${PART:+-$PART}"
rm -rf "$out"
mkdir -p "$out"
stages="[]"

stage() { # name, seconds, command ...
    local title=$1 limit=$2 began=$SECONDS status
    shift 2
    echo "== $title: $*"
    timeout --kill-after=10 "$limit" "$@" >"$out/$title.log" 2>&1
    status=$?
    tail -n 4 "$out/$title.log" | cut -c1-200
    echo "   exit status $status after $((SECONDS - began)) s"
    stages=$("$PYTHON" -c 'import json, sys; rows = json.loads(sys.argv[1]); rows.append(dict(
        stage=sys.argv[2], exit_status=int(sys.argv[3]), seconds=int(sys.argv[4]), command=sys.argv[5])); print(json.dumps(rows))' \
        "$stages" "$title" "$status" "$((SECONDS - began))" "$*")
}

benchmark() { # name, seconds, arguments ...
    local title=$1 limit=$2
    shift 2
    stage "$title" "$limit" "$PYTHON" scripts/benchmark.py "$@" --preset "$preset" --out "$out/$title.json"
    grep -E "^(tokens/s|peak GB|cold|warm)" "$out/$title.log"
}

# The limits add up to 1,490 seconds.
if [ "$part" != speed ]; then
    stage weights 60 "$PYTHON" scripts/random_weights.py --preset "$preset" --out "$out/weights" --tokenizer assets/tokenizer
    stage parity 230 "$PYTHON" scripts/parity_report.py --weights "$out/weights" --out "$out/parity" --device "$device"
    train=("$PYTHON" scripts/train_jax.py --preset "$preset" --tokenizer assets/tokenizer --log-every 1)
    more=$((steps + 5))
    stage train 100 "${train[@]}" --steps "$steps" --sequence-length "$length" --out "$out/run"
    stage train-resumed 70 "${train[@]}" --steps "$more" --out "$out/run" --resume
    stage generate 60 "$PYTHON" scripts/generate.py --weights "$out/run" --prompt "Fellow citizens" --max-new-tokens 64
fi
if [ "$part" != correctness ] && [ "$device" = cpu ]; then
    benchmark speed-train 120 train --rounds 1 --sequence-length 32
    benchmark speed-decode 120 decode --rounds 1 --new-tokens 32
elif [ "$part" != correctness ]; then
    training=(train --dtype bfloat16 --rounds 10)
    for batch in 8 16; do
        benchmark "speed-$batch" 140 "${training[@]}" --sequence-length 2048 --batch-size "$batch" --against hf-compile twin-compile
        benchmark "speed-$batch-unrolled" 40 "${training[@]}" --sequence-length 2048 --batch-size "$batch" --unroll 2 --against
    done
    benchmark speed-32 40 "${training[@]}" --sequence-length 2048 --batch-size 32 --against
    benchmark speed-32-unrolled 40 "${training[@]}" --sequence-length 2048 --batch-size 32 --unroll 2 --against
    benchmark speed-8-remat 40 "${training[@]}" --sequence-length 2048 --batch-size 8 --remat --against
    benchmark speed-long 140 "${training[@]}" --sequence-length 8192 --batch-size 2 --against hf-compile twin-compile
    benchmark speed-decode-1 50 decode --dtype bfloat16 --new-tokens 128 --rounds 3
    benchmark speed-decode-64 50 decode --dtype bfloat16 --new-tokens 128 --rounds 3 --batch-size 64
    # 65k tokens a step, where memory decides; hf eager would hold all logits, and is not asked.
    benchmark memory 80 memory --dtype bfloat16 --rounds 1 --sequence-length 2048 --batch-size 32 --against hf-compile
    benchmark startup 120 startup --dtype bfloat16 --rounds 1 --sequence-length 2048 --batch-size 8 --against hf-compile
    benchmark checkpoint 50 checkpoint --rounds 3 --sequence-length 2048
fi

rm -rf "$out"/weights "$out"/run*/checkpoints # large, and seeded: any machine can make them again
"$PYTHON" - "$out" "$stages" <<'PY'
import json, platform, sys
from importlib.metadata import PackageNotFoundError, version
def found(name):
    try:
        return version(name)
    except PackageNotFoundError:
        return None
out, stages = sys.argv[1], json.loads(sys.argv[2])
packages = {name: found(name) for name in ("jax", "flax", "optax", "orbax-checkpoint", "torch", "transformers")}
summary = {"command": "bash scripts/gpu_suite.sh", "python": platform.python_version(), "versions": packages, "stages": stages}
with open(f"{out}/summary.json", "w", encoding="utf-8") as file:
    file.write(json.dumps(summary, indent=1) + "\n")
failed = [row["stage"] for row in stages if row["exit_status"]]
print(f"{len(stages) - len(failed)} of {len(stages)} stages finished: {out}/summary.json" + (f"; failed: {', '.join(failed)}" if failed else ""))
sys.exit(bool(failed))
PY
