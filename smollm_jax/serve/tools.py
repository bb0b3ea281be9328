"""Tools: how a conversation describes them to the model, and how a text becomes calls of them.

A template that reads tools gets them as they are. Most SmolLM2 templates do not; the system message then describes them
as SmolLM2's instruction data does: the model answers with the JSON of a call between <tool_call> and </tool_call>.
"""

import json
import secrets
from collections.abc import Mapping, Sequence
from typing import Any

from smollm_jax.errors import UsageError
from smollm_jax.generation.grammar import CALL, CALL_END

DEFINITIONS = ("$defs", "definitions")  # where a schema keeps what it refers to


def instructions(tools: Sequence[Mapping[str, Any]]) -> str:
    """The text of a system message that describes tools."""
    listed = "\n".join(json.dumps(tool, ensure_ascii=False) for tool in tools)
    return (
        f"You can call functions. These are available:\n<tools>\n{listed}\n</tools>\n"
        f'To call one, write {CALL}{{"name": "its name", "arguments": {{...}}}}{CALL_END}'
    )


def call_schema(functions: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The JSON schema of a call of one of some functions. Raises `UsageError` where their definitions conflict."""
    calls: list[dict[str, Any]] = []
    shared: dict[str, dict[str, Any]] = {}
    for function in functions:
        parameters = dict(function.get("parameters") or {"type": "object"})
        for key in DEFINITIONS:
            definitions = parameters.pop(key, {})
            if not isinstance(definitions, dict):
                raise UsageError(f"{key} of a function's parameters must be an object")
            for name, definition in definitions.items():
                if shared.setdefault(key, {}).setdefault(name, definition) != definition:
                    raise UsageError(f"two functions have different definitions of {key}/{name}")
        properties = {"name": {"const": function["name"]}, "arguments": parameters}
        calls.append({"type": "object", "properties": properties, "required": list(properties)})
        calls[-1]["additionalProperties"] = False
    return {"anyOf": calls, **shared}


def with_tools(messages: Sequence[Mapping[str, Any]], tools: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The messages for a template that reads no tools: described by the first one, and calls written as text."""
    system = [instructions(tools)] if tools else []
    plain = [{"role": message["role"], "content": _text(message)} for message in messages]
    if system and plain[0]["role"] == "system":
        system = [plain.pop(0)["content"], *system]
    return ([{"role": "system", "content": "\n\n".join(system)}] if system else []) + plain


def _text(message: Mapping[str, Any]) -> Any:
    """What a message says, its calls included."""
    calls = message.get("tool_calls")
    if not isinstance(calls, list) or not calls:
        return message.get("content", "")
    try:
        functions = [call["function"] for call in calls]
        written = [
            f"{CALL}{json.dumps({'name': function['name'], 'arguments': json.loads(function['arguments'])})}{CALL_END}"
            for function in functions
        ]
    except (TypeError, KeyError, ValueError) as error:
        raise UsageError("a tool call must have a function with a name, and arguments that are JSON") from error
    return "\n".join(filter(None, [message.get("content"), *written]))


def parse(text: str, *, only_call: bool) -> tuple[str | None, list[dict[str, Any]]]:
    """The text beside the calls, None if there is nothing else, and the calls as OpenAI's API gives them.

    `only_call`: the whole text is the JSON of a call. What is cut off or is no call stays text.
    """
    if only_call:
        try:
            return None, [_call(json.loads(text))]
        except (ValueError, TypeError, KeyError):
            return text, []
    rest, calls, decoder = "", [], json.JSONDecoder()
    while (start := text.find(CALL)) >= 0:
        try:
            body = text[start + len(CALL) :].lstrip()
            value, stop = decoder.raw_decode(body)
            after = body[stop:].lstrip()
            if not after.startswith(CALL_END):
                break
            calls.append(_call(value))
        except (ValueError, TypeError, KeyError):
            break
        rest, text = rest + text[:start], after.removeprefix(CALL_END)
    rest += text
    return (rest if rest.strip() or not calls else None), calls


def _call(value: Any) -> dict[str, Any]:
    function = {"name": value["name"], "arguments": json.dumps(value["arguments"], ensure_ascii=False)}
    return {"id": f"call_{secrets.token_hex(12)}", "type": "function", "function": function}
