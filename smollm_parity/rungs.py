"""The claims of the parity report, one function per rung, computed from the backends' arrays (`results.py`).

A rung of the ladder is a precision or a use of the model; each function returns its claims: a measured number, the
noise to compare it with, and a bound from `tolerances.py`. NumPy only, as in `metrics.py`.
"""

import dataclasses
import math
from pathlib import Path
from typing import Any, Literal

import numpy as np

from smollm_parity import metrics, tolerances
from smollm_parity.results import Results

# GGUF types, and the `generate.py --quantize` type that rounds in the same way.
DECODED: dict[str, Literal["bf16", "int8"]] = {"bf16": "bf16", "q8_0": "int8"}


@dataclasses.dataclass(frozen=True)
class Rung:
    """One claim: a measured number, the noise to compare it with, and the bound that it must not exceed."""

    rung: str
    claim: str
    measured: float
    bound: float
    noise: str = ""

    @property
    def passed(self) -> bool:
        return bool(self.measured <= self.bound)  # False for NaN


def number(value: float, digits: int = 2) -> str:
    """A number with that many significant digits: 0.84, 12, or 7.5e-15 where a decimal would be mostly zeros."""
    if value == 0 or 1e-3 <= abs(value) < 1e4:
        short = f"{value:.{digits}g}"
        return short if "e" not in short else f"{value:.0f}"
    mantissa, _, power = f"{value:.{digits - 1}e}".partition("e")
    return f"{mantissa.rstrip('0').rstrip('.')}e{int(power)}"


def compared(rung: Rung) -> str:
    """The measured number and its bound, as in 0.84 <= 1.5, with enough digits to see which is larger."""
    if not math.isfinite(rung.measured):
        return f"{rung.measured}, bound {number(rung.bound)}"
    pairs = [(number(rung.measured, digits), number(rung.bound, digits)) for digits in range(2, 18)]
    measured, bound = next((m, b) for m, b in pairs if (float(m) <= float(b)) == rung.passed)
    return f"{measured} {'<=' if rung.passed else '>'} {bound}"


def compare(folders: dict[str, Path], job: dict[str, Any]) -> tuple[list[Rung], dict[str, Any]]:
    """The claims of every rung, and the numbers to plot, from the folder of each backend."""
    results = Results(folders, job["texts"])
    ladder = (float64, float32, bfloat16, gradients, training, generation, packing, gguf)
    rungs = [rung for rung_of in ladder for rung in rung_of(results)]
    return [dataclasses.replace(rung, measured=float(rung.measured)) for rung in rungs], curves(results)


def float64(results: Results) -> list[Rung]:
    """Rung 1: JAX and the twin compute the same function."""
    error = np.abs(results.load("twin", "logits-float64") - results.true_logits).max() / results.largest_logit
    errors = metrics.gradient_errors(results.gradient("twin", "float64"), results.gradient("jax", "float64"))
    return [
        Rung("1 float64", "logits, JAX against the twin", error, tolerances.FLOAT64_LOGITS, "1e-16 a rounding"),
        Rung("1 float64", "gradients, worst tensor", max(errors.values()), tolerances.FLOAT64_GRADIENTS),
    ]


def float32(results: Results) -> list[Rung]:
    """Rung 2: JAX's error is like the baseline's in every layer, and logits agree."""
    baseline, rungs = results.baseline, []
    owner = f"{baseline}'" if baseline.endswith("s") else f"{baseline}'s"
    for tokens, name, skip in (("first tokens", "first", 0), ("other tokens", "stream", 1)):
        truth = results.load("jax", f"{name}-float64")[:, :, skip:]
        ours = metrics.layer_errors(results.load("jax", f"{name}-float32")[:, :, skip:], truth)
        theirs = metrics.layer_errors(results.load(baseline, f"{name}-float32")[:, :, skip:], truth)
        bounds = (tolerances.FLOAT32_RMS_RATIO, tolerances.FLOAT32_MAX_RATIO)
        for kind, error, their_error, bound in zip(("RMS", "largest"), ours, theirs, bounds, strict=True):
            claim = f"{kind} error over {owner}, worst layer, {tokens}"
            ratio = (error / their_error).max()
            rungs.append(Rung("2 float32", claim, ratio, bound, f"{owner} {number(their_error.max())}"))
    error = np.abs(results.load(baseline, "logits-float32") - results.true_logits).max() / results.largest_logit
    noise = f"{baseline}: {number(error)} of the largest logit"
    logits = results.load("jax", "logits-float32")
    for backend in results.backends[1:]:
        error = np.abs(logits - results.load(backend, "logits-float32")).max() / results.largest_logit
        rungs.append(Rung("2 float32", f"logits, JAX against {backend}", error, tolerances.FLOAT32_LOGITS, noise))
    return rungs


