"""The subject "serve": completion tokens/s of servers of OpenAI's API, and the time until a client's first text.

Some clients ask at once, each for a greedy stream of the same number of tokens after a prompt of its own, which all
servers get. The prompts of every round are new: no server has a part of one in its cache.
"""

import concurrent.futures
import contextlib
import dataclasses
import http.client
import importlib.util
import json
import os
import shutil
import signal
import socket
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks.compare import (
    ROOT,
    Rows,
    busy_seconds,
    descendants,
    process_environment,
    spread,
    with_ratios,
    write_weights,
)
from benchmarks.starts import DEVICE
from smollm_jax.data.text import documents
from smollm_jax.data.text_sources import text_files
from smollm_jax.errors import SmolLMError, UsageError

if TYPE_CHECKING:
    from benchmarks.options import Flags

CONTEXT = 512  # tokens of a text that every server has room for
WORDS = (24, 96)  # of a prompt, the least and the most
START_SECONDS, ANSWER_SECONDS = 300, 300
TRANSFORMERS_BLOCK = 32  # tokens of a block of its cache
LLAMA_CPP_PYTHON_NEEDS = ("llama_cpp", "sse_starlette", "starlette_context", "pydantic_settings")


@dataclasses.dataclass(frozen=True)
class Answer:
    """What a client got. `first` and `total` are the seconds until its first text and until its end."""

    text: str
    prompt_tokens: int | None  # None: the server does not say
    tokens: int
    first: float
    total: float


class Server:
    """A server in a process group of its own, stopped between its turns: threads that spin take no core from others."""

    def __init__(self, name: str, command: list[Any], port: int, folder: Path):
        self.name, self.port, self.log = name, port, folder / f"{name}.log"
        variables = process_environment(HF_HOME=str(folder / "hf"), HF_HUB_OFFLINE="1")
        with self.log.open("w") as log:
            self.process = subprocess.Popen(
                list(map(str, command)), env=variables, stdout=log, stderr=log, start_new_session=True
            )

    def wait(self, prompt: str) -> None:
        """Returns once the server has answered."""
        deadline = time.monotonic() + START_SECONDS
        while True:
            try:
                ask(self, prompt, 2)
                return
            except (OSError, http.client.HTTPException) as error:
                if self.process.poll() is not None or time.monotonic() > deadline:
                    lines = self.log.read_text(errors="replace").splitlines()[-20:]
                    raise SmolLMError("\n".join([*lines, f"{self.name} does not serve: {error}"])) from error
            time.sleep(0.2)

    def stop(self) -> None:
        os.killpg(self.process.pid, signal.SIGSTOP)

    def go_on(self) -> None:
        os.killpg(self.process.pid, signal.SIGCONT)

    def close(self) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()

    @property
    def cpu_seconds(self) -> float:
        """CPU time of all its processes so far."""
        fields = [
            Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split() for pid in descendants(self.process.pid)
        ]
        return sum(int(ticks) for each in fields for ticks in each[11:13]) / os.sysconf("SC_CLK_TCK")


def ask(server: Server, prompt: str, new_tokens: int) -> Answer:
    """The answer to one client; raises `SmolLMError` for another status than 200 and for a text without an end."""
    body = {"prompt": prompt, "max_tokens": new_tokens, "temperature": 0, "stream": True}
    body |= {"stream_options": {"include_usage": True}}
    text, finish, usage, first, began = "", None, None, None, time.perf_counter()
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=ANSWER_SECONDS)
    with contextlib.closing(connection):
        connection.request("POST", "/v1/completions", json.dumps(body), {"Content-Type": "application/json"})
        response = connection.getresponse()
        if response.status == 503:
            raise ConnectionError(f"{server.name} is not ready")
        if response.status != 200:
            raise SmolLMError(f"{server.name} answers {response.status}: {response.read(300)!r}")
        for line in response:
            if not line.startswith(b"data: {"):
                continue
            event = json.loads(line[6:])
            if "error" in event:
                raise SmolLMError(f"{server.name} answers {event['error']}")
            usage = event.get("usage") or usage
            for choice in event["choices"]:
                text += choice.get("text", "")
                finish = choice.get("finish_reason") or finish
                first = first or (time.perf_counter() - began if text else None)
    total = time.perf_counter() - began
    if finish is None or first is None:
        raise SmolLMError(f"{server.name} ends a text after {text!r} without a reason")
    if usage is None and finish != "length":
        raise SmolLMError(f"{server.name} does not say how many tokens {text!r} has")
    if usage is None:
        return Answer(text, None, new_tokens, first, total)
    return Answer(text, usage["prompt_tokens"], usage["completion_tokens"], first, total)


