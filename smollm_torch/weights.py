"""The twin's weights, from any kind of file that `smollm_jax.weights.read` supports."""

from pathlib import Path

import numpy as np
import torch

from smollm_jax import weights
from smollm_jax.config import Config
from smollm_jax.weights.bundle import Bundle
from smollm_jax.weights.torch_file import from_torch, to_torch
from smollm_torch.model import SmolLM


def load(path: str | Path, dtype: torch.dtype = torch.float32) -> tuple[SmolLM, Config]:
    """The twin from a path of any kind, with parameters of `dtype`, and its config."""
    bundle = weights.read(path)
    return from_bundle(bundle, dtype), bundle.config


def from_bundle(bundle: Bundle, dtype: torch.dtype = torch.float32) -> SmolLM:
    """The twin with validated weights, in `dtype`."""
    with torch.device("meta"):  # skips an initialization that would be overwritten
        module = SmolLM(bundle.config)
    module.to_empty(device="cpu").to(dtype)
    if bundle.config.tie_word_embeddings:  # to_empty has untied the two
        module.lm_head.weight = module.model.embed_tokens.weight
    module.load_state_dict({name: to_torch(array) for name, array in bundle.tensors.items()}, strict=True)
    return module.eval()


def to_bundle(module: SmolLM, origin: str = "", tokenizer_files: dict[str, bytes] | None = None) -> Bundle:
    """The twin's parameters as Hugging Face's tensors, without a tied head."""
    tensors: dict[str, np.ndarray] = {}
    for name, tensor in module.state_dict().items():
        if not (module.config.tie_word_embeddings and name == "lm_head.weight"):
            tensors[name] = from_torch(tensor.detach().cpu())
    return Bundle(tensors, module.config, tokenizer_files or {}, origin)
