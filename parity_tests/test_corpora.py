"""A corpus is read as Hugging Face's datasets reads it, and gets the token ids that transformers gives."""

import bz2
import gzip
import json
import lzma
import re
from pathlib import Path

import datasets
import numpy as np
import pandas
import pyarrow
import pytest
from lm_eval.models.huggingface import HFLM
from transformers import AutoTokenizer

from smollm_jax.data.mixture import open_mixture
from smollm_jax.data.text import documents
from smollm_jax.data.text_sources import text_files
from smollm_jax.errors import UsageError
from smollm_jax.evaluation.lm_eval_model import SmolLMHarness
from smollm_jax.generation.engine import Engine

TEXTS = ['a "quoted" word', "two\nlines, and\r\nthree", "NA", "tab\there", " é日本 😀 ", "x" * 5000, '"', "\\", "'"]


@pytest.fixture(autouse=True)
def _no_cache_of_the_users(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "hf")
    datasets.disable_progress_bars()


def theirs(kind: str, file: Path, **options) -> list[str]:
    return datasets.load_dataset(kind, data_files=str(file), split="train", **options)["text"][:]


def lines(texts: list[str]) -> bytes:
    return "".join(json.dumps({"n": i, "text": text}) + "\n" for i, text in enumerate(texts)).encode()


def zst(content: bytes) -> bytes:
    sink = pyarrow.BufferOutputStream()
    with pyarrow.CompressedOutputStream(sink, "zstd") as out:
        out.write(content)
    return sink.getvalue().to_pybytes()


@pytest.mark.parametrize("suffix", ["", ".gz", ".xz", ".bz2", ".zst"])
@pytest.mark.parametrize("name", ["c4.00000-of-00001.json", "x.jsonl", "x.ndjson"])
def test_json_lines_under_every_name(tmp_path, name, suffix):
    pack = {"": bytes, ".gz": gzip.compress, ".xz": lzma.compress, ".bz2": bz2.compress, ".zst": zst}[suffix]
    (tmp_path / f"{name}{suffix}").write_bytes(pack(lines(TEXTS)))
    assert list(documents(tmp_path / f"{name}{suffix}")) == TEXTS
    if suffix != ".zst":  # which datasets reads with another package
        assert theirs("json", tmp_path / f"{name}{suffix}") == TEXTS


@pytest.mark.parametrize("content", [TEXTS, [{"n": 1, "text": text} for text in TEXTS]], ids=["strings", "objects"])
@pytest.mark.parametrize("indent", [None, 2])
def test_a_json_array(tmp_path, content, indent):
    (tmp_path / "x.json").write_text(json.dumps(content, indent=indent))
    assert list(documents(tmp_path / "x.json")) == theirs("json", tmp_path / "x.json") == TEXTS


def test_json_with_a_byte_order_mark_and_numbers_that_are_none(tmp_path):
    content = lines(TEXTS).replace(b'"n": 0', b'"n": NaN')
    for name, marked in (("x.jsonl", content), ("x.json", json.dumps(TEXTS).encode())):
        (tmp_path / name).write_bytes(b"\xef\xbb\xbf" + marked)
        assert list(documents(tmp_path / name)) == theirs("json", tmp_path / name) == TEXTS


@pytest.mark.parametrize(("name", "separator"), [("x.csv", ","), ("x.tsv", "\t")])
@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
def test_csv_and_tsv_as_pandas_writes_them(tmp_path, name, separator, end):
    frame = pandas.DataFrame({"n": range(len(TEXTS)), "text": TEXTS, "note": "a, b"})
    for encoding in ("utf-8", "utf-8-sig"):
        frame.to_csv(tmp_path / name, index=False, sep=separator, lineterminator=end, encoding=encoding)
        assert list(documents(tmp_path / name)) == TEXTS
        assert theirs("csv", tmp_path / name, sep=separator, keep_default_na=False) == TEXTS


@pytest.mark.parametrize("kind", ["category", "string", "large_string[pyarrow]"])
def test_parquet_of_every_kind_of_string(tmp_path, kind):
    dtype = pandas.ArrowDtype(pyarrow.large_string()) if "large" in kind else kind
    pandas.DataFrame({"text": pandas.Series(TEXTS * 3, dtype=dtype)}).to_parquet(tmp_path / "x.parquet")
    assert list(documents(tmp_path / "x.parquet")) == theirs("parquet", tmp_path / "x.parquet") == TEXTS * 3


def test_a_data_set_that_datasets_saved(tmp_path):
    whole = datasets.Dataset.from_dict({"text": TEXTS})
    datasets.DatasetDict({"train": whole, "test": whole.select([0])}).save_to_disk(str(tmp_path / "saved"))
    assert [text for file in text_files(tmp_path / "saved") for text in documents(file)] == TEXTS
    assert datasets.load_from_disk(str(tmp_path / "saved"))["train"]["text"][:] == TEXTS


