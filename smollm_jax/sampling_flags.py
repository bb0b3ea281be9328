"""How the next token is chosen, as flags of generate.py and chat.py. Imports no JAX, so that --help is quick."""

import dataclasses
from typing import TYPE_CHECKING, Annotated

import tyro

if TYPE_CHECKING:
    from smollm_jax.sampling import Sampling


@dataclasses.dataclass(frozen=True)
class SamplingFlags:
    """The fields of `Sampling`, by mlx-lm's names too."""

    temperature: Annotated[float, tyro.conf.arg(aliases=["--temp"])] = 0.0
    """0 is greedy."""
    top_k: int = 0
    """Keep the k likeliest tokens; 0 keeps all."""
    top_p: float = 1.0
    """Keep the likeliest tokens up to this total probability."""
    min_p: float = 0.0
    """Keep tokens with at least this part of the likeliest one's probability."""
    repetition_penalty: float = 1.0
    """Above 1 makes tokens of the prompt and of the text less likely."""
    seed: int = 0
    """Same seed, same text. In a chat that of the first answer: each later one takes the next."""

    def checked(self) -> "Sampling":
        """The library's own; raises `UsageError` naming the field that makes no sense."""
        from smollm_jax.sampling import Sampling

        return Sampling(**dataclasses.asdict(self))
