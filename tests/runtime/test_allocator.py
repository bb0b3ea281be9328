"""What glibc does with freed memory, measured by page faults and resident sizes of processes."""

import json
import os
import subprocess
import sys
from types import SimpleNamespace

import pytest

from smollm_jax.runtime import allocator
from smollm_jax.training import memory
from tests.trainer import ENVIRONMENT, ROOT, command
from tests.training.test_memory import WITHIN, setting

SIZE = 64 << 20
PROGRAM = """
import ctypes, json, resource, sys, threading
from pathlib import Path
from smollm_jax.runtime import allocator

allocator.DRIVER = Path("no GPU")
libc = ctypes.CDLL(None)
libc.malloc.restype = ctypes.c_void_p

def write():
    begin = ctypes.c_void_p(libc.malloc(SIZE))
    libc.memset(begin, 1, SIZE)
    libc.free(begin)

def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    write()
    thread = threading.Thread(target=write)
    thread.start()
    thread.join()
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

def resident():
    return int(Path("/proc/self/statm").read_text().split()[1])

results = {}
for call in sys.argv[1:]:
    result = getattr(allocator, call)() if call != "nothing" else None
    results[call] = [result, faults(), faults(), resident()]
print(json.dumps(results))
""".replace("SIZE", str(SIZE))


def measure(*calls: str, **variables: str) -> dict[str, list]:
    """For each call: its result, the page faults of writing 64 MB twice, of doing so again, and the resident pages."""
    clean = {name: value for name, value in os.environ.items() if name != "GLIBC_TUNABLES"}
    environment = clean | {"PYTHONPATH": str(ROOT)} | variables
    result = subprocess.run(
        [sys.executable, "-c", PROGRAM, *calls], env=environment, capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout)


def test_retained_memory_causes_no_page_faults_in_any_thread():
    pages = SIZE // os.sysconf("SC_PAGE_SIZE")
    assert min(measure("nothing")["nothing"][1:3]) > 2 * pages
    results = measure("retain_freed_memory", "restore_defaults")
    retained, first, second, held = results["retain_freed_memory"]
    assert retained is True
    assert pages <= first < 1.1 * pages, "the second thread reuses what the first freed"
    assert second < pages / 100
    _, first, second, resident = results["restore_defaults"]
    assert min(first, second) > 2 * pages
    assert held - resident > 0.9 * pages, "retained memory was returned to the system"


def test_glibc_tunables_are_respected():
    results = measure("retain_freed_memory", GLIBC_TUNABLES="glibc.malloc.tcache_count=7")
    retained, _, second, _ = results["retain_freed_memory"]
    assert retained is False
    assert second > SIZE // os.sysconf("SC_PAGE_SIZE")


def test_nothing_changes_with_a_gpu(monkeypatch, tmp_path):
    monkeypatch.delenv("GLIBC_TUNABLES", raising=False)
    monkeypatch.setattr(allocator, "DRIVER", tmp_path)
    calls = []
    fake = SimpleNamespace(gnu_get_libc_version=None, mallopt=lambda *arguments: calls.append(arguments))
    monkeypatch.setattr(allocator, "_libc", fake)
    assert allocator.retain_freed_memory() is False
    assert not calls


@pytest.mark.slow
@pytest.mark.parametrize("share", [0.4, 0.6])
def test_the_trainer_retains_memory_when_its_plan_is_less_than_half_of_the_free_memory(tmp_path, share):
    python, _, *flags = command(tmp_path / "run", "--batch-size", "2", "--steps", "1", "--eval-every", "0")
    limit = int(memory.estimate(*setting("tiny 2 64 dots float32 1 -")).total / share)
    program = [python, "-c", WITHIN, str(ROOT), str(limit), *flags]
    environment = {name: value for name, value in ENVIRONMENT.items() if name != "GLIBC_TUNABLES"}
    result = subprocess.run(program, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    assert "GB on each device (estimated), remat dots (chosen; --remat changes that)" in result.stdout
    assert ("; freed memory is reused\n" in result.stdout) == (share < 0.5)
