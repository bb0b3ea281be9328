"""The page: its three tabs, laid out and wired to the answers."""

import html
from pathlib import Path
from typing import Any

import gradio as gr
from gradio.themes import Default

from smollm_jax.errors import UsageError
from smollm_jax.web import ask as asking
from smollm_jax.web.answers import Answers, Frame
from smollm_jax.web.ask import KNOBS, Knob
from smollm_jax.web.runs_tab import RunsTab
from smollm_jax.web.wiring import LIGHT, WRITING, numbered, refusing

FOLDER = Path(__file__).parent
CSS = (FOLDER / "page.css").read_text(encoding="utf-8")
SCRIPT = f"<script>{(FOLDER / 'page.js').read_text(encoding='utf-8')}</script>"
LEGEND = (
    '<div class="legend">unlikely<i>'
    + "".join(f'<b class="token" style="--p:{p / 10}"></b>' for p in range(11))
    + "</i>likely <span>hover or click a token for its alternatives</span></div>"
)
HINT = '<p class="hint">The continuation appears here, each token tinted by the probability that the model gave it.</p>'
CHAT_HINT = '<p class="hint">Ask something. Instruct weights answer; base weights have no chat template.</p>'
NEUTRAL = '<p class="hint small">Temperature 0 is greedy. Top k 0, top p 1, min p 0 and penalty 1 change nothing.</p>'
HEAD = """<div class="masthead"><h1>SmolLM2 in JAX</h1><p>read it as it writes, watch it as it learns</p></div>"""


def theme() -> Default:
    """Colours and the system's own fonts: nothing is fetched from another host."""
    sans, mono = ("system-ui", "-apple-system", "Segoe UI", "sans-serif"), ("ui-monospace", "Menlo", "monospace")
    return Default(primary_hue="teal", neutral_hue="slate", radius_size="md", font=sans, font_mono=mono)


