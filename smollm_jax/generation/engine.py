"""Text in, text out: streamed text, stop strings and log-probabilities on top of `generate.stream_tokens`."""

import dataclasses
import threading
from collections.abc import Generator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from smollm_jax.config.generation_config import GenerationConfig
from smollm_jax.errors import UsageError, short_repr
from smollm_jax.generation import generate, programs
from smollm_jax.generation.quantized import Blocks, Quantize, Quantized, validate_quantize
from smollm_jax.generation.sampling import GREEDY, Sampling
from smollm_jax.generation.unrolled import Unrolled
from smollm_jax.model.precision import without_tf32
from smollm_jax.tokenizer import Tokenizer
from smollm_jax.tokenizer.conversation import Message
from smollm_jax.tokenizer.tokenizer import TextStream
from smollm_jax.weights.hub import locate

if TYPE_CHECKING:
    from smollm_jax.model.smollm import SmolLM

FinishReason = Literal["eos", "stop", "length"]


@dataclasses.dataclass(frozen=True)
class Token:
    """One new token, decoded on its own."""

    id: int
    text: str  # incomplete UTF-8 shows as U+FFFD; "" for an eos token
    logprob: float | None  # of the raw logits: before repetition penalty, temperature and filters
    alternatives: tuple[tuple[int, str, float], ...]  # (id, text, logprob), likeliest first


@dataclasses.dataclass(frozen=True)
class Chunk:
    """The new text and tokens of one row of a batch; `finish` is set only in the last chunk of a row."""

    row: int
    text: str  # whole characters; "" while a character or a possible stop string is incomplete
    tokens: tuple[Token, ...]
    finish: FinishReason | None


@dataclasses.dataclass(frozen=True)
class Completion:
    """The complete output of a row: all its chunks, joined."""

    text: str
    tokens: tuple[Token, ...]  # including those of a stop string, and eos
    finish: FinishReason
    prompt_tokens: int


