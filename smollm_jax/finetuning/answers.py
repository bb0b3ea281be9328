"""The same questions, answered before and after training: `answers.json` in the run folder, and on the terminal."""

import dataclasses
import itertools
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from smollm_jax.data.examples.examples import Example
from smollm_jax.generation.generate import generate
from smollm_jax.generation.programs import PAD_ID
from smollm_jax.model.smollm import SmolLM
from smollm_jax.runs import answers
from smollm_jax.runs.answers import Answer
from smollm_jax.runtime.signals import StopSignal
from smollm_jax.tokenizer import Tokenizer

NEW_TOKENS = 48
QUESTIONS = 3


@dataclasses.dataclass(frozen=True)
class Question:
    """A prompt as its reader sees it and as the model does."""

    text: str
    ids: tuple[int, ...]


def questions_of(
    prompts: Sequence[str], examples: Sequence[Example], tokenizer: Tokenizer, room: int
) -> list[Question]:
    """The prompts as a user's turn each; without any, what precedes the first learnt token of some examples.

    Those of more than `room` tokens are left out.
    """
    asked = [
        Question(prompt, tuple(tokenizer.apply_chat_template([{"role": "user", "content": prompt}])))
        for prompt in prompts
    ]
    if not prompts:
        started = [example.ids[: _before_the_answer(example)] for example in examples]
        asked = [Question(_shown(tokenizer, ids.tolist()), tuple(ids.tolist())) for ids in started]
    return [question for question in asked if len(question.ids) <= room][: max(QUESTIONS, len(prompts))]


def answers_of(
    model: SmolLM, questions: Sequence[Question], tokenizer: Tokenizer, eos_token_ids: Sequence[int], stop: StopSignal
) -> list[str] | None:
    """The greedy answers; None if a signal arrives meanwhile."""
    if not questions:
        return []
    prompts = [list(question.ids) for question in questions]
    pieces = generate(model, prompts, max_new_tokens=NEW_TOKENS, eos_token_ids=tuple(eos_token_ids))
    pieces = itertools.takewhile(lambda _: not stop, pieces)
    rows = np.concatenate([np.empty((len(prompts), 0), int), *pieces], axis=1)
    if stop:
        return None
    return [tokenizer.decode(ids[(ids != PAD_ID) & ~np.isin(ids, list(eos_token_ids))].tolist()) for ids in rows]


def write_before(run: Path, questions: Sequence[Question], before: Sequence[str]) -> None:
    """Writes questions and the answers of the weights that a run starts from."""
    answers.write(run, [Answer(question.text, text) for question, text in zip(questions, before, strict=True)])


def write_after(run: Path, questions: Sequence[Question], after: Sequence[str]) -> list[Answer]:
    """Adds the answers after training to those of the same questions before; returns all of them."""
    before = {answer.prompt: answer.before for answer in answers.read(run)}
    both = [
        Answer(question.text, before.get(question.text), text) for question, text in zip(questions, after, strict=True)
    ]
    answers.write(run, both)
    return both


def comparison(both: Sequence[Answer]) -> str:
    """The answers side by side, for a terminal."""
    return "\n".join(
        f"\nquestion    {answer.prompt!r}\n  before    {answer.before or ''!r}\n  after     {answer.after or ''!r}"
        for answer in both
    )


def _before_the_answer(example: Example) -> int:
    """How many tokens of an example stand before what is learnt; of one that is learnt whole, some of its first."""
    first = int(np.argmax(example.learnt))
    return first if first > 1 else max(1, min(16, len(example.ids) // 2))


def _shown(tokenizer: Tokenizer, ids: list[int]) -> str:
    """The last message of a prompt, without the tokens of the template around it."""
    text = tokenizer.decode(ids)
    _, turn, last = text.rpartition("<|im_start|>user\n")
    return (last if turn else text).split("<|im_end|>")[0].strip()
