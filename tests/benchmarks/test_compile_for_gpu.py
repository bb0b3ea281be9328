# ruff: noqa: E501  # the lines of a program
"""The bytes and FLOPs computed from a compiled GPU program equal those counted by hand."""

import importlib.util
import re
import subprocess
import sys

import pytest

from benchmarks.xla.gpu_program import TARGETS
from benchmarks.xla.kernels import Kernel, kernels_of, milliseconds
from scripts import compile_for_gpu
from smollm_jax.commands import command_line
from smollm_jax.errors import SmolLMError
from smollm_jax.model import cost
from tests.trainer import ENVIRONMENT, ROOT

PROGRAM = """HloModule jit_step, is_scheduled=true

%sum (a: f32[], b: f32[]) -> f32[] {
  %a = f32[] parameter(0)
  ROOT %add = f32[] add(%a, %b)
}

%fused_dot (p.1: bf16[30,8,4], p.2: s32[], p.3: bf16[16,8]) -> bf16[16,4] {
  %p.1 = bf16[30,8,4]{2,1,0} parameter(0)
  %p.2 = s32[] parameter(1)
  %layer = bf16[1,8,4]{2,1,0} dynamic-slice(%p.1, %p.2, %p.2, %p.2), dynamic_slice_sizes={1,8,4}
  %flat = bf16[8,4]{1,0} bitcast(%layer)
  %p.3 = bf16[16,8]{1,0} parameter(2)
  ROOT %dot = bf16[16,4]{1,0} dot(%p.3, %flat), lhs_contracting_dims={1}, rhs_contracting_dims={0}
}

%fused_put (p.4: bf16[30,16,4], p.5: s32[], p.6: bf16[16,4]) -> bf16[30,16,4] {
  %p.4 = bf16[30,16,4]{2,1,0} parameter(0)
  %p.6 = bf16[16,4]{1,0} parameter(2)
  %one = bf16[1,16,4]{2,1,0} bitcast(%p.6)
  %p.5 = s32[] parameter(1)
  ROOT %put = bf16[30,16,4]{2,1,0} dynamic-update-slice(%p.4, %one, %p.5, %p.5, %p.5)
}

%fused_two (p.7: f32[16,4]) -> (f32[16], f32[16,4]) {
  %p.7 = f32[16,4]{1,0} parameter(0)
  %zero = f32[] constant(0)
  %rows = f32[16]{0} reduce(%p.7, %zero), dimensions={1}, to_apply=%sum
  %twice = f32[16,4]{1,0} add(%p.7, %p.7)
  ROOT %both = (f32[16]{0}, f32[16,4]{1,0}) tuple(%rows, %twice)
}

%body (state: (s32[], bf16[30,8,4], bf16[30,16,4], bf16[16,8])) -> (s32[], bf16[30,8,4], bf16[30,16,4], bf16[16,8]) {
  %state = (s32[], bf16[30,8,4]{2,1,0}, /*index=2*/bf16[30,16,4]{2,1,0}, bf16[16,8]{1,0}) parameter(0)
  %i = s32[] get-tuple-element(%state), index=0
  %w = bf16[30,8,4]{2,1,0} get-tuple-element(%state), index=1
  %kept = bf16[30,16,4]{2,1,0} get-tuple-element(%state), index=2
  %x = bf16[16,8]{1,0} get-tuple-element(%state), index=3
  %product = bf16[16,4]{1,0} fusion(%w, %i, %x), kind=kCustom, calls=%fused_dot, metadata={op_name="jit(step)/dot_general"}
  %start = ((bf16[30,16,4]{2,1,0}, s32[], bf16[16,4]{1,0}), bf16[30,16,4]{2,1,0}, u32[]) fusion-start(%kept, %i, %product), kind=kLoop, calls=%fused_put
  %done = bf16[30,16,4]{2,1,0} fusion-done(%start)
  ROOT %next = (s32[], bf16[30,8,4]{2,1,0}, bf16[30,16,4]{2,1,0}, bf16[16,8]{1,0}) tuple(%i, %w, %done, %x)
}

%update (u: f32[16,4]) -> (f32[16], f32[16,4]) {
  %u = f32[16,4]{1,0} parameter(0)
  ROOT %updated = (f32[16]{0}, f32[16,4]{1,0}) fusion(%u), kind=kInput, calls=%fused_two, metadata={op_name="jit(step)/optimizer/add"}
}

%same (v: f32[16,4]) -> (f32[16], f32[16,4]) {
  %v = f32[16,4]{1,0} parameter(0)
  ROOT %copied = (f32[16]{0}, f32[16,4]{1,0}) fusion(%v), kind=kInput, calls=%fused_two
}

ENTRY %main (q: bf16[2,128,9,64], start: (s32[], bf16[30,8,4], bf16[30,16,4], bf16[16,8]), g: f32[16,4]) -> f32[] {
  %q = bf16[2,128,9,64]{3,2,1,0} parameter(0)
  %start.1 = (s32[], bf16[30,8,4]{2,1,0}, bf16[30,16,4]{2,1,0}, bf16[16,8]{1,0}) parameter(1)
  %loop = (s32[], bf16[30,8,4]{2,1,0}, bf16[30,16,4]{2,1,0}, bf16[16,8]{1,0}) while(%start.1), condition=%no, body=%body, backend_config={"known_trip_count":{"n":"30"}}
  %attention.1 = (bf16[2,9,128,64]{3,1,2,0}, u8[0]{0}) custom-call(%q, %q, %q), custom_call_target="__cudnn$fmhaSoftmax"
  %g = f32[16,4]{1,0} parameter(2)
  %yes = pred[] constant(true)
  ROOT %last = (f32[16]{0}, f32[16,4]{1,0}) conditional(%yes, %g, %g), true_computation=%update, false_computation=%same
}
"""


