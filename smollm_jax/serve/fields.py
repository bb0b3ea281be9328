"""The fields of a request, their limits, and the jobs that a request becomes.

Names and meanings are OpenAI's; `top_k`, `min_p` and `repetition_penalty` are vLLM's. A field that would change the
answer and is not supported is refused by name, see `IGNORED` and `NEUTRAL`.
"""

import os
from collections.abc import Callable, Sequence
from typing import Annotated, Any, Literal

import pydantic
from pydantic import Field

from smollm_jax.config.generation_config import GenerationConfig
from smollm_jax.errors import UsageError, short_repr
from smollm_jax.generation.grammar import Grammars, Matcher
from smollm_jax.generation.programs import MAX_ALTERNATIVES
from smollm_jax.generation.sampling import Sampling
from smollm_jax.serve.tools import call_schema

MAX_MESSAGES = 1000
MAX_PROMPTS = 256
MAX_STOPS = 16
MAX_STOP_CHARACTERS = 256
MAX_BIASES = 1024
MAX_CHOICES = 128
MAX_TOOLS = 128
MAX_PATTERN = 1 << 16  # characters of a regular expression or grammar
COMPLETION_TOKENS = 16  # OpenAI's default for /v1/completions

# Fields of OpenAI's API that change nothing in an answer here.
IGNORED = {
    "metadata",
    "parallel_tool_calls",
    "prompt_cache_key",
    "prompt_cache_options",
    "prompt_cache_retention",
    "safety_identifier",
    "service_tier",
    "store",
    "user",
}
# Fields that are not supported, with the values at which they change nothing.
NEUTRAL: dict[str, tuple[Any, ...]] = {
    "audio": (None,),
    "best_of": (None, 1),
    "function_call": (None, "none"),
    "functions": (None, []),
    "modalities": (None, ["text"]),
    "moderation": (None,),
    "prediction": (None,),
    "reasoning_effort": (None, "none"),
    "suffix": (None, ""),
    "verbosity": (None, "medium"),
    "web_search_options": (None,),
}

TokenId = Annotated[int, Field(ge=0)]
StopString = Annotated[str, Field(min_length=1, max_length=MAX_STOP_CHARACTERS)]
Number = Annotated[float, Field(allow_inf_nan=False)]
Penalty = Annotated[float, Field(ge=-2, le=2, allow_inf_nan=False)]


class FieldError(UsageError):
    """A value that a request must not have; `param` is the field."""

    def __init__(self, param: str, message: str, code: str | None = None):
        super().__init__(message)
        self.param, self.code = param, code


class _Strict(pydantic.BaseModel):
    """Numbers are not read from strings, nor integers from booleans."""

    model_config = pydantic.ConfigDict(strict=True, extra="forbid")


class StreamOptions(_Strict):
    include_usage: bool | None = None


class JsonSchema(_Strict):
    name: str | None = None
    description: str | None = None
    schema_: Annotated[dict[str, Any], Field(alias="schema")]
    strict: bool | None = None  # every schema is followed strictly


class ResponseFormat(_Strict):
    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchema | None = None


class StructuredOutputs(_Strict):
    """What a text must be, by vLLM's names: exactly one of these."""

    json_: Annotated[dict[str, Any] | None, Field(alias="json")] = None
    regex: Annotated[str, Field(max_length=MAX_PATTERN)] | None = None
    grammar: Annotated[str, Field(max_length=MAX_PATTERN)] | None = None


