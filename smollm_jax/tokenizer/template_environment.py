"""The Jinja environment for chat templates: that of transformers, with limits for untrusted templates.

Source: transformers 5.23, utils/chat_template_utils.py, `_cached_compile_jinja_template`.
"""

import functools
import json
import re
from collections.abc import Callable
from datetime import datetime
from typing import Any, NoReturn

import jinja2
import jinja2.ext
import jinja2.nodes
import jinja2.parser
import jinja2.runtime
import jinja2.sandbox
import jinja2.utils

from smollm_jax.errors import InputFileError
from smollm_jax.runtime.files import one_line

MARKERS = "_marks"  # template variable with the markers of `chat_tokens`, which `tojson` must not escape
MAX_INDENT = 16  # of `tojson`, to limit the size of its output


@functools.lru_cache(maxsize=16)
def compile_template(source: str, path: str) -> jinja2.Template:
    """The compiled template; raises `InputFileError` naming the file and the invalid line."""
    try:
        environment = _environment()
        if environment.parse(source).find(jinja2.nodes.EvalContextModifier):  # would be evaluated during compilation
            raise jinja2.TemplateError("autoescape is not supported")
        return environment.from_string(source)
    except Exception as error:  # from jinja, or from Python compiling its output
        line = f", line {error.lineno}" if isinstance(error, jinja2.TemplateSyntaxError) else ""
        raise InputFileError(f"{path}: chat_template{line}: {one_line(error)}") from error


def _environment() -> jinja2.Environment:
    # No optimizer, and a `finalize` with context: otherwise jinja evaluates "a" * 9**9 during compilation.
    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True,
        lstrip_blocks=True,
        optimized=False,
        finalize=_identity,
        extensions=[_Generation, jinja2.ext.loopcontrols],
    )
    environment.filters["tojson"] = _to_json
    environment.globals |= {
        "raise_exception": _raise_exception,
        "strftime_now": _strftime_now,
        "dict": _Dict(),
        "namespace": _Namespace,
    }
    return environment


class _Generation(jinja2.ext.Extension):
    """`{% generation %}`, which marks text of the assistant; it is rendered unchanged."""

    tags = {"generation"}  # noqa: RUF012  # as jinja expects

    def parse(self, parser: jinja2.parser.Parser) -> jinja2.nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        # A call block, as in transformers: variables set inside are local to it.
        return jinja2.nodes.CallBlock(self.call_method("_text"), [], [], body).set_lineno(line)

    def _text(self, caller: Callable[[], str]) -> str:
        return caller()


class _Dict:
    """`dict` for templates, without the attributes of Python's class."""

    def __call__(self, *args: Any, **values: Any) -> dict[Any, Any]:
        return dict(*args, **values)

    def fromkeys(self, *args: Any) -> dict[Any, Any]:
        return dict.fromkeys(*args)


class _Namespace(jinja2.utils.Namespace):
    """`namespace` for templates, which rejects names that begin with an underscore."""

    def __init__(self, /, *args: Any, **values: Any):
        super().__init__()
        for name, value in dict(*args, **values).items():
            self[name] = value

    def __setitem__(self, name: str, value: Any) -> None:
        if isinstance(name, str) and name.startswith("_"):
            raise jinja2.exceptions.SecurityError(f"a namespace has no name {name!r}")
        super().__setitem__(name, value)


@jinja2.pass_context
def _identity(_: object, value: object) -> object:
    return value


@jinja2.pass_context
def _to_json(
    context: jinja2.runtime.Context,
    value: Any,
    ensure_ascii: bool = False,
    indent: int | str | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """JSON without jinja's HTML escapes."""
    if (indent if isinstance(indent, int) else len(indent or "")) > MAX_INDENT:
        raise jinja2.TemplateError(f"tojson: an indent of at most {MAX_INDENT}")
    text = json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)
    for marker in str(context.get(MARKERS, "")) if ensure_ascii else "":
        escape = re.escape(json.dumps(marker)[1:-1])
        text = re.sub(rf"(?<!\\)((?:\\\\)*){escape}", rf"\1{marker}", text)
    return text


def _strftime_now(format: str) -> str:  # templates may pass it by name
    return datetime.now().strftime(format)


def _raise_exception(message: str) -> NoReturn:
    raise jinja2.TemplateError(message)
