"""Continues a prompt with the model in training: one line at each validation, and the likeliest tokens at the end."""

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
    """A prompt (`prompt_ids` are its tokens) to be continued."""

    prompt: str
    prompt_ids: tuple[int, ...]
    tokenizer: Tokenizer
    stop: StopSignal

    @classmethod
    def for_prompt(cls, prompt: str, tokenizer: Tokenizer, config: Config, stop: StopSignal) -> "Sampler":
        """A sampler for models of `config`; an empty prompt becomes the bos token, or eos if there is no bos.

        Raises `UsageError` if there is neither, and if prompt and new tokens exceed the context.
        """
        prompt_ids = tokenizer.encode(prompt, add_special_tokens=True)
        if not prompt_ids:
            first = config.bos_token_id if config.bos_token_id is not None else next(iter(config.eos_token_ids), None)
            if first is None:
                raise UsageError('--prompt "": the config has neither bos_token_id nor eos_token_id to start from')
            prompt_ids = [first]
        longest = config.max_position_embeddings - NEW_TOKENS
        if len(prompt_ids) > longest:
            raise UsageError(
                f"--prompt has {len(prompt_ids)} tokens, at most {max(longest, 0)} are allowed: the context of "
                f"{config.max_position_embeddings} must also hold {NEW_TOKENS} new tokens"
            )
        return cls(prompt, tuple(prompt_ids), tokenizer, stop)

    def continuation(self, model: SmolLM) -> str | None:
        """The greedy continuation; None if a signal arrives meanwhile."""
        ids = [list(self.prompt_ids)]
        pieces = generate(model, ids, max_new_tokens=NEW_TOKENS, eos_token_ids=model.config.eos_token_ids)
        new = np.concatenate([np.empty((1, 0), int), *itertools.takewhile(lambda _: not self.stop, pieces)], axis=1)[0]
        return None if self.stop else self.tokenizer.decode(new[new != PAD_ID])

    def line(self, model: SmolLM) -> str | None:
        """Prompt and continuation in one line; None if a signal arrives meanwhile.

        Sharded parameters are gathered meanwhile, so that every device holds all of them.
        """
        if self.stop:
            return None
        try:
            text = self.continuation(processes.gather_to_local_device(model))
        except jax.errors.JaxRuntimeError as error:  # out of memory: training goes on without a sample
            return f"no sample: {str(error).splitlines()[0]}"
        return None if text is None else f"sample: {self.prompt!r} -> {text!r}"

    def print_final(self, model: SmolLM) -> None:
        """Prints the continuation and the likeliest next tokens; nothing if a signal arrives meanwhile."""
        text = self.continuation(model)
        if text is None:
            return
        print(f"\n{self.prompt} -> {text!r}")
        ids = jnp.asarray([self.prompt_ids])
        probability = jax.nn.softmax(jax.jit(lambda model, ids: model(ids)[0, -1])(model, ids))
        likeliest = [int(i) for i in jnp.argsort(-probability)[:5]]
        tokens = [f"{self.tokenizer.decode([token])!r} {float(probability[token]):.3f}" for token in likeliest]
        print(f"predicted next token: {', '.join(tokens)}")
