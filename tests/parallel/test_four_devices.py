"""Sums, shards and means over four virtual devices are those of one, on arrays of a few numbers.

python -m tests.parallel.test_four_devices   # what the tests compare, as JSON
"""

import dataclasses
import functools
import json
import subprocess
import sys
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from smollm_jax.parallel import sharding
from smollm_jax.training.execution import ExecutionConfig
from smollm_jax.training.loss import NextToken, data_parallel, mean_gradients, mean_loss, shift_targets
from smollm_jax.training.validation import shard_padded_batch
from tests.trainer import ENVIRONMENT, ROOT

END = 0
LAYOUTS = ("data=4", "fsdp=4", "data=2,fsdp=2")
# Six windows of 3 targets, of which 3, 2, 1, 3, 0 and 2 are learnt where a document's first token is not.
ROWS = np.array(
    [[1, 2, 3, 4], [1, END, 3, 4], [END, END, 3, 4], [5, 6, 7, 8], [END, END, END, 4], [9, 8, END, 7]], np.int32
)
WEIGHTS = {"wide": np.arange(24, dtype=np.float32).reshape(8, 3), "odd": np.arange(3, dtype=np.float32)}


@dataclasses.dataclass(frozen=True)
class Product(NextToken):
    """The sum of all weights times the sum of the learnt tokens, in place of a model's loss."""

    def total(self, model: Any, batch: Any, execution: ExecutionConfig, frozen: Any) -> Any:
        targets = shift_targets(batch, execution)
        total = jnp.where(targets >= 0, targets, 0).sum().astype(jnp.float32)
        return total * sum(leaf.sum() for leaf in jax.tree.leaves((model, frozen))), {"metric": 2 * total}


def results(layout: str | None) -> dict[str, Any]:
    mesh = sharding.make_mesh(layout) if layout else None
    execution = ExecutionConfig("float32", mesh=mesh, separator_id=END)
    model, frozen = (sharding.shard_params(WEIGHTS, mesh) for _ in range(2))
    reads: list[tuple[int, int]] = []

    def read(rows: slice) -> dict[str, np.ndarray]:
        start, stop, _ = rows.indices(4)
        reads.append((start, stop))
        return {"tokens": ROWS[:4][rows], "numbers": np.arange(8).reshape(4, 2)[rows]}

    batch = sharding.shard_batch(read, {"tokens": (4, 4), "numbers": (4, 2)}, mesh)
    padded = shard_padded_batch(ROWS, mesh)
    specs = sharding.fsdp_specs(model, mesh)
    out: dict[str, Any] = {"weights": jax.tree.map(lambda x: np.asarray(x).tolist(), model)}
    for name, function, out_specs in (
        ("loss", mean_loss, (sharding.REPLICATED, sharding.REPLICATED)),
        ("gradients", mean_gradients, ((sharding.REPLICATED, sharding.REPLICATED), specs)),
    ):
        run = functools.partial(data_parallel, function, out_specs=out_specs)
        value = jax.jit(lambda m, b, f, run=run: run(m, b, execution, Product(), f))(model, padded, frozen)
        out[name] = jax.tree.map(lambda x: np.asarray(x).tolist(), value)
    out["batch"] = {name: np.asarray(array).tolist() for name, array in batch.items()}
    out["rows"] = sorted({*reads})
    out["padded"] = np.asarray(padded).tolist()
    out["shards"] = sorted(shard.data.shape for shard in model["wide"].addressable_shards)
    return out


@pytest.fixture(scope="module")
def measured() -> dict[str, Any]:
    environment = ENVIRONMENT | {"XLA_FLAGS": "--xla_force_host_platform_device_count=4", "JAX_PLATFORMS": "cpu"}
    # conftest plants the mutant of this test run, if it has one.
    program = "import conftest, runpy; runpy.run_module('tests.parallel.test_four_devices', run_name='__main__')"
    command = [sys.executable, "-c", program]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_loss_metrics_and_gradients_are_one_devices_whatever_is_learnt_of_each_row(measured, layout):
    learnt = ROWS[:, 1:][ROWS[:, :-1] != END]
    weights = 2 * (276 + 3)  # of the model and of what is frozen
    mean = learnt.sum() / len(learnt)
    for name in (layout, "one"):
        loss, metrics = measured[name]["loss"]
        assert loss == pytest.approx(mean * weights)
        assert metrics == {"metric": pytest.approx(2 * mean)}
        (loss, metrics), gradients = measured[name]["gradients"]
        assert loss == pytest.approx(mean * weights)
        assert metrics == {"metric": pytest.approx(2 * mean)}
        for key, array in WEIGHTS.items():
            np.testing.assert_allclose(gradients[key], np.full(array.shape, mean), rtol=1e-6)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_each_device_has_its_rows_and_its_shard(measured, layout):
    result = measured[layout]
    assert result["weights"] == {name: array.tolist() for name, array in WEIGHTS.items()}
    assert result["batch"] == {"tokens": ROWS[:4].tolist(), "numbers": np.arange(8).reshape(4, 2).tolist()}
    assert result["rows"] == [[i, i + 1] for i in range(4)], "a device reads the rows of another"
    assert result["padded"] == [*ROWS.tolist(), [-1] * 4, [-1] * 4]
    shards = {"data=4": 1, "fsdp=4": 4, "data=2,fsdp=2": 2}[layout]
    assert result["shards"] == [[8 // shards, 3]] * 4
    assert measured["one"]["padded"] == ROWS.tolist()


if __name__ == "__main__":
    print(json.dumps({"one": results(None)} | {layout: results(layout) for layout in LAYOUTS}))
