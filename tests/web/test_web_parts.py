"""The parts of the web page without HTTP: the model store, curves of runs, the comparison of checkpoints."""

import html
import io
import json
import os
import re
import shutil
import sys
import time
from html.parser import HTMLParser
from pathlib import Path

import gradio
import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from smollm_jax import weights
from smollm_jax.commands import app, fetch
from smollm_jax.config.hf_config import read_config
from smollm_jax.errors import InputFileError, SmolLMError, StorageError, UsageError
from smollm_jax.generation.engine import Token
from smollm_jax.runs import answers, metrics
from smollm_jax.runs.answers import Answer
from smollm_jax.runs.metrics import read_metrics
from smollm_jax.runtime.assets import fetch_command
from smollm_jax.web import run_curves
from smollm_jax.web.chat_tab import bubbles
from smollm_jax.web.events import error_message
from smollm_jax.web.markdown import MAX_CHARACTERS, render_markdown
from smollm_jax.web.model_store import ModelStore
from smollm_jax.web.page import page
from smollm_jax.web.requests import SLIDERS
from smollm_jax.web.responses import Handlers
from smollm_jax.web.run_curves import RunCurves, downsampled
from smollm_jax.web.runs_tab import INITIAL_VIEW, RunsTab, evenly_spaced
from smollm_jax.web.sampling_panel import clamped, sampling_note
from smollm_jax.web.token_html import span
from smollm_jax.weights.adapter import Adapter, projection_shape, write_adapter
from smollm_jax.weights.bundle import Bundle
from tests.serving import GREEDY, Client, served, tiny_run, tiny_weights
from tests.small_files import SMALL, small_tensors, small_tokenizer
from tests.web.test_app import text_of


@pytest.fixture(scope="module")
def place(tmp_path_factory, weights_path) -> Path:
    """A folder with assets/tiny and runs/grown, whose three checkpoints have different weights, the second damaged."""
    folder = tmp_path_factory.mktemp("parts")
    run = tiny_run(folder, weights_path, "grown", (0, 10, 20))
    array = next(path for path in (run / "checkpoints/10/params").rglob("d/*") if path.stat().st_size > 1000)
    content = bytearray(array.read_bytes())
    content[500] ^= 1
    array.write_bytes(content)
    return folder


def model_store(place: Path, **changed) -> ModelStore:
    options = {"initial_weights": None, "assets": place / "assets", "runs": place / "runs", "fetch": ["false"]}
    return ModelStore(**(options | changed))


def opened(store: ModelStore, name: object):
    """The progress lines, and the loaded model."""
    progress, opening = [], store.open(name)
    while True:
        try:
            progress.append(next(opening))
        except StopIteration as done:
            return progress, done.value


def test_only_weights_under_assets_and_runs_are_listed_the_given_ones_first(place):
    (place / "assets/notes").mkdir(exist_ok=True)
    names = list(model_store(place, initial_weights=place / "elsewhere").entries())
    checkpoints = [f"runs/grown/checkpoints/{step}" for step in (20, 10, 0)]
    real = "assets/SmolLM2-135M-Instruct"
    tiny = ["assets/tiny0", "assets/tiny10", "assets/tiny20"]
    assert names == [str(place / "elsewhere"), real, *tiny, "runs/grown", *checkpoints]


@pytest.mark.parametrize("name", ["", "/etc", "../secret", "assets/../assets/tiny0", None, 5, ["assets/tiny0"]])
def test_a_name_that_is_not_listed_is_not_loaded(place, name):
    with pytest.raises(UsageError, match="not one of the options listed"):
        opened(model_store(place), name)


def test_a_run_is_its_newest_checkpoint_and_no_more_weights_are_kept_than_asked_for(place):
    few = model_store(place, max_loaded=2)
    run = opened(few, "runs/grown")[1]
    assert opened(few, "runs/grown/checkpoints/20") == ([], run)  # the same ones: loaded once
    first = opened(few, "assets/tiny0")[1]
    opened(few, "assets/tiny10")
    assert few.loaded("runs/grown") is None
    assert few.loaded("assets/tiny0") is first


