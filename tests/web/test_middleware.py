"""The request filter by itself: what it lets through, what it refuses with which status, and the body it passes on."""

import asyncio
import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from smollm_jax.web import middleware
from smollm_jax.web.middleware import MAX_BODY, RefusedError, RequestFilter, host_name, read_body

HOST = {b"host": "localhost:7860"}
CALL: dict[str, Any] = {"fn_index": 2, "data": [1, 2, 3], "session_hash": "abc"}


def page(app: Any = None, **options: Any) -> RequestFilter:
    return RequestFilter(app, frozenset({"localhost", "::1"}), {2: 3}, lambda session: session == "abc", **options)


REASONS = {
    "this host name is not allowed": 421,
    "requests from another origin are refused": 403,
    "uploads are refused": 403,
    "only GET, HEAD and POST are allowed": 405,
    "no such page": 404,
    "no such session": 404,
    "session_hash must be 1 to 64 letters or digits": 422,
    "the body must be a JSON object": 422,
    "event_id must be a string of at most 64 characters": 422,
    "fn_index must be an integer": 422,
    "fn_index must be the number of a function of this page": 422,
    "data must be a list of 3 values": 422,
    "the body is larger than 256 KB": 413,
    "the client disconnected": 400,
    "the body did not arrive within 0 seconds": 408,
    "only HTTP is supported": 400,
}


def status_of(call: Any) -> int:
    with pytest.raises(RefusedError) as raised:
        call()
    status, reason = raised.value.status, raised.value.reason
    assert len(reason.splitlines()) == 1
    expected = 400 if reason.startswith("the body is not valid JSON: ") else REASONS[reason]
    assert status == expected
    return status


@pytest.mark.parametrize(
    "path",
    ["/", "/config", "/config/", "/theme.css", "/assets/a/b-1.js", "/gradio_api/info", "/gradio_api/heartbeat/a1"],
)
@pytest.mark.parametrize("method", ["GET", "HEAD"])
def test_what_the_page_asks_for_is_allowed(method, path):
    page().check(method, path, HOST)
    page().check(method, path, HOST | {b"origin": "http://localhost:7860"})
    page().check(method, path, HOST | {b"origin": "https://localhost:7860"})


@pytest.mark.parametrize("path", ["/gradio_api/queue/join", "/gradio_api/cancel", "/gradio_api/reset"])
def test_calls_are_allowed_by_post_alone(path):
    page().check("POST", path, HOST)
    assert status_of(lambda: page().check("GET", path, HOST)) == 404


@pytest.mark.parametrize(
    ("method", "path", "headers", "status"),
    [
        ("GET", "/", {}, 421),
        ("GET", "/", {b"host": "other"}, 421),
        ("GET", "/", {b"host": "["}, 421),
        ("GET", "/", HOST | {b"origin": "null"}, 403),
        ("GET", "/", HOST | {b"origin": "http://None"}, 403),
        ("GET", "/", HOST | {b"origin": "http://localhost"}, 403),
        ("GET", "/", HOST | {b"origin": "ftp://localhost:7860"}, 403),
        ("POST", "/upload", HOST, 403),
        ("GET", "/gradio_api/upload_progress/x", HOST, 404),
        ("GET", "/gradio_api/component_server/x", HOST, 403),
        ("PUT", "/", HOST, 405),
        ("POST", "/", HOST, 404),
        ("GET", "/assets/../x", HOST, 404),
        ("GET", "/assets/a/../x", HOST, 404),
        ("GET", "/assets/.x", HOST, 404),
        ("GET", "/gradio_api/file=x", HOST, 404),
        ("GET", f"/gradio_api/heartbeat/{'a' * 65}", HOST, 404),
    ],
)
def test_other_hosts_origins_methods_and_routes_are_refused(method, path, headers, status):
    assert status_of(lambda: page().check(method, path, headers)) == status


def test_any_host_is_allowed_where_none_are_named():
    RequestFilter(None, None, {}, bool).check("GET", "/", {b"host": "page.example"})
    RequestFilter(None, None, {}, bool).check("GET", "/", {b"host": "page.example", b"origin": "https://page.example"})
    assert status_of(lambda: RequestFilter(None, None, {}, bool).check("GET", "/", {b"origin": "http://None"})) == 403


