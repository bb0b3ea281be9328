"""The command that installs an optional extra: from the checkout, or for an installed package."""

import os
import re
import shlex
from pathlib import Path

from smollm_jax.runtime.invocation import names_as_typed

CHECKOUT = Path(__file__).resolve().parents[2]


def command(extra: str) -> str:
    """The shell command that installs an extra of pyproject.toml.

    smollm-jax is in no package registry: a checkout installs the extra from itself, and for an installed package the
    command names the requirements of the extra.
    """
    if (CHECKOUT / "pyproject.toml").is_file():
        project = "." if Path.cwd() == CHECKOUT else str(CHECKOUT)
        return f"pip install -e {_quoted(f'{project}[{extra}]')}"
    from importlib import metadata  # 30 ms that --help should not cost

    try:
        required = metadata.requires("smollm-jax") or []
    except metadata.PackageNotFoundError:  # copied without package metadata
        return f"pip install -e '.[{extra}]' in the checkout"
    marker = re.compile(rf"""extra\s*==\s*['"]{re.escape(extra)}['"]""")
    return shlex.join(["pip", "install", *(line.partition(";")[0].strip() for line in required if marker.search(line))])


def _quoted(text: str) -> str:
    quoted = shlex.quote(text)
    return quoted if quoted != text else f"'{text}'"  # zsh would expand [ ]


def needs(what: str | os.PathLike, extra: str) -> str:
    """The message that `what` needs an extra, with the command that installs it."""
    return f"{names_as_typed(os.fspath(what))} needs the extra {extra!r}: {command(extra)}"
