"""What becomes of a text without tokens: a character the vocabulary lacks, NUL, half a surrogate pair, no UTF-8, null.

It stops the reading, is left out, or has U+FFFD for each such character.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Literal

from smollm_jax.errors import InputFileError

Policy = Literal["stop", "skip", "replace"]
REPLACEMENT = "\ufffd"
ADVICE = "; --on-bad-text skip leaves out such a document, replace such a character"


class BadTextError(InputFileError):
    """A document that is not, or holds what is not, text with tokens."""


class BadText:
    """A policy, and the counts of what it did: documents left out, and characters replaced.

    `unencodable` says why a text has no tokens, as `Tokenizer.unencodable` does; without it only what is no text in any
    vocabulary is bad.
    """

    def __init__(self, policy: Policy = "stop", unencodable: Callable[[str], str | None] | None = None):
        self.policy: Policy = policy
        self.unencodable = unencodable
        self.skipped = self.replaced = 0
        self._advice = ADVICE if unencodable else ""

    def decoded(self, content: bytes, file: Path, place: int) -> str:
        """The text of bytes that begin at some place of a file; a byte that is not UTF-8 becomes a lone surrogate.

        Raises `BadTextError` naming it where it is to stop the reading.
        """
        try:
            return content.decode()
        except UnicodeDecodeError as error:
            if self.policy == "stop":
                raise self.error(f"{file}: byte {place + error.start} is not UTF-8") from error
            return content.decode(errors="surrogateescape")

    def error(self, reason: str) -> BadTextError:
        """What stops the reading, with what a user can do where there is the choice."""
        return BadTextError(reason + self._advice)

    def checked(self, text: str | None, where: str, field: str = "") -> str | None:
        """A document's text as it is to be encoded, or None when it is left out; `where` and `field` are for an error.

        Raises `BadTextError` where it is to stop the reading.
        """
        if text is None:
            reason = f"{where}{field} is null"
        elif (place := text.find("\0")) >= 0:
            reason = f"{where}{field}: character {place} is NUL: this is no text"
        elif self.unencodable and (why := self.unencodable(text)):
            reason = f"{where} cannot be encoded: {why}"
        else:
            return text
        if self.policy == "stop":
            raise self.error(reason)
        if self.policy == "skip" or text is None:  # null has no character to replace
            self.skipped += 1
            return None
        return self.replaced_in(text, where)

    def replaced_in(self, text: str, where: str) -> str:
        """A text whose bad characters are U+FFFD, and its bytes that are not UTF-8 as Python's `errors="replace"`."""
        lacks = self.unencodable or _surrogate
        if reason := lacks(REPLACEMENT):
            raise InputFileError(f"{where}: U+FFFD, which would replace a character, has no token either: {reason}")
        escaped = {c for c in set(text) if "\udc80" <= c <= "\udcff"}
        bad = {c for c in set(text) - escaped if c == "\0" or lacks(c)}
        self.replaced += sum(map(text.count, bad))
        text = text.translate(dict.fromkeys(map(ord, bad), REPLACEMENT))
        if escaped:
            before = text.count(REPLACEMENT)
            text = text.encode(errors="surrogateescape").decode(errors="replace")
            self.replaced += text.count(REPLACEMENT) - before
        return text


def _surrogate(character: str) -> str | None:
    return "a lone surrogate" if "\ud800" <= character <= "\udfff" else None
