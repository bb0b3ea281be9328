"""How the page's events are bound to functions: queued or not, and where the page shows an error."""

import functools
import html
import logging
from collections.abc import Callable, Generator
from typing import Any

import gradio as gr

from smollm_jax.errors import SmolLMError
from smollm_jax.runtime.files import utf8
from smollm_jax.web.requests import SLIDERS

# Handlers get the values as the client sent them, and `requests` checks them. Gradio's own conversion would round
# numbers and turn anything into a string.
RAW: dict[str, Any] = {"preprocess": False}
# One text is generated at a time: two would share the device, and both would be slower.
STREAMING: dict[str, Any] = {"concurrency_id": "model", "concurrency_limit": 1, "show_progress": "minimal", **RAW}
UNQUEUED: dict[str, Any] = {"queue": False, "show_progress": "hidden", "api_visibility": "private", **RAW}


def by_name(values: tuple[Any, ...]) -> dict[str, Any]:
    """The sliders' values by name."""
    return dict(zip(SLIDERS, values, strict=True))


def note(name: str) -> gr.HTML:
    """The line below a tab's buttons for progress or an error. It takes no space while it is empty."""
    return gr.HTML("", elem_id=name, elem_classes="note", padding=False)


def progress_html(doing: str) -> str:
    """A spinner, what is being done, and seconds that the page's script counts. Empty for an empty text."""
    if not doing:
        return ""
    return (
        f'<p class="waiting" role="status"><i></i>{html.escape(doing)} <b class="seconds" aria-hidden="true"></b></p>'
    )


def error_html(error: Exception) -> str:
    """An error as a line of the page."""
    return f'<p class="fault" role="alert">{html.escape(error_message(error), quote=False)}</p>'


def error_message(error: Exception) -> str:
    """The text for the user. A bug goes to the server's log instead."""
    if isinstance(error, SmolLMError):
        return utf8(str(error))
    logging.getLogger(__name__).exception("a request failed", exc_info=error)
    return "internal error: see the server's log"


def errors_in_note(
    function: Callable[..., Generator[Any, None, None]], error_outputs: Callable[..., tuple[Any, ...]]
) -> Callable[..., Generator[Any, None, None]]:
    """Wraps a streaming handler. On an error its last frame is `error_outputs(error_html, *values)`."""

    @functools.wraps(function)
    def handler(*values: Any) -> Generator[Any, None, None]:
        try:
            yield from function(*values)
        except Exception as error:
            yield error_outputs(error_html(error), *values)

    return handler


def errors_in_toast(function: Callable[..., Any]) -> Callable[..., Any]:
    """Wraps an unqueued handler. Its errors pop up in a corner: the page itself sends no values that cause one."""

    @functools.wraps(function)
    def handler(*values: Any) -> Any:
        try:
            return function(*values)
        except Exception as error:
            message = html.escape(error_message(error), quote=False)
            raise gr.Error(message, title="Not done", duration=12, print_exception=False) from error

    return handler
