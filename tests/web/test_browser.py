"""The web page in a real browser: type, stream, stop, chat, switch checkpoints, watch a run learn, on a phone too.

`SMOLLM_SCREENSHOTS=docs pytest tests/web/test_browser.py` also writes the screenshots of README and docs.
"""

import contextlib
import os
import re
import shutil
import time
from pathlib import Path

import pytest

from smollm_jax.commands import app
from smollm_jax.errors import UsageError
from smollm_jax.generation.engine import Engine
from smollm_jax.web.chat_tab import bubbles
from smollm_jax.web.events import error_html, progress_html
from smollm_parity.page import page as parity_page
from smollm_parity.rungs import Rung
from tests import trainer
from tests.serving import served, tiny_run, tiny_weights

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
pytestmark = [
    pytest.mark.skipif(bool(os.environ.get("SMOLLM_WITHOUT_BROWSER")), reason="make BROWSER=no leaves the browser out"),
    pytest.mark.skipif(
        CHROMIUM is None and not os.environ.get("CI"),
        reason="no chromium on the PATH: the system's package manager has it (apt-get install chromium)",
    ),
]
QUIET = "--no-sandbox --disable-gpu --disable-quic --no-first-run --disable-sync --disable-component-update"
SCREENSHOTS = os.environ.get("SMOLLM_SCREENSHOTS")
FILL = "([place, html]) => { document.querySelector(place).innerHTML = html }"  # what a slow server or a model may say
REAL = "assets/SmolLM2-135M-Instruct"


@pytest.fixture(scope="module")
def place(tmp_path_factory, weights_path) -> Path:
    """A folder with assets of the real weights and of tiny ones, and runs/first of two checkpoints."""
    folder = tmp_path_factory.mktemp("browser")
    tiny_weights(folder, weights_path)
    (folder / REAL).symlink_to(weights_path)
    tiny_run(folder, weights_path, "first", (0, 20))
    return folder


@pytest.fixture(scope="module")
def url(place):
    with served(app.Flags(assets=place / "assets", runs=place / "runs")) as address:
        yield address


@pytest.fixture(scope="module")
def browser():
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        arguments = [*QUIET.split(), "--disable-background-networking"]
        chromium = playwright.chromium.launch(executable_path=CHROMIUM, headless=True, args=arguments)
        yield chromium
        chromium.close()


@pytest.fixture
def visit(browser, url):
    """Opens the page; asserts at the end that it contacted no other host and that the console is empty."""
    opened = []

    def visit(width: int = 1280, height: int = 900, scheme: str = "light"):
        context = browser.new_context(viewport={"width": width, "height": height}, color_scheme=scheme)
        context.set_default_timeout(180_000)  # a busy machine is slow to start a training
        page, faults = context.new_page(), []
        opened.append((context, faults))
        page.on("pageerror", lambda error: faults.append(f"script: {error}"))
        page.on(
            "console", lambda message: faults.append(message.text) if message.type in ("error", "warning") else None
        )
        page.on("request", lambda request: None if own(request.url) else faults.append(f"asked {request.url}"))
        page.goto(url)
        page.wait_for_selector("#complete")
        page.wait_for_function("document.querySelector('#token-tip')")
        return page

    def own(address: str) -> bool:
        return address.startswith((url, "data:", "blob:"))

    yield visit
    for context, faults in opened:
        context.close()
        assert faults == []


def set_number(page, name: str, value: float) -> None:
    page.locator(f"#{name} input[type=number]").fill(str(value))
    page.keyboard.press("Tab")


def pick(page, selector: str, name: str) -> None:
    page.click(f"{selector} input")
    page.locator("[role=option]:visible", has_text=re.compile(f"^\\W*{re.escape(name)}$")).click()
    page.keyboard.press("Tab")  # a list for several choices stays open


def tokens(page, inside: str = "#answer") -> int:
    return page.locator(f"{inside} .token").count()


def count_is(page, selector: str, count: int) -> None:
    page.wait_for_function(f"document.querySelectorAll({selector!r}).length == {count}")


