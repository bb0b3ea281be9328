"""Check every checkpoint of a run, file by file, against what was written."""

from smollm_jax.commands.verify import main
from smollm_jax.runtime.program import run_main

if __name__ == "__main__":
    run_main(main)
