"""Fine-tune SmolLM2 on chats."""

from smollm_jax.commands.finetune import main
from smollm_jax.runtime.program import run_main

if __name__ == "__main__":
    run_main(main)