def answered(page, turns: int) -> None:
    """Waits until the chat has this many turns and the last one is complete."""
    count_is(page, ".turn", turns)
    page.wait_for_function("document.querySelector('#status-chat').innerText.match(/end of text|token limit/)")


def take(page, name: str, **options) -> None:
    if SCREENSHOTS:
        page.screenshot(path=f"{SCREENSHOTS}/{name}.png", **options)


def tab(page, name: str) -> None:
    page.get_by_role("tab", name=name).click()


def test_a_typed_prompt_is_continued_token_by_token_with_its_alternatives_at_hand(visit):
    page = visit(height=1060)
    assert REAL in page.inner_text("#status")
    assert "cpu" in page.inner_text("#status")
    assert "tokens/s" in page.inner_text("#status")
    page.fill("#prompt textarea", "The capital of France is")
    set_number(page, "temperature", 0)
    set_number(page, "max_new_tokens", 24)
    page.evaluate(  # every number of tokens and every note that was on the page, as it came
        """() => { window.counts = new Set(); window.notes = new Set(); new MutationObserver(() => {
            window.counts.add(document.querySelectorAll('#answer .token').length)
            window.notes.add(document.querySelector('#complete-note').innerText)
        }).observe(document.body, {childList: true, subtree: true}) }"""
    )
    page.click("#complete")
    page.wait_for_selector("#answer .finish")
    assert page.inner_text("#answer").startswith("The capital of France is Paris.")
    assert page.evaluate("window.counts.size") > 3, "it came at once"
    notes = page.evaluate("[...window.notes]")
    for waited_for in ("loading", "compiling, then reading the prompt"):
        assert any(re.fullmatch(rf"{REAL}: {waited_for}\s+\d+ s", note) for note in notes), notes
    assert not page.is_visible("#complete-note")
    assert re.search(r"[\d.]+ tokens/s", page.inner_text("#status"))
    first = page.locator("#answer .token").first
    assert first.evaluate("token => getComputedStyle(token).backgroundColor") != "rgba(0, 0, 0, 0)"
    assert not page.is_visible("#token-tip")
    first.hover()
    page.wait_for_selector("#token-tip.open")
    rows = page.locator("#token-tip .row").all_inner_texts()
    assert len(rows) == 6
    assert rows[0].startswith("\u2423Paris")
    page.locator("#answer .token.line").first.hover()  # a line break, which has no letter to point at
    page.wait_for_function("document.querySelector('#token-tip .row').innerText.startsWith('\u23ce')")
    page.mouse.move(0, 0)
    page.wait_for_selector("#token-tip.open", state="hidden")
    first.click()
    page.mouse.move(0, 0)
    assert page.is_visible("#token-tip"), "a click pins it"
    take(page, "web-complete")
    page.keyboard.press("Escape")
    page.wait_for_selector("#token-tip.open", state="hidden")
    page.focus("#answer")
    for place in (0, 1):  # the keyboard reaches every token
        page.keyboard.press("ArrowRight")
        page.wait_for_function(f"document.querySelectorAll('#answer .token')[{place}].matches('.picked')")
        page.wait_for_selector("#token-tip.open")


def test_stop_ends_the_text_and_the_next_prompt_is_answered(visit):
    page = visit()
    pick(page, "#weights", "assets/tiny")
    page.fill("#prompt textarea", "On and on")
    set_number(page, "max_new_tokens", 480)
    page.click("#complete")
    page.wait_for_function("document.querySelectorAll('#answer .token').length > 3")
    page.click("#stop")
    stopped = 0
    for _ in range(60):  # on a busy machine what was under way takes a while to arrive
        before, _ = stopped, page.wait_for_timeout(500)
        if (stopped := tokens(page)) == before:
            break
    page.wait_for_timeout(1000)
    assert 3 < tokens(page) == stopped < 480
    set_number(page, "max_new_tokens", 3)
    page.click("#complete")
    page.wait_for_selector("#answer .finish")


