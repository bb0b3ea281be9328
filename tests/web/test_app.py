"""The web page over HTTP: its answers, its errors, and its limits."""

import asyncio
import contextlib
import gc
import html
import http.client
import itertools
import json
import re
import socket
import threading
import time
import tracemalloc
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import GeneratorType, SimpleNamespace
from unittest import mock

import httpx
import jax
import pytest
import uvicorn

from smollm_jax.commands import app
from smollm_jax.generation.engine import Engine
from smollm_jax.generation.sampling import Sampling
from smollm_jax.web import server
from smollm_jax.web.chat_tab import bubbles
from smollm_jax.web.middleware import RequestFilter
from smollm_jax.web.model_store import ModelStore
from smollm_jax.web.responses import Handlers
from smollm_jax.web.token_html import TintedText
from tests.serving import GREEDY, Client, applied, served, tiny_weights

SECRET = "the-secret-of-the-machine"


@pytest.fixture(scope="module")
def place(tmp_path_factory, weights_path) -> Path:
    """A folder with assets/tiny and no run, next to a secret file."""
    folder = tmp_path_factory.mktemp("web")
    tiny_weights(folder, weights_path)
    (folder / "secret.txt").write_text(SECRET)
    return folder


def flags(place: Path, **changed) -> app.Flags:
    options = {"weights": place / "assets/tiny", "assets": place / "assets", "runs": place / "runs"}
    return app.Flags(**(options | changed))


@pytest.fixture(scope="module")
def url(place):
    with served(flags(place)) as address:
        yield address


@pytest.fixture
def client(url, place):
    with Client(url, str(place / "assets/tiny")) as one:
        yield one


@pytest.fixture(scope="module")
def engine(place) -> Engine:
    return Engine.load(place / "assets/tiny")


def text_of(shown: str) -> str:
    """The visible text of the answer's HTML."""
    return html.unescape(re.sub(r"<[^>]*>", "", shown))


def greedy_text(engine: Engine, prompt: str, tokens: int = 16) -> str:
    return engine.complete([engine.encode(prompt)], max_new_tokens=tokens)[0].text


def test_a_completion_is_the_engine_s_own_text_with_a_tint_and_alternatives_a_token(client, engine):
    values, error = client.complete("Fellow citizens")
    assert not error
    shown, status = values[:2]
    assert text_of(shown) == "Fellow citizens" + greedy_text(engine, "Fellow citizens")
    tooltips = [json.loads(html.unescape(tooltip)) for tooltip in re.findall(r'data-about="([^"]*)"', shown)]
    assert len(tooltips) == 16
    for tooltip in tooltips:  # greedy: the chosen token is the likeliest
        assert tooltip["others"][0] == [tooltip["text"], tooltip["p"]]
        assert len(tooltip["others"]) == 6
    assert "tiny" in status
    assert "cpu" in status
    assert "tokens/s" in status


def test_a_chat_goes_through_the_template_and_takes_the_system_prompt_and_earlier_turns(client, engine):
    before = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]
    values, error = client.call("chat", "chat", [client.weights, before, "Be brief.", "Why?", "", *GREEDY.values()])
    assert not error
    shown, *_, turns, reads, box = values
    messages = [{"role": "system", "content": "Be brief."}, *before, {"role": "user", "content": "Why?"}]
    ids = engine.chat(messages)
    assert reads == engine.tokenizer.decode(ids)
    answer = engine.complete([ids], max_new_tokens=16)[0].text
    assert turns == [*before, {"role": "user", "content": "Why?"}, {"role": "assistant", "content": answer}]
    assert shown == bubbles(turns)
    assert "value" not in box, "it would take away what is typed meanwhile"


@pytest.mark.parametrize("first", [1, 7, 20])
def test_a_text_that_the_limit_cut_goes_on_as_if_it_had_not_been_cut(client, engine, first):
    prompt, ids = "Fellow citizens", engine.encode("Fellow citizens")
    session = f"cut{first}"
    values, _ = client.complete(prompt, session=session, max_new_tokens=first)
    assert 'title="token limit"' in values[0]
    values, error = client.call(session, "complete_on", [None, "", *(GREEDY | {"max_new_tokens": 9}).values()])
    assert not error
    assert text_of(values[0]) == prompt + engine.complete([ids], max_new_tokens=first + 9)[0].text
    assert values[0].count('class="finish"') == 1
    messages = [{"role": "user", "content": "Why?"}]
    sampling = list((GREEDY | {"max_new_tokens": first}).values())
    _, turns, *_ = client.call(session, "chat", [client.weights, [], "", "Why?", "", *sampling])[0][5:]
    values, error = client.call(session, "chat_on", [None, turns, "", "next", "", *GREEDY.values()])
    assert not error
    answer = engine.complete([engine.chat(messages)], max_new_tokens=first + 16)[0].text
    assert values[6] == [*messages, {"role": "assistant", "content": answer}]
    assert values[7] == engine.tokenizer.decode(engine.chat(messages)) + turns[-1]["content"]
    changed, error = client.call(session, "chat_on", [None, turns[:1], "", "", "", *GREEDY.values()])
    assert changed is None
    assert "the chat has changed" in error


