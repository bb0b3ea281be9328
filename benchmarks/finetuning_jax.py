"""Our fine-tuning steps as a benchmark backend."""

import itertools
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import finetuning
from benchmarks.workload import Prepared, Workload, resident
from smollm_jax import weights
from smollm_jax.config import Config
from smollm_jax.data.examples.packing import packed, padded, pair_length, paired
from smollm_jax.finetuning import lora
from smollm_jax.finetuning.objectives import LearntTokens
from smollm_jax.finetuning.reference import log_probs_of
from smollm_jax.finetuning.run import objective_of
from smollm_jax.model import precision
from smollm_jax.training import memory, optimizer, train_step
from smollm_jax.training.execution import ExecutionConfig, default_unroll, fastest_attention
from smollm_jax.training.loss import mean_loss
from smollm_jax.training.state import init_train_state


def prepare(_name: str, workload: Workload, folder: Path) -> Prepared:
    """A unit of `finetuning.STEPS` optimizer steps; `ready` has the loss of the first rows, packed and padded."""
    device = jax.devices()[0]
    if workload.dtype == "float32":
        jax.config.update("jax_default_matmul_precision", "float32")
    square = jnp.ones((2048, 2048), jnp.float32)
    matmul = jax.jit(jnp.matmul)

    def gemm() -> int:
        jax.block_until_ready(matmul(square, square))
        return 1

    model, config = weights.load(folder, jnp.float32)
    recipe = finetuning.recipe(workload, packing=True)
    if workload.method == "dpo":
        made = finetuning.pairs(workload)
        rows = {"padded": paired(made, pair_length(made))}
    else:
        examples = finetuning.examples(workload)
        rows = {"packed": packed(examples, recipe.sequence_length), "padded": padded(examples, recipe.sequence_length)}
    execution = execution_of(device, config, recipe, next(iter(rows.values())).tokens.shape[-1])
    if workload.method == "dpo":
        fill_reference(rows["padded"], model, execution, recipe.batch_size)
    losses = {kind: first_loss(model, table, recipe, execution) for kind, table in rows.items()}

    chosen = next(iter(rows.values()))
    tx, objective = optimizer.adamw(recipe), objective_of(recipe)
    adapter = workload.method == "lora"
    frozen = model if adapter else None
    state = init_train_state(lora.init_pairs(config, recipe) if adapter else model, tx)
    del model
    compiled: Any = None
    cycle = itertools.count()
    orders = [chosen[start : start + recipe.batch_size] for start in range(0, len(chosen), recipe.batch_size)][:-1]

    def unit() -> dict[str, Any]:
        nonlocal state, compiled
        tokens = 0
        for _ in range(finetuning.STEPS):
            arrays = orders[next(cycle) % len(orders)].arrays()
            tokens += int((arrays["targets"] >= 0).sum())
            batch = {name: jnp.asarray(array) for name, array in arrays.items()}
            if compiled is None:
                step = train_step.train_step.lower(
                    state, batch, frozen, tx=tx, execution=execution, objective=objective
                )
                compiled = step.compile()
            state, _metrics = compiled(state, batch, frozen)
        jax.block_until_ready(state)
        return {"tokens": tokens}

    unit()
    ready = {"device": device.device_kind, "platform": device.platform, "losses": [], "by_rows": losses}
    return unit, gemm, ready | {"peak_bytes": resident("VmHWM")}


def execution_of(device: Any, config: Config, recipe: Any, length: int) -> ExecutionConfig:
    """As `finetune.py` chooses."""
    attention = fastest_attention(device, recipe.dtype, length, config.head_dim, True)[0]
    dtype, operands = precision.activation_and_operand_dtypes(recipe.dtype, device.platform)
    unroll = default_unroll(config, attention)
    execution = ExecutionConfig(dtype, attention, "dots", unroll, 1, None, 0, operands)  # 0: documents are masked
    return memory.choose_remat(config, recipe, execution, device.platform, memory.device_limit(device))


def fill_reference(rows: Any, model: Any, execution: ExecutionConfig, size: int) -> None:
    for start in range(0, len(rows), size):
        part = rows[np.arange(start, start + size) % len(rows)]
        batch = {name: jnp.asarray(array) for name, array in part.arrays().items()}
        count = min(size, len(rows) - start)
        rows.reference[start : start + count] = np.asarray(log_probs_of(model, batch, execution=execution))[:count]


def first_loss(model: Any, rows: Any, recipe: Any, execution: ExecutionConfig) -> float:
    batch = {name: jnp.asarray(array) for name, array in rows[: recipe.batch_size].arrays().items()}
    objective = LearntTokens() if recipe.method == "sft" else objective_of(recipe)
    return float(jax.jit(mean_loss, static_argnums=(2, 4))(model, batch, execution, None, objective)[0])