class Engine:
    """A model and its tokenizer, ready to generate text. Its methods may be called from several threads at once."""

    def __init__(self, model: "SmolLM | Quantized", tokenizer: Tokenizer, generation: GenerationConfig | None = None):
        """`generation`: the default sampling and eos tokens of the weights; None: greedy, with the config's eos."""
        self.config = model.config
        self.tokenizer = tokenizer
        self.generation = generation or GenerationConfig.from_values(None, self.config, "")
        self.decoder = model if isinstance(model, Quantized) else Unrolled.from_model(model)
        self.eos_token_ids = self.generation.eos_token_ids
        self._token_texts: dict[int, str] = {i: "" for i in self.eos_token_ids}
        self._encode_lock = threading.Lock()  # the options of an encode call are state of the tokenizer

    @classmethod
    def load(
        cls,
        path: str | Path,
        *,
        dtype: Any = "float32",
        tokenizer: str | Path | None = None,
        quantize: Quantize | None = None,
        adapter: Path | None = None,
    ) -> "Engine":
        """An engine from weights of any kind, with their own tokenizer; weights without one need `tokenizer`.

        `adapter`: a LoRA adapter in peft's files, or a run that trained one, which is merged into the weights.
        `quantize`: decode on a CPU with quantized matrices, see `quantized.py`; a q8_0 GGUF is used as stored.
        """
        from smollm_jax import weights
        from smollm_jax.weights import gguf_reader

        if quantize is not None:
            validate_quantize(quantize, dtype)
        path = locate(path)
        weights.kind_of(path)  # reports a bad path before a missing tokenizer
        chosen_tokenizer = Tokenizer.of_weights(path, None if tokenizer is None else Path(tokenizer))
        bundle = weights.read(path, mapped=True, adapter=adapter)
        source = f"{path}: generation_config"
        generation = GenerationConfig.from_values(bundle.generation_config, bundle.config, source)
        model = weights.from_bundle(bundle, jnp.dtype(dtype))
        if quantize is not None:
            use_stored = quantize == "int8" and weights.kind_of(path) == "gguf" and adapter is None
            stored = {name: Blocks(*arrays) for name, arrays in gguf_reader.q8_0(path).items()} if use_stored else {}
            model = Quantized.from_model(model, quantize, stored)
        return cls(model, chosen_tokenizer, generation)

    @property
    def defaults(self) -> Sampling:
        """The weights' own sampling parameters: greedy unless their `generation_config.json` says otherwise."""
        return Sampling(**self.generation.sampling)

    @property
    def model(self) -> "SmolLM":
        """The model itself."""
        return self.decoder.model

    def share_equal_weights(self, other: "Engine") -> None:
        """Replaces each array that equals one of an engine of the same shape by that one, so that both need it once."""
        self.decoder = jax.tree.map(
            lambda mine, theirs: theirs if np.array_equal(mine, theirs) else mine, self.decoder, other.decoder
        )

    def encode(self, prompt: str, *, parse_special: bool = False, add_special_tokens: bool = True) -> list[int]:
        """Token ids of a prompt, with the special tokens that the tokenizer adds.

        Special tokens written in the prompt are plain text unless `parse_special`. An empty prompt becomes the bos (or
        eos) token, for unconditional generation. Raises `UsageError` if the config has neither.
        """
        with self._encode_lock:
            ids = self.tokenizer.encode(prompt, parse_special=parse_special, add_special_tokens=add_special_tokens)
        if ids:
            return ids
        bos = self.generation.bos_token_id
        if bos is None:
            bos = next(iter(self.eos_token_ids), None)
        if bos is None:
            raise UsageError("an empty prompt needs a bos or eos token, and the config has neither: give a prompt")
        return [bos]

    def chat(
        self,
        messages: Sequence[Message],
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        add_generation_prompt: bool = True,
    ) -> list[int]:
        """Token ids of a conversation in the chat template, up to the start of the assistant's answer."""
        with self._encode_lock:
            return self.tokenizer.apply_chat_template(
                messages, tools=tools, add_generation_prompt=add_generation_prompt
            )

    def stream(
        self,
        prompts: Sequence[Sequence[int]],
        *,
        max_new_tokens: int,
        sampling: Sampling | Sequence[Sampling] = GREEDY,
        stop: Sequence[str] = (),
        alternatives: int | None = None,
        context: Literal["error", "slide"] = "error",
        tokens_per_call: int = 1,
    ) -> Generator[Chunk, None, None]:
        """Yields chunks as they are generated; closing the iterator stops the device within `tokens_per_call` tokens.

        `sampling` is one for all rows or one per row. A text ends at any of `generation.eos_token_ids` or before the
        first of the strings in `stop`. `alternatives`: None for no log-probabilities, n for those of each token and of
        the n likeliest. If the context is too short, "error" raises and "slide" continues from its last half.
        Raises `UsageError` at the call, not at the first chunk.
        """
        if context not in ("error", "slide"):
            raise UsageError(f"context must be 'error' or 'slide', got {short_repr(context)}")
        generate.validate_prompts(self.config, prompts, max_new_tokens, slide=context == "slide")
        samplings = [sampling] * len(prompts) if isinstance(sampling, Sampling) else sampling
        if not isinstance(samplings, list | tuple) or not all(isinstance(item, Sampling) for item in samplings):
            raise UsageError(f"sampling must be a Sampling or a list of them, got {short_repr(sampling)}")
        if len(samplings) != len(prompts):
            raise UsageError(f"sampling must have one entry for each of {len(prompts)} prompts, got {len(samplings)}")
        if not isinstance(stop, list | tuple) or not all(isinstance(string, str) and string for string in stop):
            raise UsageError(f"stop must be a list of non-empty strings, got {short_repr(stop)}")
        limit = programs.MAX_ALTERNATIVES
        if alternatives is not None and (type(alternatives) is not int or not 0 <= alternatives <= limit):
            raise UsageError(
                f"alternatives must be None or an integer from 0 to {limit}, got {short_repr(alternatives)}"
            )
        if type(tokens_per_call) is not int or tokens_per_call < 1:
            raise UsageError(f"tokens_per_call must be an integer of at least 1, got {short_repr(tokens_per_call)}")
        outputs = generate.stream_tokens(
            self.decoder,
            prompts,
            max_new_tokens=max_new_tokens,
            samplings=samplings,
            eos_token_ids=self.eos_token_ids,
            tokens_per_call=tokens_per_call,
            return_logprobs=alternatives is not None,
            slide=context == "slide",
        )
        return self._chunks(outputs, len(prompts), max_new_tokens, tuple(stop), alternatives)

    def complete(self, prompts: Sequence[Sequence[int]], **options: Any) -> list[Completion]:
        """The complete output for every prompt; options as in `stream`."""
        options.setdefault("tokens_per_call", generate.TOKENS_PER_CALL)
        stream = self.stream(prompts, **options)
        chunks: list[list[Chunk]] = [[] for _ in prompts]
        for chunk in stream:
            chunks[chunk.row].append(chunk)
        return [
            Completion(
                "".join(chunk.text for chunk in row),
                tuple(token for chunk in row for token in chunk.tokens),
                row[-1].finish or "length",
                len(prompt),
            )
            for row, prompt in zip(chunks, prompts, strict=True)
        ]

    def _chunks(
        self,
        outputs: Generator[programs.DecodeOutput, None, None],
        rows: int,
        max_new_tokens: int,
        stop: tuple[str, ...],
        alternatives: int | None,
    ) -> Generator[Chunk, None, None]:
        texts = [RowText(self, row, max_new_tokens, stop, alternatives) for row in range(rows)]
        running = set(range(rows))
        while running:
            with without_tf32(self.model.head.dtype):
                output = next(outputs)
            for row in sorted(running):
                chunk = texts[row].add(output, row)
                if chunk.finish:
                    running.discard(row)
                yield chunk

    def token(self, i: int, output: programs.DecodeOutput, index: tuple[int, int], alternatives: int | None) -> Token:
        """The token `i` at `index`, a row and a step; with its log-probabilities unless `alternatives` is None."""
        if alternatives is None:
            return Token(i, self.token_text(i), None, ())
        ids, logprobs = output.top_ids[index][:alternatives].tolist(), output.top_logprobs[index].tolist()
        top = tuple((j, self.token_text(j), logprob) for j, logprob in zip(ids, logprobs, strict=False))
        return Token(i, self.token_text(i), float(output.logprobs[index]), top)

    def token_text(self, i: int) -> str:
        """The text of one token; "" for an eos token."""
        if i not in self._token_texts:
            self._token_texts[i] = self.tokenizer.decode([i])
        return self._token_texts[i]


