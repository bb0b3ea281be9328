"""Text becomes a token file once, and a batch is a pure function of (recipe, step)."""

import json
import re
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest

import smollm_jax.data.text
from smollm_jax.config import Recipe
from smollm_jax.data.batches import Batches
from smollm_jax.data.mixture import Mixture, open_mixture, parse_source
from smollm_jax.data.text import documents
from smollm_jax.data.token_file import TokenFile, TokenSet
from smollm_jax.errors import InputFileError, UsageError
from smollm_jax.tokenizer import Tokenizer
from tests.hostile_texts import TOKENS
from tests.small_files import of_tokens, tokenizer_folder
from tests.trainer import ENVIRONMENT, ROOT

BEYOND = r"tokens\.bin: token 4 is 260, but the largest id of the vocabulary is 259"


def recipe(**changes) -> Recipe:
    base = {"steps": 10, "batch_size": 3, "sequence_length": 16, "learning_rate": 1e-3, "warmup_steps": 0}
    return Recipe(**(base | {"dtype": "float32", "validation_fraction": 0.2} | changes))


@pytest.fixture
def numbers() -> Mixture:
    """Data in which token i has the id i."""
    return of_tokens(np.arange(1000))


def test_every_window_is_seen_once_an_epoch_and_shuffled_anew_in_the_next(numbers):
    batches = Batches(numbers, recipe())
    assert batches.windows == 49
    starts_seen = np.concatenate([batches.batch(step)[:, 0] for step in range(49)])  # 3 epochs of 49 windows
    epochs = starts_seen.reshape(3, 49)
    for epoch in epochs:
        assert sorted(epoch) == list(range(0, 784, 16))
    assert not (epochs[0] == epochs[1]).all()


def test_targets_are_the_next_tokens(numbers):
    batch = Batches(numbers, recipe()).batch(4)
    assert batch.shape == (3, 17)
    assert batch.dtype == np.int32
    assert (np.diff(batch, axis=1) == 1).all()


def test_a_batch_depends_on_seed_and_step_alone(numbers):
    short_run, long_run = Batches(numbers, recipe()), Batches(numbers, recipe(steps=999))
    for step in (30, 2, 17):
        np.testing.assert_array_equal(short_run.batch(step), long_run.batch(step))
    assert not np.array_equal(short_run.batch(0), Batches(numbers, recipe(seed=1)).batch(0))


def test_held_out_tokens_are_never_trained_on(numbers):
    batches = Batches(numbers, recipe())
    trained = {int(t) for step in range(17) for t in batches.batch(step).ravel()}
    held_out = {int(t) for batch in batches.validation(99) for t in batch.ravel()}
    assert max(trained) < 800 <= min(held_out)
    repeated = [batch.tolist() for batch in batches.validation(2)]
    assert repeated == [batch.tolist() for batch in batches.validation(2)]


def test_too_little_text_is_refused(numbers):
    with pytest.raises(
        InputFileError,
        match=r"1000 tokens are too few for .* of 600 tokens: shorten --sequence-length or give more text$",
    ):
        Batches(numbers, recipe(sequence_length=600))


def the_file(data: Mixture) -> TokenFile:
    """The one token file of small data."""
    ((only,),) = data.sources
    (file,) = only.files
    return file


def write(folder, **files):
    folder.mkdir(exist_ok=True)
    for name, content in files.items():
        (folder / name.replace("_", ".")).write_text(content, encoding="utf-8")
    return folder


def test_text_files_and_jsonl_become_the_same_tokens(tmp_path, tokenizer_path, tokenizer):
    texts = ["One 12 text.\n", "Zwei: äöü 😀", "three"]
    folder = write(tmp_path / "folder", a_txt=texts[0], b_md=texts[1], c_txt=texts[2], d_py="ignored")
    lines = "\n".join(json.dumps({"text": text, "id": 1}) for text in texts) + "\n\n"
    jsonl = tmp_path / "texts.jsonl"
    jsonl.write_text(lines, encoding="utf-8")
    files = [the_file(open_mixture(source, tokenizer_path, tmp_path / "cache")) for source in (folder, jsonl)]
    np.testing.assert_array_equal(files[0].tokens, files[1].tokens)
    documents = np.split(files[0].tokens, files[0].ends.astype(int)[:-1])
    assert {tokenizer.decode(document[:-1]) for document in documents} == set(texts)
    assert {int(document[-1]) for document in documents} == {0}
    assert len(documents) == 3


