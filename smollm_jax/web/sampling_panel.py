"""The panel beside the tabs: stop strings, and a slider for every number of the sampling, set as the weights ask."""

import html
from typing import Any

import gradio as gr

from smollm_jax.config.generation_config import GREEDY, GenerationConfig, describe_sampling
from smollm_jax.web.events import LIGHT, refusing
from smollm_jax.web.requests import KNOBS, Knob
from smollm_jax.web.responses import Answers

NEUTRAL = '<p class="hint small">Temperature 0 is greedy. Top k 0, top p 1, min p 0 and penalty 1 change nothing.</p>'


class SamplingPanel:
    """The panel's fields; `wire` binds them once the rest of the page is there."""

    def __init__(self, answers: Answers):
        self.answers = answers
        with gr.Accordion("Sampling", open=True):
            self.knobs = [field(name, knob) for name, knob in KNOBS.items()]
            self.stop = gr.Textbox(
                label="Stop strings", info=r"one a line; \n is a line break", lines=1, max_lines=8, elem_id="stops"
            )
            gr.HTML(NEUTRAL, padding=False)
            self.asked = gr.HTML("", elem_id="asked", padding=False)

    @property
    def inputs(self) -> list[Any]:
        """What a tab's handlers get of the sampling: the stop strings, then the knobs."""
        return [self.stop, *self.knobs]

    def wire(self, page: gr.Blocks, weights: gr.Dropdown) -> None:
        """Sets the sliders when the page opens and when other weights are chosen."""
        sliders = [self.knobs[list(KNOBS).index(name)] for name in GREEDY]
        events = [page.load, weights.input]
        gr.on(events, refusing(self.own_sampling), weights, [*sliders, self.asked], **LIGHT)

    def own_sampling(self, name: Any) -> tuple[Any, ...]:
        """The sliders as the weights ask for them, and a line on who asked."""
        generation = self.answers.shelf.generation(name)
        values = [within(KNOBS[knob], value) for knob, value in generation.sampling.items()]
        return *values, asked_for(generation)


def within(knob: Knob, value: float) -> float:
    """A number that a slider can show."""
    return min(max(value, knob.low), knob.high)


def asked_for(generation: GenerationConfig) -> str:
    """The line on how these weights ask to be sampled from."""
    if not generation.source:
        return '<p class="hint small">These weights ask for no sampling: greedy.</p>'
    line = f"Set to what the weights' generation_config.json asks for: {describe_sampling(generation.sampling)}."
    return f'<p class="hint small">{html.escape(" ".join(filter(None, [line, generation.note])), quote=False)}</p>'


def field(name: str, knob: Knob) -> gr.Slider | gr.Number:
    """A slider of the range that the server accepts; for the seed a plain number."""
    if name == "seed":
        return gr.Number(knob.default, label=knob.label, precision=0, elem_id=name)
    return gr.Slider(knob.low, knob.high, knob.default, step=knob.step, label=knob.label, elem_id=name)