class _Request(_Strict):
    """What both endpoints have in common. A field that is null is as if it were not there."""

    model_config = pydantic.ConfigDict(strict=True, extra="allow")

    model: str | None = None
    max_tokens: Annotated[int, Field(ge=0)] | None = None
    temperature: Annotated[float, Field(ge=0, le=100, allow_inf_nan=False)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    top_k: Annotated[int, Field(ge=-1)] | None = None
    min_p: Annotated[float, Field(ge=0, lt=1)] | None = None
    repetition_penalty: Annotated[float, Field(ge=1e-6, le=1e6)] | None = None
    frequency_penalty: Penalty | None = None
    presence_penalty: Penalty | None = None
    logit_bias: Annotated[dict[str, Annotated[float, Field(ge=-100, le=100)]], Field(max_length=MAX_BIASES)] | None = (
        None
    )
    seed: Annotated[int, Field(ge=-(2**63), lt=2**63)] | None = None
    stop: StopString | Annotated[list[StopString], Field(max_length=MAX_STOPS)] | None = None
    n: Annotated[int, Field(ge=1, le=MAX_CHOICES)] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    response_format: ResponseFormat | None = None
    structured_outputs: StructuredOutputs | None = None

    def reject_unsupported(self) -> None:
        """Raises `FieldError` for a field that this server does not know and that may change the answer."""
        for name, value in (self.model_extra or {}).items():
            if name in IGNORED or (name in NEUTRAL and value in NEUTRAL[name]):
                continue
            if name in NEUTRAL:
                raise FieldError(name, f"{name} is not supported", "unsupported_parameter")
            raise FieldError(name, f"unknown field {short_repr(name)}", "unknown_parameter")

    @property
    def stops(self) -> tuple[str, ...]:
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())

    @property
    def choices(self) -> int:
        return self.n or 1

    @property
    def include_usage(self) -> bool:
        return bool(self.stream_options and self.stream_options.include_usage)

    def samplings(self, generation: GenerationConfig) -> list[Sampling]:
        """The sampling of each choice: the weights' own unless fields say otherwise.

        Choice i has the seed `seed` + i, so that it can be asked for alone; without `seed` it is random.
        """
        names = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty")
        given = {name: value for name in names if (value := getattr(self, name)) is not None}
        given["top_k"] = max(given.get("top_k", generation.sampling["top_k"]), 0)  # -1 keeps all, as in vLLM
        seed = int.from_bytes(os.urandom(4), "little") if self.seed is None else self.seed
        return [Sampling(**(generation.sampling | given), seed=(seed + i) % 2**32) for i in range(self.choices)]

    def biases(self, vocab_size: int) -> dict[int, float]:
        """`logit_bias` by token id; raises `FieldError` for a key that is no token of the vocabulary."""
        for key in self.logit_bias or {}:
            if not (key.isascii() and key.isdecimal() and len(key) < 10 and int(key) < vocab_size):
                raise FieldError("logit_bias", f"logit_bias: {short_repr(key)} is not a token id below {vocab_size:,}")
        return {int(key): value for key, value in (self.logit_bias or {}).items()}

    def grammar(self, grammars: Grammars) -> Matcher | None:
        """What the text must follow; raises `FieldError` for an invalid schema, pattern or grammar."""
        form, outputs = self.response_format, self.structured_outputs
        chosen: list[tuple[str, Callable[[], Matcher]]] = []
        if form is not None and form.type == "json_object":
            chosen.append(("response_format", lambda: grammars.json_schema({"type": "object"})))
        if form is not None and (form.type == "json_schema") != (form.json_schema is not None):
            raise FieldError("response_format", "response_format: json_schema goes with type json_schema")
        if form is not None and (schema := form.json_schema) is not None:
            chosen.append(("response_format", lambda: grammars.json_schema(schema.schema_)))
        if outputs is not None:
            given = {"json": outputs.json_, "regex": outputs.regex, "grammar": outputs.grammar}
            compilers = {"json": grammars.json_schema, "regex": grammars.regex, "grammar": grammars.lark}
            kinds = [name for name, value in given.items() if value is not None]
            if len(kinds) != 1:
                raise FieldError("structured_outputs", "structured_outputs must have one of json, regex and grammar")
            chosen.append(("structured_outputs", lambda: compilers[kinds[0]](given[kinds[0]])))
        if len(chosen) > 1:
            raise FieldError("structured_outputs", "give response_format or structured_outputs, not both")
        return compiled(*chosen[0]) if chosen else None


def compiled(field: str, compile: Callable[[], Matcher]) -> Matcher:
    """The result of `compile`; its error names the field."""
    try:
        return compile()
    except UsageError as error:
        raise FieldError(field, f"{field}: {error}") from error


class Function(_Strict):
    name: Annotated[str, Field(pattern=r"^[\w.-]{1,64}$")]
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class Tool(_Strict):
    type: Literal["function"]
    function: Function


class FunctionName(_Strict):
    name: str


class ToolChoice(_Strict):
    type: Literal["function"]
    function: FunctionName


