"""A script keeps its exit code and shows no traceback with closed streams and in any locale."""

import json
import os
import subprocess
import sys

import pytest

from smollm_jax import weights
from smollm_jax.config import preset
from smollm_jax.training.state import init_model
from tests.commands.test_scripts import ROOT, run

SCRIPTS = ROOT / "scripts"
# A script without heavy imports that uses all its streams.
SHORT = (
    "import os, sys\n"
    "from smollm_jax import errors\n"
    "from smollm_jax.runtime import streams\n"
    "from smollm_jax.runtime.program import run_main\n"
    "def main():\n"
    "    opened = os.open('file', os.O_RDWR | os.O_CREAT)\n"
    "    os.system('echo of a child')\n"  # output that bypasses Python
    "    os.system('echo of a child >&2')\n"
    "    assert os.system('test -e /dev/fd/0 -a -e /dev/fd/1 -a -e /dev/fd/2') == 0, 'closed for a child'\n"
    "    print('out', 'é日', flush=True)\n"
    "    print('err', 'é日', file=sys.stderr)\n"
    "    sys.stdin.read()\n"
    "    assert opened > 2 and os.pread(opened, 9, 0) == b'', 'output went into a file'\n"
    "    {}\n"
    "run_main(main)\n"
)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory, tokenizer_path):
    """A folder with the smallest weights and SmolLM2's tokenizer."""
    folder = tmp_path_factory.mktemp("weights") / "tiny"
    files = {path.name: path.read_bytes() for path in tokenizer_path.glob("*.json")}
    weights.write(folder, weights.to_bundle(init_model(preset("tiny"), 0), "tiny", files), "hf")
    return folder


def shell(command: str, cwd, **environment: str) -> subprocess.CompletedProcess:
    """Runs a command line in bash, which sees $python and $scripts."""
    variables = os.environ | {"PYTHONPATH": str(ROOT), "python": sys.executable, "scripts": str(SCRIPTS)} | environment
    variables.pop("PYTHONUNBUFFERED", None)  # so that the flush at exit is tested too
    return subprocess.run(["bash", "-c", command], capture_output=True, check=False, cwd=cwd, env=variables)


@pytest.mark.parametrize("closed", ["<&-", ">&-", "2>&-", "<&- >&-", "<&- >&- 2>&-", ">/dev/full", "2>/dev/full"])
@pytest.mark.parametrize(("last", "code"), [("pass", 0), ("raise errors.LockedError('x')", 6)])
def test_a_closed_or_full_stream_changes_no_exit_code(tmp_path, closed, last, code):
    (tmp_path / "short.py").write_text(SHORT.format(last), encoding="utf-8")
    result = shell(f'"$python" short.py {closed}', tmp_path)
    full = closed == ">/dev/full"
    assert result.returncode == (5 if full else code), result.stderr
    assert b"Traceback" not in result.stderr
    assert b"Exception ignored" not in result.stderr
    if full:
        assert b"error: stdout: cannot be written: No space left on device\n" in result.stderr
    if ">&-" not in closed.replace("2>&-", "") and not full:
        assert result.stdout == "of a child\nout é日\n".encode()


def test_a_closed_pipe_ends_a_script_silently(tmp_path):
    program = "from smollm_jax.runtime.program import run_main; run_main(lambda: print('x\\\\n' * 100_000))"
    result = shell(f'"$python" -c "{program}" 2>err | head -1; echo "${{PIPESTATUS[0]}}"', tmp_path)
    assert result.stdout == b"x\n141\n"
    assert (tmp_path / "err").read_bytes() == b""
    # Output that is written only at exit, when the reader is already gone.
    small = "-c \"from smollm_jax.runtime.program import run_main; run_main(lambda: print('x'))\""
    for script in ('"$scripts/generate.py" --help', small):
        shell(f'{{ sleep 0.5; "$python" {script} 2>err; echo $? >code; }} | true', tmp_path)
        assert (tmp_path / "code").read_bytes() == b"141\n"
        assert (tmp_path / "err").read_bytes() == b""


@pytest.mark.parametrize("encoding", ["latin-1", "ascii", "cp1252"])
def test_a_character_that_the_encoding_lacks_is_written_as_an_escape(tmp_path, encoding):
    (tmp_path / "short.py").write_text(SHORT.format("pass"), encoding="utf-8")
    result = shell('"$python" short.py </dev/null', tmp_path, PYTHONIOENCODING=encoding)
    assert result.returncode == 0
    expected = "out é日\n".encode(encoding, "backslashreplace")
    assert result.stdout == b"of a child\n" + expected
    assert result.stderr.endswith(expected.replace(b"out", b"err"))


