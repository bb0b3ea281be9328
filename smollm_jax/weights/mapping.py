"""The table of rules that maps between our stacked parameters and Hugging Face's tensors, in both directions.

Framework-free, so that the PyTorch twin uses the same validation."""

import dataclasses
import math
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import einops
import ml_dtypes
import numpy as np

from smollm_jax.config import Config
from smollm_jax.errors import InputFileError
from smollm_jax.weights import tensor_names
from smollm_jax.weights.bundle import Bundle
from smollm_jax.weights.safetensors_file import native

# HF name ("*": layer index, stacked to L): (our path, einops pattern from HF's array to ours).
# Load: einops.rearrange(x, rule). Save: the same rule with its two sides swapped.
RULES = {
    "model.embed_tokens.weight": ("embed_tokens", "V D -> V D"),
    "model.layers.*.input_layernorm.weight": ("layers.input_layernorm", "L D -> L D"),
    "model.layers.*.self_attn.q_proj.weight": ("layers.self_attn.q_proj", "L (N H) D -> L D N H"),
    "model.layers.*.self_attn.k_proj.weight": ("layers.self_attn.k_proj", "L (K H) D -> L D K H"),
    "model.layers.*.self_attn.v_proj.weight": ("layers.self_attn.v_proj", "L (K H) D -> L D K H"),
    "model.layers.*.self_attn.o_proj.weight": ("layers.self_attn.o_proj", "L D (N H) -> L N H D"),
    "model.layers.*.post_attention_layernorm.weight": ("layers.post_attention_layernorm", "L D -> L D"),
    "model.layers.*.mlp.gate_proj.weight": ("layers.mlp.gate_proj", "L F D -> L D F"),
    "model.layers.*.mlp.up_proj.weight": ("layers.mlp.up_proj", "L F D -> L D F"),
    "model.layers.*.mlp.down_proj.weight": ("layers.mlp.down_proj", "L D F -> L F D"),
    "model.norm.weight": ("norm", "D -> D"),
    "lm_head.weight": ("lm_head", "V D -> V D"),  # only where the head is not tied
}
FLOATS = (np.float32, np.float64, np.float16, ml_dtypes.bfloat16)


def rules(config: Config) -> dict[str, tuple[str, str]]:
    """The rules that apply to a config: all of them, without lm_head if the head is tied."""
    return {name: rule for name, rule in RULES.items() if name != "lm_head.weight" or not config.tie_word_embeddings}


def dims(config: Config) -> dict[str, int]:
    """The sizes of the dimensions in the rules."""
    return {
        "V": config.vocab_size,
        "D": config.hidden_size,
        "F": config.intermediate_size,
        "L": config.num_hidden_layers,
        "N": config.num_attention_heads,
        "K": config.num_key_value_heads,
        "H": config.head_dim,
    }


def hf_shapes(config: Config) -> dict[str, tuple[int, ...]]:
    """Names and shapes of all tensors in the Hugging Face layout, in the model's order: 272 for SmolLM2-135M."""
    sizes = dims(config)

    def shape(rule: str) -> tuple[int, ...]:
        groups = re.findall(r"\(([^)]*)\)|(\w)", rule.split("->")[0].replace("L ", ""))
        return tuple(int(np.prod([sizes[letter] for letter in (a or b).split()])) for a, b in groups)

    shapes = {name: shape(rule) for name, (_, rule) in rules(config).items()}
    stacked = [name for name in shapes if "*" in name]
    indices = range(config.num_hidden_layers)
    layers = {name.replace("*", str(index)): shapes[name] for index in indices for name in stacked}
    first = {name: shapes[name] for name in shapes if name == "model.embed_tokens.weight"}
    last = {name: shapes[name] for name in ("model.norm.weight", "lm_head.weight") if name in shapes}
    return first | layers | last


