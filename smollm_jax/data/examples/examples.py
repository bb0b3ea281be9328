"""Files of rows become examples: token ids, and which of them are learnt. Imports no framework.

`learn` is "assistant" (each of the assistant's turns through the token that ends it), "completion" (all that follows
the prompt) or "all". Source of the rules: trl 1.16, sft_trainer.py and dpo_trainer.py, `_prepare_dataset`.
"""

import collections
import dataclasses
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np

from smollm_jax.data.bad_text import BadTextHandler, Policy
from smollm_jax.data.examples.rows import Chat, Text, example_of, kind_of_row, preference_of
from smollm_jax.data.text import records
from smollm_jax.data.text_sources import select_files
from smollm_jax.errors import InputFileError, UsageError
from smollm_jax.tokenizer import Tokenizer
from smollm_jax.tokenizer.chat_tokens import common_prefix

Learn = Literal["assistant", "completion", "all"]


@dataclasses.dataclass(frozen=True)
class Example:
    """Token ids, int32 `[n]`, and which of them are learnt, bool `[n]`."""

    ids: np.ndarray
    learnt: np.ndarray


@dataclasses.dataclass(frozen=True)
class Pair:
    """Two answers to one prompt, of which one is preferred; learnt are the answers."""

    chosen: Example
    rejected: Example


@dataclasses.dataclass
class Report:
    """What was read, and what was left out of it and why."""

    max_length: int
    notes: list[str] = dataclasses.field(default_factory=list)  # about files that were left out
    kinds: collections.Counter[str] = dataclasses.field(default_factory=collections.Counter)
    files: int = 0
    kept: int = 0
    tokens: int = 0
    learnt: int = 0
    truncated: int = 0
    cut: int = 0  # tokens
    filled: int = 0  # rows whose prompt alone fills the context
    unlearnt: int = 0  # rows without a token to learn
    unusable: int = 0  # rows with a character that has no token
    replaced: int = 0  # characters

    def lines(self) -> list[str]:
        """What a user is to know, a line each."""
        kinds = " and ".join(_plural(count, kind) for kind, count in self.kinds.items())
        lines = [*self.notes, f"read {kinds} from {_plural(self.files, 'file')}"]
        lines.append(f"{_plural(self.tokens, 'token')}, of which {self.learnt:,} are learnt ({self._share():.0%})")
        if self.truncated:
            cut = f"the last {_plural(self.cut, 'token')} of them are left out"
            lines.append(f"{_plural(self.truncated, 'row')} longer than {self.max_length:,} tokens: {cut}")
        left_out = {
            f"the prompt alone fills {self.max_length:,} tokens": self.filled,
            "no token of them is to be learnt": self.unlearnt,
            "they hold a character that has no token (--on-bad-text skip)": self.unusable,
        }
        lines += [f"left out {_plural(count, 'row')}: {why}" for why, count in left_out.items() if count]
        if self.replaced:
            lines.append(f"--on-bad-text put U+FFFD for {_plural(self.replaced, 'character')}")
        return lines

    def _share(self) -> float:
        return self.learnt / max(self.tokens, 1)

    def counted(self, example: Example, bound: int) -> Example | None:
        """An example cut to `bound` tokens, or None when nothing of it is learnt then."""
        length = len(example.ids)
        cut = Example(example.ids[:bound], example.learnt[:bound])
        if not cut.learnt[1:].any():  # the first token follows none
            if example.learnt[1:].any():
                self.filled += 1
            else:
                self.unlearnt += 1
            return None
        self.truncated += length > bound
        self.cut += max(0, length - bound)
        self.tokens += len(cut.ids)
        self.learnt += int(cut.learnt[1:].sum())
        return cut


def read_examples(
    sources: Sequence[str | Path],
    tokenizer: Tokenizer,
    *,
    learn: Learn = "assistant",
    max_length: int = 1024,
    on_bad_text: Policy = "stop",
    most: int | None = None,
) -> tuple[list[Example], Report]:
    """The examples of some files, folders or globs, in order, each cut to its first `max_length` tokens.

    Rows of which nothing is learnt then are left out and counted. Reading ends after `most` examples, where that is
    given. Raises `InputFileError` naming the file, the row and the field that does not fit, `UsageError` for a chat
    template that does not tell what the assistant says.
    """
    report, examples = Report(max_length), []
    bad = BadTextHandler(on_bad_text, tokenizer.unencodable)
    for where, row, kind in _rows(sources, report):
        if kind == "preference pair":
            raise InputFileError(f"{where} has chosen and rejected: preference pairs are learnt with --method dpo")
        content = _checked(example_of(row, kind, where), bad, where)
        if content is not None and (
            example := report.counted(_encoded(content, tokenizer, learn, max_length, where), max_length)
        ):
            examples.append(example)
        if most is not None and len(examples) == most:
            break
    return examples, _finished(report, bad, len(examples), sources)