class TextPart(_Strict):
    type: Literal["text"]
    text: str


class ChatMessage(_Strict):
    """A message; the text parts of its content are joined. All other fields go to the chat template."""

    model_config = pydantic.ConfigDict(strict=True, extra="allow")

    role: Annotated[str, Field(min_length=1, max_length=64)]
    content: str | list[TextPart] | None = None


def as_conversation(messages: Sequence[ChatMessage]) -> list[dict[str, Any]]:
    """The messages as chat templates read them."""
    conversation = []
    for message in messages:
        values = message.model_dump(exclude_none=True)
        if isinstance(message.content, list):
            values["content"] = "".join(part.text for part in message.content)
        conversation.append(values)
    return conversation


class ChatRequest(_Request):
    """The body of POST /v1/chat/completions."""

    messages: Annotated[list[ChatMessage], Field(min_length=1, max_length=MAX_MESSAGES)]
    max_completion_tokens: Annotated[int, Field(ge=0)] | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=MAX_ALTERNATIVES)] | None = None
    tools: Annotated[list[Tool], Field(max_length=MAX_TOOLS)] | None = None
    tool_choice: Literal["none", "auto", "required"] | ToolChoice | None = None

    @property
    def offered(self) -> list[dict[str, Any]]:
        """The tools that the model may call."""
        if self.tool_choice is not None and self.tool_choice != "none" and not self.tools:
            raise FieldError("tool_choice", "tool_choice needs tools")
        return [] if self.tool_choice == "none" else [tool.model_dump(exclude_none=True) for tool in self.tools or []]

    @property
    def must_call(self) -> bool:
        """Whether the answer has to be a call."""
        return self.tool_choice == "required" or isinstance(self.tool_choice, ToolChoice)

    def grammar(self, grammars: Grammars) -> Matcher | None:
        """As in a completion; for tools a call, or a text with calls."""
        form, functions = super().grammar(grammars), [tool["function"] for tool in self.offered]
        if not functions:
            return form
        if form is not None:
            raise FieldError("tools", "tools cannot be combined with response_format or structured_outputs")
        if isinstance(self.tool_choice, ToolChoice):
            functions = [function for function in functions if function["name"] == self.tool_choice.function.name]
            if not functions:
                raise FieldError("tool_choice", "tool_choice: no tool has this name")
        make = grammars.json_schema if self.must_call else grammars.calls_in_text
        return compiled("tools", lambda: make(call_schema(functions)))

    @property
    def max_new_tokens(self) -> tuple[str, int | None]:
        """The field that limits the tokens, and its value."""
        if self.max_completion_tokens is not None:
            return "max_completion_tokens", self.max_completion_tokens
        return "max_tokens", self.max_tokens

    @property
    def alternatives(self) -> int | None:
        """How many likely tokens to report for each; None for no log-probabilities."""
        if self.top_logprobs and not self.logprobs:
            raise FieldError("top_logprobs", "top_logprobs needs logprobs: true")
        return (self.top_logprobs or 0) if self.logprobs else None


class CompletionRequest(_Request):
    """The body of POST /v1/completions."""

    prompt: (
        str
        | Annotated[list[TokenId], Field(min_length=1)]
        | Annotated[list[str], Field(min_length=1, max_length=MAX_PROMPTS)]
        | Annotated[list[Annotated[list[TokenId], Field(min_length=1)]], Field(min_length=1, max_length=MAX_PROMPTS)]
    )
    echo: bool | None = None
    logprobs: Annotated[int, Field(ge=0, le=MAX_ALTERNATIVES)] | None = None

    @property
    def prompts(self) -> list[str | list[int]]:
        """The prompts, each a text or token ids."""
        if isinstance(self.prompt, str) or isinstance(self.prompt[0], int):
            return [self.prompt]  # type: ignore[list-item]
        return list(self.prompt)  # type: ignore[arg-type]


class TokenizeRequest(_Strict):
    """The body of POST /tokenize, as vLLM's: a prompt, or a chat."""

    model: str | None = None
    prompt: str | None = None
    messages: Annotated[list[ChatMessage], Field(min_length=1, max_length=MAX_MESSAGES)] | None = None
    add_special_tokens: bool = True
    add_generation_prompt: bool = True
    return_token_strs: bool | None = None
