"""The bodies of responses: OpenAI's objects, whole or in the chunks of a stream."""

import dataclasses
import itertools
import json
import secrets
import time
from collections.abc import Sequence
from typing import Any, Literal

from smollm_jax.generation.engine import Chunk, Token
from smollm_jax.serve import tools
from smollm_jax.tokenizer import Tokenizer

FINISH = {"eos": "stop", "stop": "stop", "length": "length"}
DONE = "data: [DONE]\n\n"
_TEXT, _PERHAPS = {"type": "string"}, {"type": ["string", "null"]}
ERROR_SCHEMA = {  # of `error_body`
    "type": "object",
    "properties": {
        "error": {
            "type": "object",
            "properties": {"message": _TEXT, "type": _TEXT, "param": _PERHAPS, "code": _PERHAPS},
            "required": ["message", "type", "param", "code"],
        }
    },
    "required": ["error"],
}


@dataclasses.dataclass
class Usage:
    """Tokens of one request: those of each prompt count once, those of every choice count."""

    prompt_tokens: int
    completion_tokens: int = 0
    cached_tokens: int = 0

    def body(self) -> dict[str, Any]:
        return {
            "prompt_tokens": self.prompt_tokens,
            "completion_tokens": self.completion_tokens,
            "total_tokens": self.prompt_tokens + self.completion_tokens,
            "prompt_tokens_details": {"cached_tokens": self.cached_tokens},
        }


class Choice:
    """One choice of an answer, as its chunks arrive."""

    def __init__(self, index: int):
        self.index = index
        self.text = ""
        self.tokens: list[Token] = []
        self.finish: str | None = None

    def add(self, chunk: Chunk) -> None:
        self.text += chunk.text
        self.tokens += chunk.tokens
        self.finish = FINISH[chunk.finish] if chunk.finish else None


class Answer:
    """Writes the objects of one request. `kind`: which endpoint; `logprobs`: whether they were asked for."""

    def __init__(self, kind: Literal["chat", "text"], model: str, tokenizer: Tokenizer, *, logprobs: bool):
        self.kind, self.tokenizer, self.logprobs = kind, tokenizer, logprobs
        self.calls: Literal["only", "amid"] | None = None  # whether a text is a call of a tool, or may have some
        self.base = {
            "id": f"{'chatcmpl' if kind == 'chat' else 'cmpl'}-{secrets.token_hex(12)}",
            "object": "chat.completion" if kind == "chat" else "text_completion",
            "created": int(time.time()),
            "model": model,
        }

    def whole(self, choices: Sequence[Choice], usage: Usage) -> dict[str, Any]:
        """The body of a response that is not streamed."""
        return {**self.base, "choices": [self._choice(choice) for choice in choices], "usage": usage.body()}

    def _choice(self, choice: Choice) -> dict[str, Any]:
        content = {"index": choice.index, "finish_reason": choice.finish, "logprobs": self._logprobs(choice.tokens, 0)}
        if self.kind == "text":
            return {"text": choice.text, **content}
        text, calls = self._parsed(choice)
        message = {"role": "assistant", "content": text, "refusal": None}
        if calls:
            message, content = message | {"tool_calls": calls}, content | {"finish_reason": "tool_calls"}
        return {"message": message, **content}

    def _parsed(self, choice: Choice) -> tuple[str | None, list[dict[str, Any]]]:
        """The text of a choice, and its calls of tools."""
        return tools.parse(choice.text, only_call=self.calls == "only") if self.calls else (choice.text, [])

    def with_calls(self, choice: Choice) -> str:
        """The event of a whole choice that may have calls of tools."""
        text, calls = self._parsed(choice)
        delta: dict[str, Any] = {"content": text} if text else {}
        if calls:
            delta["tool_calls"] = [{"index": i, **call} for i, call in enumerate(calls)]
        finish, logprobs = "tool_calls" if calls else choice.finish, self._logprobs(choice.tokens, 0)
        return self._event([{"index": choice.index, "delta": delta, "finish_reason": finish, "logprobs": logprobs}])

    def opening(self, index: int) -> str:
        """The first event of a chat's choice."""
        return self._event([{"index": index, "delta": {"role": "assistant", "content": ""}, **_OPEN}])

    def piece(self, index: int, text: str, tokens: Sequence[Token], finish: str | None, offset: int) -> str:
        """The event of new text, after `offset` characters; empty where there is nothing to say."""
        if not (text or finish or (tokens and self.logprobs)):
            return ""
        content = {"index": index, "finish_reason": finish, "logprobs": self._logprobs(tokens, offset)}
        if self.kind == "text":
            return self._event([{"text": text, **content}])
        return self._event([{"delta": {"content": text} if text else {}, **content}])

    def usage(self, usage: Usage) -> str:
        """The last event, if the client asked for the usage."""
        return self._event([], usage=usage.body())

    def _event(self, choices: list[dict[str, Any]], **fields: Any) -> str:
        kind = "chat.completion.chunk" if self.kind == "chat" else "text_completion"
        return event({**self.base, "object": kind, "choices": choices, **fields})

    def _logprobs(self, tokens: Sequence[Token], offset: int) -> dict[str, Any] | None:
        if not self.logprobs:
            return None
        return self._chat_logprobs(tokens) if self.kind == "chat" else self._text_logprobs(tokens, offset)

    def _chat_logprobs(self, tokens: Sequence[Token]) -> dict[str, Any]:
        def entry(i: int, logprob: float | None) -> dict[str, Any]:
            return {"token": self._name(i), "logprob": logprob, "bytes": list(self.tokenizer.token_bytes(i))}

        content = [
            {**entry(token.id, token.logprob), "top_logprobs": [entry(i, value) for i, _, value in token.alternatives]}
            for token in tokens
        ]
        return {"content": content, "refusal": None}

    def _text_logprobs(self, tokens: Sequence[Token], offset: int) -> dict[str, Any]:
        """The older form; the token itself is always among its alternatives, as OpenAI's."""
        lengths = [len(token.text) for token in tokens]
        top = [
            None
            if token.logprob is None
            else {self._name(i): value for i, _, value in token.alternatives} | {self._name(token.id): token.logprob}
            for token in tokens
        ]
        return {
            "tokens": [self._name(token.id) for token in tokens],
            "token_logprobs": [token.logprob for token in tokens],
            "top_logprobs": top,
            "text_offset": list(itertools.accumulate(lengths, initial=offset))[: len(tokens)],
        }

    def _name(self, i: int) -> str:
        """The text of a token, or its bytes where they are no whole characters."""
        content = self.tokenizer.token_bytes(i)
        try:
            return content.decode()
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in content)


_OPEN = {"finish_reason": None, "logprobs": None}


def event(body: dict[str, Any]) -> str:
    """A server-sent event."""
    return f"data: {json.dumps(body, ensure_ascii=False, allow_nan=False)}\n\n"


def error_body(message: str, *, kind: str, param: str | None = None, code: str | None = None) -> dict[str, Any]:
    """OpenAI's envelope of an error."""
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}
