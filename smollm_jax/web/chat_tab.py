"""The Chat tab: a conversation with rendered Markdown, and the chat template filled in."""

import html
from typing import Any

import gradio as gr

from smollm_jax.errors import UsageError
from smollm_jax.web import requests
from smollm_jax.web.complete_tab import require_truncated
from smollm_jax.web.events import (
    STREAMING,
    UNQUEUED,
    by_name,
    errors_in_note,
    errors_in_toast,
    note,
    progress_html,
)
from smollm_jax.web.markdown import render_markdown
from smollm_jax.web.requests import SLIDERS
from smollm_jax.web.responses import Handlers

HINT = '<p class="hint">Ask something. Instruct weights answer; base weights have no chat template.</p>'
SEED = 1 + list(SLIDERS).index("seed")  # its index among the sampling inputs: the stop strings, then the sliders
UNCHANGED = (gr.skip(),) * 9  # the outputs that change nothing
Turns = list[dict[str, str]]


class ChatTab:
    """The tab's components; `wire` binds their events once the rest of the page exists."""

    def __init__(self, handlers: Handlers, status: gr.HTML):
        self.handlers, self.status = handlers, status
        with gr.Tab("Chat") as self.tab:
            self.chat = gr.HTML(HINT, elem_id="chat", padding=False, autoscroll=True, max_height=560)
            self.turns = gr.JSON([], visible=False)
            self.more = gr.Button(
                "Continue: the limit ended it here", visible=False, size="sm", elem_id="continue-chat"
            )
            with gr.Row(equal_height=True):
                self.message = gr.Textbox(
                    label="Message",
                    show_label=False,
                    placeholder="Message",
                    scale=5,
                    min_width=180,
                    elem_id="message",
                )
                self.send = gr.Button("Send", variant="primary", scale=1, min_width=90, elem_id="send")
            self.note = note("chat-note")
            with gr.Row():
                self.stop = gr.Button("Stop", size="sm", min_width=60, elem_id="stop-chat")
                self.retry = gr.Button("Retry", size="sm", min_width=60, elem_id="retry")
                self.edit = gr.Button("Edit last", size="sm", min_width=60, elem_id="edit")
                self.clear = gr.Button("Clear", size="sm", min_width=60, elem_id="clear")
            self.system = gr.Textbox(
                label="System prompt", lines=2, placeholder="Empty: the template's default", elem_id="system"
            )
            with gr.Accordion("What the model reads: the chat template, filled in", open=False):
                self.rendered_prompt = gr.Textbox(
                    label="What the model reads",
                    show_label=False,
                    lines=6,
                    max_lines=16,
                    interactive=False,
                    elem_id="reads",
                )
        self.truncated, self.writer = gr.State(None), gr.State("")  # writer: name of the weights that answered

    def wire(self, weights: gr.Dropdown, sampling: list[Any]) -> None:
        """Binds the buttons; `sampling`: the stop strings, then the sliders."""
        chat = [self.chat, self.status, self.note, self.more, self.truncated, self.writer, self.turns]
        outputs = [*chat, self.rendered_prompt, self.message]
        inputs = [weights, self.turns, self.system, self.message, *sampling]
        seed = sampling[SEED]
        sending = gr.on(
            [self.send.click, self.message.submit],
            errors_in_note(self.on_send, error_outputs),
            inputs,
            outputs,
            api_name="chat",
            show_progress_on=self.note,
            **STREAMING,
        )
        retrying = self.retry.click(
            errors_in_note(self.on_retry, lambda *values: (*error_outputs(*values), gr.skip())),
            inputs,
            [*outputs, seed],
            api_visibility="private",
            show_progress_on=self.note,
            **STREAMING,
        )
        continuing = self.more.click(
            errors_in_note(self.on_continue, error_outputs),
            [self.truncated, self.turns, self.system, self.message, *sampling],
            outputs,
            api_name="chat_on",
            show_progress_on=self.note,
            **STREAMING,
        )
        cancelling = {"cancels": [sending, retrying, continuing], **UNQUEUED}
        self.stop.click(lambda: "", outputs=self.note, **cancelling)
        self.edit.click(
            errors_in_toast(self.on_edit), [weights, self.turns, self.message], [*chat, self.message], **cancelling
        )
        self.clear.click(errors_in_toast(self.on_clear), weights, chat, **cancelling)

    def on_send(self, name: Any, turns: Any, system: Any, message: Any, *values: Any):
        """The answer to a message; nothing for an empty one."""
        if not requests.text("the message", message).strip():
            yield UNCHANGED
            return
        turns = [*requests.conversation(turns), {"role": "user", "content": message}]
        yield from self._answer(turns, self.handlers.chat(name, turns, system, *sampling_values(values)), message="")

    def on_retry(self, name: Any, turns: Any, system: Any, message: Any, *values: Any):
        """Another answer to the last message, with the next seed: the same seed would give the same text."""
        turns = up_to_last_question(requests.conversation(turns))
        if not turns:
            yield *UNCHANGED, gr.skip()
            return
        seed = (int(requests.number("seed", values[SEED])) + 1) % 2**32
        values = (*values[:SEED], seed, *values[SEED + 1 :])
        for outputs in self._answer(
            turns, self.handlers.chat(name, turns, system, *sampling_values(values)), message=message
        ):
            yield *outputs, seed

    def on_continue(self, truncated: Any, turns: Any, _: Any, message: Any, *values: Any):
        """More of an answer that a limit ended."""
        truncated, turns = require_truncated(truncated), requests.conversation(turns)
        if not turns or turns[-1]["role"] != "assistant" or not turns[-1]["content"].startswith(truncated.content):
            raise UsageError("the chat has changed since that answer, so it cannot be continued")
        frames = self.handlers.continue_chat(truncated, *sampling_values(values))
        earlier = bubble("assistant", truncated.content)
        yield from self._answer(turns[:-1], frames, message=message, answer_html=earlier)

    def _answer(self, turns: Turns, frames: Any, *, message: str, answer_html: str = ""):
        """The outputs for each frame of the answer to these turns; `answer_html`: the answer so far.

        The message box is set to `message` before the first token only, so that the user can type the next message.
        """
        skip, earlier = gr.skip(), bubbles(turns)
        for frame in frames:
            if frame.progress:
                new_turns = skip if answer_html else turns
                progress = progress_html(frame.progress)
                yield earlier + answer_html, skip, progress, skip, skip, skip, new_turns, skip, message
                continue
            new_turns = [*turns, {"role": "assistant", "content": frame.content}]
            chat = earlier + bubble("assistant", frame.content)
            more = gr.Button(visible=frame.truncated is not None)
            start = (chat, frame.status, "", more, frame.truncated, frame.weights)
            yield *start, new_turns, frame.rendered_prompt, skip

    def on_edit(self, name: Any, turns: Any, message: Any) -> tuple[Any, ...]:
        """The chat before the last question, and the question in the message box; an empty chat without a question."""
        *before, question = up_to_last_question(requests.conversation(turns)) or [{"content": message}]
        if not before:
            return *self.on_clear(name), question["content"]
        hidden = gr.Button(visible=False)
        return bubbles(before), gr.skip(), "", hidden, None, gr.skip(), before, question["content"]

    def on_clear(self, name: Any) -> tuple[Any, ...]:
        """An empty chat, and the status line of the chosen weights."""
        return HINT, self.handlers.status(name), "", gr.Button(visible=False), None, "", []


