"""The JAX side: this package's trainer, decoder and kernels."""

import functools
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.job import GEMM, Job, Prepared, Unit, per_call, rates, resident, samples
from smollm_jax import weights
from smollm_jax.generation import generate, programs
from smollm_jax.generation.quantized import Quantized
from smollm_jax.generation.unrolled import Unrolled
from smollm_jax.model import attention, cross_entropy, precision
from smollm_jax.training import memory, optimizer, train_step
from smollm_jax.training.execution import Compute, fastest_attention, layers_at_once
from smollm_jax.training.state import init_train_state
from smollm_jax.training.validation import eval_step


def prepare(name: str, job: Job, folder: Path) -> Prepared:
    """A unit of work, a matrix product, and what this side has to say before."""
    device = jax.devices()[0]
    gpu = device.platform == "gpu"
    if job.dtype == "float32":  # as the trainer does: on a GPU JAX's default is TF32
        jax.config.update("jax_default_matmul_precision", "float32")
    square = jnp.ones((GEMM, GEMM), jnp.bfloat16 if gpu else jnp.float32)
    product, repeats = jax.jit(jnp.matmul), 200 if gpu else 1

    def gemm() -> int:
        repeat(product, (square, square), repeats)
        return repeats

    kernels = {"loss": head_loss, "attention": attend, "packed": attend, "gemm": products}
    if job.what in kernels:
        unit, ready = kernels[job.what](job, name)
    elif job.training:
        unit, ready = step(job, folder)
    else:
        unit, ready = inference(job, folder)
    return unit, gemm, {"device": device.device_kind, "platform": device.platform, "losses": []} | ready


def implementation(job: Job) -> attention.Implementation:
    """The trainer's choice."""
    length, packed = job.sequence_length, job.what == "packed"
    return fastest_attention(jax.devices()[0], job.dtype, length, job.config.head_dim, packed)[0]


def step(job: Job, folder: Path) -> tuple[Unit, dict[str, Any]]:
    """Optimizer steps, and the most memory they take: None where JAX's allocator keeps no count."""
    device = jax.devices()[0]
    gpu = device.platform == "gpu"
    tokens, tx = jnp.asarray(job.tokens()), optimizer.adamw(job.recipe())
    unroll = layers_at_once(job.config, implementation(job)) if job.unroll is None else job.unroll
    dtype, operands = precision.activations_and_operands(job.dtype, device.platform)
    options: Any = {"remat": job.remat or "dots", "unroll": unroll, "operands": operands}
    compute = Compute(dtype, implementation(job), **options)
    if job.remat is None:
        compute = memory.fastest(job.config, job.recipe(), compute, device.platform, memory.available(device))
    print(f"ours: {compute}", flush=True)
    state = init_train_state(weights.load(folder, jnp.float32)[0], tx)
    ready: dict[str, Any] = {}
    ready["before_bytes"] = (device.memory_stats() or {}).get("bytes_in_use") if gpu else resident("VmRSS")
    compiled = train_step.train_step.lower(state, tokens, tx=tx, compute=compute).compile()

    def unit() -> dict[str, Any]:
        nonlocal state
        state, metrics = compiled(state, tokens)
        jax.block_until_ready(state)
        return {"loss": float(metrics["loss"])}

    ready["losses"] = [unit()["loss"], unit()["loss"]]
    ready["peak_bytes"] = (device.memory_stats() or {}).get("peak_bytes_in_use") if gpu else resident("VmHWM")
    sizes: Any = compiled.memory_analysis()
    inputs_and_outputs = sizes.argument_size_in_bytes + sizes.output_size_in_bytes - sizes.alias_size_in_bytes
    return unit, ready | {"program_bytes": inputs_and_outputs + sizes.temp_size_in_bytes}


