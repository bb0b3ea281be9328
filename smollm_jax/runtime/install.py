"""How to get an optional package, from where the user stands."""

import os
import re
import shlex
from importlib import metadata
from pathlib import Path

from smollm_jax.runtime.invocation import names_as_typed

CHECKOUT = Path(__file__).resolve().parents[2]


def command(extra: str) -> str:
    """The shell command that installs an extra of pyproject.toml.

    No registry has a package smollm-jax: in a checkout the extra is installed from it, and an installed package names
    what its extra consists of.
    """
    if (CHECKOUT / "pyproject.toml").is_file():
        place = "." if Path.cwd() == CHECKOUT else str(CHECKOUT)
        return f"pip install -e {_quoted(f'{place}[{extra}]')}"
    try:
        required = metadata.requires("smollm-jax") or []
    except metadata.PackageNotFoundError:  # files without their metadata: the reader has to find the checkout
        return f"pip install -e '.[{extra}]' in the checkout"
    mark = re.compile(rf"""extra\s*==\s*['"]{re.escape(extra)}['"]""")
    return shlex.join(["pip", "install", *(one.partition(";")[0].strip() for one in required if mark.search(one))])


def _quoted(text: str) -> str:
    quoted = shlex.quote(text)
    return quoted if quoted != text else f"'{text}'"  # zsh would expand [ ]


def needs(what: str | os.PathLike, extra: str) -> str:
    """The message for something that cannot be done without an extra."""
    return f"{names_as_typed(os.fspath(what))} needs the extra {extra!r}: {command(extra)}"
