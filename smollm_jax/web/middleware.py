"""What a request must be before anything else looks at it: ASGI middleware around the whole page.

Gradio brings routes for uploads, files, proxies, streams and plugins that this page does not use. Only the routes that
it does use are let through, so that none of the others can read a file, write one or reach another host.
"""

import asyncio
import json
import re
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any
from urllib.parse import urlsplit

MAX_BODY = 256 * 1024  # bytes
BODY_SECONDS = 10.0  # to receive a body in; the page's own are sent at once

Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]

READS = re.compile(
    r"/|/(config|theme\.css|favicon\.ico|manifest\.json|robots\.txt)/?|/(assets|static|svelte)/[\w@+-][\w./@+-]*"
    r"|/gradio_api/(info/?|app_id/?|startup-events|theme\.css|queue/data|heartbeat/\w{1,64})"
)
CALLS = re.compile(r"/gradio_api/(queue/join|run/predict/?)")
WRITES = re.compile(r"/gradio_api/(queue/join|cancel|reset/?|run/predict/?)")
UPLOADS = re.compile(r"(/gradio_api)?/(upload|process_recording|component_server)\b.*")
# The browser itself then refuses what any text on the page might ask of another host. Gradio needs inline styles and
# scripts, and its plots compile their expressions.
POLICY = (
    "default-src 'self'; script-src 'self' 'unsafe-inline' 'unsafe-eval'; style-src 'self' 'unsafe-inline'; "
    "img-src 'self' data: blob:; font-src 'self' data:; worker-src 'self' blob:; connect-src 'self'; "
    "object-src 'none'; base-uri 'self'; form-action 'self'; frame-ancestors 'none'"
)
HEADERS = [
    (b"content-security-policy", POLICY.encode()),
    (b"x-content-type-options", b"nosniff"),
    (b"referrer-policy", b"no-referrer"),
]


class RefusedError(Exception):
    """A request that goes no further: an HTTP status and the reason."""

    def __init__(self, status: int, reason: str):
        super().__init__(reason)
        self.status, self.reason = status, reason


class Guard:
    """The app, for requests that pass; `hosts`: the names it may be called by, or None for any; `functions`: how many
    values each of the page's functions takes, by its number.

    A page of another origin can have its visitor's browser send requests here, also under a name of its own that it
    points at 127.0.0.1: Host and Origin tell.
    """

    def __init__(self, app: App, hosts: frozenset[str] | None, functions: dict[int, int]):
        self.app, self.hosts, self.functions = app, hosts, functions

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await self.app(scope, receive, send)
            return
        if scope["type"] != "http":
            raise RefusedError(400, "only HTTP is spoken here")

        async def send_guarded(message: MutableMapping[str, Any]) -> None:
            if message["type"] == "http.response.start":
                message = {**message, "headers": [*message.get("headers", []), *HEADERS]}
            await send(message)

        try:
            headers = {name.lower(): value.decode("latin-1") for name, value in scope["headers"]}
            self.check(scope["method"], scope["path"], headers)
            body = await whole_body(headers, receive)
            if scope["method"] == "POST":
                self.check_call(body, calls=CALLS.fullmatch(scope["path"]) is not None)
        except RefusedError as refused:
            content = json.dumps({"detail": refused.reason}).encode()
            about = [(b"content-type", b"application/json"), (b"content-length", str(len(content)).encode())]
            # The rest of a refused body is never read, so the connection cannot be used again.
            await send_guarded(
                {
                    "type": "http.response.start",
                    "status": refused.status,
                    "headers": [*about, (b"connection", b"close")],
                }
            )
            await send_guarded({"type": "http.response.body", "body": content})
            return
        unread = [{"type": "http.request", "body": body, "more_body": False}]

        async def receive_again() -> MutableMapping[str, Any]:
            return unread.pop() if unread else await receive()

        await self.app(scope, receive_again, send_guarded)

    def check(self, method: str, path: str, headers: dict[bytes, str]) -> None:
        """Raises `RefusedError` for a route, a host or an origin that is none of this page's."""
        host = headers.get(b"host", "")
        if self.hosts is not None and name_of(host) not in self.hosts:
            raise RefusedError(421, "this page does not answer under that host name")
        origin = headers.get(b"origin")
        if origin is not None and origin not in (f"http://{host}", f"https://{host}"):
            raise RefusedError(403, "requests from another origin are refused")
        if UPLOADS.fullmatch(path):
            raise RefusedError(403, "uploads are refused")
        allowed = {"GET": READS, "HEAD": READS, "POST": WRITES}.get(method)
        if allowed is None:
            raise RefusedError(405, "only GET, HEAD and POST are answered")
        if not allowed.fullmatch(path) or ".." in path:
            raise RefusedError(404, "no such page")

    def check_call(self, body: bytes, *, calls: bool) -> None:
        """Raises `RefusedError` for a body that is no JSON object, or that calls no function as it must be called."""
        try:
            value = json.loads(body)
        except (ValueError, RecursionError):
            raise RefusedError(400, "the body is no JSON") from None
        if not isinstance(value, dict):
            raise RefusedError(422, "the body must be a JSON object")
        if not calls:
            return
        number, data = value.get("fn_index"), value.get("data")
        if type(number) is not int or number not in self.functions:
            raise RefusedError(422, "fn_index must be the number of a function of this page")
        if not isinstance(data, list) or len(data) != self.functions[number]:
            raise RefusedError(422, f"data must be a list of {self.functions[number]} values")
        if not isinstance(value.get("session_hash"), str) or not re.fullmatch(r"\w{1,64}", value["session_hash"]):
            raise RefusedError(422, "session_hash must be 1 to 64 letters or digits")


def name_of(host: str) -> str:
    """The name or address in a Host header, without its port."""
    try:
        return urlsplit(f"//{host}").hostname or ""
    except ValueError:
        return ""


async def whole_body(headers: dict[bytes, str], receive: Receive) -> bytes:
    """The request's body, whole; raises `RefusedError` once it is larger than `MAX_BODY` or too slow to come."""
    too_large = RefusedError(413, f"the body is larger than {MAX_BODY // 1024} KB")
    length = headers.get(b"content-length", "0")
    if not length.isdecimal() or int(length[:20]) > MAX_BODY:
        raise too_large
    body = bytearray()
    try:
        async with asyncio.timeout(BODY_SECONDS):
            while True:
                message = await receive()
                if message["type"] == "http.disconnect":
                    raise RefusedError(400, "the client went away")
                body += message.get("body", b"")
                if len(body) > MAX_BODY:
                    raise too_large
                if not message.get("more_body", False):
                    return bytes(body)
    except TimeoutError:
        raise RefusedError(408, f"the body did not arrive within {BODY_SECONDS:.0f} seconds") from None
