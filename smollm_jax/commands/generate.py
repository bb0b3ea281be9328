"""Continue texts with any SmolLM2 weights.

    python scripts/generate.py --weights assets/SmolLM2-135M-Instruct --prompt "The capital of France is"
    python scripts/generate.py --weights runs/my-run --prompt "Fellow citizens" --temp 0.8 --top-p 0.95
    python scripts/generate.py --weights PATH --prompt-file a.txt --prompt-file b.txt --json --logprobs 5
    echo "Once upon a time" | python scripts/generate.py --weights PATH

Weights: a run folder or one step under its checkpoints/, a Hugging Face folder, a .pt, .safetensors or .gguf file.
Without sampling flags the weights' generation_config.json sets the sampling, and decoding is greedy if there is none;
stderr shows which. --prompt "" starts a new text from the beginning-of-text token. A single text is printed as it is
generated; several are generated as one batch and printed when all are done. stderr shows the speed at the end. --json
prints one object: text, token ids, log-probabilities and timings. Compiled programs are kept in
~/.cache/smollm-jax/compiled (or JAX_COMPILATION_CACHE_DIR).
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
    """Weights in any format."""
    adapter: Path | None = None
    """A LoRA adapter for these weights: a folder in peft's layout, or a run that trained one."""
    prompt: tyro.conf.UseAppendAction[tuple[str, ...]] = ()
    """Text to continue; repeat it for several. Without --prompt and --prompt-file, stdin is read."""
    prompt_file: tyro.conf.UseAppendAction[tuple[Path, ...]] = ()
    """UTF-8 file whose whole text is a prompt; repeat it for several."""
    max_new_tokens: Annotated[int, tyro.conf.arg(aliases=["--max-tokens"])] = 64
    """Maximum number of tokens to generate."""
    sampling: tyro.conf.OmitArgPrefixes[SamplingFlags] = dataclasses.field(default_factory=SamplingFlags)
    stop: tyro.conf.UseAppendAction[tuple[str, ...]] = ()
    """Stop before this string; repeat it for several."""
    context: Literal["error", "slide"] = "error"
    """When prompt and new tokens exceed the context: an error, or drop the older half whenever it is full."""
    chat: bool = False
    """Send each prompt as a user message through the chat template (Instruct weights)."""
    system: str | None = None
    """System prompt of the chat; implies --chat."""
    special_tokens: bool = False
    """Encode a special token in a prompt, such as <|im_start|>, as one token instead of as plain text."""
    json: bool = False
    """Print one JSON object instead of the text."""
    logprobs: int = 0
    """With --json: number of most likely alternatives to show for each token."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Dtype of weights and cache; bfloat16 matmuls are slow in XLA on a CPU."""
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
    "model": ("weights", "adapter", "dtype", "quantize", "tokenizer"),
    "other": ("debug",),
}