def test_the_page_starts_with_the_adapter_applied_and_names_it_beside_the_weights(place, tmp_path):
    path, draw = place / "assets/tiny0", np.random.default_rng(0)
    config, folder = read_config(path / "config.json"), tmp_path / "run" / "adapter"
    out_size, in_size = projection_shape(config, "q_proj")
    shapes = (config.num_hidden_layers, 2, in_size), (config.num_hidden_layers, out_size, 2)
    a, b = (draw.normal(0, 0.1, shape).astype(np.float32) for shape in shapes)

    def query_weights(name):
        return np.asarray(opened(store, name)[1].engine.model.layers.self_attn.q_proj[...])

    for weights_flag, shown in ((path, str(path)), (None, "assets/SmolLM2-135M-Instruct")):
        write_adapter(folder, Adapter({"q_proj": (a, b)}, 2, 4.0))
        store = model_store(place, initial_weights=weights_flag, adapter=folder.parent)
        first, *others = store.entries()
        assert first == f"{shown} with adapter {folder}"
        assert shown in others, "the same weights without it"
        assert f"<b>{first}</b>" in Handlers(store, device="cpu", time_limit=60).status(first)
        if weights_flag is None:
            continue
        expected = np.asarray(weights.load(path, adapter=folder)[0].layers.self_attn.q_proj[...])
        assert np.array_equal(query_weights(first), expected)
        assert not np.array_equal(query_weights(first), query_weights(shown))
        write_adapter(folder, Adapter({"q_proj": (a, -b)}, 2, 4.0))  # as a run at its next checkpoint
        assert not np.array_equal(query_weights(first), expected)
    with pytest.raises(InputFileError, match="no adapter"):
        model_store(place, adapter=tmp_path / "nothing")


def test_weights_that_are_written_anew_are_loaded_anew(place, weights_path):
    some = model_store(place)
    target = tiny_weights(place, weights_path, "again", seed=1)
    before = opened(some, "assets/again")[1]
    shutil.rmtree(target)
    tiny_weights(place, weights_path, "again", seed=2)
    after = opened(some, "assets/again")[1]
    shutil.rmtree(target)
    assert before is not after


def test_the_sliders_are_what_the_weights_ask_for_before_and_after_they_are_loaded(tmp_path, weights_path):
    """For a Hugging Face folder, a run and a GGUF, read without tensors; values are clipped to a slider's range."""
    asks = {"do_sample": True, "temperature": 0.6, "top_p": 0.9, "eos_token_id": [0, 2]}
    bundle = Bundle(small_tensors(), SMALL, small_tokenizer(), generation_config=asks)
    for kind, name in (("hf", "assets/hf"), ("gguf", "assets/x.gguf"), ("orbax", "runs/run")):
        weights.write(tmp_path / name, bundle, kind)
    store = model_store(tmp_path)
    for name in ("assets/hf", "assets/x.gguf", "runs/run", "runs/run/checkpoints/0"):
        before = store.generation(name)
        assert (before.sampling["temperature"], before.sampling["top_k"], before.sampling["top_p"]) == (0.6, 50, 0.9)
        assert "temperature 0.6, top k 50, top p 0.9" in sampling_note(before)
        assert store.generation(name).eos_token_ids == opened(store, name)[1].engine.generation.eos_token_ids == (0, 2)
        assert store.generation(name).sampling == before.sampling
    blocks = page(Handlers(store, device="cpu", time_limit=60), queue_size=2)
    setting = next(function for function in blocks.fns.values() if function.name == "recommended_sampling")
    *values, line = setting.fn("assets/hf")
    assert dict(zip((slider.elem_id for slider in setting.outputs), values, strict=False)) == before.sampling
    assert "temperature 0.6" in line
    (tmp_path / "assets/hf/generation_config.json").unlink()
    assert "greedy" in sampling_note(model_store(tmp_path).generation("assets/hf"))
    assert clamped(SLIDERS["temperature"], 5) == 2
    with pytest.raises(UsageError, match="not one of the options listed"):
        store.generation("elsewhere")