def test_a_prepared_file_is_reused_and_a_changed_text_is_not(tmp_path, tokenizer_path):
    source = tmp_path / "text.txt"
    source.write_text("some text")
    first = open_mixture(source, tokenizer_path, tmp_path / "cache")
    path = the_file(first).path
    made = path.stat().st_mtime_ns
    assert the_file(open_mixture(source, tokenizer_path, tmp_path / "cache")).path.stat().st_mtime_ns == made
    for source_path in (path, path.parent, path.parent.parent):
        assert open_mixture(source_path, tokenizer_path, tmp_path / "other").sha256 == first.sha256
    source.write_text("other text")
    assert open_mixture(source, tokenizer_path, tmp_path / "cache").sha256 != first.sha256


def test_a_tokenizer_that_was_loaded_is_not_loaded_again(tmp_path, tokenizer_path, monkeypatch):
    write(tmp_path / "text", a_txt="some text")
    tokenizer = Tokenizer.load(tokenizer_path)
    monkeypatch.setattr(Tokenizer, "load", lambda folder: pytest.fail(f"{folder} was loaded again"))
    assert open_mixture(tmp_path / "text", tokenizer_path, tmp_path / "cache", None, tokenizer).tokens > 0


@pytest.mark.parametrize("read_at_once", [1, 2, 3, 4, smollm_jax.data.text.PIECE])
def test_line_ends_become_newlines_and_nothing_else_of_a_text_changes(tmp_path, monkeypatch, read_at_once):
    monkeypatch.setattr(smollm_jax.data.text, "PIECE", read_at_once)
    (tmp_path / "x.txt").write_bytes("a\r\nb\rc\n\n  d\té\ufeff 😀".encode())
    assert list(documents(tmp_path / "x.txt")) == ["a\nb\nc\n\n  d\té\ufeff 😀"]
    (tmp_path / "x.jsonl").write_bytes(b'{"text": "a\\r\\nb"}\r\n\r\n\xc2\xa0\n{"text": ""}')
    assert list(documents(tmp_path / "x.jsonl")) == ["a\r\nb", ""]


def test_text_with_the_longest_line_allowed_is_read(tmp_path, monkeypatch):
    monkeypatch.setattr(smollm_jax.data.text, "MAX_LINE", 8)
    (tmp_path / "x.txt").write_bytes(b"1234567\n" * 3 + b"12345678")
    assert list(documents(tmp_path / "x.txt")) == ["1234567\n" * 3 + "12345678"]
    (tmp_path / "x.txt").write_bytes(b"1\n12345678\n")
    with pytest.raises(InputFileError, match="line 2 is longer than 8"):
        list(documents(tmp_path / "x.txt"))


def test_the_largest_id_is_known_and_one_beyond_the_vocabulary_is_refused(tmp_path):
    tokenizer_folder(tmp_path / "tokenizer")
    write, _ = TOKENS["an id beyond the vocabulary"]
    token_set = TokenSet.open(write(tmp_path))
    (file,) = token_set.files
    assert file.largest_id == 260
    tokenizer = Tokenizer.load(tmp_path / "tokenizer")
    with pytest.raises(InputFileError, match=BEYOND):
        file.check(tokenizer, tmp_path / "tokenizer", file.tokenizer_sha256)
    tokenizer.vocab_size = 261
    file.check(tokenizer, tmp_path / "tokenizer", file.tokenizer_sha256)
    only = recipe(sequence_length=1, batch_size=1)
    batches = [Batches(Mixture(((token_set,),), vocab_size=size), only) for size in (260, 261)]  # as if it said 259
    assert [batches[1].batch(step)[0].tolist() for step in range(2)] in ([[5, 6], [6, 259]], [[6, 259], [5, 6]])
    with pytest.raises(InputFileError, match=BEYOND):
        list(batches[0].validation(1))


def test_texts_are_prepared_anew_for_another_end_of_text(tmp_path):
    (tmp_path / "x.txt").write_text("the text")
    ends = []
    for eos in ("<|endoftext|>", "!"):
        settings = json.dumps({"eos_token": eos}).encode()
        files = {"tokenizer_config.json": settings, "special_tokens_map.json": settings}
        folder = tokenizer_folder(tmp_path / "tokenizer", **files)
        ends.append(the_file(open_mixture(tmp_path / "x.txt", folder, tmp_path / "cache")).tokens[-1])
    assert ends == [0, 1 + ord("!")]


