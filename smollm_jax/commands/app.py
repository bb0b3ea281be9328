"""A web page to complete texts, to chat, and to watch training runs.

    python scripts/app.py                                            # downloads the real weights on first use
    python scripts/app.py --weights runs/my-run --port 7861
    python scripts/app.py --adapter runs/my-adapter                  # a LoRA adapter of the real weights
    python scripts/app.py --host 0.0.0.0                             # open to others, without a password

Needs the extra "web". The page offers all weights under assets/ and runs/, including checkpoints of a run that is still
training. It loads nothing from other hosts and accepts no uploads.
"""

import dataclasses
import sys
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from smollm_jax import errors
from smollm_jax.commands import command_line
from smollm_jax.runtime.assets import folder
from smollm_jax.web import server


@dataclasses.dataclass(frozen=True)
class Flags:
    weights: Path | None = None
    """Weights in any format to start with; default: assets/SmolLM2-135M-Instruct, downloaded on first use."""
    adapter: Path | None = None
    """A LoRA adapter for these weights: a folder in peft's layout, or a run that trained one. The page offers the
    weights with the adapter first, and without it too."""
    host: str = "127.0.0.1"
    """Address to listen on; any but a loopback address lets others use the page."""
    port: int = 7860
    """Port; 0 takes a free one."""
    behind_proxy: bool = False
    """Believe X-Forwarded-Host and -Proto, for a proxy on this machine that sets them and checks the host's name."""
    runs: Path = Path("runs")
    """Folder of run folders."""
    assets: Path = dataclasses.field(default_factory=folder)
    """Folder of weights; outside of a checkout it is in the user's cache."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Data type of weights and cache."""
    quantize: Literal["bf16", "int8"] | None = None
    """On a CPU: store matrices as bfloat16 or in int8 blocks of 32 (GGUF's q8_0) and compute in float32."""
    tokenizer: Path | None = None
    """Folder with tokenizer.json (or a GGUF), for weights that have none of their own."""
    max_queue: Annotated[int, tyro.conf.arg(aliases=["--queue"])] = 64
    """Requests that can wait; more are refused."""
    time_limit: float = 300.0
    """Seconds that generating an answer can take."""
    max_loaded: Annotated[int, tyro.conf.arg(aliases=["--loaded"])] = 2
    """Models kept in memory."""
    debug: bool = False
    """Show a traceback instead of one line when something goes wrong."""

    @property
    def connections(self) -> int:
        """Open connections at once, and visits whose state is kept; in an older visit the Runs tab starts over."""
        return 8 * self.max_queue + 64


GROUPS = {
    "page": ("host", "port", "behind_proxy", "max_queue", "time_limit"),
    "model": ("weights", "adapter", "dtype", "quantize", "tokenizer", "max_loaded"),
    "folders": ("runs", "assets"),
    "other": ("debug",),
}


def main(argv: list[str] | None = None) -> None:
    flags = command_line.parse(Flags, argv, __doc__, weights=("weights",))
    if flags.max_queue < 1 or flags.max_loaded < 1 or not 0 < flags.time_limit < float("inf"):
        raise errors.UsageError("--max-queue and --max-loaded must be at least 1, --time-limit above 0 and finite")
    listener = server.listen(flags.host, flags.port)
    app = build(flags)
    import uvicorn

    if not server.is_loopback(flags.host):
        print(
            f"warning: --host {flags.host}: anyone who can reach this machine can use the page, without a password",
            file=sys.stderr,
        )
    shown = f"[{flags.host}]" if ":" in flags.host else flags.host
    print(f"http://{shown}:{listener.getsockname()[1]}", flush=True)
    settings: dict[str, Any] = {
        "log_level": "warning",
        "access_log": False,
        "server_header": False,
        "timeout_graceful_shutdown": 2,
    }
    # Behind a proxy every connection has the proxy's address.
    most = None if flags.behind_proxy else server.per_address(flags.host, flags.connections)
    settings |= {"http": server.protocol(most), "proxy_headers": flags.behind_proxy}
    config = uvicorn.Config(app, limit_concurrency=flags.connections, ws="none", **settings)
    uvicorn.Server(config).run(sockets=[listener])


def build(flags: Flags):
    """The ASGI app of these flags."""
    return server.build(
        initial_weights=flags.weights,
        assets=flags.assets,
        runs=flags.runs,
        host=flags.host,
        dtype=flags.dtype,
        quantize=flags.quantize,
        tokenizer=flags.tokenizer,
        adapter=flags.adapter,
        max_loaded=flags.max_loaded,
        queue_size=flags.max_queue,
        connections=flags.connections,
        time_limit=flags.time_limit,
        behind_proxy=flags.behind_proxy,
    )
