"""The JAX backend: this package's trainer, decoder and kernels."""

import functools
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.workload import GEMM, Prepared, Unit, Workload, per_call, rates, resident, samples
from smollm_jax import weights
from smollm_jax.generation import generate, programs
from smollm_jax.generation.quantized import Quantized
from smollm_jax.generation.unrolled import Unrolled
from smollm_jax.model import attention, cross_entropy, precision
from smollm_jax.training import memory, optimizer, train_step
from smollm_jax.training.execution import ExecutionConfig, default_unroll, fastest_attention
from smollm_jax.training.state import init_train_state
from smollm_jax.training.validation import eval_step


def prepare(name: str, workload: Workload, folder: Path) -> Prepared:
    """A unit of work, a GEMM to time, and the backend's `ready` report."""
    device = jax.devices()[0]
    gpu = device.platform == "gpu"
    if workload.dtype == "float32":  # as the trainer does: on a GPU JAX's default is TF32
        jax.config.update("jax_default_matmul_precision", "float32")
    square = jnp.ones((GEMM, GEMM), jnp.bfloat16 if gpu else jnp.float32)
    matmul, repeats = jax.jit(jnp.matmul), 200 if gpu else 1

    def gemm() -> int:
        repeat(matmul, (square, square), repeats)
        return repeats

    kernels = {"loss": head_loss, "attention": attend, "packed": attend, "gemm": matmuls}
    if workload.what in kernels:
        unit, ready = kernels[workload.what](workload, name)
    elif workload.training:
        unit, ready = step(workload, folder)
    else:
        unit, ready = inference(workload, folder)
    return unit, gemm, {"device": device.device_kind, "platform": device.platform, "losses": []} | ready


def implementation(workload: Workload) -> attention.Implementation:
    """The attention implementation that the trainer would choose."""
    length, packed = workload.sequence_length, workload.what == "packed"
    return fastest_attention(jax.devices()[0], workload.dtype, length, workload.config.head_dim, packed)[0]


def step(workload: Workload, folder: Path) -> tuple[Unit, dict[str, Any]]:
    """Optimizer steps, with their peak memory: None where JAX's allocator keeps no statistics."""
    device = jax.devices()[0]
    gpu = device.platform == "gpu"
    tokens, tx = jnp.asarray(workload.tokens()), optimizer.adamw(workload.recipe())
    unroll = default_unroll(workload.config, implementation(workload)) if workload.unroll is None else workload.unroll
    dtype, operands = precision.activation_and_operand_dtypes(workload.dtype, device.platform)
    options: Any = {"remat": workload.remat or "dots", "unroll": unroll, "operands": operands}
    execution = ExecutionConfig(dtype, implementation(workload), **options)
    if workload.remat is None:
        execution = memory.choose_remat(
            workload.config, workload.recipe(), execution, device.platform, memory.device_limit(device)
        )
    print(f"ours: {execution}", flush=True)
    state = init_train_state(weights.load(folder, jnp.float32)[0], tx)
    ready: dict[str, Any] = {}
    ready["before_bytes"] = (device.memory_stats() or {}).get("bytes_in_use") if gpu else resident("VmRSS")
    compiled = train_step.train_step.lower(state, tokens, tx=tx, execution=execution).compile()

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


def inference(workload: Workload, folder: Path) -> tuple[Unit, dict[str, Any]]:
    """Greedy decoding, or one forward pass that fills a cache."""
    model, tokens = weights.load(folder, jnp.dtype(workload.dtype))[0], jnp.asarray(workload.tokens())
    prepared: Any = model
    if workload.what == "decode":  # as the engine does, once
        prepared = Quantized.from_model(model, workload.quantize) if workload.quantize else Unrolled.from_model(model)

    def decode() -> dict[str, Any]:
        # Not timed from the first token to the last: JAX starts the next call before the previous tokens are read.
        first, _ = timed_text(1)
        whole, ids = timed_text(workload.new_tokens)
        tokens_timed = workload.batch_size * (workload.new_tokens - 1)
        return {"seconds": whole - first, "tokens": tokens_timed, "ids": ids.tolist()}

    def timed_text(new_tokens: int) -> tuple[float, np.ndarray]:
        began = time.perf_counter()
        pieces = list(generate.generate(prepared, tokens[:, :-1].tolist(), max_new_tokens=new_tokens))
        return time.perf_counter() - began, np.concatenate(pieces, axis=1)

    def prefill() -> dict[str, Any]:
        start = jnp.zeros(workload.batch_size, jnp.int32)
        jax.block_until_ready(programs.prefill(model, tokens[:, :-1], start, cache_size=workload.sequence_length))
        return {}

    unit = decode if workload.what == "decode" else prefill
    losses = [float(eval_step(model, tokens, execution=ExecutionConfig(workload.dtype))[0])]
    return unit, {"losses": losses, "ids": unit().get("ids")}


