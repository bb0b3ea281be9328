"""The exported file computes what the model does, at any batch and length, and runs without this package."""

import json
import subprocess
import sys
from pathlib import Path

import jax
import jax.export
import jax.numpy as jnp
import numpy as np
import pytest

from smollm_jax import weights
from smollm_jax.commands import export as script
from smollm_jax.errors import UsageError
from smollm_jax.generation import export
from smollm_jax.generation.generate import generate

ROOT = Path(__file__).parents[2]
FOREIGN = ("smollm_jax", "flax", "orbax", "optax", "jaxtyping", "einops")


@pytest.mark.parametrize("dtype", ["float32", pytest.param("bfloat16", marks=pytest.mark.slow)])
def test_forward_and_decode_give_the_models_logits_at_any_size(tiny_model, dtype):
    model = jax.tree.map(lambda parameter: parameter.astype(dtype), tiny_model)
    archive = export.archive(model)
    forward, decode = (jax.export.deserialize(bytearray(archive[name])) for name in ("forward", "decode"))
    assert forward.platforms == decode.platforms == ("cpu", "cuda")
    parameters = [jnp.asarray(archive[name]).view(dtype) for name in sorted(archive) if name.startswith("parameter")]
    config, tolerance = model.config, {"float32": 1e-5, "bfloat16": 3e-2}[dtype]
    for batch, length in ((1, 1), (2, 7), (3, 33)):
        tokens = jax.random.randint(jax.random.key(length), (batch, length), 0, config.vocab_size)
        expected = np.asarray(model(tokens))
        scale = np.abs(expected).max()
        got = np.asarray(forward.call(parameters, tokens))
        assert got.dtype == np.float32
        np.testing.assert_allclose(got / scale, expected / scale, atol=tolerance)
        shape = (config.num_hidden_layers, batch, length + 3, config.num_key_value_heads, config.head_dim)
        keys = values = jnp.zeros(shape, dtype)
        prompt = max(1, length - 2)  # then token by token
        for begin, end in [(0, prompt), *((i, i + 1) for i in range(prompt, length))]:
            logits, keys, values = decode.call(parameters, tokens[:, begin:end], keys, values, jnp.int32(begin))
            np.testing.assert_allclose(logits / scale, expected[:, begin:end] / scale, atol=tolerance)


@pytest.mark.slow
def test_the_loader_runs_the_real_weights_without_this_package(weights_path, tmp_path):
    script.main([str(weights_path), str(tmp_path / "model.npz")])
    model, config = weights.load(weights_path)
    prompt = [504, 3575, 282, 4649, 314]
    expected = np.concatenate(list(generate(model, [prompt], max_new_tokens=32)), axis=1)[0]
    program = (
        "import runpy, sys; sys.argv = sys.argv[1:]; runpy.run_path(sys.argv[0]); "
        f"assert not {{name.split('.')[0] for name in sys.modules}} & {set(FOREIGN)}, 'it needs more than JAX'"
    )
    command = [sys.executable, "-c", program, ROOT / "examples/load_exported.py", "model.npz", *prompt]
    done = subprocess.run(list(map(str, command)), cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert list(map(int, done.stdout.split())) == expected.tolist()
    with np.load(tmp_path / "model.npz") as archive:
        assert json.loads(archive["config"].tobytes())["hidden_size"] == config.hidden_size
        forward = jax.export.deserialize(bytearray(archive["forward"]))
        parameters = [jnp.asarray(archive[name]) for name in sorted(archive.files) if name.startswith("parameter")]
    tokens = jnp.asarray([[*prompt, *expected.tolist()]])
    logits = np.asarray(model(tokens))
    np.testing.assert_allclose(forward.call(parameters, tokens), logits, atol=1e-5 * np.abs(logits).max())


def test_the_loader_is_short():
    lines = (ROOT / "examples/load_exported.py").read_text().splitlines()
    assert len(lines) - lines.index("import json") <= 30


def test_a_target_that_cannot_be_written_is_refused(tmp_path):
    (tmp_path / "there.npz").touch()
    for name, named in (("there.npz", "exists already"), ("model.bin", r"must end in \.npz")):
        with pytest.raises(UsageError, match=named):
            script.main([str(tmp_path), str(tmp_path / name)])
