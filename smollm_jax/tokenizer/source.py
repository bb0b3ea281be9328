"""Finds and reads a tokenizer's files: in a folder, next to a weights file, or in the metadata of a GGUF.

Imports no framework.
"""

from pathlib import Path

from smollm_jax.errors import InputFileError
from smollm_jax.runtime.files import read_bytes
from smollm_jax.tokenizer.chat_template import NAMED_TEMPLATES
from smollm_jax.tokenizer.tokenizer_json import MAX_BYTES

FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
    "chat_template.json",
)
TEMPLATES = NAMED_TEMPLATES.rstrip("/")
MAX_TEMPLATES = 64


def read_tokenizer_files(folder: Path) -> dict[str, bytes]:
    """The contents of the tokenizer files in a folder, by name; empty when it has none."""
    names = [name for name in FILES if (folder / name).exists()]
    named = sorted((folder / TEMPLATES).glob("*.jinja"))
    if len(named) > MAX_TEMPLATES:
        raise InputFileError(f"{folder / TEMPLATES}: has {len(named)} templates, at most {MAX_TEMPLATES} are read")
    names += [f"{TEMPLATES}/{path.name}" for path in named]
    return {name: read_bytes(folder / name, MAX_BYTES) for name in names}


def has_tokenizer(folder: Path) -> bool:
    """Whether a folder holds a tokenizer: `tokenizer.json`, or the older `vocab.json` with `merges.txt`."""
    return any(all((folder / name).is_file() for name in names) for names in (FILES[:1], ("vocab.json", "merges.txt")))


def is_gguf(path: Path) -> bool:
    """Whether a path is a GGUF file, which contains its own tokenizer."""
    return path.suffix.lower() == ".gguf" and path.is_file()


def own_tokenizer(weights: Path) -> Path | None:
    """The path of the tokenizer that belongs to some weights; None if they have none.

    For a GGUF it is the file itself, for a Hugging Face folder or a run folder that folder, for a step of a run the run
    folder, and for a `.pt` or `.safetensors` file its folder. Parent folders are not searched, because a tokenizer
    there belongs to something else.
    """
    if is_gguf(weights):
        return weights
    folder = run_folder(weights) or (weights.parent if weights.is_file() else weights)
    return folder if has_tokenizer(folder) else None


def run_folder(weights: Path) -> Path | None:
    """The run folder of a step `RUN/checkpoints/STEP`; None for any other path.

    A Hugging Face folder or a run folder may also be in a folder called checkpoints: it is not a step.
    """
    if not weights.is_dir() or weights.parent.name != "checkpoints" or not weights.name.isdigit():
        return None
    not_a_step = (weights / "checkpoints").is_dir() or any(weights.glob("model*.safetensors"))
    return None if not_a_step else weights.parent.parent


def tokenizer_files_at(path: Path) -> dict[str, bytes]:
    """The tokenizer files of a folder, a `tokenizer.json` or a GGUF.

    Raises `InputFileError` if there is no tokenizer, or if a GGUF's is of an unsupported kind.
    """
    if is_gguf(path):
        from smollm_jax.tokenizer.gguf import read_gguf_tokenizer

        return read_gguf_tokenizer(path)
    folder = path.parent if path.name == "tokenizer.json" else path
    if not has_tokenizer(folder):
        raise InputFileError(
            f"{folder / 'tokenizer.json'}: no such file; `python scripts/fetch_assets.py tokenizer` fetches SmolLM2's"
        )
    return read_tokenizer_files(folder)
