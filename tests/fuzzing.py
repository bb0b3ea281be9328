"""Coverage-guided fuzzing of everything that reads a stranger's bytes, by atheris (Python 3.11 to 3.13).

    pip install atheris
    python -m tests.fuzzing gguf 60          # one target, so many seconds; exit status 1 after a crash
    python -m tests.fuzzing all 600          # each target for so long: `make soak`

A target takes bytes and must return, or raise a `SmolLMError` of one printable line. Inputs that reach new code are
kept under `build/fuzzing/TARGET`, and later runs start from them; one that crashes a target is kept beside them. Put it
into `tests/crashes/` as `TARGET-NAME`: `tests/test_fuzzing.py` runs it from then on.
"""

import asyncio
import contextlib
import functools
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

ROOT = Path(__file__).parent.parent
Target = Callable[[bytes], object]


@functools.cache
def memory_folder() -> Path:
    """A folder in memory, for readers that take a path."""
    shm = Path("/dev/shm")
    return Path(tempfile.mkdtemp(prefix="fuzzing-", dir=shm if os.access(shm, os.W_OK) else None))


def written(name: str, content: bytes) -> Path:
    path = memory_folder() / name
    path.write_bytes(content)
    return path


def safetensors(content: bytes) -> object:
    from smollm_jax import weights

    return weights.read(written("x.safetensors", content))


def gguf(content: bytes) -> object:
    from smollm_jax import weights

    return weights.read(written("x.gguf", content))


def tokenizer(content: bytes) -> object:
    from smollm_jax.tokenizer import Tokenizer

    loaded = Tokenizer.from_files({"tokenizer.json": content}, Path("x"))
    return loaded.decode(loaded.encode("the 12 é\n", parse_special=True))


def config(content: bytes) -> object:
    from smollm_jax.config.hf_config import read_config

    return read_config(written("config.json", content))


def template(content: bytes) -> object:
    """Compiled here, where the coverage is measured, and rendered in the process that bounds it."""
    from smollm_jax.tokenizer import template_process
    from smollm_jax.tokenizer.chat_template import ChatTemplates
    from smollm_jax.tokenizer.conversation import Conversation
    from smollm_jax.tokenizer.template_environment import compile_template

    source = content.decode(errors="replace")
    compile_template(source, "x")
    chat = Conversation([{"role": "user", "content": "Hi"}])
    with mock.patch.object(template_process, "PROCESS", quick_template_process()):
        return ChatTemplates({"default": ("x", source)}).render(chat, {"bos_token": "<s>", "eos_token": "</s>"})


@functools.cache
def quick_template_process():
    """One with smaller limits than the commands', for many inputs that reach them."""
    from smollm_jax.tokenizer.template_process import TemplateProcess

    return TemplateProcess(cpu_seconds=1, memory_bytes=256 << 20)


def json_lines(content: bytes) -> object:
    from smollm_jax.data.bad_text import BadTextHandler
    from smollm_jax.data.examples.rows import example_of, kind_of_row
    from smollm_jax.data.text import documents, records
    from smollm_jax.errors import InputFileError

    path = written("x.jsonl", content)
    with contextlib.suppress(InputFileError):
        list(documents(path, "text", BadTextHandler("skip")))
    for where, row in records(path):
        with contextlib.suppress(InputFileError):
            if (kind := kind_of_row(row, where)) != "preference pair":
                example_of(row, kind, where)
    return list(documents(path))


def parquet(content: bytes) -> object:
    from smollm_jax.data.text import documents, records
    from smollm_jax.errors import InputFileError

    path = written("x.parquet", content)
    with contextlib.suppress(InputFileError):
        list(records(path))
    return list(documents(path))


def request(content: bytes) -> object:
    """The body of a call of the page, through the filter and the checks of its values."""
    from smollm_jax.errors import UsageError
    from smollm_jax.web import requests
    from smollm_jax.web.middleware import RefusedError, RequestFilter, read_body

    async def receive() -> dict[str, Any]:
        return {"type": "http.request", "body": content}

    page = RequestFilter(None, None, {0: len(requests.SLIDERS) + 2}, lambda _: True)  # type: ignore[arg-type]
    try:
        page.check_call(body := asyncio.run(read_body({}, receive)), "/gradio_api/queue/join")
    except RefusedError as error:
        raise UsageError(error.reason) from error
    chat, stop, *numbers = json.loads(body)["data"]
    named = dict(zip(requests.SLIDERS, numbers, strict=True))
    return requests.conversation(chat), requests.generation_request(named, stop)


