"""Conversations with chat.py and generate.py in real processes, with tiny weights."""

import importlib
import json
import os
import pty
import re
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest
import tyro

from smollm_jax import weights
from smollm_jax.errors import SmolLMError
from smollm_jax.generation.engine import Engine
from smollm_jax.generation.sampling import Sampling
from smollm_jax.tokenizer.source import read_tokenizer_files

ROOT = Path(__file__).parents[2]
SHORT = ("--max-tokens", "12")


@pytest.fixture(scope="module")
def folder(tmp_path_factory, tiny_model, weights_path):
    """A folder of tiny weights with an Instruct tokenizer."""
    files = read_tokenizer_files(weights_path)
    path = tmp_path_factory.mktemp("tiny") / "weights"
    weights.write(path, weights.to_bundle(tiny_model, "tiny", files), "hf")
    return path


@pytest.fixture(scope="module")
def engine(folder):
    return Engine.load(folder)


def command(script: str, folder: Path, *flags: object) -> list[str]:
    return [sys.executable, str(ROOT / "scripts" / script), "--weights", str(folder), *map(str, flags)]


ENVIRONMENT = os.environ | {"PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": "1", "PYTHONIOENCODING": "utf-8"}


def start(arguments: list[str], **options) -> subprocess.Popen:
    options = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE} | options
    return subprocess.Popen(arguments, env=ENVIRONMENT, **options)


def talk(lines: list[str], folder: Path, *flags: object, script: str = "chat.py") -> tuple[int, str, str]:
    """Exit status, stdout and stderr of the program for these lines on stdin."""
    process = start(command(script, folder, *flags))
    out, err = process.communicate("\n".join([*lines, ""]).encode(), timeout=300)
    return process.returncode, out.decode(), err.decode()


def answer(engine: Engine, messages: list[dict[str, str]], count: int = 12) -> str:
    return engine.complete([engine.chat(messages)], max_new_tokens=count)[0].text


def in_process(script: str, folder: Path, *flags: str) -> None:
    """Runs the command in this process, which has already imported JAX."""
    importlib.import_module(f"smollm_jax.commands.{script}").main(["--weights", str(folder), *flags])


def refused(script: str, folder: Path, flags: Sequence[str], code: int, named: str) -> None:
    """Asserts that the command raises this error, one line with this exit code, which `run_main` prints."""
    with pytest.raises(SmolLMError, match=re.escape(named)) as caught:
        in_process(script, folder, *flags)
    assert caught.value.exit_code == code
    assert "\n" not in str(caught.value)


@pytest.fixture(autouse=True)
def no_cache_of_the_users(monkeypatch, tmp_path):
    """Keeps compiled programs out of the user's home folder."""
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", str(tmp_path / "compiled"))


def user(text: str) -> dict[str, str]:
    return {"role": "user", "content": text}


def assistant(text: str) -> dict[str, str]:
    return {"role": "assistant", "content": text}


def test_a_conversation_reads_all_that_was_said_until_it_is_reset(engine, folder, tmp_path):
    lines = [
        "Grüße!",
        "",
        "/save a.json",
        "And you?",
        "/save b.json",
        "/reset",
        "Grüße!",
        "/save a.json",
        "/what",
        "/save",
    ]
    process = start(command("chat.py", folder, *SHORT), cwd=tmp_path)
    out, err = process.communicate("\n".join([*lines, "/exit", "unread", ""]).encode(), timeout=300)
    assert process.returncode == 0, err.decode()
    first = answer(engine, [user("Grüße!")])
    talked = [user("Grüße!"), assistant(first), user("And you?")]
    second = answer(engine, talked)
    assert out.decode() == f"{first}\n{second}\n{first}\n"
    assert json.loads((tmp_path / "a.json").read_text(encoding="utf-8")) == talked[:2]
    assert json.loads((tmp_path / "b.json").read_text(encoding="utf-8")) == [*talked, assistant(second)]
    messages = ("a.json: not saved: ", "(new conversation)", "unknown command /what", "needs a file name", "(cut off ")
    assert all(message in err.decode() for message in messages), err.decode()

    # What was saved can be gone on from.
    status, out, _ = talk(["And you?"], folder, *SHORT, "--history", tmp_path / "a.json")
    assert (status, out) == (0, f"{second}\n")


def test_the_system_prompt_outlives_a_reset(engine, folder):
    system = {"role": "system", "content": "Speak like a sailor."}
    with_system = answer(engine, [system, user("Hello")])
    assert with_system != answer(engine, [user("Hello")])
    status, out, err = talk(["Hello", "/reset", "Hello"], folder, *SHORT, "--system", system["content"])
    assert (status, out) == (0, f"{with_system}\n{with_system}\n"), err


def test_a_terminal_shows_a_prompt_and_ctrl_c_ends_an_answer_only(folder, tmp_path):
    ours, theirs = pty.openpty()
    process = start(
        command("chat.py", folder, "--max-tokens", "100000", "--context", "slide"), stdin=theirs, cwd=tmp_path
    )
    assert process.stdout
    assert process.stderr
    os.write(ours, b"Hello\n")
    assert process.stdout.read(12).startswith(b"> ")
    process.send_signal(signal.SIGINT)
    os.write(ours, b"/save talk.json\n/exit\n")
    _, err = process.communicate(timeout=300)
    os.close(ours)
    os.close(theirs)
    assert process.returncode == 0, err.decode()
    assert "(interrupted)" in err.decode()
    question, reply = json.loads((tmp_path / "talk.json").read_text(encoding="utf-8"))
    assert question == user("Hello")
    assert reply["role"] == "assistant"
    assert reply["content"]


