"""What a SmolLM2 is, in numbers: the config shared by the JAX model and its PyTorch twin.

Framework-free on purpose: reading a config imports neither jax nor torch. Fields carry Hugging Face's names and
none has a default, because a model constant that is guessed (rope_theta 10,000 for 100,000, say) gives a model that
runs and is wrong.
"""

import dataclasses
import reprlib
import struct
from typing import Any

from smollm_jax import config_keys
from smollm_jax.config_keys import generation_defaults as generation_defaults
from smollm_jax.errors import UsageError

# The least and the most of each size and constant, so that a config alone cannot ask for all memory or divide by zero.
BOUNDS: dict[str, tuple[float, float]] = {
    "vocab_size": (1, 2**20),  # the largest in use have 262,144 entries
    "hidden_size": (1, 2**16),  # Llama 3.1 405B: 16,384
    "intermediate_size": (1, 2**18),  # 53,248 there
    "num_hidden_layers": (1, 1024),  # 126 there
    "num_attention_heads": (1, 1024),  # 128 there
    "num_key_value_heads": (1, 1024),
    "head_dim": (1, 1024),  # 256 in Gemma
    "max_position_embeddings": (1, 2**24),  # 10M tokens is the longest context claimed
    "rope_theta": (1.0, 1e12),  # below 1 the frequencies grow; its powers must stay float32 numbers
    "rms_norm_eps": (1e-30, 1.0),  # below, float32 rounds it to 0 and a row of zeros divides by it
    "initializer_range": (1e-30, 1e3),
}
DTYPES = ("float32", "float64", "float16", "bfloat16")
DTYPE_ALIASES = {"float": "float32", "double": "float64", "half": "float16"}  # PyTorch's own
DTYPE_ALIASES |= {"fp32": "float32", "fp16": "float16", "bf16": "bfloat16"}  # of trainers' settings
_SHOWN = reprlib.Repr()
_SHOWN.maxlevel, _SHOWN.maxstring, _SHOWN.maxother = 2, 80, 80


def shown(value: Any) -> str:
    """A foreign value for a message: one printable line of bounded length, whatever the value is."""
    try:
        return " ".join(_SHOWN.repr(value).split())[:120]
    except ValueError:  # Python writes no integer of over 4,300 digits
        return f"{type(value).__name__} of thousands of digits"


