"""A model's name on the Hugging Face hub can be given as weights; what cannot be fetched is a quick one-line error."""

import hashlib
import http.server
import json
import socket
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from smollm_jax import weights
from smollm_jax.errors import InputFileError
from smollm_jax.weights import hub
from tests.commands.test_scripts import ROOT, run

COMMIT = "0123456789abcdef0123456789abcdef01234567"


class Hub(http.server.BaseHTTPRequestHandler):
    """As much of the hub as its client asks: the commit of a model, the files in it, and their bytes."""

    folder: Path  # ORGANISATION/MODEL/files
    asked: list[str]
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        self.asked.append(self.path)
        path = self.path.split("?")[0].removeprefix("/api/models").strip("/").split("/")
        name, model = "/".join(path[:2]), self.folder.joinpath(*path[:2])
        if name == "org/gated":
            return self.answer(403, b"{}", {"X-Error-Code": "GatedRepo", "X-Error-Message": "ask its owner"})
        if not model.is_dir():
            return self.answer(404, b"{}", {"X-Error-Code": "RepoNotFound"})
        files = {file.relative_to(model).as_posix(): file.read_bytes() for file in model.rglob("*") if file.is_file()}
        endpoint = path[2] if len(path) > 2 else ""  # nothing: what the hub says of the model
        if endpoint == "resolve":
            content = files["/".join(path[4:])]
            digest = hashlib.sha1(content).hexdigest()
            return self.answer(200, content, {"ETag": f'"{digest}"', "X-Repo-Commit": COMMIT})
        body: object = {"id": name, "sha": COMMIT, "siblings": [{"rfilename": file} for file in files]}
        if endpoint == "tree":
            body = [{"type": "file", "path": file, "size": len(files[file]), "oid": "0" * 40} for file in files]
        return self.answer(200, json.dumps(body).encode(), {"Content-Type": "application/json"})

    do_HEAD = do_GET

    def answer(self, status: int, content: bytes, headers: dict[str, str]) -> None:
        self.send_response(status)
        for name, value in {"Content-Length": str(len(content)), **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(content)

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def served(tmp_path, tiny_model, monkeypatch):
    """The address of a fake hub with the model org/tiny, and the requests it got; the client's cache is empty."""
    models = tmp_path / "models"
    weights.write(models / "org/tiny", weights.to_bundle(tiny_model, "tiny"), "hf")
    (models / "org/tiny/onnx").mkdir()
    (models / "org/tiny/onnx/config.json").write_text("{}")
    (models / "org/tiny/model.onnx").write_text("large")
    (models / "org/only-gguf").mkdir()
    (models / "org/only-gguf/model.gguf").write_text("GGUF")
    handler = type("Handler", (Hub,), {"folder": models, "asked": []})
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{server.server_port}")
    monkeypatch.setenv("HF_HOME", str(tmp_path / "home"))
    yield handler
    server.shutdown()
    server.server_close()


def convert(name: str, target: Path):
    return run(ROOT / "scripts/convert_weights.py", name, target, "--to", "safetensors", cwd=target.parent)


def test_a_models_name_is_fetched_once_and_then_found_offline(served, tmp_path, monkeypatch):
    result = convert("org/tiny", tmp_path / "a.safetensors")
    assert result.returncode == 0, result.stderr
    assert len(result.stderr.splitlines()) == 1
    line = f"org/tiny: using the Hugging Face hub's model at commit {COMMIT}, cached in {tmp_path}/home"
    assert result.stderr.startswith(line)
    fetched = [path.rpartition("/")[2] for path in served.asked if "/resolve/" in path]
    assert "model.safetensors" in fetched
    assert not [path for path in served.asked if "onnx" in path], "other layouts of the same weights are left there"
    expected = weights.read(tmp_path / "models/org/tiny").tensors
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    served.asked.clear()
    result = convert("org/tiny", tmp_path / "b.safetensors")
    assert result.returncode == 0, result.stderr
    assert served.asked == []
    for name in ("a", "b"):
        tensors = weights.read(tmp_path / f"{name}.safetensors").tensors
        assert all(tensors[key].tobytes() == tensor.tobytes() for key, tensor in expected.items())


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("org/unknown", "the Hugging Face hub has no model org/unknown; if it is private, log in"),
        ("org/gated", "accept its terms on its page"),
        ("org/only-gguf", "has no model.safetensors: download the file you want"),
    ],
)
def test_a_model_that_cannot_be_had_is_one_line_that_says_both_readings(served, tmp_path, name, message):
    result = convert(name, tmp_path / "x.safetensors")
    assert result.returncode == 3
    assert result.stderr.startswith(f"error: {name}: no such file or folder, and ")
    assert message in result.stderr
    assert len(result.stderr.splitlines()) == 1, result.stderr


