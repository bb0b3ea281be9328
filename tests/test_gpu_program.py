"""What a training step asks of a CUDA GPU, read off the program that is lowered for one; no GPU is needed for that."""

import re

import jax
import jax.numpy as jnp
import pytest
from jax._src.cudnn import fused_attention_stablehlo

from smollm_jax import optimizer, train_step
from smollm_jax.attention import attention
from smollm_jax.config import preset
from smollm_jax.recipe import Recipe

LENGTH = 128


@pytest.fixture
def lowered(monkeypatch):
    """The text of a bfloat16 step with cuDNN's attention, as a machine with a GPU would lower it."""
    monkeypatch.setattr(fused_attention_stablehlo, "check_cudnn_version", lambda: 91000)
    monkeypatch.setattr(fused_attention_stablehlo, "check_compute_capability", lambda *_: True)
    monkeypatch.setattr(fused_attention_stablehlo, "is_cuda_compute_capability_equal", lambda *_: False)

    def text(remat: train_step.Remat, implementation: train_step.Implementation = "cudnn") -> str:
        recipe = Recipe(10, 2, LENGTH, learning_rate=1e-3, warmup_steps=0, dtype="bfloat16")
        tokens = jax.ShapeDtypeStruct((2, LENGTH + 1), jnp.int32)
        traced = train_step.train_step.trace(
            train_step.abstract_state(preset("tiny"), recipe),
            tokens,
            tx=optimizer.adamw(recipe),
            compute=train_step.Compute("bfloat16", implementation, remat),
        )
        return traced.lower(lowering_platforms=("cuda",)).as_text()

    return text


@pytest.mark.parametrize(("remat", "forward"), [("none", 1), ("dots", 1), ("full", 2)])
def test_attention_is_cudnns_and_only_full_rematerialisation_runs_it_twice(lowered, remat, forward):
    text = lowered(remat)
    calls = re.findall(r"__cudnn\$\w+", text)
    assert calls.count("__cudnn$fmhaSoftmax") == forward
    assert calls.count("__cudnn$fmhaSoftmaxBackward") == 1
    assert f"{LENGTH}x{LENGTH}x" not in text, "scores or a mask of all pairs"


def test_scores_of_all_pairs_would_be_seen():
    """This is how they look, which the test above rules out."""
    shapes = [jax.ShapeDtypeStruct((2, LENGTH, heads, 16), jnp.bfloat16) for heads in (6, 2, 2)]
    mask = jax.ShapeDtypeStruct((2, 1, LENGTH, LENGTH), bool)
    assert (
        f"{LENGTH}x{LENGTH}x" in jax.jit(attention).trace(*shapes, mask).lower(lowering_platforms=("cuda",)).as_text()
    )


def test_q_k_v_and_gate_up_are_one_product_each(lowered):
    """tiny: 96 hidden, 6 + 2 + 2 heads of 16, an MLP of 256 twice."""
    config = preset("tiny")
    heads = config.num_attention_heads + 2 * config.num_key_value_heads
    outputs = re.findall(r"dot_general.*-> tensor<2x128x(\d+)xbf16>", lowered("none"))
    assert outputs.count(str(heads * config.head_dim)) == 1
    assert outputs.count(str(2 * config.intermediate_size)) == 1
    assert str(config.num_key_value_heads * config.head_dim) not in outputs