def test_a_text_that_was_cut_inside_a_character_goes_on_without_that_half(place, engine):
    samplings = [Sampling(1.9, seed=seed) for seed in range(16)]
    rows = engine.complete([engine.encode("a")] * 16, max_new_tokens=48, sampling=samplings)
    halves = [
        (seed, place) for seed, row in enumerate(rows) for place, t in enumerate(row.tokens) if t.text == "\ufffd"
    ]
    seed, count = next((seed, place) for seed, place in halves if place)  # the first byte of a character, or one alone
    folders = {"assets": place / "assets", "runs": place / "runs"}
    store = ModelStore(initial_weights=place / "assets/tiny", **folders, fetch=["false"])
    handlers = Handlers(store, device="cpu", time_limit=60)
    numbers = GREEDY | {"temperature": 1.9, "seed": seed, "max_new_tokens": count + 1}
    *_, last = handlers.complete(str(place / "assets/tiny"), "a", numbers, "")
    assert last.truncated.new_tokens == count
    assert text_of(last.content) == text_of(last.truncated.content) + "\ufffd"
    *_, continuation = handlers.continue_completion(last.truncated, numbers | {"max_new_tokens": 4}, "")
    assert continuation.truncated.ids[: len(last.truncated.ids)] == last.truncated.ids
    assert text_of(continuation.truncated.content) == engine.tokenizer.decode(continuation.truncated.ids)


def test_a_text_ends_where_the_context_is_full_and_says_so(client, engine):
    prompt = "a b c d " * 100
    values, error = client.complete(prompt, max_new_tokens=512)
    assert not error
    assert text_of(values[0]) == prompt + engine.complete([engine.encode(prompt)], max_new_tokens=111)[0].text
    assert 'title="context full"' in values[0]
    assert "context full" in values[1]
    assert values[3]["visible"] is False, "there is no room to go on in"


def test_there_is_nothing_to_go_on_with_before_a_text_was_cut(client):
    for function, values in (("complete_on", [None, ""]), ("chat_on", [None, [], "", "", ""])):
        values, error = client.call("fresh", function, [*values, *GREEDY.values()])
        assert values is None
        assert error == "there is no text to continue"


@pytest.mark.parametrize("message", ["", " ", "\n\t "])
def test_an_empty_message_changes_nothing(client, message):
    before = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]
    values, error = client.call("empty", "chat", [client.weights, before, "", message, "", *GREEDY.values()])
    assert not error
    assert all(value is None or "value" not in value for value in values)


def test_what_a_chat_refuses_leaves_the_chat_the_message_and_the_status_as_they_were(client):
    before = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]
    call = [client.weights, before, "", "Why? " * 600, "", *GREEDY.values()]
    assert client.join("refused", "chat", call).status_code == 200
    output = None
    for event in client.events("refused"):
        if event["msg"] == "process_generating":
            output = applied(output, event["output"]["data"])
        if event["msg"] == "process_completed":
            break
    assert output[0] == bubbles(before)
    assert "value" not in output[1]
    assert "exceed the context" in output[2]
    assert output[6] == before
    assert output[8] == "Why? " * 600


