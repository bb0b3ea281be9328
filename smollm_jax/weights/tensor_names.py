"""Hugging Face's names for the tensors of a file, whatever wrapped the model when it was saved. Framework-free."""

import re
from collections.abc import Iterable

import numpy as np

from smollm_jax.config import Config
from smollm_jax.errors import short_repr

# What torch.compile, FSDP and activation checkpointing put into a name, at any depth: none is ever a module of Llama.
WRAPPERS = ("_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module")
FIRST_LAYER = "layers.0.input_layernorm.weight"
ROTARY = re.compile(r"model\.(?:layers\.(\d+)\.self_attn\.)?rotary_emb\.(?:original_)?inv_freq")
# Of a frequency, relative: 8 units of float32. Over 8 head sizes and 12 thetas, six float32 spellings of the formula
# (PyTorch's old and new, NumPy's) are at most 2 units off ours and the one in double 7; a theta of 100,001 is 80.
ROTARY_TOLERANCE = 2.0**-20


def standard(tensors: dict[str, np.ndarray], config: Config) -> tuple[dict[str, np.ndarray], list[str]]:
    """The tensors by Hugging Face's names, without the rotary buffers of old files, and what is wrong with them.

    A buffer that holds this config's frequencies says nothing new; one that holds others is a fault, because the file
    was made for them. Source: transformers up to 4.31 saved `inv_freq`, and every version since ignores it.
    """
    # How many models torch.optim.swa_utils.AveragedModel has averaged into this one, beside its `module.`.
    tensors = {name: tensor for name, tensor in tensors.items() if (name, tensor.shape) != ("n_averaged", ())}
    faults, by_name = [], dict[str, str]()
    named: dict[str, np.ndarray] = {}
    for name, new in standard_names(tensors).items():
        if new in named:
            faults.append(f"{by_name[new]} and {name} are both {new}")
        by_name[new] = name
        named[new] = tensors[name]
    for name in list(named):
        match = ROTARY.fullmatch(name)
        if match and int(match[1] or 0) < config.num_hidden_layers:
            buffer = named.pop(name)
            if not _are_frequencies(buffer, config):
                values = short_repr(buffer.reshape(-1)[:3].tolist())
                faults.append(f"{name} begins {values}, not with the frequencies of rope_theta {config.rope_theta:g}")
    return named, faults


def standard_names(names: Iterable[str]) -> dict[str, str]:
    """Hugging Face's name for each of the names of a file; its own where there is nothing in common to take away.

    What all names begin with is where the model stood in another module (`module.` of DDP, `model.` of a
    LightningModule, `_orig_mod.` of torch.compile); a `LlamaModel` on its own lacks the last `model.`.
    """
    own = {name: name for name in names}
    plain = {name: _unwrapped(name) for name in own}
    anchors = {name.removesuffix(FIRST_LAYER) for name in plain.values() if f".{name}".endswith(f".{FIRST_LAYER}")}
    if len(anchors) != 1:  # no model, or two: neither is chosen
        return own
    (stem,) = anchors
    whole = f".{stem}".endswith(".model.")
    outer = stem.removesuffix("model.") if whole else stem
    if not all(name.startswith(outer) for name in plain.values()):
        return own
    inner = {name: new.removeprefix(outer) for name, new in plain.items()}
    if whole:
        return inner
    return {name: new if new == "lm_head.weight" else f"model.{new}" for name, new in inner.items()}


def _unwrapped(name: str) -> str:
    first, *others = name.split(".")
    return ".".join([first, *(part for part in others if part not in WRAPPERS)])


def _are_frequencies(buffer: np.ndarray, config: Config) -> bool:
    """Whether an array holds the config's rotary frequencies, rounded to the array's own dtype."""
    exact = np.array(config.rotary_frequencies)
    if buffer.shape != exact.shape or buffer.dtype.kind not in "fV":  # ml_dtypes' bfloat16 is of kind V
        return False
    least, most = (exact * factor for factor in (1 - ROTARY_TOLERANCE, 1 + ROTARY_TOLERANCE))
    stored, least, most = (array.astype(buffer.dtype).astype(np.float64) for array in (buffer, least, most))
    return bool(((least <= stored) & (stored <= most)).all())
