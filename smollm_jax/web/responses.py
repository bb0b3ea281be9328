"""The answers to the page's kinds of request, as they come. No Gradio here: plain values in, plain values out.

Closing one of these generators, as Gradio does when its client stops or goes away, ends the computing.
"""

import dataclasses
import html
import time
from collections.abc import Generator
from typing import Any, NamedTuple

from smollm_jax.errors import SmolLMError, UsageError, short_repr
from smollm_jax.model.cost import count_parameters
from smollm_jax.web import requests as asking
from smollm_jax.web.generation_stream import Cut, Writing, check_size, encoded, plain, prompt_span, tinted
from smollm_jax.web.model_store import Loaded, Shelf
from smollm_jax.web.token_html import FINISHES

MOST_COMPARED = 8


class Frame(NamedTuple):
    """What the page shows now. Until the first token has come: only what is waited for."""

    shown: Any = None  # the answer so far
    status: str = ""  # of the weights that write it
    weights: str = ""  # their name
    waiting: str = ""
    cut: Cut | None = None  # with the last frame of a text that a limit cut short
    reads: str = ""  # in a chat: what the model reads


class Answers:
    """Continues texts with the weights of a shelf; `time_limit`: seconds a request may take, once it is its turn."""

    def __init__(self, shelf: Shelf, *, device: str, time_limit: float):
        self.shelf, self.device, self.time_limit = shelf, device, time_limit
        self._speeds: dict[str, str] = {}  # of the last answer of each of the weights

    def complete(self, weights: Any, prompt: Any, numbers: dict[str, Any], stop: Any) -> Generator[Frame, None, None]:
        """Frames of the prompt and its tinted continuation."""
        asked = asking.ask(numbers, stop)
        prompt = asking.text("prompt", prompt)
        loaded, deadline = yield from self._opened(weights)
        writing = Writing(weights, loaded, encoded(loaded, prompt), asked, self._until(deadline))
        yield from self._tinted(writing, prompt_span(prompt))

    def complete_on(self, cut: Cut, numbers: dict[str, Any], stop: Any) -> Generator[Frame, None, None]:
        """Frames of a continuation that a limit cut short, gone on with by the weights that wrote it."""
        yield from self._tinted((yield from self._writing_on(cut, numbers, stop)), cut.shown)

    def chat(
        self, weights: Any, turns: Any, system: Any, numbers: dict[str, Any], stop: Any
    ) -> Generator[Frame, None, None]:
        """Frames of the assistant's next turn."""
        asked = asking.ask(numbers, stop)
        turns = asking.conversation(turns)
        if not turns or turns[-1]["role"] != "user":
            raise UsageError("say something first: the assistant answers the user")
        system = asking.text("the system prompt", system)
        loaded, deadline = yield from self._opened(weights)
        messages = [{"role": "system", "content": system}, *turns] if system.strip() else turns
        check_size(loaded, "".join(turn["content"] for turn in messages))
        ids = loaded.engine.chat(messages)
        writing = Writing(weights, loaded, ids, asked, self._until(deadline))
        yield from self._plain(writing, "", loaded.engine.tokenizer.decode(ids))

    def chat_on(self, cut: Cut, numbers: dict[str, Any], stop: Any) -> Generator[Frame, None, None]:
        """Frames of a turn that a limit cut short, gone on with by the weights that wrote it."""
        writing = yield from self._writing_on(cut, numbers, stop)
        yield from self._plain(writing, cut.shown, writing.loaded.engine.tokenizer.decode(cut.ids))

    def compare(
        self, run: Any, steps: Any, prompt: Any, numbers: dict[str, Any], stop: Any
    ) -> Generator[Frame, None, None]:
        """Frames of one prompt's continuations by checkpoints of a run, the oldest first, side by side."""
        asked = asking.ask(numbers, stop)
        prompt = asking.text("prompt", prompt)
        there = self.shelf.steps(run)
        if not isinstance(steps, list) or not steps or len(steps) > MOST_COMPARED:
            raise UsageError(f"pick 1 to {MOST_COMPARED} checkpoints of the run")
        if gone := [step for step in steps if type(step) is not int or step not in there]:
            raise UsageError(f"run {run} has no checkpoint {short_repr(gone[0])} now: pick another")
        deadline = time.monotonic() + self.time_limit
        cards, last, answered = "", Frame(), []
        for step in sorted(set(steps)):
            name = self.shelf.checkpoint(run, step)
            head = f'<div class="card" tabindex="0"><h4>step {step:,}</h4>{prompt_span(prompt)}'
            try:
                self._until(deadline)
                loaded, deadline = yield from self._opened(name, deadline)
                writing = Writing(name, loaded, encoded(loaded, prompt), asked, self._until(deadline))
                for last in self._tinted(writing, cards + head):
                    head = last.shown[len(cards) :]
                    yield last._replace(cut=None)
                answered.append(f"{step:,}")
            except SmolLMError as error:  # a damaged checkpoint, or one that the trainer has removed meanwhile
                head += f'<p class="fault">{html.escape(str(error))}</p>'
            cards += head + "</div>"
            yield last._replace(shown=cards, cut=None)
        if answered:
            names = f"{self.shelf.runs_folder.name}/{run}, steps {' and '.join(answered)}"
            yield last._replace(shown=cards, cut=None, status=self.status(last.weights, shown=names))

    def _writing_on(self, cut: Cut, numbers: dict[str, Any], stop: Any) -> Generator[Frame, None, Writing]:
        asked = asking.ask(numbers, stop)
        # Each draw takes the seed and its place in the request: the same seed would draw the same noise once more.
        seed = (asked.sampling.seed + cut.written) % 2**32
        asked = dataclasses.replace(asked, sampling=dataclasses.replace(asked.sampling, seed=seed))
        loaded, deadline = yield from self._opened(cut.weights)
        return Writing(cut.weights, loaded, cut.ids, asked, self._until(deadline), cut.written)

    def _tinted(self, writing: Writing, shown: str) -> Generator[Frame, None, None]:
        for text, cut in tinted(writing, shown):
            yield Frame(text, self._written(writing), writing.name, cut=cut)

    def _plain(self, writing: Writing, shown: str, reads: str) -> Generator[Frame, None, None]:
        for text, cut in plain(writing, shown):
            yield Frame(text, self._written(writing), writing.name, cut=cut, reads=reads)

    def _written(self, writing: Writing) -> str:
        """The status line while these weights write."""
        self._speeds[writing.name] = writing.speed or self._speeds.get(writing.name, "")
        return self.status(writing.name, FINISHES.get(writing.finish, ""), loaded=writing.loaded)

    def status(self, name: str, note: str = "", *, loaded: Loaded | None = None, shown: str = "") -> str:
        """The status line: which weights (`shown`: in other words), the device, how large, how fast in their last
        answer."""
        loaded = loaded or self.shelf.loaded(name)
        parts = [
            f"<b>{html.escape(shown or str(name))}</b>",
            f"{html.escape(self.device)}, {html.escape(self.shelf.dtype)}",
        ]
        if loaded is None:
            note = note or "not loaded yet: the first answer takes longer"
        else:
            config = loaded.engine.config
            parts.append(f"{count_parameters(config) / 1e6:,.1f}M parameters")
            parts.append(f"context {config.max_position_embeddings:,}")
        parts += [self._speeds.get(name) or "- tokens/s", note]
        return "".join(f"<span>{part}</span>" for part in parts if part)

    def _opened(self, name: Any, deadline: float | None = None) -> Generator[Frame, None, tuple[Loaded, float]]:
        """The weights and the request's deadline; downloading is no part of its time, and has a limit of its own."""
        deadline = deadline or time.monotonic() + self.time_limit
        opening = self.shelf.open(name)
        fresh = False
        while True:
            before = time.monotonic()
            try:
                doing = next(opening)
            except StopIteration as done:
                yield Frame(waiting=f"{name}: {'compiling, then ' if fresh else ''}reading the prompt")
                return done.value, deadline
            fresh = True
            yield Frame(waiting=f"{name}: {doing}")
            if doing.startswith("fetching"):
                deadline += time.monotonic() - before

    def _until(self, deadline: float) -> float:
        if time.monotonic() > deadline:
            raise UsageError(f"stopped by the time limit of {self.time_limit:g} seconds before the first token")
        return deadline
