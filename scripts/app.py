"""A web page to complete texts, to chat, and to watch training runs."""

from smollm_jax.commands.app import main
from smollm_jax.runtime.program import run_main

if __name__ == "__main__":
    run_main(main)