def test_tags_and_scripts_that_the_model_writes_are_text(visit):
    page = visit()
    once = '<img src="x" onerror="window.hacked = 1"><script>window.hacked = 1</script>${7*7}{{8*8}}\n'
    page.fill("#prompt textarea", once * 3 + "<img")
    set_number(page, "temperature", 0)
    set_number(page, "max_new_tokens", 24)
    page.click("#complete")
    page.wait_for_selector("#answer .finish")
    written = "".join(page.locator("#answer .token").all_inner_texts())
    assert 'src="x" onerror="window.hacked = 1"><script>' in written
    assert "${7*7}{{8*8}}" in page.inner_text("#answer .prompt")
    pick(page, "#weights", "assets/tiny")
    tab(page, "Chat")
    page.fill("#message textarea", f"Repeat: {once}")
    page.click("#send")
    answered(page, 2)
    assert "<script>window.hacked = 1</script>${7*7}{{8*8}}" in page.inner_text(".turn.user")
    assert page.locator("#answer :is(img, script), #chat :is(img, script)").count() == 0
    assert page.evaluate("window.hacked") is None


def test_one_error_at_a_time_stands_beside_its_button_and_the_answer_stays_as_it_was(visit):
    page = visit()
    pick(page, "#weights", "assets/tiny")
    set_number(page, "max_new_tokens", 4)
    page.click("#complete")
    page.wait_for_selector("#answer .finish")
    line = "#status .html-container"
    answer, status = page.inner_text("#answer"), page.inner_text(line)
    pick(page, "#weights", "runs/first")
    page.wait_for_timeout(300)  # for the list to be read anew
    assert page.inner_text(line) == status, "the status line tells of weights that did not answer"
    page.fill("#prompt textarea", "a b c d " * 300)
    for _ in range(2):
        page.click("#complete")
        page.wait_for_selector("#complete-note .fault")
        assert page.locator(".fault").count() == 1
        assert "exceed the context of 512" in page.inner_text(".fault")
        assert (page.inner_text("#answer"), page.inner_text(line)) == (answer, status)
    assert page.locator("[data-testid=toast-text]").count() == 0
    page.fill("#prompt textarea", "a b")
    page.click("#complete")
    page.wait_for_function("document.querySelector('#status b').innerText == 'runs/first'")
    assert page.locator(".fault").count() == 0
    tab(page, "Chat")
    urls = []
    page.on("request", lambda request: urls.append(request.url) if "queue/join" in request.url else None)
    for message in ("", " \n "):
        page.fill("#message textarea", message)
        page.click("#send")
        page.press("#message textarea", "Enter")
    page.wait_for_timeout(300)
    assert urls == [], "an empty message was sent"
    assert page.locator(".turn, .fault").count() == 0


def test_an_answer_s_code_is_rendered_copied_and_goes_on_where_the_limit_cut_it(visit):
    page = visit()
    page.context.grant_permissions(["clipboard-read", "clipboard-write"])
    tab(page, "Chat")
    assert page.locator("#max_new_tokens input[type=number]").input_value() == "512"
    set_number(page, "temperature", 0)
    set_number(page, "max_new_tokens", 16)
    page.fill("#message textarea", "Write a Python function that adds two **numbers**.")
    page.click("#send")
    page.wait_for_selector("#continue-chat", state="visible")
    assert "token limit" in page.inner_text("#status-chat")
    assert "**numbers**" in page.inner_text(".turn.user")
    cut = page.inner_text(".turn.assistant")
    page.click("#continue-chat")
    page.wait_for_function(
        "text => document.querySelector('.turn.assistant')?.innerText.length > text.length + 20", arg=cut
    )
    page.wait_for_selector("#continue-chat", state="visible")
    assert page.inner_text(".turn.assistant").startswith(cut.rstrip())
    code = page.locator(".turn.assistant pre code").first
    assert code.inner_text().startswith("def ")
    assert "mono" in code.evaluate("code => getComputedStyle(code).fontFamily")
    page.locator(".turn.assistant button.copy").first.click()
    page.wait_for_function("document.querySelector('button.copy').innerText == 'Copied'")
    assert page.evaluate("navigator.clipboard.readText()") == code.evaluate("code => code.textContent")
    take(page, "web-chat")


