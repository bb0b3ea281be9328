"""A page in the browser to complete texts, to chat, and to watch runs learn.

    python scripts/app.py                                            # fetches the real weights on first use
    python scripts/app.py --weights runs/my-run --port 7861
    python scripts/app.py --host 0.0.0.0                             # for others too: there is no password

Needs the extra "web". Everything under assets/ and runs/ can be picked on the page, checkpoints of a run that is being
trained too. The page asks no other host for anything, and takes no upload.
"""

import dataclasses
import sys
from pathlib import Path
from typing import Literal

from smollm_jax import errors
from smollm_jax.commands import command_line
from smollm_jax.runtime.assets import folder
from smollm_jax.web import server


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
    assets: Path = dataclasses.field(default_factory=folder)
    """Folder of weights; outside of a checkout one in the user's cache."""
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


GROUPS = {
    "page": ("host", "port", "queue", "time_limit"),
    "model": ("weights", "dtype", "quantize", "tokenizer", "loaded"),
    "folders": ("runs", "assets"),
    "other": ("debug",),
}


def main(argv: list[str] | None = None) -> None:
    flags = command_line.parse(Flags, argv, __doc__, weights=("weights",))
    if flags.queue < 1 or flags.loaded < 1 or not 0 < flags.time_limit < float("inf"):
        raise errors.UsageError("--queue and --loaded must be at least 1, --time-limit above 0 and finite")
    listener = server.listen(flags.host, flags.port)
    app = build(flags)
    import uvicorn

    if not server.is_loopback(flags.host):
        print(
            f"warning: --host {flags.host}: whoever reaches this machine can use the page, there is no password",
            file=sys.stderr,
        )
    shown = f"[{flags.host}]" if ":" in flags.host else flags.host
    print(f"http://{shown}:{listener.getsockname()[1]}", flush=True)
    settings = {"log_level": "warning", "access_log": False, "server_header": False, "timeout_graceful_shutdown": 2}
    config = uvicorn.Config(app, limit_concurrency=flags.connections, ws="none", **settings)
    uvicorn.Server(config).run(sockets=[listener])


def build(flags: Flags):
    """The ASGI app of these flags."""
    return server.build(
        given=flags.weights,
        assets=flags.assets,
        runs=flags.runs,
        host=flags.host,
        dtype=flags.dtype,
        quantize=flags.quantize,
        tokenizer=flags.tokenizer,
        keep=flags.loaded,
        queue_size=flags.queue,
        connections=flags.connections,
        time_limit=flags.time_limit,
    )
