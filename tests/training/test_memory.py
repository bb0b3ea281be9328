"""The memory estimate equals what XLA reports for the compiled step, and the trainer decides by it.

python -m tests.training.test_memory SETTING ...   # bytes planned and needed, a line of JSON each
"""

import dataclasses
import json
import os
import re
import subprocess
import sys
from types import SimpleNamespace
from typing import Any, get_args

import jax
import pytest

from smollm_jax.config import Config, Recipe, preset
from smollm_jax.config.finetune_recipe import FinetuneRecipe
from smollm_jax.config.recipe import Remat
from smollm_jax.errors import UsageError
from smollm_jax.finetuning import lora
from smollm_jax.parallel import sharding
from smollm_jax.training import memory, train_step
from smollm_jax.training.execution import ExecutionConfig
from tests.trainer import ENVIRONMENT, ROOT, command, refused

# preset, batch, length, remat, dtype, parts, mesh, perhaps an adapter's rank. "layers" is tiny with 512 words: the
# products and sums of its layers in bfloat16 or parts are planned 12 and 19 % too low, so small a model's live values
# being most of what there is.
FAST = """
tiny 8 256 dots float32 1 -
tiny 8 256 swiglu float32 1 -
tiny 2 256 none bfloat16 1 -
tiny 8 512 full float32 2 data=2,fsdp=2
layers 8 512 none float32 1 -
layers 8 512 swiglu float32 1 fsdp=2
smollm2-135m 4 1024 dots bfloat16 1 -
layers 4 512 dots mixed 1 -
layers 4 512 full mixed 1 -
smollm2-135m 1 256 dots mixed 1 -
smollm2-135m 1 2048 dots mixed 1 -
"""
SLOW = """
smollm2-135m 1 8192 full bfloat16 1 -
smollm2-360m 2 1024 dots float32 1 -
smollm2-135m 1 256 dots float32 1 -
smollm2-135m 4 1024 swiglu bfloat16 1 -
smollm2-135m 8 2048 swiglu float32 1 -
smollm2-135m 1 256 dots bfloat16 1 -
smollm2-135m 2 512 none bfloat16 1 -
smollm2-135m 4 1024 none float32 1 -
smollm2-135m 4 1024 full bfloat16 1 -
smollm2-135m 8 2048 none bfloat16 1 -
smollm2-135m 8 2048 dots float32 1 -
smollm2-135m 8 2048 full float32 1 -
smollm2-135m 8 1024 dots bfloat16 2 -
smollm2-135m 2 2048 dots float32 1 data=2
smollm2-135m 4 1024 dots bfloat16 1 fsdp=2
smollm2-135m 8 1024 dots float32 2 data=2,fsdp=2
"""


def setting(text: str) -> tuple[Config, Recipe, Any]:
    name, batch, length, remat, dtype, accumulation_steps, mesh, *rank = text.split()
    config = dataclasses.replace(preset("tiny"), vocab_size=512) if name == "layers" else preset(name)
    activations, operands = ("float32", "bfloat16") if dtype == "mixed" else (dtype, dtype)
    recipe: Any = {"dtype": operands, "gradient_accumulation_steps": int(accumulation_steps)}
    if rank:
        recipe |= {"lora_rank": int(rank[0]), "lora_alpha": 1.0}
    kind = FinetuneRecipe if rank else Recipe
    recipe = kind(100, int(batch), int(length), learning_rate=1e-3, warmup_steps=0, **recipe)
    mesh = None if mesh == "-" else sharding.make_mesh(mesh)
    execution: Any = {
        "attention": "xla",
        "remat": remat,
        "unroll": 1,
        "accumulation_steps": int(accumulation_steps),
        "mesh": mesh,
    }
    return config, recipe, ExecutionConfig(activations, operands=operands, **execution)


def main() -> None:
    for text in sys.argv[1:]:
        settings = setting(text)
        need = memory.compiled_bytes(train_step.compile_step(*settings))
        print(json.dumps([memory.estimate(*settings).total, need]), flush=True)


