"""The page: the weights, the status line, the three tabs and the sampling beside them."""

from pathlib import Path
from typing import Any

import gradio as gr
from gradio.themes import Base, Default

from smollm_jax.web.chat_tab import ChatTab
from smollm_jax.web.complete_tab import CompleteTab
from smollm_jax.web.events import LIGHT, refusing
from smollm_jax.web.responses import Answers
from smollm_jax.web.runs_tab import RunsTab
from smollm_jax.web.sampling_panel import SamplingPanel

FOLDER = Path(__file__).parent
CSS = (FOLDER / "page.css").read_text(encoding="utf-8")
SCRIPT = "".join(f"<script>{(FOLDER / name).read_text(encoding='utf-8')}</script>" for name in ("tokens.js", "page.js"))
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
    entries = list(answers.shelf.entries())
    with gr.Blocks(title="SmolLM2 in JAX", analytics_enabled=False) as blocks:
        with gr.Row(equal_height=True):
            gr.HTML(HEAD, padding=False, min_width=240)
            weights = gr.Dropdown(
                entries, value=entries[0], label="Weights", show_label=False, elem_id="weights", min_width=260
            )
        # One a tab: it tells of the weights that wrote what the tab shows, and is in sight while the tab is.
        ids = ("status", "status-chat", "status-runs")
        statuses = [gr.HTML(answers.status(entries[0]), elem_id=i, padding=False) for i in ids]
        with gr.Row():
            with gr.Column(scale=3, min_width=300):
                complete = CompleteTab(answers, statuses[0])
                chat = ChatTab(answers, statuses[1])
                watching = RunsTab(answers, statuses[2])
            with gr.Column(scale=1, min_width=280):
                sampling = SamplingPanel(answers)
        complete.wire(weights, sampling.inputs)
        chat.wire(weights, sampling.inputs)
        watching.wire(blocks, sampling.inputs, others=[complete.tab, chat.tab])
        wire_weights(blocks, answers, weights, [complete, chat, watching])
        sampling.wire(blocks, weights)
    blocks.queue(max_size=queue_size, api_open=False, default_concurrency_limit=1)
    return blocks


def wire_weights(
    blocks: gr.Blocks, answers: Answers, weights: gr.Dropdown, tabs: list[CompleteTab | ChatTab | RunsTab]
) -> None:
    """Lists the weights anew when the page opens and when they are chosen; a tab that shows nothing tells of them."""
    first = next(iter(answers.shelf.entries()))

    def refresh(name: Any, *writers: Any):
        listed = list(answers.shelf.entries())
        line = answers.status(name if name in listed else first)
        return gr.Dropdown(choices=listed), *(gr.skip() if writer else line for writer in writers)

    inputs, outputs = [weights, *(tab.writer for tab in tabs)], [weights, *(tab.status for tab in tabs)]
    gr.on([blocks.load, weights.input, weights.focus], refusing(refresh), inputs, outputs, **LIGHT)
