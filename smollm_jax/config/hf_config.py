"""Reads and writes Hugging Face's `config.json`."""

import dataclasses
from pathlib import Path
from typing import Any

from smollm_jax.config import keys
from smollm_jax.config.model import Config
from smollm_jax.errors import InputFileError, UsageError, short_repr
from smollm_jax.runtime.files import read_json

DTYPES = ("float32", "float64", "float16", "bfloat16")
DTYPE_ALIASES = {"float": "float32", "double": "float64", "half": "float16"}  # PyTorch's aliases
DTYPE_ALIASES |= {"fp32": "float32", "fp16": "float16", "bf16": "bfloat16"}  # short names in training configs


def config_from_hf(config: dict[str, Any]) -> Config:
    """The config in a Hugging Face `config.json`, in the old (rope_theta) or the new (rope_parameters) layout.

    Raises `UsageError` for a key that this model does not support: no setting is silently ignored.
    Source: transformers, models/llama/configuration_llama.py.
    """
    if not isinstance(config, dict):
        raise UsageError(f"config must be a JSON object, got {type(config).__name__}")
    for key, value in config.items():
        if type(key) is not str or type(value) not in (str, int, float, bool, list, tuple, dict, type(None)):
            raise UsageError(f"config key {short_repr(key)}={short_repr(value)} is not a JSON value")
    values = dict(config)
    _drop_neutral_keys(values)
    dtypes = {key: _dtype(key, values.pop(key)) for key in ("dtype", "torch_dtype") if values.get(key) is not None}
    thetas = {"rope_theta": values.pop("rope_theta", None)}
    for key in ("rope_parameters", "rope_scaling"):  # the new layout, and scaling in the old one
        thetas[f"{key}.rope_theta"] = _unscaled_theta(key, values.pop(key, None))
    thetas = {key: theta for key, theta in thetas.items() if theta is not None}
    for key, theta in thetas.items():
        if type(theta) not in (int, float):
            raise UsageError(f"config key {key} must be a number, got {short_repr(theta)}")
    for synonyms in (dtypes, thetas):
        if len(set(synonyms.values())) > 1:
            pairs = ", ".join(f"{key}={short_repr(value)}" for key, value in synonyms.items())
            raise UsageError(f"config keys must agree, got {pairs}")
    values |= {"rope_theta": theta for theta in thetas.values()}  # noqa: B035  # all the same
    _apply_defaults(values)
    names = {field.name for field in dataclasses.fields(Config)}
    if unknown := sorted(key for key in set(values) - names if values[key] is not None):
        raise UsageError(f"config has keys that this model does not support: {short_repr(', '.join(unknown))}")
    if missing := sorted(names - set(values)):
        raise UsageError(f"config lacks {', '.join(missing)}: add them, as model constants have no defaults")
    return Config(**{name: values[name] for name in names})


def config_to_hf(config: Config, dtype: str = "float32") -> dict[str, Any]:
    """A Hugging Face `config.json` as a dict, with both the old and the new keys for older and newer readers."""
    return (
        dataclasses.asdict(config)
        | config.special_token_ids()
        | {
            "architectures": ["LlamaForCausalLM"],
            "model_type": "llama",
            "hidden_act": "silu",
            "attention_bias": False,
            "attention_dropout": 0.0,
            "mlp_bias": False,
            "rope_scaling": None,
            "rope_parameters": {"rope_type": "default", "rope_theta": config.rope_theta},
            "torch_dtype": dtype,
            "dtype": dtype,
            "use_cache": True,
        }
    )


