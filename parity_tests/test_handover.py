"""What we hand over loads elsewhere, whole and without a warning, and says what our engine says."""

import json
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import pytest

from smollm_jax import weights
from smollm_jax.engine import Engine
from tests.trainer import ENVIRONMENT, train

PIPELINE = """
import json, sys, warnings
warnings.simplefilter("error")
from transformers import pipeline
write = pipeline("text-generation", sys.argv[1], dtype="float32")
asked = json.loads(sys.argv[2])
print(json.dumps(write(asked, max_new_tokens=12, do_sample=False)[0]["generated_text"]))
ids = [getattr(write.tokenizer, f"{name}_token_id") for name in ("bos", "eos", "pad")]
print(json.dumps([ids, [getattr(write.model.config, f"{name}_token_id") for name in ("bos", "eos", "pad")]]))
"""


def piped(folder: Path, asked) -> tuple[list, str]:
    """What transformers' pipeline gives in a process of its own, and everything it complains of."""
    command = [sys.executable, "-c", PIPELINE, str(folder), json.dumps(asked)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=ENVIRONMENT)
    assert done.returncode == 0, done.stderr
    complaints = [line for line in done.stderr.replace("\r", "\n").splitlines() if "Loading weights" not in line]
    return [json.loads(line) for line in done.stdout.splitlines()], "\n".join(complaints).strip()


@pytest.fixture(scope="module")
def instruct(weights_path, tmp_path_factory):
    folder = tmp_path_factory.mktemp("exported") / "instruct"
    weights.write(folder, weights.read(weights_path), "hf")
    return folder


def test_a_pipeline_loads_the_instruct_export_and_chats(instruct):
    chat = [{"role": "user", "content": "What is two plus two?"}]
    (said, ids), complaints = piped(instruct, chat)
    assert complaints == ""
    engine = Engine.load(instruct)
    assert said[-1]["content"] == engine.complete([engine.chat(chat)], max_new_tokens=12)[0].text
    assert ids == [[1, 2, 2], [1, 2, 2]]


def test_a_pipeline_loads_what_was_trained_here_from_scratch(tmp_path):
    assert train(tmp_path / "run", "--steps", "3").returncode == 0
    weights.write(tmp_path / "hf", weights.read(tmp_path / "run"), "hf")
    (said, ids), complaints = piped(tmp_path / "hf", "Fellow citizens")
    assert complaints == ""
    engine = Engine.load(tmp_path / "run")
    assert said == "Fellow citizens" + engine.complete([engine.encode("Fellow citizens")], max_new_tokens=12)[0].text
    assert ids == [[0, 0, None], [0, 0, None]]


def test_transformers_serve_answers_as_our_engine_does(instruct, tmp_path):
    """The README's command, asked over HTTP."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    program = Path(sys.executable).parent / "transformers"
    command = [program, "serve", str(instruct), "--port", str(port), "--device", "cpu", "--dtype", "float32"]
    with (tmp_path / "log").open("w") as log:
        process = subprocess.Popen(list(map(str, command)), stdout=log, stderr=log, env=ENVIRONMENT)
    try:
        deadline = time.monotonic() + 300
        while "Uvicorn running" not in (said := (tmp_path / "log").read_text()):
            assert process.poll() is None, said
            assert time.monotonic() < deadline, said
            time.sleep(0.2)
        chat = [{"role": "user", "content": "Name the capital of France."}]
        body = {"model": str(instruct), "messages": chat, "max_tokens": 12, "temperature": 0, "stream": False}
        request = urllib.request.Request(
            f"http://127.0.0.1:{port}/v1/chat/completions",
            json.dumps(body).encode(),
            {"content-type": "application/json"},
        )
        with urllib.request.urlopen(request, timeout=180) as answer:
            said = json.load(answer)["choices"][0]["message"]["content"]
    finally:
        process.terminate()
        process.wait(timeout=60)
    engine = Engine.load(instruct)
    assert said == engine.complete([engine.chat(chat)], max_new_tokens=12)[0].text
