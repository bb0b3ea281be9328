"""Tokens as HTML, each tinted by its probability, with its alternatives as data. All text is escaped."""

import html
import json
import math

from smollm_jax.generation.engine import Chunk, Token
from smollm_jax.tokenizer import Tokenizer

ALTERNATIVES = 6
FINISHES = {
    "eos": "end of text",
    "stop": "stop string",
    "length": "token limit",
    "time": "stopped by the time limit",
    "context": "context full",
}


class TintedText:
    """The HTML of a continuation, piece by piece: the results of `add`, then that of `end`, joined.

    Its text is that of the pieces, so it has no part of a stop string and no incomplete character. A span holds the
    tokens of whole characters, usually one token.
    """

    def __init__(self, tokenizer: Tokenizer):
        self._tokenizer = tokenizer
        self._pending: list[Token] = []
        self._text = ""  # of the pending tokens

    def add(self, piece: Chunk) -> str:
        """The HTML of the tokens whose text is complete."""
        self._text += piece.text
        self._pending += piece.tokens
        spans = []
        while self._pending:
            count, text = self._first_group()
            if not text or len(text) > len(self._text) or self._text[: len(text)] != text:
                break
            spans.append(span(text, self._pending[:count]))
            self._pending, self._text = self._pending[count:], self._text[len(text) :]
        return "".join(spans)

    @property
    def pending(self) -> tuple[int, str]:
        """The number of last tokens that are not in the HTML yet (an incomplete character), and their text."""
        return len(self._pending), self._text

    def end(self, finish: str) -> str:
        """The HTML of the pending tokens and of the reason why the text ended."""
        last = span(self._text, self._pending) if self._text else ""
        return f'{last}<span class="finish" title="{FINISHES[finish]}"></span>'

    def _first_group(self) -> tuple[int, str]:
        """The fewest tokens, at most 4 as bytes in a character, that make whole characters, and their text."""
        for count in range(1, min(4, len(self._pending)) + 1):
            tokens = self._pending[:count]
            text = tokens[0].text if count == 1 else self._tokenizer.decode([token.id for token in tokens])
            if not text.endswith("\ufffd"):
                return count, text
        return 0, ""


def span(text: str, tokens: list[Token]) -> str:
    """One tinted span; its `data-about` is JSON for the tooltip, which the page's script inserts as text."""
    logprobs = [token.logprob for token in tokens if token.logprob is not None]
    probability = math.exp(sum(logprobs)) if logprobs else 1.0
    others = [[other, round(100 * math.exp(logprob), 1)] for _, other, logprob in tokens[0].alternatives]
    tooltip = {"text": text, "p": round(100 * probability, 1), "others": others}
    data = html.escape(json.dumps(tooltip, ensure_ascii=False))
    kind = "token" if text.strip() or "\n" not in text else "token line"  # a line break alone has nothing to point at
    return f'<span class="{kind}" style="--p:{probability:.3f}" data-about="{data}">{html.escape(text)}</span>'
