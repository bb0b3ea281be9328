"""What is counted while text becomes tokens, and the lines that say it: documents left out, special tokens as text."""

import re
from collections.abc import Mapping

from smollm_jax.data.bad_text import BadText
from smollm_jax.tokenizer import Tokenizer

SENTENCES = {
    "documents_skipped": "--on-bad-text skipped {} without usable text",
    "characters_replaced": "--on-bad-text put U+FFFD for {}",
    "documents_with_special_tokens": "warning: a special token is written out in {} and read as plain text; if it is "
    "meant as one, as in conversations that a chat template has rendered, add --special-tokens",
}
NOUNS = {"characters_replaced": "character"}  # else documents


class SpecialTokens:
    """Counts the documents in which a special token is written out."""

    def __init__(self, tokenizer: Tokenizer):
        added = tokenizer.core.get_added_tokens_decoder().values()
        names = [token.content for token in added if token.special]
        self._first, self._any = {name[0] for name in names}, re.compile("|".join(map(re.escape, names)) or "(?!)")
        self._within, self.documents = False, 0

    def see(self, text: str, ends: bool = True) -> None:
        """Looks at the next piece of a document, which may end it."""
        if not self._within and any(first in text for first in self._first) and self._any.search(text):
            self._within = True
            self.documents += 1
        if ends:
            self._within = False


def counts_of(bad: BadText, special: SpecialTokens) -> dict[str, int]:
    """What was counted, by the names of `SENTENCES`, but for what is 0."""
    numbers = zip(SENTENCES, (bad.skipped, bad.replaced, special.documents), strict=True)
    return {name: number for name, number in numbers if number}


def sentences(counts: Mapping[str, int]) -> list[str]:
    """What a user is to know of the counts, a line each."""
    lines = []
    for name, sentence in SENTENCES.items():
        if number := counts.get(name):
            lines.append(sentence.format(f"{number:,} {NOUNS.get(name, 'document')}{'s' * (number != 1)}"))
    return lines
