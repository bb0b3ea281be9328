"""The web page in a real browser: type, stream, stop, chat, switch checkpoints, watch a run learn, on a phone too.

`SMOLLM_SCREENSHOTS=docs pytest tests/test_browser.py` also writes the screenshots of the README.
"""

import os
import re
import shutil
from pathlib import Path

import pytest

from scripts import app
from tests import trainer
from tests.serving import served, tiny_run, tiny_weights

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
pytestmark = pytest.mark.skipif(
    CHROMIUM is None and not os.environ.get("CI"),
    reason="no chromium on the PATH: the system's package manager has it (apt-get install chromium)",
)
QUIET = "--no-sandbox --disable-gpu --disable-quic --no-first-run --disable-sync --disable-component-update"
SCREENSHOTS = os.environ.get("SMOLLM_SCREENSHOTS")
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
    """Opens the page; at the end of the test, that it asked no other host and that no script failed."""
    opened = []

    def visit(width: int = 1280, height: int = 900, scheme: str = "light"):
        context = browser.new_context(viewport={"width": width, "height": height}, color_scheme=scheme)
        context.set_default_timeout(180_000)  # a busy machine is slow to start a training
        page, faults = context.new_page(), []
        opened.append((context, faults))
        page.on("pageerror", lambda error: faults.append(f"script: {error}"))
        page.on("console", lambda message: faults.append(message.text) if message.type == "error" else None)
        page.on("request", lambda request: None if own(request.url) else faults.append(f"asked {request.url}"))
        page.goto(url)
        page.wait_for_selector("#continue")
        page.wait_for_function("document.querySelector('#token-tip')")
        return page

    def own(address: str) -> bool:
        return address.startswith((url, "data:", "blob:"))

    yield visit
    for context, faults in opened:
        context.close()
        assert faults == []


def set_number(page, knob: str, value: float) -> None:
    page.locator(f"#{knob} input[type=number]").fill(str(value))
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
    """Waits until the chat has so many turns and the last is whole."""
    count_is(page, ".turn", turns)
    page.wait_for_function("document.querySelector('#status').innerText.match(/end of text|token limit/)")


def take(page, name: str, **options) -> None:
    if SCREENSHOTS:
        page.screenshot(path=f"{SCREENSHOTS}/{name}.png", **options)


def tab(page, name: str) -> None:
    page.get_by_role("tab", name=name).click()


def test_a_typed_prompt_is_continued_token_by_token_with_its_alternatives_at_hand(visit):
    page = visit(height=980)
    assert REAL in page.inner_text("#status")
    assert "cpu" in page.inner_text("#status")
    assert "tokens/s" in page.inner_text("#status")
    page.fill("#prompt textarea", "The capital of France is")
    set_number(page, "temperature", 0)
    set_number(page, "max_new_tokens", 24)
    page.evaluate(  # every number of tokens that was on the page, as it came
        """() => { window.counts = new Set(); new MutationObserver(() =>
            window.counts.add(document.querySelectorAll('#answer .token').length)
        ).observe(document.querySelector('#answer'), {childList: true, subtree: true}) }"""
    )
    page.click("#continue")
    page.wait_for_selector("#answer .finish")
    assert page.inner_text("#answer").startswith("The capital of France is Paris.")
    assert page.evaluate("window.counts.size") > 3, "it came at once"
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


def test_stop_ends_the_text_and_the_next_prompt_is_answered(visit):
    page = visit()
    pick(page, "#weights", "assets/tiny")
    page.fill("#prompt textarea", "On and on")
    set_number(page, "max_new_tokens", 480)
    page.click("#continue")
    page.wait_for_function("document.querySelectorAll('#answer .token').length > 3")
    page.click("#stop")
    page.wait_for_timeout(500)
    stopped = tokens(page)
    page.wait_for_timeout(500)
    assert 3 < tokens(page) == stopped < 480
    set_number(page, "max_new_tokens", 3)
    page.click("#continue")
    page.wait_for_selector("#answer .finish")


def test_tags_and_scripts_that_the_model_writes_are_text(visit):
    page = visit()
    once = '<img src="x" onerror="window.hacked = 1"><script>window.hacked = 1</script>${7*7}{{8*8}}\n'
    page.fill("#prompt textarea", once * 3 + "<img")
    set_number(page, "temperature", 0)
    set_number(page, "max_new_tokens", 24)
    page.click("#continue")
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


def test_what_is_refused_is_told_as_text(visit):
    page = visit()
    set_number(page, "top_p", 0.5)
    page.fill("#prompt textarea", "")
    pick(page, "#weights", "assets/tiny")
    page.click("#continue")
    told = page.wait_for_selector("[data-testid=toast-text]")
    assert "a prompt must have at least one token" in told.inner_text()