def settled(page, place: str) -> None:
    """Waits until a text has stayed the same for half a second, however busy the machine is."""
    text = None
    while text != (text := page.inner_text(place)):
        page.wait_for_timeout(500)


def slowly(self, *arguments, stream=Engine.stream, **options):
    """`Engine.stream`, slowed down so that a click comes before its end on any machine."""
    with contextlib.closing(stream(self, *arguments, **options)) as pieces:
        for piece in pieces:
            time.sleep(0.1)
            yield piece


def test_a_chat_is_answered_retried_edited_and_cleared(visit, monkeypatch):
    page = visit()
    pick(page, "#weights", "assets/tiny")
    tab(page, "Chat")
    set_number(page, "temperature", 1)
    set_number(page, "max_new_tokens", 12)
    page.fill("#system textarea", "Be brief.")
    page.fill("#message textarea", "Hello")
    page.keyboard.press("Enter")
    answered(page, 2)
    assert page.locator(".turn.user").all_inner_texts() == ["Hello"]
    assert page.input_value("#message textarea") == ""
    first = page.inner_text(".turn.assistant")
    assert first.strip()
    page.get_by_text("What the model reads").click()
    assert "Be brief." in page.input_value("#reads textarea")
    page.click("#retry")
    page.wait_for_function("text => (document.querySelector('.turn.assistant')?.innerText ?? text) != text", arg=first)
    page.wait_for_function("document.querySelector('#seed input').value == '1'")
    answered(page, 2)
    page.click("#edit")
    page.wait_for_function("document.querySelector('#message textarea').value == 'Hello'")
    count_is(page, ".turn", 0)
    page.fill("#message textarea", "Hello again")
    page.click("#send")
    answered(page, 2)
    assert page.locator(".turn.user").all_inner_texts() == ["Hello again"]
    monkeypatch.setattr(Engine, "stream", slowly)
    set_number(page, "max_new_tokens", 400)
    page.fill("#message textarea", "And more?")
    page.click("#send")
    count_is(page, ".turn", 4)
    page.click("#stop-chat")
    settled(page, "#chat")
    assert page.locator("#continue-chat").is_hidden(), "the answer went on to its limit"
    page.click("#clear")
    count_is(page, ".turn", 0)


def test_another_checkpoint_is_picked_answers_and_goes_on(visit):
    page = visit()
    for name in ("runs/first/checkpoints/0", "runs/first/checkpoints/20"):
        pick(page, "#weights", name)
        set_number(page, "max_new_tokens", 4)
        page.click("#complete")
        page.wait_for_function("name => document.querySelector('#status b').innerText == name", arg=name)
        page.wait_for_function("document.querySelector('#status').innerText.includes('token limit')")
        assert "context 512" in page.inner_text("#status")
    pick(page, "#weights", "runs/first/checkpoints/0")
    count_is(page, "#answer .token", 4)
    page.click("#continue")
    count_is(page, "#answer .token", 8)
    page.wait_for_selector("#answer .finish")
    assert page.inner_text("#status b") == "runs/first/checkpoints/20", "other weights went on"


STEP = "document.querySelector('#runs-table tbody tr td:nth-child(3)')?.innerText"


def assert_checkpoints_answer(page, run: str, steps: tuple[int, int]) -> None:
    """A run that has ended, side by side."""
    page.wait_for_function(f"parseInt({STEP}) == {steps[-1]}")
    assert page.locator("#drawn").inner_text().split() == ["Runs", run, "first"]
    pick(page, "#learner", run)
    page.wait_for_function(f"document.querySelector('#steps').innerText.includes('{steps[-1]}')")
    page.fill("#learned textarea", "Fellow citizens")
    set_number(page, "max_new_tokens", 12)
    page.click("#compare")
    count_is(page, "#cards .card .finish", 2)
    assert page.locator("#cards h4").all_inner_texts() == [f"step {step}" for step in steps]
    texts = page.locator("#cards .card").all_inner_texts()
    assert all("Fellow citizens" in text for text in texts)


