"""The page: the weights, the status line, the three tabs and the sampling beside them."""

import html
from pathlib import Path
from typing import Any

import gradio as gr
from gradio.themes import Base, Default

from smollm_jax.config.generation_config import GREEDY, GenerationConfig, described
from smollm_jax.web.chat_tab import ChatTab
from smollm_jax.web.complete_tab import CompleteTab
from smollm_jax.web.events import LIGHT, refusing
from smollm_jax.web.requests import KNOBS, Knob
from smollm_jax.web.responses import Answers
from smollm_jax.web.runs_tab import RunsTab

FOLDER = Path(__file__).parent
CSS = (FOLDER / "page.css").read_text(encoding="utf-8")
SCRIPT = "".join(f"<script>{(FOLDER / name).read_text(encoding='utf-8')}</script>" for name in ("tokens.js", "page.js"))
NEUTRAL = '<p class="hint small">Temperature 0 is greedy. Top k 0, top p 1, min p 0 and penalty 1 change nothing.</p>'
HEAD = """<div class="masthead"><h1>SmolLM2 in JAX</h1><p>read it as it writes, watch it as it learns</p></div>"""
# Every pair of colours has a contrast of at least 4.5 to 1, by axe in tests/web/test_browser.py: Gradio's own teal with
# white has 2.5, its hints have 2.6.
COLOURS = {
    "button_primary_background_fill": "*primary_700",
    "button_primary_background_fill_hover": "*primary_800",
    "button_primary_background_fill_dark": "*primary_700",
    "button_primary_background_fill_hover_dark": "*primary_800",
    "body_text_color_subdued": "*neutral_600",
    "body_text_color_subdued_dark": "*neutral_400",
    "block_info_text_color": "*neutral_600",
    "block_info_text_color_dark": "*neutral_300",
    "input_placeholder_color": "*neutral_500",
    "input_placeholder_color_dark": "*neutral_400",
    "color_accent": "*primary_700",
    "slider_color": "*primary_700",
    "slider_color_dark": "*primary_500",
}


def theme() -> Base:
    """Colours and the system's own fonts: nothing is fetched from another host."""
    sans, mono = ("system-ui", "-apple-system", "Segoe UI", "sans-serif"), ("ui-monospace", "Menlo", "monospace")
    plain = Default(primary_hue="teal", neutral_hue="slate", radius_size="md", font=sans, font_mono=mono)
    return plain.set(**COLOURS)


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
        # One a tab: it tells of the weights that wrote what the tab shows, and is in sight while the tab is.
        ids = ("status", "status-chat", "status-runs")
        statuses = [gr.HTML(answers.status(first), elem_id=i, padding=False) for i in ids]
        with gr.Row():
            with gr.Column(scale=3, min_width=300):
                complete = CompleteTab(answers, statuses[0])
                chat = ChatTab(answers, statuses[1])
                watching = RunsTab(answers, statuses[2])
            with gr.Column(scale=1, min_width=280), gr.Accordion("Sampling", open=True):
                knobs = [field(name, knob) for name, knob in KNOBS.items()]
                stop = gr.Textbox(
                    label="Stop strings", info=r"one a line; \n is a line break", lines=1, max_lines=8, elem_id="stops"
                )
                gr.HTML(NEUTRAL, padding=False)
                asked = gr.HTML("", elem_id="asked", padding=False)
        sampling = [stop, *knobs]
        complete.wire(weights, sampling)
        chat.wire(weights, sampling)
        watching.wire(blocks, sampling, others=[complete.tab, chat.tab])

        def refresh(name: Any, *writers: Any):
            listed = list(shelf.entries())
            line = answers.status(name if name in listed else first)
            return gr.Dropdown(choices=listed), *(gr.skip() if writer else line for writer in writers)

        listing = {
            "inputs": [weights, complete.writer, chat.writer, watching.writer],
            "outputs": [weights, *statuses],
            **LIGHT,
        }
        gr.on([blocks.load, weights.input, weights.focus], refusing(refresh), **listing)

        def own_sampling(name: Any):
            """The sliders as the weights ask for them, and a line on who asked."""
            generation = shelf.generation(name)
            values = [within(KNOBS[knob], value) for knob, value in generation.sampling.items()]
            return *values, asked_for(generation)

        sliders = [knobs[list(KNOBS).index(knob)] for knob in GREEDY]
        gr.on([blocks.load, weights.input], refusing(own_sampling), weights, [*sliders, asked], **LIGHT)
    blocks.queue(max_size=queue_size, api_open=False, default_concurrency_limit=1)
    return blocks


def within(knob: Knob, value: float) -> float:
    """A number that a slider can show."""
    return min(max(value, knob.low), knob.high)


def asked_for(generation: GenerationConfig) -> str:
    """The line on how these weights ask to be sampled from."""
    if not generation.source:
        return '<p class="hint small">These weights ask for no sampling: greedy.</p>'
    line = f"Set to what the weights' generation_config.json asks for: {described(generation.sampling)}."
    return f'<p class="hint small">{html.escape(" ".join(filter(None, [line, generation.note])), quote=False)}</p>'


def field(name: str, knob: Knob) -> gr.Slider | gr.Number:
    """A slider of the range that the server accepts; for the seed a plain number."""
    if name == "seed":
        return gr.Number(knob.default, label=knob.label, precision=0, elem_id=name)
    return gr.Slider(knob.low, knob.high, knob.default, step=knob.step, label=knob.label, elem_id=name)
