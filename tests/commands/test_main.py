"""`smollm VERB`: its list of verbs, its errors, and how its messages name other commands."""

import importlib
import re
import subprocess
import sys

import pytest

from smollm_jax.commands import main
from smollm_jax.errors import UsageError
from smollm_jax.runtime import invocation
from tests.commands.test_scripts import ROOT, run

SMOLLM = ("-m", "smollm_jax.commands.main")


@pytest.fixture(autouse=True)
def _own_command_line(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["pytest"])


def installed() -> list[str]:
    return [verb for verb in invocation.VERBS if main.source_of(main.module_of(verb)).exists()]


@pytest.mark.parametrize("line", [[], ["help"], ["--help"], ["-h"]])
def test_the_verbs_are_listed_each_with_what_its_script_does(line, capsys):
    main.run(line)
    listed = dict(re.findall(r"^  ([\w-]+) +(\S.*)$", capsys.readouterr().out, re.MULTILINE))
    assert list(listed) == installed()
    for verb in set(listed) - {"parity"}:
        docstring = importlib.import_module(main.module_of(verb)).__doc__
        assert docstring
        assert listed[verb] == docstring.splitlines()[0]


def test_listing_the_verbs_imports_no_framework_and_not_even_tyro():
    heavy = "{'jax', 'torch', 'numpy', 'tyro', 'transformers'}"
    program = f"from smollm_jax.commands import main; main.run([]); import sys; assert not {heavy} & set(sys.modules)"
    result = run("-c", program)
    assert result.returncode == 0, result.stderr


@pytest.mark.parametrize("verb", [verb for verb in installed() if verb != "parity"])
def test_every_verb_is_a_script_too_and_shows_its_own_name(verb, capsys):
    assert (ROOT / f"scripts/{invocation.VERBS[verb]}.py").is_file()
    with pytest.raises(SystemExit) as stop:
        main.run([verb, "--help"])
    assert stop.value.code == 0
    help_text = capsys.readouterr().out
    assert help_text.startswith(f"usage: smollm {verb} ")
    assert f"    smollm {verb}" in help_text
    assert "default: None" not in help_text
    scripts = "|".join(invocation.VERBS.values())
    assert not re.search(rf"(?<![\w/.])(?:scripts/)?(?:{scripts})\.py", help_text)


@pytest.mark.parametrize(
    ("line", "named"),
    [
        ("trian", "smollm trian: no such verb; perhaps smollm train"),
        ("convert_weights", "perhaps smollm convert"),
        ("fetch_assets.py weights", "perhaps smollm fetch"),
        ("--weights x", "no such verb"),
    ],
)
def test_another_verb_is_refused_in_one_line_with_the_nearest(line, named):
    with pytest.raises(UsageError, match=re.escape(named)) as caught:
        main.run(line.split())
    assert str(caught.value).endswith("(all verbs: smollm --help)")


def test_the_version_is_the_packages(capsys):
    main.run(["--version"])
    assert re.fullmatch(r"smollm-jax \d+\.\d+\.\d+\n", capsys.readouterr().out)


def started(*command: object) -> subprocess.CompletedProcess:
    return run(*map(str, command))


def test_messages_name_commands_as_the_user_types_them(tmp_path):
    flags = ("--tokenizer", tmp_path / "none", tmp_path / "x.txt", "--out", tmp_path / "data")
    (tmp_path / "x.txt").write_text("Text.")
    for command, fetch in ((SMOLLM, "smollm fetch"), ((), "python scripts/fetch_assets.py")):
        result = started(*(command or ("scripts/prepare_data.py",)), *(("prepare", *flags) if command else flags))
        assert result.returncode == 3
        assert f"`{fetch} tokenizer` fetches SmolLM2's" in result.stderr, result.stderr
    result = started(*SMOLLM, "generate", "--wieghts", "x")
    assert (result.returncode, result.stderr) == (
        2,
        "error: --wieghts: no such flag; perhaps --weights (all flags: smollm generate --help)\n",
    )
    result = started("scripts/generate.py", "--wieghts", "x")
    assert result.stderr.endswith("(all flags: python scripts/generate.py --help)\n")


def test_a_file_of_the_users_that_is_called_like_a_script_keeps_its_name(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["smollm convert"])
    assert invocation.as_typed("export.py: no such file") == "export.py: no such file"
    assert invocation.as_typed("run python scripts/export.py") == "run smollm export"
    assert invocation.names_as_typed("as export.py takes it") == "as smollm export takes it"
    for path in ("smollm_jax/generation/export.py", "python scripts/benchmark.py", "Path.export.py"):
        assert invocation.names_as_typed(path) == path
