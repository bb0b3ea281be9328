"""Show that JAX, PyTorch and transformers compute the same function on your weights, and how exactly.

    python scripts/parity_report.py --weights assets/SmolLM2-135M-Instruct       # writes report/index.html
    python scripts/parity_report.py --weights runs/my-run --out report-my-run
    python scripts/parity_report.py --weights PATH --device gpu                   # the same ladder on a GPU

For weights of any kind; the thing to run after converting some. Writes a self-contained page and report.json; exit
status 1 when a rung fails. Needs the extras "torch", "plot" and "gguf", and "hf" for the comparison with transformers.
"""

import dataclasses
import importlib.util
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, Literal

from smollm_jax import errors
from smollm_jax.commands import command_line
from smollm_jax.config.hf_config import config_to_hf
from smollm_jax.runtime import install
from smollm_jax.runtime.program import run_main
from smollm_parity.page import Rung, compared, number, page, verdict, write_readme

ROOT = Path(__file__).resolve().parent.parent


@dataclasses.dataclass(frozen=True)
class Flags:
    weights: Path
    """Weights of any kind: a run, a Hugging Face folder, a .pt, .safetensors or .gguf file."""
    out: Path = Path("report")
    """Folder to write; an older report in it is replaced."""
    text: Path = Path("assets/sotu")
    """Real text to measure on: a file, a folder or .jsonl of at least 9 documents or 3,000 tokens."""
    tokenizer: Path | None = None
    """Folder with tokenizer.json (or a GGUF), for weights that have none of their own."""
    device: Literal["cpu", "gpu"] = "cpu"
    """Where the models run; torch and JAX always run in separate processes."""
    readme: Path | None = None
    """Also write the table into this file, between its parity markers."""
    debug: bool = False
    """Show a traceback instead of one line when something goes wrong."""


def main(argv: list[str] | None = None) -> None:
    flags = command_line.parse(Flags, argv, __doc__, weights=("weights",))
    for module, extra in (("torch", "torch"), ("matplotlib", "plot"), ("gguf", "gguf")):
        if importlib.util.find_spec(module) is None:
            raise errors.UsageError(install.needs("parity_report.py", extra))
    if flags.device == "gpu" and shutil.which("nvidia-smi") is None:
        raise errors.UsageError("--device gpu: this machine has no NVIDIA driver")
    sys.path.insert(0, str(ROOT))
    from smollm_jax import weights
    from smollm_jax.tokenizer import Tokenizer

    began = time.time()
    bundle = weights.read(flags.weights)
    tokenizer = Tokenizer.of_weights(flags.weights, flags.tokenizer)
    sides = ["jax", "twin"] + (["transformers"] if importlib.util.find_spec("transformers") else [])
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        job = make_job(flags.text, tokenizer, bundle.config.vocab_size)
        import numpy as np

        np.savez(work / "job.npz", **job)
        weights.write(work / "hf", bundle, "hf")
        for side in sides:
            print(f"measuring {side} on the {flags.device}", flush=True)
            measure(side, work, flags.device)
        data = {side: work / side for side in sides}
        rungs, curves = compare(data, job)
        versions = {side: json.loads((path / "versions.json").read_text()) for side, path in data.items()}
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