def bfloat16(results: Results) -> list[Rung]:
    """Rung 3: rounding changes JAX's distributions no more than the baseline's."""
    baseline, exact = results.baseline, results.true_distribution
    ours, theirs = results.bfloat16_distributions["jax"], results.bfloat16_distributions[baseline]
    operands, autocast = (
        results.distribution("jax", "logits-operands"),
        results.distribution(baseline, "logits-autocast"),
    )
    rungs = [
        Rung(
            "3 bfloat16",
            f"KL(truth, JAX) over KL(truth, {baseline})",
            ours["kl"] / theirs["kl"],
            tolerances.BFLOAT16_KL_RATIO,
            f"{baseline}: KL {number(theirs['kl'])} nats a token",
        ),
        Rung(
            "3 bfloat16",
            f"argmaxes lost against {baseline}",
            theirs["argmax"] - ours["argmax"],
            tolerances.BFLOAT16_ARGMAX_LOSS,
            f"JAX {ours['argmax']:.3f}, {baseline} {theirs['argmax']:.3f}",
        ),
        Rung(
            "3 bfloat16",
            "perplexity, relative to the truth",
            abs(ours["perplexity"] / exact["perplexity"] - 1),
            tolerances.BFLOAT16_PERPLEXITY,
            f"truth {exact['perplexity']:.3f}, JAX {ours['perplexity']:.3f}",
        ),
        Rung(
            "3 bfloat16",
            f"KL(truth, JAX as a CPU trains) over KL(truth, {baseline} under autocast)",
            operands["kl"] / autocast["kl"],
            tolerances.AUTOCAST_KL_RATIO,
            f"{baseline}: KL {number(autocast['kl'])} nats a token",
        ),
    ]
    if results.has("jax", "logits-bfloat16-cudnn"):
        ratio = results.distribution("jax", "logits-bfloat16-cudnn")["kl"] / theirs["kl"]
        claim = f"KL(truth, JAX with cudnn attention) over KL(truth, {baseline})"
        rungs.append(Rung("3 bfloat16", claim, ratio, tolerances.BFLOAT16_KL_RATIO))
    return rungs


def gradients(results: Results) -> list[Rung]:
    """Rung 5: JAX's float32 gradients against the truth."""
    truth, baseline = results.gradient("jax", "float64"), results.baseline
    ours, theirs = (
        max(metrics.gradient_errors(results.gradient(backend, "float32"), truth).values())
        for backend in ("jax", baseline)
    )
    claim, noise = "float32, against the truth, worst tensor", f"{baseline}: {number(theirs)}"
    return [Rung("5 gradients", claim, ours, tolerances.FLOAT32_GRADIENTS, noise)]


def training(results: Results) -> list[Rung]:
    """Rung 7: the trainers of JAX and the twin take the same ten steps."""
    difference = np.abs(results.load("jax", "curve") / results.load("twin", "curve") - 1).max()
    claim = "loss of 10 float32 steps, JAX against the twin"
    return [Rung("7 training", claim, difference, tolerances.TRAINING_FLOAT32_FULL)]


def generation(results: Results) -> list[Rung]:
    """Rung 8: greedy texts equal transformers'; no claim where it is not installed."""
    if "transformers" not in results.folders:
        return []
    differ = (results.load("jax", "greedy") != results.load("transformers", "greedy")).any(axis=1).sum()
    return [Rung("8 generation", "of 10 greedy texts, how many differ from transformers'", float(differ), 0.0)]


def packing(results: Results) -> list[Rung]:
    """Rung 9: documents in one row do not see each other."""
    error = np.abs(results.load("jax", "packed")).max() / results.largest_logit
    return [Rung("9 packing", "packed documents against separate ones", error, tolerances.PACKED_LOGITS)]


def gguf(results: Results) -> list[Rung]:
    """The rounding error of each GGUF type, and (rung 8) decoding with its rounded weights."""
    rungs = []
    for kind, bound in tolerances.GGUF_LOSS.items():
        if not results.has("jax", f"lost-{kind}"):  # this type cannot store the weights
            continue
        claim, noise = f"what {kind} loses of the weights, RMS", _text_loss(results, f"logits-{kind}")
        rungs.append(Rung("GGUF", claim, float(results.load("jax", f"lost-{kind}")), bound, noise))
        if results.has("jax", f"decoded-{kind}"):
            rungs.append(_decoding(results, kind))
    return rungs


def _decoding(results: Results, kind: str) -> Rung:
    """Decoding with quantised weights, compared with the float32 forward pass of the same rounded weights."""
    decoded, rounded = results.load("jax", f"decoded-{kind}"), results.load("jax", f"logits-{kind}")
    error = np.abs(decoded - rounded).max() / np.abs(rounded).max()
    claim = f"logits decoded with --quantize {DECODED[kind]}, against float32's of the same rounded weights"
    noise = f"decoded: {_text_loss(results, f'decoded-{kind}')}"
    return Rung("8 generation", claim, error, tolerances.FLOAT32_LOGITS, noise)


def _text_loss(results: Results, name: str) -> str:
    """KL and perplexity of JAX's logits of this name, in words."""
    rounded, exact = results.distribution("jax", name), results.true_distribution
    perplexities = f"perplexity {exact['perplexity']:.3f} -> {rounded['perplexity']:.3f}"
    return f"KL {number(rounded['kl'])} nats a token, {perplexities}"


def curves(results: Results) -> dict[str, Any]:
    """What the page plots: error per layer and per position, the loss curves, and the bfloat16 distributions."""
    truth = results.load("jax", "stream-float64")
    layers, positions = {}, {}
    for backend in results.backends:
        for dtype in ("float32", "bfloat16"):
            rms, _ = metrics.layer_errors(results.load(backend, f"stream-{dtype}"), truth)
            layers[f"{backend}, {dtype}"] = rms.tolist()
        error = np.abs(results.load(backend, "logits-float32") - results.true_logits)
        positions[backend] = error.max(axis=(0, 2)).tolist()
    return {
        "layers": layers,
        "positions": positions,
        "training": {backend: results.load(backend, "curve").tolist() for backend in ("jax", "twin")},
        "bfloat16": results.bfloat16_distributions | {"truth": results.true_distribution},
    }
