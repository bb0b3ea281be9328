"""A script's flags, read by tyro; a line that cannot be understood is refused in one line that says what can."""

import contextlib
import dataclasses
import difflib
import io
import os
import re
import sys
import typing
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TypeVar

import tyro

from smollm_jax.commands.flag_names import ABSENT, SAME
from smollm_jax.errors import UsageError

F = TypeVar("F")
POSITIONAL = typing.get_args(tyro.conf.Positional[int])[1]
PATHS = ("data", "sources")  # of the flags that are strings: a file's name is any bytes, a text is UTF-8


def parse(kind: type[F], argv: list[str] | None, description: str | None, *, weights: tuple[str, ...] = ()) -> F:
    """The flags of a command line (None: this process's); `weights` are fields that may be a model's name on the hub.

    Raises `UsageError` for a line that tyro does not take, and for a text that is not UTF-8.
    """
    arguments = sys.argv[1:] if argv is None else argv
    _draw_what_can_be_shown()
    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said):
            flags = tyro.cli(kind, args=arguments, description=description)
    except SystemExit as end:
        if not end.code:  # --help
            raise
        message = _unknown_flags(kind, arguments) or _one_line(said.getvalue())
        raise UsageError(f"{message} (all flags: python {sys.argv[0]} --help)") from None
    flags = _with_texts(flags)
    if any(getattr(flags, name) for name in weights):
        from smollm_jax.weights.hub import locate

        flags = dataclasses.replace(flags, **{name: _located(getattr(flags, name), locate) for name in weights})
    return flags


def names(kind: type) -> dict[str, bool]:
    """Every flag of a script without its dashes, `no-` forms and aliases too: whether it is written without a name."""
    flags = {"help": False}
    for field, hint in _fields(kind):
        spelled = [field.name, *(alias for mark in _marks(hint) for alias in getattr(mark, "aliases", None) or ())]
        if field.type is bool:
            spelled.append(f"no-{field.name}")
        flags |= {name.lstrip("-").replace("_", "-"): POSITIONAL in _marks(hint) for name in spelled}
    return flags


def suggestion(kind: type, name: str) -> str:
    """What to use instead of a flag that a script does not have: "--learning-rate" for "lr"; "" where nothing fits."""
    ours = names(kind)
    for flags, theirs, note in SAME:
        fitting = [flag for flag in flags.split() if flag in ours and flag != name]
        if name in theirs.split() and fitting:
            shown = " or ".join(f"{flag.upper()} without a flag" if ours[flag] else f"--{flag}" for flag in fitting)
            return f"use {note if note.startswith('-') else shown + (note and f' ({note})')}"
    for where, theirs, instead in ABSENT:
        if name in theirs.split() and (not where or where in ours):
            return instead
    near = difflib.get_close_matches(name, ours, n=2, cutoff=0.7) if len(name) > 1 else []
    longer = [flag for flag in ours if len(name) > 1 and flag.startswith(name)]
    close = [flag for flag in dict.fromkeys(near + longer) if not ours[flag]]
    return f"perhaps {' or '.join(f'--{flag}' for flag in close[:3])}" if close else ""


def _fields(kind: Any) -> Iterator[tuple[Any, Any]]:
    """The fields of a dataclass of flags and of those in it, each with its annotation."""
    for field in dataclasses.fields(kind):
        inner = typing.get_args(field.type)[0] if _marks(field.type) else field.type
        if dataclasses.is_dataclass(inner):
            yield from _fields(inner)
        else:
            yield field, field.type


def _marks(hint: Any) -> tuple[Any, ...]:
    return getattr(hint, "__metadata__", ())


def _unknown_flags(kind: type, arguments: list[str]) -> str:
    """What to say of the flags that the script does not have; "" when it has all of them."""
    ours, said = names(kind), []
    for argument in arguments:
        if argument == "--":
            break
        # A single dash has one letter, -h alone is ours; -5 is a number.
        match = re.fullmatch(r"(--?)([A-Za-z][\w.-]*)(=.*)?", argument, re.DOTALL)
        if match is None or argument == "-h":
            continue
        dashes, name = match[1], match[2].replace("_", "-")
        if dashes == "--" and name in ours and not ours[name]:
            continue
        advice = suggestion(kind, name)
        if name in ours:  # with one dash, or written without a name
            advice = f"give {name.upper()} without a flag" if ours[name] else f"use --{name}"
        said.append(f"{dashes}{match[2]}: no such flag{advice and f'; {advice}'}")
    return "; ".join(dict.fromkeys(said))


def _one_line(box: str) -> str:
    """The text in a box that tyro drew, without its title, its lines and what it repeats of the help."""
    rows = [row.strip("│| \t") for row in box.splitlines() if not re.match(r"\s*[╭╰+]", row)]
    text = " ".join(row for row in rows if not re.fullmatch(r"[─-]*", row))
    text = re.split(r"For full helptext|Argument helptext", text)[0]
    text = re.sub(r"Missing from \S+", "missing", text).replace("(required)", "")
    # Of a flag that may also be left out ({None}|INT), the fault of the value alone.
    text = re.sub(r": no type matching .* - <class '\w+'>:", ":", text, flags=re.DOTALL)
    # Of a flag with several names the first ones are those of other programs.
    text = re.sub(r"(missing\s+)(?:--[\w-]+ \S+,\s+)+(?=--)", r"\1", text)
    text = re.sub(r"(?<=Expected one of \().*?(?=\))", lambda choices: _choices(choices[0]), text, flags=re.DOTALL)
    return " ".join(text.replace("Unrecognized options", "not understood").split()) or "not understood"


def _choices(listed: str) -> str:
    """The same choices in an order that is always the same, without None, which stands for leaving the flag out."""
    return ", ".join(choice for choice in sorted(" ".join(listed.split()).split(", ")) if choice != "'None'")


def _draw_what_can_be_shown() -> None:
    """Boxes of ASCII where stdout's encoding has no others."""
    try:
        "─│╭".encode(getattr(sys.stdout, "encoding", None) or "utf-8")
    except (UnicodeEncodeError, LookupError):
        tyro._experimental_options["utf8_boxes"] = False


def _with_texts(flags: Any, prefix: str = "") -> Any:
    """The same flags, their texts as they were typed; raises `UsageError` for one that is not UTF-8."""
    changed = {}
    for field in dataclasses.fields(flags):
        value = getattr(flags, field.name)
        if field.name in PATHS:
            continue
        if isinstance(value, str):
            changed[field.name] = _text(value, field.name)
        elif isinstance(value, tuple) and any(isinstance(item, str) for item in value):
            changed[field.name] = tuple(_text(item, field.name) if isinstance(item, str) else item for item in value)
    return dataclasses.replace(flags, **changed)


def _text(value: str, name: str) -> str:
    if not any("\ud800" <= character <= "\udfff" for character in value):
        return value
    try:  # what an ASCII locale made of UTF-8
        return os.fsencode(value).decode("utf-8")
    except UnicodeError as error:
        at = f"byte {error.start} " if isinstance(error, UnicodeDecodeError) else ""
        raise UsageError(f"--{name.replace('_', '-')}: {at}is not UTF-8") from error


def _located(value: Any, locate: Any) -> Any:
    if isinstance(value, (tuple, list)):
        return type(value)(map(locate, value))
    return value if value is None else locate(Path(value))
