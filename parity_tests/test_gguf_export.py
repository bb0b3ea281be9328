"""A GGUF of ours is, to transformers, the model it was written from."""

import jax.numpy as jnp
import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from parity_tests.conftest import load_hf
from smollm_jax import weights


@pytest.mark.parametrize(
    "exported", ["trained_export", pytest.param("instruct_export", marks=pytest.mark.slow)], indirect=True
)
def test_transformers_computes_the_same_logits_from_our_gguf(tmp_path, source, exported, real_tokens):
    """9 query heads on 3 KV heads, and 6 on 2: rows of q or k in a wrong order load without an error."""
    bundle = weights.read(source)
    weights.write(tmp_path / "x.gguf", bundle, "gguf")
    theirs = AutoModelForCausalLM.from_pretrained(
        tmp_path, gguf_file="x.gguf", attn_implementation="eager", dtype=torch.float32
    )
    tokens = torch.tensor(real_tokens[:, :128])
    with torch.inference_mode():
        logits = theirs.eval()(tokens).logits
        assert torch.equal(logits, load_hf(exported)(tokens).logits)
    ours = np.asarray(weights.from_bundle(bundle)(jnp.asarray(tokens.numpy())))
    np.testing.assert_allclose(logits.numpy() / np.abs(ours).max(), ours / np.abs(ours).max(), atol=1e-5)