@dataclasses.dataclass(frozen=True)
class Config:
    """The shape and constants of one Llama-style decoder, as in Hugging Face's `LlamaConfig`."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    max_position_embeddings: int
    rope_theta: float
    rms_norm_eps: float
    initializer_range: float
    tie_word_embeddings: bool
    bos_token_id: int | None
    eos_token_id: int | tuple[int, ...] | None
    pad_token_id: int | None

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            if field.name not in BOUNDS:
                continue
            value, (least, most) = getattr(self, field.name), BOUNDS[field.name]
            kinds, kind = ((int,), "an integer") if field.type is int else ((int, float), "a number")
            if type(value) not in kinds or not least <= value <= most:
                allowed = f"{kind} from {least:g} to {most:.8g}"
                raise UsageError(f"config field {field.name} must be {allowed}, got {shown(value)}")
            object.__setattr__(self, field.name, value if field.type is int else float(value))
        if type(self.tie_word_embeddings) is not bool:
            raise UsageError(
                f"config field tie_word_embeddings must be true or false, got {shown(self.tie_word_embeddings)}"
            )
        if isinstance(self.eos_token_id, list):
            object.__setattr__(self, "eos_token_id", tuple(self.eos_token_id))
        for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
            value = getattr(self, name)
            for token in value if isinstance(value, tuple) else (value,):
                if token is not None and (type(token) is not int or not 0 <= token < self.vocab_size):
                    raise UsageError(
                        f"config field {name} must be a token id below {self.vocab_size}, got {shown(token)}"
                    )
        if self.num_attention_heads % self.num_key_value_heads:
            raise UsageError(
                f"config field num_key_value_heads ({self.num_key_value_heads}) must divide "
                f"num_attention_heads ({self.num_attention_heads})"
            )
        if self.head_dim % 2:
            raise UsageError(f"config field head_dim must be even for rotary embeddings, got {self.head_dim}")

    @property
    def eos_token_ids(self) -> tuple[int, ...]:
        """Every token that ends a text; empty when the config names none."""
        if self.eos_token_id is None:
            return ()
        return self.eos_token_id if isinstance(self.eos_token_id, tuple) else (self.eos_token_id,)

    @property
    def rotary_frequencies(self) -> tuple[float, ...]:
        """The H/2 inverse frequencies theta**(-2i/H), float32 numbers shared by every framework and precision.

        The power is evaluated in double and rounded to float32, then its reciprocal: for SmolLM2's configs these are
        the bits of transformers' `inv_freq`. NumPy's and XLA's own float32 powers are one ulp off at some of them
        (5 of 32 for the released 135M), which moves logits at long context by ten times the float32 noise.
        Source: Su et al. 2021 (RoFormer), section 3.2; transformers, modeling_rope_utils.py.
        """
        exponents = (_float32(index / self.head_dim) for index in range(0, self.head_dim, 2))
        return tuple(_float32(1.0 / _float32(self.rope_theta**exponent)) for exponent in exponents)

    @classmethod
    def from_hf(cls, config: dict[str, Any]) -> "Config":
        """The config a Hugging Face `config.json` describes, in its old (rope_theta) or new (rope_parameters) spelling.

        Raises `UsageError` for a key this model cannot honour, so that nothing in the file is ignored in silence.
        Source: transformers, models/llama/configuration_llama.py.
        """
        if not isinstance(config, dict):
            raise UsageError(f"config must be a JSON object, got {type(config).__name__}")
        for key, value in config.items():
            if type(key) is not str or type(value) not in (str, int, float, bool, list, tuple, dict, type(None)):
                raise UsageError(f"config key {shown(key)}={shown(value)} is not JSON")
        values = dict(config)
        _drop_what_changes_nothing(values)
        dtypes = {key: _dtype(key, values.pop(key)) for key in ("dtype", "torch_dtype") if values.get(key) is not None}
        thetas = {"rope_theta": values.pop("rope_theta", None)}
        for key in ("rope_parameters", "rope_scaling"):  # the new spelling, and the old one's place for variants
            thetas[f"{key}.rope_theta"] = _plain_theta(key, values.pop(key, None))
        thetas = {key: theta for key, theta in thetas.items() if theta is not None}
        for key, theta in thetas.items():
            if type(theta) not in (int, float):
                raise UsageError(f"config key {key} must be a number, got {shown(theta)}")
        for same in (dtypes, thetas):
            if len(set(same.values())) > 1:
                raise UsageError("config keys disagree: " + ", ".join(f"{k}={shown(v)}" for k, v in same.items()))
        values |= {"rope_theta": theta for theta in thetas.values()}  # noqa: B035  # they agree
        _fill_in(values)
        names = {field.name for field in dataclasses.fields(cls)}
        if unknown := sorted(key for key in set(values) - names if values[key] is not None):
            raise UsageError(f"config has keys this model cannot honour: {shown(', '.join(unknown))}")
        if missing := sorted(names - set(values)):
            raise UsageError(f"config lacks {', '.join(missing)}: no model constant is guessed")
        return cls(**{name: values[name] for name in names})

    def special_token_ids(self) -> dict[str, Any]:
        """The ids of bos, eos and pad that the config names, as Hugging Face's JSON has them."""
        eos = list(self.eos_token_id) if isinstance(self.eos_token_id, tuple) else self.eos_token_id
        ids = {"bos_token_id": self.bos_token_id, "eos_token_id": eos, "pad_token_id": self.pad_token_id}
        return {name: value for name, value in ids.items() if value is not None}

    def to_hf(self, dtype: str = "float32") -> dict[str, Any]:
        """A Hugging Face `config.json` as a dict, in the old and the new spelling: every reader finds its own."""
        config = dataclasses.asdict(self) | self.special_token_ids()
        return config | {
            "architectures": ["LlamaForCausalLM"],
            "model_type": "llama",
            "hidden_act": "silu",
            "attention_bias": False,
            "attention_dropout": 0.0,
            "mlp_bias": False,
            "rope_scaling": None,
            "rope_parameters": {"rope_type": "default", "rope_theta": self.rope_theta},
            "torch_dtype": dtype,
            "dtype": dtype,
            "use_cache": True,
        }


def _drop_what_changes_nothing(values: dict[str, Any]) -> None:
    """Removes the keys that leave what the model computes as it is; `UsageError` for one whose value does not."""
    if values.get("use_sliding_window") is False:
        values.pop("sliding_window", None)
    for key, allowed in config_keys.FIXED.items():
        value = values.pop(key, allowed[0])
        if value is None and key not in ("model_type", "hidden_act"):
            continue
        if not any(type(value) is type(good) and value == good for good in allowed):  # 0 == False in Python
            raise UsageError(f"config key {key}={shown(value)} is not supported, only {allowed[0]!r} is")
    for key, allowed in config_keys.FIXED_LISTS.items():
        value = values.pop(key, None)
        if value is not None and (type(value) is not list or any(item not in allowed for item in value)):
            raise UsageError(f"config key {key}={shown(value)} is not supported, only {[allowed[0]]} is")
    if code := values.pop("auto_map", None):
        raise UsageError(
            f"config key auto_map={shown(code)} names Python code that comes with the weights: it may "
            "compute something else and is never run; remove the key if the weights are a plain Llama's"
        )
    for key in list(values):
        nothing = key in config_keys.BOOKKEEPING or key in config_keys.GENERATION or key.startswith("unsloth_")
        if nothing or (key in config_keys.FACTORS and type(values[key]) in (int, float) and values[key] == 1):
            del values[key]


