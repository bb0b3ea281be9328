"""The JAX backend of the parity report: streams, logits, gradients, training, greedy decoding and packing."""

import dataclasses
import json
from pathlib import Path
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np

from smollm_jax import weights
from smollm_jax.config import Recipe
from smollm_jax.errors import UsageError
from smollm_jax.generation.generate import generate
from smollm_jax.generation.programs import PAD_ID
from smollm_jax.model.attention import packed
from smollm_jax.training import optimizer, train_step
from smollm_jax.training.execution import ExecutionConfig
from smollm_jax.training.state import init_train_state
from smollm_jax.weights import gguf_writer
from smollm_jax.weights.bundle import Bundle
from smollm_parity import ladder
from smollm_parity.job import NEW_TOKENS, prompts_of
from smollm_parity.results import write, write_gradient, write_stream
from smollm_parity.rungs import DECODED

GGUF_TYPES: tuple[Literal["f16", "bf16", "q8_0"], ...] = ("f16", "bf16", "q8_0")
Job = dict[str, np.ndarray]


def measure_jax(weights_path: Path, job: Job, out: Path, device: str) -> dict[str, str]:
    """Writes the arrays of every rung; returns the device's name and the version of JAX."""
    jax.config.update("jax_platforms", "cuda" if device == "gpu" else "cpu")
    bundle = weights.read(weights_path)
    versions = {"device": jax.devices()[0].device_kind, "jax": jax.__version__}
    forward(bundle, job, out, device)
    rounded(bundle, job, out, device)
    for dtype in ("float64", "float32"):
        write_gradient(out, dtype, *ladder.jax_gradients(bundle, job["window"], dtype))
    with ladder.precisely("float32"):
        training(bundle, job, out)
        greedy(bundle, job, out)
        packing(bundle, job, out)
    return versions


def forward(bundle: Bundle, job: Job, out: Path, device: str) -> None:
    """Streams and logits in each dtype, and logits of bfloat16 operands with float32 results (a CPU's training)."""
    for dtype in ("float64", "float32", "bfloat16"):
        write_stream(out, dtype, *ladder.jax_stream(bundle, job["texts"], dtype))
        if dtype != "bfloat16":
            write(out, f"first-{dtype}", ladder.jax_stream(bundle, job["firsts"], dtype)[0])
    if device == "gpu":
        by_cudnn = ladder.jax_stream(bundle, job["texts"], "bfloat16", implementation="cudnn")
        write_stream(out, "bfloat16-cudnn", *by_cudnn)
    write(out, "logits-operands", ladder.jax_operand_logits(bundle, job["texts"]))


def rounded(bundle: Bundle, job: Job, out: Path, device: str) -> None:
    """For each GGUF type: logits of the rounded weights, the rounding error, and logits of quantised decoding."""
    for kind in GGUF_TYPES:
        try:
            tensors = gguf_writer.rounded(bundle.tensors, kind)
        except UsageError as error:  # the type cannot store these weights: row length, or values out of range
            print(error)
            continue
        logits = ladder.jax_stream(dataclasses.replace(bundle, tensors=tensors), job["texts"], "float32")[1]
        write(out, f"logits-{kind}", logits)
        write(out, f"lost-{kind}", gguf_writer.rounding_error(bundle.tensors, tensors))
        if device == "cpu" and kind in DECODED:  # quantised decoding runs on CPUs only
            write(out, f"decoded-{kind}", ladder.decoded(bundle, job["texts"], DECODED[kind]))


def training(bundle: Bundle, job: Job, out: Path) -> None:
    """The losses of the job's float32 training steps from these weights."""
    recipe = Recipe(**json.loads(str(job["recipe"])))
    tx, curve = optimizer.adamw(recipe), []
    state = init_train_state(weights.from_bundle(bundle), tx)
    for tokens in job["batches"]:
        state, metrics = train_step.train_step(state, jnp.asarray(tokens), tx=tx, execution=ExecutionConfig("float32"))
        curve.append(float(metrics["loss"]))
    write(out, "curve", curve)


def greedy(bundle: Bundle, job: Job, out: Path) -> None:
    """Greedy continuations of the job's prompts; -1 after the end of a text."""
    model, eos = weights.from_bundle(bundle), bundle.config.eos_token_ids
    pieces = generate(model, prompts_of(job), max_new_tokens=NEW_TOKENS, eos_token_ids=eos)
    new = np.concatenate(list(pieces), axis=1)
    assert PAD_ID == -1
    write(out, "greedy", np.pad(new, ((0, 0), (0, NEW_TOKENS - new.shape[1])), constant_values=PAD_ID))


def packing(bundle: Bundle, job: Job, out: Path) -> None:
    """The logits of two documents packed into one row, minus those of each document in its own row."""
    model, (first, second) = weights.from_bundle(bundle), job["texts"][:2]
    tokens = jnp.asarray(np.concatenate([first, second])[None])
    segments = jnp.asarray(np.repeat([0, 1], len(first))[None])
    positions = jnp.asarray(np.tile(np.arange(len(first)), 2)[None])
    packed_logits = jax.jit(lambda m, t: m(t, attend=packed(segments), positions=positions))(model, tokens)
    separate_logits = jax.jit(lambda m, t: m(t))(model, jnp.asarray(np.stack([first, second])))
    write(out, "packed", np.asarray(packed_logits).reshape(separate_logits.shape) - np.asarray(separate_logits))
