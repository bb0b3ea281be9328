"""Convert SmolLM2 weights between formats, bit for bit unless --type asks for less.

    python scripts/convert_weights.py runs/my-run exported/ --to hf                 # for transformers, vLLM, ...
    python scripts/convert_weights.py assets/SmolLM2-135M-Instruct twin.pt          # for the PyTorch twin
    python scripts/convert_weights.py twin.safetensors jax-weights/ --to orbax      # for JAX
    python scripts/convert_weights.py model.gguf model/ --to hf                     # dequantised to float32
    python scripts/convert_weights.py runs/my-run my-run.gguf --type q8_0           # for llama.cpp
    python scripts/convert_weights.py runs/my-lora my-lora.gguf --to gguf-adapter   # for llama.cpp's --lora

SRC: a run folder or one step under its checkpoints/, a Hugging Face folder, a .pt, .safetensors or .gguf file.
DST must not exist; it is written completely or not at all. The suffix of a file sets its format, --to that of a folder.
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
    """File or folder to write."""
    adapter: Path | None = None
    """A LoRA adapter to merge into SRC: a folder in peft's layout, or a run that trained one."""
    to: Literal["orbax", "hf", "pt", "safetensors", "gguf", "gguf-adapter"] | None = None
    """Format of DST; required for a folder. gguf-adapter: the LoRA adapter of SRC alone, for llama.cpp's --lora."""
    type: Literal["f32", "f16", "bf16", "q8_0"] | None = None
    """Type of the matrices in a GGUF. Default: that of the weights, which keeps every bit. Norms are float32."""
    tokenizer: Path | None = None
    """Folder with tokenizer.json (or a GGUF), for weights that have none of their own."""
    allow_unverified: bool = False
    """Read a checkpoint that has no integrity.json."""
    debug: bool = False
    """Show a traceback instead of one line when something goes wrong."""


GROUPS = {
    "weights": ("src", "dst", "adapter", "tokenizer", "allow_unverified"),
    "format": ("to", "type"),
    "other": ("debug",),
}


def main(argv: list[str] | None = None) -> None:
    flags = command_line.parse(Flags, argv, __doc__, weights=("src",))
    suffixes: dict[str, Literal["pt", "safetensors", "gguf"]]
    suffixes = {".pt": "pt", ".safetensors": "safetensors", ".gguf": "gguf"}
    if not flags.src.exists():
        raise errors.InputFileError(f"{flags.src}: no such file or folder")
    target_format = flags.to or suffixes.get(flags.dst.suffix.lower())
    if target_format is None:
        raise errors.UsageError(
            f"{flags.dst}: unknown format: add --to hf or --to orbax, or a suffix .pt, .safetensors or .gguf"
        )
    if flags.dst.exists():
        raise errors.UsageError(f"{flags.dst}: exists already; name another target or remove it first")
    if flags.type and target_format != "gguf":
        raise errors.UsageError(f"--type {flags.type} is for GGUF files; the format of {flags.dst} is {target_format}")
    if target_format == "gguf-adapter":
        write_adapter_alone(flags)
        return
    from smollm_jax import weights
    from smollm_jax.tokenizer import Tokenizer

    tokenizer = Tokenizer.of_weights(flags.src, flags.tokenizer) if flags.tokenizer else None
    bundle = weights.read(flags.src, allow_unverified=flags.allow_unverified, adapter=flags.adapter)
    if tokenizer:
        bundle.tokenizer_files = tokenizer.files
    weights.write(flags.dst, bundle, target_format, gguf_type=flags.type)
    count = sum(tensor.size for tensor in bundle.tensors.values())
    dtype = flags.type or bundle.dtype
    print(f"{flags.dst}: {len(bundle.tensors)} tensors, {count:,} parameters, {dtype}, format {target_format}")
    if target_format == "gguf":
        from smollm_jax.weights.gguf_writer import rounding_error

        error = rounding_error(bundle.tensors, weights.read(flags.dst).tensors)
        print(f"rounding error: {f'{error:.2e} of the weights, RMS' if error else 'none, every bit is kept'}")
    if bundle.tokenizer_files and target_format in ("pt", "safetensors"):
        print(f"the tokenizer stays in {flags.src}: a {flags.dst.suffix} file holds weights and config only")
    if not bundle.tokenizer_files and target_format in ("hf", "orbax"):
        print(f"{flags.dst} has no tokenizer, because none was found in {flags.src}: name one with --tokenizer")


def write_adapter_alone(flags: Flags) -> None:
    """Writes the adapter of SRC, a run or a folder in peft's layout, as a GGUF of its own."""
    from smollm_jax.weights.adapted import adapter_and_config
    from smollm_jax.weights.gguf_adapter import write_gguf_adapter

    if flags.adapter or flags.tokenizer:
        raise errors.UsageError("--to gguf-adapter writes the adapter of SRC: leave --adapter and --tokenizer out")
    adapter, config = adapter_and_config(flags.src)
    write_gguf_adapter(flags.dst, adapter, config)
    count = sum(a.size + b.size for a, b in adapter.tensors.values())
    print(f"{flags.dst}: an adapter of rank {adapter.rank}, {count:,} parameters, for {adapter.base or 'its base'}")
