"""The answers to the page's three kinds of request, as they come. No Gradio here: plain values in, plain values out.

Closing one of these generators, as Gradio does when its client stops or goes away, ends the computing.
"""

import contextlib
import html
import time
from collections.abc import Generator, Iterator
from typing import Any, NamedTuple

from smollm_jax.cost import count_parameters
from smollm_jax.engine import Piece
from smollm_jax.errors import SmolLMError, UsageError
from smollm_jax.web import ask as asking
from smollm_jax.web.ask import Ask
from smollm_jax.web.shelf import Loaded, Shelf
from smollm_jax.web.tokens import ALTERNATIVES, FINISHES, TintedText

FRAME_SECONDS = 0.05  # between two updates of the page
MOST_COMPARED = 8


class Frame(NamedTuple):
    """What the page shows now: the answer so far, the status line, and in a chat what the model reads."""

    shown: Any
    status: str
    reads: str = ""


class Writing:
    """The pieces of one continuation, with its speed and the wall clock of the request over it."""

    def __init__(self, loaded: Loaded, ids: list[int], asked: Ask, deadline: float):
        self._deadline = deadline
        self._pieces = loaded.engine.stream(
            [ids],
            max_new_tokens=asked.max_new_tokens,
            sampling=asked.sampling,
            stop=asked.stop,
            alternatives=ALTERNATIVES,  # in a chat too, which shows none: one compiled program for both
        )
        self.count, self.finish = 0, ""
        self._began = 0.0

    def frames(self) -> Iterator[list[Piece]]:
        """The pieces of each frame of the page."""
        frame, last = [], 0.0
        with contextlib.closing(self._pieces):
            for piece in self._pieces:
                frame.append(piece)
                self.count += len(piece.tokens)
                now = time.monotonic()
                self._began = self._began or now  # the first piece had the prompt to read
                self.finish = piece.finish or ("time" if now > self._deadline else "")
                if self.finish or now - last > FRAME_SECONDS:
                    yield frame
                    frame, last = [], now
                if self.finish:
                    return

    @property
    def speed(self) -> str:
        """The speed so far, the first token left out."""
        seconds = time.monotonic() - self._began
        return f"{(self.count - 1) / seconds:,.1f} tokens/s" if self.count > 1 and seconds > 0 else ""