def main(argv: list[str] | None = None) -> None:
    startup = QuickStart()  # until the weights are loaded
    flags = command_line.parse(Flags, argv, __doc__, weights=("weights",))
    if flags.logprobs and not flags.json:
        raise errors.UsageError("--logprobs needs --json, which shows them")
    if flags.special_tokens and is_chat(flags):
        raise errors.UsageError("--special-tokens cannot be used in a chat: only the template's own tokens are special")
    prompts = read_prompts(flags)
    from smollm_jax.runtime import compilation_cache

    compilation_cache.enable()
    from smollm_jax.generation.engine import Engine

    start_time = time.perf_counter()
    flags.sampling.checked()
    engine = Engine.load(
        flags.weights, dtype=flags.dtype, tokenizer=flags.tokenizer, quantize=flags.quantize, adapter=flags.adapter
    )
    sampling = flags.sampling.over(engine.generation)
    for line in filter(None, [flags.sampling.said(engine.generation), engine.generation.note]):
        print(line, file=sys.stderr)
    ids = [encode(engine, prompt, flags) for prompt in prompts]
    startup.end()
    options = {"max_new_tokens": flags.max_new_tokens, "sampling": sampling, "stop": flags.stop}
    options |= {"context": flags.context, "alternatives": flags.logprobs if flags.json else None}
    timings: dict[str, float] = {"load_seconds": time.perf_counter() - start_time}
    if flags.json:
        print(json.dumps(generate_all(engine, prompts, ids, options, timings), indent=2))  # ASCII, for any locale
    elif len(prompts) > 1:
        for row in generate_all(engine, prompts, ids, options, timings)["completions"]:
            print(f"{'' if is_chat(flags) else row['prompt']}{row['text']}\n")
    else:
        chunks = engine.stream(ids, **options)  # raises before anything is printed
        if not is_chat(flags):
            print(prompts[0], end="", flush=True)
        for chunk in timed(chunks, len(ids), timings):
            print(chunk.text, end="", flush=True)
        print()
    if "tokens_per_second" in timings:
        count, rate = int(timings["tokens"]), timings["tokens_per_second"]
        untimed = int(timings["first_tokens"])
        print(f"{count} tokens, {rate:.1f} tokens/s after the first {untimed}", file=sys.stderr)


def is_chat(flags: Flags) -> bool:
    """Whether the prompts are messages of a chat."""
    return flags.chat or flags.system is not None


def read_prompts(flags: Flags) -> list[str]:
    """The prompts of the flags, then those of the files; without either, the text of stdin."""
    from smollm_jax.runtime.files import read_bytes, text_of

    # Editors and shells of Windows write a byte order mark, which is not part of the text.
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
    return [text.removesuffix("\n")]  # echo adds one


def encode(engine: "Engine", prompt: str, flags: Flags) -> list[int]:
    """The token ids of a prompt, as a text or as a message of a chat."""
    if not is_chat(flags):
        return engine.encode(prompt, parse_special=flags.special_tokens)
    system = [] if flags.system is None else [{"role": "system", "content": flags.system}]
    return engine.chat([*system, {"role": "user", "content": prompt}])


def timed(chunks: Iterator["Chunk"], rows: int, timings: dict[str, float]) -> Iterator["Chunk"]:
    """Yields the same chunks and, when they end, adds their timings to `timings`.

    The speed excludes the first two chunks of each row: prefill and the first decode call may have been compiled.
    """
    start_time = now = time.perf_counter()
    count, untimed, speed_start = 0, 0, start_time
    for number, chunk in enumerate(chunks, 1):
        now = time.perf_counter()
        count += len(chunk.tokens)
        timings.setdefault("first_token_seconds", now - start_time)
        if number <= 2 * rows:
            untimed, speed_start = count, now
        yield chunk
    timings |= {"seconds": now - start_time, "tokens": count, "first_tokens": untimed}
    if count > untimed:
        timings |= {"tokens_per_second": (count - untimed) / (now - speed_start)}


def generate_all(
    engine: "Engine", prompts: list[str], ids: list[list[int]], options: dict[str, Any], timings: dict[str, float]
) -> dict[str, Any]:
    """The object that --json prints: every completion with its tokens, and the timings of the whole batch."""
    rows: list[dict[str, Any]] = [
        {"prompt": prompt, "prompt_ids": row, "text": "", "ids": [], "logprobs": [], "alternatives": [], "finish": None}
        for prompt, row in zip(prompts, ids, strict=True)
    ]
    for chunk in timed(engine.stream(ids, **options), len(ids), timings):
        row = rows[chunk.row]
        row["text"] += chunk.text
        row["ids"] += [token.id for token in chunk.tokens]
        row["logprobs"] += [token.logprob for token in chunk.tokens]
        row["alternatives"] += [
            [{"id": i, "text": text, "logprob": logprob} for i, text, logprob in token.alternatives]
            for token in chunk.tokens
        ]
        row["finish"] = chunk.finish
    return {"completions": rows, "timings": timings}
