"""Continue a text with any SmolLM2 weights.

    python scripts/generate.py --weights assets/SmolLM2-135M-Instruct --prompt "The capital of France is"
    python scripts/generate.py --weights runs/my-run --prompt "Fellow citizens" --temperature 0.8 --top-p 0.95

Weights: a run folder or one step under its checkpoints/, a Hugging Face folder, a .pt, .safetensors or .gguf file.
Greedy unless --temperature is given; streams the text as it comes, and prints the speed at the end on stderr.
"""

import dataclasses
import sys
import time
from pathlib import Path
from typing import Annotated, Literal

import tyro

from smollm_jax import errors


@dataclasses.dataclass(frozen=True)
class Flags:
    prompt: str
    """The text to continue."""
    weights: Annotated[Path, tyro.conf.arg(aliases=["--checkpoint-path"])]
    """Weights of any kind."""
    max_new_tokens: Annotated[int, tyro.conf.arg(aliases=["--max-tokens"])] = 64
    """Tokens to add at most."""
    temperature: Annotated[float, tyro.conf.arg(aliases=["--temp"])] = 0.0
    """0 is greedy."""
    top_k: int = 0
    """Keep the k likeliest tokens; 0 keeps all."""
    top_p: float = 1.0
    """Keep the likeliest tokens up to this total probability."""
    seed: int = 0
    """Same seed, same text."""
    chat: bool = False
    """Ask as the user of a chat (Instruct weights)."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Of the weights and the cache."""
    tokenizer: Path | None = None
    """Folder with tokenizer.json; default: the weights', else assets/tokenizer."""
    debug: bool = False
    """Show a traceback instead of one line when something goes wrong."""


def main(argv: list[str] | None = None) -> None:
    flags = tyro.cli(Flags, args=argv, description=__doc__)
    import jax
    import jax.numpy as jnp

    from smollm_jax import compilation_cache

    compilation_cache.enable()
    if flags.dtype == "float32":  # on a GPU JAX's default is TF32
        jax.config.update("jax_default_matmul_precision", "float32")
    from smollm_jax import weights
    from smollm_jax.generate import NO_TOKEN, Sampling, generate
    from smollm_jax.tokenizer import TextStream, Tokenizer, folder_beside

    sampling = Sampling(flags.temperature, flags.top_k, flags.top_p, flags.seed)
    model, config = weights.load(flags.weights, jnp.dtype(flags.dtype))
    tokenizer = Tokenizer.load(flags.tokenizer or folder_beside(flags.weights))
    if flags.chat:
        ids = tokenizer.apply_chat_template([{"role": "user", "content": flags.prompt}])
    else:
        ids = tokenizer.encode(flags.prompt)
    pieces = generate(
        model, [ids], max_new_tokens=flags.max_new_tokens, sampling=sampling, eos_token_ids=config.eos_token_ids
    )
    if not flags.chat:
        print(flags.prompt, end="", flush=True)
    stream, count, began = TextStream(tokenizer), 0, None
    for piece in pieces:
        new = [int(token) for token in piece[0] if token != NO_TOKEN]
        print(stream.add(token for token in new if token not in config.eos_token_ids), end="", flush=True)
        count += len(new)
        began = began or (time.perf_counter(), count)  # the first piece compiled
    print(stream.end())
    if began and count > began[1]:
        rate = (count - began[1]) / (time.perf_counter() - began[0])
        print(f"{count} tokens, {rate:.1f} tokens/s after the first {began[1]}", file=sys.stderr)


if __name__ == "__main__":
    errors.run(main)
