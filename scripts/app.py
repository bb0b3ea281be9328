"""A page in the browser to complete texts, to chat, and to watch runs learn.

    python scripts/app.py                                            # fetches the real weights on first use
    python scripts/app.py --weights runs/my-run --port 7861
    python scripts/app.py --host 0.0.0.0                             # for others too: there is no password

Needs the extra "web". Everything under assets/ and runs/ can be picked on the page, checkpoints of a run that is being
trained too. The page asks no other host for anything, and takes no upload.
"""

import dataclasses
import ipaddress
import os
import socket
import sys
from pathlib import Path
from typing import Literal

from smollm_jax import errors
from smollm_jax.commands import command_line
from smollm_jax.runtime import install
from smollm_jax.runtime.program import run_main


@dataclasses.dataclass(frozen=True)
class Flags:
    weights: Path | None = None
    """Weights of any kind to begin with; default: assets/SmolLM2-135M-Instruct, fetched when first asked something."""
    host: str = "127.0.0.1"
    """Address to listen on; any but this machine's own lets others use the page."""
    port: int = 7860
    """0 takes a free one."""
    runs: Path = Path("runs")
    """Folder of run folders."""
    assets: Path = Path("assets")
    """Folder of weights."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Of the weights and the cache."""
    quantize: Literal["bf16", "int8"] | None = None
    """On a CPU: store matrices as bfloat16 or in int8 blocks of 32 (GGUF's q8_0) and compute in float32."""
    tokenizer: Path | None = None
    """Folder with tokenizer.json (or a GGUF), for weights that have none of their own."""
    queue: int = 64
    """Requests that may wait; more are refused."""
    time_limit: float = 300.0
    """Seconds of writing a request may take."""
    loaded: int = 2
    """Weights kept in memory."""
    debug: bool = False
    """Show a traceback instead of one line when something goes wrong."""

    @property
    def connections(self) -> int:
        """Open at once; also the visits remembered, of which the runs tab of an older one begins anew."""
        return 8 * self.queue + 64


def main(argv: list[str] | None = None) -> None:
    flags = command_line.parse(Flags, argv, __doc__, weights=("weights",))
    if flags.queue < 1 or flags.loaded < 1 or not 0 < flags.time_limit < float("inf"):
        raise errors.UsageError("--queue and --loaded must be at least 1, --time-limit above 0 and finite")
    listener = listen(flags.host, flags.port)
    app = build(flags)
    import uvicorn

    if not is_loopback(flags.host):
        print(
            f"warning: --host {flags.host}: whoever reaches this machine can use the page, there is no password",
            file=sys.stderr,
        )
    shown = f"[{flags.host}]" if ":" in flags.host else flags.host
    print(f"http://{shown}:{listener.getsockname()[1]}", flush=True)
    settings = {"log_level": "warning", "access_log": False, "server_header": False, "timeout_graceful_shutdown": 2}
    server = uvicorn.Server(uvicorn.Config(app, limit_concurrency=flags.connections, ws="none", **settings))
    server.run(sockets=[listener])


def build(flags: Flags):
    """The ASGI app of these flags."""
    from smollm_jax import weights
    from smollm_jax.runtime import compilation_cache

    if flags.weights is not None:
        weights.kind_of(flags.weights)
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
    if flags.dtype == "float32":  # on a GPU JAX's default is TF32
        jax.config.update("jax_default_matmul_precision", "float32")
    shelf = Shelf(
        given=flags.weights,
        assets=flags.assets,
        runs=flags.runs,
        fetch=fetching(flags),
        dtype=flags.dtype,
        quantize=flags.quantize,
        tokenizer=flags.tokenizer,
        keep=flags.loaded,
    )
    if flags.weights is not None:  # so that what is wrong with them is said here
        print(f"loading {flags.weights}", flush=True)
        for _ in shelf.open(str(flags.weights)):
            pass
    device = jax.devices()[0].device_kind
    answers = Answers(shelf, device=device, time_limit=flags.time_limit)
    print(f"weights {next(iter(shelf.entries()))}, device {device}, {flags.quantize or flags.dtype}", flush=True)
    # No other documentation pages: theirs would load scripts from another host.
    outer = fastapi.FastAPI(openapi_url=None, docs_url=None, redoc_url=None)
    blocks = page(answers, queue_size=flags.queue)
    blocks.state_session_capacity = flags.connections  # of Gradio's 10,000 visits each keeps 0.1 MB and more
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
    own = {"localhost", "127.0.0.1", "::1", flags.host}
    functions = {number: len(function.inputs) for number, function in blocks.fns.items()}
    return Guard(mounted, frozenset(own) if is_loopback(flags.host) else None, functions)


def fetching(flags: Flags) -> list[str]:
    """The command that brings the real weights."""
    script = Path(__file__).with_name("fetch_assets.py")
    return [sys.executable, str(script), "weights", "--assets", str(flags.assets)]


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


if __name__ == "__main__":
    run_main(main)
