"""An exported model loads in other programs, complete and without a warning, and generates our engine's text."""

import contextlib
import json
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest
from huggingface_hub import ModelCard
from transformers import AutoTokenizer, GenerationConfig

from parity_tests.conftest import load_hf
from smollm_jax import weights
from smollm_jax.generation.engine import Engine
from tests.trainer import ENVIRONMENT

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
    """The output of transformers' pipeline in a separate process, and all its warnings."""
    command = [sys.executable, "-c", PIPELINE, str(folder), json.dumps(asked)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=ENVIRONMENT)
    assert done.returncode == 0, done.stderr
    complaints = [line for line in done.stderr.replace("\r", "\n").splitlines() if "Loading weights" not in line]
    return [json.loads(line) for line in done.stdout.splitlines()], "\n".join(complaints).strip()


def test_an_export_has_a_card_and_the_ids_that_begin_and_end_a_text(exported, source):
    real, bundle = exported.name == "instruct", weights.read(source)
    card = ModelCard.load(exported / "README.md")
    assert (card.data.library_name, card.data.pipeline_tag) == ("transformers", "text-generation")
    assert f"{sum(tensor.size for tensor in bundle.tensors.values()):,} parameters, float32" in card.text
    assert bundle.origin in card.text
    assert ("dequantised Q4_1" if real else "step 3 of run from-scratch") in bundle.origin
    tokenizer = AutoTokenizer.from_pretrained(exported)
    for names in (load_hf(exported).config, tokenizer, GenerationConfig.from_pretrained(exported)):
        ids = [getattr(names, f"{name}_token_id") for name in ("bos", "eos", "pad")]
        assert ids == ([1, 2, 2] if real else [0, 0, None])
    assert bool(tokenizer.chat_template) is real


@pytest.mark.slow
def test_a_pipeline_loads_the_instruct_export_and_chats(instruct_export):
    chat = [{"role": "user", "content": "What is two plus two?"}]
    (output, ids), complaints = piped(instruct_export, chat)
    assert complaints == ""
    engine = Engine.load(instruct_export)
    assert output[-1]["content"] == engine.complete([engine.chat(chat)], max_new_tokens=12)[0].text
    assert ids == [[1, 2, 2], [1, 2, 2]]


@pytest.mark.slow
def test_a_pipeline_loads_what_was_trained_here_from_scratch(trained, trained_export):
    (output, ids), complaints = piped(trained_export, "Fellow citizens")
    assert complaints == ""
    engine = Engine.load(trained)
    assert output == "Fellow citizens" + engine.complete([engine.encode("Fellow citizens")], max_new_tokens=12)[0].text
    assert ids == [[0, 0, None], [0, 0, None]]


@contextlib.contextmanager
def served(folder: Path, *command: object) -> Iterator[str]:
    """Starts a server command with --port and yields its address; its log is in `folder`."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    with (folder / "log").open("w") as log:
        process = subprocess.Popen([*map(str, command), "--port", str(port)], stdout=log, stderr=log, env=ENVIRONMENT)
    try:
        deadline = time.monotonic() + 300
        while "Uvicorn running" not in (output := (folder / "log").read_text()):
            assert process.poll() is None, output
            assert time.monotonic() < deadline, output
            time.sleep(0.2)
        yield f"http://127.0.0.1:{port}"
    finally:
        process.terminate()
        process.wait(timeout=60)


def answer(address: str, chat: list, model: str) -> str:
    """A server's greedy answer of 12 tokens."""
    body = {"model": model, "messages": chat, "max_tokens": 12, "temperature": 0, "stream": False}
    header = {"content-type": "application/json"}
    request = urllib.request.Request(f"{address}/v1/chat/completions", json.dumps(body).encode(), header)
    with urllib.request.urlopen(request, timeout=180) as answer:
        return json.load(answer)["choices"][0]["message"]["content"]


@pytest.mark.slow
def test_transformers_serve_answers_as_our_engine_does(instruct_export, tmp_path):
    """Sends requests over HTTP to the server command of docs/serving.md."""
    program = Path(sys.executable).parent / "transformers"
    chat = [{"role": "user", "content": "Name the capital of France."}]
    with served(tmp_path, program, "serve", instruct_export, "--device", "cpu", "--dtype", "float32") as address:
        output = answer(address, chat, str(instruct_export))
    engine = Engine.load(instruct_export)
    assert output == engine.complete([engine.chat(chat)], max_new_tokens=12)[0].text
