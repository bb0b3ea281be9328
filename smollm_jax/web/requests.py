"""The check of a request's values: all that a client sends goes through here before it is tokenised.

A client need not be the page: a value can be anything that JSON can hold, NaN and infinity included.
"""

import dataclasses
from typing import Any

from smollm_jax.errors import UsageError, short_repr
from smollm_jax.generation.sampling import Sampling
from smollm_jax.web.middleware import MAX_BODY

MAX_MESSAGES = 200
MAX_STOPS = 8
MAX_STOP_BYTES = 100


@dataclasses.dataclass(frozen=True)
class SliderSpec:
    """A number that the user can set; the slider has the range that the server accepts."""

    label: str
    low: float
    high: float
    step: float
    default: float

    @property
    def whole(self) -> bool:
        return isinstance(self.step, int)


# The defaults are greedy decoding; `sampling_panel` replaces them by what the chosen weights recommend.
SLIDERS = {
    "max_new_tokens": SliderSpec("New tokens", 1, 1024, 1, 512),
    "temperature": SliderSpec("Temperature", 0.0, 2.0, 0.05, 0.0),
    "top_k": SliderSpec("Top k", 0, 200, 1, 0),
    "top_p": SliderSpec("Top p", 0.01, 1.0, 0.01, 1.0),
    "min_p": SliderSpec("Min p", 0.0, 0.99, 0.01, 0.0),
    "repetition_penalty": SliderSpec("Repetition penalty", 0.5, 2.0, 0.05, 1.0),
    "seed": SliderSpec("Seed", 0, 2**32 - 1, 1, 0),
}


@dataclasses.dataclass(frozen=True)
class GenerationRequest:
    """How to continue a text."""

    max_new_tokens: int
    sampling: Sampling
    stop: tuple[str, ...]


def generation_request(numbers: dict[str, Any], stop: Any) -> GenerationRequest:
    """The checked request, from a number for each slider and from a text with one stop string per line."""
    checked: dict[str, Any] = {name: number(name, numbers[name]) for name in SLIDERS}
    return GenerationRequest(checked.pop("max_new_tokens"), Sampling(**checked), stop_strings(stop))


def number(name: str, value: Any) -> float:
    """A slider's value, as an integer where it must be one. Raises `UsageError` that names the slider."""
    slider = SLIDERS[name]
    kind = "a whole number" if slider.whole else "a number"
    in_range = type(value) in (int, float) and slider.low <= value <= slider.high  # False for NaN
    if not in_range or (slider.whole and value != int(value)):
        raise UsageError(f"{name} must be {kind} from {slider.low:g} to {slider.high:.10g}, got {short_repr(value)}")
    return int(value) if slider.whole else float(value)


def text(name: str, value: Any) -> str:
    """A string of at most `MAX_BODY` bytes. Raises `UsageError` that names the value."""
    if not isinstance(value, str):
        raise UsageError(f"{name} must be a string, got {short_repr(value)}")
    if (size := len(value.encode("utf-8", "surrogatepass"))) > MAX_BODY:
        raise UsageError(f"{name} has {size:,} bytes, the limit is {MAX_BODY:,}")
    return value


def stop_strings(value: Any) -> tuple[str, ...]:
    r"""The stop strings of a text, one per line; a literal "\n" in a line stands for a line break."""
    lines = [line.replace("\\n", "\n") for line in text("stop", value).split("\n") if line]
    if len(lines) > MAX_STOPS or any(len(line.encode("utf-8", "surrogatepass")) > MAX_STOP_BYTES for line in lines):
        raise UsageError(f"stop: the limit is {MAX_STOPS} lines of {MAX_STOP_BYTES} bytes each")
    return tuple(lines)


def conversation(value: Any) -> list[dict[str, str]]:
    """The turns of a chat as {"role", "content"}; raises `UsageError` for anything else."""
    if not isinstance(value, list) or len(value) > MAX_MESSAGES:
        raise UsageError(f"the chat must be a list of at most {MAX_MESSAGES} messages")
    turns = []
    for message in value:
        role = message.get("role") if isinstance(message, dict) else None
        if role not in ("user", "assistant"):
            raise UsageError(f"a message's role must be user or assistant, got {short_repr(role)}")
        turns.append({"role": role, "content": text("a message", message.get("content"))})
    text("the chat", "".join(turn["content"] for turn in turns))
    return turns


def choice(name: str, value: Any, options: Any) -> str:
    """The value, if it is one of the options; raises `UsageError` otherwise."""
    if not isinstance(value, str) or value not in options:
        raise UsageError(f"{name}: {short_repr(value)} is not one of the options listed on the page")
    return value
