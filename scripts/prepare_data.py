"""Tokenize text, JSON and tables into a data set for training: sharded token files with a manifest, on all cores."""

from smollm_jax.commands.prepare import main
from smollm_jax.runtime.program import run_main

if __name__ == "__main__":
    run_main(main)
