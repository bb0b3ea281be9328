"""A GGUF of ours is, to transformers, the model it was written from."""

import jax.numpy as jnp
import numpy as np
import torch
from transformers import AutoModelForCausalLM

from parity_tests.conftest import load_hf
from smollm_jax import weights


def test_transformers_computes_the_same_logits_from_our_gguf(tmp_path, tiny_model, tokenizer_path, real_tokens):
    """6 query heads on 2 KV heads: rows of q or k in a wrong order load without an error."""
    files = {path.name: path.read_bytes() for path in tokenizer_path.iterdir() if path.name.startswith("tokenizer")}
    bundle = weights.to_bundle(tiny_model, "tiny", files)
    weights.write(tmp_path / "tiny.gguf", bundle, "gguf")
    weights.write(tmp_path / "hf", bundle, "hf")
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file="tiny.gguf", attn_implementation="eager").eval()
    tokens = torch.tensor(real_tokens[:, :128])
    with torch.inference_mode():
        logits = theirs(tokens).logits
        assert torch.equal(logits, load_hf(tmp_path / "hf")(tokens).logits)
    again, config = weights.load(tmp_path / "tiny.gguf")
    assert config.tie_word_embeddings
    np.testing.assert_array_equal(again(jnp.asarray(tokens.numpy())), tiny_model(jnp.asarray(tokens.numpy())))
    np.testing.assert_allclose(logits.numpy(), again(jnp.asarray(tokens.numpy())), atol=1e-5)
