"""The parity report as an HTML page with plots and as a Markdown table.

Measures nothing: a page can be made from a stored report.json.
"""

import base64
import html
import io
import json
from pathlib import Path
from typing import Any

from smollm_jax import errors
from smollm_jax.runs.plots import style
from smollm_parity.rungs import Rung, compared

# The rungs that only tests cover.
TESTS_ONLY = {"4 modules": "each module by itself", "6 optimizer": "AdamW and the schedule"}
TESTS_ONLY |= {"10 family": "other configs of the family", "11 evaluation": "perplexity and lm-eval's answers"}
TESTS_ONLY |= {"12 finetuning": "steps on chats against TRL's"}
STYLE = """
:root { color-scheme: light dark; --pass: light-dark(#0a6b2c, #5fd88a); --fail: light-dark(#b3261e, #ff9d94) }
html { color: light-dark(#111, #eee); background: light-dark(#fff, #111) }
body { font: 16px/1.5 system-ui; max-width: 66rem; margin: 2rem auto; padding: 0 1rem }
h1 { font-size: 1.5rem; line-height: 1.3 } .pass { color: var(--pass) } .fail { color: var(--fail); font-weight: bold }
table { border-collapse: collapse; width: 100% }
td, th { padding: .3rem .7rem .3rem 0; text-align: left; vertical-align: top; border-bottom: 1px solid #8885 }
.number, .rung { font-variant-numeric: tabular-nums; white-space: nowrap }
img { max-width: 100%; background: #fff; border-radius: 8px; margin: .5rem 0 }
code, li { overflow-wrap: anywhere }
@media (max-width: 46rem) {
  thead { position: absolute; clip-path: inset(50%) }
  tr { display: grid; grid-template-columns: 1fr auto; padding: .5rem 0; border-bottom: 1px solid #8885 }
  td { border: 0; padding: 0 } .rung, .claim, .noise { grid-column: 1 / -1 } .rung, .noise { font-size: .85rem }
}
"""


def verdict(rungs: list[Rung]) -> str:
    """One sentence: whether all claims hold, or which do not."""
    failed = [f"{rung.rung}, {rung.claim} ({compared(rung)})" for rung in rungs if not rung.passed]
    if not failed:
        return f"The same function: all {len(rungs)} claims on {len({rung.rung for rung in rungs})} rungs hold."
    return f"NOT the same function: {len(failed)} of {len(rungs)} claims failed: {'; '.join(failed)}."


def absent(rungs: list[Rung]) -> tuple[str, str]:
    """A sentence on the rungs that are not in the report, and the command that tests them."""
    names = ", ".join(f"{name} ({description})" for name, description in TESTS_ONLY.items())
    files = " ".join(f"parity_tests/test_{name.replace(' ', '_')}.py" for name in TESTS_ONLY)
    text = f"Not in the table, for they are tests only: rungs {names}."
    if not any(rung.rung.startswith("8") for rung in rungs):
        text += " Rung 8 generation compares with transformers, which is not installed."
    return text, f"python -m pytest {files} -rP"


def page(report: dict[str, Any], rungs: list[Rung]) -> str:
    """The report as one self-contained HTML page, with plots of `report["curves"]`."""

    def row(rung: Rung) -> str:
        state = "pass" if rung.passed else "fail"
        return (
            f'<tr><td class="rung">{html.escape(rung.rung)}</td><td class="claim">{html.escape(rung.claim)}</td>'
            f'<td class="number">{html.escape(compared(rung))}</td>'
            f'<td class="{state}">{state if rung.passed else "FAIL"}</td>'
            f'<td class="noise">{html.escape(rung.noise)}</td></tr>'
        )

    without = "<p>transformers is not installed, so there is no comparison with it.</p>"
    missing = "" if "transformers" in report["versions"] else without
    versions = "".join(f"<li>{backend}: {html.escape(json.dumps(v))}</li>" for backend, v in report["versions"].items())
    images = "".join(
        f'<img alt="{name}" src="data:image/png;base64,{png}">' for name, png in plots(report["curves"]).items()
    )
    tests, command = absent(rungs)
    return f"""<!doctype html><html lang="en"><meta charset="utf-8"><title>Parity report</title>
<meta name="viewport" content="width=device-width"><style>{STYLE}</style>
<h1 class="{"pass" if report["passed"] else "fail"}">{html.escape(verdict(rungs))}</h1>
<p>Weights: <code>{html.escape(report["weights"])}</code> ({html.escape(report["origin"] or "origin not recorded")}).
{report["date"]}, {report["seconds"]} s: <code>{html.escape(report["command"])}</code></p>{missing}
<table><thead><tr><th>rung</th><th>claim</th><th>measured, bound</th><th>holds</th>
<th>to be read against</th></tr></thead>
<tbody>{"".join(row(rung) for rung in rungs)}</tbody></table>
<p>{html.escape(tests)} Run them with <code>{html.escape(command)}</code>.</p>
<h2>Where the errors are</h2>{images}<h2>Versions</h2><ul>{versions}</ul></html>"""


