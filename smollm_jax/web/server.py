"""The page as a server: its ASGI app and its socket. Frameworks are imported only when the app is built."""

import asyncio
import collections
import ipaddress
import logging
import os
import socket
from pathlib import Path
from typing import TYPE_CHECKING

from smollm_jax import errors
from smollm_jax.runtime import install
from smollm_jax.runtime.assets import fetch_command

if TYPE_CHECKING:
    import fastapi
    import gradio

    from smollm_jax.generation.quantized import Quantize


IDLE_SECONDS = 10.0


def build(
    *,
    initial_weights: Path | None,
    assets: Path,
    runs: Path,
    host: str,
    dtype: str,
    quantize: "Quantize | None",
    tokenizer: Path | None,
    adapter: Path | None,
    max_loaded: int,
    queue_size: int,
    connections: int,
    time_limit: float,
    behind_proxy: bool = False,
):
    """The ASGI app of a page that starts with `initial_weights`, or else with the real ones, downloaded on first use.

    `adapter`: a LoRA adapter for those weights, a folder in peft's layout or a run. At most `max_loaded` models stay in
    memory, `queue_size` requests wait, the state of `connections` visits is kept, and an answer takes `time_limit`
    seconds. `behind_proxy`: the headers of a proxy, which checks the host's name, are believed. Raises `UsageError`
    where the extra "web" is missing, and the errors of reading weights.
    """
    from smollm_jax import weights
    from smollm_jax.runtime import compilation_cache

    if initial_weights is not None:
        weights.kind_of(initial_weights)
    _prepare_gradio()
    import jax

    from smollm_jax.web.middleware import RequestFilter
    from smollm_jax.web.model_store import ModelStore
    from smollm_jax.web.page import page
    from smollm_jax.web.responses import Handlers

    compilation_cache.enable()
    if dtype == "float32":  # on a GPU JAX's default is TF32
        jax.config.update("jax_default_matmul_precision", "float32")
    store = ModelStore(
        initial_weights=initial_weights,
        assets=assets,
        runs=runs,
        fetch=fetch_command("weights", assets),
        dtype=dtype,
        quantize=quantize,
        tokenizer=tokenizer,
        adapter=adapter,
        max_loaded=max_loaded,
    )
    first, path = next(iter(store.entries().items()))
    if initial_weights is not None or (adapter is not None and path.exists()):  # now, so that an error ends the start
        print(f"loading {first}", flush=True)
        for _ in store.open(first):
            pass
    device = jax.devices()[0].device_kind
    handlers = Handlers(store, device=device, time_limit=time_limit)
    print(f"weights {first}, device {device}, {quantize or dtype}", flush=True)
    blocks = page(handlers, queue_size=queue_size)
    blocks.state_session_capacity = connections  # Gradio's default is 10,000, of 0.1 MB and more each
    local_names = {"localhost", "127.0.0.1", "::1", host}
    input_counts = {number: len(function.inputs) for number, function in blocks.fns.items()}
    return RequestFilter(
        _mount(blocks),
        frozenset(local_names) if is_loopback(host) and not behind_proxy else None,
        input_counts,
        lambda session: session in blocks._queue.pending_messages_per_session,
        behind_proxy=behind_proxy,
    )


def _prepare_gradio() -> None:
    """Sees that Gradio can be imported, with settings that it reads when it is."""
    # Send no usage statistics, and keep few, because Gradio sums them up at every request.
    os.environ |= {
        "GRADIO_ANALYTICS_ENABLED": "False",
        "GRADIO_RUN_HISTORY": "False",
        "GRADIO_ANALYTICS_MAX_EVENTS": "1",
        "GRADIO_ANALYTICS_CACHE_FREQUENCY": str(10**9),
    }
    try:
        import gradio  # noqa: F401
    except ImportError as error:
        raise errors.UsageError(install.needs("app.py", "web")) from error


def _mount(blocks: "gradio.Blocks") -> "fastapi.FastAPI":
    """An app with the page at its root."""
    import fastapi
    import gradio

    from smollm_jax.web.page import CSS, SCRIPT, theme

    # Without FastAPI's documentation pages, which load scripts from another host.
    outer = fastapi.FastAPI(openapi_url=None, docs_url=None, redoc_url=None)
    return gradio.mount_gradio_app(
        outer,
        blocks,
        path="/",
        theme=theme(),
        css=CSS,
        head=SCRIPT,
        footer_links=[],
        ssr_mode=False,
        max_file_size=1,
        show_error=True,
        pwa=False,
        enable_monitoring=False,
    )


def protocol(per_address: int | None = None) -> type[asyncio.Protocol]:
    """Uvicorn's protocol, which also closes a connection that has sent no whole request for `IDLE_SECONDS`.

    It closes at once what exceeds `per_address` connections of one client address. Both count against the limit of open
    connections: without this, one client could shut the page for all.
    """
    from uvicorn.protocols.http.h11_impl import H11Protocol

    counts: collections.Counter[str] = collections.Counter()  # open connections by address

    class Protocol(H11Protocol):
        def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
            super().connection_made(transport)
            self._address = transport.get_extra_info("peername")[0]
            counts[self._address] += 1
            if per_address is not None and counts[self._address] > per_address:
                logging.getLogger(__name__).warning(
                    "refused: a connection of %s, which has %d open", self._address, per_address
                )
                transport.close()
            self._watch()

        def connection_lost(self, exc: Exception | None) -> None:
            self._timer.cancel()
            counts[self._address] -= 1
            if not counts[self._address]:
                del counts[self._address]
            super().connection_lost(exc)

        def _watch(self) -> None:
            answered = self.cycle is None or self.cycle.response_complete
            self._timer = self.loop.call_later(IDLE_SECONDS, self._close_if_idle, self.cycle, answered)

        def _close_if_idle(self, last: object, answered: bool) -> None:
            """Closes the connection if the last request was answered when the timer was set, and none began since."""
            if self.cycle is last and answered:
                self.transport.close()
            else:
                self._watch()

    return Protocol


def per_address(host: str, connections: int) -> int | None:
    """How many of the open connections one client address may have: a quarter, or all where only this machine asks."""
    return None if is_loopback(host) else connections // 4


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach an address."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def listen(host: str, port: int) -> socket.socket:
    """A socket that listens at the address; raises as `bind`."""
    listener = bind(host, port)
    listener.listen()
    return listener


def bind(host: str, port: int) -> socket.socket:
    """A socket bound to the address, which does not accept connections yet.

    Raises `UsageError` where the port is invalid or taken.
    """
    if not 0 <= port < 65536:
        raise errors.UsageError(f"--port must be from 0 to 65535, got {port}")
    try:
        family, kind, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        bound = socket.socket(family, kind)
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # a port that was used a moment ago is free
        bound.bind(address)
    except OSError as error:
        raise errors.UsageError(f"cannot listen on --host {host} --port {port}: {error.strerror}") from error
    return bound
