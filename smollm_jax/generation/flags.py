"""The sampling flags of generate.py and chat.py. Imports no JAX, so that --help is quick."""

import dataclasses
from typing import TYPE_CHECKING, Annotated, Any

import tyro

if TYPE_CHECKING:
    from smollm_jax.config.generation_config import GenerationConfig
    from smollm_jax.generation.sampling import Sampling


@dataclasses.dataclass(frozen=True)
class SamplingFlags:
    """The fields of `Sampling`, also by mlx-lm's names. The default is the weights' own value, else no filtering."""

    temperature: Annotated[float | None, tyro.conf.arg(aliases=["--temp"])] = None
    """0 is greedy, the default where the weights' generation_config.json does not ask for sampling."""
    top_k: int | None = None
    """Keep the k likeliest tokens; 0 keeps all."""
    top_p: float | None = None
    """Keep the likeliest tokens up to this total probability; 1 keeps all."""
    min_p: float | None = None
    """Keep tokens with at least this fraction of the largest probability; 0 keeps all."""
    repetition_penalty: float | None = None
    """Above 1 makes tokens that occur in the prompt or the text less likely."""
    seed: int = 0
    """Same seed, same text. In a chat, the seed of the first answer; each later answer uses the next seed."""

    def given(self) -> dict[str, Any]:
        """The fields that the user gave."""
        return {name: value for name, value in dataclasses.asdict(self).items() if value is not None}

    def checked(self) -> "Sampling":
        """The given fields as a `Sampling`; raises `UsageError` for an invalid one before weights are read."""
        from smollm_jax.generation.sampling import Sampling

        return Sampling(**self.given())

    def over(self, generation: "GenerationConfig") -> "Sampling":
        """The weights' own sampling parameters, overridden by the given fields."""
        from smollm_jax.generation.sampling import Sampling

        return Sampling(**(generation.sampling | self.given()))

    def said(self, generation: "GenerationConfig") -> str:
        """One line with the sampling parameters and where they come from."""
        from smollm_jax.config.generation_config import describe_sampling

        sampling = generation.sampling | {name: value for name, value in self.given().items() if name != "seed"}
        flags = "flags" if sampling != generation.sampling else ""
        sources = " and ".join(filter(None, [generation.source, flags]))
        return f"sampling: {describe_sampling(sampling)}" + (f" ({sources})" if sources else "")
