"""The benchmark of servers: at toy size over HTTP, and what it makes of answers. Asserts nothing about speed."""

import contextlib
import http.server
import json
import threading
import time
import types

import pytest

from benchmarks import serving
from benchmarks.options import check_flags
from benchmarks.serving import Answer
from scripts import benchmark
from smollm_jax.errors import SmolLMError, UsageError
from tests.benchmarks.test_benchmark import measured


@pytest.mark.slow
def test_servers_are_measured_at_the_same_work(tmp_path):
    pytest.importorskip("torch")
    content = measured(tmp_path, "serve", "--clients", "1", "3", "--new-tokens", "4")
    assert {"torch", "transformers", "llguidance"} <= content["environment"].keys()
    rows = content["rows"]
    for name in ("ours", "transformers"):
        for what, count in (("1 client", 1), ("3 clients", 3)):
            seconds = count * 4 / rows[f"tokens/s, {what}, {name}"]["median"]
            assert 0 < rows[f"seconds to first text, {what}, {name}"]["median"] <= seconds
    ours, theirs = (rows[f"tokens/s, 3 clients, {name}"]["median"] for name in ("ours", "transformers"))
    assert rows["tokens/s, 3 clients, ours / transformers"]["median"] == pytest.approx(ours / theirs)
    assert rows["texts equal to ours, transformers"]["median"] >= 0.75


@contextlib.contextmanager
def answering(status: int, *lines: object):
    """A server that answers every request with these lines, 50 ms between two."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_POST(self):
            self.server.bodies.append(json.loads(self.rfile.read(int(self.headers["content-length"]))))
            self.send_response(status)
            self.end_headers()
            for line in lines:
                time.sleep(0.05)
                content = line if isinstance(line, str) else f"data: {json.dumps(line)}"
                self.wfile.write(f"{content}\n\n".encode())

        def log_message(self, *_):
            pass

    with http.server.HTTPServer(("127.0.0.1", 0), Handler) as server:
        server.bodies = []
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield types.SimpleNamespace(name="it", port=server.server_port, bodies=server.bodies)
        server.shutdown()
        thread.join()


def event(text: str, finish: str | None = None) -> dict:
    return {"choices": [{"index": 0, "text": text, "finish_reason": finish}]}


def test_the_first_text_and_the_usage_of_a_stream_are_taken():
    usage = {"choices": [], "usage": {"prompt_tokens": 5, "completion_tokens": 3}}
    with answering(200, event(""), event("a"), ": a comment", event("b", "length"), usage, "data: [DONE]") as server:
        answer = serving.ask(server, "the prompt", 3)
    assert (answer.text, answer.prompt_tokens, answer.tokens) == ("ab", 5, 3)
    assert 0.1 <= answer.first <= answer.total - 0.15, "the first event had no text, and three came after the second"
    (body,) = server.bodies
    assert (body["prompt"], body["max_tokens"], body["temperature"], body["stream"]) == ("the prompt", 3, 0, True)
    with answering(200, event("ab", "length")) as server:
        assert serving.ask(server, "", 7).tokens == 7, "a text that is as long as it may be has all tokens"


@pytest.mark.parametrize(
    ("status", "line", "named"),
    [
        (400, "no", "it answers 400: b'no"),
        (200, {"error": "boom"}, "it answers boom"),
        (200, event("a"), "ends a text after 'a' without a reason"),
        (200, event("", "stop"), "ends a text after '' without a reason"),
        (200, event("a", "stop"), "does not say how many tokens 'a' has"),
    ],
)
def test_an_answer_that_is_none_ends_the_measurement(status, line, named):
    with answering(status, line) as server, pytest.raises(SmolLMError, match=named):
        serving.ask(server, "", 1)
    with answering(503) as server, pytest.raises(ConnectionError, match="not ready"):
        serving.ask(server, "", 1)


def turns(first: float, seconds: float, *tokens: int, text: str = "x", prompt: int | None = 9) -> dict:
    answers = [Answer(text, prompt, count, first * (i + 1), seconds) for i, count in enumerate(tokens)]
    return {"groups": [{"answers": answers, "seconds": seconds}], "others": 0.0}


def test_the_tokens_of_all_clients_are_divided_by_the_time_of_the_slowest():
    rounds = [{"ours": turns(1.0, 4.0, 8, 8, 8), "llama": turns(3.0, 12.0, 8, 8, 8, prompt=None)}]
    rows = serving.rows_of((3,), rounds)
    medians = {name: row["median"] for name, row in rows.items()}
    assert (medians["tokens/s, 3 clients, ours"], medians["tokens/s, 3 clients, ours / llama"]) == (6, 3)
    assert medians["seconds to first text, 3 clients, llama"] == 6, "the median of the clients"
    assert medians["seconds to first text, 3 clients, ours / llama"] == pytest.approx(1 / 3)
    assert medians["texts equal to ours, llama"] == 1
    other = [{"ours": turns(1.0, 4.0, 8, 8), "llama": turns(1.0, 4.0, 8, 8, text="y")}]
    assert serving.rows_of((2,), other)["texts equal to ours, llama"]["median"] == 0


@pytest.mark.parametrize("changed", [{"prompt": 8}, {"tokens": (8, 7)}])
def test_other_work_is_not_compared(changed):
    theirs = turns(1.0, 4.0, *changed.pop("tokens", (8, 8)), **changed)
    with pytest.raises(SmolLMError, match="not the same work"):
        serving.rows_of((2,), [{"ours": turns(1.0, 4.0, 8, 8), "llama": theirs}])


def test_prompts_are_new_in_every_round_and_the_same_in_every_run():
    flags = benchmark.Flags("serve", preset="tiny", rounds=2, clients=(1, 3))
    made = serving.prompts_of(flags)
    assert made == serving.prompts_of(flags)
    assert [[len(group) for group in groups] for groups in made] == [[1, 1, 3]] * 3
    texts = [text for groups in made for group in groups for text in group]
    assert len(set(texts)) == len(texts)
    assert all(serving.WORDS[0] <= len(text.split()) < serving.WORDS[1] for text in texts)


@pytest.mark.parametrize(
    ("flags", "named"),
    [
        ({"clients": ()}, "--clients must be numbers of at least 1"),
        ({"clients": (0, 1)}, "--clients must be numbers of at least 1"),
        ({"new_tokens": 257, "against": ()}, "--new-tokens must be at most 256 for serve, got 257"),
        ({"against": ("llama-server",), "llama_server": "no/such"}, "--llama-server no/such: no such program"),
        ({"against": ("hf",)}, "--against hf: only transformers, llama-server, llama-cpp-python"),
    ],
)
def test_flags_that_cannot_be_honoured_are_refused(flags, named):
    with pytest.raises(UsageError, match=named):
        check_flags(benchmark.Flags("serve", preset="tiny", **flags))


@pytest.mark.parametrize("package", ["transformers", "llama_cpp"])
def test_a_server_that_is_not_installed_is_asked_for_in_one_line(monkeypatch, package):
    monkeypatch.setattr(serving, "is_installed", lambda name: name != package and name != f"{package}.cli.serving")
    name = {"llama_cpp": "llama-cpp-python"}.get(package, package)
    with pytest.raises(UsageError, match=f"--against {name} needs .*pip install"):
        check_flags(benchmark.Flags("serve", against=(name,), preset="tiny"))
