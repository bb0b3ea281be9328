"""LoRA adapters in peft's files, `adapter_config.json` and `adapter_model.safetensors`: read, checked, merged, written.

Framework-free. Source: peft 0.21, tuners/lora/config.py and utils/save_and_load.py; Hu et al. 2021.
"""

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from smollm_jax.config import Config
from smollm_jax.config.finetune_recipe import LORA_TARGETS
from smollm_jax.errors import InputFileError, StorageError, UsageError, short_repr
from smollm_jax.runtime.atomic import overwrite
from smollm_jax.runtime.files import read_json
from smollm_jax.weights.bundle import Bundle
from smollm_jax.weights.mapping import FLOATS, hf_shapes
from smollm_jax.weights.safetensors_file import digest, read_safetensors, safetensors_bytes

ADAPTER = "adapter"  # the folder in a run folder with the newest adapter
CONFIG, TENSORS = "adapter_config.json", "adapter_model.safetensors"
PREFIX = "base_model.model."
BASE_SHA256 = "smollm_jax.base_sha256"  # a metadata key of the tensors' file, which peft ignores
# peft's options that change what an adapter computes, and their supported values; the first is peft's default.
SUPPORTED: dict[str, tuple[Any, ...]] = {
    "peft_type": ("LORA",),
    "bias": ("none",),
    "fan_in_fan_out": (False, None),
    # pissa, olora and others change the base weights when the adapter is created.
    "init_lora_weights": (True, False, "gaussian", "orthogonal", "eva"),
    "use_dora": (False, None),
    "use_qalora": (False, None),
    "modules_to_save": (None, []),
    "rank_pattern": ({}, None),
    "alpha_pattern": ({}, None),
    "layers_to_transform": (None, []),
    "layer_replication": (None, []),
    "target_parameters": (None, []),
    "alora_invocation_tokens": (None, []),
    "lora_bias": (False, None),
}


@dataclasses.dataclass(frozen=True)
class Adapter:
    """Low-rank matrices of a LoRA adapter: each target's weight W `[out, in]` becomes W + scale * B @ A.

    `tensors` holds by target the pair (A `[L, rank, in]`, B `[L, out, rank]`), float32; `base` is the path or name of
    the weights that the adapter was trained on, and `base_sha256` their `fingerprint`, where it is known.
    """

    tensors: Mapping[str, tuple[np.ndarray, np.ndarray]]
    rank: int
    alpha: float
    rslora: bool = False
    base: str = ""
    base_sha256: str = ""
    dropout: float = 0.0  # of A's inputs, in training

    @property
    def scale(self) -> float:
        """alpha / rank, with rslora alpha / sqrt(rank)."""
        return lora_scale(self.rank, self.alpha, self.rslora)

    @property
    def targets(self) -> tuple[str, ...]:
        """The projections that have a pair, such as "q_proj"."""
        return tuple(self.tensors)


def lora_scale(rank: int, alpha: float, rslora: bool) -> float:
    """The factor of B @ A: alpha / rank, with rslora alpha / sqrt(rank) (Kalajdzievski 2023)."""
    return alpha / (rank**0.5 if rslora else rank)


def is_adapter(path: Path) -> bool:
    """Whether a path is a folder in peft's layout."""
    return (path / CONFIG).is_file()


def fingerprint(bundle: Bundle) -> str:
    """The sha256 of the base weights that a run with an adapter records."""
    return digest(bundle.tensors)


def projection_shape(config: Config, target: str) -> tuple[int, int]:
    """The shape `[out, in]` of a target's weight."""
    out_size, in_size = hf_shapes(config)[tensor_name(0, target)]
    return out_size, in_size


def read_adapter_config(folder: Path) -> dict[str, Any]:
    """The values of `adapter_config.json`; raises `InputFileError` if an option is not supported."""
    path = folder / CONFIG
    values = read_json(path)
    if not isinstance(values, dict):
        raise InputFileError(f"{path}: must be a JSON object, got {short_repr(values)}")
    for name, supported in SUPPORTED.items():
        if name in values and values[name] not in supported:
            default = short_repr(supported[0])
            raise InputFileError(f"{path}: {name} {short_repr(values[name])} is not supported, only {default}")
    rank: Any = values.get("r")
    alpha: Any = values.get("lora_alpha")
    if type(rank) is not int or rank < 1 or type(alpha) not in (int, float) or not alpha > 0:
        got = f"{short_repr(rank)} and {short_repr(alpha)}"
        raise InputFileError(f"{path}: r and lora_alpha must be positive numbers, got {got}")
    dropout: Any = values.setdefault("lora_dropout", 0.0)
    if type(dropout) not in (int, float) or not 0 <= dropout < 1:
        raise InputFileError(f"{path}: lora_dropout must be at least 0 and below 1, got {short_repr(dropout)}")
    return values