def see_run_appear(page, name: str) -> None:
    page.wait_for_selector(f"#runs-table td >> text={name}")
    page.wait_for_selector("#runs-table .live")
    page.wait_for_function(f"parseInt({STEP}) >= 1 && document.querySelectorAll('#runs-table tbody tr').length == 2")


def open_runs(page) -> None:
    tab(page, "Runs")
    page.wait_for_selector("#runs-table td >> text=first")
    page.wait_for_selector("#curves svg.marks")


def test_a_run_is_watched_as_it_is_written_and_its_checkpoints_answer_side_by_side(visit, place, weights_path):
    """The files of a training, written here; the slow test below has a training write them."""
    page = visit()
    open_runs(page)
    (place / "written").mkdir()
    written = tiny_run(place / "written", weights_path, "second", (0, 20))
    rows = (written / "metrics.jsonl").read_text().splitlines(keepends=True)
    (written / "metrics.jsonl").write_text(rows[0])
    run = written.rename(place / "runs/second")
    see_run_appear(page, "second")
    with (run / "metrics.jsonl").open("a") as metrics:
        for step, row in enumerate(rows[1:], 2):
            metrics.write(row)
            metrics.flush()
            if step in (2, 3):
                page.wait_for_function(f"parseInt({STEP}) == {step}")
    assert_checkpoints_answer(page, "second", (0, 20))
    run.rename(place / "written/seen")


@pytest.mark.slow
def test_a_training_is_watched_as_it_writes_and_its_checkpoints_answer_side_by_side(visit, place):
    page = visit()
    open_runs(page)
    training = trainer.start(place / "runs/second", "--steps", "240", "--save-every", "120")
    try:
        see_run_appear(page, "second")
        seen = int(page.evaluate(STEP))
        page.wait_for_function(f"parseInt({STEP}) > {seen}")
        assert training.wait(timeout=300) == 0
    finally:
        training.kill()
        training.communicate()
    assert_checkpoints_answer(page, "second", (120, 240))
    page.evaluate("scrollTo(0, 0)")  # the status line stays in sight otherwise, over the tabs
    take(page, "web-runs", full_page=True)


def violations(page) -> list[tuple[str, list[str]]]:
    """The violations of WCAG 2.1 A and AA that axe reports."""
    from axe_playwright_python.sync_playwright import Axe

    rules = {"runOnly": ["wcag2a", "wcag2aa", "wcag21a", "wcag21aa"]}
    return [
        (rule["id"], [node["html"] for node in rule["nodes"]])
        for rule in Axe().run(page, options=rules).response["violations"]
    ]


# What is wider than the window or reaches out of it, but for what scrolls in a box of its own; and names that run under
# the caret of their list.
TOO_WIDE = """() => [...document.querySelectorAll('.gradio-container *')].filter(element => {
    const box = element.getBoundingClientRect()
    const scrolls = element.closest('.code pre, .wide, thead, [role=tablist]')
    return box.width && box.height && box.right > innerWidth + 1 && !scrolls
}).map(element => element.outerHTML.slice(0, 200))"""
UNDER_CARET = """() => [...document.querySelectorAll('input[role=combobox]')].filter(input => {
    const caret = input.closest('.wrap')?.querySelector('.icon-wrap')?.getBoundingClientRect()
    const box = input.getBoundingClientRect()
    return caret?.width && caret.top < box.bottom && caret.bottom > box.top
        && box.right - parseFloat(getComputedStyle(input).paddingRight) > caret.left + 1
}).map(input => input.outerHTML)"""
MARKDOWN = """# Title\n\nSome **bold** `code`, ~~gone~~ and a [link](https://example.org).\n\n- one\n- two\n\n> quoted

```python\ndef add(a, b):\n    return a + b  # %s\n```\n\n| a | b |\n|---|--:|\n| 1 | 2 |\n""" % ("a long line " * 20)