@pytest.mark.parametrize(
    ("changed", "named"),
    [
        ({"temperature": float("nan")}, "NaN"),
        ({"temperature": float("inf")}, "NaN"),
        ({"temperature": -0.1}, "temperature"),
        ({"temperature": "0.5"}, "temperature"),
        ({"temperature": True}, "temperature"),
        ({"temperature": None}, "temperature"),
        ({"top_p": 0}, "top_p"),
        ({"top_p": [1]}, "top_p"),
        ({"min_p": 1}, "min_p"),
        ({"top_k": 1.5}, "top_k"),
        ({"top_k": 10**90}, "top_k"),
        ({"top_k": 10**400}, "too large a number"),
        ({"repetition_penalty": 1e308}, "repetition_penalty"),
        ({"max_new_tokens": 0}, "max_new_tokens"),
        ({"max_new_tokens": 10**9}, "max_new_tokens"),
        ({"seed": -1}, "seed"),
        ({"seed": {}}, "seed"),
        ({"stop": ["a"]}, "stop"),
        ({"stop": "a\n" * 9}, "stop"),
        ({"weights": "/etc"}, "weights"),
        ({"weights": None}, "weights"),
        ({"weights": "assets/../assets/tiny"}, "weights"),
        ({"prompt": 5}, "prompt"),
        ({"prompt": None}, "prompt"),
        ({"prompt": {"text": "a"}}, "prompt"),
        ({"prompt": "\ud800"}, "surrogate"),
    ],
)
def test_a_value_of_the_wrong_kind_or_range_is_refused_by_name(client, changed, named):
    prompt = changed.get("prompt", "Hello")
    values, error = client.complete(prompt, **{name: value for name, value in changed.items() if name != "prompt"})
    assert values is None
    assert named in error
    assert "\n" not in error


def test_an_empty_prompt_is_a_text_from_nothing(client):
    values, error = client.complete("")
    assert not error
    assert text_of(values[0])


@pytest.mark.parametrize(
    "turns",
    ["hello", [1], [{"role": "system", "content": "a"}], [{"role": "user", "content": {"path": "/etc/passwd"}}], [{}]],
)
def test_a_chat_that_is_none_is_refused(client, turns):
    values, error = client.call("chat", "chat", [client.weights, turns, "", "Hi", "", *GREEDY.values()])
    assert values is None
    assert "chat" in error or "message" in error


@pytest.mark.parametrize(
    ("body", "status"),
    [
        (b"{", 400),
        (b"[" * 100_000, 400),
        (b"[]", 422),
        (b'{"fn_index": 999, "data": [], "session_hash": "a"}', 422),
        (b'{"fn_index": "0", "data": [], "session_hash": "a"}', 422),
        (b'{"fn_index": 0, "data": [1], "session_hash": "a"}', 422),
        (b'{"fn_index": 0, "data": 5, "session_hash": "a"}', 422),
        (b'{"fn_index": 0, "data": [1,1,1,1,1,1,1,1,1,1], "session_hash": 5}', 422),
    ],
)
def test_a_malformed_call_is_refused(client, body, status):
    answer = client.http.post("/gradio_api/queue/join", content=body, headers={"content-type": "application/json"})
    assert answer.status_code == status
    assert len(answer.json()["detail"].splitlines()) == 1


CANCEL = {"session_hash": "nobody", "fn_index": 0, "event_id": "none"}


@pytest.mark.parametrize(
    ("path", "body", "status"),
    [
        ("queue/join", {"trigger_id": float("nan")}, 400),
        ("cancel", CANCEL, 404),
        ("cancel", CANCEL | {"session_hash": [1]}, 422),
        ("cancel", CANCEL | {"fn_index": 1e9}, 422),
        ("cancel", {"event_id": float("nan")}, 400),
        ("reset", {"event_id": None}, 422),
        ("reset", {"event_id": float("inf")}, 400),
        ("queue/data?session_hash=nobody", None, 404),
        ("queue/data?session_hash=", None, 422),
        ("queue/data", None, 422),
    ],
)
def test_what_the_page_does_not_send_is_refused_in_one_line_of_the_log(client, caplog, path, body, status):
    address = f"/gradio_api/{path}"
    content = json.dumps(body)  # httpx refuses NaN
    answer = client.http.get(address) if body is None else client.http.post(address, content=content)
    assert answer.status_code == status
    (line,) = [record.getMessage() for record in caplog.records if not record.name.startswith("http")]
    assert line.startswith(
        f"refused: {'GET' if body is None else 'POST'} '/gradio_api/{path.split('?')[0]}': {status}, "
    )
    assert answer.json()["detail"] in line


