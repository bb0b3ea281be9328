"""What a request asks for, checked: every value that a client sends goes through here before it is tokenised.

A client need not be the page: the values are whatever JSON can hold, NaN and infinity included.
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
class Knob:
    """A number that the page lets one set: the slider's range is the range that the server accepts."""

    label: str
    low: float
    high: float
    step: float
    default: float

    @property
    def whole(self) -> bool:
        return isinstance(self.step, int)


# Greedy to begin with; `page` sets them to what the chosen weights ask for.
KNOBS = {
    "max_new_tokens": Knob("New tokens", 1, 1024, 1, 512),
    "temperature": Knob("Temperature", 0.0, 2.0, 0.05, 0.0),
    "top_k": Knob("Top k", 0, 200, 1, 0),
    "top_p": Knob("Top p", 0.01, 1.0, 0.01, 1.0),
    "min_p": Knob("Min p", 0.0, 0.99, 0.01, 0.0),
    "repetition_penalty": Knob("Repetition penalty", 0.5, 2.0, 0.05, 1.0),
    "seed": Knob("Seed", 0, 2**32 - 1, 1, 0),
}


@dataclasses.dataclass(frozen=True)
class Ask:
    """How to continue a text."""

    max_new_tokens: int
    sampling: Sampling
    stop: tuple[str, ...]


def ask(numbers: dict[str, Any], stop: Any) -> Ask:
    """The checked request of one number a knob and of the text with a stop string a line."""
    checked: dict[str, Any] = {name: number(name, numbers[name]) for name in KNOBS}
    return Ask(checked.pop("max_new_tokens"), Sampling(**checked), stops(stop))


def number(name: str, value: Any) -> float:
    """A knob's value as it came, an integer where it must be one; raises `UsageError` naming the knob."""
    knob = KNOBS[name]
    kind = "a whole number" if knob.whole else "a number"
    good = type(value) in (int, float) and knob.low <= value <= knob.high  # NaN is in no range
    if not good or (knob.whole and value != int(value)):
        raise UsageError(f"{name} must be {kind} from {knob.low:g} to {knob.high:.10g}, got {short_repr(value)}")
    return int(value) if knob.whole else float(value)


def text(name: str, value: Any) -> str:
    """A text of a size that is worth tokenising; raises `UsageError` naming it."""
    if not isinstance(value, str):
        raise UsageError(f"{name} must be a text, got {short_repr(value)}")
    if (size := len(value.encode("utf-8", "surrogatepass"))) > MAX_BODY:
        raise UsageError(f"{name} has {size:,} bytes, at most {MAX_BODY:,} are taken")
    return value


def stops(value: Any) -> tuple[str, ...]:
    r"""The stop strings of a text, one a line, "\n" in one standing for a line break."""
    lines = [line.replace("\\n", "\n") for line in text("stop", value).split("\n") if line]
    if len(lines) > MAX_STOPS or any(len(line.encode("utf-8", "surrogatepass")) > MAX_STOP_BYTES for line in lines):
        raise UsageError(f"stop: at most {MAX_STOPS} lines of at most {MAX_STOP_BYTES} bytes")
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


def choice(name: str, value: Any, listed: Any) -> str:
    """One of the listed names; raises `UsageError` for any other value."""
    if not isinstance(value, str) or value not in listed:
        raise UsageError(f"{name}: {short_repr(value)} is not one of those listed")
    return value
