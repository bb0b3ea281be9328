"""The sampling panel: stop strings and sliders, which start at the settings that the weights recommend."""

import html
from typing import Any

import gradio as gr

from smollm_jax.config.generation_config import GREEDY, GenerationConfig, describe_sampling
from smollm_jax.web.events import UNQUEUED, errors_in_toast
from smollm_jax.web.requests import SLIDERS, SliderSpec
from smollm_jax.web.responses import Handlers

NEUTRAL = '<p class="hint small">Temperature 0 is greedy. Top k 0, top p 1, min p 0 and penalty 1 change nothing.</p>'


class SamplingPanel:
    """The panel's components; `wire` binds their events once the rest of the page exists."""

    def __init__(self, handlers: Handlers):
        self.handlers = handlers
        with gr.Accordion("Sampling", open=True):
            self.sliders = [slider(name, spec) for name, spec in SLIDERS.items()]
            self.stop = gr.Textbox(
                label="Stop strings", info=r"one per line; \n is a line break", lines=1, max_lines=8, elem_id="stops"
            )
            gr.HTML(NEUTRAL, padding=False)
            self.note = gr.HTML("", elem_id="asked", padding=False)

    @property
    def inputs(self) -> list[Any]:
        """The components whose values a tab's handlers get: the stop strings, then the sliders."""
        return [self.stop, *self.sliders]

    def wire(self, page: gr.Blocks, weights: gr.Dropdown) -> None:
        """Sets the sliders when the page opens and when other weights are chosen."""
        sliders = [self.sliders[list(SLIDERS).index(name)] for name in GREEDY]
        events = [page.load, weights.input]
        gr.on(events, errors_in_toast(self.recommended_sampling), weights, [*sliders, self.note], **UNQUEUED)

    def recommended_sampling(self, name: Any) -> tuple[Any, ...]:
        """The sliders' values that the weights recommend, and a line that names their source."""
        generation = self.handlers.store.generation(name)
        values = [clamped(SLIDERS[setting], value) for setting, value in generation.sampling.items()]
        return *values, sampling_note(generation)


def clamped(spec: SliderSpec, value: float) -> float:
    """The value, or the nearest that the slider can show."""
    return min(max(value, spec.low), spec.high)


def sampling_note(generation: GenerationConfig) -> str:
    """The line that says which sampling these weights recommend."""
    if not generation.source:
        return '<p class="hint small">These weights recommend no sampling: greedy.</p>'
    line = f"Set from the weights' generation_config.json: {describe_sampling(generation.sampling)}."
    return f'<p class="hint small">{html.escape(" ".join(filter(None, [line, generation.note])), quote=False)}</p>'


def slider(name: str, spec: SliderSpec) -> gr.Slider | gr.Number:
    """A slider with the range that the server accepts; for the seed a number field."""
    if name == "seed":
        return gr.Number(spec.default, label=spec.label, precision=0, elem_id=name)
    return gr.Slider(spec.low, spec.high, spec.default, step=spec.step, label=spec.label, elem_id=name)
