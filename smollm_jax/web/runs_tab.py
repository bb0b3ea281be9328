"""The Runs tab: live training curves, and one prompt continued by successive checkpoints of a run."""

import hashlib
import json
from typing import Any

import gradio as gr
from gradio.components.plot import AltairPlotData

from smollm_jax.runs.checkpoint import steps_in
from smollm_jax.web.events import (
    STREAMING,
    UNQUEUED,
    by_name,
    errors_in_note,
    errors_in_toast,
    note,
    progress_html,
)
from smollm_jax.web.requests import choice
from smollm_jax.web.responses import MAX_COMPARED, Handlers
from smollm_jax.web.run_curves import CURVES, CurvesByRun, Point, answers_table, downsampled, table

TICK_SECONDS = 2.0
MAX_AUTOMATIC_CURVES = 4  # the user can select any number
COLOURS = ("#0d9488", "#ea580c", "#6366f1", "#db2777", "#ca8a04", "#0284c7", "#65a30d", "#9333ea")
INITIAL_VIEW = {"fingerprint": "", "runs": [], "compared_run": None, "steps": [], "plot": ""}


class RunsTab:
    """The tab's components; `wire` binds their events once the rest of the page exists."""

    def __init__(self, handlers: Handlers, status: gr.HTML):
        self.handlers, self.status, self.logs = handlers, status, CurvesByRun()
        with gr.Tab("Runs") as self.tab:
            self.listing = gr.HTML(elem_id="runs-table", padding=False)
            with gr.Row():
                self.plotted = gr.Dropdown(
                    [], value=[], multiselect=True, label="Runs", scale=3, min_width=280, elem_id="drawn"
                )
                self.curve = gr.Dropdown(
                    list(CURVES), value=next(iter(CURVES)), label="Curve", scale=1, min_width=210, elem_id="curve"
                )
            self.plot = gr.Plot(show_label=False, buttons=[], elem_id="curves")
            gr.Markdown("#### The same prompt, continued by successive checkpoints of a run")
            with gr.Row():
                self.compared_run = gr.Dropdown([], label="Run", min_width=240, elem_id="learner")
                label = f"Checkpoints (up to {MAX_COMPARED})"
                self.steps = gr.Dropdown(
                    [], value=[], multiselect=True, label=label, scale=2, min_width=240, elem_id="steps"
                )
            self.prompt = gr.Textbox("Fellow citizens, ", label="Prompt", lines=2, elem_id="learned")
            with gr.Row():
                self.compare = gr.Button("Continue with each", variant="primary", scale=4, elem_id="compare")
                self.stop = gr.Button("Stop", scale=1, min_width=90, elem_id="stop-comparing")
            self.note = note("runs-note")
            self.cards = gr.HTML(elem_id="cards", padding=False)
            self.answers = gr.HTML(elem_id="answers", padding=False)
        self.writer = gr.State("")  # name of the weights that generated the cards

    def wire(self, page: gr.Blocks, sampling: list[Any], others: list[gr.Tab]) -> None:
        """Refreshes the tab when the page opens, and every `TICK_SECONDS` while the tab is selected."""
        view = gr.State(INITIAL_VIEW)
        inputs = [self.plotted, self.curve, self.compared_run, view]
        refreshed = [self.listing, self.plotted, self.compared_run, self.steps, self.plot, self.answers, view]
        timer = gr.Timer(TICK_SECONDS, active=False)
        gr.on([page.load, timer.tick, self.tab.select], errors_in_toast(self.refresh), inputs, refreshed, **UNQUEUED)
        gr.on(
            [self.plotted.input, self.curve.input, self.compared_run.input],
            errors_in_toast(self.refresh),
            inputs,
            refreshed,
            **UNQUEUED,
        )
        self.tab.select(lambda: gr.Timer(active=True), outputs=timer, **UNQUEUED)
        gr.on([tab.select for tab in others], lambda: gr.Timer(active=False), outputs=timer, **UNQUEUED)
        comparing = self.compare.click(
            errors_in_note(self.on_compare, lambda error, *_: (gr.skip(), gr.skip(), error, gr.skip())),
            [self.compared_run, self.steps, self.prompt, *sampling],
            [self.cards, self.status, self.note, self.writer],
            api_name="compare",
            show_progress_on=self.note,
            **STREAMING,
        )
        self.stop.click(lambda: "", outputs=self.note, cancels=[comparing], **UNQUEUED)

    def on_compare(self, run: Any, steps: Any, prompt: Any, stop: Any, *values: Any):
        """The cards as they grow."""
        for frame in self.handlers.compare(run, steps, prompt, by_name(values), stop):
            if frame.progress:
                yield gr.skip(), gr.skip(), progress_html(frame.progress), gr.skip()
            elif not frame.weights:  # the first checkpoints could not be read
                yield frame.content, gr.skip(), "", gr.skip()
            else:
                yield frame.content, frame.status, "", frame.weights

    def refresh(self, plotted: Any, curve: Any, compared_run: Any, view: dict[str, Any]):
        """The outputs for the runs as they are now, where they differ from `view`, what the tab showed last.

        New runs are added to the plot, and new checkpoints to the comparison.
        """
        choice("curve", curve, CURVES)
        runs = self.handlers.store.runs()
        state = {name: (self.logs.curves_of(path), steps_in(path / "checkpoints")) for name, path in runs.items()}
        with_checkpoints = [name for name, (_, steps) in state.items() if steps]
        plotted = [name for name in runs if isinstance(plotted, list) and name in plotted]
        for name in [name for name in runs if name not in view["runs"]]:
            plotted += [name] if len(plotted) < MAX_AUTOMATIC_CURVES and name not in plotted else []
        compared_run = next(
            (name for name in with_checkpoints if name == compared_run), next(iter(with_checkpoints), None)
        )
        steps = state[compared_run][1] if compared_run else []
        answers = answers_table(runs[compared_run]) if compared_run else ""
        progress = [(name, log.step, log.modified_time) for name, (log, _) in state.items()]
        new_view = {
            "fingerprint": repr([plotted, curve, compared_run, progress, steps, answers]),
            "runs": list(runs),
            "compared_run": compared_run,
            "steps": steps,
            "plot": view["plot"],
        }
        if new_view == view:
            return table(state), gr.skip(), gr.skip(), gr.skip(), gr.skip(), gr.skip(), new_view
        same_steps = (view["compared_run"], view["steps"]) == (compared_run, steps)
        plot = chart({name: state[name][0].curves[CURVES[curve]] for name in plotted}, list(runs))
        new_view["plot"] = hashlib.sha256(plot.plot.encode()).hexdigest()
        return (
            table(state),
            gr.Dropdown(choices=list(runs), value=plotted),
            gr.Dropdown(choices=with_checkpoints, value=compared_run),
            gr.skip() if same_steps else gr.Dropdown(choices=steps, value=evenly_spaced(steps, MAX_COMPARED)),
            # Only when it changed: two updates at once can leave an empty plot.
            gr.skip() if new_view["plot"] == view["plot"] else plot,
            answers,
            new_view,
        )


