"""Measure how well weights predict a text: loss, perplexity and bits per byte."""

from smollm_jax.commands.evaluate import main
from smollm_jax.runtime.program import run_main

if __name__ == "__main__":
    run_main(main)
