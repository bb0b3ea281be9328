"""Estimate the memory per device that a training step needs, for each remat policy."""

from smollm_jax.commands.plan_memory import main
from smollm_jax.runtime.program import run_main

if __name__ == "__main__":
    run_main(main)