def error_outputs(error: str, _: Any, turns: Any, __: Any, message: Any, *___: Any) -> tuple[Any, ...]:
    """The outputs for an error: the chat and the message as they were, and the note."""
    skip = gr.skip()
    try:
        chat = bubbles(requests.conversation(turns))
    except UsageError:  # this is the error
        return *UNCHANGED[:2], error, *UNCHANGED[3:]
    return chat, skip, error, skip, skip, skip, turns, skip, message


def sampling_values(values: tuple[Any, ...]) -> tuple[dict[str, Any], Any]:
    """The sliders' values by name, and the stop strings."""
    stop, *numbers = values
    return by_name(tuple(numbers)), stop


def up_to_last_question(turns: Turns) -> Turns:
    """The chat up to the user's last message; empty where there is none."""
    last = max((i for i, turn in enumerate(turns) if turn["role"] == "user"), default=-1)
    return turns[: last + 1]


def bubbles(turns: Turns) -> str:
    """A chat as HTML."""
    return "".join(bubble(turn["role"], turn["content"]) for turn in turns) or HINT


def bubble(role: str, content: str) -> str:
    """One turn: the user's as plain text, the assistant's as rendered Markdown."""
    inner = render_markdown(content) if role == "assistant" else f'<p class="plain">{html.escape(content)}</p>'
    return f'<div class="turn {role}"><div class="said">{inner}</div></div>'