def _drop_neutral_keys(values: dict[str, Any]) -> None:
    """Removes keys that do not change what the model computes; `UsageError` for a value that does."""
    if values.get("use_sliding_window") is False:
        values.pop("sliding_window", None)
    for key, allowed in keys.FIXED.items():
        value = values.pop(key, allowed[0])
        if value is None and key not in ("model_type", "hidden_act"):
            continue
        if not any(type(value) is type(other) and value == other for other in allowed):  # 0 == False in Python
            raise UsageError(f"config key {key}={short_repr(value)} is not supported, only {allowed[0]!r} is")
    for key, allowed in keys.FIXED_LISTS.items():
        value = values.pop(key, None)
        if value is not None and (type(value) is not list or any(item not in allowed for item in value)):
            raise UsageError(f"config key {key}={short_repr(value)} is not supported, only {[allowed[0]]} is")
    if code := values.pop("auto_map", None):
        raise UsageError(
            f"config key auto_map={short_repr(code)} names Python code that comes with the weights, which may compute "
            "something else and is never run; remove the key if the model is a plain Llama"
        )
    for key in list(values):
        neutral = key in keys.BOOKKEEPING or key in keys.GENERATION or key.startswith("unsloth_")
        if neutral or (key in keys.FACTORS and type(values[key]) in (int, float) and values[key] == 1):
            del values[key]


def _dtype(key: str, dtype: Any) -> str:
    """The name of a config's dtype; accepts PyTorch's spelling "torch.bfloat16" and short names."""
    name = dtype.removeprefix("torch.") if type(dtype) is str else dtype
    name = DTYPE_ALIASES.get(name, name) if type(name) is str else name
    if name not in (*DTYPES, "auto"):  # "auto": the dtype of the tensors
        raise UsageError(f"config key {key} must be one of {', '.join(DTYPES)}, got {short_repr(dtype)}")
    return name


def _unscaled_theta(key: str, parameters: Any) -> Any:
    """The `rope_theta` in an object of rotary parameters, None if it has none; `UsageError` for scaled embeddings.

    Linear scaling by 1 and a partial rotary embedding of the whole head change nothing and are accepted.
    """
    if parameters is None:
        return None
    if type(parameters) is not dict:
        raise UsageError(f"config key {key} must be an object, got {short_repr(parameters)}")
    values = dict(parameters)
    theta = values.pop("rope_theta", None)
    kinds = [kind for kind in (values.pop("rope_type", None), values.pop("type", None)) if kind is not None]
    allowed = ("default", "linear") if values.get("factor") is not None else ("default",)
    for name in ("original_max_position_embeddings", "finetuned"):  # describe the model before scaling
        values.pop(name, None)
    factors = [values.pop(name, None) for name in ("factor", "attention_factor", "partial_rotary_factor")]
    all_ones = all(factor is None or (type(factor) in (int, float) and factor == 1) for factor in factors)
    unscaled = all_ones and all(kind in allowed and kind == kinds[0] for kind in kinds)
    if not unscaled or any(value is not None for value in values.values()):
        raise UsageError(f"config key {key}={short_repr(parameters)} is not supported: only plain rotary embeddings")
    return theta


def _apply_defaults(values: dict[str, Any]) -> None:
    """Fills in missing keys as LlamaConfig does; a token id of -1, an old way to say "none", becomes None."""
    for key in ("bos_token_id", "eos_token_id", "pad_token_id"):
        token = values.setdefault(key, None)
        if type(token) is int and token == -1:  # Llama 1's pad_token_id; transformers warns, and no token has this id
            values[key] = None
        elif type(token) is list and key == "eos_token_id":
            values[key] = [i for i in token if type(i) is not int or i != -1]
    if type(values.get("num_attention_heads")) is int and values["num_attention_heads"] > 0:
        if values.get("num_key_value_heads") is None:
            values["num_key_value_heads"] = values["num_attention_heads"]
        if values.get("head_dim") is None and type(values.get("hidden_size")) is int:
            values["head_dim"], remainder = divmod(values["hidden_size"], values["num_attention_heads"])
            if remainder:
                raise UsageError("config lacks head_dim, and hidden_size is not divisible by num_attention_heads")


def read_config(path: Path) -> Config:
    """The config in a `config.json`; raises `InputFileError` naming the file and the field."""
    return parse_config(read_json(path), path)


def parse_config(values: Any, path: Path) -> Config:
    """The config in the parsed JSON of a file; raises `InputFileError` naming the file and the field."""
    try:
        return config_from_hf(values)
    except UsageError as error:
        raise InputFileError(f"{path}: {error}") from error
