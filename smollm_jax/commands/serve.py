"""A server of OpenAI's API for any SmolLM2 weights, for many clients at once.

    python scripts/serve.py                                          # the Instruct weights on 127.0.0.1:8000
    python scripts/serve.py --weights runs/my-run --adapter runs/my-lora --slots 16 --context 2048
    python scripts/serve.py --adapter legal=runs/lora-1 --adapter mail=runs/lora-2   # three models by name
    python scripts/serve.py --host 0.0.0.0 --api-key-file key        # open to others who have the key

Needs the extra "serve". Many texts are generated at once, each in a slot of its own. The port opens when all programs
are compiled, so that /health answers 200 once the first request can be served at full speed. SIGTERM lets the texts
that run and wait finish; a second signal ends at once. No request is logged, and no other host is asked.
"""

import dataclasses
import os
import re
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import tyro

from smollm_jax import errors
from smollm_jax.commands import command_line
from smollm_jax.runtime import install
from smollm_jax.runtime.assets import FOLDER
from smollm_jax.web import server

if TYPE_CHECKING:
    from smollm_jax.serve.app import Served

KEY_VARIABLE = "SMOLLM_API_KEY"
IDLE_CONNECTIONS = 256  # open at once beside those of texts that run and wait


@dataclasses.dataclass(frozen=True)
class Flags:
    weights: Path = FOLDER / "SmolLM2-135M-Instruct"
    """Weights in any format."""
    adapter: tyro.conf.UseAppendAction[tuple[str, ...]] = ()
    """A LoRA adapter for these weights: a folder in peft's layout, or a run that trained one. With NAME=PATH, which can
    be repeated, requests choose by `model` between each name and the weights themselves."""
    host: str = "127.0.0.1"
    """Address to listen on; any but a loopback address needs an API key."""
    port: int = 8000
    """Port; 0 takes a free one."""
    slots: int = 16
    """Texts that each model generates at once."""
    context: int | None = None
    """Tokens of a text, prompt included; default: the model's context, at most 2,048."""
    queue_size: int = 64
    """Texts that can wait for a slot of a model; more are refused with status 429."""
    api_key_file: Path | None = None
    """File with API keys, one a line, of which a client must send one; or set SMOLLM_API_KEY to a key."""
    allowed_origins: tuple[str, ...] = ()
    """Web pages that may send requests, such as https://example.org; * allows all. Default: none."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Data type of weights and cache; bfloat16 matmuls are slow in XLA on a CPU."""
    quantize: Literal["bf16", "int8"] | None = None
    """On a CPU: store matrices as bfloat16 or in int8 blocks of 32 (GGUF's q8_0) and compute in float32."""
    tokenizer: Path | None = None
    """Folder with tokenizer.json (or a GGUF), for weights that have none of their own."""
    debug: bool = False
    """Show a traceback instead of one line when something goes wrong."""


GROUPS = {
    "server": ("host", "port", "api_key_file", "allowed_origins"),
    "capacity": ("slots", "context", "queue_size"),
    "model": ("weights", "adapter", "dtype", "quantize", "tokenizer"),
    "other": ("debug",),
}
DEFAULT_CONTEXT = 2048


def main(argv: list[str] | None = None) -> None:
    flags = command_line.parse(Flags, argv, __doc__, weights=("weights",))
    api_keys(flags)  # before a port is taken
    models = adapters(flags)
    bound = server.bind(flags.host, flags.port)
    app = build(flags)
    import uvicorn

    class Server(uvicorn.Server):
        def handle_exit(self, sig: int, frame: Any) -> None:
            """Finishes the accepted requests; at a second signal ends at once. The process then exits with 0."""
            if self.should_exit:
                self.force_exit = True
            else:
                print("stopping: texts that run and wait are finished; a second signal ends at once", flush=True)
            self.should_exit = True

    shown = f"[{flags.host}]" if ":" in flags.host else flags.host
    settings: dict[str, Any] = {"log_level": "warning", "access_log": False, "server_header": False, "ws": "none"}
    connections = IDLE_CONNECTIONS + len(models) * (flags.queue_size + flags.slots)
    most = server.per_address(flags.host, connections)
    settings |= {"http": server.protocol(most), "proxy_headers": False}
    running = Server(uvicorn.Config(app, limit_concurrency=connections, lifespan="on", **settings))
    print(f"http://{shown}:{bound.getsockname()[1]}/v1", flush=True)
    running.run(sockets=[bound])


