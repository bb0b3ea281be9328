"""Draw a run's loss, learning rate and throughput to a PNG."""

from smollm_jax.commands.plot import main
from smollm_jax.runtime.program import run_main

if __name__ == "__main__":
    run_main(main)
