"""Programs are compiled once, broken entries are compiled again, and a cache that others can write is refused."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from smollm_jax.errors import UsageError
from smollm_jax.runtime import compilation_cache

ROOT = Path(__file__).parents[2]
PROGRAM = """
import jax, jax.monitoring, jax.numpy as jnp
from smollm_jax.runtime import compilation_cache
compilation_cache.enable()
events = []
jax.monitoring.register_event_listener(lambda name, **_: events.append(name))
print(float(jax.jit(lambda x: jnp.sin(x) @ x)(jnp.ones((8, 8)))[0, 0]))
print(sum(name.endswith("cache_hits") for name in events), sum(name.endswith("cache_misses") for name in events))
"""


def start(home: Path, **variables: str) -> subprocess.CompletedProcess:
    environment = {name: value for name, value in os.environ.items() if not name.startswith("JAX_COMPILATION")}
    environment |= {"XDG_CACHE_HOME": str(home), "PYTHONPATH": str(ROOT), **variables}
    return subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True, check=False, env=environment)


def test_a_second_start_compiles_nothing_and_a_broken_entry_is_compiled_again(tmp_path):
    first, second = start(tmp_path), start(tmp_path)
    value, counts = first.stdout.split("\n")[:2]
    assert counts.startswith("0 "), first.stderr
    assert second.stdout.split("\n")[:2] == [value, f"{counts.split()[1]} 0"]
    entries = sorted((tmp_path / "smollm-jax/compiled").glob("*/*-cache"))
    assert entries
    for entry in entries:  # what kill -9 or a full disk leaves
        entry.write_bytes(entry.read_bytes()[:-9])
    third, fourth = start(tmp_path), start(tmp_path)
    assert third.stdout == first.stdout
    assert third.stderr == "", "JAX warned of the broken entry"
    assert fourth.stdout == second.stdout


def test_a_folder_that_others_can_write_is_refused(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.delenv("JAX_COMPILATION_CACHE_DIR", raising=False)
    compilation_cache.folder().mkdir(parents=True)
    compilation_cache.folder().chmod(0o777)
    with pytest.raises(UsageError, match="other users can write compiled programs"):
        compilation_cache.enable()


def test_jax_compilation_cache_dir_is_respected(tmp_path):
    result = start(tmp_path / "home", JAX_COMPILATION_CACHE_DIR=str(tmp_path / "mine"))
    assert result.returncode == 0, result.stderr
    assert not (tmp_path / "home").exists()


def test_nothing_fails_without_a_writable_home(tmp_path):
    (tmp_path / "file").write_text("")
    result = start(tmp_path / "file")
    assert result.returncode == 0, result.stderr
