"""One method for each kind of request of the page, which yields the answer as it grows. Plain values, no Gradio.

Closing one of these generators, as Gradio does when its client stops or goes away, ends the generation.
"""

import dataclasses
import html
import time
from collections.abc import Generator
from typing import Any, NamedTuple

from smollm_jax.errors import SmolLMError, UsageError, short_repr
from smollm_jax.model.cost import count_parameters
from smollm_jax.web import requests
from smollm_jax.web.generation_stream import (
    GenerationStream,
    TruncatedText,
    check_fits_context,
    encode_prompt,
    plain_frames,
    prompt_span,
    tinted_frames,
)
from smollm_jax.web.model_store import LoadedModel, ModelStore
from smollm_jax.web.token_html import FINISHES

MAX_COMPARED = 8


class Frame(NamedTuple):
    """What the page shows now. Before the first token it has `progress` and nothing else."""

    content: Any = None  # the answer so far
    status: str = ""  # line about the weights that generate it
    weights: str = ""  # their name
    progress: str = ""
    truncated: TruncatedText | None = None  # in the last frame of a text that a limit ended
    rendered_prompt: str = ""  # in a chat: the chat template filled in


class Handlers:
    """Continues texts with the weights of a store; `time_limit`: seconds per request, without the time in the queue."""

    def __init__(self, store: ModelStore, *, device: str, time_limit: float):
        self.store, self.device, self.time_limit = store, device, time_limit
        self._speeds: dict[str, str] = {}  # by name of the weights, of their last answer

    def complete(self, weights: Any, prompt: Any, numbers: dict[str, Any], stop: Any) -> Generator[Frame, None, None]:
        """Frames of the prompt and its tinted continuation."""
        request = requests.generation_request(numbers, stop)
        prompt = requests.text("prompt", prompt)
        loaded, deadline = yield from self._open_weights(weights)
        ids = encode_prompt(loaded, prompt)
        self._check_deadline(deadline)
        yield from self._tinted(GenerationStream(weights, loaded, ids, request, deadline), prompt_span(prompt))

    def continue_completion(
        self, truncated: TruncatedText, numbers: dict[str, Any], stop: Any
    ) -> Generator[Frame, None, None]:
        """Frames of more of a truncated completion, by the weights that began it."""
        stream = yield from self._continued(truncated, numbers, stop)
        yield from self._tinted(stream, truncated.content)

    def chat(
        self, weights: Any, turns: Any, system: Any, numbers: dict[str, Any], stop: Any
    ) -> Generator[Frame, None, None]:
        """Frames of the assistant's next turn."""
        request = requests.generation_request(numbers, stop)
        turns = requests.conversation(turns)
        if not turns or turns[-1]["role"] != "user":
            raise UsageError("the chat must end with a message of the user")
        system = requests.text("the system prompt", system)
        loaded, deadline = yield from self._open_weights(weights)
        messages = [{"role": "system", "content": system}, *turns] if system.strip() else turns
        check_fits_context(loaded, "".join(turn["content"] for turn in messages))
        ids = loaded.engine.chat(messages)
        self._check_deadline(deadline)
        stream = GenerationStream(weights, loaded, ids, request, deadline)
        yield from self._plain(stream, "", loaded.engine.tokenizer.decode(ids))

    def continue_chat(
        self, truncated: TruncatedText, numbers: dict[str, Any], stop: Any
    ) -> Generator[Frame, None, None]:
        """Frames of more of a truncated turn, by the weights that began it."""
        stream = yield from self._continued(truncated, numbers, stop)
        yield from self._plain(stream, truncated.content, stream.loaded.engine.tokenizer.decode(truncated.ids))

    def compare(
        self, run: Any, steps: Any, prompt: Any, numbers: dict[str, Any], stop: Any
    ) -> Generator[Frame, None, None]:
        """Frames of one prompt's continuations by checkpoints of a run, side by side, the oldest first."""
        request = requests.generation_request(numbers, stop)
        prompt = requests.text("prompt", prompt)
        available = self.store.steps(run)
        if not isinstance(steps, list) or not steps or len(steps) > MAX_COMPARED:
            raise UsageError(f"choose 1 to {MAX_COMPARED} checkpoints of the run")
        if missing := [step for step in steps if type(step) is not int or step not in available]:
            raise UsageError(f"run {run} has no checkpoint {short_repr(missing[0])} any more: choose another")
        deadline = time.monotonic() + self.time_limit
        cards, last, answered = "", Frame(), []
        for step in sorted(set(steps)):
            name = self.store.checkpoint(run, step)
            card = f'<div class="card" tabindex="0"><h4>step {step:,}</h4>{prompt_span(prompt)}'
            try:
                self._check_deadline(deadline)
                loaded, deadline = yield from self._open_weights(name, deadline)
                ids = encode_prompt(loaded, prompt)
                self._check_deadline(deadline)
                for last in self._tinted(GenerationStream(name, loaded, ids, request, deadline), cards + card):
                    card = last.content[len(cards) :]
                    yield last._replace(truncated=None)
                answered.append(f"{step:,}")
            except SmolLMError as error:  # a damaged checkpoint, or one that the trainer has deleted meanwhile
                card += f'<p class="fault">{html.escape(str(error))}</p>'
            cards += card + "</div>"
            yield last._replace(content=cards, truncated=None)
        if answered:
            title = f"{self.store.runs_folder.name}/{run}, steps {' and '.join(answered)}"
            yield last._replace(content=cards, truncated=None, status=self.status(last.weights, title=title))

    def _continued(
        self, truncated: TruncatedText, numbers: dict[str, Any], stop: Any
    ) -> Generator[Frame, None, GenerationStream]:
        request = requests.generation_request(numbers, stop)
        # Noise depends on the seed and on the token's index in the request: the same seed would repeat the noise.
        seed = (request.sampling.seed + truncated.new_tokens) % 2**32
        request = dataclasses.replace(request, sampling=dataclasses.replace(request.sampling, seed=seed))
        loaded, deadline = yield from self._open_weights(truncated.weights)
        self._check_deadline(deadline)
        return GenerationStream(truncated.weights, loaded, truncated.ids, request, deadline, truncated.new_tokens)

    def _tinted(self, stream: GenerationStream, content: str) -> Generator[Frame, None, None]:
        for text, truncated in tinted_frames(stream, content):
            yield Frame(text, self._stream_status(stream), stream.name, truncated=truncated)

    def _plain(self, stream: GenerationStream, content: str, rendered_prompt: str) -> Generator[Frame, None, None]:
        for text, truncated in plain_frames(stream, content):
            status = self._stream_status(stream)
            yield Frame(text, status, stream.name, truncated=truncated, rendered_prompt=rendered_prompt)

    def _stream_status(self, stream: GenerationStream) -> str:
        """The status line while a text is generated."""
        self._speeds[stream.name] = stream.speed or self._speeds.get(stream.name, "")
        return self.status(stream.name, FINISHES.get(stream.finish, ""), loaded=stream.loaded)

    def status(self, name: str, note: str = "", *, loaded: LoadedModel | None = None, title: str = "") -> str:
        """The status line: the weights (or `title` in place of their name), the device, parameters, context, and the
        speed of their last answer."""
        loaded = loaded or self.store.loaded(name)
        parts = [
            f"<b>{html.escape(title or str(name))}</b>",
            f"{html.escape(self.device)}, {html.escape(self.store.dtype)}",
        ]
        if loaded is None:
            note = note or "not loaded yet: the first answer takes longer"
        else:
            config = loaded.engine.config
            parts.append(f"{count_parameters(config) / 1e6:,.1f}M parameters")
            parts.append(f"context {config.max_position_embeddings:,}")
        parts += [self._speeds.get(name) or "- tokens/s", note]
        return "".join(f"<span>{part}</span>" for part in parts if part)

    def _open_weights(
        self, name: Any, deadline: float | None = None
    ) -> Generator[Frame, None, tuple[LoadedModel, float]]:
        """The loaded weights and the request's deadline. A download extends the deadline: it has its own limit."""
        deadline = deadline or time.monotonic() + self.time_limit
        opening = self.store.open(name)
        was_loaded = True
        while True:
            before = time.monotonic()
            try:
                doing = next(opening)
            except StopIteration as done:
                yield Frame(progress=f"{name}: {'' if was_loaded else 'compiling, then '}reading the prompt")
                return done.value, deadline
            was_loaded = False
            yield Frame(progress=f"{name}: {doing}")
            if doing.startswith("downloading"):
                deadline += time.monotonic() - before

    def _check_deadline(self, deadline: float) -> None:
        """Raises `UsageError` once the deadline has passed."""
        if time.monotonic() > deadline:
            raise UsageError(f"stopped by the time limit of {self.time_limit:g} seconds before the first token")
