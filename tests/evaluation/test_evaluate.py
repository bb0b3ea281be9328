"""`scripts/evaluate.py`: its table, its files and its errors."""

import io
import json
import re
import sys

import pytest

from smollm_jax import weights
from smollm_jax.commands import evaluate
from smollm_jax.errors import CheckpointError, InputFileError, UsageError
from smollm_jax.evaluation.quality import quality
from smollm_jax.tokenizer import Tokenizer
from tests.serving import tiny_run

TEXT = "Fellow-citizens of the Senate: naïve words, and 1861 of them.\n" * 12


@pytest.fixture(scope="module")
def workdir(tmp_path_factory, weights_path):
    """A folder with a run of two checkpoints (runs/first), its tokenizer, and a text file of three documents."""
    folder = tmp_path_factory.mktemp("evaluate")
    run = tiny_run(folder, weights_path, "first", (0, 20))
    (folder / "text.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in (TEXT, "Short.", "")))
    assert (run / "tokenizer.json").exists()
    return folder


@pytest.fixture(autouse=True)
def no_cache_of_the_users(monkeypatch, tmp_path):
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", str(tmp_path / "compiled"))


def test_every_checkpoint_of_a_run_and_others_give_a_table_and_a_plot(workdir, tmp_path, capsys):
    arguments = [
        "--weights",
        str(workdir / "runs/first"),
        str(workdir / "assets/tiny0"),
        "--data",
        str(workdir / "text.jsonl"),
    ]
    evaluate.main([*arguments, "--every-checkpoint", "--length", "64", "--out", str(tmp_path / "q")])
    rows = json.loads((tmp_path / "q/quality.json").read_text())
    assert [row["step"] for row in rows] == [0, 20, None]
    assert (tmp_path / "q/quality.png").stat().st_size > 5000
    printed = capsys.readouterr().out.splitlines()
    assert printed[0] == "weights | documents | bytes | tokens | loss | perplexity | bits per byte | tokens per second"
    assert len(printed) == 4
    tokenizer = Tokenizer.load(workdir / "runs/first")
    for row, line in zip(rows, printed[1:], strict=True):
        model, config = weights.load(row["weights"])
        documents = [([config.bos_token_id, *tokenizer.encode(text)], len(text.encode())) for text in (TEXT, "Short.")]
        expected = quality(model, documents, length=64, stride=32)
        assert row["bits_per_byte"] == pytest.approx(expected.bits_per_byte, rel=1e-6)
        assert row["loss"] == pytest.approx(expected.loss, rel=1e-6)
        assert (row["documents"], row["bytes"], row["tokens"]) == (2, expected.bytes, expected.tokens)
        assert (row["length"], row["stride"]) == (64, 32)
        assert re.search(rf" \| {row['bits_per_byte']:.4f} \| ", line)
    assert rows[0]["loss"] == rows[2]["loss"]
    assert rows[0]["loss"] != rows[1]["loss"]


def test_a_terminal_sees_how_far_it_is(workdir, monkeypatch):
    class Terminal(io.StringIO):
        def isatty(self):
            return True

    monkeypatch.setenv("COLUMNS", "200")
    for kind, seen in ((Terminal, True), (io.StringIO, False)):
        monkeypatch.setattr(sys, "stderr", kind())
        evaluate.main(
            ["--weights", str(workdir / "assets/tiny0"), "--data", str(workdir / "text.jsonl"), "--length", "64"]
        )
        assert ("100%" in sys.stderr.getvalue()) is seen


@pytest.mark.parametrize(
    ("flags", "error", "named"),
    [
        (["--data", "nowhere.txt"], InputFileError, "nowhere.txt"),
        (["--data", "{workdir}/text.jsonl", "--length", "99999"], UsageError, "length must be from 1"),
        (["--data", "{workdir}/text.jsonl", "--length", "64", "--stride", "65"], UsageError, "stride must be from 1"),
        (["--data", "{workdir}/control.txt"], InputFileError, "control.txt: document 1 cannot be encoded"),
        (["--data", "{workdir}/empty.txt"], InputFileError, r"empty\.txt: holds no text$"),
        (
            ["--data", "{workdir}/control.txt", "--on-bad-text", "skip"],
            InputFileError,
            "no text; .* skipped 1 document",
        ),
        (["--data", "{workdir}/text.jsonl", "--text-column", "body"], InputFileError, "has no column 'body'"),
        (["--data", "{workdir}/text.jsonl", "--out", "{workdir}/text.jsonl"], UsageError, "is a file, not a folder"),
    ],
)
def test_what_cannot_be_evaluated_is_refused(workdir, flags, error, named):
    (workdir / "control.txt").write_text("a\x04b")
    (workdir / "empty.txt").write_text("")
    with pytest.raises(error, match=named):
        evaluate.main(["--weights", str(workdir / "assets/tiny0"), *(flag.format(workdir=workdir) for flag in flags)])


def test_bad_text_and_special_tokens_are_read_as_asked_and_said(workdir, tmp_path, capsys):
    texts = ["Good text.", "1990\x131995", "<|im_start|>user\nhi<|im_end|>\n"]
    (tmp_path / "data").mkdir()
    (tmp_path / "data/test.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    (tmp_path / "data/train.jsonl").write_text('{"text": "not this"}\n')
    tokenizer = Tokenizer.load(workdir / "runs/first")
    for flags, special, expected in (
        (["--on-bad-text", "skip"], False, [texts[0], texts[2]]),
        (["--on-bad-text", "replace", "--special-tokens"], True, [texts[0], "1990\ufffd1995", texts[2]]),
    ):
        arguments = ["--weights", str(workdir / "assets/tiny0"), "--data", str(tmp_path / "data"), "--length", "64"]
        evaluate.main([*arguments, *flags, "--out", str(tmp_path / "q")])
        (row,) = json.loads((tmp_path / "q/quality.json").read_text())
        stderr = capsys.readouterr().err
        assert "reads the test split (1 file), skips train (1 file)" in stderr
        assert ("skipped 1 document" in stderr, "replaced 1 character by U+FFFD" in stderr) == (not special, special)
        assert ("warning: special tokens in 1 document are" in stderr) == (not special)
        tokens = sum(len(tokenizer.encode(text, parse_special=special)) for text in expected)
        assert (row["documents"], row["tokens"], row["bytes"]) == (
            len(expected),
            tokens,
            sum(len(t.encode()) for t in expected),
        )


def test_another_column_behind_a_byte_order_mark_is_scored_as_the_text(workdir, tmp_path):
    rows = "".join(json.dumps({"body": text}) + "\n" for text in (TEXT, "Short."))
    (tmp_path / "b.jsonl").write_text(rows, encoding="utf-8-sig")
    losses = []
    for data, flags in ((workdir / "text.jsonl", []), (tmp_path / "b.jsonl", ["--text-column", "body"])):
        arguments = ["--weights", str(workdir / "assets/tiny0"), "--data", str(data), "--length", "64", *flags]
        evaluate.main([*arguments, "--out", str(tmp_path / "q")])
        losses.append(json.loads((tmp_path / "q/quality.json").read_text())[0]["loss"])
    assert losses[0] == losses[1]


def test_a_run_without_a_checkpoint_is_refused(workdir, tmp_path):
    (tmp_path / "run/checkpoints").mkdir(parents=True)
    arguments = ["--weights", str(tmp_path / "run"), "--data", str(workdir / "text.jsonl"), "--every-checkpoint"]
    with pytest.raises(CheckpointError, match="holds no checkpoint"):
        evaluate.main(arguments)
