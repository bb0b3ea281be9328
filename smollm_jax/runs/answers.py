"""`answers.json` in the folder of a fine-tuning run: the same questions, answered before and after training."""

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from smollm_jax.errors import InputFileError
from smollm_jax.runtime.atomic import overwrite
from smollm_jax.runtime.files import read_json

FILE = "answers.json"


@dataclasses.dataclass(frozen=True)
class Answer:
    """A question and its answers; None: not answered yet."""

    prompt: str
    before: str | None = None
    after: str | None = None


def read(run: Path) -> list[Answer]:
    """The answers of a run, none if it has no file of them; raises `InputFileError` if the file is malformed."""
    path = run / FILE
    if not path.is_file():
        return []
    rows = read_json(path)
    if not isinstance(rows, list) or not all(map(_is_answer, rows)):
        raise InputFileError(f"{path}: must be a list of objects with the texts prompt, before and after")
    return [Answer(**row) for row in rows]


def write(run: Path, answers: Sequence[Answer]) -> None:
    """Writes the answers of a run, replacing those that are there."""
    rows = [{name: text for name, text in dataclasses.asdict(answer).items() if text is not None} for answer in answers]
    overwrite(run / FILE, (json.dumps(rows, indent=2, ensure_ascii=False) + "\n").encode())


def _is_answer(row: Any) -> bool:
    names = {field.name for field in dataclasses.fields(Answer)}
    return isinstance(row, dict) and {"prompt"} <= row.keys() <= names and all(isinstance(x, str) for x in row.values())