@pytest.mark.parametrize("address", ["http://127.0.0.1:9", "http://hub.invalid", None])
def test_without_a_network_a_name_is_one_line(tmp_path, monkeypatch, address):
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    monkeypatch.setenv(*(("HF_ENDPOINT", address) if address else ("HF_HUB_OFFLINE", "1")))
    result = convert("org/tiny", tmp_path / "x.safetensors")
    assert result.returncode == 3
    assert (
        "no such file or folder, and org/tiny is not in the local cache and the Hugging Face hub cannot be reached"
        in result.stderr
    )
    assert len(result.stderr.splitlines()) == 1, result.stderr


def test_a_hub_that_never_answers_is_not_waited_for(tmp_path, monkeypatch):
    with socket.create_server(("127.0.0.1", 0)) as silent:
        monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{silent.getsockname()[1]}")
        monkeypatch.setenv("HF_HOME", str(tmp_path))
        program = "from smollm_jax.weights import hub; hub.TIMEOUT_SECONDS = 0.5; hub.locate('org/tiny')"
        result = run("-c", program, cwd=tmp_path, timeout=60)
    assert "org/tiny is not in the local cache and the Hugging Face hub cannot be reached" in result.stderr


def test_without_huggingface_hub_a_name_is_one_line_that_says_how_to_get_it(tmp_path):
    program = (
        "import sys; sys.modules['huggingface_hub'] = None; from smollm_jax.weights import hub; hub.locate('org/tiny')"
    )
    result = run("-c", program, cwd=tmp_path)
    assert "to download a model of this name from the Hugging Face hub, first pip install" in result.stderr


def test_a_path_wins_over_a_name_and_a_mistyped_path_is_not_asked_for(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "here/tiny").mkdir(parents=True)
    for path in ("here/tiny", "here/other", "runs/my-run", "assets/x", "/org/tiny", "a/b/c", "./tiny", "org/x.gguf"):
        assert hub.locate(path) == Path(path)
        assert not hub.is_name(Path(path)) or Path(path).exists()
    with pytest.raises(InputFileError, match=r"here/other: no such file or folder$"):
        weights.read("here/other")
    with pytest.raises(InputFileError, match=r"here/tinny: no such file or folder; perhaps here/tiny$"):
        hub.locate("here/tinny")


def test_fetch_assets_takes_a_model_from_the_hub(served, tmp_path):
    script = str(ROOT / "scripts/fetch_assets.py")
    command = [sys.executable, script, "weights", "--source", "hub", "--assets", str(tmp_path / "assets"), "--model"]
    pinned = f"org/tiny@{COMMIT}"
    result = subprocess.run([*command, pinned], capture_output=True, text=True, check=False, cwd=ROOT)
    assert result.returncode == 0, result.stderr
    assert f"commit {COMMIT} of {pinned}" in result.stdout
    assert all(COMMIT in path for path in served.asked if "org/tiny" in path), served.asked
    assert weights.read(tmp_path / "assets/tiny").tensors
    result = subprocess.run([*command, "org/only-gguf"], capture_output=True, text=True, check=False, cwd=ROOT)
    assert result.returncode == 3
    assert f"{tmp_path}/assets/only-gguf: " in result.stderr
    assert ".tmp" not in result.stderr
    assert [path.name for path in (tmp_path / "assets").iterdir()] == ["tiny"]
