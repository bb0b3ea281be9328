"""The token ids of a conversation. Special tokens written by the chat template are tokens, those in messages are text.

transformers treats both as tokens, except with `sanitize_control_tokens`, whose markers this module uses as well. If no
message contains the text of a special token, the ids are those of transformers.
"""

import bisect
import functools
import itertools
import re
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple, Protocol

import tokenizers

from smollm_jax.errors import UsageError
from smollm_jax.tokenizer.chat_template import ChatTemplates, PreparedChat
from smollm_jax.tokenizer.conversation import Conversation

# Rare symbols that `repr` and `upper` leave unchanged, then characters for private use.
MARKER_CHARACTERS = [*range(0x2FF0, 0x2FFC), *range(0x4DC0, 0x4E00), *range(0x2800, 0x2900), *range(0x100000, 0x10FFFE)]


class ChatTokenizer(Protocol):
    """The part of a tokenizer that `encode_chat` uses."""

    core: tokenizers.Tokenizer
    templates: ChatTemplates
    roles: dict[str, str]

    def encode(self, text: str, *, parse_special: bool = False) -> list[int]: ...

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]: ...


def encode_chat(tokenizer: ChatTokenizer, conversation: Conversation, **options: Any) -> list[int]:
    """Token ids of a conversation; `options` are those of `ChatTemplates.render`."""
    tokens = special_tokens(tokenizer)
    markers = Markers([token.content for token in tokens])
    text = tokenizer.templates.render(conversation, tokenizer.roles, markers=markers, **options)
    if not markers.pair:
        return tokenizer.encode(text, parse_special=True)
    pieces = split_specials(text, markers, tokens)
    return [i for piece in pieces for i in tokenizer.encode(piece.text, parse_special=piece.special)]


def encode_answers(
    tokenizer: ChatTokenizer, conversation: Conversation, answers: Sequence[int], limit: int | None = None
) -> tuple[list[int], list[tuple[int, int]]]:
    """Token ids of a conversation, and of each message numbered in `answers` where its tokens start and stop.

    They start where the ids of the messages before it, with a generation prompt, are no longer a prefix, and stop after
    the last special token of the message: `<|im_end|>`, and not the newline after it. Of the answers that start after
    `limit` tokens only the first is looked for. Raises `UsageError` where the template writes a message otherwise when
    others follow it: there is no telling then which tokens are an answer's.
    """
    tokens = special_tokens(tokenizer)
    markers = Markers([token.content for token in tokens])
    chat = tokenizer.templates.prepare(conversation, tokenizer.roles, markers=markers)
    messages, text = chat.conversation.messages, chat.text()
    pieces = split_specials(text, markers, tokens)
    plain = iter(tokenizer.encode_batch([piece.text for piece in pieces if not piece.special]))
    encode = functools.cache(tokenizer.encode)
    encoded = [encode(piece.text, parse_special=True) if piece.special else next(plain) for piece in pieces]
    begins = list(itertools.accumulate(map(len, encoded), initial=0))

    def place(end: int) -> int:
        """How many tokens the ids of the text up to a character share with those of the whole text."""
        number = bisect.bisect_right(pieces, end, key=lambda piece: piece.end)
        if number == len(pieces) or pieces[number].start >= end or pieces[number].special:
            return begins[number]
        head = encode(markers.removed(text[pieces[number].start : end]))
        return begins[number] + common_prefix(head, encoded[number])

    spans: list[tuple[int, int]] = []
    for answer in answers:
        prompt = _prompt_end(chat, text, answer)
        if prompt is not None and limit is not None and spans and place(prompt) >= limit:
            break
        whole = text if answer + 1 == len(messages) else chat.text(messages[: answer + 1])
        if prompt is None or not text.startswith(whole) or prompt > len(whole):
            raise UsageError(
                f"{chat.path}: this chat template writes message {answer + 1} otherwise when others follow it, so it "
                "does not tell which tokens are the assistant's: use another template, or --learn all"
            )
        first, last = (bisect.bisect_right(pieces, end, key=lambda piece: piece.end) for end in (prompt, len(whole)))
        ends = (piece.end for piece in reversed(pieces[first:last]) if piece.special)
        spans.append((place(prompt), place(next(ends, len(whole)))))
    return [i for ids in encoded for i in ids], spans


def _prompt_end(chat: PreparedChat, text: str, answer: int) -> int | None:
    """Where in the text of a chat the prompt for a message ends, None where that prompt is not written there."""
    messages = chat.conversation.messages
    if answer:
        prompt = chat.text(messages[:answer], add_generation_prompt=True)
        return len(prompt) if text.startswith(prompt) else None
    # Nothing comes before it but what the template begins with, perhaps a system turn of its own.
    first = chat.text(messages[:1])
    header = chat.text(messages[:1], add_generation_prompt=True)[len(first) :]
    return text.find(header) + len(header) if header in first else None


def common_prefix(ids: Sequence[int], others: Sequence[int]) -> int:
    """How many leading ids are equal."""
    pairs = enumerate(zip(ids, others, strict=False))
    return next((i for i, (a, b) in pairs if a != b), min(len(ids), len(others)))


def special_tokens(tokenizer: ChatTokenizer) -> list[tokenizers.AddedToken]:
    """The special tokens of a tokenizer, which a template writes and a message may not."""
    return [token for token in tokenizer.core.get_added_tokens_decoder().values() if token.special]


class Piece(NamedTuple):
    """A special token of a chat template's own, or the plain text between two of them, in a rendered text."""

    start: int
    end: int
    text: str  # without markers
    special: bool


def split_specials(text: str, markers: "Markers", tokens: Sequence[tokenizers.AddedToken]) -> list[Piece]:
    """A rendered text as special tokens and what lies between them, which is tokenized piece by piece."""
    pieces, plain, start, end = [], "", 0, 0
    for match in markers.pattern(tokens).finditer(text):
        plain += text[end : match.start()] + (match["marked"] or "")
        end = match.end()
        if match["special"]:
            pieces += [Piece(start, match.start(), plain, False)] if plain else []
            pieces.append(Piece(match.start(), end, match["special"], True))
            plain, start = "", end
    plain += text[end:]
    return pieces + ([Piece(start, len(text), plain, False)] if plain else [])


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
        """A function that markers these texts; None if no text contains or ends with (part of) a special token.

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
        longest_first = sorted(tokens, key=lambda token: -len(token.content))
        special = "|".join(map(_pattern_of, longest_first)) or "(?!)"
        if not self.pair:
            return re.compile(f"(?P<marked>(?!))|(?P<special>{special})")
        start, end = self.pair
        return re.compile(f"{start}(?P<marked>{self._tokens.pattern}){end}|[{start}{end}]|(?P<special>{special})")

    def removed(self, text: str) -> str:
        """A rendered text without the markers."""
        return text.translate(dict.fromkeys(map(ord, self.pair)))

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
