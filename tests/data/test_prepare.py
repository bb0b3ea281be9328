"""A data set has the same tokens for any number of workers and kills, and any file type."""

import gzip
import json
import os
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest

from smollm_jax.commands import prepare as prepare_data
from smollm_jax.data.plan import Settings, make_plan
from smollm_jax.data.prepare import build_dataset
from smollm_jax.data.token_file import TokenSet
from smollm_jax.errors import InputFileError, LockedError, StorageError, UsageError
from smollm_jax.runtime.lock import RunLock
from smollm_jax.tokenizer import Tokenizer
from tests.small_files import tokenizer_folder

ROOT = Path(__file__).parents[2]
SCRIPT = [sys.executable, str(ROOT / "scripts/prepare_data.py")]
ENVIRONMENT = os.environ | {"PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": "1"}


def texts(count: int, length: int, seed: int = 0) -> list[str]:
    """Distinct texts of words and all kinds of white space."""
    rng = np.random.default_rng(seed)
    words = ["the", "12", "é", "we've", "😀", "a", "\n", "\n\n", "  x", "\t", "…", "dog.", "語"]
    return [f"{i} " + " ".join(rng.choice(words, rng.integers(1, length))) for i in range(count)]


def jsonl(texts: list[str], column: str = "text") -> bytes:
    return "".join(json.dumps({"id": i, column: text}) + "\n" for i, text in enumerate(texts)).encode()


def zst(content: bytes) -> bytes:
    sink = pyarrow.BufferOutputStream()
    with pyarrow.CompressedOutputStream(sink, "zstd") as out:
        out.write(content)
    return sink.getvalue().to_pybytes()


@pytest.fixture(scope="module")
def small(tmp_path_factory) -> Path:
    """A byte-level tokenizer's folder."""
    return tokenizer_folder(tmp_path_factory.mktemp("tokenizer") / "t")


@pytest.fixture(scope="module")
def sources(tmp_path_factory) -> tuple[Path, list[str]]:
    """A folder with a file of every type, and their documents."""
    folder, long, short = tmp_path_factory.mktemp("sources"), texts(900, 60), texts(40, 30, seed=1)
    (folder / "a.jsonl").write_bytes(jsonl(long))
    (folder / "b.jsonl.gz").write_bytes(gzip.compress(jsonl(long[:300])))
    (folder / "c.jsonl.zst").write_bytes(zst(jsonl(long[:200])))
    pyarrow.parquet.write_table(pyarrow.table({"n": range(500), "text": long[:500]}), folder / "d.parquet", 60)
    for i, text in enumerate(short):
        (folder / f"e{i:02}.txt").write_text(text)
    (folder / "f.txt.gz").write_bytes(gzip.compress(short[0].encode()))
    (folder / "g.md").write_text(" ".join(long[:150]))
    return folder, [*long, *long[:300], *long[:200], *long[:500], *short, short[0], " ".join(long[:150])]


def prepare(
    out: Path, tokenizer: Path, *sources: object, shard_tokens: int = 2000, workers: int = 1, **options: str
) -> TokenSet:
    flags = ["--tokenizer", tokenizer, "--shard-tokens", shard_tokens, "--workers", workers]
    flags += [part for name, value in options.items() for part in ("--" + name.replace("_", "-"), value)]
    prepare_data.main(list(map(str, [*sources, "--out", out, *flags])))
    return TokenSet.open(out)


def content(folder: Path) -> dict[str, bytes]:
    files = (path for path in folder.rglob("*") if path.is_file() and path.name != "lock")
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


@pytest.fixture(scope="module")
def straight(sources, small, tmp_path_factory) -> Path:
    """The data set of those sources, prepared without interruption by one process."""
    out = tmp_path_factory.mktemp("straight") / "set"
    command = [*SCRIPT, sources[0], "--out", out, "--tokenizer", small, "--shard-tokens", "2000", "--workers", "1"]
    subprocess.run(list(map(str, command)), check=True, env=ENVIRONMENT, stdout=subprocess.DEVNULL)
    return out


@pytest.fixture(autouse=True)
def _signals(monkeypatch):
    """Restores pytest's signal handlers and output streams, which the script replaces."""
    monkeypatch.setattr("smollm_jax.runtime.signals.StopSignal.install", lambda self, doing: self)