def _dtype(key: str, dtype: Any) -> str:
    """The name of a dtype that a config gives, where some programs write PyTorch's "torch.bfloat16"."""
    name = dtype.removeprefix("torch.") if type(dtype) is str else dtype
    name = DTYPE_ALIASES.get(name, name) if type(name) is str else name
    if name not in (*DTYPES, "auto"):  # "auto": as the tensors are, which is what a reader does anyway
        raise UsageError(f"config key {key} must be one of {', '.join(DTYPES)}, got {shown(dtype)}")
    return name


def _plain_theta(key: str, parameters: Any) -> Any:
    """The theta in one of the spellings of rotary parameters, None where it has none.

    Linear scaling by 1 and a partial rotary embedding of the whole head are plain ones.
    """
    if parameters is None:
        return None
    if type(parameters) is not dict:
        raise UsageError(f"config key {key} must be an object, got {shown(parameters)}")
    values = dict(parameters)
    theta = values.pop("rope_theta", None)
    kinds = [kind for kind in (values.pop("rope_type", None), values.pop("type", None)) if kind is not None]
    allowed = ("default", "linear") if values.get("factor") is not None else ("default",)
    for name in ("original_max_position_embeddings", "finetuned"):  # how it was before a scaling that is none
        values.pop(name, None)
    factors = [values.pop(name, None) for name in ("factor", "attention_factor", "partial_rotary_factor")]
    ones = all(factor is None or (type(factor) in (int, float) and factor == 1) for factor in factors)
    plain = ones and all(kind in allowed and kind == kinds[0] for kind in kinds)
    if not plain or any(value is not None for value in values.values()):
        raise UsageError(f"config key {key}={shown(parameters)} is not supported, only plain rotary embeddings are")
    return theta


def _fill_in(values: dict[str, Any]) -> None:
    """What LlamaConfig itself does with keys that a file leaves out; -1 for a token is an old spelling of none."""
    for key in ("bos_token_id", "eos_token_id", "pad_token_id"):
        token = values.setdefault(key, None)
        if type(token) is int and token == -1:  # Llama 1's pad_token_id: transformers warns, and no token is it
            values[key] = None
        elif type(token) is list and key == "eos_token_id":
            values[key] = [i for i in token if type(i) is not int or i != -1]
    if type(values.get("num_attention_heads")) is int and values["num_attention_heads"] > 0:
        if values.get("num_key_value_heads") is None:
            values["num_key_value_heads"] = values["num_attention_heads"]
        if values.get("head_dim") is None and type(values.get("hidden_size")) is int:
            values["head_dim"], remainder = divmod(values["hidden_size"], values["num_attention_heads"])
            if remainder:
                raise UsageError("config lacks head_dim, and num_attention_heads does not divide hidden_size")


def _float32(x: float) -> float:
    return struct.unpack("f", struct.pack("f", x))[0]


def _preset(hidden, mlp, layers, heads, kv_heads, theta, positions, std, **changes) -> Config:
    values = {
        "vocab_size": 49_152,
        "hidden_size": hidden,
        "intermediate_size": mlp,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "head_dim": 64,
        "max_position_embeddings": positions,
        "rope_theta": theta,
        "rms_norm_eps": 1e-5,
        "initializer_range": std,
        "tie_word_embeddings": True,
        "bos_token_id": 0,
        "eos_token_id": 0,
        "pad_token_id": None,
    }
    return Config(**(values | changes))


# Sources: the released config.json of each model; for "-pretrain" huggingface/smollm,
# text/pretraining/smollm2/config_smollm2_135M.yaml. The two 135M configs differ in theta and length only.
PRESETS: dict[str, Config] = {
    "smollm2-135m": _preset(576, 1536, 30, 9, 3, 100_000.0, 8192, 1 / 24),
    "smollm2-135m-pretrain": _preset(576, 1536, 30, 9, 3, 10_000.0, 2048, 1 / 24),
    "smollm2-360m": _preset(960, 2560, 32, 15, 5, 100_000.0, 8192, 0.02),
    "smollm2-1.7b": _preset(2048, 8192, 24, 32, 32, 130_000.0, 8192, 0.02),
    # For tests: real vocabulary, two KV heads of three query heads each, every size distinct but D = N x H.
    "tiny": _preset(96, 256, 3, 6, 2, 100_000.0, 512, 96**-0.5, head_dim=16),
}


def preset(name: str) -> Config:
    """The named preset; raises `UsageError` with the known names otherwise."""
    if name not in PRESETS:
        raise UsageError(f"unknown preset {name!r}, known: {', '.join(PRESETS)}")
    return PRESETS[name]
