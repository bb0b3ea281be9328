"""Continue texts with any SmolLM2 weights."""

from smollm_jax.commands.generate import main
from smollm_jax.runtime.program import run_main

if __name__ == "__main__":
    run_main(main)