def read_pairs(
    sources: Sequence[str | Path],
    tokenizer: Tokenizer,
    *,
    max_length: int = 1024,
    on_bad_text: Policy = "stop",
    most: int | None = None,
) -> tuple[list[Pair], Report]:
    """The preference pairs of some files, folders or globs; both sides cut to their first `max_length` tokens.

    A pair whose prompt alone is as long is left out and counted. Reading ends after `most` pairs, where that is given.
    Raises as `read_examples` does.
    """
    report, pairs = Report(max_length), []
    bad = BadTextHandler(on_bad_text, tokenizer.unencodable)
    for where, row, kind in _rows(sources, report):
        if kind != "preference pair":
            raise InputFileError(
                f"{where} has no chosen and rejected: DPO learns preference pairs; --method sft a {kind}"
            )
        sides = []
        for answer in preference_of(row, where):
            if (content := _checked(answer, bad, where)) is not None:
                sides.append(_encoded(content, tokenizer, "completion", max_length, where))
        if len(sides) < 2:
            continue
        _share_prompt(*sides)
        if not sides[0].learnt[:max_length].any():  # the prompt is as long
            report.filled += 1
            continue
        chosen, rejected = (report.counted(side, max_length) for side in sides)
        if chosen and rejected:
            pairs.append(Pair(chosen, rejected))
        if most is not None and len(pairs) == most:
            break
    return pairs, _finished(report, bad, len(pairs), sources)


def kind_of_first_row(sources: Sequence[str | Path]) -> str:
    """What kind the first row of some files is, such as "chat"; raises `InputFileError` if they have no row."""
    for _, _, kind in _rows(sources, Report(0)):
        return kind
    raise InputFileError(f"{' '.join(map(str, sources))}: no row to read")


def _rows(sources: Sequence[str | Path], report: Report) -> Iterator[tuple[str, dict[str, Any], str]]:
    """Each row, where it stands, and what kind it is; a file has rows of one kind."""
    for source in sources:
        chosen = select_files(Path(source))
        report.notes += chosen.notes
        for file in chosen.files:
            report.files += 1
            first = None
            for where, row in records(file):
                kind = kind_of_row(row, where)
                first = first or kind
                if kind != first:
                    raise InputFileError(
                        f"{where} is a {kind}, the rows before it are {first}s: give each kind a file of its own"
                    )
                report.kinds[kind] += 1
                yield where, row, kind


def _finished(report: Report, bad: BadTextHandler, kept: int, sources: Sequence[str | Path]) -> Report:
    report.kept, report.unusable, report.replaced = kept, bad.skipped, bad.replaced
    if not kept:
        named = " ".join(map(str, sources))
        rows = sum(report.kinds.values())
        reasons = "; ".join(line for line in report.lines() if line.startswith("left out"))
        raise InputFileError(f"{named}: nothing to learn in {_plural(rows, 'row')}{': ' * bool(reasons)}{reasons}")
    return report


def _checked(content: Any, bad: BadTextHandler, where: str) -> Any:
    """A row whose texts have tokens, perhaps with characters replaced, or None when it is left out."""
    if isinstance(content, Text):
        border = content.prompt or 0
        head, tail = (bad.clean(text, where) for text in (content.text[:border], content.text[border:]))
        return (
            None if head is None or tail is None else Text(head + tail, None if content.prompt is None else len(head))
        )
    messages = []
    for number, message in enumerate(content.messages, 1):
        text = bad.clean(message["content"], f"{where}: message {number}")
        if text is None:
            return None
        messages.append({**message, "content": text})
    return dataclasses.replace(content, messages=messages)


def _encoded(content: Chat | Text, tokenizer: Tokenizer, learn: Learn, limit: int, where: str) -> Example:
    try:
        if isinstance(content, Text):
            return _encoded_text(content, tokenizer, learn)
        return _encoded_chat(content, tokenizer, learn, limit)
    except UsageError as error:
        raise type(error)(f"{where}: {error}") from error


def _encoded_text(content: Text, tokenizer: Tokenizer, learn: Learn) -> Example:
    """A text and the token that ends it; a prompt ends where its ids are no longer those of the whole."""
    end, prompt = tokenizer.eos_token_id, content.prompt or 0
    if end is None:
        raise UsageError("the tokenizer names no eos token to end a text with")
    if learn == "completion" and content.prompt is None:
        raise UsageError("a text has no completion: --learn all learns all of it")
    written = tokenizer.roles["eos_token"]
    text = content.text[:prompt] + content.text[prompt:].removesuffix(written)
    ids = tokenizer.encode(text)
    start = common_prefix(tokenizer.encode(text[:prompt]), ids) if prompt else 0
    return _example([*ids, end], [(0 if learn == "all" else start, len(ids) + 1)])


def _encoded_chat(content: Chat, tokenizer: Tokenizer, learn: Learn, limit: int) -> Example:
    prompt = content.prompt
    answers = content.answers
    if learn == "completion":
        prompt = len(content.messages) - 1 if prompt is None else prompt
        answers = [prompt] if content.messages[prompt]["role"] == "assistant" else []
    elif learn == "all":
        answers = []
    ids, spans = tokenizer.encode_answers(
        content.messages, answers, tools=content.tools, limit=limit, variables=content.variables
    )
    if learn == "all":
        spans = [(0, len(ids))]
    elif learn == "completion":  # what the template writes behind the answer, too
        spans = [(start, len(ids)) for start, _ in spans]
    return _example(ids, spans)


def _example(ids: list[int], spans: Sequence[tuple[int, int]]) -> Example:
    learnt = np.zeros(len(ids), bool)
    for start, stop in spans:
        learnt[start:stop] = True
    return Example(np.array(ids, np.int32), learnt)


def _share_prompt(chosen: Example, rejected: Example) -> None:
    """Gives both sides the shorter of their two prompts."""
    start = min(int(side.learnt.argmax()) for side in (chosen, rejected))
    for side in (chosen, rejected):
        side.learnt[start:] = True


def _plural(count: int, noun: str) -> str:
    return f"{count:,} {noun}{'s' * (count != 1)}"