def make_job(text: Path, tokenizer: Any, vocab_size: int) -> dict[str, Any]:
    """What every side is to compute: texts, a window for gradients, batches to train on, prompts to continue."""
    import numpy as np

    from smollm_jax.config import Recipe
    from smollm_jax.data.text import documents
    from smollm_jax.data.text_sources import text_files

    files = text_files(text)
    chosen = files[:: max(1, len(files) // 9)][:9]
    ids = [tokenizer.encode(document) for file in chosen for document in documents(file)]
    stream = [token for document in ids for token in document]
    if len(stream) < 3000:
        raise errors.InputFileError(f"{text}: {len(stream)} tokens are too few for the report, it needs 3,000")
    if max(stream) >= vocab_size:
        raise errors.UsageError(f"the tokenizer gives id {max(stream)}, the weights know {vocab_size}")
    # From the middle of documents: beginnings are alike, and one unlucky rounding there would count many times.
    middles = [document[len(document) // 2 :][:128] for document in ids if len(document) >= 256]
    while len(middles) < 8:  # few documents: pieces of the whole text
        middles.append(stream[128 * len(middles) : 128 * (len(middles) + 1)])
    recipe = Recipe(
        steps=10,
        batch_size=1,
        sequence_length=256,
        learning_rate=1e-4,
        warmup_steps=2,
        dtype="float32",
        schedule="cosine",
    )
    batches = np.array([stream[i * 256 : i * 256 + 257] for i in range(recipe.steps)], np.int32)[:, None]
    prompts = np.full((10, 32), -1, np.int32)
    for index, row in enumerate(prompts):
        length = 4 + 3 * index
        row[:length] = stream[200 * index : 200 * index + length]
    return {
        "texts": np.array(middles[:8], np.int32),
        "firsts": np.unique(stream)[:256, None].astype(np.int32),
        "window": np.array([stream[:513]], np.int32),
        "batches": batches,
        "prompts": prompts,
        "recipe": json.dumps(dataclasses.asdict(recipe)),
    }


def measure(side: str, work: Path, device: str) -> None:
    """Runs one side in a process of its own; its results are in `work/side`."""
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
    command = [sys.executable, "-m", "smollm_parity.measure", side, "--weights", work / "hf", "--job", work / "job.npz"]
    done = subprocess.run(
        [*map(str, command), "--out", str(work / side), "--device", device],
        env=environment,
        capture_output=True,
        encoding="utf-8",
        errors="replace",
        check=False,
    )
    if done.returncode:
        raise RuntimeError(f"measuring {side} failed:\n{done.stderr}")


def compare(data: dict[str, Path], job: dict[str, Any]) -> tuple[list[Rung], dict[str, Any]]:
    """The rungs of the ladder from what the sides left, and the numbers to plot."""
    import numpy as np

    from smollm_parity import metrics as of
    from smollm_parity import tolerances as bound
    from smollm_parity.measure import DECODED

    def load(side: str, name: str) -> Any:
        return np.load(data[side] / f"{name}.npy")

    texts, others = job["texts"], [side for side in data if side != "jax"]
    truth, true_logits = load("jax", "stream-float64"), load("jax", "logits-float64")
    true_gradient = np.load(data["jax"] / "gradient-float64.npz")
    largest = np.abs(true_logits).max()
    rungs, curves = [], {"layers": {}, "positions": {}, "training": {}}

    error = np.abs(load("twin", "logits-float64") - true_logits).max() / largest
    rungs.append(Rung("1 float64", "logits, JAX against the twin", error, bound.FLOAT64_LOGITS, "1e-16 a rounding"))
    errors = of.gradient_errors(np.load(data["twin"] / "gradient-float64.npz"), true_gradient)
    rungs.append(Rung("1 float64", "gradients, worst tensor", max(errors.values()), bound.FLOAT64_GRADIENTS))

    layers, logits = {}, {}
    for side in data:
        for dtype in ("float32", "bfloat16"):
            layers[side, dtype] = of.layer_errors(load(side, f"stream-{dtype}"), truth)
            logits[side, dtype] = load(side, f"logits-{dtype}")
            curves["layers"][f"{side}, {dtype}"] = layers[side, dtype][0].tolist()
    for side in data:
        by_position = np.abs(logits[side, "float32"] - true_logits).max(axis=(0, 2))
        curves["positions"][side] = by_position.tolist()

    reference = others[-1]  # transformers where it is installed, else the twin
    error = np.abs(logits[reference, "float32"] - true_logits).max() / largest
    noise = f"{reference}: {number(error)} of the largest logit"
    owner = f"{reference}'" if reference.endswith("s") else f"{reference}'s"
    for place, name, skip in (("first tokens", "first", 0), ("other tokens", "stream", 1)):
        exactly = load("jax", f"{name}-float64")[:, :, skip:]
        ours = of.layer_errors(load("jax", f"{name}-float32")[:, :, skip:], exactly)
        theirs = of.layer_errors(load(reference, f"{name}-float32")[:, :, skip:], exactly)
        for what, mine, other, most in zip(
            ("RMS", "largest"), ours, theirs, (bound.FLOAT32_RMS_RATIO, bound.FLOAT32_MAX_RATIO), strict=True
        ):
            claim = f"{what} error over {owner}, worst layer, {place}"
            rungs.append(Rung("2 float32", claim, (mine / other).max(), most, f"{owner} {number(other.max())}"))
    for side in others:
        error = np.abs(logits["jax", "float32"] - logits[side, "float32"]).max() / largest
        rungs.append(Rung("2 float32", f"logits, JAX against {side}", error, bound.FLOAT32_LOGITS, noise))

    found = {side: of.distribution(logits[side, "bfloat16"], true_logits, texts) for side in data}
    exact = of.distribution(true_logits, true_logits, texts)
    curves["bfloat16"] = found | {"truth": exact}
    noise = f"{reference}: KL {number(found[reference]['kl'])} nats a token"
    rungs.append(
        Rung(
            "3 bfloat16",
            f"KL(truth, JAX) over KL(truth, {reference})",
            found["jax"]["kl"] / found[reference]["kl"],
            bound.BFLOAT16_KL_RATIO,
            noise,
        )
    )
    lost = found[reference]["argmax"] - found["jax"]["argmax"]
    noise = f"JAX {found['jax']['argmax']:.3f}, {reference} {found[reference]['argmax']:.3f}"
    rungs.append(Rung("3 bfloat16", f"argmaxes lost against {reference}", lost, bound.BFLOAT16_ARGMAX_LOSS, noise))
    perplexity = abs(found["jax"]["perplexity"] / exact["perplexity"] - 1)
    noise = f"truth {exact['perplexity']:.3f}, JAX {found['jax']['perplexity']:.3f}"
    rungs.append(Rung("3 bfloat16", "perplexity, relative to the truth", perplexity, bound.BFLOAT16_PERPLEXITY, noise))
    operands, autocast = (
        of.distribution(load(side, f"logits-{name}"), true_logits, texts)
        for side, name in (("jax", "operands"), (reference, "autocast"))
    )
    rungs.append(
        Rung(
            "3 bfloat16",
            f"KL(truth, JAX as a CPU trains) over KL(truth, {reference} under autocast)",
            operands["kl"] / autocast["kl"],
            bound.AUTOCAST_KL_RATIO,
            f"{reference}: KL {number(autocast['kl'])} nats a token",
        )
    )
    if (data["jax"] / "logits-bfloat16-cudnn.npy").exists():
        cudnn = of.distribution(load("jax", "logits-bfloat16-cudnn"), true_logits, texts)
        ratio = cudnn["kl"] / found[reference]["kl"]
        rungs.append(
            Rung(
                "3 bfloat16",
                f"KL(truth, JAX with cudnn attention) over KL(truth, {reference})",
                ratio,
                bound.BFLOAT16_KL_RATIO,
            )
        )

    gradients = {side: np.load(data[side] / "gradient-float32.npz") for side in data}
    errors = {side: max(of.gradient_errors(gradients[side], true_gradient).values()) for side in data}
    noise = f"{reference}: {number(errors[reference])}"
    rungs.append(
        Rung("5 gradients", "float32, against the truth, worst tensor", errors["jax"], bound.FLOAT32_GRADIENTS, noise)
    )

    training = {side: load(side, "curve") for side in ("jax", "twin")}
    curves["training"] = {side: curve.tolist() for side, curve in training.items()}
    parted = np.abs(training["jax"] / training["twin"] - 1).max()
    rungs.append(
        Rung("7 training", "loss of 10 float32 steps, JAX against the twin", parted, bound.TRAINING_FLOAT32_FULL)
    )

    if "transformers" in data:
        texts_differ = (load("jax", "greedy") != load("transformers", "greedy")).any(axis=1).sum()
        rungs.append(
            Rung("8 generation", "of 10 greedy texts, how many differ from transformers'", float(texts_differ), 0.0)
        )
    packed = np.abs(load("jax", "packed")).max() / largest
    rungs.append(Rung("9 packing", "packed documents against separate ones", packed, bound.PACKED_LOGITS))
    for kind, most in bound.GGUF_LOSS.items():
        if not (data["jax"] / f"lost-{kind}.npy").exists():  # no file of this type can be written
            continue
        found = of.distribution(load("jax", f"logits-{kind}"), true_logits, texts)
        noise = f"KL {number(found['kl'])} nats a token, "
        noise += f"perplexity {exact['perplexity']:.3f} -> {found['perplexity']:.3f}"
        rungs.append(Rung("GGUF", f"what {kind} loses of the weights, RMS", load("jax", f"lost-{kind}"), most, noise))
        if (data["jax"] / f"decoded-{kind}.npy").exists():
            decoded, rounded = load("jax", f"decoded-{kind}"), load("jax", f"logits-{kind}")
            error = np.abs(decoded - rounded).max() / np.abs(rounded).max()
            found = of.distribution(decoded, true_logits, texts)
            noise = f"decoded: KL {number(found['kl'])} nats a token, "
            noise += f"perplexity {exact['perplexity']:.3f} -> {found['perplexity']:.3f}"
            claim = f"logits decoded with --quantize {DECODED[kind]}, against float32's of the same rounded weights"
            rungs.append(Rung("8 generation", claim, error, bound.FLOAT32_LOGITS, noise))
    return [dataclasses.replace(rung, measured=float(rung.measured)) for rung in rungs], curves


if __name__ == "__main__":
    run_main(main)