@pytest.mark.parametrize("behind_proxy", [False, True])
def test_the_headers_of_a_proxy_are_believed_only_behind_one(behind_proxy):
    async def ask(host: str | None) -> dict:
        seen = {}

        async def app(scope, receive, send):
            seen.update(scope["headers"])

        async def receive():
            return {"type": "http.request"}

        async def send(message):
            seen.update({"status": message["status"]} if "status" in message else {})

        headers = [(b"host", b"localhost"), (b"X-Forwarded-Host", b"page.example"), (b"x-forwarded-proto", b"https")]
        headers += [(b"origin", f"https://{host}".encode())] * (host is not None)
        page = RequestFilter(app, None, {}, bool, behind_proxy=behind_proxy)
        await page({"type": "http", "method": "GET", "path": "/", "headers": headers}, receive, send)
        return seen

    assert (b"X-Forwarded-Host" in asyncio.run(ask(None))) is behind_proxy
    assert (asyncio.run(ask("page.example")).get("status") == 403) is not behind_proxy
    assert asyncio.run(ask("other.example"))["status"] == 403


@contextlib.contextmanager
def answering_after(seconds: float, protocol):
    """The address of a server that answers every request so late."""

    async def app(scope, receive, send):
        await asyncio.sleep(seconds)
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b"late"})

    listener = server.listen("127.0.0.1", 0)
    running = uvicorn.Server(uvicorn.Config(app, log_level="error", lifespan="off", http=protocol))
    thread = threading.Thread(target=running.run, kwargs={"sockets": [listener]})
    thread.start()
    try:
        yield listener.getsockname()
    finally:
        running.should_exit = True
        thread.join()


def test_a_connection_that_asks_for_nothing_is_closed_and_a_slow_answer_is_not(monkeypatch):
    monkeypatch.setattr(server, "IDLE_SECONDS", 0.2)
    with answering_after(1, server.protocol()) as address:
        idle, slow = (socket.create_connection(address, timeout=10) for _ in range(2))
        slow.sendall(b"GET / HTTP/1.1\r\nHost: a\r\nX-Slow")
        assert idle.recv(1) == slow.recv(1) == b""
        assert httpx.get(f"http://127.0.0.1:{address[1]}", timeout=60).text == "late"
    idle.close()
    slow.close()


def test_a_connection_is_not_closed_just_after_a_long_answer():
    """Its client may use it again at that moment."""
    kind, cycle = server.protocol(), SimpleNamespace(response_complete=False)
    connection = SimpleNamespace(cycle=cycle, loop=mock.Mock(), transport=mock.Mock())
    connection._watch = lambda: kind._watch(connection)
    connection._close_if_idle = lambda *values: kind._close_if_idle(connection, *values)

    def fire() -> int:
        _, callback, *values = connection.loop.call_later.call_args.args
        callback(*values)
        return connection.transport.close.call_count

    connection._watch()
    cycle.response_complete = True
    assert [fire(), fire()] == [0, 1]


def test_an_address_has_as_many_connections_as_it_may_and_new_ones_when_they_end(caplog):
    request = b"GET / HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n"

    def opened(source: str) -> socket.socket:
        client = socket.create_connection(address, timeout=10, source_address=(source, 0))
        with contextlib.suppress(ConnectionError):  # closed already
            client.sendall(request)
        return client

    def answer(client: socket.socket) -> bytes:
        with client, contextlib.suppress(ConnectionError):
            return client.makefile("rb").read()
        return b""

    with answering_after(1, server.protocol(2)) as address:
        clients = [opened(source) for source in ("127.0.0.1", "127.0.0.1", "127.0.0.1", "127.0.0.2")]
        assert [b"late" in answer(client) for client in clients] == [True, True, False, True]
        assert b"late" in answer(opened("127.0.0.1"))
    assert "refused: a connection of 127.0.0.1, which has 2 open" in caplog.text
    assert server.per_address("0.0.0.0", 400) == 100
    assert server.per_address("127.0.0.1", 400) is None


def test_a_prompt_of_ten_megabytes_is_refused_before_it_is_read_whole(client):
    assert client.join("large", "complete", client.values("a" * (10 << 20))).status_code == 413

    def parts():
        for _ in range(160):
            yield b"a" * (64 << 10)

    sent = client.http.post("/gradio_api/queue/join", content=parts())  # of no stated length
    assert sent.status_code == 413


def test_a_prompt_that_cannot_fit_the_context_is_refused_before_it_is_tokenised(client, engine, monkeypatch):
    longest = max(len(token.encode()) for token in engine.tokenizer.core.get_vocab())
    monkeypatch.delattr(Engine, "encode")
    _, error = client.complete("a" * (longest * 512))
    assert "exceed the context of 512" in error
    monkeypatch.undo()
    _, error = client.complete("a b c d " * 300)
    assert "exceed the context of 512" in error


