"""How `scripts/app.py` starts, and its errors when it cannot."""

import socket
import subprocess
import sys
from pathlib import Path

import pytest

from smollm_jax.commands import app, command_line
from smollm_jax.web import server
from tests import trainer
from tests.serving import Client, tiny_weights

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def place(tmp_path_factory, weights_path) -> Path:
    """A folder with assets/tiny and no run."""
    folder = tmp_path_factory.mktemp("web")
    tiny_weights(folder, weights_path)
    return folder


@pytest.mark.slow
def test_the_start_and_an_answer_need_no_socket_but_the_loopback_s(place):
    # Told on stderr too, for a library may keep the error to itself.
    program = """
import os, runpy, sys
def refuse(event, args):
    hosts = []
    if event in ("socket.connect", "socket.sendto", "socket.sendmsg", "socket.bind") and isinstance(args[1], tuple):
        hosts = args[1][:1]
    if event in ("socket.getaddrinfo", "socket.gethostbyname", "socket.gethostbyname_ex"):
        hosts = args[:1]
    if not {*hosts} <= {"127.0.0.1", "::1", "localhost"}:
        os.write(2, f"REFUSED {event} {hosts}\\n".encode())
        raise ConnectionRefusedError(hosts)
sys.addaudithook(lambda event, args: event.startswith("socket.") and refuse(event, args))
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""
    command = [sys.executable, "-c", program, ROOT / "scripts/app.py", "--port", "0", "--weights", "assets/tiny"]
    process = subprocess.Popen(
        list(map(str, command)),
        cwd=place,
        env=trainer.ENVIRONMENT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        lines = iter(process.stdout.readline, "")
        url = next((line.strip() for line in lines if line.startswith("http")), None)
        assert url, process.stderr.read()
        with Client(url, "assets/tiny") as client:
            assert client.complete("Hello")[1] == ""
    finally:
        process.terminate()
        _, stderr = process.communicate(timeout=30)
    assert "REFUSED" not in stderr


def start(*arguments: str, cwd: Path) -> subprocess.CompletedProcess:
    command = [sys.executable, ROOT / "scripts/app.py", *arguments]
    return subprocess.run(
        list(map(str, command)), cwd=cwd, env=trainer.ENVIRONMENT, capture_output=True, text=True, check=False
    )


def test_what_cannot_be_started_says_so_in_one_line(place):
    with socket.create_server(("127.0.0.1", 0)) as occupied:
        port = str(occupied.getsockname()[1])
        for arguments, code, named in [
            (["--port", port], 2, port),
            (["--port", "99999"], 2, "99999"),
            (["--max-queue", "0"], 2, "--max-queue"),
            (["--weights", "nowhere", "--port", "0"], 3, "nowhere"),
        ]:
            done = start(*arguments, cwd=place)
            assert done.returncode == code
            assert named in done.stderr
            assert len(done.stderr.strip().splitlines()) == 1


def test_the_old_names_of_flags_still_work():
    flags = command_line.parse(app.Flags, ["--queue", "3", "--loaded", "4"], None)
    assert flags == command_line.parse(app.Flags, ["--max-queue", "3", "--max-loaded", "4"], None)
    assert (flags.max_queue, flags.max_loaded) == (3, 4)


def test_another_host_is_warned_of(place):
    assert not server.is_loopback("0.0.0.0")
    assert server.is_loopback("127.0.0.1")
    process = subprocess.Popen(
        [sys.executable, str(ROOT / "scripts/app.py"), "--host", "0.0.0.0", "--port", "0"],
        cwd=place,
        env=trainer.ENVIRONMENT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    next(line for line in iter(process.stdout.readline, "") if line.startswith("http"))
    process.terminate()
    assert "warning: --host 0.0.0.0" in process.communicate(timeout=30)[1]
