"""Writes summary.json and table.md from the results of `scripts/gpu_suite.sh` or `scripts/gpu_first.sh`.

    python -m benchmarks.summary FOLDER "bash scripts/gpu_suite.sh"

FOLDER/stages.tsv has a row per stage; left-out.txt, if it exists, a line for each stage that does not fit this GPU.
Exit status 1 when a stage failed.
"""

import json
import platform
import re
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

PACKAGES = ("jax", "flax", "optax", "orbax-checkpoint", "torch", "transformers")
HEADLINES = re.compile(r"tokens/s|peak GB|cold seconds|warm seconds|GFLOP/s [^,]+,|ceiling|MFU|step guarded|manifest /")
COMPARED = re.compile(r"speed-\d+(-max|-twin|-unroll-\d+|-remat-dots)?")  # stages of the same sequence length


def main(folder: Path, command: str) -> int:
    """Writes both files; returns the number of failed stages."""
    stages = []
    for line in (folder / "stages.tsv").read_text(encoding="utf-8").splitlines():
        stage, exit_status, seconds, ran = line.split("\t")
        stages.append({"stage": stage, "exit_status": int(exit_status), "seconds": int(seconds), "command": ran})
    paths = {row["stage"]: folder / f"{row['stage']}.json" for row in stages}
    contents = {stage: json.loads(path.read_text()) for stage, path in paths.items() if path.is_file()}
    measured = {stage: content["rows"] for stage, content in contents.items() if isinstance(content.get("rows"), dict)}
    best = best_over_best({stage: rows for stage, rows in measured.items() if COMPARED.fullmatch(stage)})
    left_out = (folder / "left-out.txt").read_text().splitlines() if (folder / "left-out.txt").is_file() else []
    machine = folder / "machine.json"
    summary = {
        "command": command,
        "machine": json.loads(machine.read_text()) if machine.is_file() else None,
        "python": platform.python_version(),
        "versions": {name: installed(name) for name in PACKAGES},
        "stages": stages,
        "left_out": left_out,
        "best_over_best": best,
        "rows": measured,
        "others": {stage: content for stage, content in contents.items() if stage not in {*measured, "machine"}},
    }
    (folder / "summary.json").write_text(json.dumps(summary, indent=1) + "\n", encoding="utf-8")
    report = folder / "parity/report.json"
    rungs = json.loads(report.read_text())["rungs"] if report.is_file() else []
    (folder / "table.md").write_text(table(stages, left_out, measured, best, rungs), encoding="utf-8")
    failed = [row["stage"] for row in stages if row["exit_status"]]
    more = f"; failed: {', '.join(failed)}" if failed else ""
    print(f"{len(stages) - len(failed)} of {len(stages)} stages finished: {folder}/table.md{more}")
    return len(failed)


def best_over_best(measured: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """The ratio of our best tokens/s at any batch size to each other backend's best.

    "hf at its best" is the best of all hf backends. Each best is the median of one stage's rounds; the two stages can
    differ, and so can the load of the machine.
    """
    medians: dict[str, dict[str, float]] = {}
    for stage, rows in measured.items():
        for name, row in rows.items():
            what, _, backend = name.partition(", ")
            if what == "tokens/s" and " / " not in backend:
                medians.setdefault(backend, {})[stage] = row["median"]
    hf = {
        f"{stage}, {name}": speed
        for name, by_stage in medians.items()
        if name.startswith("hf")
        for stage, speed in by_stage.items()
    }
    backends = {name: speeds for name, speeds in medians.items() if name != "ours"} | (
        {"hf at its best": hf} if hf else {}
    )
    ours = best_of(medians["ours"]) if "ours" in medians else None
    return {
        backend: {"ratio": ours["tokens/s"] / best_of(speeds)["tokens/s"], "ours": ours, "other": best_of(speeds)}
        for backend, speeds in backends.items()
        if ours
    }


def best_of(medians: dict[str, float]) -> dict[str, Any]:
    stage = max(medians, key=lambda stage: medians[stage])
    return {"stage": stage, "tokens/s": medians[stage]}


def table(
    stages: list[dict[str, Any]],
    left_out: list[str],
    measured: dict[str, dict[str, Any]],
    best: dict[str, Any],
    rungs: list[dict[str, Any]],
) -> str:
    """Markdown tables: headline rows of the benchmarks, best over best, the parity report's rungs, the stages."""
    lines = ["| stage | row | median | smallest to largest |", "|---|---|---:|---:|"]
    for stage, rows in measured.items():
        for name, row in rows.items():
            if HEADLINES.match(name):
                lines.append(f"| {stage} | {name} | {row['median']:.4g} | {row['min']:.4g} to {row['max']:.4g} |")
    lines += ["", "| best of all batch sizes | ratio | ours | other |", "|---|---:|---:|---:|"]
    for backend, entry in best.items():
        both = " | ".join(f"{entry[who]['tokens/s']:,.0f} ({entry[who]['stage']})" for who in ("ours", "other"))
        lines.append(f"| tokens/s, ours / {backend} | {entry['ratio']:.3f} | {both} |")
    lines += ["", "| parity | measured | bound | |", "|---|---:|---:|---|"]
    for rung in rungs:
        verdict = "pass" if rung["passed"] else "FAIL"
        lines.append(f"| {rung['rung']}: {rung['claim']} | {rung['measured']:.2e} | {rung['bound']:.1e} | {verdict} |")
    lines += ["", "| stage | exit status | seconds | command |", "|---|---:|---:|---|"]
    lines += [f"| {row['stage']} | {row['exit_status']} | {row['seconds']} | `{row['command']}` |" for row in stages]
    lines += ["", *left_out] if left_out else []
    return "\n".join(lines) + "\n"


def installed(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


if __name__ == "__main__":
    sys.exit(bool(main(Path(sys.argv[1]), sys.argv[2])))
