"""Tokens as HTML: each tinted by its probability, with what else might have come. Everything of a text is escaped."""

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
    """The HTML of a continuation, piece by piece; all that `add` gives and then `end`, joined, is the whole of it.

    Shown is the text of the pieces, so no part of a stop string and no half of a character; a span is the tokens
    that make up its characters, mostly one.
    """

    def __init__(self, tokenizer: Tokenizer):
        self._tokenizer = tokenizer
        self._waiting: list[Token] = []
        self._text = ""  # not shown yet

    def add(self, piece: Chunk) -> str:
        """The HTML of the tokens whose text is now known."""
        self._text += piece.text
        self._waiting += piece.tokens
        spans = []
        while self._waiting:
            count, text = self._first_group()
            if not text or len(text) > len(self._text) or self._text[: len(text)] != text:
                break
            spans.append(span(text, self._waiting[:count]))
            self._waiting, self._text = self._waiting[count:], self._text[len(text) :]
        return "".join(spans)

    @property
    def unshown(self) -> tuple[int, str]:
        """How many of the last tokens are not shown yet, as half of a character is not, and their text."""
        return len(self._waiting), self._text

    def end(self, finish: str) -> str:
        """The HTML of what is not shown yet, and why the text ends."""
        last = span(self._text, self._waiting) if self._text else ""
        return f'{last}<span class="finish" title="{FINISHES[finish]}"></span>'

    def _first_group(self) -> tuple[int, str]:
        """The fewest tokens that are whole characters, and these; at most 4, as bytes in a character."""
        for count in range(1, min(4, len(self._waiting)) + 1):
            tokens = self._waiting[:count]
            text = tokens[0].text if count == 1 else self._tokenizer.decode([token.id for token in tokens])
            if not text.endswith("\ufffd"):
                return count, text
        return 0, ""


def span(text: str, tokens: list[Token]) -> str:
    """One tinted span. What the tooltip shows is data, which the page's script sets as text."""
    known = [token.logprob for token in tokens if token.logprob is not None]
    probability = math.exp(sum(known)) if known else 1.0
    others = [[other, round(100 * math.exp(logprob), 1)] for _, other, logprob in tokens[0].alternatives]
    about = {"text": text, "p": round(100 * probability, 1), "others": others}
    data = html.escape(json.dumps(about, ensure_ascii=False))
    kind = "token" if text.strip() or "\n" not in text else "token line"  # else there would be nothing to point at
    return f'<span class="{kind}" style="--p:{probability:.3f}" data-about="{data}">{html.escape(text)}</span>'