TRAVERSALS = [
    "/gradio_api/file={secret}",
    "/gradio_api/file=../secret.txt",
    "/file={secret}",
    "/file/{secret}",
    "/gradio_api/file=%2e%2e%2fsecret.txt",
    "/gradio_api/file=file://{secret}",
    "/static/../../../../../../../../../..{secret}",
    "/assets/..%2f..%2f..%2f..%2f..%2f..%2f..%2f..%2f..{secret}",
    "/assets/%252e%252e/%252e%252e/{secret}",
    "/static//{secret}",
    "/assets/..%5c..%5csecret.txt",
    "/gradio_api/custom_component/../../{secret}/client/component/x",
    "/svelte/../..{secret}",
    "/gradio_api/proxy=file://{secret}",
    "/gradio_api/stream/a/b/c/playlist-file?path={secret}",
    "/assets/x%00{secret}",
]


@pytest.mark.parametrize("payload", TRAVERSALS)
def test_no_path_leads_to_a_file_of_the_machine(url, place, payload):
    host, port = url.removeprefix("http://").split(":")
    connection = http.client.HTTPConnection(host, int(port), timeout=30)
    connection.request("GET", payload.format(secret=place / "secret.txt"))  # sent as it is, unlike by most clients
    answer = connection.getresponse()
    assert answer.status in (400, 403, 404)
    assert SECRET.encode() not in answer.read()
    connection.close()


@pytest.mark.parametrize("path", ["/gradio_api/upload", "/upload", "/gradio_api/process_recording"])
def test_uploads_are_refused(client, path):
    assert client.http.post(path, files={"files": ("a.txt", b"content")}).status_code == 403


def test_requests_of_another_origin_or_under_another_name_are_refused(client):
    for host in ("evil.example", "[", "127.0.0.1.evil.example", ""):
        assert client.http.get("/config", headers={"host": host}).status_code == 421
    assert client.http.get("/config", headers={"origin": "http://evil.example"}).status_code == 403
    assert client.http.get("/config", headers={"origin": "null"}).status_code == 403
    assert client.http.get("/config").status_code == 200


def test_the_browser_is_told_to_ask_no_other_host(client):
    policy = client.http.get("/").headers["content-security-policy"]
    assert "default-src 'self'" in policy
    assert "http" not in policy


def test_fifty_requests_at_once_each_get_their_own_answer(url, client, engine):
    prompts = [f"Request number {i} says" for i in range(50)]

    def ask(i: int) -> str:
        with Client(url, client.weights) as visitor:
            values, error = visitor.complete(prompts[i], session=f"parallel{i}", max_new_tokens=8)
            assert not error
            return text_of(values[0])

    with ThreadPoolExecutor(50) as pool:
        answers = list(pool.map(ask, range(50)))
    assert answers == [prompt + greedy_text(engine, prompt, 8) for prompt in prompts]


@pytest.fixture
def streams(monkeypatch) -> list[GeneratorType]:
    """Every stream the engine begins."""
    started = []
    real = Engine.stream

    def stream(*arguments, **options):
        started.append(real(*arguments, **options))
        return started[-1]

    monkeypatch.setattr(Engine, "stream", stream)
    return started


def ends(stream: GeneratorType, seconds: float = 30) -> bool:
    began = time.monotonic()
    while stream.gi_frame is not None and time.monotonic() - began < seconds:
        time.sleep(0.01)
    return stream.gi_frame is None


LONG = {"max_new_tokens": 480, "prompt": "On and on"}


def begin(client: Client, session: str):
    """Starts a long completion and waits for its first tokens."""
    assert client.join(session, "complete", client.values(LONG["prompt"], max_new_tokens=480)).status_code == 200
    events = client.events(session)
    generating = (event for event in events if event["msg"] == "process_generating")
    first = next(event for event in generating if 'class="token"' in str(event))  # those before say what is loaded
    return events, first["event_id"]


def test_a_client_that_goes_away_ends_the_computing(client, streams):
    events, _ = begin(client, "gone")
    assert streams[0].gi_frame is not None, "it ended by itself: the test shows nothing"
    events.close()
    assert ends(streams[0])
    assert client.complete("And then?")[1] == ""


def test_stop_ends_the_computing(client, streams):
    events, event_id = begin(client, "stopped")
    number = client.functions["complete"]
    body = {"session_hash": "stopped", "fn_index": number, "event_id": event_id}
    assert streams[0].gi_frame is not None, "it ended by itself: the test shows nothing"
    assert client.http.post("/gradio_api/cancel", json=body).status_code == 200
    assert ends(streams[0])
    events.close()


