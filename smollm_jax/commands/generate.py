"""Continue texts with any SmolLM2 weights.

    python scripts/generate.py --weights assets/SmolLM2-135M-Instruct --prompt "The capital of France is"
    python scripts/generate.py --weights runs/my-run --prompt "Fellow citizens" --temp 0.8 --top-p 0.95
    python scripts/generate.py --weights PATH --prompt-file a.txt --prompt-file b.txt --json --logprobs 5
    echo "Once upon a time" | python scripts/generate.py --weights PATH

Weights: a run folder or one step under its checkpoints/, a Hugging Face folder, a .pt, .safetensors or .gguf file.
Without sampling flags the weights' own generation_config.json says how the next token is chosen, greedy where there is
none; a line on stderr says which. --prompt "" writes a text from nothing: from the token that begins one.
One text is shown as it comes, several in a batch one after the other when all are done; the speed is printed at the
end on stderr. --json prints one object: text, token ids, log-probabilities and timings. Compiled programs are kept in
~/.cache/smollm-jax/compiled (JAX_COMPILATION_CACHE_DIR names another folder).
"""

import codecs
import dataclasses
import json
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import tyro

from smollm_jax import errors
from smollm_jax.commands import command_line
from smollm_jax.generation.flags import SamplingFlags
from smollm_jax.runtime import streams
from smollm_jax.runtime.startup import QuickStart

if TYPE_CHECKING:
    from smollm_jax.generation.engine import Chunk, Engine


@dataclasses.dataclass(frozen=True)
class Flags:
    weights: Annotated[Path, tyro.conf.arg(aliases=["--checkpoint-path"])]
    """Weights of any kind."""
    prompt: tyro.conf.UseAppendAction[tuple[str, ...]] = ()
    """A text to continue; again for each further one. With none, and no --prompt-file, stdin is read."""
    prompt_file: tyro.conf.UseAppendAction[tuple[Path, ...]] = ()
    """A UTF-8 file whose whole text is a prompt; again for each further one."""
    max_new_tokens: Annotated[int, tyro.conf.arg(aliases=["--max-tokens"])] = 64
    """Tokens to add at most."""
    sampling: tyro.conf.OmitArgPrefixes[SamplingFlags] = dataclasses.field(default_factory=SamplingFlags)
    stop: tyro.conf.UseAppendAction[tuple[str, ...]] = ()
    """Ends a text before this string; again for each further one."""
    context: Literal["error", "slide"] = "error"
    """Where prompt and new tokens exceed the context: refuse, or go on from its last half whenever it is full."""
    chat: bool = False
    """Ask as the user of a chat (Instruct weights)."""
    system: str | None = None
    """System prompt of the chat; asks as --chat does."""
    special_tokens: bool = False
    """Special tokens typed in a prompt (<|im_start|>) count as such instead of as plain text."""
    json: bool = False
    """Print one JSON object instead of the text."""
    logprobs: int = 0
    """With --json: how many of the likeliest tokens to give beside each chosen one."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Of the weights and the cache; XLA multiplies bfloat16 slowly on a CPU."""
    quantize: Literal["bf16", "int8"] | None = None
    """On a CPU: store matrices as bfloat16 or in int8 blocks of 32 (GGUF's q8_0) and compute in float32."""
    tokenizer: Path | None = None
    """Folder with tokenizer.json (or a GGUF), for weights that have none of their own."""
    debug: bool = False
    """Show a traceback instead of one line when something goes wrong."""


GROUPS = {
    "prompt": ("prompt", "prompt_file", "chat", "system", "special_tokens"),
    "text": ("max_new_tokens", "stop", "context", "json", "logprobs"),
    "sampling": ("temperature", "top_k", "top_p", "min_p", "repetition_penalty", "seed"),
    "model": ("weights", "dtype", "quantize", "tokenizer"),
    "other": ("debug",),
}


