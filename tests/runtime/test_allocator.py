"""What glibc does with freed memory, seen in the page faults and the size of processes that are told what to do."""

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

said = {}
for call in sys.argv[1:]:
    said[call] = [getattr(allocator, call)() if call != "nothing" else None, faults(), faults(), resident()]
print(json.dumps(said))
""".replace("SIZE", str(SIZE))


def told(*calls: str, **variables: str) -> dict[str, list]:
    """Of each call: what it says, pages touched anew by two times 64 MB after it and once more, and pages held then."""
    clean = {name: value for name, value in os.environ.items() if name != "GLIBC_TUNABLES"}
    environment = clean | {"PYTHONPATH": str(ROOT)} | variables
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, *calls], env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_what_is_kept_is_not_touched_anew_by_any_thread():
    pages = SIZE // os.sysconf("SC_PAGE_SIZE")
    assert min(told("nothing")["nothing"][1:3]) > 2 * pages
    said = told("keep", "give_back")
    kept, first, again, held = said["keep"]
    assert kept is True
    assert pages <= first < 1.1 * pages, "the thread takes what the first freed"
    assert again < pages / 100
    _, first, again, resident = said["give_back"]
    assert min(first, again) > 2 * pages
    assert held - resident > 0.9 * pages, "what was kept is the system's again"


def test_glibc_is_left_alone_where_its_own_variable_says_what_to_do():
    said = told("keep", GLIBC_TUNABLES="glibc.malloc.tcache_count=7")
    assert said["keep"][0] is False
    assert said["keep"][2] > SIZE // os.sysconf("SC_PAGE_SIZE")


def test_glibc_is_left_alone_beside_a_gpu(monkeypatch, tmp_path):
    monkeypatch.delenv("GLIBC_TUNABLES", raising=False)
    monkeypatch.setattr(allocator, "DRIVER", tmp_path)
    told = []
    monkeypatch.setattr(
        allocator, "_libc", SimpleNamespace(gnu_get_libc_version=None, mallopt=lambda *of: told.append(of))
    )
    assert allocator.keep() is False
    assert not told


@pytest.mark.parametrize("share", [0.4, 0.6])
def test_the_trainer_keeps_what_is_less_than_half_of_what_is_free(tmp_path, share):
    python, _, *flags = command(tmp_path / "run", "--batch-size", "2", "--steps", "1", "--eval-every", "0")
    limit = int(memory.plan(*setting("tiny 2 64 dots float32 1 -")).total / share)
    program = [python, "-c", WITHIN, str(ROOT), str(limit), *flags]
    environment = {name: value for name, value in ENVIRONMENT.items() if name != "GLIBC_TUNABLES"}
    done = subprocess.run(program, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "GB, on each device, remat dots (chosen; --remat changes that)" in done.stdout
    assert ("; what a step frees is kept\n" in done.stdout) == (share < 0.5)
