"""Write a model's programs and weights into one file that JAX runs without this package."""

from smollm_jax.commands.export import main
from smollm_jax.runtime.program import run_main

if __name__ == "__main__":
    run_main(main)
