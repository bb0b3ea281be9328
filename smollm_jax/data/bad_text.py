"""The policy for text without tokens: a character that the vocabulary lacks, NUL, a lone surrogate, not UTF-8, null.

Such a text stops the reading, or its document is skipped, or U+FFFD replaces each such character.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Literal

from smollm_jax.errors import InputFileError

Policy = Literal["stop", "skip", "replace"]
REPLACEMENT = "\ufffd"
ADVICE = "; --on-bad-text skip leaves out such documents, --on-bad-text replace puts U+FFFD for such characters"


class BadTextError(InputFileError):
    """A document has content that cannot be tokenized, or is not text."""


class BadTextHandler:
    """Applies a policy to each text, and counts skipped documents and replaced characters.

    `unencodable` returns why a text has no tokens, or None, as `Tokenizer.unencodable` does; without it only text that
    no vocabulary could encode is bad.
    """

    def __init__(self, policy: Policy = "stop", unencodable: Callable[[str], str | None] | None = None):
        self.policy: Policy = policy
        self.unencodable = unencodable
        self.skipped = self.replaced = 0
        self._advice = ADVICE if unencodable else ""

    def decode(self, content: bytes, file: Path, offset: int) -> str:
        """The text of bytes that start at `offset` in a file; a byte that is not UTF-8 becomes a lone surrogate.

        Raises `BadTextError` naming that byte if the policy is "stop".
        """
        try:
            return content.decode()
        except UnicodeDecodeError as error:
            if self.policy == "stop":
                raise self.error(f"{file}: byte {offset + error.start} is not UTF-8") from error
            return content.decode(errors="surrogateescape")

    def error(self, reason: str) -> BadTextError:
        """The error for the policy "stop", with the flag that changes the policy where there is one."""
        return BadTextError(reason + self._advice)

    def clean(self, text: str | None, where: str, field: str = "") -> str | None:
        """A document's text, with bad characters replaced if that is the policy, or None if the document is skipped.

        Raises `BadTextError` naming `where` and `field` if the policy is "stop".
        """
        if text is None:
            reason = f"{where}{field} is null"
        elif (index := text.find("\0")) >= 0:
            reason = f"{where}{field}: character {index} is NUL, so this is not text"
        elif self.unencodable and (why := self.unencodable(text)):
            reason = f"{where} cannot be encoded: {why}"
        else:
            return text
        if self.policy == "stop":
            raise self.error(reason)
        if self.policy == "skip" or text is None:  # null has no character to replace
            self.skipped += 1
            return None
        return self.replace(text, where)

    def replace(self, text: str, where: str) -> str:
        """The text with U+FFFD for each bad character, and for bytes that are not UTF-8 as `errors="replace"` does."""
        unencodable = self.unencodable or _surrogate
        if reason := unencodable(REPLACEMENT):
            raise InputFileError(f"{where}: the tokenizer cannot encode the replacement character U+FFFD: {reason}")
        escaped = {c for c in set(text) if "\udc80" <= c <= "\udcff"}
        bad = {c for c in set(text) - escaped if c == "\0" or unencodable(c)}
        self.replaced += sum(map(text.count, bad))
        text = text.translate(dict.fromkeys(map(ord, bad), REPLACEMENT))
        if escaped:
            before = text.count(REPLACEMENT)
            text = text.encode(errors="surrogateescape").decode(errors="replace")
            self.replaced += text.count(REPLACEMENT) - before
        return text


def _surrogate(character: str) -> str | None:
    return "a lone surrogate" if "\ud800" <= character <= "\udfff" else None