def inference(job: Job, folder: Path) -> tuple[Unit, dict[str, Any]]:
    """Greedy decoding, or one forward pass that fills a cache."""
    model, tokens = weights.load(folder, jnp.dtype(job.dtype))[0], jnp.asarray(job.tokens())
    prepared: Any = model
    if job.what == "decode":  # as the engine does, once
        prepared = Quantized.of(model, job.quantize) if job.quantize else Unrolled.of(model)

    def decode() -> dict[str, Any]:
        # Not from the first tokens to the last: when those are read, the next call is under way already.
        first, _ = timed_text(1)
        whole, ids = timed_text(job.new_tokens)
        return {"seconds": whole - first, "tokens": job.batch_size * (job.new_tokens - 1), "ids": ids.tolist()}

    def timed_text(new_tokens: int) -> tuple[float, np.ndarray]:
        began = time.perf_counter()
        pieces = list(generate.generate(prepared, tokens[:, :-1].tolist(), max_new_tokens=new_tokens))
        return time.perf_counter() - began, np.concatenate(pieces, axis=1)

    def prefill() -> dict[str, Any]:
        start = jnp.zeros(job.batch_size, jnp.int32)
        jax.block_until_ready(programs.prefill(model, tokens[:, :-1], start, slots=job.sequence_length))
        return {}

    unit = decode if job.what == "decode" else prefill
    losses = [float(eval_step(model, tokens, Compute(job.dtype)))]
    return unit, {"losses": losses, "ids": unit().get("ids")}


def head_loss(job: Job, _name: str) -> tuple[Unit, dict[str, Any]]:
    """The loss of hidden states, and its gradients by them and by the head."""
    hidden, head, targets = map(jnp.asarray, job.head())
    hidden = hidden.astype(job.dtype)

    @jax.jit
    def both(hidden, head, targets):
        mean = lambda hidden, head: cross_entropy.linear_cross_entropy(hidden, head, targets) / targets.size  # noqa: E731
        return jax.value_and_grad(mean, argnums=(0, 1))(hidden, head)

    value, gradients = both(hidden, head, targets)
    found = dict(zip(("d hidden", "d head"), map(samples, gradients), strict=True))
    return timed(both, hidden, head, targets), {
        "losses": [float(value)],
        "samples": found,
        "flops": 3 * job.flops()["head"],
    }


def attend(job: Job, name: str) -> tuple[Unit, dict[str, Any]]:
    """Causal attention and its gradients; in "packed", ours within documents, "plain" across them."""
    q, k, v, gradient = (jnp.asarray(x, job.dtype) for x in job.heads())
    if job.what == "packed" and name == "ours":
        both = forward_and_backward(attention.packed(jnp.asarray(job.segments()), implementation(job)))
    else:
        both = forward_and_backward(attention.causal(implementation(job)))
    ready: dict[str, Any] = {"flops": job.flops()["attention both ways"]}
    if job.what == "attention":  # packed and plain are to differ
        found = zip(("out", "d q", "d k", "d v"), map(samples, both(q, k, v, gradient)), strict=True)
        ready["samples"] = dict(found)
    return timed(both, q, k, v, gradient), ready


def forward_and_backward(attend: attention.Attend) -> Callable[..., Any]:
    @jax.jit
    def both(q, k, v, gradient):
        out, pull = jax.vjp(lambda q, k, v: attend(q, k, v, None)[0], q, k, v)
        return out, *pull(gradient)

    return both


def products(job: Job, _name: str) -> tuple[Unit, dict[str, Any]]:
    """FLOP/s of each product of the model's forward pass, and of its attention."""
    work = {}
    for name, (rows, inner, columns) in job.products().items():
        pair = (jnp.ones((rows, inner), job.dtype), jnp.ones((inner, columns), job.dtype))
        work[name] = functools.partial(repeat, jax.jit(jnp.matmul), pair)
    q, k, v, gradient = (jnp.asarray(x, job.dtype) for x in job.heads())
    attend = attention.causal(implementation(job))
    forward = jax.jit(lambda q, k, v: attend(q, k, v, None)[0])
    work["attention"] = functools.partial(repeat, forward, (q, k, v))
    work["attention both ways"] = functools.partial(repeat, forward_and_backward(attend), (q, k, v, gradient))
    return rates(job, work), {}


def repeat(function: Callable[..., Any], arguments: tuple[Any, ...], times: int) -> None:
    out: Any = None
    for _ in range(times):
        out = function(*arguments)
    jax.block_until_ready(out)


def timed(function: Callable[..., Any], *arguments: Any) -> Unit:
    """A unit of work that repeats a short call and gives the time of one."""
    return per_call(functools.partial(repeat, function, arguments))