def evenly_spaced(steps: list[int], count: int) -> list[int]:
    """At most `count` of the steps, evenly spaced, with the first and the last."""
    if len(steps) <= count:
        return steps
    return [steps[round(i * (len(steps) - 1) / (count - 1))] for i in range(count)]


def chart(curves: dict[str, list[Point]], runs: list[str]) -> AltairPlotData:
    """The curves in one Vega-Lite chart. A run's colour does not depend on which others are plotted."""
    points = [
        {"step": step, "value": value, "run": name}
        for name, curve in curves.items()
        for step, value in downsampled(curve)
    ]
    colour_of = {name: COLOURS[index % len(COLOURS)] for index, name in enumerate(sorted(runs))}
    colours = [colour_of[name] for name in curves]
    # The channel is "stroke" because Gradio overrides the colours of "color". There is no "$schema": the one that
    # Gradio's LinePlot names does not match its Vega-Lite, and each update would log a warning in the console.
    encoding = {
        "x": {"field": "step", "type": "quantitative", "title": "step", "axis": {"tickMinStep": 1}},
        "y": {"field": "value", "type": "quantitative", "title": None, "scale": {"zero": False}},
        "stroke": {
            "field": "run",
            "type": "nominal",
            "scale": {"domain": list(curves), "range": colours},
            "legend": {"orient": "bottom", "title": None, "columns": 2, "labelLimit": 150, "symbolType": "stroke"},
        },
    }
    tooltip = [{"field": "run"}, {"field": "step", "format": ","}, {"field": "value", "format": ".4~g"}]
    marks = [
        {"mark": {"type": "line", "strokeWidth": 2}, "encoding": encoding},
        {
            "mark": {"type": "point", "size": 90, "strokeOpacity": 0, "fillOpacity": 0, "filled": True},
            "encoding": encoding | {"tooltip": tooltip},
        },
    ]
    chart = {"data": {"values": points}, "height": 280, "background": "transparent", "layer": marks}
    chart["description"] = "curves of the runs"
    chart["usermeta"] = {"embedOptions": {"actions": False, "renderer": "svg"}}
    return AltairPlotData(plot=json.dumps(chart), chart="line")