def test_missing_real_weights_are_fetched_when_first_asked_for(place, tmp_path):
    copy = "import shutil, sys, time; time.sleep(0.5); shutil.copytree(sys.argv[1], sys.argv[2])"
    target = tmp_path / "assets/SmolLM2-135M-Instruct"
    fetch = [sys.executable, "-c", copy, str(place / "assets/tiny0"), str(target)]
    with served(app.Flags(assets=tmp_path / "assets", runs=tmp_path / "runs")) as url, Client(url):
        assert not target.exists(), "fetched at the start"
    some = model_store(tmp_path, fetch=fetch)
    progress, loaded = opened(some, "assets/SmolLM2-135M-Instruct")
    assert progress[0].startswith("downloading")
    assert progress[-1] == "loading"
    assert loaded.engine.config.hidden_size == 96
    assert opened(some, "assets/SmolLM2-135M-Instruct") == ([], loaded)


def test_a_fetch_that_fails_says_why_and_one_that_nobody_waits_for_is_ended(tmp_path):
    failing = [sys.executable, "-c", "raise SystemExit('error: no network')"]
    with pytest.raises(StorageError, match="no network"):
        opened(model_store(tmp_path, fetch=failing), "assets/SmolLM2-135M-Instruct")
    mark = tmp_path / "mark"
    slow = [sys.executable, "-c", f"import time; time.sleep(2); open({str(mark)!r}, 'w')"]
    opening = model_store(tmp_path, fetch=slow).open("assets/SmolLM2-135M-Instruct")
    next(opening)
    opening.close()
    time.sleep(2.5)
    assert not mark.exists()


def test_the_fetching_command_is_one_that_exists(monkeypatch, tmp_path):
    seen = []
    monkeypatch.setattr(fetch, "fetch_weights", seen.append)
    python, *options, module, what, assets, folder = fetch_command("weights", tmp_path / "assets")
    assert Path(python).exists()
    assert (options, module) == (["-P", "-m"], fetch.__name__)
    fetch.main([what, assets, folder])
    assert seen == [tmp_path / "assets/SmolLM2-135M-Instruct"]


def cards_of(frame) -> list[str]:
    return re.findall(r'<div class="card"[^>]*>(.*?)</div>', frame.content, re.DOTALL)


def test_successive_checkpoints_continue_the_same_prompt_and_a_damaged_one_says_so(place):
    handlers = Handlers(model_store(place), device="cpu", time_limit=60)
    *_, last = handlers.compare("grown", [20, 0, 10], "Fellow <b>", GREEDY, "")
    cards = cards_of(last)
    assert [re.match(r"step (\d+)Fellow", text_of(card))[1] for card in cards] == ["0", "10", "20"]
    texts = [text_of(card).split("<b>", 1)[1] for card in cards]
    for step, text in ((0, texts[0]), (20, texts[2])):
        engine = opened(model_store(place), f"assets/tiny{step}")[1].engine
        assert text == engine.complete([engine.encode("Fellow <b>")], max_new_tokens=16)[0].text
    assert "sha256 differs" in texts[1]
    assert 'class="fault"' in cards[1]
    assert re.search(r"[\d.]+ tokens/s", handlers.status("runs/grown/checkpoints/20")), "the speed is not kept in sight"
    assert "- tokens/s" in handlers.status("assets/tiny10")
    assert text_of(last.status).startswith("runs/grown, steps 0 and 20"), "the status line tells of those that answered"
    assert last.weights == "runs/grown/checkpoints/20"


@pytest.mark.parametrize("steps", [[], [5], ["0"], [True], list(range(9)), "0", None])
def test_checkpoints_that_the_run_has_not_are_refused(place, steps):
    with pytest.raises(SmolLMError):
        list(Handlers(model_store(place), device="cpu", time_limit=60).compare("grown", steps, "a", GREEDY, ""))


