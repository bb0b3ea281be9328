"""One text as it is written: its pieces in frames of the page, why it ended, and what it takes to go on with it."""

import contextlib
import html
import time
import zlib
from collections.abc import Iterator
from typing import NamedTuple

from smollm_jax.errors import UsageError
from smollm_jax.generation.engine import Chunk
from smollm_jax.web.model_store import Loaded
from smollm_jax.web.requests import Ask
from smollm_jax.web.token_html import ALTERNATIVES, TintedText

FRAME_SECONDS = 0.05  # between two updates of the page
CHAT_FRAME_SECONDS = 0.1  # an answer's Markdown is rendered anew each time: 7 ms for 2,000 characters


class Cut(NamedTuple):
    """A text that a limit cut short: what it takes to go on with the very tokens it had."""

    weights: str
    ids: list[int]  # of the prompt and of the text so far, without those of half a character
    written: int  # how many of them are the text's
    packed: bytes  # what was shown of them: it stays on the server, 0.4 kB of HTML a token otherwise

    @property
    def shown(self) -> str:
        """The HTML or the text that was shown of the tokens."""
        return zlib.decompress(self.packed).decode()


class Writing:
    """The pieces of one continuation of `ids`, with its speed and the wall clock of the request over it.

    It ends where the context is full, if that comes before the number of tokens asked for. `written`: how many of
    `ids` are the text's already, where one goes on.
    """

    def __init__(self, name: str, loaded: Loaded, ids: list[int], asked: Ask, deadline: float, written: int = 0):
        self.name, self.loaded = name, loaded
        self._ids, self._written, self._deadline = list(ids), written, deadline
        self._context = loaded.engine.config.max_position_embeddings
        space = self._context - len(ids)
        self._pieces = loaded.engine.stream(
            [ids],
            max_new_tokens=min(asked.max_new_tokens, space) if space > 0 else asked.max_new_tokens,
            sampling=asked.sampling,
            stop=asked.stop,
            alternatives=ALTERNATIVES,  # in a chat too, which shows none: one compiled program for both
        )
        self.count, self.finish = 0, ""
        self._began = 0.0

    def frames(self, seconds: float = FRAME_SECONDS) -> Iterator[list[Chunk]]:
        """The pieces of each frame of the page."""
        frame, last = [], 0.0
        with contextlib.closing(self._pieces):
            for piece in self._pieces:
                frame.append(piece)
                self.count += len(piece.tokens)
                self._ids += [token.id for token in piece.tokens]
                now = time.monotonic()
                self._began = self._began or now  # the first piece had the prompt to read
                self.finish = self._reason(piece, now)
                if self.finish or now - last > seconds:
                    yield frame
                    frame, last = [], now
                if self.finish:
                    return

    def _reason(self, piece: Chunk, now: float) -> str:
        if piece.finish == "length" and len(self._ids) >= self._context:
            return "context"
        return piece.finish or ("time" if now > self._deadline else "")

    def cut(self, shown: str, unshown: int) -> Cut | None:
        """The text to go on with, once a limit has cut it; `unshown`: how many of its last tokens `shown` lacks."""
        if self.finish not in ("length", "time"):
            return None
        ids = self._ids[: len(self._ids) - unshown]
        written = self._written + self.count - unshown
        return Cut(self.name, ids, written, zlib.compress(shown.encode())) if written > 0 else None

    @property
    def speed(self) -> str:
        """The speed so far, the first token left out."""
        seconds = time.monotonic() - self._began
        return f"{(self.count - 1) / seconds:,.1f} tokens/s" if self.count > 1 and seconds > 0 else ""


def encoded(loaded: Loaded, prompt: str) -> list[int]:
    """The prompt's token ids; raises `UsageError` for one that cannot fit the context, before tokenising it."""
    check_size(loaded, prompt)
    return loaded.engine.encode(prompt)


def check_size(loaded: Loaded, text: str) -> None:
    """Raises `UsageError` for a text that were too long for the context if all its tokens were the longest there is."""
    fewest = len(text.encode("utf-8", "surrogatepass")) // loaded.longest_token
    context = loaded.engine.config.max_position_embeddings
    if fewest >= context:
        raise UsageError(
            f"a prompt of at least {fewest:,} tokens and one new token exceed the context of {context:,} tokens"
        )


def tinted(writing: Writing, shown: str) -> Iterator[tuple[str, Cut | None]]:
    """The HTML so far, every frame, and with the last one what it takes to go on; `shown` stands before the text."""
    text = TintedText(writing.loaded.engine.tokenizer)
    for pieces in writing.frames():
        shown += "".join(text.add(piece) for piece in pieces)
        yield shown + (text.end(writing.finish) if writing.finish else ""), writing.cut(shown, text.unshown[0])


def plain(writing: Writing, shown: str) -> Iterator[tuple[str, Cut | None]]:
    """The same of a text without tints."""
    text = TintedText(writing.loaded.engine.tokenizer)
    for pieces in writing.frames(CHAT_FRAME_SECONDS):
        for piece in pieces:
            text.add(piece)
            shown += piece.text
        count, characters = text.unshown
        yield shown, writing.cut(shown.removesuffix(characters), count)


def prompt_span(prompt: str) -> str:
    """The prompt's HTML."""
    return f'<span class="prompt">{html.escape(prompt)}</span>'