def check(bundle: Bundle, source: str | Path) -> Bundle:
    """The bundle with all tensors in the model's order; raises one `InputFileError` that lists every fault.

    Names are converted to Hugging Face's (`tensor_names.py`). A tied head is dropped if it equals the embedding and is
    a fault otherwise. Without an embedding it becomes one: safetensors' `save_model` keeps one name of a tied pair.
    """
    expected = hf_shapes(bundle.config)
    tensors, faults = tensor_names.to_hf_names(bundle.tensors, bundle.config)
    tensors = {name: t if t.dtype.isnative else native(t) for name, t in tensors.items()}
    if bundle.config.tie_word_embeddings and "lm_head.weight" in tensors:
        head = tensors.pop("lm_head.weight")
        embedding = tensors.setdefault("model.embed_tokens.weight", head)
        if head is not embedding and (head.shape != embedding.shape or head.tobytes() != embedding.tobytes()):
            faults.append("lm_head.weight differs from model.embed_tokens.weight though the config ties them")
    faults += [f"{name} is missing" for name in expected if name not in tensors]
    faults += [f"{name} is not part of the model" for name in sorted(set(tensors) - set(expected))]
    for name, shape in expected.items():
        if name not in tensors:
            continue
        tensor = tensors[name]
        if tensor.dtype not in FLOATS:
            faults.append(f"{name} has dtype {tensor.dtype}, expected a float")
        if tensor.shape != shape:
            faults.append(f"{name} has shape {list(tensor.shape)}, expected {list(shape)}")
        elif tensor.dtype in FLOATS and not np.isfinite(tensor).all():
            faults.append(f"{name} has non-finite values")
    if faults:
        more = f"; and {len(faults) - 20} more" if len(faults) > 20 else ""
        raise InputFileError(f"{source}: {len(faults)} fault(s) in the weights: {'; '.join(faults[:20])}{more}")
    return dataclasses.replace(bundle, tensors={name: tensors[name] for name in expected})


def from_hf(tensors: dict[str, np.ndarray], config: Config, dtype: Any = None) -> dict[str, np.ndarray]:
    """Hugging Face's tensors as our stacked parameters, by path, as copies of `dtype` (default: their own)."""
    return dict(stack_layers(tensors, config, dtype))


def stack_layers(tensors: dict[str, np.ndarray], config: Config, dtype: Any) -> Iterator[tuple[str, np.ndarray]]:
    """Yields our stacked parameters by path, each a fresh array of `dtype` (None: the dtype of its tensors).

    Every layer is transposed and cast right into the stacked array: separate stack, transpose and cast take 3 times as
    long.
    """
    for name, (path, rule) in rules(config).items():
        sizes, is_stacked = _split_sizes(rule, config), "*" in name
        names = [name.replace("*", str(index)) for index in range(config.num_hidden_layers if is_stacked else 1)]
        transposed = [einops.rearrange(tensors[hf_name], rule.replace("L ", ""), **sizes) for hf_name in names]
        array = _aligned_empty((len(names), *transposed[0].shape), dtype or np.result_type(*transposed))
        for layer, source in zip(array, transposed, strict=True):
            layer[...] = source
        yield path, array if is_stacked else array[0]


def _aligned_empty(shape: tuple[int, ...], dtype: Any) -> np.ndarray:
    """An empty array aligned to 64 bytes: on a CPU, JAX copies unaligned arrays twice, in 3 times the time."""
    size = math.prod(shape) * np.dtype(dtype).itemsize
    memory = np.empty(size + 63, np.uint8)
    offset = -memory.ctypes.data % 64
    return memory[offset : offset + size].view(dtype).reshape(shape)


def to_hf(parameters: dict[str, np.ndarray], config: Config) -> dict[str, np.ndarray]:
    """Our stacked parameters, by path, as Hugging Face's tensors: the exact inverse of `from_hf`."""
    tensors = {}
    for name, (path, rule) in rules(config).items():
        left, right = rule.split(" -> ")
        array = einops.rearrange(np.asarray(parameters[path]), f"{right} -> {left}")
        if "*" in name:
            tensors |= {name.replace("*", str(index)): layer for index, layer in enumerate(array)}
        else:
            tensors[name] = array
    return {name: tensors[name] for name in hf_shapes(config)}


def _split_sizes(rule: str, config: Config) -> dict[str, int]:
    """The sizes einops needs to split a rule's parenthesised axes."""
    return {letter: dims(config)[letter] for letter in "".join(re.findall(r"\(([^)]*)\)", rule)).replace(" ", "")}
