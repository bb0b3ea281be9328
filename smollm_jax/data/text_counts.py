"""Counts of skipped documents, replaced characters and documents with special tokens, and their lines for the user."""

import re
from collections.abc import Mapping

from smollm_jax.data.bad_text import BadTextHandler
from smollm_jax.tokenizer import Tokenizer

SENTENCES = {
    "documents_skipped": "--on-bad-text skipped {} without usable text",
    "characters_replaced": "--on-bad-text replaced {} by U+FFFD",
    "documents_with_special_tokens": "warning: special tokens in {} are read as plain text; for text that a chat "
    "template has rendered, add --special-tokens",
}
NOUNS = {"characters_replaced": "character"}  # the noun of the other counts is "document"


class SpecialTokens:
    """Counts the documents whose text contains a special token."""

    def __init__(self, tokenizer: Tokenizer):
        added = tokenizer.core.get_added_tokens_decoder().values()
        names = [token.content for token in added if token.special]
        self._first, self._any = {name[0] for name in names}, re.compile("|".join(map(re.escape, names)) or "(?!)")
        self._counted, self.documents = False, 0  # _counted: the current document is in `documents` already

    def count(self, text: str, ends: bool = True) -> None:
        """Searches the next chunk of a document, which `ends` it or not."""
        if not self._counted and any(first in text for first in self._first) and self._any.search(text):
            self._counted = True
            self.documents += 1
        if ends:
            self._counted = False


def counts_of(bad_text: BadTextHandler, special: SpecialTokens) -> dict[str, int]:
    """The nonzero counts, by the names of `SENTENCES`."""
    numbers = zip(SENTENCES, (bad_text.skipped, bad_text.replaced, special.documents), strict=True)
    return {name: number for name, number in numbers if number}


def sentences(counts: Mapping[str, int]) -> list[str]:
    """One line for the user for each nonzero count."""
    lines = []
    for name, sentence in SENTENCES.items():
        if number := counts.get(name):
            lines.append(sentence.format(f"{number:,} {NOUNS.get(name, 'document')}{'s' * (number != 1)}"))
    return lines
