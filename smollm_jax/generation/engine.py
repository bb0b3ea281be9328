"""Text in, text out: streams of whole characters, stop strings and log-probabilities on top of `generate.run`."""

import dataclasses
import threading
from collections.abc import Generator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import jax.numpy as jnp

from smollm_jax.config.generation_config import GenerationConfig
from smollm_jax.errors import UsageError, short_repr
from smollm_jax.generation import generate, programs
from smollm_jax.generation.quantized import Blocks, Quantize, Quantized, check
from smollm_jax.generation.sampling import GREEDY, Sampling
from smollm_jax.generation.unrolled import Unrolled
from smollm_jax.model.precision import without_tf32
from smollm_jax.tokenizer import Tokenizer
from smollm_jax.tokenizer.conversation import Message
from smollm_jax.tokenizer.tokenizer import TextStream
from smollm_jax.weights.hub import locate

if TYPE_CHECKING:
    from smollm_jax.model.smollm import SmolLM

Finish = Literal["eos", "stop", "length"]


@dataclasses.dataclass(frozen=True)
class Token:
    """One new token, by itself."""

    id: int
    text: str  # bytes that are no whole character show as U+FFFD; "" for one that ends the text
    logprob: float | None  # under the model's own softmax: before penalty, temperature and cuts
    alternatives: tuple[tuple[int, str, float], ...]  # (id, text, logprob), likeliest first


@dataclasses.dataclass(frozen=True)
class Piece:
    """What one row of a batch has got since its last piece; `finish` is set in a row's last one only."""

    row: int
    text: str  # whole characters; "" while a character or a stop string may be under way
    tokens: tuple[Token, ...]
    finish: Finish | None


@dataclasses.dataclass(frozen=True)
class Completion:
    """A whole text: all pieces of a row, joined."""

    text: str
    tokens: tuple[Token, ...]  # those of a stop string, and the one that ends the text, too
    finish: Finish
    prompt_tokens: int


