"""Convert SmolLM2 weights between formats, bit for bit.

    python scripts/convert_weights.py runs/my-run exported/ --to hf                 # for transformers, vLLM, ...
    python scripts/convert_weights.py assets/SmolLM2-135M-Instruct twin.pt          # for the PyTorch twin
    python scripts/convert_weights.py twin.safetensors jax-weights/ --to orbax      # for JAX
    python scripts/convert_weights.py model.gguf model/ --to hf                     # dequantised to float32

SRC: a run folder or one step under its checkpoints/, a Hugging Face folder, a .pt, .safetensors or .gguf file.
DST must not exist; it is written whole or not at all. A file's kind is its suffix, a folder's is given with --to.
"""

import dataclasses
from pathlib import Path
from typing import Literal

import tyro

from smollm_jax import errors


@dataclasses.dataclass(frozen=True)
class Flags:
    src: tyro.conf.Positional[Path]
    """Weights to read."""
    dst: tyro.conf.Positional[Path]
    """Where to write them."""
    to: Literal["orbax", "hf", "pt", "safetensors"] | None = None
    """Kind of DST; needed for a folder."""
    allow_unverified: bool = False
    """Read a checkpoint that has no integrity.json."""
    debug: bool = False
    """Show a traceback instead of one line when something goes wrong."""


def main(argv: list[str] | None = None) -> None:
    flags = tyro.cli(Flags, args=argv, description=__doc__)
    suffixes: dict[str, Literal["pt", "safetensors"]] = {".pt": "pt", ".safetensors": "safetensors"}
    kind = flags.to or suffixes.get(flags.dst.suffix)
    if kind is None:
        raise errors.UsageError(f"{flags.dst}: which kind? Add --to hf or --to orbax, or a suffix .pt or .safetensors")
    if flags.dst.exists():
        raise errors.UsageError(f"{flags.dst}: exists already; name another target or remove it first")
    from smollm_jax import weights

    bundle = weights.read(flags.src, allow_unverified=flags.allow_unverified)
    weights.write(flags.dst, bundle, kind)
    numbers = sum(tensor.size for tensor in bundle.tensors.values())
    print(f"{flags.dst}: {len(bundle.tensors)} tensors, {numbers:,} parameters, {bundle.dtype}, kind {kind}")
    if bundle.tokenizer_files and kind in ("pt", "safetensors"):
        print(f"the tokenizer stays in {flags.src}: a {flags.dst.suffix} file holds weights and config only")


if __name__ == "__main__":
    errors.run(main)
