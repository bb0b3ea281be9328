"""Who may send requests: hosts, origins, keys and sizes; and how the command starts and ends."""

import asyncio
import signal
import subprocess
import sys
import time

import httpx
import pytest

from smollm_jax.commands import serve
from smollm_jax.errors import InputFileError, UsageError
from smollm_jax.serve.guard import MAX_BODY, Guard, Policy, read_keys
from smollm_jax.web import server
from tests import trainer
from tests.serving import tiny_weights

KEY = "a-key-of-many-characters"
LOCAL = frozenset({"localhost", "127.0.0.1"})


async def echo(scope, receive, send):
    """Answers with the body that it got."""
    body = (await receive())["body"]
    await send({"type": "http.response.start", "status": 200, "headers": []})
    await send({"type": "http.response.body", "body": body})


def ask(method="POST", path="/v1/completions", *, hosts=LOCAL, origins=(), keys=(), content=b"x", **headers):
    async def request():
        transport = httpx.ASGITransport(Guard(echo, Policy(hosts, frozenset(origins), keys)))
        async with httpx.AsyncClient(transport=transport, base_url="http://localhost:8000") as client:
            return await client.request(method, path, content=content, headers=headers)

    return asyncio.run(request())


def test_what_is_allowed_goes_through_unchanged():
    response = ask(content=b"the body")
    assert (response.status_code, response.content) == (200, b"the body")
    assert response.headers["x-content-type-options"] == "nosniff"
    assert "access-control-allow-origin" not in response.headers


@pytest.mark.parametrize(
    ("request_headers", "options", "status"),
    [
        ({"host": "evil.example"}, {}, 421),
        ({"host": "evil.example"}, {"hosts": None}, 200),
        ({"host": "localhost:9"}, {}, 200),
        ({"origin": "https://evil.example"}, {}, 403),
        ({"origin": "null"}, {"origins": ["https://good.example"]}, 403),
        ({"origin": "http://localhost:8000"}, {}, 200),
        ({"origin": "https://good.example"}, {"origins": ["https://good.example"]}, 200),
        ({"origin": "https://any.example"}, {"origins": ["*"]}, 200),
        ({}, {"keys": [KEY]}, 401),
        ({"authorization": f"Bearer {KEY}x"}, {"keys": [KEY]}, 401),
        ({"authorization": KEY}, {"keys": [KEY]}, 401),
        ({"authorization": "Bearer \u00e9"}, {"keys": [KEY]}, 401),
        ({"authorization": f"Bearer {KEY}"}, {"keys": ["another-key-of-ours", KEY]}, 200),
        ({}, {"keys": [KEY], "path": "/health", "method": "GET"}, 200),
        ({"content-length": str(10 << 20)}, {}, 413),
        ({}, {"content": b"x" * (MAX_BODY + 1)}, 413),
    ],
)
def test_hosts_origins_keys_and_sizes(request_headers, options, status):
    response = ask(**options, **{key: value.encode("latin-1") for key, value in request_headers.items()})
    assert response.status_code == status
    if status != 200:
        assert set(response.json()["error"]) == {"message", "type", "param", "code"}
        assert ("www-authenticate" in response.headers) is (status == 401)


def test_a_browser_asks_first_and_is_told_what_a_page_may_send():
    options = {"origins": ["https://good.example"], "keys": [KEY], "content": b""}
    allowed = ask("OPTIONS", origin="https://good.example", **options)
    assert allowed.status_code == 204
    assert allowed.headers["access-control-allow-origin"] == "https://good.example"
    assert "authorization" in allowed.headers["access-control-allow-headers"]
    assert ask("OPTIONS", origin="https://evil.example", **options).status_code == 403


def test_keys_come_from_a_file_or_the_environment(tmp_path):
    (tmp_path / "keys").write_text(f"{KEY}\n\nanother-key-of-ours\n")
    assert read_keys(tmp_path / "keys", "ignored") == (KEY, "another-key-of-ours")
    assert read_keys(None, KEY) == (KEY,)
    assert read_keys(None, None) == ()
    for content, named in ((" \n", "has no API key"), ("short", "at least 16 printable"), ("é" * 20, "ASCII")):
        (tmp_path / "keys").write_text(content)
        with pytest.raises(InputFileError, match=named):
            read_keys(tmp_path / "keys", None)


def test_without_a_key_others_are_not_served(monkeypatch, tmp_path):
    monkeypatch.delenv(serve.KEY_VARIABLE, raising=False)
    with pytest.raises(UsageError, match=r"--host 0\.0\.0\.0 lets others send requests: give --api-key-file"):
        serve.main(["--weights", str(tmp_path), "--host", "0.0.0.0"])


def test_the_port_does_not_open_before_it_is_asked_to():
    bound = server.bind("127.0.0.1", 0)
    with pytest.raises(httpx.ConnectError):
        httpx.get(f"http://127.0.0.1:{bound.getsockname()[1]}/health")
    with pytest.raises(UsageError, match="--port must be from 0 to 65535"):
        server.bind("127.0.0.1", 70_000)
    bound.listen()
    with pytest.raises(UsageError, match=r"cannot listen on --host 127\.0\.0\.1"):
        server.bind("127.0.0.1", bound.getsockname()[1])
    bound.close()


@pytest.mark.slow
@pytest.mark.parametrize("signals", [1, 2])
def test_a_signal_lets_texts_finish_and_a_second_one_does_not(tmp_path, weights_path, signals):
    weights = tiny_weights(tmp_path, weights_path)
    command = [sys.executable, "scripts/serve.py", "--weights", weights, "--port", "0", "--slots", "1"]
    process = subprocess.Popen(
        list(map(str, command)), cwd=trainer.ROOT, env=trainer.ENVIRONMENT, stdout=subprocess.PIPE, text=True
    )
    try:
        lines = iter(process.stdout.readline, "")
        url = next(line.strip() for line in lines if line.startswith("http"))
        body = {"prompt": "Once", "max_tokens": 400, "stream": True}
        received = ""
        with httpx.stream("POST", f"{url}/completions", json=body, timeout=60) as response:
            for line in response.iter_lines():
                if not received:
                    for _ in range(signals):
                        process.send_signal(signal.SIGTERM)
                        time.sleep(0.5)
                received += line
    except httpx.RemoteProtocolError:
        assert signals == 2
    else:
        assert signals == 1
        assert received.endswith("[DONE]")
    finally:
        assert process.wait(60) == 0
