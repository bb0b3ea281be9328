"""The Complete tab: a prompt and its continuation, each token tinted by its probability."""

from typing import Any

import gradio as gr

from smollm_jax.errors import UsageError
from smollm_jax.web.events import STREAMING, UNQUEUED, by_name, errors_in_note, note, progress_html
from smollm_jax.web.generation_stream import TruncatedText
from smollm_jax.web.responses import Frame, Handlers

LEGEND = (
    '<div class="legend">unlikely<i>'
    + "".join(f'<b class="token" style="--p:{p / 10}"></b>' for p in range(11))
    + "</i>likely <span>hover, click or use the arrow keys to see a token's alternatives</span></div>"
)
HINT = '<p class="hint">The continuation appears here, each token tinted by the probability that the model gave it.</p>'


class CompleteTab:
    """The tab's components; `wire` binds their events once the rest of the page exists."""

    def __init__(self, handlers: Handlers, status: gr.HTML):
        self.handlers, self.status = handlers, status
        with gr.Tab("Complete") as self.tab:
            self.prompt = gr.Textbox(
                "The capital of France is", label="Prompt", lines=3, max_lines=12, elem_id="prompt"
            )
            with gr.Row():
                self.start = gr.Button("Complete", variant="primary", scale=4, min_width=160, elem_id="complete")
                self.stop = gr.Button("Stop", scale=1, min_width=90, elem_id="stop")
            self.note = note("complete-note")
            self.answer = gr.HTML(HINT, elem_id="answer", padding=False)
            self.more = gr.Button("Continue: the limit ended it here", visible=False, size="sm", elem_id="continue")
            gr.HTML(LEGEND, padding=False)
        self.truncated, self.writer = gr.State(None), gr.State("")  # writer: name of the weights that wrote the text

    def wire(self, weights: gr.Dropdown, sampling: list[Any]) -> None:
        """Binds the buttons."""
        outputs = [self.answer, self.status, self.note, self.more, self.truncated, self.writer]
        completing = gr.on(
            [self.start.click, self.prompt.submit],
            errors_in_note(self.on_complete, error_outputs),
            [weights, self.prompt, *sampling],
            outputs,
            api_name="complete",
            show_progress_on=self.note,
            **STREAMING,
        )
        continuing = self.more.click(
            errors_in_note(self.on_continue, error_outputs),
            [self.truncated, *sampling],
            outputs,
            api_name="complete_on",
            show_progress_on=self.note,
            **STREAMING,
        )
        self.stop.click(lambda: "", outputs=self.note, cancels=[completing, continuing], **UNQUEUED)

    def on_complete(self, name: Any, prompt: Any, stop: Any, *values: Any):
        """The continuation of a prompt."""
        yield from map(frame_outputs, self.handlers.complete(name, prompt, by_name(values), stop))

    def on_continue(self, truncated: Any, stop: Any, *values: Any):
        """More of a text that a limit ended."""
        frames = self.handlers.continue_completion(require_truncated(truncated), by_name(values), stop)
        yield from map(frame_outputs, frames)


def require_truncated(state: Any) -> TruncatedText:
    """The text to continue, from a visit's state. Raises `UsageError` where there is none."""
    if not isinstance(state, TruncatedText):
        raise UsageError("there is no text to continue")
    return state


def frame_outputs(frame: Frame) -> tuple[Any, ...]:
    """The tab's outputs for a frame."""
    if frame.progress:
        return gr.skip(), gr.skip(), progress_html(frame.progress), gr.skip(), gr.skip(), gr.skip()
    more = gr.Button(visible=frame.truncated is not None)
    return frame.content, frame.status, "", more, frame.truncated, frame.weights


def error_outputs(message: str, *_: Any) -> tuple[Any, ...]:
    """The tab's outputs for an error: only the note changes."""
    return gr.skip(), gr.skip(), message, gr.skip(), gr.skip(), gr.skip()
