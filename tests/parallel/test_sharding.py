"""Sharded training equals one device's, with the memory and collectives expected. Eight virtual CPU devices."""

import json
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from smollm_jax.errors import UsageError
from smollm_jax.model.cost import count_parameters
from smollm_jax.parallel import sharding
from smollm_jax.training.execution import ExecutionConfig
from smollm_jax.training.loss import segment_ids_and_positions, shift_targets, total_loss
from smollm_jax.training.state import init_model
from tests.eight_devices import CONFIG, END, RESTORED, batches
from tests.trainer import ENVIRONMENT, ROOT

SHARDS = {"data=8": 1, "fsdp=8": 8, "data=4,fsdp=2": 2}


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """Of one device and of meshes of eight."""
    out = tmp_path_factory.mktemp("devices") / "results.json"
    environment = ENVIRONMENT | {"XLA_FLAGS": "--xla_force_host_platform_device_count=8", "JAX_PLATFORMS": "cpu"}
    command = [sys.executable, "-m", "tests.eight_devices", str(out)]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(out.read_text())


@pytest.mark.slow
def test_losses_of_20_steps_are_one_devices(results):
    """Also with a different number of documents, and so of targets, in each row, and with gradient accumulation."""
    for layout in SHARDS:
        one, many = (np.array(results["runs"][str(name)]["losses"]) for name in (None, layout))
        assert len(one) == 20
        assert one[-1] < one[0]
        np.testing.assert_allclose(many, one, rtol=1e-5, err_msg=layout)
    assert len({(row[:-1] == END).sum() for row in batches()[0]}) > 4


@pytest.mark.slow
def test_between_cpu_processes_there_is_no_reduce_scatter(results):
    """Gloo's is not reliable; an all-reduce and a slice give the same sums."""
    assert "reduce-scatter" in results["runs"]["data=4,fsdp=2"]["program"]
    many = results["runs"]["between processes"]
    np.testing.assert_allclose(many["losses"], results["runs"]["None"]["losses"], rtol=1e-5)
    assert "reduce-scatter" not in many["program"]


@pytest.mark.slow
def test_validation_losses_are_one_devices_for_any_number_of_rows(results):
    expected = results["runs"]["None"]["evaluated"]
    for layout in SHARDS:
        assert results["runs"][layout]["evaluated"] == pytest.approx(expected, rel=1e-5), layout


@pytest.mark.slow
def test_a_device_holds_its_shard_of_the_state(results):
    """Parameters and two moments in float32; every leaf here can be sharded, except the two step counts."""
    total = 3 * 4 * count_parameters(CONFIG)
    for layout in SHARDS:
        assert results["runs"][layout]["bytes"] == total // SHARDS[layout] + 2 * 4, layout


@pytest.mark.slow
def test_a_checkpoint_of_any_layout_is_read_into_another(results):
    assert results["restored"] == {f"{a} -> {b}": True for pair in RESTORED for a, b in (pair, pair[::-1])}


def test_a_leaf_is_sharded_along_its_largest_divisible_dimension_or_not_at_all():
    mesh = type("Mesh", (), {"shape": {"data": 1, "fsdp": 4}})()
    for shape, expected in {
        (30, 576, 1536): (None, None, "fsdp"),
        (49152, 576): ("fsdp",),
        (30, 6): (),
        (): (),
    }.items():
        assert tuple(sharding.fsdp_spec(shape, mesh)) == expected
    mesh.shape["fsdp"] = 1
    assert tuple(sharding.fsdp_spec((64, 64), mesh)) == ()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("model=2", "expected data=N, fsdp=N or data=N,fsdp=N, got 'model=2'"),
        ("data=0", "got 'data=0'"),
        ("data", "got 'data'"),
        ("data=٣", "got 'data=٣'"),
        ("", "got ''"),
        ("data=999", "describes 999 devices, but JAX sees"),
    ],
)
def test_an_invalid_mesh_is_refused(text, message):
    with pytest.raises(UsageError, match=f"--mesh {text}: .*{message}"):
        sharding.make_mesh(text)


def test_masked_documents_are_learnt_as_if_each_stood_alone():
    """One window of three documents, the last cut off, against the three by themselves."""
    model = init_model(CONFIG, 0)
    rng, masked = np.random.default_rng(0), ExecutionConfig("float32", separator_id=END)
    documents = [jnp.asarray(np.r_[rng.integers(1, CONFIG.vocab_size, size), END]) for size in (5, 9, 9)]
    window, plain = jnp.concatenate(documents)[None], ExecutionConfig("float32")
    learn = jax.jit(jax.value_and_grad(total_loss), static_argnums=2)
    loss, gradients = learn(model, window, masked)
    losses, separate = zip(*(learn(model, document[None], plain) for document in documents), strict=True)
    assert float(loss) == pytest.approx(float(sum(losses)), rel=1e-6)
    assert int((shift_targets(window, masked) >= 0).sum()) == sum(len(document) - 1 for document in documents)
    for actual, *summands in zip(*map(jax.tree.leaves, (gradients, *separate)), strict=True):
        expected = sum(summands)  # in float32, in another order
        np.testing.assert_allclose(actual, expected, atol=3e-6 * float(abs(expected).max()), rtol=0)


def test_documents_and_positions_are_counted_from_the_ends():
    documents, positions = segment_ids_and_positions(jnp.array([[7, 0, 0, 5, 6, 0, 8], [1, 2, 3, 4, 5, 6, 7]]), 0)
    assert documents.tolist() == [[0, 0, 1, 2, 2, 2, 3], [0] * 7]
    assert positions.tolist() == [[0, 1, 0, 0, 1, 2, 0], list(range(7))]
