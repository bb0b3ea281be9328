"""ASGI middleware that refuses a request before any of it is read: by its host, origin, key, size and time.

A web page that a user of this machine visits can make the browser send requests here. Host and Origin tell such
requests apart, see `smollm_jax.web.middleware`.
"""

import asyncio
import dataclasses
import hashlib
import hmac
import json
import logging
from collections.abc import MutableMapping, Sequence
from pathlib import Path
from typing import Any

from smollm_jax.errors import InputFileError, short_repr
from smollm_jax.runtime.files import read_text
from smollm_jax.serve.answers import error_body
from smollm_jax.web.middleware import App, Receive, RefusedError, Scope, Send, host_name, read_body

MAX_BODY = 1 << 20  # bytes
SEND_SECONDS = 60.0  # that a client may take to accept a part of an answer
SMALLEST_KEY = 16  # characters
OPEN_ROUTES = ("/health",)  # without a key
KINDS = {401: "authentication_error", 403: "permission_error", 429: "rate_limit_error"}
CORS_METHODS = b"GET, POST, OPTIONS"
CORS_HEADERS = b"authorization, content-type"
HEADERS = [(b"x-content-type-options", b"nosniff"), (b"cache-control", b"no-store")]


def read_keys(path: Path | None, variable: str | None) -> tuple[str, ...]:
    """The API keys in a file, one a line, or in an environment variable's value; none without either."""
    if path is None:
        keys, where = [variable] if variable else [], "the environment"
    else:
        keys, where = [line.strip() for line in read_text(path).splitlines() if line.strip()], str(path)
        if not keys:
            raise InputFileError(f"{path}: has no API key")
    for key in keys:
        if len(key) < SMALLEST_KEY or not (key.isascii() and key.isprintable()):
            raise InputFileError(f"{where}: an API key must have at least {SMALLEST_KEY} printable ASCII characters")
    return tuple(keys)


@dataclasses.dataclass(frozen=True)
class Policy:
    """Who may send requests. `hosts`: names of this server, None for any; `origins`: of web pages, "*" for all."""

    hosts: frozenset[str] | None
    origins: frozenset[str]
    keys: Sequence[str]

    def is_key(self, header: str) -> bool:
        """Whether an Authorization header has one of the keys, in a time that does not depend on how much is right."""
        given = hashlib.sha256(header.removeprefix("Bearer ").encode("latin-1", "replace")).digest()
        matches = [hmac.compare_digest(given, hashlib.sha256(key.encode()).digest()) for key in self.keys]
        return any(matches) and header.startswith("Bearer ")

    def allows_origin(self, origin: str, host: str) -> bool:
        """Whether pages of an origin may send requests."""
        own = (f"http://{host}", f"https://{host}")
        return origin in own or origin in self.origins or "*" in self.origins


class Guard:
    """The app behind the checks of a policy; every refusal is an error in OpenAI's envelope."""

    def __init__(self, app: App, policy: Policy):
        self.app, self.policy = app, policy

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await self.app(scope, receive, send)
            return
        if scope["type"] != "http":
            raise RefusedError(400, "only HTTP is supported")
        headers = {name.lower(): value.decode("latin-1") for name, value in scope["headers"]}
        origin = headers.get(b"origin")

        async def answer(message: MutableMapping[str, Any]) -> None:
            if message["type"] == "http.response.start":
                message = {**message, "headers": [*message.get("headers", []), *HEADERS, *self._cors(origin)]}
            async with asyncio.timeout(SEND_SECONDS):  # a client that stopped reading
                await send(message)

        try:
            self._check(scope, headers)
            if scope["method"] == "OPTIONS" and origin is not None:
                await _respond(answer, 204, b"", [])
                return
            body = await read_body(headers, receive, limit=MAX_BODY)
        except RefusedError as error:
            request = f"{scope['method']} {short_repr(scope['path'])}"
            logging.getLogger(__name__).warning("refused: %s: %d, %s", request, error.status, error.reason)
            kind = KINDS.get(error.status, "invalid_request_error")
            content = json.dumps(error_body(error.reason, kind=kind)).encode()
            # A refused body is not read to its end, so the connection cannot be reused.
            extra = [(b"connection", b"close"), (b"content-type", b"application/json")]
            extra += [(b"www-authenticate", b"Bearer")] if error.status == 401 else []
            await _respond(answer, error.status, content, extra)
            return
        messages = [{"type": "http.request", "body": body, "more_body": False}]

        async def receive_body_again() -> MutableMapping[str, Any]:
            return messages.pop() if messages else await receive()

        await self.app(scope, receive_body_again, answer)

    def _check(self, scope: Scope, headers: dict[bytes, str]) -> None:
        """Raises `RefusedError` for a host, an origin or a key that is not allowed."""
        host, origin = headers.get(b"host", ""), headers.get(b"origin")
        if self.policy.hosts is not None and host_name(host) not in self.policy.hosts:
            raise RefusedError(421, "this host name is not allowed")
        if origin is not None and not self.policy.allows_origin(origin, host):
            raise RefusedError(403, "requests from this origin are not allowed: see --allowed-origins")
        is_preflight = scope["method"] == "OPTIONS" and origin is not None  # browsers send it without the key
        if not self.policy.keys or is_preflight or scope["path"] in OPEN_ROUTES:
            return
        if not self.policy.is_key(headers.get(b"authorization", "")):
            raise RefusedError(401, "the API key is missing or wrong: send it as Authorization: Bearer KEY")

    def _cors(self, origin: str | None) -> list[tuple[bytes, bytes]]:
        """The headers that let a page of an allowed origin read the answer."""
        if origin is None or not self.policy.origins & {origin, "*"}:
            return []
        return [
            (b"access-control-allow-origin", origin.encode("latin-1")),
            (b"access-control-allow-methods", CORS_METHODS),
            (b"access-control-allow-headers", CORS_HEADERS),
            (b"access-control-max-age", b"600"),
            (b"vary", b"origin"),
        ]


async def _respond(send: Send, status: int, content: bytes, headers: list[tuple[bytes, bytes]]) -> None:
    length = [(b"content-length", str(len(content)).encode())] if status != 204 else []
    await send({"type": "http.response.start", "status": status, "headers": [*headers, *length]})
    await send({"type": "http.response.body", "body": content})
