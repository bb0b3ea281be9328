"""The messages, tools and documents of a chat as plain Python: text, numbers, lists and dictionaries.

Source of the rules: transformers 5.23, utils/chat_template_utils.py, `_plain_template_data`, `_alias_reasoning_fields`
and `render_jinja_template`; tokenization_utils_base.py, `apply_chat_template`.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jinja2

from smollm_jax.errors import UsageError, short_repr

Message = Mapping[str, Any]
TextMap = Callable[[str], str]

REASONING = ("reasoning_content", "thinking", "reasoning")  # synonyms; templates read the first
_TAG = "THE_MESSAGE_GOES_ON_HERE "  # the space shows whether a template trims the message


@dataclasses.dataclass(frozen=True)
class Conversation:
    """The input of a chat template; `variables` are additional names that some templates read."""

    messages: Sequence[Message]
    tools: Sequence[Mapping[str, Any]] | None = None
    documents: Sequence[Mapping[str, Any]] | None = None
    variables: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    def map_texts(self, change: TextMap) -> "Conversation":
        """A copy of plain values with `change` applied to each text, and without None in messages.

        Raises `UsageError` naming the message, tool or document with a value of another type.
        """
        if not self.messages and isinstance(self.messages, list | tuple):
            raise UsageError("messages must contain at least one message")
        messages = [
            {key: value for key, value in message.items() if value is not None}
            for message in _objects("message", self.messages, change)
        ]
        tools, documents = (
            None if values is None else _objects(kind, values, change)
            for kind, values in (("tool", self.tools), ("document", self.documents))
        )
        variables = {
            name: _plain(value, _unchanged if name.endswith("_token") else change, f"variable {short_repr(name)}")
            for name, value in self.variables.items()
        }
        return Conversation([_with_reasoning(message) for message in messages], tools, documents, variables)

    def explain(self, error: Exception) -> str:
        """A prefix for a template's error that names the message it is about; "" if the error does not tell."""
        if not isinstance(error, TypeError | jinja2.UndefinedError):
            return ""
        for i, message in enumerate(self.messages, 1):
            for key in ("role", "content"):
                kind = type(message.get(key)).__name__
                if key not in message and f"'{key}'" in str(error):
                    return f"message {i} has no {key}: "
                if key in message and kind != "str" and kind in str(error):
                    return f"message {i} has {key} of type {kind}: "
        return ""


def _objects(kind: str, values: Sequence[Any], change: TextMap) -> list[dict[str, Any]]:
    if isinstance(values, str | bytes | Mapping) or not isinstance(values, Sequence):
        raise UsageError(f"{kind}s must be a list of dictionaries, got {short_repr(values)}")
    objects = []
    for i, value in enumerate(values, 1):
        plain = None if callable(value) and not isinstance(value, Mapping) else _plain(value, change, f"{kind} {i}")
        if not isinstance(plain, dict):
            hint = ": give a function's JSON schema" if callable(value) else ""
            raise UsageError(f"{kind} {i} must be a dictionary, got {short_repr(value)}{hint}")
        objects.append(plain)
    return objects


def _plain(value: Any, change: TextMap, where: str) -> Any:
    """The value as plain Python, because a template can call the methods of any other object."""
    try:
        return _converted(value, change)
    except _UnsupportedTypeError as error:
        raise UsageError(
            f"{where} holds a value of type {error}: a chat template takes text, numbers, lists and objects"
        ) from error
    except RecursionError as error:
        raise UsageError(f"{where} is nested too deeply, or contains itself") from error


def _unchanged(text: str) -> str:
    return text


class _UnsupportedTypeError(Exception):
    pass


def _converted(value: Any, change: TextMap) -> Any:
    if value is None or isinstance(value, bool):
        return value
    if isinstance(value, str):  # a subclass, such as a string Enum, may print differently
        return change(str.__str__(value))
    if isinstance(value, int | float):
        return int(value) if isinstance(value, int) else float(value)
    if isinstance(value, Mapping):
        return {_converted(key, change): _field(key, item, change) for key, item in value.items()}
    if isinstance(value, list | tuple):
        items = [_converted(item, change) for item in value]
        return tuple(items) if isinstance(value, tuple) else items
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = dataclasses.fields(value)
        return {field.name: _field(field.name, getattr(value, field.name), change) for field in fields}
    if callable(dump := getattr(value, "model_dump", None)):  # a pydantic model
        return _converted(dump(), change)
    if getattr(value, "ndim", None) == 0 and callable(item := getattr(value, "item", None)):  # a NumPy scalar
        return _converted(item(), change)
    raise _UnsupportedTypeError(type(value).__name__)


def _field(key: object, value: Any, change: TextMap) -> Any:
    """The converted value of a field. Templates compare roles and types, so these words are never changed."""
    if key in ("role", "type") and isinstance(value, str) and value.isidentifier():
        return str.__str__(value)
    return _converted(value, change)


def _with_reasoning(message: dict[str, Any]) -> dict[str, Any]:
    """The message with its reasoning under both names that templates read."""
    reasoning = next((message[name] for name in REASONING if message.get(name) is not None), None)
    return message if reasoning is None else {"thinking": reasoning, **message, "reasoning_content": reasoning}


class ContinuedMessage:
    """A last message that the model continues: its text ends with a tag, after which the rendered text is cut off."""

    def __init__(self, messages: Sequence[Message], field: bool | str, source: str):
        name = field if isinstance(field, str) else "content"
        last = messages[-1]
        if last.get(name) is None:
            raise UsageError(f"continue_final_message: the last message has no {short_repr(name)}")
        names = [key for key in REASONING if last.get(key) == last[name]] if name in REASONING else [name]
        if not any(key in source for key in names):
            raise UsageError(f"continue_final_message: the chat template does not read {short_repr(name)}")
        texts = [block for block in last[name] if "text" in block] if isinstance(last[name], list | tuple) else []
        if isinstance(last[name], str):
            self._text = last[name]
            self.messages = [*messages[:-1], {**last, **{key: last[key] + _TAG for key in names}}]
        elif texts and isinstance(texts[-1], dict):
            self._text = texts[-1]["text"]
            blocks = [block | {"text": self._text + _TAG} if block is texts[-1] else block for block in last[name]]
            self.messages = [*messages[:-1], {**last, name: blocks}]
        else:
            raise UsageError("continue_final_message: the last message has no text to continue")

    def truncate(self, rendered: str) -> str:
        """The rendered text up to the end of the message, trimmed if the template trims the message."""
        if self._text.strip() not in rendered or (end := rendered.rfind(_TAG.strip())) < 0:
            raise UsageError("continue_final_message: the chat template changes the last message")
        return rendered[:end] if rendered[end:].startswith(_TAG) else rendered[:end].rstrip()