def turn(server: Server, prompts: list[list[str]], new_tokens: int) -> dict[str, Any]:
    """The answers to each group of clients that ask at once but the first, and the cores that others took meanwhile."""
    server.go_on()
    (warm_up,), *prompts = prompts
    ask(server, warm_up, 8)  # not timed: since its last turn another server had the caches
    began, busy, own = time.perf_counter(), busy_seconds(), server.cpu_seconds + time.process_time()
    groups = []
    for group in prompts:
        start = time.perf_counter()
        with concurrent.futures.ThreadPoolExecutor(len(group)) as clients:
            answers = list(clients.map(lambda prompt: ask(server, prompt, new_tokens), group))
        groups.append({"answers": answers, "seconds": time.perf_counter() - start})
    own = server.cpu_seconds + time.process_time() - own
    others = max(0.0, (busy_seconds() - busy - own) / (time.perf_counter() - began))
    server.stop()
    return {"groups": groups, "others": others}


def commands(flags: "Flags", weights: Path, ports: dict[str, int]) -> dict[str, list[Any]]:
    """How each server is started: float32 weights and cache, a slot for every client, its own number of threads."""
    slots, file = max(flags.clients), weights / "model.gguf"
    threads = len(os.sched_getaffinity(0))
    blocks, python = slots * CONTEXT // TRANSFORMERS_BLOCK, [sys.executable, "-m"]
    starts = {
        "ours": [sys.executable, ROOT / "scripts/serve.py", "--weights", weights],
        "transformers": [*python, "transformers.cli.transformers", "serve", weights],
        "llama-server": [flags.llama_server, "--model", file],
        "llama-cpp-python": [*python, "llama_cpp.server", "--model", file],
    }
    options = {
        "ours": f"--slots {slots} --context {CONTEXT} --queue-size {slots}",
        "transformers": f"--device cpu --dtype float32 --continuous-batching --cb-block-size {TRANSFORMERS_BLOCK} "
        f"--cb-num-blocks {blocks} --cb-max-batch-tokens {CONTEXT}",
        # With its flash attention, which rounds, two fifths of the texts are others.
        "llama-server": f"--parallel {slots} --ctx-size {slots * CONTEXT} --cache-type-k f32 --cache-type-v f32 "
        "--flash-attn off",
        # It has no slots: requests wait for each other. Without the last option each would end the one before.
        "llama-cpp-python": f"--n_ctx {CONTEXT} --n_threads {threads} --n_threads_batch {threads} "
        "--type_k 0 --type_v 0 --interrupt_requests False",
    }
    return {name: [*starts[name], *options[name].split(), "--port", port] for name, port in ports.items()}


def is_installed(module: str) -> bool:
    with contextlib.suppress(ModuleNotFoundError):  # of the package around it
        return importlib.util.find_spec(module) is not None
    return False


def check_installed(flags: "Flags") -> None:
    """Raises `UsageError` for a server that is not installed."""
    if "transformers" in flags.baselines and not all(
        map(is_installed, ("torch", "openai", "transformers.cli.serving"))
    ):
        raise UsageError(
            "--against transformers needs torch and the command `transformers serve`: "
            "pip install torch 'transformers[serving]>=5.3'"
        )
    if "llama-server" in flags.baselines and shutil.which(flags.llama_server) is None:
        raise UsageError(
            f"--llama-server {flags.llama_server}: no such program: build llama.cpp's, see docs/performance.md"
        )
    missing = [name for name in LLAMA_CPP_PYTHON_NEEDS if not is_installed(name)]
    if "llama-cpp-python" in flags.baselines and missing:
        raise UsageError(
            "--against llama-cpp-python needs packages: CMAKE_ARGS=-DGGML_NATIVE=ON pip install --no-binary "
            f"llama-cpp-python 'llama-cpp-python[server]' (missing: {', '.join(missing)})"
        )


def version_of(program: str) -> str:
    """The first line of what a program says of its version; llama.cpp's writes it to stderr."""
    done = subprocess.run([program, "--version"], capture_output=True, text=True, check=False)
    return (done.stdout + done.stderr).strip().partition("\n")[0]


