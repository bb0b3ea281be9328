"""Each module equals Hugging Face's and the twin's on its own."""

import numpy as np
import pytest
import torch
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from smollm_jax.config import PRESETS


@pytest.mark.parametrize("name", PRESETS)
def test_rotary_frequencies_are_hugging_faces_bits(name):
    theirs = LlamaRotaryEmbedding(LlamaConfig(**PRESETS[name].to_hf())).inv_freq
    assert theirs.dtype == torch.float32
    np.testing.assert_array_equal(np.array(PRESETS[name].rotary_frequencies, np.float32), theirs.numpy())