@pytest.mark.parametrize("damage", ["truncated", "flipped", "emptied"])
def test_a_damaged_token_file_is_caught(tmp_path, tokenizer_path, damage):
    source = tmp_path / "text.txt"
    source.write_text("some text that is long enough to damage")
    path = the_file(open_mixture(source, tokenizer_path, tmp_path / "cache")).path
    content = bytearray(path.read_bytes())
    if damage == "flipped":
        content[5] ^= 1
    path.write_bytes({"truncated": content[:-2], "flipped": content, "emptied": b""}[damage])
    with pytest.raises(InputFileError, match=r"tokens\.bin"):
        open_mixture(source, tokenizer_path, tmp_path / "cache")


@pytest.mark.parametrize(
    ("name", "content", "named"),
    [
        ("bad.txt", b"caf\xe9", "bad.txt"),
        ("empty.txt", b"", "holds no text"),
        ("bad.jsonl", b'{"text": "ok"}\n{"text": 3}\n', "line 2"),
        ("bad.jsonl", b'{"txt": "no"}\n', "line 1"),
        ("bad.jsonl", b"not json\n", "line 1"),
        ("bad.txt", b"one\x04two", "bad.txt: document 1 .* character 3, U\\+0004"),
    ],
)
def test_malformed_text_is_refused_and_nothing_is_left(tmp_path, tokenizer_path, name, content, named):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(InputFileError, match=named):
        open_mixture(tmp_path / name, tokenizer_path, tmp_path / "cache")
    assert not (tmp_path / "cache").exists()


def test_a_missing_source_and_a_folder_without_text_are_refused(tmp_path, tokenizer_path):
    with pytest.raises(InputFileError, match="no such file"):
        open_mixture(tmp_path / "nowhere", tokenizer_path, tmp_path / "cache")
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputFileError, match="holds no file"):
        open_mixture(tmp_path / "empty", tokenizer_path, tmp_path / "cache")


def starts(windows: list[str]) -> list[tuple[int, int]]:
    """Source and first token of each window of `of_tokens`."""
    return [(int(source), int(start)) for source, _, start in (window.partition(":") for window in windows)]