@pytest.mark.parametrize(
    ("width", "scheme"),
    [
        (360, "dark"),
        pytest.param(1280, "light", marks=pytest.mark.slow),
        pytest.param(360, "light", marks=pytest.mark.slow),
        pytest.param(1280, "dark", marks=pytest.mark.slow),
    ],
)
def test_every_tab_can_be_read_reached_and_named_on_a_phone_and_a_desk_in_both_themes(visit, width, scheme):
    page = visit(width=width, height=740, scheme=scheme)
    pick(page, "#weights", "assets/tiny")
    set_number(page, "max_new_tokens", 12)
    page.click("#complete")
    page.wait_for_selector("#answer .finish")
    page.locator("#answer .token").last.click()
    tip = page.wait_for_selector("#token-tip.open").bounding_box()
    assert tip["x"] >= 0
    assert tip["x"] + tip["width"] <= width
    if width == 360:
        take(page, f"web-phone-{scheme}")
    page.keyboard.press("Escape")
    for name, control, status in (
        ("Complete", "#complete", ""),
        ("Chat", "#send", "-chat"),
        ("Runs", "#compare", "-runs"),
    ):
        tab(page, name)
        page.wait_for_selector(control)
        if name == "Complete":
            page.evaluate(FILL, ["#complete-note .html-container", progress_html("assets/tiny: loading")])
            page.wait_for_function("document.querySelector('.waiting .seconds').innerText == '1 s'")
        if name == "Chat":
            chat = [{"role": "user", "content": "Show <b>all</b>"}, {"role": "assistant", "content": MARKDOWN}]
            page.evaluate(FILL, ["#chat .html-container", bubbles(chat)])
            page.evaluate(FILL, ["#chat-note .html-container", error_html(UsageError("it was refused"))])
        if name == "Runs":
            page.wait_for_selector("#curves svg.marks")
            page.click("#compare")
            count_is(page, "#cards .card .finish", 2)
        assert violations(page) == []
        assert page.evaluate("document.documentElement.scrollWidth") <= width
        assert page.evaluate(TOO_WIDE) == []
        assert page.evaluate(UNDER_CARET) == []
        page.evaluate("scrollTo(0, document.documentElement.scrollHeight)")
        page.wait_for_function(f"document.querySelector('#status{status}').getBoundingClientRect().top >= 0")
        assert page.is_visible(f"#status{status}")
        assert page.evaluate("scrollY") > 100
    ink, paper = page.evaluate("(s => [s.color, s.backgroundColor])(getComputedStyle(document.body))")
    brightness = [sum(map(int, re.findall(r"\d+", colour)[:3])) for colour in (ink, paper)]
    assert (brightness[0] > brightness[1]) == (scheme == "dark")


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_the_parity_page_shows_verdict_bound_and_pass_on_a_phone(browser, scheme):
    rungs = [Rung("2 float32", f"RMS error over transformers', layer {i}", 0.84 + i, 1.5, "a noise") for i in range(2)]
    layers = {"jax, float32": [1e-6, 2e-6]}
    curves = {"layers": layers, "positions": {"jax": [1e-6]}, "training": {"jax": [2.0], "twin": [2.0]}}
    metadata = {"weights": "a/path/" * 20, "origin": "", "date": "today", "seconds": 1, "command": "python " * 30}
    report = metadata | {"passed": False, "versions": {"jax": {"jax": "1" * 200}}, "curves": curves}
    page = browser.new_page(viewport={"width": 360, "height": 740}, color_scheme=scheme)
    page.set_content(parity_page(report, rungs))
    assert page.locator("body > :first-child").inner_text().startswith("NOT the same function: 1 of 2 claims failed")
    texts = page.locator(".number, td.pass, td.fail").all_inner_texts()
    assert texts == ["0.84 <= 1.5", "pass", "1.8 > 1.5", "FAIL"]
    for cell in page.locator("td").all():
        box = cell.bounding_box()
        assert box["x"] >= 0
        assert box["x"] + box["width"] <= 360
    assert page.evaluate("document.documentElement.scrollWidth") <= 360
    assert violations(page) == []
    page.close()
