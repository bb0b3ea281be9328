"""A checkpoint is restored bit for bit, and one with another structure than expected is an error."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from smollm_jax.errors import CheckpointError, StorageError
from smollm_jax.runs.checkpoint import CheckpointStore
from smollm_jax.runs.pytree import flatten, unflatten


def arrays():
    return {"a.b": jnp.arange(6.0).reshape(2, 3), "c": jnp.asarray(7, jnp.int32), "d": jnp.ones(4, jnp.bfloat16)}


def abstract(**changes):
    shapes = {name: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding) for name, x in arrays().items()}
    return {"state": shapes | changes}


def test_arrays_and_meta_come_back_bit_for_bit(tmp_path):
    with CheckpointStore(tmp_path / "run") as store:
        store.save(3, {"state": arrays()}, {"note": "é", "step": 3})
    with CheckpointStore(tmp_path / "run", create=False) as store:
        assert store.latest_step() == 3
        assert store.meta(3) == {"note": "é", "step": 3}
        restored, read = store.restore(3, abstract())["state"], store.read(3, "state")
    for name, array in arrays().items():
        assert restored[name].dtype == read[name].dtype == array.dtype
        assert np.asarray(restored[name]).tobytes() == read[name].tobytes() == np.asarray(array).tobytes()


def test_the_newest_checkpoints_are_kept(tmp_path):
    with CheckpointStore(tmp_path, keep=2) as store:
        for step in (1, 2, 3):
            store.save(step, {"state": arrays()}, {})
        assert store.steps() == [2, 3]


@pytest.mark.parametrize("step", [4, 5])
def test_an_existing_or_older_step_is_not_saved_over(tmp_path, step):
    with CheckpointStore(tmp_path) as store:
        store.save(5, {"state": arrays()}, {})
        with pytest.raises(StorageError, match=f"step {step} is not newer than step 5"):
            store.save(step, {"state": arrays()}, {})


def test_a_different_dtype_shape_or_name_is_refused_by_name(tmp_path):
    with CheckpointStore(tmp_path) as store:
        store.save(1, {"state": arrays()}, {})
        on = arrays()["c"].sharding
        for name, wrong in {
            "c": jax.ShapeDtypeStruct((), jnp.int8, sharding=on),
            "a.b": jax.ShapeDtypeStruct((3, 2), jnp.float32, sharding=on),
            "new": jax.ShapeDtypeStruct((), jnp.int8, sharding=on),
        }.items():
            with pytest.raises(CheckpointError, match=f"step 1, state: {name} is"):
                store.restore(1, abstract(**{name: wrong}))


def test_what_is_not_there_is_an_error(tmp_path):
    with pytest.raises(CheckpointError, match="no such checkpoint folder"):
        CheckpointStore(tmp_path / "nowhere", create=False)
    with CheckpointStore(tmp_path) as store:
        with pytest.raises(CheckpointError, match="holds no checkpoint"):
            store.latest_step()
        store.save(1, {"state": arrays()}, {})
        with pytest.raises(CheckpointError, match=r"no step 2, only \[1\]"):
            store.restore(2, abstract())


def test_flatten_names_parameters_and_unflatten_inverts_it(tiny_model):
    flat = flatten(tiny_model)
    assert "layers.self_attn.q_proj" in flat
    assert len(flat) == 11
    restored_model = unflatten(jax.eval_shape(lambda: tiny_model), flat)
    assert jax.tree.structure(restored_model) == jax.tree.structure(tiny_model)
    with pytest.raises(CheckpointError, match=r"norm is missing"):
        unflatten(tiny_model, {name: array for name, array in flat.items() if name != "norm"})
