"""Every file that README and docs name exists, and README's Python example runs unchanged."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.trainer import ENVIRONMENT, ROOT

PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_link_script_and_test_that_a_page_names_exists(page):
    text = page.read_text(encoding="utf-8")
    links = [link for link in re.findall(r"\]\(([^)#]+)", text) if not link.startswith("http")]
    missing = [link for link in links if not (page.parent / link).exists()]
    folders = "scripts|tests|parity_tests|smollm_\\w+|benchmarks|examples"
    paths = re.findall(rf"\b(?:{folders})/[\w/.-]*\w\.(?:py|sh|json)\b", text)
    missing += [path for path in paths if not (ROOT / path).exists()]
    modules = re.findall(r"python -m (smollm_\w+[\w.]*|benchmarks[\w.]*)", text)
    missing += [name for name in modules if not list(ROOT.glob(f"{name.replace('.', '/')}*"))]
    assert not missing


def test_what_the_readme_shows_from_python_runs_as_it_stands(weights_path):
    (program,) = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(encoding="utf-8"), re.DOTALL)
    assert str(weights_path.relative_to(Path(weights_path).parents[1])) in program
    command = [sys.executable, "-c", program]
    result = subprocess.run(command, cwd=ROOT, env=ENVIRONMENT, capture_output=True, text=True, check=False)
    assert (result.returncode, result.stdout) == (0, " Paris\n"), result.stderr
