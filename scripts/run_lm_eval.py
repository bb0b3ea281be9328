"""Score weights on tasks of EleutherAI's lm-evaluation-harness (extra "eval")."""

from smollm_jax.commands.lm_eval import main
from smollm_jax.runtime.program import run_main

if __name__ == "__main__":
    run_main(main)
