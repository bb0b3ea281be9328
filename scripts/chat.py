"""Talk with Instruct weights in the terminal."""

from smollm_jax.commands.chat import main
from smollm_jax.runtime.program import run_main

if __name__ == "__main__":
    run_main(main)