def test_a_mixture_gives_every_source_its_share_and_each_window_once_an_epoch():
    data = of_tokens(*(np.arange(16 * n + 1) for n in (9, 30, 14)), shares=("3/5", "1/4", "3/20"))
    batches = Batches(data, recipe(batch_size=10, validation_fraction=0.1))
    seen = [window for step in range(40) for window in starts(batches.windows_of(step))]
    for n in (20, 100, 400):  # whole periods
        assert [sum(source == s for source, _ in seen[:n]) for s in range(3)] == [n * 3 // 5, n // 4, n * 3 // 20]
    for source, windows in ((0, 7), (1, 27), (2, 12)):
        epochs = [start for s, start in seen if s == source]
        for epoch in range(len(epochs) // windows):
            assert sorted(epochs[epoch * windows :][:windows]) == list(range(0, 16 * windows, 16))


def test_each_process_reads_its_rows_of_the_one_batch():
    data = of_tokens(np.arange(1000), np.arange(2000), shares=("1/3", "2/3"))
    batches = Batches(data, recipe(batch_size=8))
    for step in (0, 3, 1000):
        batch = batches.batch(step)
        parts = [batches.batch(step, slice(start, start + 2)) for start in range(0, 8, 2)]
        np.testing.assert_array_equal(np.concatenate(parts), batch)
        assert [row[0] for row in batch.tolist()] == [start for _, start in starts(batches.windows_of(step))]


def test_validation_takes_of_each_source_its_share():
    data = of_tokens(np.zeros(1000), np.ones(2000), shares=("1/4", "3/4"))
    rows = np.concatenate(list(Batches(data, recipe(batch_size=4)).validation(4)))
    assert rows[:, 0].tolist() == [0] * 4 + [1] * 12


def test_the_identity_of_data_is_its_files_its_shares_and_its_order():
    first, second = np.arange(100), np.arange(200)
    all_shares = (("1/2", "1/2"), ("1/3", "2/3"), ("2/3", "1/3"))
    hashes = [of_tokens(first, second, shares=shares).sha256 for shares in all_shares]
    assert len({*hashes, of_tokens(first).sha256, of_tokens(second).sha256}) == 4, "of_tokens names files by position"


BAD_WEIGHTS = ("0", "-1", "+0.5", ".5", "1e-3", "inf", "nan", "INF", "NaN")


@pytest.mark.parametrize(
    ("sources", "named"),
    [
        (["a:1", "b"], "a weight to every source or to none"),
        *[([f"a:{weight}"], f"a:{re.escape(weight)}: a weight must be above 0") for weight in BAD_WEIGHTS],
        (["a:0.3333333", "b:1"], "repeat only every 13,333,333 windows"),
        ([], "a weight to every source"),
    ],
)
def test_weights_that_make_no_mixture_are_refused(tmp_path, sources, named):
    tokenizer_folder(tmp_path / "tokenizer")
    for name in "ab":
        (tmp_path / name).write_text("some text in a file, and a bit more of it")
    paths = [str(tmp_path / source) for source in sources]
    with pytest.raises(UsageError, match=named):
        Batches(open_mixture(paths, tmp_path / "tokenizer", tmp_path / "cache"), recipe())


@pytest.mark.parametrize(
    ("source", "path", "weight"),
    [
        ("a", "a", None),
        ("a:1", "a", "1"),
        ("a:0.25", "a", "1/4"),
        ("b:a:2", "b:a", "2"),
        ("a:b", "a:b", None),
        ("a:1x", "a:1x", None),
        ("c:/x", "c:/x", None),
    ],
)
def test_what_follows_the_last_colon_is_a_weight_if_it_is_a_number(source, path, weight):
    assert parse_source(source) == (Path(path), None if weight is None else Fraction(weight))


def test_a_text_is_prepared_on_first_use_as_the_flags_say(tmp_path):
    tokenizer_folder(tmp_path / "tokenizer")
    (tmp_path / "x.jsonl").write_text('{"text": "a<|endoftext|>b"}\n{"text": "\\ud800"}\n')
    options = {"on_bad_text": "skip", "special_tokens": True}
    mixture = open_mixture(tmp_path / "x.jsonl", tmp_path / "tokenizer", tmp_path / "cache", **options)
    assert the_file(mixture).tokens.tolist() == [1 + ord("a"), 0, 1 + ord("b"), 0]
    assert mixture.sets[0].special_tokens
    with pytest.raises(InputFileError, match="lone surrogate"):
        open_mixture(tmp_path / "x.jsonl", tmp_path / "tokenizer", tmp_path / "cache")


def test_sources_without_weights_are_one_and_with_them_a_mixture(tmp_path):
    tokenizer_folder(tmp_path / "tokenizer")
    for name, letter in (("a.txt", "a"), ("b.txt", "b")):
        (tmp_path / name).write_text(letter * 1000)
    paths = [str(tmp_path / name) for name in ("a.txt", "b.txt")]
    mixture = open_mixture(paths, tmp_path / "tokenizer", tmp_path / "cache")
    mixed = open_mixture([f"{paths[0]}:0.75", f"{paths[1]}:2.25"], tmp_path / "tokenizer", tmp_path / "cache")
    assert (len(mixture.sources), len(mixture.sets), mixture.tokens, mixture.documents) == (1, 2, 2002, 2)
    assert (len(mixed.sources), mixed.shares) == (2, (Fraction(1, 4), Fraction(3, 4)))
    assert mixture.sha256 != mixed.sha256


def test_several_processes_may_ask_for_the_same_text_at_once(tmp_path):
    folder = tokenizer_folder(tmp_path / "tokenizer")
    (tmp_path / "x.jsonl").write_text('{"text": "some text"}\n' * 3000)
    with ThreadPoolExecutor(4) as pool:
        mixtures = list(pool.map(lambda _: open_mixture(tmp_path / "x.jsonl", folder, tmp_path / "cache"), range(4)))
    assert {data.sha256 for data in mixtures} == {mixtures[0].sha256}
    assert len(list((tmp_path / "cache").iterdir())) == 1


@pytest.mark.slow
def test_a_run_on_a_mixture_is_resumed_on_it(tmp_path):
    for name in ("a b.txt", "c.txt"):
        (tmp_path / name).write_text("".join(f"{name}: line {i}<|im_end|>\x13\n" for i in range(300)))
    run = [sys.executable, ROOT / "scripts/train_jax.py", "--out", "run", "--tokenizer", ROOT / "assets/tokenizer"]
    first = ["--preset", "tiny", "--sequence-length", "32", "--steps", "1", "--data", "a b.txt:0.25", "c.txt:0.75"]
    for flags in (first, ["--resume", "--steps", "2"]):
        command = list(map(str, [*run, *flags, "--on-bad-text", "replace", "--special-tokens"]))
        result = subprocess.run(command, cwd=tmp_path, env=ENVIRONMENT, capture_output=True, text=True, check=False)
        assert result.returncode == 0, result.stderr
        assert "data        'a b.txt:0.25' c.txt:0.75: 2 documents" in result.stdout
        assert result.stdout.count("--on-bad-text replaced 300 characters by U+FFFD\n") == 2
    for manifest in (tmp_path / "data").glob("*/manifest.json"):
        assert json.loads(manifest.read_text())["special_tokens"] is True