def test_what_waits_is_bounded_and_the_next_is_refused_in_words(place):
    with served(flags(place, max_queue=2)) as url, Client(url, str(place / "assets/tiny")) as client:
        running, _ = begin(client, "first")
        for name in ("second", "third"):
            assert client.join(name, "complete", client.values("Wait")).status_code == 200
        refused = client.join("fourth", "complete", client.values("Me too"))
        assert refused.status_code == 503
        assert "full" in refused.json()["detail"]
        running.close()
        for name in ("second", "third"):
            assert [event for event in client.events(name) if event["msg"] == "process_completed"]
        assert client.call("later", "complete", client.values("Now?"))[1] == ""


@pytest.mark.parametrize("function", ["complete", "chat", "compare"])
def test_nothing_is_written_past_the_queue(client, function):
    number = client.functions[function]
    width = next(len(d["inputs"]) for d in client.http.get("/config").json()["dependencies"] if d["id"] == number)
    body = {"fn_index": number, "data": [None] * width, "session_hash": "past"}
    answer = client.http.post("/gradio_api/run/predict", json=body)
    assert answer.status_code == 404, answer.text
    assert "queue" in answer.text


def test_a_request_ends_at_the_time_limit(place, streams):
    with served(flags(place, time_limit=0.4)) as url, Client(url, str(place / "assets/tiny")) as client:
        values, error = client.complete(LONG["prompt"], max_new_tokens=480)
        assert not error
        assert "stopped by the time limit" in values[1]
        assert 'title="stopped by the time limit"' in values[0]
        assert streams[-1].gi_frame is None


def resident_megabytes() -> float:
    return int(re.search(r"VmRSS:\s+(\d+)", Path("/proc/self/status").read_text())[1]) / 1024


@pytest.fixture
def traced() -> Iterator[None]:
    tracemalloc.start()
    yield
    tracemalloc.stop()


def held_kilobytes() -> float:
    """The memory of traced Python objects and of JAX arrays."""
    gc.collect()
    return (tracemalloc.get_traced_memory()[0] + sum(array.nbytes for array in jax.live_arrays())) / 1024


@pytest.mark.slow
@pytest.mark.usefixtures("traced")
def test_two_hundred_visits_leave_memory_flat_and_compile_nothing_new(place):
    given = flags(place, max_queue=2)
    compiled = []
    lengths = [5, 60, 120]  # in two buckets of prompt slots
    with served(given) as url, Client(url, str(place / "assets/tiny")) as client:

        def visit(i: int) -> None:
            sampling = {"temperature": (i % 3) / 2, "top_k": i % 5, "seed": i, "repetition_penalty": 1 + (i % 2) / 10}
            _, error = client.complete("a " * lengths[i % 3] + str(i), session=f"soak{i}", max_new_tokens=4, **sampling)
            assert not error

        for i in range(given.connections + 20):  # until as many visits are remembered as ever will be
            visit(i)
        listener = lambda event, *_, **__: compiled.append(event) if "backend_compile" in event else None  # noqa: E731
        jax.monitoring.register_event_duration_secs_listener(listener)
        held, resident = held_kilobytes(), [resident_megabytes()]
        try:
            for i in range(given.connections + 20, given.connections + 120):
                visit(i)
                if (i - given.connections - 20) % 50 == 49:
                    resident.append(resident_megabytes())
            held = held_kilobytes() - held
        finally:
            jax.monitoring.unregister_event_duration_listener(listener)
    assert compiled == []
    print(f"a visit leaves {held / 100:.1f} kB")
    assert held / 100 < 10  # 4.6 seen: the queue Gradio keeps for each of the last 2,000
    # 0.2 MB a visit, in both halves: a leak grows in each, while the allocator may take a block from the system in one.
    assert min(b - a for a, b in itertools.pairwise(resident)) < 10


@pytest.mark.parametrize("seeds", [range(12), pytest.param(range(12, 60), marks=pytest.mark.slow)], ids=len)
def test_a_tinted_text_is_the_engine_s_text_whatever_bytes_and_stop_strings(engine, seeds):
    ids = engine.encode("a")
    for seed in seeds:
        options = {"max_new_tokens": 24, "sampling": Sampling(1.5, seed=seed), "stop": ("e", " the", "<")}
        tinted = TintedText(engine.tokenizer)
        pieces = list(engine.stream([ids], alternatives=3, **options))
        shown = "".join(tinted.add(piece) for piece in pieces) + tinted.end(pieces[-1].finish)
        assert text_of(shown) == engine.complete([ids], **options)[0].text
