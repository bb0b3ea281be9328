"""A server of OpenAI's API for any SmolLM2 weights."""

from smollm_jax.commands.serve import main
from smollm_jax.runtime.program import run_main

if __name__ == "__main__":
    run_main(main)
