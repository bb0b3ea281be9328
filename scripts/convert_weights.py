"""Convert SmolLM2 weights between formats, bit for bit unless --type asks for less."""

from smollm_jax.commands.convert import main
from smollm_jax.runtime.program import run_main

if __name__ == "__main__":
    run_main(main)
