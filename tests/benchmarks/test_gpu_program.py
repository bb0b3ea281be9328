"""A training step lowered for a CUDA GPU, which needs no GPU: its matmuls, attention, rematerialization and dtypes."""

import collections
import re
from typing import get_args

import jax
import jax.numpy as jnp
import pytest
from jax._src.cudnn import fused_attention_stablehlo

from smollm_jax.config import Recipe, preset
from smollm_jax.config.recipe import Remat
from smollm_jax.model.attention import Implementation, attention, causal, cudnn_shape_problem, packed
from smollm_jax.training import optimizer, train_step
from smollm_jax.training.execution import ExecutionConfig
from smollm_jax.training.state import abstract_state

LENGTH = 128
RECIPE = Recipe(10, 3, LENGTH, learning_rate=1e-3, warmup_steps=0, dtype="bfloat16")


@pytest.fixture
def lowered(monkeypatch):
    """The text of a bfloat16 step with cuDNN attention, lowered as on a machine with a GPU."""
    monkeypatch.setattr(fused_attention_stablehlo, "check_cudnn_version", lambda: 91000)
    monkeypatch.setattr(fused_attention_stablehlo, "check_compute_capability", lambda *_: True)
    monkeypatch.setattr(fused_attention_stablehlo, "is_cuda_compute_capability_equal", lambda *_: False)

    def text(
        remat: Remat,
        implementation: Implementation = "cudnn",
        unroll: int = 1,
        separator_id: int | None = None,
        accumulation_steps: int = 1,
    ) -> str:
        tokens = jax.ShapeDtypeStruct((3, LENGTH + 1), jnp.int32)
        traced = train_step.train_step.trace(
            abstract_state(preset("tiny"), RECIPE),
            tokens,
            tx=optimizer.adamw(RECIPE),
            execution=ExecutionConfig(
                "bfloat16", implementation, remat, unroll, accumulation_steps, separator_id=separator_id
            ),
        )
        return traced.lower(lowering_platforms=("cuda",)).as_text()

    return text


@pytest.mark.parametrize(("remat", "forward"), [("none", 1), ("swiglu", 1), ("dots", 1), ("full", 2)])
def test_attention_is_cudnns_and_only_full_rematerialisation_runs_it_twice(lowered, remat, forward):
    text = lowered(remat)
    calls = re.findall(r"__cudnn\$\w+", text)
    assert calls.count("__cudnn$fmhaSoftmax") == forward
    assert calls.count("__cudnn$fmhaSoftmaxBackward") == 1
    assert text.count("mask_type\\22: \\22CAUSAL\\22") == len(calls), "by name: there is no mask= to say it"
    assert f"{LENGTH}x{LENGTH}x" not in text, "scores or a mask of all pairs"


def test_scores_of_all_pairs_would_be_seen():
    """A program that materializes the scores contains what the test above rules out."""
    shapes = [jax.ShapeDtypeStruct((2, LENGTH, heads, 16), jnp.bfloat16) for heads in (6, 2, 2)]
    mask = jax.ShapeDtypeStruct((2, 1, LENGTH, LENGTH), bool)
    assert (
        f"{LENGTH}x{LENGTH}x" in jax.jit(attention).trace(*shapes, mask).lower(lowering_platforms=("cuda",)).as_text()
    )


def test_q_k_v_and_gate_up_are_one_product_each(lowered):
    """tiny: 96 hidden, 6 + 2 + 2 heads of 16, an MLP of 256 twice."""
    config = preset("tiny")
    heads = config.num_attention_heads + 2 * config.num_key_value_heads
    outputs = re.findall(r"dot_general.*-> tensor<3x128x(\d+)xbf16>", lowered("none"))
    assert outputs.count(str(heads * config.head_dim)) == 1
    assert outputs.count(str(2 * config.intermediate_size)) == 1
    assert str(config.num_key_value_heads * config.head_dim) not in outputs


@pytest.mark.parametrize("remat", ["swiglu", "dots", "full"])
def test_each_weight_is_cast_once_a_step_outside_the_layers_loop(lowered, remat):
    cast = collections.Counter(re.findall(r"convert .*\(tensor<([\dx]+)xf32>\) -> tensor<[\dx]+xbf16>", lowered(remat)))
    shapes = [x.shape for x in jax.tree.leaves(abstract_state(preset("tiny"), RECIPE).model)]
    assert len(shapes) == 11
    # The gradients of the norms, summed in float32: two in the loop, one after it.
    for shape, count in (collections.Counter(shapes) + collections.Counter(3 * [(96,)])).items():
        assert cast["x".join(map(str, shape))] == count, shape
        assert len(shape) < 3 or not cast["x".join(map(str, shape[1:]))], "a layer's own, in the loop"