def plots(curves: dict[str, Any]) -> dict[str, str]:
    """PNG plots, base64: error per layer, error against position, the loss curves."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    colors = {"jax": "#0072b2", "twin": "#d55e00", "transformers": "#009e73"}
    images = {}
    size = {"figsize": (6, 3.6), "layout": "constrained"}  # inches; labels stay legible on a phone

    def keep(name: str, figure: Any, axes: Any) -> None:
        axes.legend(frameon=False, fontsize=8)
        style(axes)
        buffer = io.BytesIO()
        figure.savefig(buffer, dpi=160)
        pyplot.close(figure)
        images[name] = base64.b64encode(buffer.getvalue()).decode()

    figure, axes = pyplot.subplots(**size)
    for name, values in curves["layers"].items():
        backend, dtype = name.split(", ")
        axes.semilogy(values, color=colors[backend], linestyle="-" if dtype == "float32" else "--", label=name)
    axes.set(xlabel="layer", ylabel="RMS error of the residual stream", title="Error against float64, per layer")
    keep("error per layer", figure, axes)

    figure, axes = pyplot.subplots(**size)
    for backend, values in curves["positions"].items():
        axes.semilogy(values, color=colors[backend], label=f"{backend}, float32", linewidth=1)
    axes.set(xlabel="position", ylabel="largest error of a logit", title="Error against position")
    keep("error against position", figure, axes)

    figure, axes = pyplot.subplots(**size)
    for (backend, values), (line, width) in zip(curves["training"].items(), (("-", 4), ("--", 1.5)), strict=True):
        axes.plot(range(1, len(values) + 1), values, line, linewidth=width, color=colors[backend], label=backend)
    axes.set(xlabel="step", ylabel="loss, nats per token", title="Ten training steps from these weights, float32")
    keep("training curves", figure, axes)
    return images


def write_readme(path: Path, report: dict[str, Any], rungs: list[Rung]) -> None:
    """Replaces the text between the parity markers of a Markdown file with the table."""
    begin, end = "<!-- parity:begin -->", "<!-- parity:end -->"
    text = path.read_text(encoding="utf-8")
    if begin not in text or end not in text:
        raise errors.InputFileError(f"{path}: needs the markers {begin} and {end}")
    rows = "\n".join(f"| {r.rung} | {r.claim} | {compared(r)} | {r.noise} |" for r in rungs)
    table = f"{verdict(rungs)}\n\n| rung | claim | measured, bound | to be read against |\n|---|---|---|---|\n{rows}"
    tests, command = absent(rungs)
    versions = report["versions"]["jax"] | report["versions"]["twin"] | report["versions"].get("transformers", {})
    source = (
        f"{tests} `{command}` runs them. Written by `{report['command']} --readme {path}` on {report['date']}: "
        f"{report['origin']}; " + ", ".join(f"{name} {version}" for name, version in versions.items())
    )
    before, after = text.split(begin)[0], text.split(end)[1]
    path.write_text(f"{before}{begin}\n{table}\n\n{source}.\n{end}{after}", encoding="utf-8")