class Answers:
    """Continues texts with the weights of a shelf; `time_limit`: seconds a request may take, once it is its turn."""

    def __init__(self, shelf: Shelf, *, device: str, time_limit: float):
        self.shelf, self.device, self.time_limit = shelf, device, time_limit
        self._speeds: dict[str, str] = {}  # of the last answer of each of the weights

    def complete(self, weights: Any, prompt: Any, numbers: dict[str, Any], stop: Any) -> Generator[Frame, None, None]:
        """Frames of the prompt and its tinted continuation."""
        asked = asking.ask(numbers, stop)
        prompt = asking.text("prompt", prompt)
        begun = f'<span class="prompt">{html.escape(prompt)}</span>'
        loaded, deadline = yield from self._opened(weights, begun)
        writing = Writing(loaded, encoded(loaded, prompt, asked), asked, self._until(deadline))
        for shown in tinted(loaded, writing, begun):
            yield Frame(shown, self._written(weights, writing, loaded))

    def chat(
        self, weights: Any, turns: Any, system: Any, numbers: dict[str, Any], stop: Any
    ) -> Generator[Frame, None, None]:
        """Frames of the conversation with the assistant's next turn in it."""
        asked = asking.ask(numbers, stop)
        turns = asking.conversation(turns)
        if not turns or turns[-1]["role"] != "user":
            raise UsageError("say something first: the assistant answers the user")
        system = asking.text("the system prompt", system)
        loaded, deadline = yield from self._opened(weights, turns)
        messages = [{"role": "system", "content": system}, *turns] if system.strip() else turns
        check_size(loaded, "".join(turn["content"] for turn in messages), asked)
        ids = loaded.engine.chat(messages)
        reads = loaded.engine.tokenizer.decode(ids)
        writing = Writing(loaded, ids, asked, self._until(deadline))
        answer = ""
        for pieces in writing.frames():
            answer += "".join(piece.text for piece in pieces)
            said = [*turns, {"role": "assistant", "content": answer}]
            yield Frame(said, self._written(weights, writing, loaded), reads)

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
            raise UsageError(f"run {run} has no checkpoint {asking.shown(gone[0])} now: pick another")
        deadline = time.monotonic() + self.time_limit
        cards = ""
        for step in sorted(set(steps)):
            name = self.shelf.checkpoint(run, step)
            head = f'<div class="card"><h4>step {step:,}</h4><span class="prompt">{html.escape(prompt)}</span>'
            try:
                self._until(deadline)
                loaded, deadline = yield from self._opened(name, cards + head, deadline)
                writing = Writing(loaded, encoded(loaded, prompt, asked), asked, self._until(deadline))
                for shown in tinted(loaded, writing, cards + head):
                    head = shown[len(cards) :]
                    yield Frame(shown, self._written(name, writing, loaded))
            except SmolLMError as error:  # a damaged checkpoint, or one that the trainer has removed meanwhile
                head += f'<p class="fault">{html.escape(str(error))}</p>'
            cards += head + "</div>"
            yield Frame(cards, self.status(name))

    def _written(self, name: str, writing: Writing, loaded: Loaded) -> str:
        """The status line while these weights write."""
        self._speeds[name] = writing.speed or self._speeds.get(name, "")
        return self.status(name, FINISHES.get(writing.finish, ""), loaded=loaded)

    def status(self, name: str, note: str = "", *, loaded: Loaded | None = None) -> str:
        """The status line: which weights, the device, how large, how fast in their last answer."""
        loaded = loaded or self.shelf.loaded(name)
        parts = [f"<b>{html.escape(str(name))}</b>", f"{html.escape(self.device)}, {html.escape(self.shelf.dtype)}"]
        if loaded is None:
            note = note or "not loaded yet: the first answer takes longer"
        else:
            config = loaded.engine.config
            parts.append(f"{count_parameters(config) / 1e6:,.1f}M parameters")
            parts.append(f"context {config.max_position_embeddings:,}")
        parts += [self._speeds.get(name) or "- tokens/s", note]
        return "".join(f"<span>{part}</span>" for part in parts if part)

    def _opened(
        self, name: Any, shown: Any, deadline: float | None = None
    ) -> Generator[Frame, None, tuple[Loaded, float]]:
        """The weights and the request's deadline; downloading is no part of its time, and has a limit of its own."""
        deadline = deadline or time.monotonic() + self.time_limit
        opening = self.shelf.open(name)
        while True:
            before = time.monotonic()
            try:
                doing = next(opening)
            except StopIteration as done:
                return done.value, deadline
            yield Frame(shown, self.status(name, doing))
            if doing.startswith("fetching"):
                deadline += time.monotonic() - before

    def _until(self, deadline: float) -> float:
        if time.monotonic() > deadline:
            raise UsageError(f"stopped by the time limit of {self.time_limit:g} seconds before the first token")
        return deadline


def encoded(loaded: Loaded, prompt: str, asked: Ask) -> list[int]:
    """The prompt's token ids; raises `UsageError` for one that cannot fit the context, before tokenising it."""
    check_size(loaded, prompt, asked)
    return loaded.engine.encode(prompt)


def check_size(loaded: Loaded, text: str, asked: Ask) -> None:
    """Raises `UsageError` for a text that were too long for the context if all its tokens were the longest there is."""
    fewest = len(text.encode("utf-8", "surrogatepass")) // loaded.longest_token
    context = loaded.engine.config.max_position_embeddings
    if fewest + asked.max_new_tokens > context:
        raise UsageError(
            f"a prompt of at least {fewest:,} tokens and {asked.max_new_tokens} new ones exceed the context of "
            f"{context:,}"
        )


def tinted(loaded: Loaded, writing: Writing, shown: str) -> Iterator[str]:
    """The HTML so far, every frame; `shown` stands before it."""
    text = TintedText(loaded.engine.tokenizer)
    for pieces in writing.frames():
        shown += "".join(text.add(piece) for piece in pieces)
        yield shown + (text.end("time") if writing.finish == "time" else "")
