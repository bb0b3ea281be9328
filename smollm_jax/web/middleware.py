"""ASGI middleware around the whole page that refuses requests which the page itself never sends.

Gradio has routes for uploads, files, proxies, streams and plugins that this page does not use. Only the routes that it
uses are allowed, so that no other can read a file, write one or reach another host.
"""

import asyncio
import json
import logging
import re
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any
from urllib.parse import parse_qs, urlsplit

from smollm_jax.errors import InputFileError, short_repr
from smollm_jax.runtime.files import parse_json

MAX_BODY = 256 * 1024  # bytes
BODY_SECONDS = 10.0  # to receive a body; the page sends its own at once

Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]

GET_ROUTES = re.compile(
    r"/|/(config|theme\.css|favicon\.ico|manifest\.json|robots\.txt)/?|/(assets|static|svelte)/[\w@+-][\w./@+-]*"
    r"|/gradio_api/(info/?|app_id/?|startup-events|theme\.css|queue/data|heartbeat/\w{1,64})"
)
EVENTS_ROUTE = "/gradio_api/queue/data"
CANCEL_ROUTE = "/gradio_api/cancel"
# Whoever sends these can choose the address that the page gives of itself; a proxy replaces them.
PROXY_HEADERS = re.compile(rb"forwarded|x-forwarded-.*|x-gradio-server")
CALL_ROUTES = re.compile(r"/gradio_api/(queue/join|run/predict/?)")
POST_ROUTES = re.compile(r"/gradio_api/(queue/join|cancel|reset/?|run/predict/?)")
UPLOAD_ROUTES = re.compile(r"(/gradio_api)?/(upload|process_recording|component_server)\b.*")
# The browser then refuses any request to another host, whatever a text on the page contains. Gradio needs inline styles
# and scripts, and its plots compile expressions.
CONTENT_SECURITY_POLICY = (
    "default-src 'self'; script-src 'self' 'unsafe-inline' 'unsafe-eval'; style-src 'self' 'unsafe-inline'; "
    "img-src 'self' data: blob:; font-src 'self' data:; worker-src 'self' blob:; connect-src 'self'; "
    "object-src 'none'; base-uri 'self'; form-action 'self'; frame-ancestors 'none'"
)
HEADERS = [
    (b"content-security-policy", CONTENT_SECURITY_POLICY.encode()),
    (b"x-content-type-options", b"nosniff"),
    (b"referrer-policy", b"no-referrer"),
]


class RefusedError(Exception):
    """A refused request: its HTTP status and the reason."""

    def __init__(self, status: int, reason: str):
        super().__init__(reason)
        self.status, self.reason = status, reason


