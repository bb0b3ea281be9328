"""Default sampling and end-of-text tokens from a `generation_config.json`. Imports no framework.

Source: transformers, generation/configuration_utils.py (GenerationConfig), and generation/utils.py
(`_prepare_generation_config`): where the file exists, it alone determines the end-of-text tokens.
"""

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from smollm_jax.config.keys import generation_defaults
from smollm_jax.config.model import Config
from smollm_jax.errors import InputFileError, short_repr
from smollm_jax.runtime.files import read_json

# Fields of `Sampling`, with the values that transformers uses for a field that a file with do_sample leaves out.
DEFAULTS = {"temperature": 1.0, "top_k": 50, "top_p": 1.0, "min_p": 0.0, "repetition_penalty": 1.0}
GREEDY = {"temperature": 0.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0, "repetition_penalty": 1.0}
# For each field: whether it is an integer, which values `Sampling` accepts, and the same in words.
ALLOWED: dict[str, tuple[bool, Callable[[float], bool], str]] = {
    "temperature": (False, lambda x: 0 <= x < float("inf"), "at least 0"),
    "top_k": (True, lambda x: x >= 0, "at least 0"),
    "top_p": (False, lambda x: 0 <= x <= 1, "from 0 to 1"),
    "min_p": (False, lambda x: 0 <= x < 1, "at least 0 and below 1"),
    "repetition_penalty": (False, lambda x: 1e-6 <= x <= 1e6, "from 1e-6 to 1e6"),
}
SMALLEST_TOP_P = 1e-30  # keeps only the most likely token, as top_p 0 does in transformers
# Unsupported fields that change the text, with the values at which they change nothing.
NEUTRAL: dict[str, tuple[Any, ...]] = {
    "assistant_early_exit": (None,),
    "bad_words_ids": (None, []),
    "begin_suppress_tokens": (None, []),
    "constraints": (None, []),
    "dola_layers": (None,),
    "encoder_no_repeat_ngram_size": (None, 0),
    "encoder_repetition_penalty": (None, 1),
    "epsilon_cutoff": (None, 0),
    "eta_cutoff": (None, 0),
    "exponential_decay_length_penalty": (None,),
    "force_words_ids": (None, []),
    "forced_bos_token_id": (None,),
    "forced_eos_token_id": (None,),
    "guidance_scale": (None, 1),
    "min_length": (None, 0),
    "min_new_tokens": (None, 0),
    "no_repeat_ngram_size": (None, 0),
    "num_beams": (None, 1),
    "penalty_alpha": (None, 0),
    "sequence_bias": (None, {}),
    "stop_strings": (None, []),
    "suppress_tokens": (None, []),
    "top_h": (None,),
    "typical_p": (None, 1),
    "watermarking_config": (None,),
}


@dataclasses.dataclass(frozen=True)
class GenerationConfig:
    """Default generation settings of some weights; a caller's own settings override them."""

    eos_token_ids: tuple[int, ...]  # each of them ends a text
    bos_token_id: int | None  # the first token of a text without a prompt
    sampling: dict[str, Any]  # numeric fields of `Sampling`
    source: str = ""  # path of the file; "" without one, and then decoding is greedy
    unsupported: tuple[str, ...] = ()  # other settings in the file, as NAME=VALUE

    @classmethod
    def from_values(cls, values: dict[str, Any] | None, config: Config, source: str) -> "GenerationConfig":
        """The settings in a file's `values`. With None there is no file: eos comes from the config, sampling is greedy.

        Raises `InputFileError` naming the file and the invalid field.
        """
        if values is None:
            return cls(config.eos_token_ids, config.bos_token_id, dict(GREEDY))
        eos = _ids(values, "eos_token_id", source)
        bos = _ids(values, "bos_token_id", source)
        do_sample = _flag(values, "do_sample", source)
        sampling: dict[str, Any] = dict(DEFAULTS) if do_sample else dict(GREEDY)
        for name in sampling:
            value = values.get(name)
            if value is None or (name == "temperature" and not do_sample):
                continue
            sampling[name] = _number(name, value, source)
        unsupported = [
            f"{name}={short_repr(values[name])}"
            for name, neutral in NEUTRAL.items()
            if name in values and values[name] not in neutral
        ]
        return cls(eos, bos[0] if bos else config.bos_token_id, sampling, source, tuple(unsupported))

    @property
    def note(self) -> str | None:
        """One line that lists the unsupported settings of the file; None without any."""
        return f"{self.source}: not supported and ignored: {', '.join(self.unsupported)}" if self.unsupported else None


UNKNOWN = GenerationConfig((), None, GREEDY)  # for weights that have not been read: greedy


def describe_sampling(sampling: dict[str, Any]) -> str:
    """The sampling settings in a few words: those that differ from the defaults."""
    names = {name.replace("_", " "): sampling[name] for name in GREEDY if sampling[name] != GREEDY[name]}
    if not sampling["temperature"]:
        penalty = names.get("repetition penalty")
        return "greedy" if penalty is None else f"greedy, repetition penalty {penalty:g}"
    return ", ".join(f"{name} {value:g}" for name, value in names.items())


def _number(name: str, value: Any, source: str) -> float:
    """A field of `Sampling`; `InputFileError` for a value that transformers refuses too."""
    is_integer, allowed, range_text = ALLOWED[name]
    if is_integer and type(value) is float and value.is_integer():  # 50.0, as YAML and JavaScript write it
        value = int(value)
    types = (int,) if is_integer else (int, float)
    if type(value) not in types:
        kind = "an integer" if is_integer else "a number"
        raise InputFileError(f"{source}: {name} must be {kind}, got {short_repr(value)}")
    if not allowed(value):
        raise InputFileError(f"{source}: {name} must be {range_text}, got {short_repr(value)}")
    return SMALLEST_TOP_P if name == "top_p" and value == 0 else value


def _flag(values: dict[str, Any], name: str, source: str) -> bool:
    if (value := values.get(name)) not in (None, True, False):
        raise InputFileError(f"{source}: {name} must be true or false, got {short_repr(value)}")
    return bool(value)


def _ids(values: dict[str, Any], name: str, source: str) -> tuple[int, ...]:
    """The token ids in a field: an id, a list of ids, or missing. -1 means no token."""
    value = values.get(name)
    ids = value if isinstance(value, list) else [] if value is None else [value]
    if not all(type(i) is int and -1 <= i < 2**31 for i in ids):
        raise InputFileError(f"{source}: {name} must be a token id or a list of them, got {short_repr(value)}")
    return tuple(dict.fromkeys(i for i in ids if i != -1))


def read_generation_config(folder: Path) -> dict[str, Any] | None:
    """The content of a folder's `generation_config.json`; None if there is none."""
    path = folder / "generation_config.json"
    return json_object(read_json(path), path) if path.exists() else None


def json_object(values: Any, where: object) -> dict[str, Any]:
    if not isinstance(values, dict):
        raise InputFileError(f"{where}: must be a JSON object, got {short_repr(values)}")
    return values


def generation_of_folder(folder: Path, config: Config) -> dict[str, Any] | None:
    """Generation settings of a Hugging Face folder: `generation_config.json`, or config.json as in transformers 4."""
    values = read_generation_config(folder)
    if values is None and (legacy := generation_defaults(read_json(folder / "config.json"))):
        return config.special_token_ids() | legacy
    return values


def generation_text(config: Config, generation: dict[str, Any] | None) -> str:
    """The text of a `generation_config.json`: the given settings, else the special tokens of the config."""
    return json.dumps(config.special_token_ids() if generation is None else generation, indent=2) + "\n"