def api_keys(flags: Flags) -> tuple[str, ...]:
    """The keys of which a client must send one; raises `UsageError` where others could send requests without any."""
    from smollm_jax.serve.guard import read_keys

    keys = read_keys(flags.api_key_file, os.environ.get(KEY_VARIABLE))
    if not keys and not server.is_loopback(flags.host):
        raise errors.UsageError(
            f"--host {flags.host} lets others send requests: give --api-key-file, or set {KEY_VARIABLE}"
        )
    return keys


def adapters(flags: Flags) -> dict[str, Path | None]:
    """The adapter of each model by the model's name; None for the weights themselves."""
    base = flags.weights.name
    if not flags.adapter:
        return {base: None}
    if len(flags.adapter) == 1 and ("=" not in flags.adapter[0] or Path(flags.adapter[0]).exists()):
        path = Path(flags.adapter[0])
        return {f"{base}+{path.name}": path}
    models: dict[str, Path | None] = {base: None}
    for text in flags.adapter:
        name, _, path = text.partition("=")
        if not re.fullmatch(r"[\w.:-]+", name) or not path:
            raise errors.UsageError(f"--adapter {text}: must be NAME=PATH, with a name of letters, digits, or _.:-")
        if name in models:
            raise errors.UsageError(f"--adapter {text}: two models have the name {name}")
        models[name] = Path(path)
    return models


def build(flags: Flags):
    """The ASGI app of these flags, with an engine for each model, which ends with the app."""
    try:
        import fastapi  # noqa: F401
        import prometheus_client  # noqa: F401
        import uvicorn  # noqa: F401
    except ImportError as error:
        raise errors.UsageError(install.needs("serve.py", "serve")) from error
    from smollm_jax.runtime import compilation_cache

    compilation_cache.enable()
    from smollm_jax.serve.app import build as build_app
    from smollm_jax.serve.guard import Guard, Policy

    models: list[Served] = []
    for name, adapter in adapters(flags).items():
        models.append(start(flags, name, adapter, models[0] if models else None))
    app = build_app(models)
    names = frozenset({"localhost", "127.0.0.1", "::1", flags.host})
    hosts = names if server.is_loopback(flags.host) else None
    return Guard(app, Policy(hosts, frozenset(flags.allowed_origins), api_keys(flags)))


def start(flags: Flags, name: str, adapter: Path | None, base: "Served | None") -> "Served":
    """A model with its running engine; what it has in common with `base`, the model of the weights, is shared."""
    import jax

    from smollm_jax.generation.engine import Engine
    from smollm_jax.generation.grammar import Grammars
    from smollm_jax.generation.slots import SlotEngine
    from smollm_jax.serve.app import Served

    began = time.perf_counter()
    engine = Engine.load(
        flags.weights, dtype=flags.dtype, tokenizer=flags.tokenizer, quantize=flags.quantize, adapter=adapter
    )
    if base is not None:
        engine.share_equal_weights(base.engine)
    longest = engine.config.max_position_embeddings
    context = min(longest, DEFAULT_CONTEXT) if flags.context is None else flags.context
    slots = SlotEngine(engine, slots=flags.slots, context=context, queue_size=flags.queue_size)
    device, precision = jax.devices()[0].device_kind, flags.quantize or flags.dtype
    print(
        f"model {name}, {precision}, device {device}, {flags.slots} slots of {context:,} tokens: compiling", flush=True
    )
    slots.start()
    print(f"ready after {time.perf_counter() - began:.1f} s", flush=True)
    longest_token = max((len(token.encode()) for token in engine.tokenizer.core.get_vocab()), default=1)
    # Every adapter of these weights has their tokenizer.
    grammars = base.grammars if base else Grammars(engine.tokenizer, engine.config.vocab_size, engine.eos_token_ids)
    return Served(name, slots, int(time.time()), longest_token, grammars)