def test_every_kind_of_file_gives_its_documents_and_their_tokens(sources, straight, small):
    tokenizer, documents = Tokenizer.load(small), []
    for file in TokenSet.open(straight).files:
        file.verify()
        starts = [0, *file.ends[:-1].astype(int)]
        documents += [file.tokens[a:b].tolist() for a, b in zip(starts, file.ends.astype(int), strict=True)]
    assert len(TokenSet.open(straight).files) > 20
    complete = [ids for ids in documents if ids[-1] == 0]
    pieces = [ids for ids in documents if ids[-1] != 0]
    expected = sorted([*tokenizer.encode(text), 0] for text in sources[1])
    last = expected.pop(next(i for i, ids in enumerate(expected) if len(ids) > 2000))  # g.md, spread over several
    ending = next(ids for ids in complete if ids not in expected)
    complete.remove(ending)
    assert sorted(complete) == expected
    assert [i for ids in [*pieces, ending] for i in ids] == last
    manifest = json.loads((straight / "manifest.json").read_text())
    assert (manifest["tokens"], manifest["documents"]) == (sum(map(len, documents)), len(documents))
    assert manifest["text_column"] == "text"
    assert len(manifest["sources"]) == 46


def test_any_number_of_workers_gives_the_same_bytes(sources, straight, small, tmp_path):
    prepare(tmp_path / "set", small, sources[0], workers=3)
    assert content(tmp_path / "set") == content(straight)


