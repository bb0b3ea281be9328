"""Every malformed file gives a one-line error that names file and fault, within 2 seconds and 3 GiB.

python -m tests.test_hostile_files FOLDER   # all cases under that memory limit, timed
"""

import functools
import json
import os
import re
import resource
import shutil
import subprocess
import sys
import time
import tracemalloc
from collections.abc import Callable
from pathlib import Path

import pytest

from smollm_jax import weights
from smollm_jax.config.hf_config import config_to_hf, read_config
from smollm_jax.data.mixture import Mixture, open_mixture
from smollm_jax.data.text import documents
from smollm_jax.errors import InputFileError
from smollm_jax.tokenizer import Tokenizer
from tests.hostile_data import ARROW, COMPRESSED, PARQUET, SETS
from tests.hostile_texts import CONFIG, JSON, PICKLES, STRANGERS, TABLES, TEXT, TOKENS
from tests.hostile_tokenizers import TEMPLATE, TOKENIZER, TOKENIZER_CONFIG, VOCABULARY
from tests.hostile_weights import GGUF, SAFETENSORS, Cases
from tests.small_files import SMALL, small_tensors, tokenizer_folder, write_gguf

ROOT = Path(__file__).parent.parent


def prepare(path: Path) -> Mixture:
    return open_mixture(path, path.parent / "tokenizer", path.parent / "cache")


def chat(path: Path) -> list[int]:
    return Tokenizer.load(path).apply_chat_template([{"role": "user", "content": "Hi"}])


KINDS: dict[str, tuple[Cases, Callable[[Path], object]]] = {
    "safetensors": (SAFETENSORS, weights.read),
    "safetensors, mapped": (SAFETENSORS, functools.partial(weights.read, mapped=True)),
    "gguf": (GGUF, weights.read),
    "tokenizer": (TOKENIZER, Tokenizer.load),
    "tokenizer_config": (TOKENIZER_CONFIG, Tokenizer.load),
    "vocabulary": (VOCABULARY, Tokenizer.load),
    "template": (TEMPLATE, chat),
    "config": (CONFIG, read_config),
    "tokens": (TOKENS, prepare),
    "text": (TEXT, prepare),
    "compressed": (COMPRESSED, prepare),
    "no text": (STRANGERS, prepare),
    "table": (TABLES, prepare),
    "json": (JSON, prepare),
    "parquet": (PARQUET, prepare),
    "arrow": (ARROW, prepare),
    "set": (SETS, prepare),
    "pickle": (PICKLES, weights.read),
}
ALL = [(kind, name) for kind, (cases, _) in KINDS.items() for name in cases]


@pytest.mark.parametrize(("kind", "name"), ALL, ids=lambda value: value)
def test_a_malformed_file_is_refused_in_one_line_that_names_it(tmp_path, capfd, kind, name):
    cases, read = KINDS[kind]
    write, named = cases[name]
    path = write(tmp_path)
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(InputFileError, match=named) as raised:
        read(path)
    message = str(raised.value)
    assert message.startswith(str(path)), message
    assert message.isprintable(), "not one line"
    assert len(message) < 3000
    assert capfd.readouterr() == ("", ""), "a library spoke too"
    assert sorted(p for p in tmp_path.rglob("*") if p.name != "cache") == before, "something ran, or was left behind"
    assert not (tmp_path / "it ran").exists()


@pytest.fixture(scope="module")
def limited(tmp_path_factory) -> dict[str, dict[str, float]]:
    """The seconds that each case of each kind takes, in a process limited to 3 GiB."""
    command = [sys.executable, "-m", "tests.test_hostile_files", str(tmp_path_factory.mktemp("limited"))]
    result = subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT, timeout=600)
    assert result.returncode == 0, result.stderr[-2000:]
    return json.loads(result.stdout)


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_no_malformed_file_takes_two_seconds_or_three_gibibytes(limited, kind):
    assert limited[kind].keys() == KINDS[kind][0].keys()
    assert max(limited[kind].values()) < 2, limited[kind]