@pytest.mark.parametrize(
    "grid",
    [
        pytest.param(FAST, marks=pytest.mark.slow, id="few"),
        pytest.param(SLOW, marks=pytest.mark.overnight, id="all"),
    ],
)
def test_the_plan_is_within_ten_percent_of_what_xla_says(grid):
    settings = grid.strip().splitlines()
    environment = ENVIRONMENT | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": "--xla_force_host_platform_device_count=4"}
    program = [sys.executable, "-m", "tests.training.test_memory", *settings]
    done = subprocess.run(program, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    errors = {
        text: planned / needed - 1
        for text, (planned, needed) in zip(settings, map(json.loads, done.stdout.splitlines()), strict=True)
    }
    print(json.dumps(errors, indent=1))
    assert not {text: f"{error:+.1%}" for text, error in errors.items() if abs(error) > 0.1}


@pytest.mark.parametrize("remat", get_args(Remat))
def test_of_an_adapter_only_its_own_gradients_and_optimizer_state_are_planned(remat):
    config, recipe, execution = setting(f"smollm2-135m 2 512 {remat} float32 2 - 8")
    pairs = jax.eval_shape(lambda: lora.init_pairs(config, recipe))
    adapter = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(pairs))
    all_trained = memory.estimate(*setting(f"smollm2-135m 2 512 {remat} float32 2 -"))
    plan = memory.estimate(config, recipe, execution)
    assert (plan.optimizer_state, plan.gradients, plan.accumulated_gradients) == (2 * adapter, adapter, adapter)
    assert (plan.parameters, plan.update) == (all_trained.parameters + adapter, adapter)
    assert all_trained.total - plan.total > 2 * all_trained.parameters