@pytest.mark.parametrize(("host", "name"), [("a:1", "a"), ("A", "a"), ("[::1]:1", "::1"), ("", ""), ("[", "")])
def test_the_name_in_a_host_header(host, name):
    assert host_name(host) == name


@pytest.mark.parametrize(
    ("change", "status"),
    [
        ({"fn_index": 3}, 422),
        ({"fn_index": "2"}, 422),
        ({"fn_index": 2.0}, 422),
        ({"data": [1, 2]}, 422),
        ({"data": {"a": 1, "b": 2, "c": 3}}, 422),
        ({"session_hash": ""}, 422),
        ({"session_hash": "a b"}, 422),
        ({"session_hash": "a" * 65}, 422),
        ({"session_hash": 5}, 422),
        ({"extra": float("inf")}, 400),
    ],
)
@pytest.mark.parametrize("path", ["/gradio_api/queue/join", "/gradio_api/run/predict"])
def test_a_call_is_of_a_function_of_the_page_with_its_values(path, change, status):
    page().check_call(json.dumps(CALL | {"session_hash": "new"}).encode(), path)
    assert status_of(lambda: page().check_call(json.dumps(CALL | change).encode(), path)) == status


@pytest.mark.parametrize(
    ("path", "body", "status"),
    [
        ("cancel", {"event_id": "a" * 64, "fn_index": 2, "session_hash": "abc"}, None),
        ("cancel", {"event_id": "a" * 65, "fn_index": 2, "session_hash": "abc"}, 422),
        ("cancel", {"event_id": "a", "fn_index": True, "session_hash": "abc"}, 422),
        ("cancel", {"event_id": "a", "fn_index": 2, "session_hash": "abd"}, 404),
        ("cancel", {"event_id": "a", "fn_index": 2}, 422),
        ("reset", {"event_id": "a"}, None),
        ("reset", {"event_id": 1}, 422),
        ("reset", [], 422),
        ("reset", "a", 422),
    ],
)
def test_a_cancel_is_of_a_session_that_has_called_and_a_reset_names_an_event(path, body, status):
    def check() -> None:
        page().check_call(json.dumps(body).encode(), f"/gradio_api/{path}")

    assert (check() if status is None else status_of(check)) == status


@given(st.binary(max_size=40) | st.text(max_size=20).map(str.encode))
def test_any_bytes_are_a_call_or_refused(content):
    for path in ("/gradio_api/queue/join", "/gradio_api/cancel", "/gradio_api/reset"):
        assert status_of(lambda path=path: page().check_call(content, path)) in (400, 422)


def received(*messages: dict[str, Any], headers: dict[bytes, str] | None = None) -> bytes:
    waiting = list(messages)

    async def receive() -> dict[str, Any]:
        if not waiting:
            await asyncio.sleep(60)
        return waiting.pop(0)

    return asyncio.run(read_body(headers or {}, receive))


def part(body: bytes, more: bool = False) -> dict[str, Any]:
    return {"type": "http.request", "body": body, "more_body": more}


def test_a_body_is_read_whole_up_to_its_limit_of_size_and_time(monkeypatch):
    assert received(part(b"a", True), part(b"bc", True), part(b"")) == b"abc"
    assert received({"type": "http.request"}) == b""
    assert len(received(part(b"a" * MAX_BODY), headers={b"content-length": str(MAX_BODY)})) == MAX_BODY
    assert status_of(lambda: received(part(b"a" * MAX_BODY, True), part(b"a"))) == 413
    assert status_of(lambda: received(headers={b"content-length": str(MAX_BODY + 1)})) == 413
    assert status_of(lambda: received(headers={b"content-length": "9" * 30})) == 413
    assert status_of(lambda: received(headers={b"content-length": "-1"})) == 413
    assert status_of(lambda: received(part(b"a", True), {"type": "http.disconnect"})) == 400
    monkeypatch.setattr(middleware, "BODY_SECONDS", 0.01)
    assert status_of(lambda: received(part(b"a", True))) == 408


