"""The summary at the end of a test run, and that every file of the test order exists."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.reporting import LADDER, LONGEST, place, sort_key

ROOT = Path(__file__).parent.parent
SUITE = {
    "tests/data/test_a.py": "def test_one(): pass\ndef test_two(): assert False\n",
    "parity_tests/test_3_b.py": "import time\ndef test_three(): time.sleep(0.3)\n",
    **{file: "import os\ndef test_it(): open(os.environ['PYTEST_XDIST_WORKER'], 'a').write('x')\n" for file in LADDER},
    "tests/web/test_c.py": "import pytest\n@pytest.mark.skip('no browser: install one')\ndef test_four(): pass\n",
}


def test_every_file_of_the_order_exists():
    assert all((ROOT / file).is_file() for file in LADDER + LONGEST)


@pytest.mark.parametrize(
    ("nodeid", "name"),
    [
        ("parity_tests/test_3_bfloat16.py::test_x[a/b]", "rung 3 bfloat16"),
        ("parity_tests/test_chat_template.py::test_x", "parity chat template"),
        ("tests/web/test_app.py::test_x", "web"),
        ("tests/test_layers.py::test_x", "project"),
    ],
)
def test_a_test_belongs_to_a_rung_or_a_package(nodeid, name):
    assert place(nodeid) == name


def test_rungs_come_first_by_number():
    names = ["web", "parity tokenizer", "rung 10 family", "rung 2 float32", "data"]
    assert sorted(names, key=sort_key) == ["rung 2 float32", "rung 10 family", "parity tokenizer", "data", "web"]


def test_a_run_says_what_it_showed_what_it_did_not_check_and_what_took_longest(tmp_path):
    for name, content in SUITE.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(content)
    (tmp_path / "pytest.ini").write_text("[pytest]\naddopts = -q -p tests.reporting\n")
    result = subprocess.run(
        [sys.executable, "-m", "pytest", "-n", "2", "--dist", "loadfile", "--no-loadscope-reorder"],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(ROOT), "SMOLLM_WITHOUT_TORCH": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 1
    assert [path.read_text() for path in tmp_path.glob("gw?")] == ["x" * len(LADDER)], "one worker has the ladder"
    lines = [" ".join(line.split()) for line in result.stdout.splitlines()]
    assert any(re.fullmatch(r"rung 3 b 1 claims hold \d+ s", line) for line in lines), result.stdout
    assert any(re.fullmatch(r"data 1 claims hold, 1 FAILED \d+ s", line) for line in lines), result.stdout
    assert "not checked: 1 tests of web: no browser: install one" in lines
    assert any(line.startswith("not checked: what needs PyTorch") for line in lines), result.stdout
    assert any(line.startswith("slowest: parity_tests/test_3_b.py::test_three") for line in lines), result.stdout


def test_a_file_that_cannot_be_imported_is_reported_as_that(tmp_path):
    (tmp_path / "tests").mkdir()
    (tmp_path / "tests/test_a.py").write_text("import no_such_module\n")
    (tmp_path / "tests/test_b.py").write_text("def test_one(): pass\n")
    (tmp_path / "pytest.ini").write_text("[pytest]\naddopts = -q -p tests.reporting --continue-on-collection-errors\n")
    result = subprocess.run(
        [sys.executable, "-m", "pytest"],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert "No module named 'no_such_module'" in result.stdout
    assert "INTERNALERROR" not in result.stdout + result.stderr
    assert re.search(r"project +1 claims hold", result.stdout), result.stdout
