"""How the page's events are bound to functions: queued or not, and where the page shows why one was refused."""

import functools
import html
import logging
from collections.abc import Callable, Generator
from typing import Any

import gradio as gr

from smollm_jax.errors import SmolLMError
from smollm_jax.web.requests import KNOBS

# The values come to the handlers as the client sent them, for `ask` to check: Gradio would round a number, and turn
# anything into a text.
RAW: dict[str, Any] = {"preprocess": False}
# One text is written at a time: two would share the device, and both be slower.
WRITING: dict[str, Any] = {"concurrency_id": "model", "concurrency_limit": 1, "show_progress": "minimal", **RAW}
LIGHT: dict[str, Any] = {"queue": False, "show_progress": "hidden", "api_visibility": "private", **RAW}


def numbered(values: tuple[Any, ...]) -> dict[str, Any]:
    """The values of the knobs by name."""
    return dict(zip(KNOBS, values, strict=True))


def note(name: str) -> gr.HTML:
    """The line below a tab's buttons: what is waited for, or why the last try was refused; else it takes no space."""
    return gr.HTML("", elem_id=name, elem_classes="note", padding=False)


def waiting(doing: str) -> str:
    """A spinner, what is waited for and, filled in by the page's script, for how many seconds. Empty for nothing."""
    if not doing:
        return ""
    return (
        f'<p class="waiting" role="status"><i></i>{html.escape(doing)} <b class="seconds" aria-hidden="true"></b></p>'
    )


def fault(error: Exception) -> str:
    """The line of a refusal; a bug goes to the server's log, not to the user."""
    return f'<p class="fault" role="alert">{html.escape(reason(error), quote=False)}</p>'


def reason(error: Exception) -> str:
    """What the page says of an error."""
    if isinstance(error, SmolLMError):
        return str(error)
    logging.getLogger(__name__).exception("a request failed", exc_info=error)
    return "an error in the server; its log says more"


def writing(
    function: Callable[..., Generator[Any, None, None]], refused: Callable[..., tuple[Any, ...]]
) -> Callable[..., Generator[Any, None, None]]:
    """The streaming handler whose last frame, when it fails, is `refused` of the line that says why and its values."""

    @functools.wraps(function)
    def handler(*values: Any) -> Generator[Any, None, None]:
        try:
            yield from function(*values)
        except Exception as error:
            yield refused(fault(error), *values)

    return handler


def refusing(function: Callable[..., Any]) -> Callable[..., Any]:
    """The light handler, what it refuses told in a corner: its values are none that the page itself sends."""

    @functools.wraps(function)
    def handler(*values: Any) -> Any:
        try:
            return function(*values)
        except Exception as error:
            said = html.escape(reason(error), quote=False)
            raise gr.Error(said, title="Not done", duration=12, print_exception=False) from error

    return handler
