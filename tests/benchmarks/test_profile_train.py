"""The profile of a step: the table adds up, and every instruction is assigned to its kind of work."""

import os
import re
import subprocess
import sys

import pytest

from benchmarks.xla.hlo import parse
from benchmarks.xla.profile import attribute_time
from scripts.profile_train import without_command_buffers
from tests.trainer import ENVIRONMENT, ROOT

PROGRAM = """
%fused_dot (p: f32[2,2]) -> f32[2,2] {
  ROOT %dot.1 = f32[2,2] dot(%p, %p), metadata={op_name="jit(f)/while/body/dot_general"}
}

ENTRY %main (x: f32[2,2]) -> f32[2,2] {
  %a = f32[2,2]{1,0} fusion(%x), kind=kOutput, calls=%fused_dot, metadata={op_name="jit(f)/while/body/dot_general"}
  %b.2 = f32[2,2]{1,0} fusion(%a), calls=%other, metadata={op_name="jit(f)/jvp(loss)/exp"}
  ROOT %c = f32[2,2] add(%b.2, %b.2), metadata={op_name="jit(f)/optimizer/add"}
  %d = (bf16[4], u8[0]) custom-call(%x), custom_call_target="__cublas$gemm", metadata={op_name="jit(f)/while/body/dot"}
  %gemm_fusion_dot.3 = f32[2,2] fusion(%x), calls=%fused_dot, metadata={op_name="jit(f)/while/body/dot_general"}
  %e = f32[2,2] negate(%gemm_fusion_dot.3)
}
"""


def test_instructions_are_told_apart_by_what_they_compute_and_for_what():
    program = parse(PROGRAM)
    kinds = {name: program.kind(each) for name, each in program.instructions.items()}
    assert {name: kinds[name] for name in "abcde" if name in kinds} | {"b.2": kinds["b.2"]} == {
        "a": "matrix products",
        "b.2": "head and loss",
        "c": "optimizer",
        "d": "matrix products",
        "e": "elementwise",
    }


def test_time_is_shared_by_the_instructions_that_run_at_once():
    """0 to 4: a; 2 to 4: also b; 4 to 7: idle; 7 to 8: c."""
    seconds, wall = attribute_time([(0, 4e9, "a"), (2e9, 4e9, "b"), (7e9, 8e9, "c")])
    assert seconds == pytest.approx({"a": 3, "b": 1, "idle": 3, "c": 1})
    assert wall == pytest.approx(8)


@pytest.mark.parametrize(
    ("xla_flags", "expected_flags", "message"),
    [
        (None, "--xla_gpu_enable_command_buffer=", "command buffers disabled"),
        ("--xla_a=1", "--xla_a=1 --xla_gpu_enable_command_buffer=", "command buffers disabled"),
        ("--xla_gpu_enable_command_buffer=+WHILE", "--xla_gpu_enable_command_buffer=+WHILE", "as set in XLA_FLAGS"),
    ],
)
def test_command_buffers_are_off_unless_the_user_speaks_of_them(monkeypatch, xla_flags, expected_flags, message):
    monkeypatch.delenv("XLA_FLAGS", raising=False)
    if xla_flags:
        monkeypatch.setenv("XLA_FLAGS", xla_flags)
    assert message in without_command_buffers()
    assert os.environ["XLA_FLAGS"] == expected_flags


def test_command_buffers_are_off_before_jax_is_imported(tmp_path):
    """In a separate process with a fake JAX that prints the flags on import, when XLA may read them."""
    (tmp_path / "jax.py").write_text("import os, sys; sys.exit('flags ' + os.environ['XLA_FLAGS'])")
    paths = os.pathsep.join([str(tmp_path), str(ROOT)])
    environment = {key: value for key, value in os.environ.items() if key != "XLA_FLAGS"} | {"PYTHONPATH": paths}
    command = [sys.executable, "scripts/profile_train.py"]
    result = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert result.stderr.splitlines()[-1:] == ["flags --xla_gpu_enable_command_buffer="]


@pytest.mark.slow
def test_a_step_is_profiled(tmp_path):
    flags = ["--preset", "tiny", "--sequence-length", "32", "--steps", "1", "--out", str(tmp_path)]
    result = subprocess.run(
        [sys.executable, "scripts/profile_train.py", *flags],
        cwd=ROOT,
        env=ENVIRONMENT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    table = re.findall(r"\| ([a-z ]+) \| ([\d.]+) \| ([\d.]+)% \|", result.stdout)
    kinds, spent, share = zip(*table, strict=True)
    assert {*kinds} == {"matrix products", "attention", "head and loss", "elementwise", "optimizer", "idle"}
    assert sum(map(float, share)) == pytest.approx(100, abs=0.5)
    assert (whole := re.search(r"\| \*\*step\*\* \| ([\d.]+) \|", result.stdout))
    assert sum(map(float, spent)) == pytest.approx(float(whole[1]), abs=0.5)
    assert "trace: " in result.stderr
