"""A script's flags, read by tyro; a line that cannot be understood is refused in one line that says what can.

Flags are the fields of a dataclass, flat for its user and in code. A table GROUPS beside it, title to field names, says
under which titles --help shows them.
"""

import ast
import contextlib
import dataclasses
import difflib
import inspect
import io
import os
import re
import sys
import typing
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, TypeVar

import tyro

from smollm_jax.commands.flag_names import ABSENT, SAME
from smollm_jax.errors import UsageError
from smollm_jax.runtime.assets import resolve_asset
from smollm_jax.runtime.invocation import names_as_typed, this_command

F = TypeVar("F")
POSITIONAL = typing.get_args(tyro.conf.Positional[int])[1]
PATHS = ("data", "sources")  # of the flags that are strings: a file's name is any bytes, a text is UTF-8


def parse(kind: type[F], argv: list[str] | None, description: str | None, *, weights: tuple[str, ...] = ()) -> F:
    """The flags of a command line (None: this process's); `weights` are fields that may be a model's name on the hub.

    Raises `UsageError` for a line that tyro does not take, and for a text that is not UTF-8.
    """
    arguments = sys.argv[1:] if argv is None else argv
    _draw_what_can_be_shown()
    errors = io.StringIO()
    try:
        with contextlib.redirect_stderr(errors):
            if {"-h", "--help"} & {*arguments}:  # the groups are for its reader, and take time at every start
                grouped, shown = _grouped(kind, groups_of(kind)), names_as_typed(description or "")
                # Every text is given: tyro need not look for a source of classes that have none.
                tyro.cli(grouped, args=arguments, description=shown, config=(tyro.conf.HelptextFromCommentsOff,))
            flags = tyro.cli(kind, args=arguments, description=description)
    except SystemExit as end:
        if not end.code:  # --help
            raise
        message = _unknown_flags(kind, arguments) or _one_line(errors.getvalue())
        raise UsageError(f"{message} (all flags: {this_command()} --help)") from None
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


def groups_of(kind: type) -> Mapping[str, Sequence[str]]:
    """The titles under which --help shows a dataclass's flags, each with its fields; none for a short list."""
    return getattr(sys.modules[kind.__module__], "GROUPS", {})


def _grouped(kind: type, groups: Mapping[str, Sequence[str]]) -> type:
    """A dataclass for tyro: of `kind`'s fields, or of one dataclass a group, whose name tyro shows as its title."""
    fields = dict(_shown_fields(kind))
    if not groups:
        return dataclasses.make_dataclass(kind.__name__, fields.values(), kw_only=True)
    kinds = {
        title: dataclasses.make_dataclass(title, [fields[name] for name in names]) for title, names in groups.items()
    }
    hints = [(title, tyro.conf.OmitArgPrefixes[group]) for title, group in kinds.items()]
    return dataclasses.make_dataclass(kind.__name__, hints)


def _shown_fields(kind: Any) -> Iterator[tuple[str, tuple[str, Any, Any]]]:
    """The fields of a dataclass of flags and of those in it, by name, as `make_dataclass` takes them."""
    texts = _docstrings(kind)
    for field in dataclasses.fields(kind):
        inner = _inner(field.type)
        if dataclasses.is_dataclass(inner):
            yield from _shown_fields(inner)
            continue
        # A default that stands for leaving the flag out says nothing to its reader.
        marks = _marks(field.type)
        left_out = field.default in (None, ()) and tyro.conf.UseAppendAction not in marks
        silent = left_out or POSITIONAL in marks
        help_of = tyro.conf.arg(help=names_as_typed(texts[field.name]), help_behavior_hint="" if silent else None)
        defaults = {"default": field.default, "default_factory": field.default_factory}
        given = {name: default for name, default in defaults.items() if default is not dataclasses.MISSING}
        made = dataclasses.field(**given, kw_only=True)
        yield field.name, (field.name, Annotated[field.type, help_of], made)


def _docstrings(kind: type) -> dict[str, str]:
    """The text under each field of a dataclass, on one line."""
    (definition,) = ast.parse(inspect.getsource(kind)).body
    assert isinstance(definition, ast.ClassDef)
    texts, name = {}, ""
    for node in definition.body:
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            name = node.target.id
        elif isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and name:
            texts[name] = " ".join(str(node.value.value).split())
    return texts


def _inner(hint: Any) -> Any:
    """A field's type without what is noted on it."""
    return typing.get_args(hint)[0] if _marks(hint) else hint


def _fields(kind: Any) -> Iterator[tuple[Any, Any]]:
    """The fields of a dataclass of flags and of those in it, each with its annotation."""
    for field in dataclasses.fields(kind):
        inner = _inner(field.type)
        if dataclasses.is_dataclass(inner):
            yield from _fields(inner)
        else:
            yield field, field.type


def _marks(hint: Any) -> tuple[Any, ...]:
    return getattr(hint, "__metadata__", ())


def _unknown_flags(kind: type, arguments: list[str]) -> str:
    """What to say of the flags that the script does not have; "" when it has all of them."""
    ours, faults = names(kind), []
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
        advice = names_as_typed(suggestion(kind, name))
        if name in ours:  # with one dash, or written without a name
            advice = f"give {name.upper()} without a flag" if ours[name] else f"use --{name}"
        faults.append(f"{dashes}{match[2]}: no such flag{advice and f'; {advice}'}")
    return "; ".join(dict.fromkeys(faults))


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
        return type(value)(locate(resolve_asset(path)) for path in value)
    return value if value is None else locate(resolve_asset(Path(value)))
