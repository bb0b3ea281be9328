"""The Runs tab: curves as they are written, and one prompt continued by successive checkpoints."""

import hashlib
import json
from typing import Any

import gradio as gr
from gradio.components.plot import AltairPlotData

from smollm_jax.runs.checkpoint import steps_in
from smollm_jax.web.events import LIGHT, WRITING, note, numbered, refusing, waiting, writing
from smollm_jax.web.requests import choice
from smollm_jax.web.responses import MOST_COMPARED, Answers
from smollm_jax.web.run_curves import CURVES, CurvesByRun, Point, table, thinned

TICK_SECONDS = 2.0
MOST_DRAWN = 4  # by themselves; any number by choice
COLOURS = ("#0d9488", "#ea580c", "#6366f1", "#db2777", "#ca8a04", "#0284c7", "#65a30d", "#9333ea")
NOTHING_SEEN = {"mark": "", "runs": [], "learner": None, "steps": [], "plot": ""}


class RunsTab:
    """The tab's fields; `wire` binds them once the rest of the page is there."""

    def __init__(self, answers: Answers, status: gr.HTML):
        self.answers, self.status, self.logs = answers, status, CurvesByRun()
        with gr.Tab("Runs") as self.tab:
            self.listing = gr.HTML(elem_id="runs-table", padding=False)
            with gr.Row():
                self.drawn = gr.Dropdown(
                    [], value=[], multiselect=True, label="Runs", scale=3, min_width=280, elem_id="drawn"
                )
                self.curve = gr.Dropdown(
                    list(CURVES), value=next(iter(CURVES)), label="Curve", scale=1, min_width=210, elem_id="curve"
                )
            self.plot = gr.Plot(show_label=False, buttons=[], elem_id="curves")
            gr.Markdown("#### The same prompt, continued by successive checkpoints of a run")
            with gr.Row():
                self.learner = gr.Dropdown([], label="Run", min_width=240, elem_id="learner")
                label = f"Checkpoints (up to {MOST_COMPARED})"
                self.steps = gr.Dropdown(
                    [], value=[], multiselect=True, label=label, scale=2, min_width=240, elem_id="steps"
                )
            self.prompt = gr.Textbox("Fellow citizens, ", label="Prompt", lines=2, elem_id="learned")
            with gr.Row():
                self.compare = gr.Button("Continue with each", variant="primary", scale=4, elem_id="compare")
                self.stop = gr.Button("Stop", scale=1, min_width=90, elem_id="stop-comparing")
            self.note = note("runs-note")
            self.cards = gr.HTML(elem_id="cards", padding=False)
        self.writer = gr.State("")

    def wire(self, page: gr.Blocks, sampling: list[Any], others: list[gr.Tab]) -> None:
        """Looks at the runs when the page opens, and every two seconds while this tab is the one in front."""
        seen = gr.State(NOTHING_SEEN)
        chosen = [self.drawn, self.curve, self.learner, seen]
        looks = {"outputs": [self.listing, self.drawn, self.learner, self.steps, self.plot, seen], **LIGHT}
        timer = gr.Timer(TICK_SECONDS, active=False)
        gr.on([page.load, timer.tick, self.tab.select], refusing(self.look), chosen, **looks)
        gr.on([self.drawn.input, self.curve.input, self.learner.input], refusing(self.look), chosen, **looks)
        self.tab.select(lambda: gr.Timer(active=True), outputs=timer, **LIGHT)
        gr.on([tab.select for tab in others], lambda: gr.Timer(active=False), outputs=timer, **LIGHT)
        comparing = self.compare.click(
            writing(self.on_compare, lambda why, *_: (gr.skip(), gr.skip(), why, gr.skip())),
            [self.learner, self.steps, self.prompt, *sampling],
            [self.cards, self.status, self.note, self.writer],
            api_name="compare",
            show_progress_on=self.note,
            **WRITING,
        )
        self.stop.click(lambda: "", outputs=self.note, cancels=[comparing], **LIGHT)

    def on_compare(self, run: Any, steps: Any, prompt: Any, stop: Any, *values: Any):
        """The cards as they grow."""
        for frame in self.answers.compare(run, steps, prompt, numbered(values), stop):
            if frame.waiting:
                yield gr.skip(), gr.skip(), waiting(frame.waiting), gr.skip()
            elif not frame.weights:  # the first checkpoints could not be read
                yield frame.shown, gr.skip(), "", gr.skip()
            else:
                yield frame.shown, frame.status, "", frame.weights

    def look(self, drawn: Any, curve: Any, learner: Any, seen: dict[str, Any]):
        """The runs as they are now. A new run is drawn by itself, and new checkpoints are picked by themselves."""
        choice("curve", curve, CURVES)
        runs = self.answers.shelf.runs()
        state = {name: (self.logs.of(path), steps_in(path / "checkpoints")) for name, path in runs.items()}
        learners = [name for name, (_, steps) in state.items() if steps]
        drawn = [name for name in runs if isinstance(drawn, list) and name in drawn]
        for name in [name for name in runs if name not in seen["runs"]]:
            drawn += [name] if len(drawn) < MOST_DRAWN and name not in drawn else []
        learner = next((name for name in learners if name == learner), next(iter(learners), None))
        there = state[learner][1] if learner else []
        mark = repr([drawn, curve, learner, [(name, log.step, log.written) for name, (log, _) in state.items()], there])
        new = {"mark": mark, "runs": list(runs), "learner": learner, "steps": there, "plot": seen["plot"]}
        if new == seen:
            return table(state), gr.skip(), gr.skip(), gr.skip(), gr.skip(), new
        same = (seen["learner"], seen["steps"]) == (learner, there)
        plot = lines({name: state[name][0].curves[CURVES[curve]] for name in drawn}, list(runs))
        new["plot"] = hashlib.sha256(plot.plot.encode()).hexdigest()
        return (
            table(state),
            gr.Dropdown(choices=list(runs), value=drawn),
            gr.Dropdown(choices=learners, value=learner),
            gr.skip() if same else gr.Dropdown(choices=there, value=spread(there, MOST_COMPARED)),
            # Drawn anew only when it changed: two drawings at once can leave none.
            gr.skip() if new["plot"] == seen["plot"] else plot,
            new,
        )


