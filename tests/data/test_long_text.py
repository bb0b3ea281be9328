"""A long text encoded in chunks, also by several processes, gets the same tokens as when encoded at once."""

import gzip
import itertools
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tokenizers import pre_tokenizers

import smollm_jax.data.text
from smollm_jax.data.file_types import FileSlice
from smollm_jax.data.plan import Settings, can_cut, make_plan
from smollm_jax.data.prepare import build_dataset
from smollm_jax.data.text import CUT, text_chunks, whole_file
from smollm_jax.data.token_file import TokenSet
from smollm_jax.errors import InputFileError, UsageError
from smollm_jax.tokenizer import Tokenizer
from tests.small_files import tokenizer_folder

LETTERS = st.sampled_from(list("aZ9½一²'’s.,!_é😀 \n\t\r\x1c\x85\xa0\u2028\u3000\u180e\u200b")) | st.characters(
    exclude_categories=["Cs", "Cn", "Co"], exclude_characters="\0"
)


@pytest.fixture(scope="module")
def real(tokenizer_path) -> Tokenizer:
    return Tokenizer.load(tokenizer_path)


@pytest.fixture(scope="module")
def small(tmp_path_factory) -> Path:
    """A byte-level tokenizer's folder."""
    return tokenizer_folder(tmp_path_factory.mktemp("tokenizer") / "t")


@settings(max_examples=500, deadline=None)
@given(st.text(LETTERS, max_size=60))
@example("b\n\n\n5  7")
@example("one\n'two 's 've\tx 5 5\n½")
@example("a \n\n b\n\n\nc  d\n e")
@example("x\x1c y\x85 z\u3000 1\u2028 .")
def test_a_text_cut_anywhere_it_may_be_has_the_tokens_of_the_whole(real, text):
    text = "".join(c for c in text if real.unencodable(c) is None)
    places = [0, *(match.start() for match in CUT.finditer(text)), len(text)]
    pieces = [text[a:b] for a, b in itertools.pairwise(places)]
    assert list(itertools.chain(*real.encode_batch(pieces))) == real.encode(text)


def test_cutting_is_for_tokenizers_that_split_like_ours(real, small):
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core = Tokenizer.load(small)
    assert can_cut(real)
    for splits, fits in [
        (byte_level, True),
        (pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), byte_level]), True),
        (pre_tokenizers.ByteLevel(add_prefix_space=True), False),
        (pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False), False),
        (pre_tokenizers.Sequence([pre_tokenizers.Split(" ", "isolated"), byte_level]), False),
        (pre_tokenizers.Metaspace(), False),
    ]:
        core.core.pre_tokenizer = splits
        assert can_cut(core) == fits, splits


def test_a_long_text_in_pieces_and_in_parts_is_one_document(real, text_path, tokenizer_path, tmp_path, monkeypatch):
    monkeypatch.setattr(smollm_jax.data.text, "PIECE", 1000)
    text = (text_path / "1861-Lincoln-1.txt").read_text(encoding="utf-8")
    (tmp_path / "x.txt").write_bytes(text.replace("\n", "\r\n").encode())
    pieces = list(text_chunks(whole_file(tmp_path / "x.txt")))
    assert len(pieces) > 20
    assert max(len(piece.text) for piece in pieces) < 3000
    plan = make_plan([tmp_path / "x.txt"], chosen := Settings(tokenizer_path, shard_tokens=900))
    (tmp_path / "set").mkdir()
    build_dataset(tmp_path / "set", plan, chosen)
    token_set = TokenSet.open(tmp_path / "set")
    assert len(token_set.files) > 5
    assert np.concatenate([file.tokens for file in token_set.files]).tolist() == [*real.encode(text), 0]
    assert [file.tokens[-1] == 0 for file in token_set.files] == [False] * (len(token_set.files) - 1) + [True]


def test_a_unit_goes_on_from_any_of_its_files(small, tmp_path, monkeypatch):
    """Also from within a long text, and from a file that was written while another was read."""
    monkeypatch.setattr(smollm_jax.data.text, "PIECE", 300)
    texts = ["the a.\nthe b. " * n for n in (30, 7, 900, 11, 40, 500)]
    for i, text in enumerate(texts):
        (tmp_path / f"{i}.txt.gz").write_bytes(gzip.compress(text.encode()))
    chosen, out = Settings(small, shard_tokens=1500), tmp_path / "set"
    plan = make_plan(sorted(tmp_path.glob("*.gz")), chosen)
    assert len(plan.units) == 1
    out.mkdir()
    build_dataset(out, plan, chosen)
    whole_ = {path: path.read_bytes() for path in out.rglob("*.*") if path.is_file()}
    files = sorted(out.glob("0*"))
    assert len(files) > 8
    assert any(json.loads((file / "tokens.json").read_text())["documents"] > 1 for file in files)
    for count in range(len(files)):
        (out / "manifest.json").unlink()
        for file in files[count:]:
            shutil.rmtree(file)
        build_dataset(out, plan, chosen)
        assert {path: path.read_bytes() for path in whole_} == whole_, count
    (out / "manifest.json").unlink()
    shutil.rmtree(files[1])
    with pytest.raises(UsageError, match="000000-0002: exists already"):
        build_dataset(out, plan, chosen)


def test_a_text_without_a_place_to_cut_is_refused_before_it_fills_memory(tmp_path, monkeypatch):
    for name, value in (("PIECE", 100), ("MAX_LINE", 1000)):
        monkeypatch.setattr(smollm_jax.data.text, name, value)
    (tmp_path / "x.txt").write_text("word\n\n" * 1000)
    with pytest.raises(InputFileError, match=r"x\.txt: no single space between two words in 1,000 bytes"):
        list(text_chunks(whole_file(tmp_path / "x.txt")))
    assert len(list(text_chunks(whole_file(tmp_path / "x.txt"), cut=False))) == 1
    assert [p.ends for p in text_chunks(FileSlice(tmp_path / "x.txt", 0, 600))] == [False]