def main(argv: list[str] | None = None) -> None:
    startup = QuickStart()  # until the weights are loaded
    flags = command_line.parse(Flags, argv, __doc__, weights=("weights",))
    if flags.logprobs and not flags.json:
        raise errors.UsageError("--logprobs: only --json shows them")
    if flags.special_tokens and asks(flags):
        raise errors.UsageError("--special-tokens is for texts: in a chat only the template's own tokens are special")
    prompts = read_prompts(flags)
    from smollm_jax.runtime import compilation_cache

    compilation_cache.enable()
    from smollm_jax.generation.engine import Engine

    began = time.perf_counter()
    flags.sampling.checked()
    engine = Engine.load(flags.weights, dtype=flags.dtype, tokenizer=flags.tokenizer, quantize=flags.quantize)
    sampling = flags.sampling.over(engine.generation)
    for line in filter(None, [flags.sampling.said(engine.generation), engine.generation.note]):
        print(line, file=sys.stderr)
    ids = [encode(engine, prompt, flags) for prompt in prompts]
    startup.end()
    options = {"max_new_tokens": flags.max_new_tokens, "sampling": sampling, "stop": flags.stop}
    options |= {"context": flags.context, "alternatives": flags.logprobs if flags.json else None}
    timings: dict[str, float] = {"load_seconds": time.perf_counter() - began}
    if flags.json:
        print(json.dumps(write_all(engine, prompts, ids, options, timings), indent=2))  # ASCII: any pipe takes it
    elif len(prompts) > 1:
        for row in write_all(engine, prompts, ids, options, timings)["completions"]:
            print(f"{'' if asks(flags) else row['prompt']}{row['text']}\n")
    else:
        pieces = engine.stream(ids, **options)  # refuses before anything is shown
        if not asks(flags):
            print(prompts[0], end="", flush=True)
        for piece in timed(pieces, len(ids), timings):
            print(piece.text, end="", flush=True)
        print()
    if "tokens_per_second" in timings:
        count, rate = int(timings["tokens"]), timings["tokens_per_second"]
        first = int(timings["first_tokens"])
        print(f"{count} tokens, {rate:.1f} tokens/s after the first {first}", file=sys.stderr)


def asks(flags: Flags) -> bool:
    """Whether the prompts are messages of a chat."""
    return flags.chat or flags.system is not None


def read_prompts(flags: Flags) -> list[str]:
    """The prompts in the order of their kinds: flags, files, else stdin."""
    from smollm_jax.runtime.files import read_bytes, text_of

    # Windows' editors and shells put a byte order mark first, which is no part of the text.
    files = [text_of(read_bytes(file).removeprefix(codecs.BOM_UTF8), file) for file in flags.prompt_file]
    prompts = [*flags.prompt, *files]
    if prompts:
        return prompts
    if streams.no_text_on_stdin():
        raise errors.UsageError("give --prompt, --prompt-file or a text on stdin")
    try:
        text = sys.stdin.buffer.read().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise errors.InputFileError(f"stdin: byte {error.start} is not UTF-8") from error
    return [text.removesuffix("\n")]  # the one that echo adds


def encode(engine: "Engine", prompt: str, flags: Flags) -> list[int]:
    """The tokens a prompt gives, as a text or as a message."""
    if not asks(flags):
        return engine.encode(prompt, parse_special=flags.special_tokens)
    system = [] if flags.system is None else [{"role": "system", "content": flags.system}]
    return engine.chat([*system, {"role": "user", "content": prompt}])


def timed(pieces: Iterator["Chunk"], rows: int, timings: dict[str, float]) -> Iterator["Chunk"]:
    """The same pieces; when they end, `timings` says how long they took.

    The clock of the speed starts after the second call, for each of the first two may have compiled its program.
    """
    began = now = time.perf_counter()
    first, count, second = 0, 0, began
    for number, piece in enumerate(pieces, 1):
        now = time.perf_counter()
        count += len(piece.tokens)
        timings.setdefault("first_token_seconds", now - began)
        if number <= 2 * rows:
            first, second = count, now
        yield piece
    timings |= {"seconds": now - began, "tokens": count, "first_tokens": first}
    if count > first:
        timings |= {"tokens_per_second": (count - first) / (now - second)}


def write_all(
    engine: "Engine", prompts: list[str], ids: list[list[int]], options: dict[str, Any], timings: dict[str, float]
) -> dict[str, Any]:
    """What --json shows: every text with its tokens, and the timings of all of them together."""
    rows: list[dict[str, Any]] = [
        {"prompt": prompt, "prompt_ids": row, "text": "", "ids": [], "logprobs": [], "alternatives": [], "finish": None}
        for prompt, row in zip(prompts, ids, strict=True)
    ]
    for piece in timed(engine.stream(ids, **options), len(ids), timings):
        row = rows[piece.row]
        row["text"] += piece.text
        row["ids"] += [token.id for token in piece.tokens]
        row["logprobs"] += [token.logprob for token in piece.tokens]
        row["alternatives"] += [
            [{"id": i, "text": text, "logprob": number} for i, text, number in token.alternatives]
            for token in piece.tokens
        ]
        row["finish"] = piece.finish
    return {"completions": rows, "timings": timings}
