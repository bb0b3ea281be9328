"""Parses a script's flags with tyro; a wrong command line becomes a one-line `UsageError` that suggests the right flag.

Flags are the fields of a dataclass. A table GROUPS in its module, title to field names, sets the titles under which
--help shows them.
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
import types
import typing
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

import tyro

from smollm_jax.commands.flag_names import SYNONYMS, UNSUPPORTED
from smollm_jax.errors import UsageError
from smollm_jax.runtime.assets import resolve_asset
from smollm_jax.runtime.invocation import names_as_typed, this_command

F = TypeVar("F")
POSITIONAL = typing.get_args(tyro.conf.Positional[int])[1]
PATHS = ("data", "sources")  # string flags that are file names, which can be any bytes; other strings must be UTF-8


def parse(kind: type[F], argv: list[str] | None, description: str | None, *, weights: tuple[str, ...] = ()) -> F:
    """The flags of a command line (None: this process's); `weights` are fields that may be a model's name on the hub.

    Raises `UsageError` for a line that tyro rejects, and for a text that is not UTF-8.
    """
    arguments = sys.argv[1:] if argv is None else argv
    _use_ascii_boxes_if_needed()
    errors = io.StringIO()
    try:
        with contextlib.redirect_stderr(errors):
            if {"-h", "--help"} & {*arguments}:  # only here, because building the groups takes time
                grouped, text = _grouped(kind, groups_of(kind)), names_as_typed(description or "")
                # Every field has its help text, so tyro need not look for the source of these generated classes.
                tyro.cli(grouped, args=arguments, description=text, config=(tyro.conf.HelptextFromCommentsOff,))
            flags = tyro.cli(kind, args=arguments, description=description)
    except SystemExit as end:
        if not end.code:  # --help
            raise
        message = _unknown_flags(kind, arguments) or _one_line(errors.getvalue())
        raise UsageError(f"{message} (all flags: {this_command()} --help)") from None
    flags = _decode_texts(flags)
    if any(getattr(flags, name) for name in weights):
        from smollm_jax.weights.hub import locate

        flags = dataclasses.replace(flags, **{name: _located(getattr(flags, name), locate) for name in weights})
    return flags


def flag_names(kind: type) -> dict[str, bool]:
    """Every flag of a script without its dashes, with `no-` forms and aliases, to whether it is positional."""
    flags = {"help": False}
    for field, hint in _fields(kind):
        metadata = _metadata(hint)
        names = [field.name, *(alias for item in metadata for alias in getattr(item, "aliases", None) or ())]
        if field.type is bool:
            names.append(f"no-{field.name}")
        flags |= {name.lstrip("-").replace("_", "-"): POSITIONAL in metadata for name in names}
    return flags


def suggestion(kind: type, name: str) -> str:
    """Advice for a flag that a script does not have: "use --learning-rate" for "lr"; "" if there is none."""
    is_positional = flag_names(kind)
    for flags, other_names, note in SYNONYMS:
        candidates = [flag for flag in flags.split() if flag in is_positional and flag != name]
        if name in other_names.split() and candidates:
            usage = [f"{flag.upper()} without a flag" if is_positional[flag] else f"--{flag}" for flag in candidates]
            return f"use {note if note.startswith('-') else ' or '.join(usage) + (note and f' ({note})')}"
    for required_flag, other_names, advice in UNSUPPORTED:
        if name in other_names.split() and (not required_flag or required_flag in is_positional):
            return advice
    similar = difflib.get_close_matches(name, is_positional, n=2, cutoff=0.7) if len(name) > 1 else []
    longer = [flag for flag in is_positional if len(name) > 1 and flag.startswith(name)]
    matches = [flag for flag in dict.fromkeys(similar + longer) if not is_positional[flag]]
    return f"perhaps {' or '.join(f'--{flag}' for flag in matches[:3])}" if matches else ""


def groups_of(kind: type) -> Mapping[str, Sequence[str]]:
    """The titles under which --help shows a dataclass's flags, each with its fields; empty for a short list."""
    return getattr(sys.modules[kind.__module__], "GROUPS", {})


def _grouped(kind: type, groups: Mapping[str, Sequence[str]]) -> type:
    """A dataclass for tyro: `kind`'s fields, or one nested dataclass per group, whose name tyro shows as its title."""
    fields = dict(_help_fields(kind))
    if not groups:
        return dataclasses.make_dataclass(kind.__name__, fields.values(), kw_only=True)
    kinds = {
        title: dataclasses.make_dataclass(title, [fields[name] for name in names]) for title, names in groups.items()
    }
    hints = [(title, tyro.conf.OmitArgPrefixes[group]) for title, group in kinds.items()]
    return dataclasses.make_dataclass(kind.__name__, hints)


def _help_fields(kind: Any) -> Iterator[tuple[str, tuple[str, Any, Any]]]:
    """The fields of a dataclass and of the dataclasses nested in it, by name, as arguments for `make_dataclass`."""
    texts = _docstrings(kind)
    for field in dataclasses.fields(kind):
        bare_type = _bare_type(field.type)
        if dataclasses.is_dataclass(bare_type):
            yield from _help_fields(bare_type)
            continue
        metadata = _metadata(field.type)
        is_optional = field.default in (None, ()) and tyro.conf.UseAppendAction not in metadata
        hint, defaults = field.type, {"default": field.default, "default_factory": field.default_factory}
        options: dict[str, Any] = {"help": names_as_typed(texts[field.name])}
        if is_optional or POSITIONAL in metadata:  # tyro's hint "(default: None)" would tell the user nothing
            options["help_behavior_hint"] = ""
        if is_optional and (plain := _without_none(bare_type)):
            plain_type, defaults["default"], metavar = plain
            hint = Annotated[plain_type, *metadata] if metadata else plain_type
            options |= {"metavar": metavar} if metavar else {}
        defaults = {name: default for name, default in defaults.items() if default is not dataclasses.MISSING}
        made = dataclasses.field(**defaults, kw_only=True)
        yield field.name, (field.name, Annotated[hint, tyro.conf.arg(**options)], made)


def _without_none(hint: Any) -> tuple[Any, Any, str | None] | None:
    """The type to show in --help, any value of it, and perhaps a metavar; None for a type of another kind.

    tyro would show "{None}|INT", and check that None is an `int | None` with typeguard, whose import takes longer than
    all else.
    """
    if typing.get_origin(hint) in (types.UnionType, typing.Union):
        kinds = [kind for kind in typing.get_args(hint) if kind is not type(None)]
        plain = _without_none(kinds[0])
        return plain if len(kinds) == 1 or plain is None else (typing.Union[tuple(kinds)], plain[1], None)  # noqa: UP007
    if typing.get_origin(hint) is Literal:
        return hint, typing.get_args(hint)[0], None
    if typing.get_origin(hint) is tuple and typing.get_args(hint)[1:] == (...,):
        (kind, _) = typing.get_args(hint)
        choices = "{" + ",".join(typing.get_args(kind)) + "}" if typing.get_origin(kind) is Literal else None
        name = choices or {str: "STR", Path: "PATH"}[kind]
        return str, "", f"{name} [...]" if choices else f"{name} [{name} ...]"
    values: dict[Any, Any] = {int: 0, float: 0.0, str: "", Path: Path()}
    return (hint, values[hint], None) if hint in values else None


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


def _bare_type(hint: Any) -> Any:
    """The type inside `Annotated`."""
    return typing.get_args(hint)[0] if _metadata(hint) else hint


def _fields(kind: Any) -> Iterator[tuple[Any, Any]]:
    """The fields of a dataclass and of the dataclasses nested in it, each with its annotation."""
    for field in dataclasses.fields(kind):
        bare_type = _bare_type(field.type)
        if dataclasses.is_dataclass(bare_type):
            yield from _fields(bare_type)
        else:
            yield field, field.type


def _metadata(hint: Any) -> tuple[Any, ...]:
    """What `Annotated` adds to the type."""
    return getattr(hint, "__metadata__", ())


def _unknown_flags(kind: type, arguments: list[str]) -> str:
    """The message for the flags that the script does not have; "" if it has all of them."""
    is_positional, messages = flag_names(kind), []
    for argument in arguments:
        if argument == "--":
            break
        # -h is the only flag with a single dash; -5 is a number.
        match = re.fullmatch(r"(--?)([A-Za-z][\w.-]*)(=.*)?", argument, re.DOTALL)
        if match is None or argument == "-h":
            continue
        dashes, name = match[1], match[2].replace("_", "-")
        if dashes == "--" and name in is_positional and not is_positional[name]:
            continue
        advice = names_as_typed(suggestion(kind, name))
        if name in is_positional:  # one dash instead of two, or a flag for a positional argument
            advice = f"give {name.upper()} without a flag" if is_positional[name] else f"use --{name}"
        messages.append(f"{dashes}{match[2]}: no such flag{advice and f'; {advice}'}")
    return "; ".join(dict.fromkeys(messages))


def _one_line(box: str) -> str:
    """The text in a box that tyro drew, without its title, its border and the help that it repeats."""
    rows = [row.strip("│| \t") for row in box.splitlines() if not re.match(r"\s*[╭╰+]", row)]
    text = " ".join(row for row in rows if not re.fullmatch(r"[─-]*", row))
    text = re.split(r"For full helptext|Argument helptext", text)[0]
    text = re.sub(r"Missing from \S+", "missing", text).replace("(required)", "")
    # For an optional flag ({None}|INT), show only the error about the value.
    text = re.sub(r": no type matching .* - <class '\w+'>:", ":", text, flags=re.DOTALL)
    # For a flag with several names, show only the last: the others are aliases.
    text = re.sub(r"(missing\s+)(?:--[\w-]+ \S+,\s+)+(?=--)", r"\1", text)
    text = re.sub(r"(?<=Expected one of \().*?(?=\))", lambda choices: _choices(choices[0]), text, flags=re.DOTALL)
    return " ".join(text.replace("Unrecognized options", "not understood").split()) or "not understood"


def _choices(text: str) -> str:
    """The choices sorted (tyro's order varies), without None, which stands for leaving the flag out."""
    return ", ".join(choice for choice in sorted(" ".join(text.split()).split(", ")) if choice != "'None'")


def _use_ascii_boxes_if_needed() -> None:
    """Makes tyro draw ASCII boxes if stdout's encoding has no box characters."""
    try:
        "─│╭".encode(getattr(sys.stdout, "encoding", None) or "utf-8")
    except (UnicodeEncodeError, LookupError):
        tyro._experimental_options["utf8_boxes"] = False


def _decode_texts(flags: Any) -> Any:
    """The flags with their texts decoded as UTF-8, also in an ASCII locale; raises `UsageError` for invalid UTF-8."""
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
    try:  # an ASCII locale decodes UTF-8 bytes to surrogates
        return os.fsencode(value).decode("utf-8")
    except UnicodeError as error:
        position = f"byte {error.start} " if isinstance(error, UnicodeDecodeError) else ""
        raise UsageError(f"--{name.replace('_', '-')}: {position}is not UTF-8") from error


def _located(value: Any, locate: Any) -> Any:
    if isinstance(value, (tuple, list)):
        return type(value)(locate(resolve_asset(path)) for path in value)
    return value if value is None else locate(resolve_asset(Path(value)))