def main(folder: str) -> None:
    limit = 3 << 30
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    seconds: dict[str, dict[str, float]] = {kind: {} for kind in KINDS}
    for index, (kind, name) in enumerate(ALL):
        cases, read = KINDS[kind]
        write, named = cases[name]
        place = Path(folder) / str(index)
        place.mkdir()
        path = write(place)
        began = time.process_time()  # of the processor: a busy machine's clock says nothing
        try:
            read(path)
        except InputFileError as error:
            seconds[kind][name] = time.process_time() - began
            if not re.search(named, str(error)):  # out of memory, say
                raise
        shutil.rmtree(place)
    print(json.dumps(seconds))


@pytest.mark.parametrize("name", ["x.txt", "x.jsonl"])
def test_a_line_of_100_mb_is_found_out_within_one_line_allowed(tmp_path, name):
    write, named = TEXT["one line of 100 MB" if name == "x.txt" else "JSONL, one line of 100 MB"]
    path = write(tmp_path)
    tracemalloc.start()
    with pytest.raises(InputFileError, match=named):
        list(documents(path))
    assert tracemalloc.get_traced_memory()[1] < 40 << 20
    tracemalloc.stop()


def test_the_files_that_the_malformed_ones_were_made_from_are_well_formed(tmp_path):
    write_gguf(tmp_path / "x.gguf", SMALL, small_tensors())
    bundle = weights.read(tmp_path / "x.gguf")
    assert {name: t.tobytes() for name, t in bundle.tensors.items()} == {
        name: t.tobytes() for name, t in small_tensors().items()
    }
    weights.write(tmp_path / "x.safetensors", bundle, "safetensors")
    assert weights.read(tmp_path / "x.safetensors").tensors.keys() == bundle.tensors.keys()
    (tmp_path / "config.json").write_text(json.dumps(config_to_hf(SMALL)))
    assert read_config(tmp_path / "config.json") == SMALL
    assert Tokenizer.load(tokenizer_folder(tmp_path / "tokenizer")).vocab_size == 260
    (tmp_path / "x.txt").write_text("the text")
    assert prepare(tmp_path / "x.txt").sets[0].files[0].tokens.tolist()[-1] == 0


SCRIPT = (
    "import sys, pathlib; from smollm_jax.runtime.program import run_main; from tests.test_hostile_files import KINDS\n"
)
CALL = SCRIPT + "run_main(lambda: KINDS[sys.argv[1]][1](pathlib.Path(sys.argv[2])))"


@pytest.mark.parametrize(
    ("kind", "name"),
    [
        ("safetensors", "truncated"),
        ("safetensors", "two tensors swapped"),
        ("gguf", "an array of 2**60 bytes"),
        ("pickle", "a folder of pytorch_model.bin"),
        ("tokenizer", "pieces of 0 characters (panics)"),
        ("tokens", "an id beyond the vocabulary"),
        ("text", "UTF-16 without a mark"),
    ],
)
def test_the_user_sees_one_line_and_exit_code_3(tmp_path, kind, name):
    write, named = KINDS[kind][0][name]
    path = write(tmp_path)
    convert = [str(ROOT / "scripts/convert_weights.py"), str(path), str(tmp_path / "out.safetensors")]
    command = convert if KINDS[kind][1] is weights.read else ["-c", CALL, kind, str(path)]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "RUST_BACKTRACE": "1"}
    result = subprocess.run(
        [sys.executable, *command], capture_output=True, text=True, check=False, cwd=tmp_path, env=environment
    )
    assert result.returncode == 3, result.stderr
    assert re.fullmatch(f"error: {re.escape(str(path))}.*{named}.*\n", result.stderr), result.stderr
    assert result.stdout == ""
    assert not (tmp_path / "out.safetensors").exists()


if __name__ == "__main__":
    main(*sys.argv[1:])
