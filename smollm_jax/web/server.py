"""The page as a server: its ASGI app, and the socket it listens on. Imports no framework before it builds one."""

import ipaddress
import os
import socket
from pathlib import Path
from typing import TYPE_CHECKING

from smollm_jax import errors
from smollm_jax.runtime import install
from smollm_jax.runtime.assets import fetch_command

if TYPE_CHECKING:
    from smollm_jax.generation.quantized import Quantize


def build(
    *,
    given: Path | None,
    assets: Path,
    runs: Path,
    host: str,
    dtype: str,
    quantize: "Quantize | None",
    tokenizer: Path | None,
    keep: int,
    queue_size: int,
    connections: int,
    time_limit: float,
):
    """The ASGI app of a page that begins with the weights `given`, else with the real ones, fetched when asked for.

    At most `keep` weights stay in memory, `queue_size` requests wait, `connections` visits are remembered, and an
    answer takes `time_limit` seconds. Raises `UsageError` where the extra "web" is missing, and what reading weights
    raises.
    """
    from smollm_jax import weights
    from smollm_jax.runtime import compilation_cache

    if given is not None:
        weights.kind_of(given)
    # Before the import. Gradio's own usage statistics: none sent, and few kept, for it sums them up at every request.
    os.environ |= {
        "GRADIO_ANALYTICS_ENABLED": "False",
        "GRADIO_RUN_HISTORY": "False",
        "GRADIO_ANALYTICS_MAX_EVENTS": "1",
        "GRADIO_ANALYTICS_CACHE_FREQUENCY": str(10**9),
    }
    try:
        import gradio
    except ImportError as error:
        raise errors.UsageError(install.needs("app.py", "web")) from error
    import fastapi
    import jax

    from smollm_jax.web.middleware import Guard
    from smollm_jax.web.model_store import Shelf
    from smollm_jax.web.page import CSS, SCRIPT, page, theme
    from smollm_jax.web.responses import Answers

    compilation_cache.enable()
    if dtype == "float32":  # on a GPU JAX's default is TF32
        jax.config.update("jax_default_matmul_precision", "float32")
    shelf = Shelf(
        given=given,
        assets=assets,
        runs=runs,
        fetch=fetch_command("weights", assets),
        dtype=dtype,
        quantize=quantize,
        tokenizer=tokenizer,
        keep=keep,
    )
    if given is not None:  # so that what is wrong with them is said here
        print(f"loading {given}", flush=True)
        for _ in shelf.open(str(given)):
            pass
    device = jax.devices()[0].device_kind
    answers = Answers(shelf, device=device, time_limit=time_limit)
    print(f"weights {next(iter(shelf.entries()))}, device {device}, {quantize or dtype}", flush=True)
    # No other documentation pages: theirs would load scripts from another host.
    outer = fastapi.FastAPI(openapi_url=None, docs_url=None, redoc_url=None)
    blocks = page(answers, queue_size=queue_size)
    blocks.state_session_capacity = connections  # of Gradio's 10,000 visits each keeps 0.1 MB and more
    mounted = gradio.mount_gradio_app(
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
    own = {"localhost", "127.0.0.1", "::1", host}
    functions = {number: len(function.inputs) for number, function in blocks.fns.items()}
    return Guard(mounted, frozenset(own) if is_loopback(host) else None, functions)


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach an address."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def listen(host: str, port: int) -> socket.socket:
    """A socket bound to the address; raises `UsageError` when it cannot be had."""
    if not 0 <= port < 65536:
        raise errors.UsageError(f"--port must be from 0 to 65535, got {port}")
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        return socket.create_server((host, port), family=family)
    except OSError as error:
        raise errors.UsageError(f"cannot listen on --host {host} --port {port}: {error.strerror}") from error