FOLDERS = {
    "a hub's": ["README.md", *(f"data/{x}.jsonl" for x in ("train-0-of-2", "train-1-of-2", "test-0-of-1"))],
    "by file": ["train.jsonl", "test.jsonl", "dev.jsonl"],
    "by folder": ["train/a.jsonl", "train/b.jsonl", "valid/a.jsonl", "test/a.jsonl"],
    "no split": ["a.jsonl", "b/c.jsonl", ".git/d.jsonl", "__x__/e.jsonl", ".hidden.jsonl"],
    "C4's": ["c4-train.00000-of-01024.json.gz", "c4-validation.00000-of-00008.json.gz"],
    "chat's": ["data/train_sft-00000-of-00001.jsonl", "data/test_sft-00000-of-00001.jsonl"],
    "a config's": ["en/train.jsonl", "en/validation.jsonl", "de/training_1.jsonl", "de/my evaluation.jsonl"],
}  # fmt: skip


@pytest.mark.parametrize("name", FOLDERS)
def test_of_a_folder_the_train_split_is_read(tmp_path, name):
    for file in FOLDERS[name]:
        path = tmp_path / "folder" / file
        path.parent.mkdir(parents=True, exist_ok=True)
        content = lines([f"text of {file}"])
        path.write_bytes(gzip.compress(content) if file.endswith(".gz") else content)
    if "README.md" in FOLDERS[name]:
        (tmp_path / "folder/README.md").write_text("---\nlicense: mit\n---\n# A data set\n")
    loaded = datasets.load_dataset(str(tmp_path / "folder"))
    expected = [text for split, rows in loaded.items() if split.startswith("train") for text in rows["text"][:]]
    ours = [text for file in text_files(tmp_path / "folder") for text in documents(file)]
    assert sorted(ours) == sorted(expected)


CHATS = [
    "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\nhello<|im_end|>\n",
    "two <|endoftext|> documents <|im_end|> and a piece<|endoftext|>",
    "<file_sep>a <|im_start|> b  <|im_end|>",
]


@pytest.mark.parametrize("special", [False, True])
def test_a_corpus_with_special_tokens_has_transformers_ids(tmp_path, tokenizer_path, tokenizer, special):
    theirs = AutoTokenizer.from_pretrained(tokenizer_path)
    (tmp_path / "x.jsonl").write_bytes(lines(CHATS))
    (only,) = (
        open_mixture(tmp_path / "x.jsonl", tokenizer_path, tmp_path / "cache", special_tokens=special).sets[0].files
    )
    documents = sorted(ids.tolist() for ids in np.split(only.tokens, only.ends.astype(int)[:-1]))
    eos = theirs.eos_token
    # TRL's SFTTrainer (add_eos) appends the end of text unless the text has it.
    whole = [text if text.endswith(eos) and special else text + eos for text in CHATS]
    expected = [theirs(text, add_special_tokens=False)["input_ids"] for text in whole]
    if not special:
        expected = [
            [*theirs(text, add_special_tokens=False, split_special_tokens=True)["input_ids"], 0] for text in CHATS
        ]
    assert documents == sorted(expected)


def test_lm_eval_reads_bad_text_as_its_own_hf_model_on_request(weights_path, hf):
    its_own = HFLM(pretrained=hf, tokenizer=AutoTokenizer.from_pretrained(weights_path), batch_size=1)
    engine = Engine.load(weights_path)
    ours = {policy: SmolLMHarness(engine, quiet=True, on_bad_text=policy) for policy in ("stop", "skip", "replace")}
    bad = ["1990\u00131995 was a time", "a\U00040000b", "\u0004", "<|im_start|>x\u001d<|im_end|>"]
    for text in [*bad, "good", "<|im_end|>"]:
        assert ours["skip"].tok_encode(text) == its_own.tok_encode(text)
        assert ours["replace"].tok_encode(text) == its_own.tok_encode(
            re.sub("[\u0004\u0013\u001d\U00040000]", "\ufffd", text)
        )
    assert (ours["skip"].bad_texts, ours["replace"].bad_texts) == (len(bad), len(bad))
    with pytest.raises(UsageError, match=r"U\+0013, has no token .* --on-bad-text skip"):
        ours["stop"].tok_encode(bad[0])
    chat = [{"role": "user", "content": bad[0]}]
    for policy, expected in (("skip", "19901995"), ("replace", "1990\ufffd1995")):
        assert expected in ours[policy].apply_chat_template(chat)
