"""What the benchmark says: every subject at toy size, and that unequal work is refused. Never how fast it is."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from smollm_jax.errors import SmolLMError, UsageError

ROOT = Path(__file__).parent.parent
SCRIPT = ROOT / "scripts/benchmark.py"
BOTH = {
    "train": [
        "tokens/s",
        "seconds",
        "MFU of the GEMM's speed",
        "GEMM GFLOP/s",
        "cores others took",
        "loss 1",
        "loss 2",
    ],
    "decode": ["tokens/s", "seconds", "GEMM GFLOP/s", "loss 1"],
    "prefill": ["tokens/s", "seconds", "GEMM GFLOP/s", "loss 1"],
    "memory": ["peak GB", "GB above before the step"],
    "startup": ["cold seconds", "warm seconds"],
}
RATIO = {
    "train": "tokens/s",
    "decode": "tokens/s",
    "prefill": "tokens/s",
    "memory": "peak GB",
    "startup": "warm seconds",
}


@pytest.fixture(scope="module")
def benchmark():
    spec = importlib.util.spec_from_file_location("benchmark_script", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    sys.modules["benchmark_script"] = module
    spec.loader.exec_module(module)
    yield module
    del sys.modules["benchmark_script"]


def measured(folder, *arguments):
    """The JSON of one run at toy size, its rows checked for order."""
    command = [sys.executable, SCRIPT, *arguments, "--preset", "tiny", "--rounds", "1", "--out", "b.json"]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        list(map(str, command)), cwd=folder, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    content = json.loads((folder / "b.json").read_text())
    assert (
        content["command"] == f"python scripts/benchmark.py {' '.join(arguments)} --preset tiny --rounds 1 --out b.json"
    )
    assert {"jax", "cores", "device"} < content["environment"].keys()
    assert all(row["min"] <= row["median"] <= row["max"] for row in content["rows"].values())
    assert [path.name for path in folder.iterdir() if path.name not in ("b.json", "data")] == [], "something was left"
    return content


@pytest.mark.parametrize("what", list(BOTH))
def test_a_subject_measures_both_sides(tmp_path, what):
    size = ["--new-tokens", "24", "--batch-size", "2"] if what == "decode" else ["--sequence-length", "32"]
    content = measured(tmp_path, what, *size)
    rows = content["rows"]
    assert {f"{row}, {side}" for row in BOTH[what] for side in ("ours", "hf")} <= rows.keys()
    assert {"torch", "transformers"} < content["environment"].keys()
    ours, hf = (rows[f"{RATIO[what]}, {side}"]["median"] for side in ("ours", "hf"))
    assert rows[f"{RATIO[what]}, ours / hf"]["median"] == pytest.approx(ours / hf)
    assert all(row["min"] > 0 for name, row in rows.items() if not name.startswith("cores others"))
    for name in (name for name in rows if name.startswith("loss") and name.endswith("ours")):
        assert rows[name]["median"] == pytest.approx(rows[name.replace("ours", "hf")]["median"], rel=1e-3)


def test_the_twin_trains_beside_us(tmp_path):
    rows = measured(tmp_path, "train", "--against", "twin", "--sequence-length", "32", "--dtype", "bfloat16")["rows"]
    assert {"tokens/s, ours / twin", "loss 2, twin"} < rows.keys()
    assert rows["loss 2, ours"]["median"] == pytest.approx(rows["loss 2, twin"]["median"], rel=2e-2)
    assert rows["loss 2, ours"]["median"] < rows["loss 1, ours"]["median"] - 0.5, "the optimizer did nothing"


def test_checkpoint_measures_both_sides(tmp_path):
    rows = measured(tmp_path, "checkpoint", "--sequence-length", "32")["rows"]
    assert {"manifest / save", "verify / save", "step guarded / unguarded"} < rows.keys()


def side(losses, **rest):
    return {"platform": "cpu", "losses": losses} | rest


@pytest.mark.parametrize(
    ("dtype", "ours", "theirs", "named"),
    [
        ("float32", side([10.0, 9.0]), side([10.0, 9.02]), "loss 2 is 9.000000"),
        ("float32", side([float("nan")]), side([10.0]), "loss 1 is nan"),
        ("float32", side([10.0]), side([float("nan")]), "hf"),
        ("bfloat16", side([10.0]), side([10.3]), "0.02 relative"),
        ("float32", side([10.0], ids=[[1, 2]]), side([10.0], ids=[[1, 3]]), "different tokens"),
        ("float32", side([10.0], platform="gpu"), side([10.0]), "ours is on a gpu, hf on a cpu"),
    ],
)
def test_sides_that_do_not_do_the_same_work_are_refused(benchmark, dtype, ours, theirs, named):
    with pytest.raises(SmolLMError, match=named):
        benchmark.check_equal(dtype, {"ours": ours, "hf": theirs})


@pytest.mark.parametrize(
    ("dtype", "ours", "theirs"),
    [
        ("float32", side([10.0, 9.0]), side([10.005, 9.0])),
        ("bfloat16", side([10.0], ids=[[1]]), side([10.1], ids=[[2]])),
    ],
)
def test_rounding_is_no_difference(benchmark, dtype, ours, theirs):
    benchmark.check_equal(dtype, {"ours": ours, "hf": theirs})


def test_ratios_are_taken_round_by_round(benchmark):
    rows = benchmark.with_ratios("x", {"ours": [1.0, 8.0, 3.0], "hf": [1.0, 2.0, 6.0], "twin": [1.0, 1.0, 1.0]})
    assert rows["x, ours / hf"] == {"median": 1.0, "min": 0.5, "max": 4.0}
    assert rows["x, ours / twin"] == {"median": 3.0, "min": 1.0, "max": 8.0}


def test_a_side_that_dies_is_named(benchmark, tmp_path):
    with pytest.raises(SmolLMError, match="side hf ended with status"):
        benchmark.Side("hf", benchmark.Flags("train", preset="tiny"), tmp_path / "nowhere")


@pytest.mark.parametrize(
    ("flags", "named"),
    [
        ({"what": "train", "rounds": 0}, "--rounds must be at least 1, got 0"),
        ({"what": "decode", "against": ("twin",)}, "no cache"),
        ({"what": "train", "sequence_length": 513}, "513 tokens exceed the 512"),
        ({"what": "decode", "new_tokens": 500}, "516 tokens exceed the 512"),
    ],
)
def test_flags_that_cannot_be_honoured_are_refused(benchmark, flags, named):
    with pytest.raises(UsageError, match=named):
        benchmark.check_flags(benchmark.Flags(preset="tiny", **flags))