def test_a_full_context_is_said_and_the_conversation_goes_on(folder):
    status, out, err = talk(["word " * 500, "Hello"], folder, *SHORT)
    assert status == 0
    assert "exceed the context of 512; /reset starts a new conversation" in err
    assert len(out.splitlines()) >= 1
    status, _, err = talk(["word " * 500], folder, *SHORT, "--context", "slide")
    assert status == 0
    assert "error" not in err


@pytest.mark.parametrize(
    ("flags", "code", "named"),
    [
        (("--history", "{tmp}/none.json"), 3, "none.json"),
        (("--history", "{tmp}/bad.json"), 3, "not a list of messages"),
        (("--history", "{tmp}/bad.json", "--system", "x"), 2, "--system"),
        (("--top-p", "2"), 2, "top_p"),
        (("--seed", "-1"), 2, "seed"),
    ],
)
def test_what_cannot_be_talked_with_is_refused_in_one_line(folder, tmp_path, flags, code, named):
    (tmp_path / "bad.json").write_text('[{"role": "user"}]')
    refused("chat", folder, [flag.format(tmp=tmp_path) for flag in flags], code, named)


def test_generate_takes_prompts_of_every_kind_and_gives_json(engine, folder, tmp_path, capsys):
    (tmp_path / "prompt.txt").write_text("Ünder the sea", encoding="utf-8")
    prompts = ["The capital", "- of France", "Ünder the sea"]
    flags = ("--prompt", prompts[0], f"--prompt={prompts[1]}", "--prompt-file", tmp_path / "prompt.txt", *SHORT)
    status, out, err = talk([], folder, *flags, "--json", "--logprobs", 2, script="generate.py")
    assert status == 0, err
    printed = json.loads(out)
    ids = [engine.encode(prompt) for prompt in prompts]
    for row, prompt, completion in zip(
        printed["completions"], prompts, engine.complete(ids, max_new_tokens=12, alternatives=2), strict=True
    ):
        assert (row["prompt"], row["text"], row["finish"]) == (prompt, completion.text, completion.finish)
        assert (row["prompt_ids"], row["ids"]) == (engine.encode(prompt), [token.id for token in completion.tokens])
        assert row["logprobs"] == pytest.approx([token.logprob for token in completion.tokens], abs=1e-4)
        assert [[alternative["id"] for alternative in alternatives] for alternatives in row["alternatives"]] == [
            [i for i, _, _ in token.alternatives] for token in completion.tokens
        ]
    assert printed["timings"]["tokens"] == sum(len(row["ids"]) for row in printed["completions"])
    assert {"load_seconds", "first_token_seconds", "seconds", "tokens_per_second"} <= set(printed["timings"])

    in_process("generate", folder, *map(str, flags))
    assert capsys.readouterr().out == "".join(f"{row['prompt']}{row['text']}\n\n" for row in printed["completions"])
    status, out, _ = talk(["The capital"], folder, *SHORT, script="generate.py")
    assert (status, out) == (0, f"The capital{printed['completions'][0]['text']}\n")
    system = ("--prompt", "Hello", "--system", "Be brief.", *SHORT)
    messages = [{"role": "system", "content": "Be brief."}, user("Hello")]
    in_process("generate", folder, *map(str, system))
    assert capsys.readouterr().out == answer(engine, messages) + "\n"


@pytest.mark.parametrize(
    ("flags", "code", "named"),
    [
        (("--prompt", "x", "--logprobs", "3"), 2, "--logprobs"),
        (("--prompt", "x", "--json", "--logprobs", "21"), 2, "alternatives"),
        (("--prompt", "x", "--stop", ""), 2, "stop"),
        (("--prompt", "x", "--special-tokens", "--chat"), 2, "--special-tokens"),
        (("--prompt-file", "nowhere.txt"), 3, "nowhere.txt"),
        (("--prompt", "x", "--max-tokens", "512"), 2, "context of 512"),
    ],
)
def test_what_cannot_be_generated_is_refused_in_one_line(folder, capsys, flags, code, named):
    refused("generate", folder, flags, code, named)
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("script", ["generate", "chat"])
@pytest.mark.parametrize("ours", [False, True])
def test_flags_go_by_mlx_lm_s_names_and_by_ours(script, ours):
    names = ["--max-new-tokens", "--temperature"] if ours else ["--max-tokens", "--temp"]
    names += ["--top-p", "--top-k", "--min-p", "--seed"]
    words = [word for pair in zip(names, ["12", "1.5", "0.9", "40", "0.02", "7"], strict=True) for word in pair]
    flags = tyro.cli(importlib.import_module(f"smollm_jax.commands.{script}").Flags, args=["--weights", "w", *words])
    assert flags.max_new_tokens == 12
    assert flags.sampling.checked() == Sampling(temperature=1.5, top_p=0.9, top_k=40, min_p=0.02, seed=7)


def test_generate_draws_as_its_flags_say_and_ends_before_a_stop_string(engine, folder, capsys):
    ids, sampling = [engine.encode("The sea")], Sampling(temperature=1.5, top_k=40, seed=7)
    drawn = engine.complete(ids, max_new_tokens=12, sampling=sampling)[0].text
    assert drawn != engine.complete(ids, max_new_tokens=12)[0].text
    flags = ["--prompt", "The sea", *SHORT, "--temp", "1.5", "--top-k", "40", "--seed", "7"]
    stop = drawn[-9:-6]
    in_process("generate", folder, *flags, "--stop", "never", "--stop", stop)
    assert capsys.readouterr().out == f"The sea{drawn[: drawn.index(stop)]}\n"
