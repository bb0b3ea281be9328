"""The Complete tab: a prompt and its continuation, each token tinted by its probability."""

from typing import Any

import gradio as gr

from smollm_jax.errors import UsageError
from smollm_jax.web.events import LIGHT, WRITING, note, numbered, waiting, writing
from smollm_jax.web.generation_stream import Cut
from smollm_jax.web.responses import Answers, Frame

LEGEND = (
    '<div class="legend">unlikely<i>'
    + "".join(f'<b class="token" style="--p:{p / 10}"></b>' for p in range(11))
    + "</i>likely <span>hover, click or use the arrow keys to see a token's alternatives</span></div>"
)
HINT = '<p class="hint">The continuation appears here, each token tinted by the probability that the model gave it.</p>'


class CompleteTab:
    """The tab's fields; `wire` binds them once the rest of the page is there."""

    def __init__(self, answers: Answers, status: gr.HTML):
        self.answers, self.status = answers, status
        with gr.Tab("Complete") as self.tab:
            self.prompt = gr.Textbox(
                "The capital of France is", label="Prompt", lines=3, max_lines=12, elem_id="prompt"
            )
            with gr.Row():
                self.go = gr.Button("Complete", variant="primary", scale=4, min_width=160, elem_id="complete")
                self.stop = gr.Button("Stop", scale=1, min_width=90, elem_id="stop")
            self.note = note("complete-note")
            self.answer = gr.HTML(HINT, elem_id="answer", padding=False)
            self.on = gr.Button("Continue: the limit cut it here", visible=False, size="sm", elem_id="continue")
            gr.HTML(LEGEND, padding=False)
        self.cut, self.writer = gr.State(None), gr.State("")

    def wire(self, weights: gr.Dropdown, sampling: list[Any]) -> None:
        """Binds the buttons."""
        outputs = [self.answer, self.status, self.note, self.on, self.cut, self.writer]
        completing = gr.on(
            [self.go.click, self.prompt.submit],
            writing(self.on_complete, refused),
            [weights, self.prompt, *sampling],
            outputs,
            api_name="complete",
            show_progress_on=self.note,
            **WRITING,
        )
        going_on = self.on.click(
            writing(self.on_continue, refused),
            [self.cut, *sampling],
            outputs,
            api_name="complete_on",
            show_progress_on=self.note,
            **WRITING,
        )
        self.stop.click(lambda: "", outputs=self.note, cancels=[completing, going_on], **LIGHT)

    def on_complete(self, name: Any, prompt: Any, stop: Any, *values: Any):
        """The continuation of a prompt."""
        yield from map(shown, self.answers.complete(name, prompt, numbered(values), stop))

    def on_continue(self, cut: Any, stop: Any, *values: Any):
        """More of a continuation that a limit cut."""
        yield from map(shown, self.answers.complete_on(kept(cut), numbered(values), stop))


def kept(cut: Any) -> Cut:
    """What a visit keeps of a text that a limit cut; raises `UsageError` where there is none."""
    if not isinstance(cut, Cut):
        raise UsageError("there is no text to go on with")
    return cut


def shown(frame: Frame) -> tuple[Any, ...]:
    """The outputs of a frame."""
    if frame.waiting:
        return gr.skip(), gr.skip(), waiting(frame.waiting), gr.skip(), gr.skip(), gr.skip()
    return frame.shown, frame.status, "", gr.Button(visible=frame.cut is not None), frame.cut, frame.weights


def refused(why: str, *_: Any) -> tuple[Any, ...]:
    """The outputs of a refusal: all stays as it was, but for the line that says why."""
    return gr.skip(), gr.skip(), why, gr.skip(), gr.skip(), gr.skip()