def read_adapter(folder: Path, config: Config) -> Adapter:
    """The adapter in a folder in peft's layout, for a model of this config.

    Raises `InputFileError` if an option is not supported, or naming the tensors that do not fit the model: peft only
    warns about those and continues with an untrained adapter.
    """
    values, source = read_adapter_config(folder), folder / TENSORS
    rank = values["r"]
    tensors, metadata = read_safetensors(source)
    targets = [target for target in LORA_TARGETS if any(f".{target}.lora_A." in name for name in tensors)]
    if not targets:
        raise InputFileError(f"{source}: has no LoRA tensors for {', '.join(LORA_TARGETS)}")
    expected = {name: shape for target in targets for name, shape in _expected(config, target, rank).items()}
    faults = [f"{name} is missing" for name in expected if name not in tensors]
    faults += [f"{name} is not expected" for name in tensors if name not in expected]
    for name in expected.keys() & tensors.keys():
        tensor = tensors[name]
        if tensor.shape != expected[name]:
            faults.append(f"{name} has shape {list(tensor.shape)}, expected {list(expected[name])}")
        elif tensor.dtype not in FLOATS:
            faults.append(f"{name} has dtype {tensor.dtype}, expected a float")
        elif not np.isfinite(tensor).all():
            faults.append(f"{name} has non-finite values")
    if faults:
        more = f"; and {len(faults) - 5} more" if len(faults) > 5 else ""
        raise InputFileError(f"{source}: does not fit the model: {'; '.join(sorted(faults)[:5])}{more}")

    def stacked(target: str, side: str) -> np.ndarray:
        layers = range(config.num_hidden_layers)
        return np.stack([tensors[_key(layer, target, side)].astype(np.float32) for layer in layers])

    pairs = {target: (stacked(target, "A"), stacked(target, "B")) for target in targets}
    base = values.get("base_model_name_or_path") or ""
    rslora, base_sha256 = bool(values.get("use_rslora")), metadata.get(BASE_SHA256, "")
    return Adapter(
        pairs, rank, float(values["lora_alpha"]), rslora, str(base), base_sha256, float(values["lora_dropout"])
    )


def write_adapter(folder: Path, adapter: Adapter) -> None:
    """Writes an adapter in peft's layout, replacing one that is there; each file is replaced atomically.

    Raises `StorageError` if a file cannot be written.
    """
    tensors = {
        _key(layer, target, side): np.ascontiguousarray(stacked[layer], np.float32)
        for target, pair in adapter.tensors.items()
        for side, stacked in zip("AB", pair, strict=True)
        for layer in range(len(stacked))
    }
    alpha = int(adapter.alpha) if float(adapter.alpha).is_integer() else adapter.alpha
    values = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": adapter.base,
        "r": adapter.rank,
        "lora_alpha": alpha,
        "target_modules": list(adapter.targets),
        "lora_dropout": adapter.dropout,
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "init_lora_weights": True,
        "use_rslora": adapter.rslora,
        "modules_to_save": None,
        "rank_pattern": {},
        "alpha_pattern": {},
    }
    metadata = {BASE_SHA256: adapter.base_sha256} if adapter.base_sha256 else {}
    contents = {
        TENSORS: safetensors_bytes(tensors, metadata),
        CONFIG: (json.dumps(values, indent=2) + "\n").encode(),
    }
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for name, content in contents.items():
            overwrite(folder / name, content)
    except OSError as error:
        raise StorageError(f"{folder}: cannot be written: {error.strerror}") from error


def merge_adapter(bundle: Bundle, adapter: Adapter) -> Bundle:
    """The weights with scale * B @ A added, in at least float32: bfloat16 would round most of the adapter away."""
    tensors = {name: _widened(tensor) for name, tensor in bundle.tensors.items()}
    for target, (a, b) in adapter.tensors.items():
        for layer in range(len(a)):
            name = tensor_name(layer, target)
            added = np.float32(adapter.scale) * (b[layer].astype(np.float32) @ a[layer].astype(np.float32))
            tensors[name] = tensors[name] + added
    return dataclasses.replace(bundle, tensors=tensors, origin=f"{bundle.origin} with a LoRA adapter")


def parse_targets(text: str) -> tuple[str, ...]:
    """The projections that --lora-targets names, in the model's order: "all-linear", or names separated by commas.

    Raises `UsageError` for an unknown name.
    """
    names = LORA_TARGETS if text == "all-linear" else tuple(text.split(","))
    if unknown := [name for name in names if name not in LORA_TARGETS]:
        known = ", ".join(LORA_TARGETS)
        raise UsageError(f"--lora-targets {text}: {unknown[0]!r} is unknown, known: {known}, and all-linear for all")
    return tuple(name for name in LORA_TARGETS if name in names)


def _widened(tensor: np.ndarray) -> np.ndarray:
    return tensor if tensor.dtype in (np.float32, np.float64) else tensor.astype(np.float32)


def _module(layer: int, target: str) -> str:
    part = "mlp" if target in ("gate_proj", "up_proj", "down_proj") else "self_attn"
    return f"model.layers.{layer}.{part}.{target}"


def tensor_name(layer: int, target: str) -> str:
    """Hugging Face's name of the weight that a pair is added to."""
    return f"{_module(layer, target)}.weight"


def _key(layer: int, target: str, side: str) -> str:
    """peft's name of a tensor; `side` is A or B."""
    return f"{PREFIX}{_module(layer, target)}.lora_{side}.weight"


def _expected(config: Config, target: str, rank: int) -> dict[str, tuple[int, int]]:
    out_size, in_size = projection_shape(config, target)
    sides = {"A": (rank, in_size), "B": (out_size, rank)}
    layers = range(config.num_hidden_layers)
    return {_key(layer, target, side): shape for layer in layers for side, shape in sides.items()}