def head_loss(workload: Workload, _name: str) -> tuple[Unit, dict[str, Any]]:
    """The loss of hidden states, and its gradients with respect to them and to the head."""
    hidden, head, targets = map(jnp.asarray, workload.head())
    hidden = hidden.astype(workload.dtype)

    @jax.jit
    def loss_and_gradients(hidden, head, targets):
        mean = lambda hidden, head: cross_entropy.linear_cross_entropy(hidden, head, targets) / targets.size  # noqa: E731
        return jax.value_and_grad(mean, argnums=(0, 1))(hidden, head)

    value, gradients = loss_and_gradients(hidden, head, targets)
    sampled = dict(zip(("d hidden", "d head"), map(samples, gradients), strict=True))
    return timed(loss_and_gradients, hidden, head, targets), {
        "losses": [float(value)],
        "samples": sampled,
        "flops": 3 * workload.flops()["head"],
    }


def attend(workload: Workload, name: str) -> tuple[Unit, dict[str, Any]]:
    """Causal attention and its gradients; for "packed", "ours" masks other documents and "plain" does not."""
    q, k, v, gradient = (jnp.asarray(x, workload.dtype) for x in workload.heads())
    if workload.what == "packed" and name == "ours":
        function = forward_and_backward(attention.packed(jnp.asarray(workload.segments()), implementation(workload)))
    else:
        function = forward_and_backward(attention.causal(implementation(workload)))
    ready: dict[str, Any] = {"flops": workload.flops()["attention both ways"]}
    if workload.what == "attention":  # the results of packed and plain differ
        sampled = zip(("out", "d q", "d k", "d v"), map(samples, function(q, k, v, gradient)), strict=True)
        ready["samples"] = dict(sampled)
    return timed(function, q, k, v, gradient), ready


def forward_and_backward(attend: attention.Attend) -> Callable[..., Any]:
    @jax.jit
    def function(q, k, v, gradient):
        out, pullback = jax.vjp(lambda q, k, v: attend(q, k, v, None)[0], q, k, v)
        return out, *pullback(gradient)

    return function


def matmuls(workload: Workload, _name: str) -> tuple[Unit, dict[str, Any]]:
    """FLOP/s of each matmul of the model's forward pass, and of its attention."""
    work = {}
    for name, (rows, inner, columns) in workload.matmuls().items():
        pair = (jnp.ones((rows, inner), workload.dtype), jnp.ones((inner, columns), workload.dtype))
        work[name] = functools.partial(repeat, jax.jit(jnp.matmul), pair)
    q, k, v, gradient = (jnp.asarray(x, workload.dtype) for x in workload.heads())
    attend = attention.causal(implementation(workload))
    forward = jax.jit(lambda q, k, v: attend(q, k, v, None)[0])
    work["attention"] = functools.partial(repeat, forward, (q, k, v))
    work["attention both ways"] = functools.partial(repeat, forward_and_backward(attend), (q, k, v, gradient))
    return rates(workload, work), {}


def repeat(function: Callable[..., Any], arguments: tuple[Any, ...], times: int) -> None:
    out: Any = None
    for _ in range(times):
        out = function(*arguments)
    jax.block_until_ready(out)


def timed(function: Callable[..., Any], *arguments: Any) -> Unit:
    """A unit of work that repeats a short call and returns the seconds of one."""
    return per_call(functools.partial(repeat, function, arguments))