def test_swiglu_is_computed_once_where_its_result_is_kept(lowered):
    """Only in the forward pass; its gradient is a custom one."""
    calls = {remat: len(re.findall(r"call @silu\b|call @silu_", lowered(remat))) for remat in get_args(Remat)}
    assert calls == {"none": 1, "swiglu": 1, "dots": 2, "full": 2}


def test_every_array_of_the_state_is_overwritten_in_place(lowered):
    leaves = jax.tree.leaves(abstract_state(preset("tiny"), RECIPE))
    assert lowered("dots").count("tf.aliasing_output") == len(leaves) == 35


@pytest.mark.parametrize("unroll", [1, 3])
def test_nothing_is_summed_in_bfloat16(lowered, unroll):
    """A GPU sums in the requested dtype, and the gradient of a norm's scale is a sum over all tokens."""
    text = lowered("dots", unroll=unroll)
    shapes = re.findall(r"reduce\(.* applies stablehlo\.add .*: \(tensor<(.*?)>", text)
    sums = [shape.split("x")[-1] for shape in shapes]
    assert len(sums) > 20
    assert {*sums} <= {"f32", "i32"}


def test_without_a_loop_what_is_to_be_computed_again_is_not_kept_after_all(lowered):
    """CSE would merge the recomputation with the forward pass and keep its results, undoing remat."""
    assert "optimization_barrier" in lowered("dots", unroll=3)
    assert "optimization_barrier" not in lowered("dots")


@pytest.mark.parametrize("accumulation_steps", [1, 3])
def test_on_a_gpu_no_branch_decides_whether_an_update_is_taken(lowered, monkeypatch, accumulation_steps):
    branches = re.compile(r"stablehlo\.(?:case|if)\b")
    assert len(branches.findall(lowered("dots", accumulation_steps=accumulation_steps))) == 1, (
        "as traced on a CPU, where this test would see it"
    )
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    train_step.train_step.clear_cache()
    text = lowered("dots", accumulation_steps=accumulation_steps)
    train_step.train_step.clear_cache()
    assert not branches.search(text)
    chosen = re.findall(r"call @_where\w*\(.* : \(tensor<i1>, (\S+), \1\) ->", text)
    for shape in (leaf.shape for leaf in jax.tree.leaves(abstract_state(preset("tiny"), RECIPE).model)):
        assert chosen.count(f"tensor<{'x'.join(map(str, shape))}xf32>") >= 3, "a parameter and its two moments"
    assert text.count("tf.aliasing_output") == 35


def test_documents_that_do_not_see_each_other_are_cudnns_too(lowered):
    text = lowered("dots", separator_id=0)
    calls = re.findall(r"__cudnn\$\w+", text)
    assert (calls.count("__cudnn$fmhaScaleBiasSoftmax"), calls.count("__cudnn$fmhaScaleBiasSoftmaxBackward")) == (1, 1)
    assert text.count("mask_type\\22: \\22CAUSAL\\22") == len(calls) == 2


@pytest.mark.parametrize("length", [1, 2, 65, 192, 1001])
@pytest.mark.parametrize("documents", [False, True])
def test_what_jax_itself_refuses_of_a_length_is_never_tried(lowered, length, documents):
    """JAX rejects odd lengths, only in the gradient; with documents `cudnn_shape_problem` rejects more."""
    shapes = [jax.ShapeDtypeStruct((1, length, heads, 16), jnp.bfloat16) for heads in (6, 2, 2)]
    attend = packed(jnp.zeros((1, length), jnp.int32), "cudnn") if documents else causal("cudnn")
    gradient = jax.jit(jax.grad(lambda q, k, v: attend(q, k, v, None)[0].astype(jnp.float32).sum()))
    if length % 2:
        with pytest.raises(NotImplementedError, match=f"Unsupported sequence length Q {length}"):
            gradient.trace(*shapes)
        assert cudnn_shape_problem(length, 16, documents)
    else:
        assert "__cudnn$fmha" in gradient.trace(*shapes).lower(lowering_platforms=("cuda",)).as_text()
