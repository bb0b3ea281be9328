"""The token ids of a conversation: a chat template's special tokens are tokens, those in a message are text.

transformers takes both for tokens unless it is asked to `sanitize_control_tokens`, whose marks are the idea here. Where
no message contains the text of a special token, the ids are transformers'.
"""

import itertools
import re
from collections.abc import Callable, Iterable
from typing import Any, Protocol

import tokenizers

from smollm_jax.errors import UsageError
from smollm_jax.tokenizer.chat_template import ChatTemplates
from smollm_jax.tokenizer.conversation import Conversation

# Seldom symbols, hardly ever in a text, which neither `repr` nor `upper` changes; then those for private use.
SYMBOLS = [*range(0x2FF0, 0x2FFC), *range(0x4DC0, 0x4E00), *range(0x2800, 0x2900), *range(0x100000, 0x10FFFE)]


class ChatTokenizer(Protocol):
    """What `encode_chat` needs of a tokenizer."""

    core: tokenizers.Tokenizer
    templates: ChatTemplates
    roles: dict[str, str]

    def encode(self, text: str, *, parse_special: bool = False) -> list[int]: ...


def encode_chat(tokenizer: ChatTokenizer, conversation: Conversation, **options: Any) -> list[int]:
    """Token ids of a conversation; `options` are those of `ChatTemplates.render`."""
    tokens = [token for token in tokenizer.core.get_added_tokens_decoder().values() if token.special]
    marks = Marks([token.content for token in tokens])
    text = tokenizer.templates.render(conversation, tokenizer.roles, marks=marks, **options)
    if not marks.pair:
        return tokenizer.encode(text, parse_special=True)
    ids, plain, end = [], "", 0
    for match in marks.pattern(tokens).finditer(text):
        plain += text[end : match.start()] + (match["marked"] or "")
        end = match.end()
        if match["own"]:
            ids += tokenizer.encode(plain) + tokenizer.encode(match["own"], parse_special=True)
            plain = ""
    return ids + tokenizer.encode(plain + text[end:])


class Marks:
    """Two characters around every special token that a text from outside contains, for the template's own to differ.

    A template may cut a text between the marks, as with `split('</think>')`: one mark alone means nothing, but what
    stands on its two sides is never joined to a special token.
    """

    def __init__(self, tokens: list[str]):
        self.pair = ""
        self._tokens = _any_of(tokens)
        # A text that ends with the beginning of a special token could be completed by the text that follows it.
        self._beginnings = {token[:n] for token in tokens if not token[0].isalnum() for n in range(1, len(token))}
        self._longest = max(map(len, tokens), default=0)

    def choose(self, texts: list[str], unmarked: Iterable[str]) -> Callable[[str], str] | None:
        """How to mark these texts, None where no special token is in or at the end of any.

        The marks are in none of these texts, nor in the `unmarked` ones of the template.
        """
        if not any(self._tokens.search(text) or self._begins_at(text) for text in texts):
            return None
        taken = set().union(*texts, *unmarked)
        self.pair = "".join(itertools.islice((chr(c) for c in SYMBOLS if chr(c) not in taken), 2))
        if len(self.pair) < 2:
            raise UsageError("the messages contain every private character: none is left to mark special tokens")
        return self._marked

    def pattern(self, tokens: Iterable[tokenizers.AddedToken]) -> re.Pattern[str]:
        """What to look for in a rendered text: `marked` tokens, single marks, and the template's `own` tokens."""
        start, end = self.pair
        own = sorted(tokens, key=lambda token: -len(token.content))
        return re.compile(
            f"{start}(?P<marked>{self._tokens.pattern}){end}|[{start}{end}]|(?P<own>{'|'.join(map(_found_as, own))})"
        )

    def _marked(self, text: str) -> str:
        start, end = self.pair
        text = self._tokens.sub(lambda match: start + match[0] + end, text)
        return text if (at := self._begins_at(text)) is None else text[:at] + end + text[at:]

    def _begins_at(self, text: str) -> int | None:
        """Where the text ends, white space aside, if it ends with the beginning of a special token."""
        bare = text.rstrip()
        ends = (bare[-n:] for n in range(1, min(self._longest, len(bare)) + 1))
        return len(bare) if any(piece in self._beginnings for piece in ends) else None


def _any_of(tokens: Iterable[str]) -> re.Pattern[str]:
    """Any of these, the longest first; nothing where there are none."""
    return re.compile("|".join(map(re.escape, sorted(tokens, key=len, reverse=True))) or "(?!)")


def _found_as(token: tokenizers.AddedToken) -> str:
    """How `tokenizers` finds an added token: with the white space it takes in, or only as a whole word."""
    whole = (r"(?<!\w)", r"(?!\w)") if token.single_word else ("", "")
    before, after = (r"\s*" if strips else "" for strips in (token.lstrip, token.rstrip))
    return f"{before}{whole[0]}{re.escape(token.content)}{whole[1]}{after}"
