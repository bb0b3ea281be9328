"""What a row of a data set says: a chat, a prompt and its completion, an instruction, a text, or a preference pair.

Known by its columns. The names are those of Hugging Face's TRL, ShareGPT and Alpaca; roles are OpenAI's.
"""

import dataclasses
import difflib
import json
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from smollm_jax.errors import InputFileError, short_repr

Message = dict[str, Any]
ROLES = ("system", "developer", "user", "assistant", "tool")
SHAREGPT = {"human": "user", "gpt": "assistant", "function_response": "tool", "observation": "tool"}
MESSAGES = ("messages", "conversations", "conversation")
KINDS = {  # kind: columns of which a row has to have one each
    "preference pair": (("chosen",), ("rejected",)),
    "chat": (MESSAGES,),
    "completion": (("prompt",), ("completion",)),
    "instruction": (("instruction",), ("output", "response")),
    "text": (("text",),),
}
OFFERED = "messages; conversations; prompt, completion; instruction, output; or text"


@dataclasses.dataclass(frozen=True)
class Chat:
    """Messages, and which of them are answers to learn; `tools` are those that the template is given."""

    messages: list[Message]
    answers: list[int]
    tools: Sequence[Mapping[str, Any]] | None = None
    variables: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    prompt: int | None = None  # how many messages come before the completion, where a row tells


@dataclasses.dataclass(frozen=True)
class Text:
    """A text, and how many of its characters are a prompt, where a row tells."""

    text: str
    prompt: int | None = None


class Preference(NamedTuple):
    """Two answers to the same prompt, each with that prompt before it."""

    chosen: Chat | Text
    rejected: Chat | Text


def kind_of_row(row: Any, where: str) -> str:
    """The name in `KINDS` of what a row is; raises `InputFileError` naming the columns there are."""
    if not isinstance(row, dict):
        raise InputFileError(f"{where} is no JSON object but {short_repr(row)}")
    columns = {name for name, value in row.items() if value is not None}
    for kind, needed in KINDS.items():
        if all(columns.intersection(names) for names in needed):
            return kind
    if "prompt" in columns and not columns.intersection(("completion", "chosen", "rejected")):
        raise InputFileError(f"{where} has a prompt but no completion: it has {_names(row)}")
    raise InputFileError(f"{where} has columns {_names(row)}: needed are {OFFERED}")


def _names(row: Mapping[str, Any]) -> str:
    names = ", ".join(name if name.isprintable() else repr(name) for name in map(str, row))
    return names if len(names) <= 120 else names[:120] + "..."


def example_of(row: dict[str, Any], kind: str, where: str) -> Chat | Text:
    """What a row says that is no preference pair; raises `InputFileError` naming the row and the field at fault."""
    if kind == "text":
        return Text(_text(row["text"], f"{where}: text"))
    if kind == "instruction":
        return _instruction(row, where)
    if kind == "chat":
        name = next(name for name in MESSAGES if row.get(name) is not None)
        messages = _messages(row[name], f"{where}: {name}")
        return _chat(messages, row, where)
    prompt, completion = (_text_or_messages(row, name, where) for name in ("prompt", "completion"))
    return _answered(prompt, completion, row, where, "completion")


def preference_of(row: dict[str, Any], where: str) -> Preference:
    """The pair of a row, whose prompt is a column of its own or what both answers begin with."""
    chosen, rejected = (_text_or_messages(row, name, where) for name in ("chosen", "rejected"))
    if isinstance(chosen, str) != isinstance(rejected, str):
        raise InputFileError(f"{where}: chosen and rejected must both be texts, or both lists of messages")
    prompt = None if row.get("prompt") is None else _text_or_messages(row, "prompt", where)
    if prompt is None or (isinstance(prompt, str) and not isinstance(chosen, str)):  # as in UltraFeedback
        shared = _shared(chosen, rejected)
        prompt, chosen, rejected = chosen[:shared], chosen[shared:], rejected[shared:]
        if not prompt:
            raise InputFileError(f"{where}: has no prompt, and chosen and rejected begin differently")
    return Preference(
        _answered(prompt, chosen, row, where, "chosen"), _answered(prompt, rejected, row, where, "rejected")
    )


def _shared(chosen: Sequence[Any], rejected: Sequence[Any]) -> int:
    """How much two answers share at their beginning that is a prompt: messages, or characters up to a space.

    Source: trl 1.16, data_utils.py, `extract_prompt`.
    """
    shorter = min(len(chosen), len(rejected))
    shared = next((i for i in range(shorter) if chosen[i] != rejected[i]), shorter - 1)
    return shared - 1 if shared and chosen[shared - 1] == " " else shared


