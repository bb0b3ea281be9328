"""The commands of README and docs work, start light, and fail in one line."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from smollm_jax import weights
from smollm_jax.commands import generate

ROOT = Path(__file__).parents[2]
SCRIPTS = sorted(path for path in (ROOT / "scripts").glob("*.py") if "run_main(main)" in path.read_text("utf-8"))
REAL = ROOT / "assets/SmolLM2-135M-Instruct"


def run(*command: str, cwd: Path = ROOT, **options: Any) -> subprocess.CompletedProcess:
    environment = os.environ | {"PYTHONPATH": str(ROOT)} | options.pop("env", {})
    options = {"capture_output": True, "text": True, "check": False} | options
    return subprocess.run([sys.executable, *map(str, command)], cwd=cwd, env=environment, **options)


# A process for each script, forked from one that has imported what prints the help. Their output goes to one folder.
HELP = """
import os, runpy, sys, tyro, rich.console, rich.markdown
sys.path[0], out, *scripts = sys.argv[1:]  # the folder of the scripts, as when one is run by its path
for script in scripts:
    if child := os.fork():
        os.waitpid(child, 0)
        continue
    name = os.path.basename(script)
    os.dup2(os.open(f"{out}/{name}.out", os.O_CREAT | os.O_WRONLY), 1)
    os.dup2(os.open(f"{out}/{name}.err", os.O_CREAT | os.O_WRONLY), 2)
    sys.argv = ["x", "--help"]
    try:
        runpy.run_path(script, run_name="__main__")
    except SystemExit as stop:
        assert stop.code == 0
    heavy = {"jax", "torch", "orbax", "transformers", "matplotlib", "numpy"} & set(sys.modules)
    assert not heavy, heavy
    sys.stdout.flush()
    open(f"{out}/{name}.whole", "w").close()
    os._exit(0)
"""


@pytest.fixture(scope="module")
def helps(tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("help")
    result = run("-c", HELP, str(ROOT / "scripts"), str(out), *map(str, SCRIPTS))
    assert result.returncode == 0, result.stderr
    return out


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_help_imports_no_framework(helps, script):
    assert (helps / f"{script.name}.whole").exists(), (helps / f"{script.name}.err").read_text()
    shown = (helps / f"{script.name}.out").read_text()
    assert "python scripts/" in shown, "the help shows no exact command"


def test_importing_the_package_and_the_config_imports_no_framework():
    result = run(
        "-c",
        "import sys, smollm_jax.config.model, smollm_jax.config.recipe; assert not {'jax', 'numpy'} & set(sys.modules)",
    )
    assert result.returncode == 0, result.stderr


def test_generate_answers_from_the_real_weights():
    result = run(
        "scripts/generate.py", "--weights", REAL, "--prompt", "The capital of France is", "--max-new-tokens", "8"
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout.startswith("The capital of France is Paris.")
    assert "tokens/s" in result.stderr


@pytest.mark.slow
def test_generate_samples_and_takes_weights_by_their_other_name():
    flags = ("--checkpoint_path", REAL, "--prompt", "Hi", "--temperature", "0.8", "--seed", "1")
    assert "tokens/s" in run("scripts/generate.py", *flags).stderr


def test_convert_goes_round_through_every_kind(tmp_path, tiny_model):
    bundle = weights.to_bundle(tiny_model, "tiny")
    weights.write(tmp_path / "start", bundle, "hf")
    for src, dst, to in (("start", "b", "orbax"), ("b", "c.safetensors", None), ("c.safetensors", "d", "hf")):
        result = run("scripts/convert_weights.py", tmp_path / src, tmp_path / dst, *(["--to", to] if to else []))
        assert result.returncode == 0, result.stderr
        assert (f"has no tokenizer, because none was found in {tmp_path / src}: " in result.stdout) is bool(to)
    a, b = (tmp_path / name / "model.safetensors" for name in ("start", "d"))
    assert a.read_bytes() == b.read_bytes()


@pytest.mark.parametrize(
    ("arguments", "code", "named"),
    [
        (["nowhere", "x.pt"], 3, "nowhere"),
        (["nowhere", "x"], 3, "nowhere"),
        ([str(REAL), "x"], 2, "--to"),
        ([str(REAL), str(ROOT), "--to", "hf"], 2, "exists already"),
        ([str(ROOT / "assets/sotu"), "x.pt"], 3, "sotu"),
    ],
)
def test_convert_fails_in_one_line(tmp_path, arguments, code, named):
    result = run(ROOT / "scripts/convert_weights.py", *arguments, cwd=tmp_path)
    assert result.returncode == code
    assert named in result.stderr
    assert len(result.stderr.strip().splitlines()) == 1
    assert list(tmp_path.iterdir()) == []


def test_a_prompt_file_and_stdin_may_begin_with_a_byte_order_mark(tmp_path, monkeypatch):
    (tmp_path / "x.txt").write_text("Él said", encoding="utf-8-sig")
    flags = generate.Flags(weights=tmp_path, prompt_file=(tmp_path / "x.txt",))
    assert generate.read_prompts(flags) == ["Él said"]
    with (tmp_path / "x.txt").open(encoding="utf-8") as stdin:
        monkeypatch.setattr("sys.stdin", stdin)
        assert generate.read_prompts(generate.Flags(weights=tmp_path)) == ["Él said"]


def test_a_file_that_could_not_be_written_is_called_by_its_own_name(tmp_path):
    (tmp_path / "a.txt").touch()
    program = (
        "from pathlib import Path; from smollm_jax.runtime.atomic import replacing; "
        "from smollm_jax.runtime.program import run_main\n"
        "def main():\n    with replacing(Path('a.txt/x.gguf')) as file: file.touch()\n"
        "run_main(main)"
    )
    result = run("-c", program, cwd=tmp_path)
    assert (result.returncode, result.stderr) == (5, "error: [Errno 20] Not a directory: 'a.txt/x.gguf'\n")


def test_debug_shows_the_traceback():
    result = run("scripts/convert_weights.py", "nowhere", "x.pt", "--debug")
    assert result.returncode == 1
    assert "Traceback" in result.stderr


def test_plot_draws_a_run(tmp_path):
    step = {"learning_rate": 0.1, "tokens_per_second": 5.0}
    rows = [json.dumps(step | {"step": i, "loss": 9 / i}) for i in (1, 2, 3)]
    rows.append('{"step": 3, "validation_loss": 2.5, "validation_perplexity": 12.2}')
    (tmp_path / "metrics.jsonl").write_text("\n".join(rows))
    result = run("scripts/plot_run.py", tmp_path, tmp_path, "--out", tmp_path / "two.png")
    assert result.returncode == 0, result.stderr
    assert (tmp_path / "two.png").read_bytes().startswith(b"\x89PNG")
    (tmp_path / "metrics.jsonl").write_text("not json")
    result = run("scripts/plot_run.py", tmp_path)
    assert result.returncode == 3
    assert "line 1" in result.stderr