PROXY = [(b"X-Forwarded-Host", b"page.example"), (b"Forwarded", b"a"), (b"x-gradio-server", b"a"), (b"x", b"y")]


def asked(
    method: str, path: str, body: bytes = b"", query: bytes = b"", headers: Any = (), **options: Any
) -> tuple[Any, list[Any]]:
    """What the app behind the filter gets (None: it is not asked), and what is sent back."""
    sent, seen = [], []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        seen.append((scope, await receive(), await receive()))
        await send({"type": "http.response.start", "status": 200} | ({"headers": [(b"a", b"b")]} if body else {}))
        await send({"type": "http.response.body", "body": b"fine"})

    waiting = [part(body)]

    async def receive() -> dict[str, Any]:
        return waiting.pop() if waiting else {"type": "http.disconnect"}

    async def send(message: Any) -> None:
        sent.append(message)

    scope = {"type": "http", "method": method, "path": path, "headers": [(b"Host", b"localhost"), *headers]}
    asyncio.run(page(app, **options)(scope | {"query_string": query}, receive, send))
    return (seen or [None])[0], sent


def test_an_answer_and_a_refusal_have_the_headers_of_the_page(caplog):
    content = json.dumps(CALL).encode()
    got, (start, _) = asked("POST", "/gradio_api/queue/join", content)
    scope, first, second = got
    assert first == {"type": "http.request", "body": content, "more_body": False}
    assert second == {"type": "http.disconnect"}, "after the body the app hears of the client itself"
    assert (scope["path"], scope["headers"]) == ("/gradio_api/queue/join", [(b"Host", b"localhost")])
    assert start["headers"] == [(b"a", b"b"), *middleware.HEADERS]
    assert asked("GET", "/")[1][0]["headers"] == middleware.HEADERS
    got, (start, answer) = asked("POST", "/gradio_api/queue/join", b"{")
    assert (got, start["status"], answer["type"]) == (None, 400, "http.response.body")
    headers = dict(start["headers"])
    assert headers[b"content-type"] == b"application/json"
    assert headers[b"connection"] == b"close"
    assert headers[b"content-length"] == str(len(answer["body"])).encode()
    assert headers[b"content-security-policy"] == middleware.CONTENT_SECURITY_POLICY.encode()
    assert json.loads(answer["body"])["detail"].startswith("the body is not valid JSON: the body: ")
    assert [record.getMessage()[:55] for record in caplog.records] == [
        "refused: POST '/gradio_api/queue/join': 400, the body i"
    ]
    assert caplog.records[0].name == middleware.__name__


def test_a_proxys_headers_reach_the_app_and_allow_its_name_only_behind_a_proxy():
    scope, *_ = asked("GET", "/", headers=PROXY)[0]
    assert scope["headers"] == [(b"Host", b"localhost"), (b"x", b"y")]
    scope, *_ = asked("GET", "/", headers=PROXY, behind_proxy=True)[0]
    assert scope["headers"] == [(b"Host", b"localhost"), *PROXY]
    for origin, behind_proxy, status in (
        (b"https://page.example", True, 200),
        (b"https://page.example", False, 403),
        (b"https://localhost", True, 200),
        (b"https://other.example", True, 403),
    ):
        sent = asked("GET", "/", headers=[*PROXY, (b"origin", origin)], behind_proxy=behind_proxy)[1]
        assert sent[0]["status"] == status


def test_the_start_of_the_app_passes_and_what_is_not_http_is_refused():
    seen = []

    async def app(*arguments: Any) -> None:
        seen.append(arguments)

    async def nothing(*_: Any) -> Any:
        return None

    scope = {"type": "lifespan"}
    asyncio.run(page(app)(scope, nothing, nothing))
    assert seen == [(scope, nothing, nothing)]
    assert status_of(lambda: asyncio.run(page(app)({"type": "websocket"}, nothing, nothing))) == 400


def test_events_are_for_a_session_that_has_called():
    for query, status in ((b"session_hash=abc", 200), (b"session_hash=abd", 404), (b"", 422)):
        assert asked("GET", "/gradio_api/queue/data", query=query)[1][0]["status"] == status
    assert asked("GET", "/config", query=b"session_hash=abd")[1][0]["status"] == 200