def page(answers: Answers, *, queue_size: int) -> gr.Blocks:
    """The page as Gradio's blocks, its queue bounded to `queue_size` waiting requests."""
    shelf = answers.shelf
    first = next(iter(shelf.entries()))
    with gr.Blocks(title="SmolLM2 in JAX", analytics_enabled=False) as blocks:
        with gr.Row(equal_height=True):
            gr.HTML(HEAD, padding=False, min_width=240)
            weights = gr.Dropdown(
                list(shelf.entries()), value=first, label="Weights", show_label=False, elem_id="weights", min_width=260
            )
        status = gr.HTML(answers.status(first), elem_id="status", padding=False)
        with gr.Row():
            with gr.Column(scale=3, min_width=300):
                with gr.Tab("Complete") as complete_tab:
                    prompt = gr.Textbox(
                        "The capital of France is", label="Prompt", lines=3, max_lines=12, elem_id="prompt"
                    )
                    with gr.Row():
                        go = gr.Button("Continue", variant="primary", scale=4, min_width=160, elem_id="continue")
                        stop_completing = gr.Button("Stop", scale=1, min_width=90, elem_id="stop")
                    answer = gr.HTML(HINT, elem_id="answer", padding=False)
                    gr.HTML(LEGEND, padding=False)
                with gr.Tab("Chat") as chat_tab:
                    chat = gr.HTML(CHAT_HINT, elem_id="chat", padding=False, autoscroll=True, max_height=560)
                    turns = gr.JSON([], visible=False)
                    with gr.Row(equal_height=True):
                        box = gr.Textbox(
                            show_label=False, placeholder="Message", scale=5, min_width=180, elem_id="message"
                        )
                        send = gr.Button("Send", variant="primary", scale=1, min_width=90, elem_id="send")
                    with gr.Row():
                        stop_chat = gr.Button("Stop", size="sm", min_width=60, elem_id="stop-chat")
                        retry = gr.Button("Retry", size="sm", min_width=60, elem_id="retry")
                        edit = gr.Button("Edit last", size="sm", min_width=60, elem_id="edit")
                        clear = gr.Button("Clear", size="sm", min_width=60, elem_id="clear")
                    system = gr.Textbox(
                        label="System prompt", lines=2, placeholder="Empty: the template's own", elem_id="system"
                    )
                    with gr.Accordion("What the model reads: the chat template, filled in", open=False):
                        reads = gr.Textbox(show_label=False, lines=6, max_lines=16, interactive=False, elem_id="reads")
                watching = RunsTab(answers)
            with gr.Column(scale=1, min_width=280), gr.Accordion("Sampling", open=True):
                knobs = [field(name, knob) for name, knob in KNOBS.items()]
                stop = gr.Textbox(
                    label="Stop strings", info=r"one a line; \n is a line break", lines=1, max_lines=8, elem_id="stops"
                )
                gr.HTML(NEUTRAL, padding=False)

        def told(frame: Frame) -> tuple[Any, ...]:
            return frame.shown, frame.status

        def on_complete(name: Any, prompt: Any, stop: Any, *values: Any):
            for frame in answers.complete(name, prompt, numbered(values), stop):
                yield told(frame)

        def say(name: Any, turns: list[dict[str, str]], system: Any, values: tuple[Any, ...], left: str):
            stop, *numbers = values
            for frame in answers.chat(name, turns, system, numbered(tuple(numbers)), stop):
                yield bubbles(frame.shown), frame.shown, frame.status, frame.reads, left

        def on_send(name: Any, turns: Any, system: Any, message: Any, *values: Any):
            if not asking.text("the message", message).strip():
                raise UsageError("write a message first")
            turns = [*asking.conversation(turns), {"role": "user", "content": message}]
            yield from say(name, turns, system, values, "")

        def on_retry(name: Any, turns: Any, system: Any, message: Any, *values: Any):
            # The same seed would give the same text: the next one is taken, and shown where seeds are set.
            place = 1 + list(KNOBS).index("seed")
            seed = (int(asking.number("seed", values[place])) + 1) % 2**32
            values = (*values[:place], seed, *values[place + 1 :])
            for shown in say(name, up_to_question(asking.conversation(turns)), system, values, message):
                yield *shown, seed

        def take_back(turns: Any):
            *before, question = up_to_question(asking.conversation(turns))
            return bubbles(before), before, question["content"]

        def refresh(name: Any):
            listed = list(shelf.entries())
            return gr.Dropdown(choices=listed), answers.status(name if name in listed else first)

        said = [chat, turns, status, reads, box]
        spoken = [weights, turns, system, box, stop, *knobs]
        completing = gr.on(
            [go.click, prompt.submit],
            refusing(on_complete),
            [weights, prompt, stop, *knobs],
            [answer, status],
            api_name="complete",
            **WRITING,
        )
        sending = gr.on([send.click, box.submit], refusing(on_send), spoken, said, api_name="chat", **WRITING)
        seed = knobs[list(KNOBS).index("seed")]
        retrying = retry.click(refusing(on_retry), spoken, [*said, seed], api_visibility="private", **WRITING)
        edit.click(refusing(take_back), turns, [chat, turns, box], cancels=[sending, retrying], **LIGHT)
        clear.click(lambda: (CHAT_HINT, []), outputs=[chat, turns], cancels=[sending, retrying], **LIGHT)
        stop_completing.click(None, cancels=[completing], queue=False)
        stop_chat.click(None, cancels=[sending, retrying], queue=False)

        weights.input(refusing(refresh), weights, [weights, status], **LIGHT)
        gr.on([blocks.load, weights.focus], refusing(refresh), weights, [weights, status], **LIGHT)
        watching.wire(blocks, [stop, *knobs], status, others=[complete_tab, chat_tab])
    blocks.queue(max_size=queue_size, api_open=False, default_concurrency_limit=1)
    return blocks


def field(name: str, knob: Knob) -> gr.Slider | gr.Number:
    """A slider of the range that the server accepts; for the seed a plain number."""
    if name == "seed":
        return gr.Number(knob.default, label=knob.label, precision=0, elem_id=name)
    return gr.Slider(knob.low, knob.high, knob.default, step=knob.step, label=knob.label, elem_id=name)


def up_to_question(turns: list[dict[str, str]]) -> list[dict[str, str]]:
    """The chat up to the user's last message; raises `UsageError` when there is none."""
    place = max((i for i, turn in enumerate(turns) if turn["role"] == "user"), default=None)
    if place is None:
        raise UsageError("there is no message yet")
    return turns[: place + 1]


def bubbles(turns: list[dict[str, str]]) -> str:
    """A chat as HTML, its texts shown as they are, tags and all."""
    if not turns:
        return CHAT_HINT
    return "".join(f'<div class="turn {turn["role"]}"><p>{html.escape(turn["content"])}</p></div>' for turn in turns)
