"""Check every file of a run's checkpoints against the sizes and hashes stored with it."""

from smollm_jax.commands.verify import main
from smollm_jax.runtime.program import run_main

if __name__ == "__main__":
    run_main(main)