@pytest.mark.slow
def test_generate_writes_in_any_encoding_and_json_in_ascii(tmp_path, tiny):
    generate = '"$python" "$scripts/generate.py" --max-new-tokens 3 --weights '
    result = shell(f"{generate} {tiny} --prompt '日本 – ok'", tmp_path, PYTHONIOENCODING="latin-1")
    assert result.returncode == 0, result.stderr
    assert result.stdout.startswith(rb"\u65e5\u672c \u2013 ok")
    ascii_locale = {"LC_ALL": "C", "PYTHONUTF8": "0"}
    result = shell(f"{generate} {tiny} --prompt é日 --json <&- 2>&-", tmp_path, **ascii_locale)
    assert result.returncode == 0
    assert result.stdout.isascii()
    assert json.loads(result.stdout)["completions"][0]["prompt"] == "é日", "an ASCII locale's arguments are UTF-8"


@pytest.mark.parametrize(
    ("command", "code", "expected"),
    [
        ("generate.py --weights x <&-", 2, "give --prompt, --prompt-file or a text on stdin"),
        ("generate.py --weights x --prompt $'\\xff'", 2, "--prompt: byte 0 is not UTF-8"),
        ("generate.py --weights x --prompt a --stop $'b\\xe9'", 2, "--stop: byte 1 is not UTF-8"),
        ("chat.py --weights x --system $'\\xff' <&-", 2, "--system: byte 0 is not UTF-8"),
        ("convert_weights.py $'\\xff' y --to hf", 3, "\\udcff: no such file or folder"),
        ("verify_checkpoint.py $'\\xff' 2>&1 >&-", 4, "\\udcff/checkpoints: no such checkpoint folder"),
    ],
)
def test_an_error_is_one_line_in_any_locale(tmp_path, command, code, expected):
    for environment in ({}, {"LC_ALL": "C", "PYTHONUTF8": "0"}, {"PYTHONIOENCODING": "latin-1"}):
        result = shell(f'"$python" "$scripts/"{command}', tmp_path, **environment)
        message = (result.stderr + result.stdout).decode("latin-1" if "PYTHONIOENCODING" in environment else "utf-8")
        assert result.returncode == code, message
        assert len(message.splitlines()) == 1, message
        assert environment or expected in message


@pytest.mark.slow
def test_a_trainer_without_streams_trains_and_keeps_its_log(tmp_path, tokenizer_path, text_path):
    flags = f"--preset tiny --data {text_path}/1861-Lincoln-1.txt --tokenizer {tokenizer_path} --steps 2 --out run "
    flags += "--sequence-length 32 --batch-size 2"
    result = shell(f'"$python" "$scripts/train_jax.py" {flags} <&- >&- 2>&-', tmp_path)
    assert result.returncode == 0
    rows = [json.loads(row) for row in (tmp_path / "run/metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    assert [row["step"] for row in rows if "loss" in row] == [1, 2]


@pytest.mark.parametrize("platform", ["cuda", "nonsense"])
def test_a_missing_device_is_one_line(tmp_path, tiny, platform):
    target = tmp_path / "run"
    result = run(SCRIPTS / "convert_weights.py", tiny, target, "--to", "orbax", env={"JAX_PLATFORMS": platform})
    assert result.returncode == 2
    assert result.stderr.startswith(f"error: JAX_PLATFORMS={platform}: JAX finds no such device here")
    assert len(result.stderr.splitlines()) == 1
    assert not target.exists()


@pytest.mark.parametrize("setting", ["JAX_ENABLE_X64", "JAX_DEFAULT_MATMUL_PRECISION"])
def test_an_invalid_jax_setting_is_one_line(tmp_path, tiny, setting):
    result = run(SCRIPTS / "convert_weights.py", tiny, tmp_path / "run", "--to", "orbax", env={setting: "perhaps"})
    assert result.returncode == 2
    assert result.stderr.startswith(f"error: environment variable {setting}: ")
    assert len(result.stderr.splitlines()) == 1


def test_an_error_that_does_not_come_from_jax_is_a_bug_with_a_traceback(tmp_path):
    imports = "import jax; from smollm_jax.runtime.program import run_main"
    for bug in ("assert 1 == 2", "raise ValueError('JAX_ENABLE_X64')"):
        result = run("-c", f"{imports}\ndef main(): {bug}\nrun_main(main)")
        assert result.returncode == 1
        assert "Traceback" in result.stderr