def test_kernels_are_counted_as_often_as_they_run_with_what_they_move_and_compute():
    kernels = {kernel.name: kernel for kernel in kernels_of(PROGRAM)}
    assert kernels.keys() == {"product", "start", "attention.1", "updated"}
    product = kernels["product"]
    assert (product.kind, product.times) == ("matrix products", 30)
    assert product.bytes == 2 * 8 * 4 + 4 + 2 * 16 * 8 + 2 * 16 * 4  # a layer of the weights, the index, x, the result
    assert product.flops == 2 * 16 * 8 * 4
    assert kernels["start"].bytes == 2 * (2 * 16 * 4) + 4  # read once, and written in its place
    assert kernels["updated"].bytes == 4 * (16 * 4 + 16 + 16 * 4)
    assert kernels["updated"].kind == "optimizer"
    assert kernels["attention.1"].flops == 2 * 2 * 9 * 64 * 128 * 129


def test_of_branches_by_number_the_last_is_counted_the_true_one():
    named = "true_computation=%update, false_computation=%same"
    numbered = PROGRAM.replace(named, "branch_computations={%same, %update}")
    assert numbered != PROGRAM
    assert [*kernels_of(numbered)] == [*kernels_of(PROGRAM)]


def test_what_is_not_known_is_an_error():
    with pytest.raises(SmolLMError, match="attention_of_tomorrow: the FLOPs of this custom call are unknown"):
        [*kernels_of(PROGRAM.replace("__cudnn$fmhaSoftmax", "attention_of_tomorrow"))]
    with pytest.raises(SmolLMError, match="loop: the number of the loop's iterations is unknown"):
        [*kernels_of(PROGRAM.replace("known_trip_count", "guess"))]


def test_the_roofline_is_the_longer_of_moving_and_computing():
    kernels = [Kernel("a", "", "", "", 2, 3_000_000, 0.0), Kernel("b", "", "", "", 1, 3_000_000, 7.9e9)]
    assert milliseconds(kernels) == pytest.approx(2 * 0.001 + 0.01)


def test_another_card_has_the_roofline_of_its_data_sheet():
    for name, capability, bandwidth, peak_flops in (
        ("a100", "8.0", 2.039e12, 312e12),
        ("rtx4090", "8.9", 1.008e12, 165.2e12),
    ):
        target = TARGETS[name]
        kernels = [
            Kernel("a", "", "", "", 2, int(bandwidth / 1e6), 0.0),
            Kernel("b", "", "", "", 1, 3, peak_flops / 1e5),
        ]
        assert milliseconds(kernels, target) == pytest.approx(2 * 0.001 + 0.01)
        assert f"Compute Capability {capability}" in target.config
    assert {cost.peak_flops(target.name) for target in TARGETS.values()} == {989e12, 312e12, 165.2e12}


def test_the_old_name_of_top_kernels_still_works():
    for name in ("--top-kernels", "--kernels"):
        assert command_line.parse(compile_for_gpu.Flags, [name, "3"], None).top_kernels == 3


def test_the_script_compiles_where_it_can_and_else_says_what_is_missing():
    flags = ["--preset", "tiny", "--batch-size", "2", "--sequence-length", "128", "--remat", "swiglu"]
    program = [sys.executable, "scripts/compile_for_gpu.py", *flags]
    result = subprocess.run(program, cwd=ROOT, env=ENVIRONMENT, capture_output=True, text=True, check=False)
    plugins = importlib.util.find_spec("jax_plugins")
    if plugins and any(importlib.util.find_spec(f"jax_plugins.xla_cuda{version}") for version in (12, 13)):
        assert result.returncode == 0, result.stderr
        assert re.search(r"\| \*\*step\*\* \| [\d,]+ \|", result.stdout)
    else:
        assert result.returncode == 1
        assert re.fullmatch(
            r"error: JAX's CUDA plugin is not installed, pip install -e '\.\[cuda13\]': .*\n", result.stderr
        )