def test_a_compiled_step_that_does_not_fit_is_refused_with_what_to_change():
    config, recipe, execution = setting("layers 8 256 none float32 1 -")
    need = memory.compiled_bytes(train_step.compile_step(config, recipe, execution))
    assert memory.compile_within(need, config, recipe, execution, "cpu")
    with pytest.raises(UsageError) as refused:
        memory.compile_within(need * 3 // 4, config, recipe, execution, "cpu")
    message = str(refused.value)
    assert "\n" not in message
    assert message.startswith(
        f"--batch-size 8 --remat none needs {need / 1e9:.2f} GB on each device, which has {need * 0.75 / 1e9:.2f} GB"
    )
    for flag in ("--batch-size 4", "--remat swiglu", "--gradient-accumulation-steps 2"):
        assert f" {flag} " in message.split(":")[1]
    other = setting("layers 8 256 swiglu float32 1 -")
    assert memory.compiled_bytes(train_step.compile_step(*other)) <= need * 3 // 4, "advised, and does not fit"


def test_where_no_change_is_enough_the_refusal_says_so():
    config, recipe, execution = setting("tiny 2 64 dots float32 1 -")
    with pytest.raises(
        UsageError, match=r"on each device, which has 0\.01 GB .*: use more devices \(--mesh fsdp=N\) or a smaller"
    ):
        memory.largest_batch(config, recipe, execution, "cpu", 10_000_000)


def test_auto_takes_the_largest_power_of_two_that_fits():
    config, recipe, execution = setting("tiny 6 64 dots float32 3 -")
    limit = 400_000_000
    chosen = memory.largest_batch(config, recipe, execution, "cpu", limit)
    assert chosen.batch_size in [3 * 2**n for n in range(20)]
    larger = dataclasses.replace(chosen, batch_size=2 * chosen.batch_size)
    assert (
        memory.estimate(config, chosen, execution).total
        <= 0.9 * limit
        < memory.estimate(config, larger, execution).total
    )


def test_where_nobody_names_a_policy_a_gpu_keeps_as_much_as_fits_and_a_cpu_the_products():
    config, recipe, execution = setting("smollm2-135m 16 2048 full bfloat16 1 -")
    execution = dataclasses.replace(execution, attention="cudnn", unroll=30)

    def chosen(platform: str, limit: float) -> str:
        return memory.choose_remat(config, recipe, execution, platform, int(limit)).remat

    needs = {}
    for remat in get_args(Remat):
        needs[remat] = memory.estimate(config, recipe, dataclasses.replace(execution, remat=remat), "gpu").total
        if remat in ("none", "swiglu"):
            assert chosen("gpu", needs[remat] / 0.9 + 2) == remat
            assert chosen("gpu", needs[remat] / 0.9 - 2) != remat
    assert needs["none"] > needs["swiglu"] > needs["dots"] > needs["full"]
    assert needs["swiglu"] - needs["dots"] == 30 * 16 * 2048 * 1536 * 2  # SwiGLU's result, of every layer and token
    assert chosen("gpu", needs["dots"]) == chosen("gpu", 0) == "dots"
    assert chosen("cpu", 1e15) == "dots"


@pytest.mark.parametrize(
    ("check", "rank"),
    [
        ((), ()),
        pytest.param(("--check",), (), marks=pytest.mark.slow),
        pytest.param(("--check",), ("--lora-rank", "4"), marks=pytest.mark.slow),
    ],
)
def test_the_script_prints_what_auto_takes_and_xla_s_own_figure(check, rank):
    flags = ["--preset", "tiny", "--batch-size", "4", "--sequence-length", "64", "--memory", "0.4", "--mesh", "data=2"]
    program = [sys.executable, "scripts/plan_memory.py", *flags, *check, *rank]
    environment = ENVIRONMENT | {"JAX_PLATFORMS": "cpu"}
    done = subprocess.run(program, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    table = {row.split("|")[1].strip(): row.split("|")[2:-1] for row in done.stdout.splitlines() if row[:1] == "|"}
    mesh: Any = SimpleNamespace(size=2, shape={"fsdp": 1})
    for remat, printed in zip(get_args(Remat), table["--batch-size auto"], strict=True):
        config, recipe, execution = setting(f"tiny 4 64 {remat} float32 1 - {''.join(rank[1:])}")
        object.__setattr__(execution, "mesh", mesh)
        assert int(printed) == memory.largest_batch(config, recipe, execution, "cpu", 400_000_000).batch_size
    if check:
        assert all(abs(float(cell.strip().rstrip("%"))) < 10 for cell in table["estimate against it"])


def test_a_training_that_cannot_fit_ends_before_it_reads_anything(tmp_path, capsys):
    refusal = refused(tmp_path / "run", "--batch-size", str(1 << 20), "--steps", "2")
    assert refusal.exit_code == 2
    assert re.fullmatch(
        r"--batch-size 1048576 --remat dots needs .* GB on each device, .* GB for it: .* should fit", str(refusal)
    )
    assert "data " not in capsys.readouterr().out


def test_a_gpus_plan_leaves_room_for_cudnns_workspace():
    """64 x 2,048 tokens, 9 heads of 64: dQ, and dK and dV per query head, and one number per query."""
    config = preset("smollm2-135m")
    recipe = Recipe(100, 64, 2048, learning_rate=1e-3, warmup_steps=0, dtype="bfloat16")
    by_cudnn = ExecutionConfig("bfloat16", "cudnn")
    plan = memory.estimate(config, recipe, by_cudnn, "gpu")
    assert plan.workspace == 64 * 2048 * 9 * (64 * 3 + 1) * 4 == 910_688_256
    assert plan.total == dataclasses.replace(plan, workspace=0).total + plan.workspace, "the layers' backward pass"
    odd = dataclasses.replace(recipe, sequence_length=2050)
    assert memory.estimate(config, odd, by_cudnn, "gpu").workspace == plan.workspace * 2176 // 2048
    halves = dataclasses.replace(by_cudnn, accumulation_steps=2)
    assert memory.estimate(config, recipe, halves, "gpu").workspace == plan.workspace // 2
    no_groups = dataclasses.replace(config, num_key_value_heads=9)
    assert memory.estimate(no_groups, recipe, by_cudnn, "gpu").workspace == 64 * 2048 * 9 * (64 + 1) * 4
    in_blocks = memory.estimate(config, recipe, ExecutionConfig("bfloat16"), "gpu")
    assert (in_blocks.workspace, memory.estimate(config, recipe, ExecutionConfig("float32")).workspace) == (0, 0)


def test_auto_respects_the_workspace(monkeypatch):
    config = preset("smollm2-135m")
    recipe = Recipe(100, 64, 2048, learning_rate=1e-3, warmup_steps=0, dtype="bfloat16")
    execution = ExecutionConfig("bfloat16", "cudnn")
    plan = memory.estimate(config, recipe, execution, "gpu")
    limit = int((plan.total - plan.workspace // 2) / memory.USABLE_FRACTION)  # just too little
    assert memory.largest_batch(config, recipe, execution, "gpu", limit).batch_size == 32
    monkeypatch.setattr(memory, "cudnn_workspace", lambda *_: 0)
    assert memory.largest_batch(config, recipe, execution, "gpu", limit).batch_size == 64


WITHIN = """
import sys
sys.path.insert(0, f"{sys.argv.pop(1)}/scripts")
import train_jax
from smollm_jax.runtime import allocator
from smollm_jax.training import memory
allocator.DRIVER = allocator.Path("no GPU")
limit = int(sys.argv.pop(1))
memory.device_limit = lambda *_: limit
train_jax.main(sys.argv[1:])
"""


@pytest.mark.slow
def test_a_training_takes_the_largest_batch_that_fits_and_keeps_it_when_resumed(tmp_path):
    python, _, *flags = command(tmp_path / "run", "--batch-size", "auto", "--eval-every", "0")
    limits = {"2": 200_000_000, "3": 300_000_000}  # bytes, by the step to end at
    for steps, limit in limits.items():
        resume = ["--resume"] if steps == "3" else []
        program = [python, "-c", WITHIN, str(ROOT), str(limit), *flags, "--steps", steps, *resume]
        done = subprocess.run(program, cwd=tmp_path, env=ENVIRONMENT, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        config, recipe, execution = setting("tiny 1 64 dots float32 1 -")
        batch = memory.largest_batch(config, recipe, execution, "cpu", limits["2"]).batch_size
        assert batch < memory.largest_batch(config, recipe, execution, "cpu", limits["3"]).batch_size
        assert f" of {batch} x 64 = " in done.stdout


AS_ON_A_GPU = (
    """
from smollm_jax.training import memory
chosen = memory.choose_remat
memory.choose_remat = lambda *of: chosen(*of[:3], "gpu", of[4])
"""
    + WITHIN
)


@pytest.mark.slow
def test_the_policy_that_was_chosen_is_said_used_and_recorded_and_a_resumed_run_says_where_it_differs(tmp_path):
    python, _, *flags = command(tmp_path / "run", "--eval-every", "0")
    outputs = {}
    for steps, way, more in (("2", AS_ON_A_GPU, []), ("3", WITHIN, ["--resume"])):
        program = [python, "-c", way, str(ROOT), str(1 << 40), *flags, "--steps", steps, *more]
        done = subprocess.run(program, cwd=tmp_path, env=ENVIRONMENT, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        outputs[steps] = done.stdout
    assert ", remat none (chosen; --remat changes that)" in outputs["2"]
    assert ", remat dots (chosen; --remat changes that)" in outputs["3"]
    assert re.search("because of .*remat none -> dots", outputs["3"])


def test_available_memory_is_shared_by_the_devices_of_a_cpu():
    cpu: Any = SimpleNamespace(platform="cpu")
    assert memory.device_limit(cpu, 4) == pytest.approx(memory.device_limit(cpu) / 4, rel=0.2)
    assert memory.device_limit(cpu) < os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    gpu: Any = SimpleNamespace(platform="gpu", memory_stats=lambda: {"bytes_limit": 60 << 30})
    assert memory.device_limit(gpu, 4) == 60 << 30


if __name__ == "__main__":
    main()
