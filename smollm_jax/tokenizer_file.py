"""A `tokenizer.json` and a chat template as others wrote them: usable without loss, or refused in one line."""

import os
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import jinja2
import jinja2.nodes
import jinja2.sandbox
import tokenizers
from tokenizers import models

from smollm_jax.config import shown
from smollm_jax.errors import InputFileError
from smollm_jax.files import one_line, parse_json, text_of

MAX_BYTES = 32 << 20  # of tokenizer.json; SmolLM2's has 3.4 MB, one of 262,144 entries 33
MAX_TEMPLATE = 1 << 16  # characters; the longest released have 20,000


def read_core(files: Mapping[str, bytes], where: Path) -> tokenizers.Tokenizer:
    """The byte-level BPE of a `tokenizer.json`; raises `InputFileError` when it is malformed or would lose text."""
    path = where / "tokenizer.json"
    text = text_of(files["tokenizer.json"], path)
    values = parse_json(text, path)
    model = values.get("model") if isinstance(values, dict) else None
    if not isinstance(model, dict):
        raise InputFileError(f"{path}: not a readable tokenizer: has no model")
    # Each of these makes `tokenizers` change or cut a text, or split it at random, without a word. They are refused
    # before it reads them: one normalizer makes it allocate what a length in the file says, and abort the process.
    fields = {name: values.get(name) for name in ("normalizer", "truncation", "padding")}
    names = ("dropout", "continuing_subword_prefix", "end_of_word_suffix")
    fields |= {f"model.{name}": model.get(name) for name in names}
    for name, value in fields.items():
        if value:
            raise InputFileError(f"{path}: {name} is {shown(value)}: it must be null, or texts would not survive")
    decoder, probe, given_back = values.get("decoder"), "a  B\n\t12 é ", ""
    if model.get("type", "BPE") != "BPE" or not isinstance(decoder, dict) or decoder.get("type") != "ByteLevel":
        raise InputFileError(f"{path}: model and decoder must be BPE and ByteLevel: this is no byte-level tokenizer")
    try:
        with silent_stderr():
            core = tokenizers.Tokenizer.from_str(text)
            given_back = core.decode(core.encode(probe, add_special_tokens=False).ids, skip_special_tokens=False)
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:  # malformed files make tokenizers raise PanicException, no Exception at all
        raise InputFileError(f"{path}: not a readable tokenizer: {one_line(error)}") from error
    if not isinstance(core.model, models.BPE):  # a model without a type is guessed from its fields
        raise InputFileError(f"{path}: model must be BPE: this is no byte-level tokenizer")
    if len(set(model["vocab"].values())) != len(model["vocab"]):
        raise InputFileError(f"{path}: model.vocab has two entries of one id")
    for token in values.get("added_tokens") or []:
        found, content = core.token_to_id(token["content"]), shown(token["content"])
        if not token["content"] or token.get("lstrip") or token.get("rstrip"):
            raise InputFileError(f"{path}: added token {content} is empty or strips the text beside it")
        if found != token["id"]:
            raise InputFileError(f"{path}: added token {content} has id {token['id']}, the vocabulary says {found}")
    whole = all(symbol in model["vocab"] for symbol in map(byte_symbols().__getitem__, probe.encode()))
    if whole and given_back != probe:
        raise InputFileError(f"{path}: does not give back a text it was given (pre_tokenizer or decoder)")
    return core


@contextmanager
def silent_stderr() -> Iterator[None]:
    """Nothing written to file descriptor 2 gets out: Rust prints a panic and its stack there before Python hears of it.

    The whole process's, so the block must be short.
    """
    if sys.stderr:
        sys.stderr.flush()
    try:
        saved = os.dup(2)
    except OSError:  # closed: nothing gets out anyway
        yield
        return
    try:
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, 2)
        os.close(nowhere)
        yield
    finally:
        os.dup2(saved, 2)
        os.close(saved)


def check_template(template: object, path: Path) -> None:
    """Raises `InputFileError` when a chat template is no string or does not compile."""
    if type(template) is not str or len(template) > MAX_TEMPLATE:
        what = f"a string of at most {MAX_TEMPLATE:,} characters"
        raise InputFileError(f"{path}: chat_template must be {what}, got {shown(template)}")
    try:
        environment = template_environment()
        if environment.parse(template).find(jinja2.nodes.EvalContextModifier):  # computed while it compiles, too
            raise jinja2.TemplateError("autoescape is not supported")
        environment.from_string(template)
    except Exception as error:  # jinja's own, and what Python's compiler makes of its output
        line = f", line {error.lineno}" if isinstance(error, jinja2.TemplateSyntaxError) else ""
        raise InputFileError(f"{path}: chat_template{line}: {one_line(error)}") from error


def template_environment() -> jinja2.Environment:
    """Where chat templates are compiled and rendered, as transformers does: sandboxed, with `raise_exception`."""
    # Not optimised, and output that needs a context: jinja would compute "a" * 9**9 while it compiles.
    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, optimized=False, finalize=_as_it_is
    )
    environment.globals["raise_exception"] = _raise_template_error
    return environment


@jinja2.pass_context
def _as_it_is(_: object, value: object) -> object:
    return value


def byte_symbols() -> list[str]:
    """The character that stands for each byte in a byte-level vocabulary. Source: openai/gpt-2, src/encoder.py."""
    printable = {*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)}
    others = iter(range(256, 512))
    return [chr(byte if byte in printable else next(others)) for byte in range(256)]


def _raise_template_error(message: str) -> None:
    raise jinja2.TemplateError(message)