def spread(steps: list[int], most: int) -> list[int]:
    """At most `most` of the steps, the first and the last among them, evenly apart."""
    if len(steps) <= most:
        return steps
    return [steps[round(i * (len(steps) - 1) / (most - 1))] for i in range(most)]


def lines(curves: dict[str, list[Point]], runs: list[str]) -> AltairPlotData:
    """The curves laid over each other as a Vega-Lite chart; a run keeps its colour whatever else is drawn."""
    points = [
        {"step": step, "value": value, "run": name} for name, curve in curves.items() for step, value in thinned(curve)
    ]
    places = {name: place for place, name in enumerate(sorted(runs))}
    colours = [COLOURS[places[name] % len(COLOURS)] for name in curves]
    # The channel is the stroke: Gradio gives what has a colour its own. No "$schema": Gradio's LinePlot names a version
    # that is not its Vega-Lite's, of which each look would leave a warning in the console.
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
    shown = [{"field": "run"}, {"field": "step", "format": ","}, {"field": "value", "format": ".4~g"}]
    marks = [
        {"mark": {"type": "line", "strokeWidth": 2}, "encoding": encoding},
        {
            "mark": {"type": "point", "size": 90, "strokeOpacity": 0, "fillOpacity": 0, "filled": True},
            "encoding": encoding | {"tooltip": shown},
        },
    ]
    chart = {"data": {"values": points}, "height": 280, "background": "transparent", "layer": marks}
    chart["description"] = "curves of the runs"
    chart["usermeta"] = {"embedOptions": {"actions": False, "renderer": "svg"}}
    return AltairPlotData(plot=json.dumps(chart), chart="line")