def test_every_checkpoint_that_the_time_limit_left_out_is_named(place):
    handlers = Handlers(model_store(place), device="cpu", time_limit=1e-9)
    *_, last = handlers.compare("grown", [0, 20], "a", GREEDY, "")
    assert [("time limit" in card) for card in cards_of(last)] == [True, True]


def row(step: int, **values: float) -> str:
    return json.dumps({"step": step} | values) + "\n"


def test_a_log_is_read_on_as_it_grows_and_half_a_line_waits(tmp_path):
    path = tmp_path / "metrics.jsonl"
    log = RunCurves(path)
    log.read_new_rows()
    assert "cannot be read" in log.error
    path.write_text(row(1, loss=5.0) + '{"step": 2, "lo')
    log = RunCurves(path)
    log.read_new_rows()
    assert log.curves["loss"] == [(1, 5.0)]
    with path.open("a") as file:
        file.write('ss": 4.0}\n' + row(2, validation_loss=4.5) + '{"step": 3, "loss": null}\n')
    log.read_new_rows()
    assert log.curves["loss"] == [(1, 5.0), (2, 4.0)]
    assert log.curves["validation_loss"] == [(2, 4.5)]
    assert log.step == 3
    assert not log.error


def test_steps_that_a_resume_did_again_replace_the_old_ones(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text("".join(row(step, loss=float(step)) for step in range(1, 6)) + row(5, validation_loss=1.0))
    log = RunCurves(path)
    log.read_new_rows()
    with path.open("a") as file:
        file.write(row(3, loss=30.0))
    log.read_new_rows()
    assert log.curves["loss"] == [(1, 1.0), (2, 2.0), (3, 30.0)]
    assert log.curves["validation_loss"] == []
    assert log.step == 3


def test_a_log_that_is_begun_anew_is_read_anew(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text(row(1, loss=1.0) + row(2, loss=2.0))
    log = RunCurves(path)
    log.read_new_rows()
    path.write_text(row(1, loss=9.0))
    log.read_new_rows()
    assert log.curves["loss"] == [(1, 9.0)]


NO_ROWS = ["no", "[]", "5", "{}", '{"step": "1"}', '{"step": 1.5, "loss": 1}', "[" * 100_000]
NO_ROWS += [f'{{"step": {2**63}}}', '{"step": -1}', f'{{"step": 2, "loss": 1{"0" * 400}}}']


@pytest.mark.parametrize("line", NO_ROWS)
def test_a_line_that_is_no_row_is_told_and_what_came_before_is_kept(tmp_path, line):
    path = tmp_path / "metrics.jsonl"
    path.write_text(row(1, loss=1.0) + line + "\n")
    log = RunCurves(path)
    log.read_new_rows()
    assert log.error == "metrics.jsonl: line 2 is not a row of metrics"
    assert log.curves["loss"] == [(1, 1.0)]


def test_a_log_that_is_a_device_or_has_a_huge_line_is_told(tmp_path, monkeypatch):
    path = tmp_path / "metrics.jsonl"
    path.symlink_to("/dev/full")
    log = RunCurves(path)
    log.read_new_rows()
    assert log.error == "metrics.jsonl cannot be read: it is not a file"
    with pytest.raises(InputFileError, match=r"metrics\.jsonl: no such file"):
        read_metrics(tmp_path)
    path.unlink()
    monkeypatch.setattr(metrics, "MAX_ROW_BYTES", 100)
    monkeypatch.setattr(run_curves, "MAX_ROW_BYTES", 100)
    path.write_text(row(1, loss=1.0) + '{"step": 2' + " " * 100)
    log.read_new_rows()
    assert log.error == "metrics.jsonl: line 2 is not a row of metrics"
    assert log.curves["loss"] == [(1, 1.0)]
    with pytest.raises(InputFileError, match=r"line 2 is not a row of metrics: it has more than 100 bytes"):
        read_metrics(tmp_path)


def test_a_log_without_a_line_end_is_not_read_whole(tmp_path, monkeypatch):
    class Log(io.BytesIO):
        def readline(self, size: int | None = -1) -> bytes:
            assert size == metrics.MAX_ROW_BYTES + 1
            return super().readline(size)

    (tmp_path / "metrics.jsonl").touch()
    monkeypatch.setattr(Path, "open", lambda *_: Log(row(1, loss=1.0).encode() + b" " * (3 << 20)))
    with pytest.raises(InputFileError, match=r"line 2 is not a row of metrics: it has more than 1,048,576 bytes"):
        read_metrics(tmp_path)


def test_rewinding_at_each_row_takes_no_time_for_the_rows_before(tmp_path):
    """Counted by the comparisons of points, because a test must not judge by time."""

    class Step(int):
        compared = 0

        def __lt__(self, other: int) -> bool:
            Step.compared += 1
            return int(self) < other

        def __ge__(self, other: int) -> bool:
            return not self < other

    log = RunCurves(tmp_path / "metrics.jsonl")
    log.path.write_text("".join(row(1000 + i % 2, loss=1.0) for i in range(1000)))
    log.read_new_rows()
    assert log.curves["loss"] == [(1000, 1.0), (1001, 1.0)]
    log._bytes_read = 0
    log.curves = {name: [(Step(step), 0.0) for step in range(1000)] for name in log.curves}
    log.read_new_rows()
    assert [len(points) for points in log.curves.values()] == [1002, *[1000] * (len(log.curves) - 1)]
    assert Step.compared < 2000 * len(log.curves)


def test_a_run_that_is_not_named_in_utf_8_is_listed_and_leaves_the_others(tmp_path):
    name = os.fsdecode(b"caf\xe9")
    for run in (name, "good"):
        (tmp_path / "runs" / run).mkdir(parents=True)
        (tmp_path / "runs" / run / "metrics.jsonl").write_text(row(1, loss=1.0))
    store = model_store(tmp_path)
    assert {*store.runs()} == {"good", "caf\\udce9"}
    assert store.runs()["caf\\udce9"].name == name
    assert error_message(InputFileError(name)) == "caf\\udce9"
    (tmp_path / "runs" / name / "answers.json").write_text("[")
    assert "caf\\udce9/answers.json" in run_curves.answers_table(tmp_path / "runs" / name)


def test_a_long_curve_is_thinned_to_means(tmp_path):
    points = [(step, float(step)) for step in range(1, 1001)]
    thin = downsampled(points, 100)
    assert len(thin) == 100
    assert thin[0] == (10, 5.5)
    assert thin[-1] == (1000, 995.5)
    assert downsampled(points[:100], 100) == points[:100]


@pytest.mark.filterwarnings("ignore:The value passed into")  # Gradio: said of an update, its choices beside it
def test_the_runs_tab_lays_new_runs_over_each_other_and_follows_their_logs(place):
    with gradio.Blocks():
        tab = RunsTab(Handlers(model_store(place), device="cpu", time_limit=60), gradio.HTML())
    run = place / "runs/other"
    run.mkdir()
    (run / "metrics.jsonl").write_text(row(1, loss=5.0))

    def look(drawn, seen):
        _, drawn, _, _, plot, _, seen = tab.refresh(drawn, "Training loss", None, seen)
        return drawn, plot, seen

    def points(plot) -> dict[str, list]:
        rows = json.loads(plot.plot)["data"]["values"]
        return {
            run: [(row["step"], row["value"]) for row in rows if row["run"] == run] for run in {r["run"] for r in rows}
        }

    drawn, plot, seen = look([], INITIAL_VIEW)
    drawn = drawn.value
    assert sorted(drawn) == ["grown", "other"]
    assert points(plot) == {"grown": [(step, 9 - step / 20) for step in range(1, 21)], "other": [(1, 5.0)]}
    with (run / "metrics.jsonl").open("a") as file:
        file.write(row(2, loss=4.0))
    _, plot, seen = look(drawn, seen)
    assert points(plot)["other"] == [(1, 5.0), (2, 4.0)]
    assert look(drawn, seen)[1] == gradio.skip()
    _, plot, _ = look(["other"], seen)
    assert set(points(plot)) == {"other"}
    shutil.rmtree(run)


def test_a_run_s_name_is_shown_as_text():
    log = RunCurves(Path("nowhere/metrics.jsonl"))
    html_table = run_curves.table({"<img src=x onerror=alert(1)>": (log, [])})
    assert "<img" not in html_table
    assert "&lt;img src=x" in html_table


def test_the_answers_of_a_fine_tuning_run_are_shown_before_and_after(tmp_path):
    assert run_curves.answers_table(tmp_path) == ""
    answers.write(tmp_path, [Answer("Hi <b>", "Hello", "Good <i>day</i>"), Answer("And?", "So")])
    shown = run_curves.answers_table(tmp_path)
    assert "Hi &lt;b&gt;" in shown
    assert "Good &lt;i&gt;day&lt;/i&gt;" in shown
    assert shown.index("Hello") < shown.index("Good ")
    assert '<td role="cell" data-head="after">-</td>' in shown, "a run that is not at its end has no second answer"
    assert answers.read(tmp_path) == [Answer("Hi <b>", "Hello", "Good <i>day</i>"), Answer("And?", "So")]
    for malformed in ("{}", '[{"before": "x"}]', '[{"prompt": 1}]', "[", '[{"prompt": "x", "other": "y"}]'):
        (tmp_path / answers.FILE).write_text(malformed)
        with pytest.raises(InputFileError, match=r"answers\.json"):
            answers.read(tmp_path)
        assert "answers.json" in run_curves.answers_table(tmp_path)


def test_the_checkpoints_offered_are_spread_from_first_to_last():
    assert evenly_spaced(list(range(0, 1000, 100)), 4) == [0, 300, 600, 900]
    assert evenly_spaced([5, 10], 4) == [5, 10]
    assert evenly_spaced([], 4) == []


def test_a_user_s_turn_is_shown_as_it_is_tags_markdown_and_all():
    content = "<script>x</script> & <b> **not bold**\n\n- no list"
    bubble = bubbles([{"role": "user", "content": content}])
    assert text_of(bubble) == content
    assert set(re.findall(r"<(\w+)", bubble)) == {"div", "p"}


def test_an_answer_s_markdown_is_rendered_and_its_code_has_a_copy_button():
    content = "# Title\n\n**bold** `a < b`\nnext ~~no~~\n\n- one\n- two\n\n"
    content += "```python\nif a < b:\n    pass\n```\n\n|a|b|\n|-|-|\n|1|2|"
    bubble = bubbles([{"role": "assistant", "content": content}])
    for part in (
        "<h1>Title</h1>",
        "<strong>bold</strong> <code>a &lt; b</code><br />\nnext <s>no</s>",
        "<li>one</li>\n<li>two</li>",
        '<span>python</span><button type="button" class="copy">Copy</button>',
        "<code>if a &lt; b:\n    pass\n</code></pre>",
        "<td>1</td>\n<td>2</td>",
    ):
        assert part in bubble
    unfinished = render_markdown("```python\nif a")  # as it comes, token by token
    assert "<code>if a</code></pre>" in unfinished.replace("\n", "")


def test_the_longest_text_is_shown_whole_however_it_is_meant():
    content = "**a** " * (MAX_CHARACTERS // 6 + 1)
    assert text_of(render_markdown(content)) == content


class Tags(HTMLParser):
    """Every tag of a text with its attributes, as a browser would see them."""

    def __init__(self, shown: str):
        super().__init__()
        self.seen: list[tuple[str, dict[str, str | None]]] = []
        self.feed(shown)

    def handle_starttag(self, tag, attrs):
        self.seen.append((tag, dict(attrs)))


MARKDOWN_TAGS = set(
    [
        "p",
        "br",
        "hr",
        "h1",
        "h2",
        "h3",
        "h4",
        "h5",
        "h6",
        "strong",
        "em",
        "s",
        "code",
        "pre",
        "a",
        "ul",
        "ol",
        "li",
        "blockquote",
        "table",
        "thead",
        "tbody",
        "tr",
        "th",
        "td",
        "div",
        "span",
        "button",
    ]
)
ATTRIBUTES = {
    "a": {"href", "title", "target", "rel"},
    "ol": {"start"},
    "th": {"style"},
    "td": {"style"},
    "div": {"class", "tabindex"},
    "pre": {"tabindex"},
    "button": {"type", "class"},
}
HOSTILE = [
    "<script>alert(1)</script>",
    "<img src=x onerror=alert(1)>",
    "a <b onclick=alert(1)>b</b> <!-- c --> <?php d ?> <![CDATA[e]]>",
    "<div\nonmouseover=alert(1)\n>",
    "![a](https://elsewhere.example/pixel.png)",
    "![a][b]\n\n[b]: https://elsewhere.example/pixel.png",
    "[a](javascript:alert(1)) [a](JaVaScRiPt:alert(1)) [a](java\tscript:alert(1))",
    "[a](&#x6a;avascript:alert(1)) [a](&#0000106avascript:alert(1)) [a](\\javascript:alert(1))",
    "[a](<javascript:alert(1)>) <javascript:alert(1)> [a](vbscript:x) [a](data:text/html,<script>1</script>)",
    "[a][b]\n\n[b]: javascript:alert(1) 'onclick=alert(1)'",
    "[a](data:image/svg+xml;base64,PHN2Zz4=) [a](file:///etc/passwd) [a](//elsewhere.example) [a](/gradio_api/logout)",
    '[a](https://x.example/"onclick=alert(1)//) [a](https://x.example "b\\" onclick=\\"alert(1)")',
    '```"><img/src=x/onerror=alert(1)>\ncode\n```',
    "```py onclick=alert(1)\n</code></pre><script>alert(1)</script>\n```",
    "`</code><script>alert(1)</script>`",
    "    </code></pre><script>alert(1)</script>",
    "|<script>|b|\n|:-:|-|\n|<img src=x onerror=alert(1)>|`|`|",
    "<https://x.example/?a=<script>> <a@b.example>",
    "${alert(1)} {{alert(1)}} @children",
]


@given(
    st.lists(st.sampled_from([*HOSTILE, "\n", "\n\n", "> ", "- ", "1. ", "```", "`", "**", "[", "](", ")", "<", '"']))
)
@example(HOSTILE)
def test_no_answer_brings_a_script_a_handler_an_image_or_a_link_that_is_none(parts):
    for tag, attributes in Tags(render_markdown("".join(parts)) + render_markdown("\n\n".join(parts))).seen:
        assert tag in MARKDOWN_TAGS
        assert set(attributes) <= ATTRIBUTES.get(tag, set())
        if tag == "a":
            assert attributes["href"].startswith(("https://", "http://", "mailto:"))
            assert attributes["rel"] == "noopener noreferrer nofollow"
        assert attributes.get("style", "text-align:left") in {
            f"text-align:{side}" for side in ("left", "center", "right")
        }


def test_a_token_and_its_alternatives_are_text_tags_and_quotes_and_all():
    token_text = "<img src=x onerror='a'>\"><script>"
    shown = span(token_text, [Token(1, token_text, -0.5, ((1, token_text, -0.5), (2, "&amp;", -1.0)))])
    form = r'<span class="token" style="--p:0.607" data-about="([^"<>]*)">([^<>]*)</span>'
    tooltip, text = map(html.unescape, re.fullmatch(form, shown).groups())
    assert text == token_text
    assert json.loads(tooltip) == {"text": token_text, "p": 60.7, "others": [[token_text, 60.7], ["&amp;", 36.8]]}
    kinds = [
        re.match(r'<span class="([^"]*)"', span(text, [Token(1, text, -1.0, ())]))[1] for text in ("\n\n", " ", "a\n")
    ]
    assert kinds == ["token line", "token", "token"]
