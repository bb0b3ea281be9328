"""Texts that follow a grammar: a JSON schema, a regular expression, or calls of tools within a free text.

llguidance says which tokens may follow; the device excludes all others before it samples. Needs the extra "serve".
"""

import concurrent.futures
import json
import math
import threading
from collections.abc import Callable, Mapping, Sequence
from fractions import Fraction
from typing import Any

import numpy as np

from smollm_jax.errors import UsageError
from smollm_jax.runtime.files import import_optional, one_line
from smollm_jax.tokenizer import Tokenizer

MAX_MULTIPLE = 100_000  # half a second
STACK = 512 << 20  # bytes; llguidance recurses along rules and $ref, 8 KB each, and a body of 1 MB has 30,000 of them
# Without it a text in which the grammar leaves no choice has one tokenization only, which may not be the model's.
ANY_TOKENS = '%llguidance {"no_forcing": true}\n'
CALL, CALL_END = "<tool_call>", "</tool_call>"  # around the JSON of a call, as in SmolLM2's instruction data


class Grammars:
    """Compiles grammars for one tokenizer. `eos_token_ids` end a text, wherever the grammar allows an end."""

    def __init__(self, tokenizer: Tokenizer, vocab_size: int, eos_token_ids: Sequence[int]):
        self._library = import_optional("llguidance", "a grammar", extra="serve")
        self._ends = list(eos_token_ids)
        ends = self._ends or [0]  # without any, a grammar is refused when it is compiled
        self._tokenizer = self._library.LLTokenizer(tokenizer.core.to_str(), n_vocab=vocab_size, eos_token=ends)
        self._compiler = concurrent.futures.ThreadPoolExecutor(1, "grammars")
        usual = threading.stack_size(STACK)
        self._compiler.submit(int).result()  # its thread exists from now on
        threading.stack_size(usual)

    def json_schema(self, schema: Mapping[str, Any]) -> "Matcher":
        """JSON that a schema describes. Raises `UsageError` for a schema that is invalid or not supported."""
        check_multiples(schema)
        return self._compile(lambda: f"start: %json {json.dumps(schema)}")

    def regex(self, pattern: str) -> "Matcher":
        """A text that a regular expression, in the syntax of Rust, matches as a whole; raises as `json_schema`."""
        (grammar,) = json.loads(self._library.LLMatcher.grammar_from_regex(pattern))["grammars"]
        return self.lark(grammar["lark_grammar"])

    def lark(self, grammar: str) -> "Matcher":
        """A text of a grammar in llguidance's form of Lark; raises as `json_schema`."""
        return self._compile(lambda: grammar)

    def calls_in_text(self, schema: Mapping[str, Any]) -> "Matcher":
        """Any text, in which what follows `CALL` is JSON of a schema, and `CALL_END`; raises as `json_schema`."""
        tag = self._library.StructTag(trigger=CALL, begin=CALL, grammar=dict(schema), end=CALL_END)
        return self._compile(lambda: self._library.StructTag.to_grammar([tag], assume_special=False))

    def _compile(self, source: Callable[[], str]) -> "Matcher":
        if not self._ends:
            raise UsageError("a grammar needs an eos token, and the weights have none")
        return self._compiler.submit(self._compiled, source).result()

    def _compiled(self, source: Callable[[], str]) -> "Matcher":
        try:
            grammar = ANY_TOKENS + source().removeprefix("%llguidance {}\n")
            matcher = self._library.LLMatcher(self._tokenizer, grammar, log_level=0)
        except (ValueError, TypeError) as error:
            raise UsageError(one_line(error)) from error
        first = Matcher(matcher, self._ends)
        first.write_allowed(np.zeros(-(-self._tokenizer.vocab_size // 32), np.int32))  # fails for one too complex
        if first.problem:
            raise UsageError(first.problem)
        return first


def check_multiples(schema: Any) -> None:
    """Raises `UsageError` for a schema whose multipleOf would take llguidance minutes: it makes a state for each."""
    values, found = [schema], []
    while values:
        value = values.pop()
        if isinstance(value, dict):
            multiple = value.get("multipleOf")
            if isinstance(multiple, int | float) and type(multiple) is not bool and 0 < multiple < float("inf"):
                found.append(Fraction(str(multiple)))
        values += value.values() if isinstance(value, dict) else value if isinstance(value, list) else []
    unit = math.lcm(*(multiple.denominator for multiple in found))
    common = math.lcm(*(int(multiple * unit) for multiple in found))
    if common > MAX_MULTIPLE:
        raise UsageError(f"multipleOf: the least common multiple is beyond {MAX_MULTIPLE:,} in the smallest unit")


class Matcher:
    """Where one text is in its grammar."""

    def __init__(self, matcher: Any, eos_token_ids: Sequence[int]):
        self._matcher, self._ends = matcher, list(eos_token_ids)

    def copy(self) -> "Matcher":
        """The same place, for another text."""
        return Matcher(self._matcher.deep_copy(), self._ends)

    @property
    def problem(self) -> str | None:
        """Why the grammar is too complex or contradicts itself; None as long as it can be followed."""
        return one_line(ValueError(self._matcher.get_error())) if self._matcher.is_error() else None

    def write_allowed(self, bits: np.ndarray) -> None:
        """Sets the bit of each token that may follow, and no other, in 32-bit words, the lowest bit first.

        At the end of the grammar, and where no token may follow, only the ends of a text are allowed.
        """
        bits[:] = 0
        if not (self._matcher.is_stopped() or self._matcher.is_error()):
            self._matcher.unsafe_compute_mask_ptr(bits.ctypes.data, bits.nbytes)
        if not bits.any():
            for i in self._ends:
                bits.view(np.uint32)[i // 32] |= np.uint32(1 << (i % 32))

    def add(self, token: int) -> None:
        """Goes on by one token of the text."""
        if not self._matcher.is_stopped():
            self._matcher.consume_token(token)
