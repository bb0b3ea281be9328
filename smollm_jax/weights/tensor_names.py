"""Hugging Face's names for the tensors of a file, without the prefixes of wrapper modules. Framework-free."""

import re
from collections.abc import Iterable

import numpy as np

from smollm_jax.config import Config
from smollm_jax.errors import short_repr

# What torch.compile, FSDP and activation checkpointing insert into names, at any depth; Llama has no such modules.
WRAPPERS = ("_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module")
FIRST_LAYER = "layers.0.input_layernorm.weight"
ROTARY = re.compile(r"model\.(?:layers\.(\d+)\.self_attn\.)?rotary_emb\.(?:original_)?inv_freq")
# Relative tolerance of a frequency: 8 float32 ulps. Over 8 head sizes and 12 thetas, six float32 versions of the
# formula (PyTorch's old and new, NumPy's) are at most 2 ulps off ours, the float64 one 7; a theta of 100,001 is 80 off.
ROTARY_TOLERANCE = 2.0**-20


def to_hf_names(tensors: dict[str, np.ndarray], config: Config) -> tuple[dict[str, np.ndarray], list[str]]:
    """The tensors by Hugging Face's names, without the rotary buffers of old files, and a list of faults.

    A buffer with this config's frequencies is redundant; one with others is a fault, because the weights were trained
    with those. Source: transformers up to 4.31 saved `inv_freq`, and every version since ignores it.
    """
    # torch.optim.swa_utils.AveragedModel saves how many models it has averaged, next to its `module.` prefix.
    tensors = {name: tensor for name, tensor in tensors.items() if (name, tensor.shape) != ("n_averaged", ())}
    faults, file_names = [], dict[str, str]()
    renamed: dict[str, np.ndarray] = {}
    for name, hf_name in hf_names(tensors).items():
        if hf_name in renamed:
            faults.append(f"{file_names[hf_name]} and {name} are both {hf_name}")
        file_names[hf_name] = name
        renamed[hf_name] = tensors[name]
    for name in list(renamed):
        match = ROTARY.fullmatch(name)
        if match and int(match[1] or 0) < config.num_hidden_layers:
            buffer = renamed.pop(name)
            if not _are_frequencies(buffer, config):
                values = short_repr(buffer.reshape(-1)[:3].tolist())
                faults.append(f"{name} begins {values}, not with the frequencies of rope_theta {config.rope_theta:g}")
    return renamed, faults


def hf_names(names: Iterable[str]) -> dict[str, str]:
    """Hugging Face's name for each name in a file; all names are returned unchanged if they share no known prefix.

    The common prefix is the model's place in another module (`module.` of DDP, `model.` of a LightningModule,
    `_orig_mod.` of torch.compile); a bare `LlamaModel` lacks the last `model.`.
    """
    unchanged = {name: name for name in names}
    unwrapped = {name: _unwrap(name) for name in unchanged}
    prefixes = {name.removesuffix(FIRST_LAYER) for name in unwrapped.values() if f".{name}".endswith(f".{FIRST_LAYER}")}
    if len(prefixes) != 1:  # no model, or several
        return unchanged
    (prefix,) = prefixes
    has_model_prefix = f".{prefix}".endswith(".model.")
    outer = prefix.removesuffix("model.") if has_model_prefix else prefix
    if not all(name.startswith(outer) for name in unwrapped.values()):
        return unchanged
    stripped = {name: new.removeprefix(outer) for name, new in unwrapped.items()}
    if has_model_prefix:
        return stripped
    return {name: new if new == "lm_head.weight" else f"model.{new}" for name, new in stripped.items()}


def _unwrap(name: str) -> str:
    first, *others = name.split(".")
    return ".".join([first, *(part for part in others if part not in WRAPPERS)])


def _are_frequencies(buffer: np.ndarray, config: Config) -> bool:
    """Whether an array holds the config's rotary frequencies, rounded to the array's own dtype."""
    exact = np.array(config.rotary_frequencies)
    if buffer.shape != exact.shape or buffer.dtype.kind not in "fV":  # ml_dtypes' bfloat16 is of kind V
        return False
    low, high = (exact * factor for factor in (1 - ROTARY_TOLERANCE, 1 + ROTARY_TOLERANCE))
    stored, low, high = (array.astype(buffer.dtype).astype(np.float64) for array in (buffer, low, high))
    return bool(((low <= stored) & (stored <= high)).all())
