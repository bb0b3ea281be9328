"""Talk with Instruct weights in the terminal.

    python scripts/chat.py --weights assets/SmolLM2-135M-Instruct
    python scripts/chat.py --weights PATH --system "You answer in one sentence." --temp 0.7 --top-p 0.9
    python scripts/chat.py --weights PATH --history talk.json      # continue a conversation that /save wrote

The model reads the whole conversation at every turn. An answer is printed as it is generated; Ctrl-C stops it, and the
conversation keeps what was generated. A line that begins with / is a command:

    /reset        start a new conversation with the same system prompt
    /save FILE    write the conversation as JSON, a list of {"role", "content"}
    /help         list the commands
    /exit         leave (as does the end of the input, Ctrl-D)

Compiled programs are kept in ~/.cache/smollm-jax/compiled, so only the very first answer waits for the compiler.
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
    """Instruct weights in any format."""
    adapter: Path | None = None
    """A LoRA adapter for these weights: a folder in peft's layout, or a run that trained one."""
    system: str | None = None
    """System prompt. Default: the template's own."""
    history: Path | None = None
    """Conversation to continue, a file that /save wrote."""
    max_new_tokens: Annotated[int, tyro.conf.arg(aliases=["--max-tokens"])] = 512
    """Maximum number of tokens in an answer."""
    sampling: tyro.conf.OmitArgPrefixes[SamplingFlags] = dataclasses.field(default_factory=SamplingFlags)
    context: Literal["error", "slide"] = "error"
    """When conversation and answer exceed the context: an error, or drop the older half whenever it is full."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Dtype of weights and cache; bfloat16 matmuls are slow in XLA on a CPU."""
    quantize: Literal["bf16", "int8"] | None = None
    """On a CPU: store matrices as bfloat16 or in int8 blocks of 32 (GGUF's q8_0) and compute in float32."""
    tokenizer: Path | None = None
    """Folder with tokenizer.json (or a GGUF), for weights that have none of their own."""
    debug: bool = False
    """Show a traceback instead of one line when something goes wrong."""


GROUPS = {
    "conversation": ("system", "history", "max_new_tokens", "context"),
    "sampling": ("temperature", "top_k", "top_p", "min_p", "repetition_penalty", "seed"),
    "model": ("weights", "adapter", "dtype", "quantize", "tokenizer"),
    "other": ("debug",),
}


def main(argv: list[str] | None = None) -> None:
    flags = command_line.parse(Flags, argv, __doc__, weights=("weights",))
    if flags.history and flags.system is not None:
        raise errors.UsageError("--system cannot be used with --history, which is continued as it was saved")
    system_messages = [] if flags.system is None else [{"role": "system", "content": flags.system}]
    messages = read_history(flags.history) if flags.history else list(system_messages)
    from smollm_jax.runtime import compilation_cache

    compilation_cache.enable()
    from smollm_jax.generation.engine import Engine

    flags.sampling.checked()
    engine = Engine.load(
        flags.weights, dtype=flags.dtype, tokenizer=flags.tokenizer, quantize=flags.quantize, adapter=flags.adapter
    )
    sampling = flags.sampling.over(engine.generation)
    engine.chat([{"role": "user", "content": ""}])  # raises now if the weights have no chat template
    with contextlib.suppress(ImportError):
        import readline  # noqa: F401  # gives input() line editing and a history
    print(f"{flags.weights}: {HELP}", file=sys.stderr)
    for line in filter(None, [flags.sampling.said(engine.generation), engine.generation.note]):
        print(line, file=sys.stderr)
    if flags.history:
        system_messages = [message for message in messages[:1] if message["role"] == "system"]
    while (line := read_line()) is not None:
        command, _, argument = line.strip().partition(" ")
        if command == "/exit":
            return
        if command == "/reset":
            messages = list(system_messages)
            print("(new conversation)", file=sys.stderr)
        elif command == "/save":
            save(argument.strip(), messages)
        elif command.startswith("/"):
            print(HELP if command == "/help" else f"unknown command {command}; {HELP}", file=sys.stderr)
        elif line.strip():
            with_question = [*messages, {"role": "user", "content": line}]
            try:
                answer = print_answer(engine, with_question, sampling, flags)
            except errors.UsageError as error:  # a text that cannot be encoded, or a full context
                print(f"error: {error}; /reset starts a new conversation", file=sys.stderr)
                continue
            messages = [*with_question, {"role": "assistant", "content": answer}]
            sampling = dataclasses.replace(sampling, seed=(sampling.seed + 1) % 2**32)


def read_line() -> str | None:
    """The next line, None at the end of the input. Ctrl-C at the prompt leaves as in any shell tool."""
    try:
        return input("> " if sys.stdin.isatty() else "")
    except EOFError:
        return None
    except UnicodeDecodeError as error:
        raise errors.InputFileError(f"stdin: byte {error.start} of a line is not UTF-8") from error


def print_answer(engine: "Engine", messages: list[dict[str, str]], sampling: Any, flags: Flags) -> str:
    """Prints the answer while it is generated and returns it; Ctrl-C ends it early."""
    chunks = engine.stream(
        [engine.chat(messages)], max_new_tokens=flags.max_new_tokens, sampling=sampling, context=flags.context
    )
    answer = ""
    try:
        for chunk in chunks:
            answer += chunk.text
            print(chunk.text, end="", flush=True)
            if chunk.finish == "length":
                print(f" (cut off at --max-tokens {flags.max_new_tokens})", end="", file=sys.stderr, flush=True)
    except KeyboardInterrupt:
        print(" (interrupted)", end="", file=sys.stderr, flush=True)
    finally:
        chunks.close()  # stops the generation
        print(flush=True)
    return answer


def save(name: str, messages: list[dict[str, str]]) -> None:
    """Writes the conversation to a new file, or prints why it cannot."""
    if not name:
        print("/save needs a file name", file=sys.stderr)
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
    valid = isinstance(messages, list) and all(
        isinstance(m, dict) and set(m) == {"role", "content"} and m["role"] in roles and isinstance(m["content"], str)
        for m in messages
    )
    if not valid:
        raise errors.InputFileError(f"{path}: not a list of messages with a 'role' of {', '.join(roles)} and 'content'")
    return messages