TARGETS: dict[str, Target] = {
    "safetensors": safetensors,
    "gguf": gguf,
    "tokenizer": tokenizer,
    "config": config,
    "template": template,
    "json_lines": json_lines,
    "parquet": parquet,
    "request": request,
}


def check(target: Target, content: bytes) -> None:
    """Runs a target; anything but a result or an error of one printable line is raised."""
    from smollm_jax.errors import SmolLMError

    try:
        target(content)
        message = ""
    except SmolLMError as error:
        message = str(error)
    assert message.isprintable(), f"not one line: {message!r}"
    assert len(message) < 3000


def seeds(name: str) -> list[bytes]:
    """Valid inputs to start from."""
    from tests import chat_templates, small_files

    if name == "config":
        from smollm_jax.config.hf_config import config_to_hf

        return [json.dumps(config_to_hf(small_files.SMALL)).encode()]
    if name == "tokenizer":
        return [small_files.small_tokenizer()["tokenizer.json"]]
    if name == "template":
        return [template.encode() for template in chat_templates.TEMPLATES.values()]
    if name == "json_lines":
        chat = {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b", "weight": 1}]}
        rows = [[{"text": "a"}, {"text": "é"}], [chat], [{"prompt": "a", "completion": "b"}, {"instruction": "a"}]]
        return [b"".join(json.dumps(row).encode() + b"\r\n" for row in lines) for lines in rows]
    if name == "request":
        from smollm_jax.web.requests import SLIDERS

        numbers = [slider.default for slider in SLIDERS.values()]
        call = {"fn_index": 0, "session_hash": "a", "data": [[{"role": "user", "content": "a"}], "\\n", *numbers]}
        return [json.dumps(call).encode()]
    path = memory_folder() / f"seed.{name}"
    path.unlink(missing_ok=True)
    if name == "parquet":
        import pyarrow
        import pyarrow.parquet

        values = pyarrow.array(["a", "", "é"])
        table = pyarrow.table({"text": values, "category": values.dictionary_encode()})
        pyarrow.parquet.write_table(table, path, compression="none")
    else:
        from smollm_jax import weights
        from smollm_jax.weights.bundle import Bundle

        bundle = Bundle(small_files.small_tensors(), small_files.SMALL, small_files.small_tokenizer())
        weights.write(path, bundle, name)
    return [path.read_bytes()]


def fuzz(name: str, seconds: int) -> None:
    """Fuzzes one target; libFuzzer ends the process, with a status that is not 0 after a crash."""
    import atheris

    folder = ROOT / "build/fuzzing" / name
    (folder / "corpus").mkdir(parents=True, exist_ok=True)
    with atheris.instrument_imports(include=["smollm_jax"]):
        target = TARGETS[name]
        starts = seeds(name)
        for content in starts:  # imports what the target needs, with instrumentation
            check(target, content)
    for number, content in enumerate(starts):
        (folder / "corpus" / f"seed-{number}").write_bytes(content)
    longest = max(4096, 2 * max(map(len, starts)))
    options = [f"-max_total_time={seconds}", f"-max_len={longest}", "-timeout=30", "-rss_limit_mb=4096"]
    options += [f"-artifact_prefix={folder}/", "-print_final_stats=1", "-verbosity=1"]
    atheris.Setup([sys.argv[0], *options, str(folder / "corpus")], lambda content: check(target, content))
    atheris.Fuzz()


def main() -> None:
    name, seconds = sys.argv[1], int(sys.argv[2])
    if name != "all":
        fuzz(name, seconds)
        return
    crashed = [
        target
        for target in TARGETS
        if subprocess.run(
            [sys.executable, "-m", "tests.fuzzing", target, str(seconds)], cwd=ROOT, check=False
        ).returncode
    ]
    print(f"{len(TARGETS) - len(crashed)} of {len(TARGETS)} targets without a crash", *crashed, sep="\n")
    sys.exit(1 if crashed else 0)


if __name__ == "__main__":
    main()