def _answered(prompt: Any, answer: Any, row: dict[str, Any], where: str, name: str) -> Chat | Text:
    if isinstance(prompt, str) and isinstance(answer, str):
        return Text(prompt + answer, len(prompt))
    if isinstance(prompt, str) or isinstance(answer, str):
        raise InputFileError(f"{where}: prompt and {name} must both be texts, or both lists of messages")
    if not prompt or not answer:
        raise InputFileError(f"{where}: {name if prompt else 'prompt'} has no messages")
    swapped = f": are the columns prompt and {name} swapped?"
    if prompt[-1]["role"] == "assistant":
        raise InputFileError(f"{where}: prompt ends with a message of the assistant{swapped}")
    if answer[0]["role"] != "assistant":
        raise InputFileError(f"{where}: {name} begins with a message of role {short_repr(answer[0]['role'])}{swapped}")
    return _chat([*prompt, *answer], row, where, len(prompt))


def _instruction(row: dict[str, Any], where: str) -> Chat:
    """Alpaca's rows: the instruction, and what it is about if anything, are the user's message."""
    answer = next(name for name in ("output", "response") if row.get(name) is not None)
    context = next((name for name in ("input", "context") if row.get(name)), None)
    texts = [_text(row[name], f"{where}: {name}") for name in ("instruction", context) if name]
    messages = [{"role": "user", "content": "\n\n".join(texts)}]
    if row.get("system"):
        messages.insert(0, {"role": "system", "content": _text(row["system"], f"{where}: system")})
    messages.append({"role": "assistant", "content": _text(row[answer], f"{where}: {answer}")})
    return _chat(messages, row, where, len(messages) - 1)


def _chat(messages: list[Message], row: Mapping[str, Any], where: str, prompt: int | None = None) -> Chat:
    tools, variables = row.get("tools") or None, row.get("chat_template_kwargs") or {}
    if isinstance(tools, str):  # as TRL keeps them in a table
        try:
            tools = json.loads(tools)
        except ValueError as error:
            raise InputFileError(f"{where}: tools: not readable as JSON: {error}") from error
    if not isinstance(variables, dict):
        raise InputFileError(f"{where}: chat_template_kwargs must be an object, got {short_repr(variables)}")
    answers = [
        number
        for number, message in enumerate(messages)
        if message["role"] == "assistant" and number >= (prompt or 0) and _weight(message, where, number)
    ]
    return Chat(messages, answers, tools, variables, prompt)


def _weight(message: Message, where: str, number: int) -> bool:
    """Whether a message is learnt: OpenAI's `weight`, 0 or 1, says so of one of the assistant's."""
    weight = message.get("weight", 1)
    if weight not in (0, 1, None):
        raise InputFileError(f"{where}: message {number + 1}: weight must be 0 or 1, got {short_repr(weight)}")
    return weight != 0


def _text(value: Any, where: str) -> str:
    if not isinstance(value, str):
        raise InputFileError(f"{where} must be a text, got {short_repr(value)}")
    return value


def _text_or_messages(row: Mapping[str, Any], name: str, where: str) -> Any:
    return row[name] if isinstance(row[name], str) else _messages(row[name], f"{where}: {name}")


def _messages(value: Any, where: str) -> list[Message]:
    """Messages with role and content, in either way to write them."""
    if not isinstance(value, list) or not value:
        raise InputFileError(f"{where} must be a list of messages, got {short_repr(value)}")
    return [_message(message, f"{where}: message {number}") for number, message in enumerate(value, 1)]


def _message(message: Any, where: str) -> Message:
    if not isinstance(message, dict):
        raise InputFileError(f"{where} must be an object with role and content, got {short_repr(message)}")
    names = ("from", "value") if "from" in message and "role" not in message else ("role", "content")
    role, content = (message.get(name) for name in names)
    if role not in (*ROLES, *SHAREGPT):
        raise InputFileError(f"{where}: {_role_fault(role, content, names)}")
    role = SHAREGPT.get(role, role)
    if isinstance(content, list) and all(
        isinstance(part, dict) and part.get("type") == "text" and isinstance(part.get("text"), str) for part in content
    ):
        content = "".join(part["text"] for part in content)
    if content is None and message.get("tool_calls"):
        content = ""
    if not isinstance(content, str):
        raise InputFileError(f"{where}: {names[1]} must be a text, got {short_repr(content)}")
    others = {key: value for key, value in message.items() if key not in names and value is not None}
    return {"role": role, "content": content, **others}


def _role_fault(role: Any, content: Any, names: tuple[str, str]) -> str:
    if role is None:
        return f"has no {names[0]}"
    if content in (*ROLES, *SHAREGPT):
        return f"{names[0]} is {short_repr(role)} and {names[1]} {short_repr(content)}: are they swapped?"
    near = difflib.get_close_matches(str(role).strip().lower(), [*ROLES, *SHAREGPT], 1)
    meant = f"did you mean {near[0]!r}?" if near else f"known are {', '.join(ROLES)}"
    return f"{names[0]} is {short_repr(role)}: {meant}"
