"""One text while it is generated: its pieces by page update, why it ended, and what it takes to continue it."""

import contextlib
import html
import time
import zlib
from collections.abc import Iterator
from typing import NamedTuple

from smollm_jax.errors import UsageError
from smollm_jax.generation.engine import Chunk
from smollm_jax.web.model_store import LoadedModel
from smollm_jax.web.requests import GenerationRequest
from smollm_jax.web.token_html import ALTERNATIVES, TintedText

FRAME_SECONDS = 0.05  # between two updates of the page
CHAT_FRAME_SECONDS = 0.1  # each renders the answer's Markdown again: 7 ms for 2,000 characters


class TruncatedText(NamedTuple):
    """A text that the token or time limit ended, with what it takes to continue from the same tokens."""

    weights: str
    ids: list[int]  # of prompt and text, without the tokens of an incomplete character at the end
    new_tokens: int  # how many of `ids` were generated
    compressed: bytes  # the content shown for them. It stays on the server, at 0.4 kB of HTML a token uncompressed.

    @property
    def content(self) -> str:
        """The HTML or text that was shown."""
        return zlib.decompress(self.compressed).decode()


class GenerationStream:
    """The pieces of one continuation of `ids`, its speed, and the request's deadline.

    It ends early where the context is full. `new_tokens`: how many of `ids` were generated before, when it continues a
    truncated text.
    """

    def __init__(
        self,
        name: str,
        loaded: LoadedModel,
        ids: list[int],
        request: GenerationRequest,
        deadline: float,
        new_tokens: int = 0,
    ):
        self.name, self.loaded = name, loaded
        self._ids, self._earlier_tokens, self._deadline = list(ids), new_tokens, deadline
        self._context = loaded.engine.config.max_position_embeddings
        space = self._context - len(ids)
        self._pieces = loaded.engine.stream(
            [ids],
            max_new_tokens=min(request.max_new_tokens, space) if space > 0 else request.max_new_tokens,
            sampling=request.sampling,
            stop=request.stop,
            alternatives=ALTERNATIVES,  # in a chat too, which shows none: one compiled program for both
        )
        self.count, self.finish = 0, ""
        self._first_piece_time = 0.0

    def frames(self, seconds: float = FRAME_SECONDS) -> Iterator[list[Chunk]]:
        """The pieces of each page update, at most one update every `seconds`."""
        frame, last = [], 0.0
        with contextlib.closing(self._pieces):
            for piece in self._pieces:
                frame.append(piece)
                self.count += len(piece.tokens)
                self._ids += [token.id for token in piece.tokens]
                now = time.monotonic()
                self._first_piece_time = self._first_piece_time or now  # prefill is not part of the speed
                self.finish = self._finish_reason(piece, now)
                if self.finish or now - last > seconds:
                    yield frame
                    frame, last = [], now
                if self.finish:
                    return

    def _finish_reason(self, piece: Chunk, now: float) -> str:
        if piece.finish == "length" and len(self._ids) >= self._context:
            return "context"
        return piece.finish or ("time" if now > self._deadline else "")

    def truncated(self, content: str, pending: int) -> TruncatedText | None:
        """The text to continue, where a limit ended it; `pending`: how many of its last tokens `content` lacks."""
        if self.finish not in ("length", "time"):
            return None
        ids = self._ids[: len(self._ids) - pending]
        new_tokens = self._earlier_tokens + self.count - pending
        return TruncatedText(self.name, ids, new_tokens, zlib.compress(content.encode())) if new_tokens > 0 else None

    @property
    def speed(self) -> str:
        """Tokens per second so far, without the first token; empty where there is no second one."""
        seconds = time.monotonic() - self._first_piece_time
        return f"{(self.count - 1) / seconds:,.1f} tokens/s" if self.count > 1 and seconds > 0 else ""


def encode_prompt(loaded: LoadedModel, prompt: str) -> list[int]:
    """The prompt's token ids. Raises `UsageError`, before tokenising, for a prompt that cannot fit the context."""
    check_fits_context(loaded, prompt)
    return loaded.engine.encode(prompt)


def check_fits_context(loaded: LoadedModel, text: str) -> None:
    """Raises `UsageError` for a text that exceeds the context even if it consists of the longest tokens only."""
    fewest = len(text.encode("utf-8", "surrogatepass")) // loaded.longest_token
    context = loaded.engine.config.max_position_embeddings
    if fewest >= context:
        raise UsageError(
            f"a prompt of at least {fewest:,} tokens and one new token exceed the context of {context:,} tokens"
        )


def tinted_frames(stream: GenerationStream, content: str) -> Iterator[tuple[str, TruncatedText | None]]:
    """The HTML after each page update, and with the last one the text to continue, if any. It begins with `content`."""
    text = TintedText(stream.loaded.engine.tokenizer)
    for pieces in stream.frames():
        content += "".join(text.add(piece) for piece in pieces)
        end = text.end(stream.finish) if stream.finish else ""
        yield content + end, stream.truncated(content, text.pending[0])


def plain_frames(stream: GenerationStream, content: str) -> Iterator[tuple[str, TruncatedText | None]]:
    """The same as plain text."""
    text = TintedText(stream.loaded.engine.tokenizer)
    for pieces in stream.frames(CHAT_FRAME_SECONDS):
        for piece in pieces:
            text.add(piece)
            content += piece.text
        count, characters = text.pending
        yield content, stream.truncated(content.removesuffix(characters), count)


def prompt_span(prompt: str) -> str:
    """The prompt as HTML."""
    return f'<span class="prompt">{html.escape(prompt)}</span>'
