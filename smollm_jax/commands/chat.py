"""Talk with Instruct weights in the terminal.

    python scripts/chat.py --weights assets/SmolLM2-135M-Instruct
    python scripts/chat.py --weights PATH --system "You answer in one sentence." --temp 0.7 --top-p 0.9
    python scripts/chat.py --weights PATH --history talk.json      # go on from what /save wrote

The model reads the whole conversation at every turn. An answer is shown as it comes; Ctrl-C ends it, and what was said
stays. A line that begins with / is a command:

    /reset        forget the conversation, keep the system prompt
    /save FILE    write the conversation as JSON, a list of {"role", "content"}
    /help         show these lines
    /exit         leave (so does the end of the input, Ctrl-D)

Compiled programs are kept in ~/.cache/smollm-jax/compiled: the first answer ever waits for the compiler, later ones do
not.
"""

import contextlib
import dataclasses
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import tyro

from smollm_jax import errors
from smollm_jax.commands import command_line
from smollm_jax.generation.flags import SamplingFlags

if TYPE_CHECKING:
    from smollm_jax.generation.engine import Engine

HELP = "commands: /reset, /save FILE, /help, /exit"


@dataclasses.dataclass(frozen=True)
class Flags:
    weights: Annotated[Path, tyro.conf.arg(aliases=["--checkpoint-path"])]
    """Instruct weights of any kind."""
    system: str | None = None
    """System prompt; default: the template's own."""
    history: Path | None = None
    """A conversation to go on from, as /save writes it."""
    max_new_tokens: Annotated[int, tyro.conf.arg(aliases=["--max-tokens"])] = 512
    """Tokens of an answer at most."""
    sampling: tyro.conf.OmitArgPrefixes[SamplingFlags] = dataclasses.field(default_factory=SamplingFlags)
    context: Literal["error", "slide"] = "error"
    """Where conversation and answer exceed the context: say so, or go on from its last half whenever it is full."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Of the weights and the cache; XLA multiplies bfloat16 slowly on a CPU."""
    quantize: Literal["bf16", "int8"] | None = None
    """On a CPU: store matrices as bfloat16 or in int8 blocks of 32 (GGUF's q8_0) and compute in float32."""
    tokenizer: Path | None = None
    """Folder with tokenizer.json (or a GGUF), for weights that have none of their own."""
    debug: bool = False
    """Show a traceback instead of one line when something goes wrong."""


GROUPS = {
    "conversation": ("system", "history", "max_new_tokens", "context"),
    "sampling": ("temperature", "top_k", "top_p", "min_p", "repetition_penalty", "seed"),
    "model": ("weights", "dtype", "quantize", "tokenizer"),
    "other": ("debug",),
}


def main(argv: list[str] | None = None) -> None:
    flags = command_line.parse(Flags, argv, __doc__, weights=("weights",))
    if flags.history and flags.system is not None:
        raise errors.UsageError("--system: the conversation of --history has its own beginning")
    opening = [] if flags.system is None else [{"role": "system", "content": flags.system}]
    messages = read_history(flags.history) if flags.history else list(opening)
    from smollm_jax.runtime import compilation_cache

    compilation_cache.enable()
    from smollm_jax.generation.engine import Engine

    flags.sampling.checked()
    engine = Engine.load(flags.weights, dtype=flags.dtype, tokenizer=flags.tokenizer, quantize=flags.quantize)
    sampling = flags.sampling.over(engine.generation)
    engine.chat([{"role": "user", "content": ""}])  # a folder without a chat template is refused now
    with contextlib.suppress(ImportError):
        import readline  # noqa: F401  # lines can be edited, and earlier ones recalled
    print(f"{flags.weights}: {HELP}", file=sys.stderr)
    for line in filter(None, [flags.sampling.said(engine.generation), engine.generation.note]):
        print(line, file=sys.stderr)
    if flags.history:
        opening = [message for message in messages[:1] if message["role"] == "system"]
    while (line := ask()) is not None:
        command, _, argument = line.strip().partition(" ")
        if command == "/exit":
            return
        if command == "/reset":
            messages = list(opening)
            print("(a new conversation)", file=sys.stderr)
        elif command == "/save":
            save(argument.strip(), messages)
        elif command.startswith("/"):
            print(HELP if command == "/help" else f"no command {command}; {HELP}", file=sys.stderr)
        elif line.strip():
            asked = [*messages, {"role": "user", "content": line}]
            try:
                answer = say(engine, asked, sampling, flags)
            except errors.UsageError as error:  # a text that cannot be encoded, or a full context
                print(f"error: {error}; /reset begins anew", file=sys.stderr)
                continue
            messages = [*asked, {"role": "assistant", "content": answer}]
            sampling = dataclasses.replace(sampling, seed=(sampling.seed + 1) % 2**32)


def ask() -> str | None:
    """The next line, None at the end of the input. Ctrl-C at the prompt leaves as in any shell tool."""
    try:
        return input("> " if sys.stdin.isatty() else "")
    except EOFError:
        return None
    except UnicodeDecodeError as error:
        raise errors.InputFileError(f"stdin: byte {error.start} of a line is not UTF-8") from error


def say(engine: "Engine", messages: list[dict[str, str]], sampling: Any, flags: Flags) -> str:
    """The answer, shown as it comes; what came of it when Ctrl-C ended it."""
    pieces = engine.stream(
        [engine.chat(messages)], max_new_tokens=flags.max_new_tokens, sampling=sampling, context=flags.context
    )
    answer = ""
    try:
        for piece in pieces:
            answer += piece.text
            print(piece.text, end="", flush=True)
            if piece.finish == "length":
                print(f" (cut: --max-tokens is {flags.max_new_tokens})", end="", file=sys.stderr, flush=True)
    except KeyboardInterrupt:
        print(" (ended)", end="", file=sys.stderr, flush=True)
    finally:
        pieces.close()  # ends the computing
        print(flush=True)
    return answer


def save(name: str, messages: list[dict[str, str]]) -> None:
    """Writes the conversation, or says why it cannot; what lies at `name` already is left alone."""
    if not name:
        print("/save needs a file's name", file=sys.stderr)
        return
    try:
        with open(name, "x", encoding="utf-8") as file:
            file.write(json.dumps(messages, ensure_ascii=False, indent=2) + "\n")
    except (OSError, ValueError) as error:
        print(f"error: {name}: not saved: {error}", file=sys.stderr)
    else:
        print(f"({name}: {len(messages)} messages)", file=sys.stderr)


def read_history(path: Path) -> list[dict[str, str]]:
    """The messages in a file that /save wrote."""
    from smollm_jax.runtime.files import read_json

    messages = read_json(path)
    roles = ("system", "user", "assistant")
    right = isinstance(messages, list) and all(
        isinstance(m, dict) and set(m) == {"role", "content"} and m["role"] in roles and isinstance(m["content"], str)
        for m in messages
    )
    if not right:
        raise errors.InputFileError(f"{path}: not a list of messages with a 'role' of {', '.join(roles)} and 'content'")
    return messages
