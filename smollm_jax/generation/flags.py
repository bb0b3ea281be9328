"""How the next token is chosen, as flags of generate.py and chat.py. Imports no JAX, so that --help is quick."""

import dataclasses
from typing import TYPE_CHECKING, Annotated, Any

import tyro

if TYPE_CHECKING:
    from smollm_jax.config.generation_config import GenerationConfig
    from smollm_jax.generation.sampling import Sampling


@dataclasses.dataclass(frozen=True)
class SamplingFlags:
    """The fields of `Sampling`, by mlx-lm's names too. One left out is the weights' own, else what keeps all tokens."""

    temperature: Annotated[float | None, tyro.conf.arg(aliases=["--temp"])] = None
    """0 is greedy, the default where the weights' generation_config.json does not ask for sampling."""
    top_k: int | None = None
    """Keep the k likeliest tokens; 0 keeps all."""
    top_p: float | None = None
    """Keep the likeliest tokens up to this total probability; 1 keeps all."""
    min_p: float | None = None
    """Keep tokens with at least this part of the likeliest one's probability; 0 keeps all."""
    repetition_penalty: float | None = None
    """Above 1 makes tokens of the prompt and of the text less likely."""
    seed: int = 0
    """Same seed, same text. In a chat that of the first answer: each later one takes the next."""

    def given(self) -> dict[str, Any]:
        """The fields that were given."""
        return {name: value for name, value in dataclasses.asdict(self).items() if value is not None}

    def checked(self) -> "Sampling":
        """The given fields alone; raises `UsageError` naming the one that makes no sense, before weights are read."""
        from smollm_jax.generation.sampling import Sampling

        return Sampling(**self.given())

    def over(self, generation: "GenerationConfig") -> "Sampling":
        """The weights' own way of sampling with the given fields instead of theirs."""
        from smollm_jax.generation.sampling import Sampling

        return Sampling(**(generation.sampling | self.given()))

    def said(self, generation: "GenerationConfig") -> str:
        """One line on how the next token is chosen and who says so."""
        from smollm_jax.config.generation_config import describe_sampling

        chosen = generation.sampling | {name: value for name, value in self.given().items() if name != "seed"}
        flags = chosen != generation.sampling
        whose = " and ".join(filter(None, [generation.source, "flags" if flags else ""]))
        return f"sampling: {describe_sampling(chosen)}" + (f" ({whose})" if whose else "")
