"""What a model in training writes after a prompt: a line at each validation, and the likeliest tokens at the end."""

import dataclasses
import itertools

import jax
import jax.numpy as jnp
import numpy as np

from smollm_jax.config import Config
from smollm_jax.errors import UsageError
from smollm_jax.generation.generate import generate
from smollm_jax.generation.programs import PAD_ID
from smollm_jax.model.smollm import SmolLM
from smollm_jax.parallel import processes
from smollm_jax.runtime.signals import StopSignal
from smollm_jax.tokenizer import Tokenizer

NEW_TOKENS = 32


@dataclasses.dataclass(frozen=True)
class Sampler:
    """A prompt and what continues it; `start` is its tokens."""

    prompt: str
    start: tuple[int, ...]
    tokenizer: Tokenizer
    stop: StopSignal

    @classmethod
    def of(cls, prompt: str, tokenizer: Tokenizer, config: Config, stop: StopSignal) -> "Sampler":
        """For a model of this config; an empty prompt begins with the token that begins a document.

        Raises `UsageError` when there is no such token, and when prompt and new tokens exceed the context.
        """
        start = tokenizer.encode(prompt, add_special_tokens=True)
        if not start:
            first = config.bos_token_id if config.bos_token_id is not None else next(iter(config.eos_token_ids), None)
            if first is None:
                raise UsageError('--prompt "": the config has no bos_token_id or eos_token_id to begin with')
            start = [first]
        most = config.max_position_embeddings - NEW_TOKENS
        if len(start) > most:
            raise UsageError(
                f"--prompt: {len(start)} tokens, of which the context of {config.max_position_embeddings} has room for "
                f"{max(most, 0)} before {NEW_TOKENS} new ones"
            )
        return cls(prompt, tuple(start), tokenizer, stop)

    def continued(self, model: SmolLM) -> str | None:
        """The greedy continuation; None when a signal came in between."""
        ids = [list(self.start)]
        pieces = generate(model, ids, max_new_tokens=NEW_TOKENS, eos_token_ids=model.config.eos_token_ids)
        new = np.concatenate([np.empty((1, 0), int), *itertools.takewhile(lambda _: not self.stop, pieces)], axis=1)[0]
        return None if self.stop else self.tokenizer.decode(new[new != PAD_ID])

    def line(self, model: SmolLM) -> str | None:
        """Prompt and continuation in one line; None when a signal came in between.

        Parameters that are sharded over a mesh are gathered for it: each device holds all of them for that time.
        """
        if self.stop:
            return None
        try:
            text = self.continued(processes.gather_to_local_device(model))
        except jax.errors.JaxRuntimeError as error:  # no memory left for it: the training goes on
            return f"no sample: {str(error).splitlines()[0]}"
        return None if text is None else f"sample: {self.prompt!r} -> {text!r}"

    def show(self, model: SmolLM) -> None:
        """Prints the continuation and the likeliest next tokens, unless a signal comes in between."""
        text = self.continued(model)
        if text is None:
            return
        print(f"\n{self.prompt} -> {text!r}")
        ids = jnp.asarray([self.start])
        probability = jax.nn.softmax(jax.jit(lambda model, ids: model(ids)[0, -1])(model, ids))
        likeliest = [int(i) for i in jnp.argsort(-probability)[:5]]
        shown = [f"{self.tokenizer.decode([token])!r} {float(probability[token]):.3f}" for token in likeliest]
        print(f"predicted next token: {', '.join(shown)}")