def test_killed_and_started_again_until_it_is_done_gives_the_same_bytes_and_makes_nothing_twice(
    sources, straight, small, tmp_path
):
    out = tmp_path / "set"
    flags = ["--out", out, "--tokenizer", small, "--shard-tokens", "2000", "--workers", "2"]
    made: dict[Path, int] = {}
    for least in (1, 9, 20):
        process = subprocess.Popen(
            list(map(str, [*SCRIPT, sources[0], *flags])), env=ENVIRONMENT, start_new_session=True,
            stdout=subprocess.DEVNULL,
        )  # fmt: skip
        while len(list(out.glob("0*-*/tokens.json"))) < least and process.poll() is None:
            time.sleep(0.002)
        os.killpg(process.pid, signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL, "it was done before it was killed"
        now = {path: path.stat().st_mtime_ns for path in out.glob("0*-*/tokens.json")}
        assert made.items() <= now.items(), "a finished file was made again"
        made = now
    prepare(out, small, sources[0], workers=2)
    assert content(out) == content(straight)
    assert made.items() <= {path: path.stat().st_mtime_ns for path in out.glob("0*-*/tokens.json")}.items()


@pytest.mark.parametrize(("sent", "workers"), [(signal.SIGTERM, "1"), (signal.SIGINT, "2")])
def test_a_signal_leaves_what_is_finished_and_says_so(sources, straight, small, tmp_path, sent, workers):
    out = tmp_path / "set"
    flags = ["--out", out, "--tokenizer", small, "--shard-tokens", "2000", "--workers", workers]
    process = subprocess.Popen(
        list(map(str, [*SCRIPT, sources[0], *flags])), env=ENVIRONMENT, start_new_session=True,
        stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    while not list(out.glob("0*-*/tokens.json")):
        time.sleep(0.002)
    os.killpg(process.pid, sent)  # as a terminal does
    _, stderr = process.communicate(timeout=60)
    assert process.returncode == 75, stderr
    *before, last = stderr.splitlines()
    assert last == f"stopped by {sent.name}: {out}: finished files are kept; run the same command again to continue"
    # A thread answers the signal; on a busy machine the main thread may have ended all before it can.
    assert len(before) <= 1, "a worker spoke"
    assert all(line.startswith(f"{sent.name}: ") for line in before)
    assert not (out / "manifest.json").exists()
    prepare(out, small, sources[0])
    assert content(out) == content(straight)


def test_a_worker_that_dies_is_said_in_one_line(sources, small, tmp_path):
    out = tmp_path / "set"
    flags = ["--out", out, "--tokenizer", small, "--shard-tokens", "2000", "--workers", "2"]
    process = subprocess.Popen(
        list(map(str, [*SCRIPT, sources[0], *flags])), env=ENVIRONMENT, stderr=subprocess.PIPE, text=True,
        stdout=subprocess.DEVNULL,
    )  # fmt: skip
    while not (children := Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()):
        time.sleep(0.002)
    os.kill(int(children[0]), signal.SIGKILL)
    _, stderr = process.communicate(timeout=60)
    assert process.returncode == 1
    assert stderr == "error: a preparation worker exited with status -9; run the same command again to continue\n"


def test_a_full_disk_is_one_line_and_exit_5(sources, small, tmp_path):
    def little_room() -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (30_000, 30_000))

    for workers in ("1", "2"):
        out = tmp_path / workers
        flags = ["--out", out, "--tokenizer", small, "--shard-tokens", "20000", "--workers", workers]
        command = list(map(str, [*SCRIPT, sources[0], *flags]))
        result = subprocess.run(
            command, preexec_fn=little_room, env=ENVIRONMENT, capture_output=True, text=True, check=False
        )
        assert result.returncode == StorageError.exit_code, result.stderr
        assert result.stderr.startswith(f"error: {out}/0000"), result.stderr
        assert result.stderr.endswith("cannot be written: [Errno 27] File too large\n")
        assert result.stderr.count("\n") == 1


def test_a_set_by_a_version_that_cut_elsewhere_is_taken_whole_or_not_at_all(small, tmp_path):
    (tmp_path / "x.txt").write_text("the a.\n")
    (tmp_path / "set").mkdir()
    plan = make_plan([tmp_path / "x.txt"], chosen := Settings(small))
    build_dataset(tmp_path / "set", plan, chosen)
    older = json.loads((tmp_path / "set/plan.json").read_text())
    del older["cuts"]
    (tmp_path / "set/plan.json").write_text(json.dumps(older))
    build_dataset(tmp_path / "set", plan, chosen)
    (tmp_path / "set/manifest.json").unlink()
    with pytest.raises(UsageError, match="was started by a version that cuts long texts at other positions"):
        build_dataset(tmp_path / "set", plan, chosen)


def test_what_changed_since_a_set_was_begun_is_named(small, tmp_path):
    for name in ("a", "b"):
        (tmp_path / f"{name}.txt").write_text("some text")
    sources, out = (tmp_path / "a.txt", tmp_path / "b.txt"), tmp_path / "set"
    prepare(out, small, *sources)
    (out / "manifest.json").unlink()  # as if it had not come to its end
    changed = {"tokenizer_config.json": b'{"eos_token": "!"}', "special_tokens_map.json": b"{}"}
    folder = tokenizer_folder(tmp_path / "t", **changed)
    cases = [
        ({"shard_tokens": 7}, sources, small, "was started with shard_tokens 2000, not 7"),
        ({}, sources, folder, "was started with eos_token_id 0, not 34"),
        ({}, sources[:1], small, f"was started with {sources[1]}"),
        ({}, sources[::-1], small, "in another order"),
    ]
    for settings_, names, tokenizer, named in cases:
        with pytest.raises(UsageError, match=named):
            prepare(out, tokenizer, *names, **settings_)
    (tmp_path / "source.txt").write_text("x")
    with pytest.raises(UsageError, match=r"was started without .*source\.txt"):
        prepare(out, small, *sources, tmp_path / "source.txt")
    (tmp_path / "b.txt").write_text("some other text")
    with pytest.raises(UsageError, match=r"b\.txt: has changed since .*set was started"):
        prepare(out, small, *sources)


def test_two_preparations_of_one_folder_and_a_folder_of_something_else_are_refused(small, tmp_path):
    (tmp_path / "a.txt").write_text("some text")
    with RunLock(tmp_path / "set"), pytest.raises(LockedError, match="in use by another preparation"):
        prepare(tmp_path / "set", small, tmp_path / "a.txt")
    assert not (tmp_path / "set").exists()
    with pytest.raises(UsageError, match=r"a\.txt: is a file, not a folder"):
        prepare(tmp_path / "a.txt", small, tmp_path / "a.txt")
    (tmp_path / "set").mkdir()
    (tmp_path / "set/thesis.doc").touch()
    with pytest.raises(UsageError, match=r"set: holds 'thesis\.doc' but no data set"):
        prepare(tmp_path / "set", small, tmp_path / "a.txt")
    assert [path.name for path in (tmp_path / "set").iterdir() if path.name != "lock"] == ["thesis.doc"]


@pytest.mark.parametrize("workers", [1, 2])
def test_a_refused_preparation_leaves_nothing_and_the_flag_it_lacked_goes_on_in_the_same_folder(
    small, tmp_path, workers
):
    for name in ("a", "b"):
        (tmp_path / f"{name}.jsonl").write_text('{"body": null}\n{"body": "%s"}\n' % ("text " * 1800))
    sources = tmp_path / "a.jsonl", tmp_path / "b.jsonl"
    for options, why in (({}, "has no column 'text'"), ({"text_column": "body"}, "'body' is null")):
        with pytest.raises(InputFileError, match=why):
            prepare(tmp_path / "up/set", small, *sources, workers=workers, **options)
        assert not (tmp_path / "up").exists()
    # What a version before this one left behind, or one that was killed before its first token file.
    (tmp_path / "set").mkdir()
    plan = make_plan(sources, Settings(small)).content()
    (tmp_path / "set/plan.json").write_text(json.dumps(plan))
    settings = {"text_column": "body", "on_bad_text": "skip", "workers": workers}
    assert prepare(tmp_path / "set", small, *sources, **settings).documents == 2


def test_what_is_no_prepared_set_is_not_verified(tmp_path):
    for folder, why in (
        (tmp_path / "none", "none: no such folder"),
        (tmp_path, "is not a prepared set, or an unfinished one"),
    ):
        with pytest.raises(InputFileError, match=why):
            prepare_data.main(["--verify", str(folder)])


def test_a_plan_of_something_else_is_not_written_over(small, tmp_path):
    (tmp_path / "a.txt").write_text("some text")
    (tmp_path / "set").mkdir()
    (tmp_path / "set/plan.json").write_text('{"monday": "swim"}')
    with pytest.raises(InputFileError, match="is not the plan of a data set"):
        prepare(tmp_path / "set", small, tmp_path / "a.txt")
    assert (tmp_path / "set/plan.json").read_text() == '{"monday": "swim"}'


def test_a_source_named_twice_and_a_glob(small, tmp_path):
    for name in ("a.txt", "b.txt", "c.md"):
        (tmp_path / name).write_text(name)
    with pytest.raises(UsageError, match=r"a\.txt: is among the sources twice"):
        prepare(tmp_path / "set", small, tmp_path / "a.txt", tmp_path)
    other = tmp_path / "set" / ".." / "a.txt"
    (tmp_path / "set").mkdir()
    with pytest.raises(UsageError, match=rf"{other}: is among the sources twice, also as {tmp_path}/a\.txt"):
        prepare(tmp_path / "set", small, tmp_path / "a.txt", other)
    assert prepare(tmp_path / "set", small, tmp_path / "*.txt").documents == 2
    with pytest.raises(InputFileError, match="no such file or folder"):
        prepare(tmp_path / "none", small, tmp_path / "*.jsonl")
    with pytest.raises(InputFileError, match="/dev/null: is not a regular file"):
        prepare(tmp_path / "none", small, "/dev/null")


def test_another_column_is_text_on_request(small, tmp_path):
    (tmp_path / "a.jsonl").write_bytes(jsonl(["one", "two"], "content"))
    pyarrow.parquet.write_table(pyarrow.table({"content": ["three"]}), tmp_path / "b.parquet")
    token_set = prepare(tmp_path / "set", small, tmp_path, "--text-column", "content")
    assert Tokenizer.load(small).decode(sorted(token_set.files[0].tokens.tolist())).count("<|endoftext|>") == 3


def test_a_missing_package_is_one_line(small, tmp_path, monkeypatch):
    for name in ("a.jsonl.zst", "a.parquet"):
        (tmp_path / name).write_bytes(zst(jsonl(["text"])))
        for module in ("pyarrow", "pyarrow.parquet"):
            monkeypatch.setitem(sys.modules, module, None)
        with pytest.raises(UsageError, match=rf"{name}: needs the extra 'data': pip install -e .*\[data\]"):
            prepare(tmp_path / f"{name}.set", small, tmp_path / name)
        monkeypatch.undo()
