"""The web page served for tests: real HTTP on a real port, tiny random weights with the Instruct tokenizer."""

import contextlib
import html
import json
import re
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import uvicorn

from smollm_jax import weights
from smollm_jax.commands import app
from smollm_jax.runs.checkpoint import CheckpointStore
from smollm_jax.web import server
from smollm_jax.web.requests import SLIDERS
from smollm_jax.weights import mapping
from tests import trainer

GREEDY = {name: slider.default for name, slider in SLIDERS.items()} | {
    "temperature": 0.0,
    "top_p": 1.0,
    "max_new_tokens": 16,
}


@contextlib.contextmanager
def served(flags: app.Flags) -> Iterator[str]:
    """Serves a page in a thread of this process and yields its address."""
    listener = server.listen(flags.host, 0)
    with pytest.MonkeyPatch.context() as patch:  # nothing in the home of whoever runs the tests
        patch.setenv("JAX_COMPILATION_CACHE_DIR", trainer.CACHE)
        page = app.build(flags)
    running = uvicorn.Server(uvicorn.Config(page, log_level="error", ws="none"))
    thread = threading.Thread(target=running.run, kwargs={"sockets": [listener]})
    thread.start()
    try:
        while not running.started:
            time.sleep(0.01)
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"
    finally:
        running.should_exit = True
        thread.join()


class Client:
    """A visitor of the page, who need not use a browser."""

    def __init__(self, url: str, weights: str = ""):
        self.http = httpx.Client(base_url=url, timeout=120)
        self.weights = weights
        config = self.http.get("/config").json()
        self.functions = {d["api_name"]: d["id"] for d in config["dependencies"]}

    def __enter__(self) -> "Client":
        return self

    def __exit__(self, *_: object) -> None:
        self.http.close()

    def values(self, prompt: Any, **changed: Any) -> list[Any]:
        """The values that the page sends to continue a prompt."""
        numbers = GREEDY | {name: value for name, value in changed.items() if name in SLIDERS}
        return [changed.get("weights", self.weights), prompt, changed.get("stop", ""), *numbers.values()]

    def join(self, session: str, function: str, values: list[Any]) -> httpx.Response:
        body = {"data": values, "fn_index": self.functions[function], "session_hash": session}
        # Python's own JSON writes NaN and Infinity, as a client that means harm would.
        return self.http.post(
            "/gradio_api/queue/join", content=json.dumps(body), headers={"content-type": "application/json"}
        )

    def events(self, session: str) -> Iterator[dict[str, Any]]:
        with self.http.stream("GET", "/gradio_api/queue/data", params={"session_hash": session}) as response:
            for line in response.iter_lines():
                if line.startswith("data:"):
                    yield json.loads(line[5:])

    def call(self, session: str, function: str, values: list[Any]) -> tuple[list[Any] | None, str]:
        """The last values received and the page's error line; one of the two is empty."""
        joined = self.join(session, function, values)
        if joined.status_code != 200:
            return None, str(joined.json()["detail"])
        output: list[Any] | None = None
        for event in self.events(session):
            if event["msg"] == "process_generating":
                output = applied(output, event["output"]["data"])
            if event["msg"] == "process_completed":
                assert event["success"], event["output"]["error"]
                fault = re.fullmatch(r'<p class="fault" role="alert">(.*)</p>', str((output or [""] * 3)[2]), re.DOTALL)
                return (None, html.unescape(fault[1])) if fault else (output, "")
        raise AssertionError("the stream ended without an answer")

    def complete(self, prompt: Any, session: str = "one", **changed: Any) -> tuple[list[Any] | None, str]:
        return self.call(session, "complete", self.values(prompt, **changed))


def applied(old: list[Any] | None, new: list[Any]) -> list[Any]:
    """Applies Gradio's updates: it sends complete values first, then changes, here texts that grow or are replaced."""
    if old is None:
        return new
    values = list(old)
    for place, changes in enumerate(new):
        for action, path, value in changes:
            if action == "append" and not path:
                values[place] += value
            elif action == "replace" and not path:
                values[place] = value
            else:
                values[place] = deep(values[place], action, path, value)
    return values


def deep(value: Any, action: str, path: list[Any], new: Any) -> Any:
    copy = json.loads(json.dumps(value))
    at = copy
    for step in path[:-1]:
        at = at[step]
    if action == "append":
        at[path[-1]] += new
    elif action == "replace":
        at[path[-1]] = new
    elif action == "add":
        at.insert(path[-1], new) if isinstance(at, list) else at.update({path[-1]: new})
    else:
        del at[path[-1]]
    return copy


def tiny_run(folder: Path, tokenizer: Path, name: str, steps: tuple[int, ...]) -> Path:
    """Writes folder/runs/name: a checkpoint per step with the weights of folder/assets/tiny{step}, and a short log."""
    run = folder / "runs" / name
    run.parent.mkdir(exist_ok=True)
    for step in steps:
        source = weights.read(tiny_weights(folder, tokenizer, f"tiny{step}", seed=step))
        if step == steps[0]:
            weights.write(run, source, "orbax")  # as step 0
        else:
            with CheckpointStore(run / "checkpoints") as store:
                store.save(step, {"params": mapping.from_hf(source.tensors, source.config)}, {})
    rows = [{"step": step, "loss": 9 - step / 20, "tokens_per_second": 7.0} for step in range(1, steps[-1] + 1)]
    (run / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return run


def tiny_weights(folder: Path, tokenizer: Path, name: str = "tiny", seed: int = 0) -> Path:
    """Writes random weights of the tiny preset under folder/assets."""
    from scripts import random_weights

    target = folder / "assets" / name
    target.parent.mkdir(parents=True, exist_ok=True)
    random_weights.main(["--preset", "tiny", "--out", str(target), "--tokenizer", str(tokenizer), "--seed", str(seed)])
    return target