class RequestFilter:
    """The app behind checks of route, host, origin, size and arguments; a refusal is one line of the log.

    `hosts`: allowed host names, None for any. `input_counts`: number of values of each of the page's functions.
    `has_session`: whether a session has called one. `behind_proxy`: the headers of a proxy are believed. Host and
    Origin are checked against other sites: they can make a visitor's browser send requests here, even under a host
    name of theirs that resolves to 127.0.0.1.
    """

    def __init__(
        self,
        app: App,
        hosts: frozenset[str] | None,
        input_counts: dict[int, int],
        has_session: Callable[[str], bool],
        *,
        behind_proxy: bool = False,
    ):
        self.app, self.hosts, self.input_counts = app, hosts, input_counts
        self.has_session, self.behind_proxy = has_session, behind_proxy

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await self.app(scope, receive, send)
            return
        if scope["type"] != "http":
            raise RefusedError(400, "only HTTP is supported")

        async def send_with_headers(message: MutableMapping[str, Any]) -> None:
            if message["type"] == "http.response.start":
                message = {**message, "headers": [*message.get("headers", []), *HEADERS]}
            await send(message)

        if not self.behind_proxy:
            kept = [(name, value) for name, value in scope["headers"] if not PROXY_HEADERS.fullmatch(name.lower())]
            scope = {**scope, "headers": kept}
        try:
            headers = {name.lower(): value.decode("latin-1") for name, value in scope["headers"]}
            self.check(scope["method"], scope["path"], headers)
            if scope["path"] == EVENTS_ROUTE:
                self.check_session(parse_qs(scope["query_string"].decode("latin-1")).get("session_hash", [None])[0])
            body = await read_body(headers, receive)
            if scope["method"] == "POST":
                self.check_call(body, scope["path"])
        except RefusedError as error:
            request = f"{scope['method']} {short_repr(scope['path'])}"
            logging.getLogger(__name__).warning("refused: %s: %d, %s", request, error.status, error.reason)
            content = json.dumps({"detail": error.reason}).encode()
            json_headers = [(b"content-type", b"application/json"), (b"content-length", str(len(content)).encode())]
            # A refused body is not read to its end, so the connection cannot be reused.
            await send_with_headers(
                {
                    "type": "http.response.start",
                    "status": error.status,
                    "headers": [*json_headers, (b"connection", b"close")],
                }
            )
            await send_with_headers({"type": "http.response.body", "body": content})
            return
        messages = [{"type": "http.request", "body": body, "more_body": False}]

        async def receive_body_again() -> MutableMapping[str, Any]:
            return messages.pop() if messages else await receive()

        await self.app(scope, receive_body_again, send_with_headers)

    def check(self, method: str, path: str, headers: dict[bytes, str]) -> None:
        """Raises `RefusedError` for a route, host or origin that is not allowed."""
        host = headers.get(b"host", "")
        if self.hosts is not None and host_name(host) not in self.hosts:
            raise RefusedError(421, "this host name is not allowed")
        origin = headers.get(b"origin")
        names = [host, headers.get(b"x-forwarded-host", host)]
        if origin is not None and origin not in [
            f"{scheme}://{name}" for scheme in ("http", "https") for name in names
        ]:
            raise RefusedError(403, "requests from another origin are refused")
        if UPLOAD_ROUTES.fullmatch(path):
            raise RefusedError(403, "uploads are refused")
        allowed = {"GET": GET_ROUTES, "HEAD": GET_ROUTES, "POST": POST_ROUTES}.get(method)
        if allowed is None:
            raise RefusedError(405, "only GET, HEAD and POST are allowed")
        if not allowed.fullmatch(path) or ".." in path:
            raise RefusedError(404, "no such page")

    def check_session(self, session: Any) -> None:
        """Raises `RefusedError` for what is no session, or not one that has called a function."""
        if not isinstance(session, str) or not re.fullmatch(r"\w{1,64}", session):
            raise RefusedError(422, "session_hash must be 1 to 64 letters or digits")
        if not self.has_session(session):
            raise RefusedError(404, "no such session")

    def check_call(self, body: bytes, path: str) -> None:
        """Raises `RefusedError` for a body that is not a JSON object, and for an invalid call, cancel or reset."""
        try:
            value = parse_json(body.decode(), "the body")
        except (UnicodeDecodeError, InputFileError) as error:
            raise RefusedError(400, f"the body is not valid JSON: {error}") from None
        if not isinstance(value, dict):
            raise RefusedError(422, "the body must be a JSON object")
        if CALL_ROUTES.fullmatch(path) is None:
            if not isinstance(value.get("event_id"), str) or len(value["event_id"]) > 64:
                raise RefusedError(422, "event_id must be a string of at most 64 characters")
            if path == CANCEL_ROUTE:
                if type(value.get("fn_index")) is not int:
                    raise RefusedError(422, "fn_index must be an integer")
                self.check_session(value.get("session_hash"))
            return
        number, data = value.get("fn_index"), value.get("data")
        if type(number) is not int or number not in self.input_counts:
            raise RefusedError(422, "fn_index must be the number of a function of this page")
        if not isinstance(data, list) or len(data) != self.input_counts[number]:
            raise RefusedError(422, f"data must be a list of {self.input_counts[number]} values")
        if not isinstance(value.get("session_hash"), str) or not re.fullmatch(r"\w{1,64}", value["session_hash"]):
            raise RefusedError(422, "session_hash must be 1 to 64 letters or digits")


def host_name(host: str) -> str:
    """The name or address in a Host header, without its port."""
    try:
        return urlsplit(f"//{host}").hostname or ""
    except ValueError:
        return ""


async def read_body(headers: dict[bytes, str], receive: Receive, limit: int = MAX_BODY) -> bytes:
    """The whole body. Raises `RefusedError` once it exceeds `limit` bytes or takes longer than `BODY_SECONDS`."""
    too_large = RefusedError(413, f"the body is larger than {limit // 1024} KB")
    length = headers.get(b"content-length", "0")
    if not length.isdecimal() or int(length[:20]) > limit:
        raise too_large
    body = bytearray()
    try:
        async with asyncio.timeout(BODY_SECONDS):
            while True:
                message = await receive()
                if message["type"] == "http.disconnect":
                    raise RefusedError(400, "the client disconnected")
                body += message.get("body", b"")
                if len(body) > limit:
                    raise too_large
                if not message.get("more_body", False):
                    return bytes(body)
    except TimeoutError:
        raise RefusedError(408, f"the body did not arrive within {BODY_SECONDS:.0f} seconds") from None
