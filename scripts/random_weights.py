"""Write random weights of a preset with a fixed seed: the training init, the same on every machine of a kind.

    python scripts/random_weights.py --preset smollm2-135m --out random/ --tokenizer assets/tokenizer

For benchmarks without the real weights: shapes and speed are the same, generated text is noise.
"""

import dataclasses
from pathlib import Path

from smollm_jax.commands import command_line
from smollm_jax.runtime.program import run_main


@dataclasses.dataclass(frozen=True)
class Flags:
    preset: str
    """Model shape: see smollm_jax/config/presets.py."""
    out: Path
    """Hugging Face folder to write; must not exist."""
    tokenizer: Path | None = None
    """Folder (or GGUF) whose tokenizer is included."""
    seed: int = 0
    """Random seed."""
    debug: bool = False
    """Show a traceback instead of one line when something goes wrong."""


def main(argv: list[str] | None = None) -> None:
    flags = command_line.parse(Flags, argv, __doc__)
    from smollm_jax import weights
    from smollm_jax.config import preset
    from smollm_jax.tokenizer.source import tokenizer_files_at
    from smollm_jax.training.state import init_model

    files = tokenizer_files_at(flags.tokenizer) if flags.tokenizer else {}
    model = init_model(preset(flags.preset), flags.seed)
    weights.write(flags.out, weights.to_bundle(model, f"random, recipe's init, seed {flags.seed}", files), "hf")
    print(f"{flags.out}: written")


if __name__ == "__main__":
    run_main(main)
