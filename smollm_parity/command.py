"""Compare JAX, PyTorch and transformers on your weights, and write a report of their differences.

    python scripts/parity_report.py --weights assets/SmolLM2-135M-Instruct       # writes report/index.html
    python scripts/parity_report.py --weights runs/my-run --out report-my-run
    python scripts/parity_report.py --weights PATH --device gpu                   # the same ladder on a GPU

Takes weights in any format, for example after a conversion. Writes a self-contained page and report.json; exit status 1
when a rung fails. Needs the extras "torch", "plot" and "gguf", and "hf" for the comparison with transformers.
"""

import dataclasses
import importlib.util
import json
import shutil
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, Literal

from smollm_jax import errors
from smollm_jax.commands import command_line
from smollm_jax.runtime import install


@dataclasses.dataclass(frozen=True)
class Flags:
    weights: Path
    """Weights in any format: a run, a Hugging Face folder, a .pt, .safetensors or .gguf file."""
    out: Path = Path("report")
    """Folder to write; it replaces an older report."""
    text: Path = Path("assets/sotu")
    """Text to measure on: a file, a folder or .jsonl of at least 9 documents or 3,000 tokens."""
    tokenizer: Path | None = None
    """Folder with tokenizer.json (or a GGUF), for weights that have none of their own."""
    device: Literal["cpu", "gpu"] = "cpu"
    """Device of the models; torch and JAX always run in separate processes."""
    readme: Path | None = None
    """Markdown file to write the table into, between its parity markers."""
    debug: bool = False
    """Show a traceback instead of one line when something goes wrong."""


def main(argv: list[str] | None = None) -> None:
    """Measures, compares and writes the report; exits with 1 when a rung fails."""
    flags = command_line.parse(Flags, argv, __doc__, weights=("weights",))
    for module, extra in (("torch", "torch"), ("matplotlib", "plot"), ("gguf", "gguf")):
        if importlib.util.find_spec(module) is None:
            raise errors.UsageError(install.needs("parity_report.py", extra))
    if flags.device == "gpu" and shutil.which("nvidia-smi") is None:
        raise errors.UsageError("--device gpu: nvidia-smi is not installed here; use --device cpu")
    from smollm_parity.page import page, verdict, write_readme
    from smollm_parity.rungs import compared

    report, rungs = measured_report(flags)
    flags.out.mkdir(parents=True, exist_ok=True)
    (flags.out / "report.json").write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    (flags.out / "index.html").write_text(page(report, rungs), encoding="utf-8")
    for rung in rungs:
        print(f"{'pass' if rung.passed else 'FAIL'}  {rung.rung:<12} {rung.claim}: {compared(rung)}")
    if flags.readme:
        write_readme(flags.readme, report, rungs)
    print(f"{verdict(rungs)} {flags.out / 'index.html'}")
    if not report["passed"]:
        sys.exit(1)


def measured_report(flags: Flags) -> tuple[dict[str, Any], list[Any]]:
    """Measures every backend; returns the content of report.json and its list of `Rung`s."""
    import numpy as np

    from smollm_jax import weights
    from smollm_jax.config.hf_config import config_to_hf
    from smollm_jax.tokenizer import Tokenizer
    from smollm_parity.job import make_job, measure
    from smollm_parity.rungs import compare

    began = time.time()
    bundle = weights.read(flags.weights)
    tokenizer = Tokenizer.of_weights(flags.weights, flags.tokenizer)
    backends = ["jax", "twin"] + (["transformers"] if importlib.util.find_spec("transformers") else [])
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        job = make_job(flags.text, tokenizer, bundle.config.vocab_size)
        np.savez(work / "job.npz", **job)
        weights.write(work / "hf", bundle, "hf")
        for backend in backends:
            print(f"measuring {backend} on the {flags.device}", flush=True)
            measure(backend, work, flags.device)
        folders = {backend: work / backend for backend in backends}
        rungs, curves = compare(folders, job)
        versions = {backend: json.loads((path / "versions.json").read_text()) for backend, path in folders.items()}
    report = {
        "weights": str(flags.weights),
        "origin": bundle.origin,
        "config": config_to_hf(bundle.config, bundle.dtype),
        "date": time.strftime("%Y-%m-%d"),
        "seconds": round(time.time() - began),
        "command": f"python scripts/parity_report.py --weights {flags.weights} --device {flags.device}",
        "versions": versions,
        "passed": all(rung.passed for rung in rungs),
        "rungs": [dataclasses.asdict(rung) | {"passed": rung.passed} for rung in rungs],
        "curves": curves,
    }
    return report, rungs