def prompts_of(flags: "Flags") -> list[list[list[str]]]:
    """For each round and one before, for one client and each of `--clients`, as many texts of `WORDS` words."""
    import numpy as np  # not for --help

    words = " ".join(text for file in text_files(flags.text) for text in documents(file)).split()
    rng = np.random.default_rng(0)

    def prompt() -> str:
        start, count = int(rng.integers(0, len(words) - WORDS[1])), int(rng.integers(*WORDS))
        return " ".join(words[start : start + count])

    return [[[prompt() for _ in range(count)] for count in (1, *flags.clients)] for _ in range(flags.rounds + 1)]


def check_same_work(name: str, ours: list[Answer], theirs: list[Answer]) -> None:
    """Raises unless both servers read the same prompts and wrote as many tokens in each answer."""
    for a, b in zip(ours, theirs, strict=True):
        if a.tokens != b.tokens or b.prompt_tokens not in (None, a.prompt_tokens):
            raise SmolLMError(
                f"ours reads {a.prompt_tokens} and writes {a.tokens} tokens, {name} {b.prompt_tokens} and {b.tokens}: "
                "not the same work, so not compared"
            )


def serve(flags: "Flags", folder: Path) -> tuple[str, Rows]:
    """Completion tokens/s and seconds to the first text of each server, for each number of clients."""
    names = ("ours", *flags.baselines)
    gguf = any(name.startswith("llama") for name in names)
    weights = write_weights(flags.preset, folder, gguf=gguf, tokenizer=True)
    printed = subprocess.run([sys.executable, "-c", DEVICE], check=True, capture_output=True, text=True)
    platform, device = printed.stdout.strip().split(None, 1)
    if platform != "cpu" and flags.baselines:
        raise UsageError(f"ours is on a {platform}, the other servers are on a cpu: not comparable")
    (warm_up, *prompts), rounds = prompts_of(flags), []
    with contextlib.ExitStack() as stack:
        sockets = {name: stack.enter_context(socket.create_server(("127.0.0.1", 0))) for name in names}
        ports = {name: bound.getsockname()[1] for name, bound in sockets.items()}
        for bound in sockets.values():
            bound.close()
        servers = {}
        for name, command in commands(flags, weights, ports).items():
            print(f"{name}: starting", flush=True)
            servers[name] = Server(name, command, ports[name], folder)
            stack.callback(servers[name].close)
            servers[name].wait(warm_up[0][0])
            turn(servers[name], warm_up, 4)
        for groups in prompts:
            rounds.append({name: turn(server, groups, flags.new_tokens) for name, server in servers.items()})
    return device, rows_of(flags.clients, rounds)


def rows_of(clients: tuple[int, ...], rounds: list[dict[str, Any]]) -> Rows:
    """The rows of all rounds, each a `turn` of every server."""
    rows: Rows = {}
    for i, count in enumerate(clients):
        groups = {name: [answers[name]["groups"][i] for answers in rounds] for name in rounds[0]}
        for name in groups:
            for ours, theirs in zip(groups["ours"], groups[name], strict=True):
                check_same_work(name, ours["answers"], theirs["answers"])
        what = f"{count} client{'s' if count > 1 else ''}"
        speeds = {
            name: [sum(answer.tokens for answer in group["answers"]) / group["seconds"] for group in column]
            for name, column in groups.items()
        }
        firsts = {
            name: [statistics.median(answer.first for answer in group["answers"]) for group in column]
            for name, column in groups.items()
        }
        rows |= with_ratios(f"tokens/s, {what}", speeds) | with_ratios(f"seconds to first text, {what}", firsts, min)
    for name in rounds[0]:
        if name != "ours":
            rows[f"texts equal to ours, {name}"] = spread([equal_texts(answers, name) for answers in rounds])
    for name in rounds[0]:
        rows[f"cores others took, {name}"] = spread([answers[name]["others"] for answers in rounds])
    return rows


def equal_texts(answers: dict[str, Any], name: str) -> float:
    """The share of one round's texts that are ours, letter by letter; rounding decides near-ties of greedy tokens."""
    pairs = zip(answers["ours"]["groups"], answers[name]["groups"], strict=True)
    same = [a.text == b.text for ours, theirs in pairs for a, b in zip(ours["answers"], theirs["answers"], strict=True)]
    return sum(same) / len(same)
