"""Train SmolLM2 on text."""

from smollm_jax.commands.train import main
from smollm_jax.runtime.program import run_main

if __name__ == "__main__":
    run_main(main)