class Engine:
    """A model and its tokenizer, ready to write. Its methods may be called from several threads at once."""

    def __init__(self, model: "SmolLM | Quantized", tokenizer: Tokenizer, generation: GenerationConfig | None = None):
        """`generation` is how the weights are to be written with; None: greedy, up to the config's eos tokens."""
        self.config = model.config
        self.tokenizer = tokenizer
        self.generation = generation or GenerationConfig.from_values(None, self.config, "")
        self._model = model if isinstance(model, Quantized) else Unrolled.of(model)
        self._eos = self.generation.eos_token_ids
        self._texts: dict[int, str] = {i: "" for i in self._eos}  # of single tokens
        self._encoding = threading.Lock()  # the tokenizer holds the way of one call at a time

    @classmethod
    def load(
        cls,
        path: str | Path,
        *,
        dtype: Any = "float32",
        tokenizer: str | Path | None = None,
        quantize: Quantize | None = None,
    ) -> "Engine":
        """The engine of weights of any kind, with their own tokenizer; weights without one need `tokenizer`.

        `quantize`: decode on a CPU with matrices of fewer bytes, see `quantized.py`; a q8_0 GGUF's as they lie.
        """
        from smollm_jax import weights
        from smollm_jax.weights import gguf_reader

        if quantize is not None:
            check(quantize, dtype)
        path = locate(path)
        weights.kind_of(path)  # says what is wrong with a path before its tokenizer is missed
        chosen = Tokenizer.of_weights(path, None if tokenizer is None else Path(tokenizer))
        bundle = weights.read(path, mapped=True)
        source = f"{path}: generation_config"
        generation = GenerationConfig.from_values(bundle.generation_config, bundle.config, source)
        model = weights.from_bundle(bundle, jnp.dtype(dtype))
        if quantize is not None:
            as_it_lies = quantize == "int8" and weights.kind_of(path) == "gguf"
            stored = {name: Blocks(*parts) for name, parts in gguf_reader.q8_0(path).items()} if as_it_lies else {}
            model = Quantized.of(model, quantize, stored)
        return cls(model, chosen, generation)

    @property
    def defaults(self) -> Sampling:
        """How the weights ask to be sampled from: greedy unless their `generation_config.json` says otherwise."""
        return Sampling(**self.generation.sampling)

    @property
    def model(self) -> "SmolLM":
        """The model itself."""
        return self._model.model

    def encode(self, prompt: str, *, parse_special: bool = False) -> list[int]:
        """Token ids of a text to continue, with what the tokenizer puts around a text.

        Special tokens in it are plain text unless `parse_special`. An empty prompt is the token that begins a text:
        what follows is unconditional. Raises `UsageError` where the config names no such token.
        """
        with self._encoding:
            ids = self.tokenizer.encode(prompt, parse_special=parse_special, add_special_tokens=True)
        if ids:
            return ids
        begins = self.generation.bos_token_id
        if begins is None:
            begins = next(iter(self._eos), None)
        if begins is None:
            raise UsageError("an empty prompt needs a token that begins a text, and the config names none")
        return [begins]

    def chat(self, messages: Sequence[Message]) -> list[int]:
        """Token ids of a conversation, up to where the assistant speaks."""
        with self._encoding:
            return self.tokenizer.apply_chat_template(messages)

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
    ) -> Generator[Piece, None, None]:
        """Pieces, as they come; closing the iterator ends the computing within `tokens_per_call` tokens.

        `sampling` is one for all rows or one a row. A text ends at any of `generation.eos_token_ids` or before the
        first of the strings `stop`. `alternatives`: None for no log-probabilities, n for each token's and those of
        the n likeliest. Where the context is full, "error" refuses beforehand and "slide" goes on from its last half.
        Raises `UsageError` here, not at the first piece.
        """
        if context not in ("error", "slide"):
            raise UsageError(f"context must be 'error' or 'slide', got {short_repr(context)}")
        generate.check(self.config, prompts, max_new_tokens, slide=context == "slide")
        samplings = [sampling] * len(prompts) if isinstance(sampling, Sampling) else sampling
        if not isinstance(samplings, list | tuple) or not all(isinstance(one, Sampling) for one in samplings):
            raise UsageError(f"sampling must be a Sampling, or a list of them, got {short_repr(sampling)}")
        if len(samplings) != len(prompts):
            raise UsageError(f"sampling must be one, or one for each of {len(prompts)} prompts, got {len(samplings)}")
        if not isinstance(stop, list | tuple) or not all(isinstance(one, str) and one for one in stop):
            raise UsageError(f"stop must be a sequence of strings that are not empty, got {short_repr(stop)}")
        most = programs.MOST_ALTERNATIVES
        if alternatives is not None and (type(alternatives) is not int or not 0 <= alternatives <= most):
            got = short_repr(alternatives)
            raise UsageError(f"alternatives must be None or an integer from 0 to {most}, got {got}")
        if type(tokens_per_call) is not int or tokens_per_call < 1:
            raise UsageError(f"tokens_per_call must be an integer of at least 1, got {short_repr(tokens_per_call)}")
        calls = generate.run(
            self._model,
            prompts,
            max_new_tokens=max_new_tokens,
            samplings=samplings,
            eos_token_ids=self._eos,
            tokens_per_call=tokens_per_call,
            report=alternatives is not None,
            slide=context == "slide",
        )
        return self._pieces(calls, len(prompts), max_new_tokens, tuple(stop), alternatives)

    def complete(self, prompts: Sequence[Sequence[int]], **options: Any) -> list[Completion]:
        """The whole text of every prompt; options as in `stream`."""
        options.setdefault("tokens_per_call", generate.TOKENS_PER_CALL)  # nobody waits for a single one
        stream = self.stream(prompts, **options)
        pieces: list[list[Piece]] = [[] for _ in prompts]
        for piece in stream:
            pieces[piece.row].append(piece)
        return [
            Completion(
                "".join(piece.text for piece in row),
                tuple(token for piece in row for token in piece.tokens),
                row[-1].finish or "length",
                len(prompt),
            )
            for row, prompt in zip(pieces, prompts, strict=True)
        ]

    def _pieces(
        self,
        calls: Generator[programs.Chosen, None, None],
        rows: int,
        max_new_tokens: int,
        stop: tuple[str, ...],
        alternatives: int | None,
    ) -> Generator[Piece, None, None]:
        texts = [StoppedText(self.tokenizer, stop) for _ in range(rows)]
        counts = [0] * rows
        running = set(range(rows))
        while running:
            with without_tf32(self.model.head.dtype):
                chosen = next(calls)
            for row in sorted(running):
                text, tokens, finish = "", [], None
                for place, i in enumerate(chosen.ids[row].tolist()):
                    tokens.append(self._token(i, chosen, (row, place), alternatives))
                    counts[row] += 1
                    if i in self._eos:
                        finish = "eos"
                    else:
                        text += texts[row].add(i)
                        finish = "length" if counts[row] == max_new_tokens else None
                    if finish or texts[row].stopped:
                        text += texts[row].end()
                        finish = "stop" if texts[row].stopped else finish
                        running.discard(row)
                        break
                yield Piece(row, text, tuple(tokens), finish)

    def _token(self, i: int, chosen: programs.Chosen, at: tuple[int, int], alternatives: int | None) -> Token:
        if alternatives is None:
            return Token(i, self._text(i), None, ())
        ids, numbers = chosen.likeliest[at][:alternatives].tolist(), chosen.likeliest_logprobs[at].tolist()
        others = tuple((j, self._text(j), number) for j, number in zip(ids, numbers, strict=False))
        return Token(i, self._text(i), float(chosen.logprobs[at]), others)

    def _text(self, i: int) -> str:
        if i not in self._texts:
            self._texts[i] = self.tokenizer.decode([i])
        return self._texts[i]


class StoppedText:
    """The text of token ids that come one by one, up to the first of some stop strings, in whole characters.

    What may yet become a stop string is held back; `stopped` says whether one came.
    """

    def __init__(self, tokenizer: Tokenizer, stop: Sequence[str]):
        self._stream = TextStream(tokenizer)
        self._stop = stop
        self._held = ""
        self.stopped = False

    def add(self, token: int) -> str:
        """The characters that are now sure to be part of the text."""
        return self._release(self._stream.add([token]))

    def end(self) -> str:
        """What was held back, when the text ends here; nothing after a stop string."""
        return "" if self.stopped else self._release(self._stream.end(), last=True)

    def _release(self, new: str, last: bool = False) -> str:
        held = self._held + new
        ends = [place for place in (held.find(stop) for stop in self._stop) if place >= 0]
        if ends:
            self.stopped, self._held = True, ""
            return held[: min(ends)]
        most = 0 if last else min(max(map(len, self._stop), default=0), len(held))
        keep = next((n for n in range(most, 0, -1) if any(stop.startswith(held[-n:]) for stop in self._stop)), 0)
        self._held = held[len(held) - keep :]
        return held[: len(held) - keep]
