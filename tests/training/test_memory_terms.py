"""Each term of the memory estimate, of a model small enough to count by hand.

`test_memory.py` compares the sum with what XLA reports, which takes a minute.
"""

import dataclasses
from typing import Any

import pytest

from smollm_jax.config import Recipe
from smollm_jax.model import flash_attention
from smollm_jax.training import memory
from smollm_jax.training.execution import ExecutionConfig
from tests.small_files import SMALL

# V, D, F, L, N, K, H: 300, 8, 12, 2, 2, 1, 4. A layer has 64 + 32 + 32 + 64 + 3 * 96 weights and 2 * 8 of norms.
HEAD, LAYERS = 2400, 2 * 496 + 8
ALL = 4 * (HEAD + LAYERS)  # bytes


def mesh(data: int, fsdp: int) -> Any:
    return type("Mesh", (), {"shape": {"data": data, "fsdp": fsdp}, "size": data * fsdp})()


def estimate(platform: str = "cpu", batch_size: int = 8, length: int = 16, **execution: Any) -> memory.MemoryEstimate:
    recipe = Recipe(10, batch_size, length, 1e-3, 0, execution.setdefault("dtype", "float32"))
    return memory.estimate(SMALL, recipe, ExecutionConfig(**execution), platform)


def test_in_float32_on_one_device():
    plan, M = estimate(), 8 * 16
    assert (plan.parameters, plan.optimizer_state, plan.update) == (ALL, 2 * ALL, ALL)
    assert (plan.gathered_parameters, plan.accumulated_gradients, plan.cast_weights, plan.workspace) == (0, 0, 0, 0)
    # Input, queries, keys, values, gate, up, attention and o_proj's output; and a softmax's logsumexp a head.
    assert plan.residuals == 2 * M * 4 * ((8 + 8 + 4 + 4 + 12 + 12 + 8 + 8) + 2)
    assert plan.loss == M * 300 * 4 + 4 * HEAD + 2 * 4 * M * 8
    assert plan.gradients == ALL
    assert plan.layer_backward == M * 4 * (5 * 12 + 7 * 8)
    assert plan.attention_masks == 8 * 2 * 16 * 16
    assert plan.total == 3 * ALL + plan.loss + plan.residuals


@pytest.mark.parametrize("largest", ["loss", "gradients", "update"])
def test_the_peak_is_the_loss_the_backward_pass_or_the_update(largest):
    """Terms are different powers of two, so that a sum tells which are in it."""
    names = [field.name for field in dataclasses.fields(memory.MemoryEstimate)]
    assert len(names) == 12
    powers = {name: 1 << i for i, name in enumerate(names)}
    plan = memory.MemoryEstimate(**(powers | {largest: 10**9}))
    both = plan.parameters + plan.optimizer_state
    computing = plan.gathered_parameters + plan.accumulated_gradients + plan.cast_weights + plan.residuals
    backward = plan.gradients + plan.layer_backward + plan.attention_masks + plan.workspace
    phases = {"loss": computing + plan.loss, "gradients": computing + backward, "update": plan.update}
    assert plan.total == both + phases[largest]


@pytest.mark.parametrize(
    ("remat", "elements"),
    [("full", 8), ("dots", 64), ("swiglu", 64 + 12), ("none", 6 * 12 + 4 * 8 + 3 * 8 + 2 * 4)],
)
def test_what_layers_keep_depends_on_remat(remat, elements):
    M = 8 * 16
    plan = estimate(remat=remat)
    expected = 2 * M * 4 * (elements + (2 if remat != "full" else 0))
    expected += 2 * 4 * 2 * 8 * (8 + 4) if remat == "none" else 0  # a second copy of q, k, v and o_proj's weights
    assert plan.residuals == expected
    assert plan.layer_backward == M * 4 * (6 * 12 + 12 * 8 if remat == "full" else 5 * 12 + 7 * 8)


def test_on_a_mesh_of_four_with_two_micro_batches():
    plan, M = estimate(mesh=mesh(2, 2), accumulation_steps=2), 16  # one row a device and micro-batch
    assert (plan.parameters, plan.optimizer_state) == (ALL // 2, ALL)
    assert (plan.gathered_parameters, plan.accumulated_gradients) == (ALL, ALL)
    assert plan.update == ALL + ALL // 2
    assert plan.layer_backward == M * 4 * (5 * 12 + 7 * 8)
    replicated = estimate(mesh=mesh(4, 1))
    assert (replicated.parameters, replicated.gathered_parameters, replicated.update) == (ALL, 0, 2 * ALL)


def test_the_loss_holds_one_chunk_of_logits_and_two_gradients_of_the_head():
    M = 8 * 128
    assert estimate(length=128).loss == M // 2 * 300 * 4 + 2 * 4 * HEAD + 2 * 4 * M * 8
    assert estimate("gpu", length=128, dtype="bfloat16").loss == M * 300 * (4 + 2) + 4 * HEAD + 2 * 2 * M * 8


def test_masks_of_pairs_of_blocks_and_of_documents(monkeypatch):
    monkeypatch.setattr(flash_attention, "CPU_BLOCK", 8)
    assert estimate(length=24).attention_masks == 3 * 4 // 2 * 8 * 2 * 8**2
    plan = estimate("gpu", length=128, dtype="bfloat16", attention="cudnn", separator_id=0)
    assert plan.attention_masks == 0
    kept = 8 + 8 + 4 + 4 + 2 * 12 + 8 + 8
    assert plan.residuals == 2 * 8 * 128 * (2 * kept + 4 * 2) + 8 * 128**2 * 2
    assert plan.cast_weights == 2 * (HEAD + LAYERS)
    assert plan.gradients == 2 * LAYERS + 4 * HEAD
    # dQ and the gradients of k and v for each query head, in float32, and a sum for each query and head.
    assert plan.workspace == 4 * 8 * 128 * (2 + 3 * 8)
    assert memory.cudnn_workspace(SMALL, 1, 129) == 4 * 256 * (2 + 3 * 8)
