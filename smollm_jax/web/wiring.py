"""How the page's events are bound to functions: queued or light, and what they refuse told in a line."""

import functools
import html
import logging
from collections.abc import Callable, Generator
from typing import Any

import gradio as gr

from smollm_jax.errors import SmolLMError
from smollm_jax.web.ask import KNOBS

# The values come to the handlers as the client sent them, for `ask` to check: Gradio would round a number, and turn
# anything into a text.
RAW: dict[str, Any] = {"preprocess": False}
# One text is written at a time: two would share the device, and both be slower.
WRITING: dict[str, Any] = {"concurrency_id": "model", "concurrency_limit": 1, "show_progress": "minimal", **RAW}
LIGHT: dict[str, Any] = {"queue": False, "show_progress": "hidden", "api_visibility": "private", **RAW}


def numbered(values: tuple[Any, ...]) -> dict[str, Any]:
    """The values of the knobs by name."""
    return dict(zip(KNOBS, values, strict=True))


def refusing(function: Callable[..., Any]) -> Callable[..., Any]:
    """The handler, what it refuses told to the user in a line; a bug goes to the server's log, not to the user."""

    @functools.wraps(function)
    def handler(*values: Any) -> Any:
        try:
            return function(*values)
        except Exception as error:
            raise refusal(error) from error

    @functools.wraps(function)
    def streaming(*values: Any) -> Generator[Any, None, None]:
        try:
            yield from function(*values)
        except Exception as error:
            raise refusal(error) from error

    return streaming if function.__name__.startswith("on_") else handler


def refusal(error: Exception) -> gr.Error:
    """What the page says of an error."""
    if isinstance(error, SmolLMError):
        return gr.Error(html.escape(str(error), quote=False), title="Not done", duration=12, print_exception=False)
    logging.getLogger(__name__).exception("a request failed", exc_info=error)
    return gr.Error("an error in the server; its log says more", title="Failed", print_exception=False)
