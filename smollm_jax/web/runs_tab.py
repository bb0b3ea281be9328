"""The Runs tab: curves as they are written, and one prompt continued by successive checkpoints."""

from typing import Any

import gradio as gr

from smollm_jax.checkpoint import steps_in
from smollm_jax.web.answers import MOST_COMPARED, Answers
from smollm_jax.web.ask import choice
from smollm_jax.web.runs import CURVES, Point, RunLogs, table, thinned
from smollm_jax.web.wiring import LIGHT, WRITING, numbered, refusing

TICK_SECONDS = 2.0
MOST_DRAWN = 4  # by themselves; any number by choice
COLOURS = ("#0d9488", "#ea580c", "#6366f1", "#db2777", "#ca8a04", "#0284c7", "#65a30d", "#9333ea")
NOTHING_SEEN = {"mark": "", "runs": [], "learner": None, "steps": []}


class RunsTab:
    """The tab's fields; `wire` binds them once the rest of the page is there."""

    def __init__(self, answers: Answers):
        self.answers, self.logs = answers, RunLogs()
        with gr.Tab("Runs") as self.tab:
            self.listing = gr.HTML(elem_id="runs-table", padding=False)
            with gr.Row():
                self.drawn = gr.Dropdown([], value=[], multiselect=True, label="Runs", scale=3, elem_id="drawn")
                self.curve = gr.Dropdown(
                    list(CURVES), value=next(iter(CURVES)), label="Curve", scale=1, min_width=160, elem_id="curve"
                )
            self.plot = gr.LinePlot(
                x="step", y="value", color="run", x_title="step", y_title=" ", height=320, buttons=[], elem_id="curves"
            )
            gr.Markdown("#### The same prompt, continued by successive checkpoints of a run")
            with gr.Row():
                self.learner = gr.Dropdown([], label="Run", min_width=160, elem_id="learner")
                label = f"Checkpoints (up to {MOST_COMPARED})"
                self.steps = gr.Dropdown([], value=[], multiselect=True, label=label, scale=2, elem_id="steps")
            self.prompt = gr.Textbox("Fellow citizens, ", label="Prompt", lines=2, elem_id="learned")
            with gr.Row():
                self.compare = gr.Button("Continue with each", variant="primary", scale=4, elem_id="compare")
                self.stop = gr.Button("Stop", scale=1, min_width=90)
            self.cards = gr.HTML(elem_id="cards", padding=False)

    def wire(self, page: gr.Blocks, sampling: list[Any], status: gr.HTML, others: list[gr.Tab]) -> None:
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
            refusing(self.on_compare),
            [self.learner, self.steps, self.prompt, *sampling],
            [self.cards, status],
            api_name="compare",
            **WRITING,
        )
        self.stop.click(None, cancels=[comparing], queue=False)

    def on_compare(self, run: Any, steps: Any, prompt: Any, stop: Any, *values: Any):
        """The cards as they grow, and the status line."""
        for frame in self.answers.compare(run, steps, prompt, numbered(values), stop):
            yield frame.shown, frame.status

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
        new = {"mark": mark, "runs": list(runs), "learner": learner, "steps": there}
        if new == seen:
            return table(state), gr.skip(), gr.skip(), gr.skip(), gr.skip(), new
        same = (seen["learner"], seen["steps"]) == (learner, there)
        return (
            table(state),
            gr.Dropdown(choices=list(runs), value=drawn),
            gr.Dropdown(choices=learners, value=learner),
            gr.skip() if same else gr.Dropdown(choices=there, value=spread(there, MOST_COMPARED)),
            lines({name: state[name][0].curves[CURVES[curve]] for name in drawn}, list(runs)),
            new,
        )


def spread(steps: list[int], most: int) -> list[int]:
    """At most `most` of the steps, the first and the last among them, evenly apart."""
    if len(steps) <= most:
        return steps
    return [steps[round(i * (len(steps) - 1) / (most - 1))] for i in range(most)]


def lines(curves: dict[str, list[Point]], runs: list[str]) -> gr.LinePlot:
    """The curves laid over each other; a run keeps its colour whatever else is drawn."""
    import pandas

    points = [(step, value, name) for name, curve in curves.items() for step, value in thinned(curve)]
    colours = {name: COLOURS[place % len(COLOURS)] for place, name in enumerate(sorted(runs))}
    return gr.LinePlot(pandas.DataFrame(points, columns=["step", "value", "run"]), color_map=colours)
