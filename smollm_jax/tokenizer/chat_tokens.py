"""The token ids of a conversation. Special tokens written by the chat template are tokens, those in messages are text.

transformers treats both as tokens, except with `sanitize_control_tokens`, whose markers this module uses as well. If no
message contains the text of a special token, the ids are those of transformers.
"""

import itertools
import re
from collections.abc import Callable, Iterable
from typing import Any, Protocol

import tokenizers

from smollm_jax.errors import UsageError
from smollm_jax.tokenizer.chat_template import ChatTemplates
from smollm_jax.tokenizer.conversation import Conversation

# Rare symbols that `repr` and `upper` leave unchanged, then characters for private use.
MARKER_CHARACTERS = [*range(0x2FF0, 0x2FFC), *range(0x4DC0, 0x4E00), *range(0x2800, 0x2900), *range(0x100000, 0x10FFFE)]


class ChatTokenizer(Protocol):
    """The part of a tokenizer that `encode_chat` uses."""

    core: tokenizers.Tokenizer
    templates: ChatTemplates
    roles: dict[str, str]

    def encode(self, text: str, *, parse_special: bool = False) -> list[int]: ...


def encode_chat(tokenizer: ChatTokenizer, conversation: Conversation, **options: Any) -> list[int]:
    """Token ids of a conversation; `options` are those of `ChatTemplates.render`."""
    tokens = [token for token in tokenizer.core.get_added_tokens_decoder().values() if token.special]
    markers = Markers([token.content for token in tokens])
    text = tokenizer.templates.render(conversation, tokenizer.roles, markers=markers, **options)
    if not markers.pair:
        return tokenizer.encode(text, parse_special=True)
    ids, plain, end = [], "", 0
    for match in markers.pattern(tokens).finditer(text):
        plain += text[end : match.start()] + (match["marked"] or "")
        end = match.end()
        if match["special"]:
            ids += tokenizer.encode(plain) + tokenizer.encode(match["special"], parse_special=True)
            plain = ""
    return ids + tokenizer.encode(plain + text[end:])


class Markers:
    """Two characters around every special token in a message, which distinguish it from those of the template.

    A template may split a text between the markers, as with `split('</think>')`. A single marker has no meaning, but
    the text on its two sides is never joined to a special token.
    """

    def __init__(self, tokens: list[str]):
        self.pair = ""
        self._tokens = _any_of(tokens)
        # A text may end with the beginning of a special token, which the following text could complete.
        self._beginnings = {token[:n] for token in tokens if not token[0].isalnum() for n in range(1, len(token))}
        self._longest = max(map(len, tokens), default=0)

    def choose(self, texts: list[str], unmarked: Iterable[str]) -> Callable[[str], str] | None:
        """A function that marks these texts; None if no text contains or ends with (part of) a special token.

        The markers occur neither in these texts nor in the `unmarked` ones of the template.
        """
        if not any(self._tokens.search(text) or self._begins_at(text) for text in texts):
            return None
        taken = set().union(*texts, *unmarked)
        self.pair = "".join(itertools.islice((chr(c) for c in MARKER_CHARACTERS if chr(c) not in taken), 2))
        if len(self.pair) < 2:
            raise UsageError("the messages contain every character that could mark special tokens: remove unusual ones")
        return self._mark

    def pattern(self, tokens: Iterable[tokenizers.AddedToken]) -> re.Pattern[str]:
        """Matches `marked` tokens of messages, single markers, and `special` tokens of the template."""
        start, end = self.pair
        longest_first = sorted(tokens, key=lambda token: -len(token.content))
        special = "|".join(map(_pattern_of, longest_first))
        return re.compile(f"{start}(?P<marked>{self._tokens.pattern}){end}|[{start}{end}]|(?P<special>{special})")

    def _mark(self, text: str) -> str:
        start, end = self.pair
        text = self._tokens.sub(lambda match: start + match[0] + end, text)
        return text if (at := self._begins_at(text)) is None else text[:at] + end + text[at:]

    def _begins_at(self, text: str) -> int | None:
        """The end of the text without trailing white space, if it ends with the beginning of a special token."""
        bare = text.rstrip()
        ends = (bare[-n:] for n in range(1, min(self._longest, len(bare)) + 1))
        return len(bare) if any(piece in self._beginnings for piece in ends) else None


def _any_of(tokens: Iterable[str]) -> re.Pattern[str]:
    """A pattern for any of these, the longest first; it matches nothing if there are none."""
    return re.compile("|".join(map(re.escape, sorted(tokens, key=len, reverse=True))) or "(?!)")


def _pattern_of(token: tokenizers.AddedToken) -> str:
    """The pattern by which `tokenizers` finds an added token: with white space that it strips, or as a whole word."""
    boundaries = (r"(?<!\w)", r"(?!\w)") if token.single_word else ("", "")
    before, after = (r"\s*" if strips else "" for strips in (token.lstrip, token.rstrip))
    return f"{before}{boundaries[0]}{re.escape(token.content)}{boundaries[1]}{after}"