class RowText:
    """The text of one row while it is generated: it ends at eos, before a stop string, or after `max_new_tokens`."""

    def __init__(
        self, engine: Engine, row: int, max_new_tokens: int, stop: Sequence[str], alternatives: int | None
    ) -> None:
        self._engine, self._row, self._alternatives = engine, row, alternatives
        self._filter = StopStringFilter(engine.tokenizer, stop)
        self._max_new_tokens = max_new_tokens
        self.count = 0

    def add(self, output: programs.DecodeOutput, row: int) -> Chunk:
        """The new text and tokens in row `row` of a device call's output."""
        text, tokens, finish = "", [], None
        for step, i in enumerate(output.ids[row].tolist()):
            if i == programs.PAD_ID:
                break
            tokens.append(self._engine.token(i, output, (row, step), self._alternatives))
            self.count += 1
            if i in self._engine.eos_token_ids:
                finish = "eos"
            else:
                text += self._filter.add(i)
                finish = "length" if self.count == self._max_new_tokens else None
            if finish or self._filter.stopped:
                text += self._filter.end()
                finish = "stop" if self._filter.stopped else finish
                break
        return Chunk(self._row, text, tuple(tokens), finish)


class StopStringFilter:
    """Decodes a stream of token ids to whole characters, up to the first of some stop strings.

    Text that may be the beginning of a stop string is held back; `stopped` tells whether one was found.
    """

    def __init__(self, tokenizer: Tokenizer, stop: Sequence[str]):
        self._stream = TextStream(tokenizer)
        self._stop = stop
        self._held = ""
        self.stopped = False

    def add(self, token: int) -> str:
        """The characters that are now certain to be part of the text."""
        return self._release(self._stream.add([token]))

    def end(self) -> str:
        """The text held back so far, to be released at the end of the stream; "" after a stop string."""
        return "" if self.stopped else self._release(self._stream.end(), last=True)

    def _release(self, new: str, last: bool = False) -> str:
        held = self._held + new
        stops = [position for position in (held.find(stop) for stop in self._stop) if position >= 0]
        if stops:
            self.stopped, self._held = True, ""
            return held[: min(stops)]
        longest = 0 if last else min(max(map(len, self._stop), default=0), len(held))
        hold = next((n for n in range(longest, 0, -1) if any(stop.startswith(held[-n:]) for stop in self._stop)), 0)
        self._held = held[len(held) - hold :]
        return held[: len(held) - hold]
