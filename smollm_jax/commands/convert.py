"""Convert SmolLM2 weights between formats, bit for bit unless --type asks for less.

    python scripts/convert_weights.py runs/my-run exported/ --to hf                 # for transformers, vLLM, ...
    python scripts/convert_weights.py assets/SmolLM2-135M-Instruct twin.pt          # for the PyTorch twin
    python scripts/convert_weights.py twin.safetensors jax-weights/ --to orbax      # for JAX
    python scripts/convert_weights.py model.gguf model/ --to hf                     # dequantised to float32
    python scripts/convert_weights.py runs/my-run my-run.gguf --type q8_0           # for llama.cpp

SRC: a run folder or one step under its checkpoints/, a Hugging Face folder, a .pt, .safetensors or .gguf file.
DST must not exist; it is written whole or not at all. A file's kind is its suffix, a folder's is given with --to.
"""

import dataclasses
from pathlib import Path
from typing import Literal

import tyro

from smollm_jax import errors
from smollm_jax.commands import command_line


@dataclasses.dataclass(frozen=True)
class Flags:
    src: tyro.conf.Positional[Path]
    """Weights to read."""
    dst: tyro.conf.Positional[Path]
    """Where to write them."""
    to: Literal["orbax", "hf", "pt", "safetensors", "gguf"] | None = None
    """Kind of DST; needed for a folder."""
    type: Literal["f32", "f16", "bf16", "q8_0"] | None = None
    """How a GGUF holds its matrices; default: what keeps every bit. Its norms are float32."""
    tokenizer: Path | None = None
    """Folder with tokenizer.json (or a GGUF), for weights that have none of their own."""
    allow_unverified: bool = False
    """Read a checkpoint that has no integrity.json."""
    debug: bool = False
    """Show a traceback instead of one line when something goes wrong."""


def main(argv: list[str] | None = None) -> None:
    flags = command_line.parse(Flags, argv, __doc__, weights=("src",))
    suffixes: dict[str, Literal["pt", "safetensors", "gguf"]]
    suffixes = {".pt": "pt", ".safetensors": "safetensors", ".gguf": "gguf"}
    if not flags.src.exists():
        raise errors.InputFileError(f"{flags.src}: no such file or folder")
    kind = flags.to or suffixes.get(flags.dst.suffix.lower())
    if kind is None:
        raise errors.UsageError(
            f"{flags.dst}: which kind? Add --to hf or --to orbax, or a suffix .pt, .safetensors or .gguf"
        )
    if flags.dst.exists():
        raise errors.UsageError(f"{flags.dst}: exists already; name another target or remove it first")
    if flags.type and kind != "gguf":
        raise errors.UsageError(f"--type {flags.type} is for GGUF files; {flags.dst} is to be {kind}")
    from smollm_jax import weights
    from smollm_jax.tokenizer import Tokenizer

    chosen = Tokenizer.of_weights(flags.src, flags.tokenizer) if flags.tokenizer else None
    bundle = weights.read(flags.src, allow_unverified=flags.allow_unverified)
    if chosen:
        bundle.tokenizer_files = chosen.files
    weights.write(flags.dst, bundle, kind, gguf_type=flags.type)
    numbers = sum(tensor.size for tensor in bundle.tensors.values())
    print(
        f"{flags.dst}: {len(bundle.tensors)} tensors, {numbers:,} parameters, {flags.type or bundle.dtype}, kind {kind}"
    )
    if kind == "gguf":
        from smollm_jax.weights.gguf_writer import rounding_error

        share = rounding_error(bundle.tensors, weights.read(flags.dst).tensors)
        print(f"what it lost: {f'{share:.2e} of the weights, RMS' if share else 'no bit'}")
    if bundle.tokenizer_files and kind in ("pt", "safetensors"):
        print(f"the tokenizer stays in {flags.src}: a {flags.dst.suffix} file holds weights and config only")
    if not bundle.tokenizer_files and kind in ("hf", "orbax"):
        print(f"{flags.src} has no tokenizer that is read here, and so {flags.dst} has none: --tokenizer names one")
