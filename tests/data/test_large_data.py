"""Data far larger than memory opens quickly, and reading it holds little of it in memory."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np

from smollm_jax.data.token_file import TokenSet, write_manifest, write_token_file

ROOT = Path(__file__).parents[2]
GB = 10**9
READ = """
import sys, time
from pathlib import Path
from smollm_jax.data.batches import Batches, Mixture
from smollm_jax.config.recipe import Recipe
from smollm_jax.data.token_file import TokenSet

def resident():
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM")) / 1e3

before = resident()
data = Mixture(((TokenSet.open(Path(sys.argv[1])),),))
batches = Batches(data, Recipe(10**9, 8, 2048, 1e-3, 0, "float32"))
for step in (0, 1, 10**6, 10**9):
    assert batches.batch(step).shape == (8, 2049)
assert sum(len(batch) for batch in batches.validation(8)) == 64
print(batches.windows, data.location, resident() - before, sep="\\n")
"""


def test_50_gb_are_opened_and_read_in_little_memory(tmp_path):
    metadata = {"tokenizer_sha256": "ab" * 32, "eos_token_id": 0}
    names = ["000000-0000", "000000-0001"]
    for name in names:
        folder = tmp_path / "set" / name
        write_token_file(folder, [np.array([1, 0], np.uint16)], metadata, (0,))
        with (folder / "tokens.bin").open("r+b") as file:
            file.truncate(25 * GB)  # a hole, which takes no room
        sidecar = json.loads((folder / "tokens.json").read_text())
        (folder / "tokens.json").write_text(json.dumps(sidecar | {"tokens": 25 * GB // 2}))
    write_manifest(tmp_path / "set", names, metadata)
    assert not TokenSet.open(tmp_path / "set").verified
    command = [sys.executable, "-c", READ, tmp_path / "set"]
    result = subprocess.run(list(map(str, command)), cwd=ROOT, capture_output=True, text=True, check=False, timeout=60)
    assert result.returncode == 0, result.stderr
    windows, location, megabytes = result.stdout.splitlines()
    assert int(windows) == 2 * ((25 * GB // 2 - 25 * GB // 200 - 1) // 2048)
    assert location.endswith(f"set; to check every byte: prepare_data.py --verify {tmp_path / 'set'}")
    assert float(megabytes) < 100
