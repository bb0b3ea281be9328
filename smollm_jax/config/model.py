"""The model config, shared by the JAX model and its PyTorch twin.

Framework-free: reading a config imports neither jax nor torch. Fields have Hugging Face's names and no defaults,
because a model with a wrong constant (rope_theta 10,000 instead of 100,000, say) runs and gives wrong results.
"""

import dataclasses
import struct
from typing import Any

from smollm_jax.errors import UsageError, short_repr

# Minimum and maximum of each field, so that a config cannot exhaust the memory or divide by zero.
BOUNDS: dict[str, tuple[float, float]] = {
    "vocab_size": (1, 2**20),  # the largest in use have 262,144 entries
    "hidden_size": (1, 2**16),  # Llama 3.1 405B: 16,384
    "intermediate_size": (1, 2**18),  # 53,248 there
    "num_hidden_layers": (1, 1024),  # 126 there
    "num_attention_heads": (1, 1024),  # 128 there
    "num_key_value_heads": (1, 1024),
    "head_dim": (1, 1024),  # 256 in Gemma
    "max_position_embeddings": (1, 2**24),  # 10M tokens is the longest context claimed
    "rope_theta": (1.0, 1e12),  # below 1 the frequencies grow; its powers must fit in float32
    "rms_norm_eps": (1e-30, 1.0),  # smaller ones round to 0 in float32, and a row of zeros would be divided by 0
    "initializer_range": (1e-30, 1e3),
}


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
            value, (minimum, maximum) = getattr(self, field.name), BOUNDS[field.name]
            types, kind = ((int,), "an integer") if field.type is int else ((int, float), "a number")
            if type(value) not in types or not minimum <= value <= maximum:
                allowed = f"{kind} from {minimum:g} to {maximum:.8g}"
                raise UsageError(f"config field {field.name} must be {allowed}, got {short_repr(value)}")
            object.__setattr__(self, field.name, value if field.type is int else float(value))
        if type(self.tie_word_embeddings) is not bool:
            raise UsageError(
                f"config field tie_word_embeddings must be true or false, got {short_repr(self.tie_word_embeddings)}"
            )
        if isinstance(self.eos_token_id, list):
            object.__setattr__(self, "eos_token_id", tuple(self.eos_token_id))
        for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
            value = getattr(self, name)
            for token in value if isinstance(value, tuple) else (value,):
                if token is not None and (type(token) is not int or not 0 <= token < self.vocab_size):
                    raise UsageError(
                        f"config field {name} must be a token id below {self.vocab_size}, got {short_repr(token)}"
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
        """All token ids that end a text; empty when the config has none."""
        if self.eos_token_id is None:
            return ()
        return self.eos_token_id if isinstance(self.eos_token_id, tuple) else (self.eos_token_id,)

    @property
    def rotary_frequencies(self) -> tuple[float, ...]:
        """The H/2 inverse frequencies theta**(-2i/H) as float32, the same for every framework and dtype.

        The power is computed in float64 and rounded to float32, then inverted: for SmolLM2's configs this gives the
        bits of transformers' `inv_freq`. Float32 powers of NumPy and XLA are off by one ulp for some of them (5 of 32
        for the released 135M), which changes logits at long context by ten times the float32 noise.
        Source: Su et al. 2021 (RoFormer), section 3.2; transformers, modeling_rope_utils.py.
        """
        exponents = (_float32(index / self.head_dim) for index in range(0, self.head_dim, 2))
        return tuple(_float32(1.0 / _float32(self.rope_theta**exponent)) for exponent in exponents)

    def special_token_ids(self) -> dict[str, Any]:
        """The ids of bos, eos and pad that are not None, by their keys in Hugging Face's JSON."""
        eos = list(self.eos_token_id) if isinstance(self.eos_token_id, tuple) else self.eos_token_id
        ids = {"bos_token_id": self.bos_token_id, "eos_token_id": eos, "pad_token_id": self.pad_token_id}
        return {name: value for name, value in ids.items() if value is not None}


def _float32(x: float) -> float:
    return struct.unpack("f", struct.pack("f", x))[0]
