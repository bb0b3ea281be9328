"""Every file, extra and command that the Dockerfile names exists."""

import fnmatch
import re
import shlex
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from smollm_jax.commands.main import run
from smollm_jax.errors import UsageError
from smollm_jax.runtime.invocation import VERBS

ROOT = Path(__file__).parent.parent
DOCKERFILE = (ROOT / "Dockerfile").read_text(encoding="utf-8")
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
# Packages that install PyTorch, and with it gigabytes of CUDA libraries.
NEED_TORCH = {"torch", "accelerate", "lm-eval"}


def instructions(name: str) -> list[str]:
    """The arguments of every instruction of this name, in order, with continued lines joined."""
    lines = [line for line in DOCKERFILE.splitlines() if not line.lstrip().startswith("#")]
    joined = "\n".join(lines).replace("\\\n", " ")
    pairs = [line.split(maxsplit=1) for line in joined.splitlines() if line.strip()]
    return [arguments for instruction, arguments in pairs if instruction == name]


def copied() -> list[str]:
    """The sources of all COPY instructions."""
    return [source for arguments in instructions("COPY") for source in shlex.split(arguments)[:-1]]


def requirements(extras: list[str]) -> list[str]:
    """The requirements of the package with these extras, from pyproject.toml."""
    optional = PROJECT["optional-dependencies"]
    return PROJECT["dependencies"] + [requirement for extra in extras for requirement in optional[extra]]


def test_each_instruction_is_one_of_docker():
    known = {"FROM", "ARG", "WORKDIR", "COPY", "RUN", "USER", "ENV", "VOLUME", "ENTRYPOINT", "CMD"}
    used = re.findall(r"^(\w+) ", DOCKERFILE, re.MULTILINE)
    assert set(used) == known
    assert used[0] == "FROM"
    (image,) = instructions("FROM")
    assert re.fullmatch(r"python:3\.1[12]-slim", image)


def test_what_is_copied_is_there_and_passes_the_dockerignore():
    rules = [rule for rule in (ROOT / ".dockerignore").read_text().splitlines() if rule and not rule.startswith("#")]
    for source in copied():
        assert (ROOT / source).exists(), source
        # As Docker reads the file: the last rule that matches decides.
        matching = [rule for rule in rules if fnmatch.fnmatch(source, rule.removeprefix("!"))]
        assert matching[-1].startswith("!"), f"{source} is left out by .dockerignore"


def test_all_that_the_build_of_the_package_reads_is_copied():
    packages = {path.name for path in ROOT.glob("smollm_*") if (path / "__init__.py").exists()}
    assert packages | {"pyproject.toml", PROJECT["readme"], "LICENSE"} == set(copied())


@pytest.mark.parametrize("jax", ["", "cuda12", "cuda13"])
def test_every_build_argument_gives_extras_that_exist_and_none_that_needs_pytorch(jax):
    arguments = dict(argument.split("=") for argument in instructions("ARG"))
    assert arguments["JAX"] == "", "the default is a CPU"
    (install,) = [command for command in instructions("RUN") if command.startswith("pip ")]
    shell = ["sh", "-c", install.replace("pip", "echo", 1)]  # the shell expands ${JAX:+...} as in the build
    echo = subprocess.run(shell, env=arguments | {"JAX": jax}, capture_output=True, text=True, check=True).stdout
    (extras,) = re.findall(r" \.\[([\w,]+)\]$", echo.strip())
    names = {re.split(r"[<>=\[]", requirement)[0] for requirement in requirements(extras.split(","))}
    assert not names & NEED_TORCH
    assert ("jax[cuda" in "".join(requirements(extras.split(",")))) == bool(jax)


def test_it_runs_the_console_command_as_a_user_who_may_write_to_the_cache(monkeypatch):
    entrypoint, command = (re.findall(r'"([^"]*)"', instructions(name)[0]) for name in ("ENTRYPOINT", "CMD"))
    assert entrypoint == ["smollm"]
    assert "smollm" in PROJECT["scripts"]
    monkeypatch.delenv("SMOLLM_API_KEY", raising=False)
    monkeypatch.setattr(sys, "argv", ["smollm"])
    with pytest.raises(UsageError, match=r"--host 0\.0\.0\.0 .* set SMOLLM_API_KEY"):  # as the image's comments do
        run(command)
    (prepare,) = [line for line in instructions("RUN") if line.startswith("useradd")]
    (user,) = instructions("USER")
    assert user != "root"
    assert f" {user} " in prepare
    (volume,) = instructions("VOLUME")
    assert instructions("ENV") == [f"XDG_CACHE_HOME={volume}"]
    assert volume in prepare
    assert instructions("WORKDIR")[-1] in prepare


def test_the_commands_in_its_comments_exist():
    comments = " ".join(line.lstrip("# ") for line in DOCKERFILE.splitlines() if line.startswith("#"))
    verbs = re.findall(r"docker run .*? smollm (\w+)?", comments)
    assert len(verbs) == comments.count("docker run")
    verbs.remove("")  # the default command
    assert set(verbs) <= set(VERBS)
