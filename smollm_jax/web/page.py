"""The page: the list of weights, the status line, the three tabs and the sampling panel."""

from pathlib import Path
from typing import Any

import gradio as gr
from gradio.themes import Base, Default

from smollm_jax.web.chat_tab import ChatTab
from smollm_jax.web.complete_tab import CompleteTab
from smollm_jax.web.events import UNQUEUED, errors_in_toast
from smollm_jax.web.responses import Handlers
from smollm_jax.web.runs_tab import RunsTab
from smollm_jax.web.sampling_panel import SamplingPanel

FOLDER = Path(__file__).parent
CSS = (FOLDER / "page.css").read_text(encoding="utf-8")
SCRIPT = "".join(f"<script>{(FOLDER / name).read_text(encoding='utf-8')}</script>" for name in ("tokens.js", "page.js"))
HEAD = """<div class="masthead"><h1>SmolLM2 in JAX</h1><p>read it as it writes, watch it as it learns</p></div>"""
# Every pair of colours has a contrast of at least 4.5 to 1 (tests/web/test_browser.py checks it with axe). Gradio's
# defaults do not: 2.5 for teal on white, 2.6 for hints.
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
    """Colours and system fonts: the page loads nothing from another host."""
    sans, mono = ("system-ui", "-apple-system", "Segoe UI", "sans-serif"), ("ui-monospace", "Menlo", "monospace")
    plain = Default(primary_hue="teal", neutral_hue="slate", radius_size="md", font=sans, font_mono=mono)
    return plain.set(**COLOURS)


def page(handlers: Handlers, *, queue_size: int) -> gr.Blocks:
    """The page as Gradio blocks; at most `queue_size` requests wait."""
    entries = list(handlers.store.entries())
    with gr.Blocks(title="SmolLM2 in JAX", analytics_enabled=False) as blocks:
        with gr.Row(equal_height=True):
            gr.HTML(HEAD, padding=False, min_width=240)
            weights = gr.Dropdown(
                entries, value=entries[0], label="Weights", show_label=False, elem_id="weights", min_width=260
            )
        # One per tab, shown with it: it names the weights that generated what the tab shows.
        ids = ("status", "status-chat", "status-runs")
        statuses = [gr.HTML(handlers.status(entries[0]), elem_id=i, padding=False) for i in ids]
        with gr.Row():
            with gr.Column(scale=3, min_width=300):
                complete = CompleteTab(handlers, statuses[0])
                chat = ChatTab(handlers, statuses[1])
                runs = RunsTab(handlers, statuses[2])
            with gr.Column(scale=1, min_width=280):
                sampling = SamplingPanel(handlers)
        complete.wire(weights, sampling.inputs)
        chat.wire(weights, sampling.inputs)
        runs.wire(blocks, sampling.inputs, others=[complete.tab, chat.tab])
        wire_weights(blocks, handlers, weights, [complete, chat, runs])
        sampling.wire(blocks, weights)
    blocks.queue(max_size=queue_size, api_open=False, default_concurrency_limit=1)
    return blocks


def wire_weights(
    blocks: gr.Blocks, handlers: Handlers, weights: gr.Dropdown, tabs: list[CompleteTab | ChatTab | RunsTab]
) -> None:
    """Updates the list of weights when the page opens and when the list is used.

    A tab that shows no text yet has the status line of the chosen weights.
    """
    first = next(iter(handlers.store.entries()))

    def refresh(name: Any, *writers: Any):
        names = list(handlers.store.entries())
        line = handlers.status(name if name in names else first)
        return gr.Dropdown(choices=names), *(gr.skip() if writer else line for writer in writers)

    inputs, outputs = [weights, *(tab.writer for tab in tabs)], [weights, *(tab.status for tab in tabs)]
    gr.on([blocks.load, weights.input, weights.focus], errors_in_toast(refresh), inputs, outputs, **UNQUEUED)
