"""The Chat tab: a conversation, its answers' Markdown rendered, and what the model reads of it."""

import html
from typing import Any

import gradio as gr

from smollm_jax.errors import UsageError
from smollm_jax.web import requests as asking
from smollm_jax.web.complete_tab import kept
from smollm_jax.web.events import LIGHT, WRITING, note, numbered, refusing, waiting, writing
from smollm_jax.web.markdown import rendered
from smollm_jax.web.requests import KNOBS
from smollm_jax.web.responses import Answers

HINT = '<p class="hint">Ask something. Instruct weights answer; base weights have no chat template.</p>'
SEED = 1 + list(KNOBS).index("seed")  # its place among the stop strings and the knobs
SAME = (gr.skip(),) * 9  # outputs that change nothing
Turns = list[dict[str, str]]


class ChatTab:
    """The tab's fields; `wire` binds them once the rest of the page is there."""

    def __init__(self, answers: Answers, status: gr.HTML):
        self.answers, self.status = answers, status
        with gr.Tab("Chat") as self.tab:
            self.chat = gr.HTML(HINT, elem_id="chat", padding=False, autoscroll=True, max_height=560)
            self.turns = gr.JSON([], visible=False)
            self.on = gr.Button("Continue: the limit cut it here", visible=False, size="sm", elem_id="continue-chat")
            with gr.Row(equal_height=True):
                self.box = gr.Textbox(
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
                label="System prompt", lines=2, placeholder="Empty: the template's own", elem_id="system"
            )
            with gr.Accordion("What the model reads: the chat template, filled in", open=False):
                self.reads = gr.Textbox(
                    label="What the model reads",
                    show_label=False,
                    lines=6,
                    max_lines=16,
                    interactive=False,
                    elem_id="reads",
                )
        self.cut, self.writer = gr.State(None), gr.State("")

    def wire(self, weights: gr.Dropdown, sampling: list[Any]) -> None:
        """Binds the buttons; `sampling`: the stop strings, then the knobs."""
        talk = [self.chat, self.status, self.note, self.on, self.cut, self.writer, self.turns, self.reads, self.box]
        given = [weights, self.turns, self.system, self.box, *sampling]
        seed = sampling[SEED]
        sending = gr.on(
            [self.send.click, self.box.submit],
            writing(self.on_send, refused),
            given,
            talk,
            api_name="chat",
            show_progress_on=self.note,
            **WRITING,
        )
        retrying = self.retry.click(
            writing(self.on_retry, lambda *values: (*refused(*values), gr.skip())),
            given,
            [*talk, seed],
            api_visibility="private",
            show_progress_on=self.note,
            **WRITING,
        )
        going_on = self.on.click(
            writing(self.on_continue, refused),
            [self.cut, self.turns, self.system, self.box, *sampling],
            talk,
            api_name="chat_on",
            show_progress_on=self.note,
            **WRITING,
        )
        running = {"cancels": [sending, retrying, going_on], **LIGHT}
        self.stop.click(lambda: "", outputs=self.note, **running)
        before = [self.chat, self.status, self.note, self.on, self.cut, self.writer, self.turns]
        self.edit.click(refusing(self.take_back), [weights, self.turns, self.box], [*before, self.box], **running)
        self.clear.click(refusing(self.emptied), weights, before, **running)

    def on_send(self, name: Any, turns: Any, system: Any, message: Any, *values: Any):
        """The answer to a message; nothing for an empty one."""
        if not asking.text("the message", message).strip():
            yield SAME
            return
        turns = [*asking.conversation(turns), {"role": "user", "content": message}]
        yield from self._answer(turns, self.answers.chat(name, turns, system, *sampled(values)), box="")

    def on_retry(self, name: Any, turns: Any, system: Any, message: Any, *values: Any):
        """Another answer to the last message, and the next seed: the same one would give the same text."""
        turns = up_to_question(asking.conversation(turns))
        if not turns:
            yield *SAME, gr.skip()
            return
        seed = (int(asking.number("seed", values[SEED])) + 1) % 2**32
        values = (*values[:SEED], seed, *values[SEED + 1 :])
        for shown in self._answer(turns, self.answers.chat(name, turns, system, *sampled(values)), box=message):
            yield *shown, seed

    def on_continue(self, cut: Any, turns: Any, _: Any, message: Any, *values: Any):
        """More of an answer that a limit cut."""
        cut, turns = kept(cut), asking.conversation(turns)
        if not turns or turns[-1]["role"] != "assistant" or not turns[-1]["content"].startswith(cut.shown):
            raise UsageError("the chat has changed since: there is no answer to go on with")
        frames = self.answers.chat_on(cut, *sampled(values))
        yield from self._answer(turns[:-1], frames, box=message, said=bubble("assistant", cut.shown))

    def _answer(self, turns: Turns, frames: Any, *, box: str, said: str = ""):
        """The outputs of frames of the answer to these turns; `said`: the answer so far. The box is set before the
        first token, and then left to whoever types the next message."""
        earlier = bubbles(turns)
        for frame in frames:
            if frame.waiting:
                kept_turns = gr.skip() if said else turns
                yield earlier + said, SAME[0], waiting(frame.waiting), *SAME[:3], kept_turns, SAME[0], box
                continue
            whole = [*turns, {"role": "assistant", "content": frame.shown}]
            chat = earlier + bubble("assistant", frame.shown)
            on = gr.Button(visible=frame.cut is not None)
            yield chat, frame.status, "", on, frame.cut, frame.weights, whole, frame.reads, SAME[0]

    def take_back(self, name: Any, turns: Any, box: Any) -> tuple[Any, ...]:
        """The chat before the last message, which stands in the box again; the same chat where there is none."""
        *before, question = up_to_question(asking.conversation(turns)) or [{"content": box}]
        if not before:
            return *self.emptied(name), question["content"]
        hidden = gr.Button(visible=False)
        return bubbles(before), SAME[0], "", hidden, None, SAME[0], before, question["content"]

    def emptied(self, name: Any) -> tuple[Any, ...]:
        """A chat without a turn, and the status line of the weights that would answer."""
        return HINT, self.answers.status(name), "", gr.Button(visible=False), None, "", []


def refused(why: str, _: Any, turns: Any, __: Any, message: Any, *___: Any) -> tuple[Any, ...]:
    """The outputs of a refusal: the chat and the message as they were, and the line that says why."""
    try:
        shown = bubbles(asking.conversation(turns))
    except UsageError:  # the very reason
        return *SAME[:2], why, *SAME[3:]
    return shown, SAME[0], why, *SAME[:3], turns, SAME[0], message


def sampled(values: tuple[Any, ...]) -> tuple[dict[str, Any], Any]:
    """The knobs by name and the stop strings."""
    stop, *numbers = values
    return numbered(tuple(numbers)), stop


def up_to_question(turns: Turns) -> Turns:
    """The chat up to the user's last message; empty where there is none."""
    place = max((i for i, turn in enumerate(turns) if turn["role"] == "user"), default=-1)
    return turns[: place + 1]


def bubbles(turns: Turns) -> str:
    """A chat as HTML."""
    return "".join(bubble(turn["role"], turn["content"]) for turn in turns) or HINT


def bubble(role: str, content: str) -> str:
    """One turn: the user's as it is, tags and all, the assistant's with its Markdown rendered."""
    said = rendered(content) if role == "assistant" else f'<p class="plain">{html.escape(content)}</p>'
    return f'<div class="turn {role}"><div class="said">{said}</div></div>'
