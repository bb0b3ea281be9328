"""docs/tour.ipynb runs unchanged, cell by cell, and prints the outputs that it stores."""

import json
import re
import subprocess
import sys

import pytest

from tests.trainer import ENVIRONMENT, ROOT

TOUR = ROOT / "docs/tour.ipynb"
MARK = "---- end of cell ----"
# Runs the cells that it reads from stdin one after another in one namespace, as Jupyter does.
RUNNER = f"""
import json, sys
namespace = {{"__name__": "__main__"}}
for number, source in enumerate(json.load(sys.stdin), 1):
    exec(compile(source, f"cell {{number}}", "exec"), namespace)
    print("{MARK}", flush=True)
"""
NUMBER = re.compile(r"-?\d+(?:,\d{3})*(?:\.\d+)?(?:e-?\d+)?")


def code_cells() -> list[dict]:
    return [cell for cell in json.loads(TOUR.read_text(encoding="utf-8"))["cells"] if cell["cell_type"] == "code"]


def printed(cell: dict) -> str:
    """The output of a cell stored in the notebook."""
    return "".join("".join(output["text"]) for output in cell["outputs"] if output["output_type"] == "stream")


def numbers(text: str) -> list[float]:
    return [float(number.replace(",", "")) for number in NUMBER.findall(text)]


def words(text: str) -> list[str]:
    """A text without its numbers and bars."""
    return NUMBER.sub("", text).replace("#", "").split()


@pytest.mark.slow
def test_the_tour_runs_and_prints_what_it_shows(weights_path, text_path):
    cells = code_cells()
    result = subprocess.run(
        [sys.executable, "-c", RUNNER],
        input=json.dumps(["".join(cell["source"]) for cell in cells]),
        cwd=TOUR.parent,  # where Jupyter starts it
        env=ENVIRONMENT | {"MPLBACKEND": "Agg"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    *outputs, end = result.stdout.split(f"{MARK}\n")
    assert (len(outputs), end) == (len(cells), ""), "every cell has run"
    for cell, output in zip(cells, outputs, strict=True):
        assert words(output) == words(printed(cell))
        # Float32 sums differ from one processor to another, in the last digit that is shown.
        assert numbers(output) == pytest.approx(numbers(printed(cell)), rel=0.02, abs=0.02)


def test_the_tour_is_stored_as_it_ran():
    cells = code_cells()
    assert [cell["execution_count"] for cell in cells] == list(range(1, len(cells) + 1))
    for cell in cells:
        assert cell["outputs"] or "print" not in "".join(cell["source"])
        assert {output["output_type"] for output in cell["outputs"]} <= {"stream", "display_data"}, "no error"
        assert {output.get("name", "stdout") for output in cell["outputs"]} == {"stdout"}, "no warning"
    assert sum("image/png" in output.get("data", {}) for cell in cells for output in cell["outputs"]) == 1
    stored = TOUR.read_text(encoding="utf-8")
    assert not re.search(r"/(?:home|root|tmp|work|Users)/", stored), "no path of one machine"