def test_a_chat_is_answered_retried_edited_and_cleared(visit):
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
    page.wait_for_function("text => document.querySelector('.turn.assistant').innerText != text", arg=first)
    page.wait_for_function("document.querySelector('#seed input').value == '1'")
    answered(page, 2)
    page.click("#edit")
    page.wait_for_function("document.querySelector('#message textarea').value == 'Hello'")
    count_is(page, ".turn", 0)
    page.fill("#message textarea", "Hello again")
    page.click("#send")
    answered(page, 2)
    assert page.locator(".turn.user").all_inner_texts() == ["Hello again"]
    set_number(page, "max_new_tokens", 400)
    page.fill("#message textarea", "And more?")
    page.click("#send")
    count_is(page, ".turn", 4)
    page.click("#stop-chat")
    page.wait_for_timeout(500)
    length = len(page.inner_text("#chat"))
    page.wait_for_timeout(500)
    assert len(page.inner_text("#chat")) == length
    page.click("#clear")
    count_is(page, ".turn", 0)


def test_another_checkpoint_is_picked_and_answers(visit):
    page = visit()
    for name in ("runs/first/checkpoints/0", "runs/first/checkpoints/20"):
        pick(page, "#weights", name)
        page.wait_for_function("name => document.querySelector('#status b').innerText == name", arg=name)
        set_number(page, "max_new_tokens", 4)
        page.click("#continue")
        page.wait_for_function("document.querySelector('#status').innerText.includes('token limit')")
        assert "context 512" in page.inner_text("#status")


def test_a_training_is_watched_as_it_writes_and_its_checkpoints_answer_side_by_side(visit, place):
    page = visit()
    tab(page, "Runs")
    page.wait_for_selector("#runs-table td >> text=first")
    page.wait_for_selector("#curves canvas, #curves svg")
    training = trainer.start(place / "runs/second", "--steps", "24", "--save-every", "12")
    try:
        step = "document.querySelector('#runs-table tbody tr td:nth-child(3)')?.innerText"
        page.wait_for_selector("#runs-table td >> text=second")
        page.wait_for_selector("#runs-table .live")
        page.wait_for_function(
            f"parseInt({step}) >= 1 && document.querySelectorAll('#runs-table tbody tr').length == 2"
        )
        seen = int(page.evaluate(step))
        page.wait_for_function(f"parseInt({step}) > {seen}")
        assert training.wait(timeout=300) == 0
    finally:
        training.kill()
        training.communicate()
    page.wait_for_function(f"parseInt({step}) == 24")
    assert page.locator("#drawn").inner_text().split() == ["Runs", "second", "first"]
    pick(page, "#learner", "second")
    page.wait_for_function("document.querySelector('#steps').innerText.includes('24')")
    page.fill("#learned textarea", "Fellow citizens")
    set_number(page, "max_new_tokens", 12)
    page.click("#compare")
    count_is(page, "#cards .card .finish", 2)
    assert page.locator("#cards h4").all_inner_texts() == ["step 12", "step 24"]
    texts = page.locator("#cards .card").all_inner_texts()
    assert all("Fellow citizens" in text for text in texts)
    take(page, "web-runs", full_page=True)


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_a_narrow_phone_shows_everything_without_scrolling_sideways(visit, scheme):
    page = visit(width=360, height=740, scheme=scheme)
    pick(page, "#weights", "assets/tiny")
    set_number(page, "max_new_tokens", 12)
    page.click("#continue")
    page.wait_for_selector("#answer .finish")
    last = page.locator("#answer .token").last
    last.click()
    tip = page.wait_for_selector("#token-tip.open").bounding_box()
    assert tip["x"] >= 0
    assert tip["x"] + tip["width"] <= 360
    take(page, f"web-phone-{scheme}")
    for name, control in (("Complete", "#continue"), ("Chat", "#send"), ("Runs", "#compare")):
        tab(page, name)
        page.wait_for_selector(control)
        assert page.evaluate("document.documentElement.scrollWidth") <= 360
        page.evaluate("scrollTo(0, document.documentElement.scrollHeight)")
        page.wait_for_function("document.querySelector('#status').getBoundingClientRect().top >= 0")
        assert page.evaluate("scrollY") > 100
        box = page.locator(control).bounding_box()
        assert box["x"] >= 0
        assert box["x"] + box["width"] <= 360
    ink, paper = page.evaluate("(s => [s.color, s.backgroundColor])(getComputedStyle(document.body))")
    brightness = [sum(map(int, re.findall(r"\d+", colour)[:3])) for colour in (ink, paper)]
    assert (brightness[0] > brightness[1]) == (scheme == "dark")
