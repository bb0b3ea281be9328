"""What a `generation_config.json` asks of whoever writes with its weights. Imports no framework.

Source: transformers, generation/configuration_utils.py (GenerationConfig), and generation/utils.py
(`_prepare_generation_config`): where the file is there, it alone says which tokens end a text.
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

# Fields of `Sampling`, and what transformers takes where a file that samples leaves one out.
DEFAULTS = {"temperature": 1.0, "top_k": 50, "top_p": 1.0, "min_p": 0.0, "repetition_penalty": 1.0}
GREEDY = {"temperature": 0.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0, "repetition_penalty": 1.0}
# Of each field: whether it is an integer, which values `Sampling` takes, and that in words.
ALLOWED: dict[str, tuple[bool, Callable[[float], bool], str]] = {
    "temperature": (False, lambda x: 0 <= x < float("inf"), "at least 0"),
    "top_k": (True, lambda x: x >= 0, "at least 0"),
    "top_p": (False, lambda x: 0 <= x <= 1, "from 0 to 1"),
    "min_p": (False, lambda x: 0 <= x < 1, "at least 0 and below 1"),
    "repetition_penalty": (False, lambda x: 1e-6 <= x <= 1e6, "from 1e-6 to 1e6"),
}
SMALLEST = 1e-30  # a top_p that keeps the likeliest token alone, as 0 does in transformers
# What changes the text and is not done here, with the values that change nothing.
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
    """How weights are to be written with, by themselves: a caller's own wishes come first."""

    eos_token_ids: tuple[int, ...]  # any of them ends a text
    bos_token_id: int | None  # begins a text that has no prompt
    sampling: dict[str, Any]  # fields of `Sampling`: numbers
    source: str = ""  # the file that says so; "" where there is none, and writing is greedy
    not_done: tuple[str, ...] = ()  # what the file asks for besides, as NAME=VALUE

    @classmethod
    def of(cls, values: dict[str, Any] | None, config: Config, source: str) -> "GenerationConfig":
        """What a file's `values` ask for; None: there is no file, and the config names the tokens that end a text.

        Raises `InputFileError` naming the file and the field that makes no sense.
        """
        if values is None:
            return cls(config.eos_token_ids, config.bos_token_id, dict(GREEDY))
        ends = _ids(values, "eos_token_id", source)
        begins = _ids(values, "bos_token_id", source)
        sampled = _flag(values, "do_sample", source)
        sampling: dict[str, Any] = dict(DEFAULTS) if sampled else dict(GREEDY)
        for name in sampling:
            value = values.get(name)
            if value is None or (name == "temperature" and not sampled):
                continue
            sampling[name] = _number(name, value, source)
        not_done = [
            f"{name}={short_repr(values[name])}"
            for name, neutral in NEUTRAL.items()
            if name in values and values[name] not in neutral
        ]
        return cls(ends, begins[0] if begins else config.bos_token_id, sampling, source, tuple(not_done))

    @property
    def note(self) -> str | None:
        """One line on what the file asks for and is not done; None where there is nothing."""
        return f"{self.source}: not supported and left out: {', '.join(self.not_done)}" if self.not_done else None


UNKNOWN = GenerationConfig((), None, GREEDY)  # of weights that have not been read: greedy


def described(sampling: dict[str, Any]) -> str:
    """How the next token is chosen, in a few words: only what differs from plain sampling."""
    names = {name.replace("_", " "): sampling[name] for name in GREEDY if sampling[name] != GREEDY[name]}
    if not sampling["temperature"]:
        penalty = names.get("repetition penalty")
        return "greedy" if penalty is None else f"greedy, repetition penalty {penalty:g}"
    return ", ".join(f"{name} {value:g}" for name, value in names.items())


def _number(name: str, value: Any, source: str) -> float:
    """A field of `Sampling` as transformers means it; `InputFileError` for what it refuses too when it samples."""
    whole, allowed, words = ALLOWED[name]
    if whole and type(value) is float and value.is_integer():  # 50.0, as YAML and JavaScript write it
        value = int(value)
    kinds = (int,) if whole else (int, float)
    if type(value) not in kinds:
        kind = "an integer" if whole else "a number"
        raise InputFileError(f"{source}: {name} must be {kind}, got {short_repr(value)}")
    if not allowed(value):
        raise InputFileError(f"{source}: {name} must be {words}, got {short_repr(value)}")
    return SMALLEST if name == "top_p" and value == 0 else value


def _flag(values: dict[str, Any], name: str, source: str) -> bool:
    if (value := values.get(name)) not in (None, True, False):
        raise InputFileError(f"{source}: {name} must be true or false, got {short_repr(value)}")
    return bool(value)


def _ids(values: dict[str, Any], name: str, source: str) -> tuple[int, ...]:
    """The token ids in a field that holds one or a list of them, or is not there; -1 is no token."""
    value = values.get(name)
    ids = value if isinstance(value, list) else [] if value is None else [value]
    if not all(type(i) is int and -1 <= i < 2**31 for i in ids):
        raise InputFileError(f"{source}: {name} must be a token id or a list of them, got {short_repr(value)}")
    return tuple(dict.fromkeys(i for i in ids if i != -1))


def read_generation_config(folder: Path) -> dict[str, Any] | None:
    """The content of a folder's `generation_config.json`, None where there is none."""
    path = folder / "generation_config.json"
    return json_object(read_json(path), path) if path.exists() else None


def json_object(values: Any, where: object) -> dict[str, Any]:
    if not isinstance(values, dict):
        raise InputFileError(f"{where}: must be a JSON object, got {short_repr(values)}")
    return values


def generation_of_folder(folder: Path, config: Config) -> dict[str, Any] | None:
    """What a Hugging Face folder says of generation: in its own file, or as transformers 4 kept it, in config.json."""
    values = read_generation_config(folder)
    if values is None and (old := generation_defaults(read_json(folder / "config.json"))):
        return config.special_token_ids() | old
    return values


def generation_text(config: Config, generation: dict[str, Any] | None) -> str:
    """The text of a `generation_config.json`: the weights' own, else the ids that the config names."""
    return json.dumps(config.special_token_ids() if generation is None else generation, indent=2) + "\n"
