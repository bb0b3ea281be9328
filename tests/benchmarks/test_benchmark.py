"""The benchmark: every subject at toy size, and errors for unequal work. Asserts nothing about speed."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import tokenizers

from benchmarks import compare, starts
from benchmarks.compare import Backend, check_equal, with_ratios
from benchmarks.options import check_flags
from benchmarks.subjects import check_same_tokens
from scripts import benchmark
from smollm_jax.errors import SmolLMError, UsageError

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "scripts/benchmark.py"
BOTH = {
    "train": [
        "tokens/s",
        "seconds",
        "MFU of the GEMM's speed",
        "GEMM GFLOP/s",
        "cores others took",
        "loss 1",
        "loss 2",
    ],
    "decode": ["tokens/s", "seconds", "GEMM GFLOP/s", "loss 1"],
    "prefill": ["tokens/s", "seconds", "GEMM GFLOP/s", "loss 1"],
    "memory": ["peak GB", "GB above before the step"],
    "startup": ["cold seconds", "warm seconds"],
    "first-token": ["cold seconds", "warm seconds"],
    "loss": ["tokens/s", "seconds", "GFLOP/s", "loss 1"],
    "attention": ["tokens/s", "seconds", "GFLOP/s", "cores others took"],
    "gemm": [
        *(f"GFLOP/s {name}" for name in ("qkv", "o", "gate+up", "down", "head", "attention", "attention both ways")),
        "ceiling tokens/s",
    ],
}
RATIO = {
    "train": "tokens/s",
    "decode": "tokens/s",
    "prefill": "tokens/s",
    "memory": "peak GB",
    "startup": "warm seconds",
    "first-token": "cold seconds",
    "loss": "tokens/s",
    "attention": "tokens/s",
    "gemm": "GFLOP/s down",
}


def measured(folder, *arguments):
    """The JSON of one run at toy size; checks the order of its rows."""
    command = [sys.executable, SCRIPT, *arguments, "--preset", "tiny", "--rounds", "1", "--out", "b.json"]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    result = subprocess.run(
        list(map(str, command)), cwd=folder, env=environment, capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stderr
    content = json.loads((folder / "b.json").read_text())
    assert (
        content["command"] == f"python scripts/benchmark.py {' '.join(arguments)} --preset tiny --rounds 1 --out b.json"
    )
    assert {"jax", "cores", "device"} < content["environment"].keys()
    assert all(row["min"] <= row["median"] <= row["max"] for row in content["rows"].values())
    files = {path.name for path in folder.iterdir()} - {"b.json", "data", "x.jsonl"}
    assert not files, "something was left"
    return content


@pytest.mark.slow
@pytest.mark.parametrize("what", list(BOTH))
def test_a_subject_measures_both_backends(tmp_path, what):
    size = ["--new-tokens", "24", "--batch-size", "2"] if what == "decode" else ["--sequence-length", "32"]
    content = measured(tmp_path, what, *size)
    rows = content["rows"]
    assert {f"{row}, {backend}" for row in BOTH[what] for backend in ("ours", "hf")} <= rows.keys()
    assert {"torch", "transformers"} < content["environment"].keys()
    ours, hf = (rows[f"{RATIO[what]}, {backend}"]["median"] for backend in ("ours", "hf"))
    assert rows[f"{RATIO[what]}, ours / hf"]["median"] == pytest.approx(ours / hf)
    assert all(row["min"] > 0 for name, row in rows.items() if not name.startswith("cores others"))
    for name in (name for name in rows if name.startswith("loss") and name.endswith("ours")):
        assert rows[name]["median"] == pytest.approx(rows[name.replace("ours", "hf")]["median"], rel=1e-3)


@pytest.mark.slow
def test_quantised_decoding_is_measured_against_narrow_weights(tmp_path):
    size = ["--new-tokens", "8", "--quantize", "bf16", "--against", "hf-bf16", "hf"]
    rows = measured(tmp_path, "decode", *size)["rows"]
    ours, best = (rows[f"tokens/s, {name}"]["median"] for name in ("ours", "hf"))
    assert rows["tokens/s, ours / hf"]["median"] == pytest.approx(ours / best)
    assert any(name.startswith("tokens/s, ours / the best, hf") for name in rows)


@pytest.mark.slow
def test_the_twin_is_a_baseline_of_training(tmp_path):
    rows = measured(tmp_path, "train", "--against", "twin", "--sequence-length", "32", "--dtype", "bfloat16")["rows"]
    assert {"tokens/s, ours / twin", "loss 2, twin"} < rows.keys()
    assert rows["loss 2, ours"]["median"] == pytest.approx(rows["loss 2, twin"]["median"], rel=2e-2)
    assert rows["loss 2, ours"]["median"] < rows["loss 1, ours"]["median"] - 0.5, "the optimizer did nothing"


@pytest.mark.slow
def test_ours_with_freed_memory_is_the_same_step_under_other_settings(tmp_path):
    rows = measured(tmp_path, "train", "--against", "freed-memory", "--sequence-length", "32")["rows"]
    assert rows["loss 2, ours"] == rows["loss 2, freed-memory"]
    assert rows["tokens/s, ours / freed-memory"]["median"] > 0


@pytest.mark.slow
def test_what_remat_keeps_is_measured_policy_by_policy(tmp_path):
    rows = measured(tmp_path, "memory", "--against", "remat-none", "remat-full", "--sequence-length", "256")["rows"]
    none, dots, full = (
        rows[f"GB of the compiled step, {name}"]["median"] for name in ("remat-none", "ours", "remat-full")
    )
    assert none > dots > full


@pytest.mark.slow
def test_packed_documents_are_measured_against_plain_causal_attention(tmp_path):
    rows = measured(tmp_path, "packed", "--sequence-length", "64", "--document-tokens", "16", "--batch-size", "2")[
        "rows"
    ]
    ours, plain = (rows[f"tokens/s, {backend}"]["median"] for backend in ("ours", "plain"))
    assert rows["tokens/s, ours / plain"]["median"] == pytest.approx(ours / plain)


@pytest.mark.slow
@pytest.mark.parametrize("what", ["loss", "attention"])
def test_a_kernel_is_compared_in_bfloat16_and_under_compile_too(tmp_path, what):
    size = ["--sequence-length", "32", "--dtype", "bfloat16", "--against", "hf-compile"]
    rows = measured(tmp_path, what, *size)["rows"]
    assert rows["tokens/s, ours / hf-compile"]["median"] > 0


@pytest.mark.slow
def test_prepare_measures_ours_datasets_and_the_tokenizer_alone(tmp_path):
    (tmp_path / "x.jsonl").write_text("".join(f'{{"text": "the {i}th text"}}\n' for i in range(200)))
    rows = measured(tmp_path, "prepare", "--text", "x.jsonl", "--against", "tokenizers", "datasets")["rows"]
    for unit in ("MB/s", "MB/s of a core"):
        for name in ("tokenizers", "datasets"):
            ours, theirs = (rows[f"{unit}, {backend}"]["median"] for backend in ("ours", name))
            assert rows[f"{unit}, ours / {name}"]["median"] == pytest.approx(ours / theirs)
    ours, theirs = (rows[f"peak GB, {name}"]["median"] for name in ("ours", "datasets"))
    assert rows["peak GB, ours / datasets"]["median"] == pytest.approx(ours / theirs)
    assert 0.01 < ours < 4
    assert "peak GB, tokenizers" not in rows, "it holds all texts"
    assert len(rows) == 15


@pytest.mark.slow
def test_datasets_read_the_files_that_we_read(tmp_path):
    """A licence in the folder, as in assets/sotu, is skipped; files in subfolders are read."""
    folder = tmp_path / "data"
    (folder / "deeper").mkdir(parents=True)
    for name in ("a.txt", "deeper/b.txt", "LICENSE"):
        (folder / name).write_text("some words of text\n")
    rows = measured(tmp_path, "prepare", "--text", "data", "--against", "datasets", "--copies", "2")["rows"]
    assert rows["MB/s, ours / datasets"]["median"] > 0


def test_prepare_measures_the_tokenizer_alone_by_default():
    assert benchmark.Flags("prepare", preset="tiny").baselines == ("tokenizers",)


@pytest.mark.parametrize(("suffix", "documents"), [(".txt", 3), (".jsonl", 6)])
def test_every_preparation_makes_the_tokens_of_the_same_documents(tmp_path, monkeypatch, suffix, documents):
    """A plain text file is one document; a special token typed in it stays text; eos ends each document."""
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))  # read where `datasets` is imported: nothing goes to a home
    from benchmarks import prepare_backend

    texts = ["the first\n\ntext", "a second <|endoftext|> text", "\u00e9t\u00e9 2024"]
    source = tmp_path / "in" / "text"
    source.mkdir(parents=True)
    for number, text in enumerate(texts):
        line = json.dumps({"text": text, "other": 1}) + "\n"
        (source / f"{number}{suffix}").write_text(text if suffix == ".txt" else 2 * line)
    core = tokenizers.Tokenizer.from_file(str(ROOT / "assets/tokenizer/tokenizer.json"))
    core.encode_special_tokens = True
    once = sum(len(core.encode(text, add_special_tokens=False).ids) + 1 for text in texts)
    for name in ("ours", "tokenizers", "datasets"):
        unit, _, _ = prepare_backend.prepare(name, None, source)
        assert unit()["tokens"] == once * documents / 3, name
    assert [path.name for path in source.parent.iterdir()] == ["text"], "something was left"


def test_preparations_of_other_tokens_are_refused():
    with pytest.raises(SmolLMError, match="ours makes 10 tokens, datasets 11: not the same work"):
        check_same_tokens({"ours": {"tokens": 10}, "tokenizers": {"tokens": 10}, "datasets": {"tokens": 11}})


def test_the_peak_memory_is_of_a_process_and_of_its_children():
    """200 MB that parent and child share count once, so do 100 MB of the child alone; a mapped file does not count."""
    script = (
        "import mmap, os, sys, tempfile; shared = b'x' * 200_000_000; file = tempfile.TemporaryFile(); "
        "file.write(shared); file.flush(); mapped = mmap.mmap(file.fileno(), 0); sum(mapped[::4096]);\n"
        "if os.fork() == 0: own = b'x' * 100_000_000; print('ready', flush=True); sys.stdin.read(); os._exit(0)\n"
        "os.wait()"
    )
    command = [sys.executable, "-c", script]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout.readline() == "ready\n"
        returned, peak = compare.peak_memory(process.pid, lambda: time.sleep(0.5) or "returned")
        process.stdin.close()
    assert returned == "returned"
    assert 300e6 <= peak < 330e6


@pytest.mark.slow
def test_checkpoint_measures_what_it_compares(tmp_path):
    rows = measured(tmp_path, "checkpoint", "--sequence-length", "32")["rows"]
    assert {"manifest / save", "verify / save", "step guarded / unguarded"} < rows.keys()


def ready(losses, **more):
    return {"platform": "cpu", "losses": losses} | more


@pytest.mark.parametrize(
    ("dtype", "ours", "theirs", "named"),
    [
        ("float32", ready([10.0, 9.0]), ready([10.0, 9.02]), "loss 2 is 9.000000"),
        ("float32", ready([float("nan")]), ready([10.0]), "loss 1 is nan"),
        ("float32", ready([10.0]), ready([float("nan")]), "hf"),
        ("bfloat16", ready([10.0]), ready([10.3]), "0.02 relative"),
        ("float32", ready([10.0], ids=[[1, 2]]), ready([10.0], ids=[[1, 3]]), "different tokens"),
        ("float32", ready([10.0], platform="gpu"), ready([10.0]), "ours is on a gpu, hf on a cpu"),
        ("float32", ready([], samples={"d q": [1.0, 0.0]}), ready([], samples={"d q": [1.0, 2e-3]}), "d q of ours and"),
        ("bfloat16", ready([], samples={"out": [1.0]}), ready([], samples={"out": [float("nan")]}), "out of ours and"),
    ],
)
def test_backends_that_do_not_do_the_same_work_are_refused(dtype, ours, theirs, named):
    with pytest.raises(SmolLMError, match=named):
        check_equal(dict.fromkeys(("ours", "hf"), dtype), {"ours": ours, "hf": theirs})


@pytest.mark.parametrize(
    ("dtype", "ours", "theirs"),
    [
        ("float32", ready([10.0, 9.0]), ready([10.005, 9.0])),
        ("bfloat16", ready([10.0], ids=[[1]]), ready([10.1], ids=[[2]])),
        ("float32", ready([], samples={"out": [1.0, 0.0]}), ready([], samples={"out": [1.0, 1e-4]})),
    ],
)
def test_rounding_is_no_difference(dtype, ours, theirs):
    check_equal(dict.fromkeys(("ours", "hf"), dtype), {"ours": ours, "hf": theirs})


def test_the_less_exact_of_two_backends_sets_the_tolerance():
    reports = {"ours": ready([10.0]), "hf-bf16": ready([10.1])}
    check_equal({"ours": "float32", "hf-bf16": "bfloat16"}, reports)
    with pytest.raises(SmolLMError, match=r"0\.001 relative"):
        check_equal({"ours": "float32", "hf-bf16": "float32"}, reports)


@pytest.mark.parametrize(
    ("fast", "narrow"), [(True, ("hf-bf16", "hf-compile-bf16", "hf-compile-max-bf16")), (False, ())]
)
def test_pytorch_is_measured_in_every_form_that_this_cpu_has(monkeypatch, fast, narrow):
    monkeypatch.setattr("smollm_jax.runtime.cpu.has_fast_bfloat16", lambda: fast)
    flags = benchmark.Flags("train", against=("pytorch", "twin"), preset="tiny")
    assert flags.baselines == ("hf", "hf-compile", "hf-compile-max", *narrow, "twin")
    assert [flags.dtype_of(name) for name in ("ours", "hf", "hf-bf16")] == ["float32", "float32", "bfloat16"]


@pytest.mark.slow
def test_a_backend_waits_as_openmp_does_by_default_and_is_stopped_while_it_is_not_its_turn(tmp_path, monkeypatch):
    monkeypatch.delenv("OMP_WAIT_POLICY", raising=False)
    backend = Backend("hf", benchmark.Flags("loss", preset="tiny", sequence_length=8).workload("hf"), tmp_path)
    try:
        folder = Path(f"/proc/{backend.process.pid}")
        assert b"OMP_WAIT_POLICY" not in (folder / "environ").read_bytes()
        for _ in range(2):
            deadline = time.monotonic() + 60
            while (state := folder.joinpath("stat").read_text().rpartition(")")[2].split()[0]) != "T":
                assert time.monotonic() < deadline, f"state {state}: a backend that waits takes a core"
            assert backend.run_once()["seconds"] > 0
    finally:
        backend.close()


def test_ratios_are_taken_round_by_round():
    rows = with_ratios("x", {"ours": [1.0, 8.0, 3.0], "hf": [1.0, 2.0, 6.0], "twin": [1.0, 1.0, 1.0]})
    assert rows["x, ours / the best, hf"] == rows["x, ours / hf"]
    assert rows["x, ours / hf"] == {"median": 1.0, "min": 0.5, "max": 4.0}
    assert rows["x, ours / twin"] == {"median": 3.0, "min": 1.0, "max": 8.0}


@pytest.mark.slow
def test_a_backend_that_dies_is_named(tmp_path):
    with pytest.raises(SmolLMError, match="backend hf ended with status"):
        Backend("hf", benchmark.Flags("train", preset="tiny").workload("hf"), tmp_path / "nowhere")


@pytest.mark.parametrize(
    ("flags", "named"),
    [
        ({"what": "train", "rounds": 0}, "--rounds must be at least 1, got 0"),
        ({"what": "decode", "against": ("twin",)}, "decode cannot be measured --against twin: only hf, "),
        ({"what": "checkpoint", "against": ("hf",)}, "checkpoint cannot be measured --against hf: it has no baselines"),
        ({"what": "packed", "against": ("hf",)}, "--against hf: only plain"),
        ({"what": "packed", "document_tokens": 0}, "--document-tokens must be at least 1"),
        ({"what": "decode", "against": ("llamacpp",), "batch_size": 2}, "--batch-size 1 only"),
        ({"what": "train", "sequence_length": 513}, "513 tokens exceed the 512"),
        ({"what": "first-token", "against": ("hf", "llamacpp-q8_0")}, "against llamacpp-q8_0: only hf, llamacpp"),
        ({"what": "prepare", "against": ("hf",)}, "against hf: only tokenizers, datasets"),
        ({"what": "prefill", "quantize": "int8"}, "--quantize is for decode"),
        ({"what": "decode", "new_tokens": 1}, "--new-tokens must be at least 2"),
        ({"what": "decode", "new_tokens": 500}, "516 tokens exceed the 512"),
    ],
)
def test_flags_that_cannot_be_honoured_are_refused(flags, named):
    with pytest.raises(UsageError, match=named):
        check_flags(benchmark.Flags(preset="tiny", **flags))


@pytest.mark.parametrize("what", ["decode", "first-token"])
def test_llama_cpp_that_is_not_there_is_asked_for_in_one_line(monkeypatch, what):
    monkeypatch.setitem(sys.modules, "llama_cpp", None)  # as where it is not installed
    with pytest.raises(UsageError, match="pip install --no-binary llama-cpp-python llama-cpp-python"):
        check_flags(benchmark.Flags(what, against=("hf", "llamacpp"), preset="tiny"))


@pytest.mark.parametrize(
    ("tokens", "named"),
    [
        ({"ours": " is", "hf": " is", "llamacpp": " are"}, "' is' for ours and ' are' for llamacpp: not the same work"),
        ({"ours": "", "hf": ""}, "'' for ours"),  # nothing was printed that could be waited for
    ],
)
def test_first_tokens_that_differ_are_refused(tokens, named):
    with pytest.raises(SmolLMError, match=named):
        starts.check_same_token(tokens)


def test_the_clock_stops_at_what_follows_the_prompt():
    """Neither the prompt nor half of it counts as the first token; the clock does not wait for the process to end."""
    script = f"import time; text = {starts.TEXT!r}\n"
    script += "for piece in (text[:5], text[5:], ' is', '\\n'): print(piece, end='', flush=True); time.sleep(0.3)\n"
    began = time.monotonic()
    seconds, token = starts.until_token("it", [sys.executable, "-c", script + "time.sleep(60)"], dict(os.environ))
    assert token == " is"
    assert seconds > 0.6
    assert time.monotonic() - began < 30
    with pytest.raises(SmolLMError, match="it ended before its first token"):
        starts.until_token("it", [sys.executable, "-c", f"print({starts.TEXT!r}, end='')"], dict(os.environ))


def test_datasets_that_are_not_there_are_asked_for_in_one_line(monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)  # as where it is not installed
    with pytest.raises(UsageError, match="--against datasets needs the package: pip install datasets"):
        check_flags(benchmark.Flags("prepare", against=("datasets",), preset="tiny"))


@pytest.mark.parametrize("names", [("a.txt", "b.jsonl"), ("a.csv",), ("a.txt", "b.txt.gz")])
def test_text_that_datasets_would_read_otherwise_is_refused(tmp_path, names):
    for name in names:
        (tmp_path / name).write_text("text\n")
    with pytest.raises(UsageError, match=r"must have only \.txt files or only \.jsonl files"):
        check_flags(benchmark.Flags("prepare", against=("datasets",), preset="tiny", text=tmp_path))


@pytest.mark.parametrize("why", ["another C library", "told otherwise"])
def test_memory_that_would_not_be_kept_is_not_measured(monkeypatch, why):
    if why == "told otherwise":
        monkeypatch.setenv("GLIBC_TUNABLES", "")
    else:
        monkeypatch.setattr("platform.libc_ver", lambda: ("", ""))  # as with musl
    with pytest.raises(UsageError, match="sets glibc's allocator"):
        check_flags(benchmark.Flags("train", against=("freed-memory",), preset="tiny"))


def test_the_backends_are_given_the_same_seeded_work(monkeypatch):
    """Documents fill every row and have the requested lengths; samples are taken at fixed positions."""
    from benchmarks import workload

    made = workload.Workload("packed", "tiny", 1, 3, 4096, 1, 64, "float32", False, 1)
    segments = made.segments()
    lengths = np.concatenate([np.unique(row, return_counts=True)[1] for row in segments])
    assert (np.diff(segments) >= 0).all()
    assert 32 <= np.median(lengths) <= 96
    assert lengths.max() < 96 <= 4096
    assert 55 < lengths.mean() < 72
    assert all(np.array_equal(a, b) for a, b in zip(made.heads(), made.heads(), strict=True))
    assert workload.samples(np.arange(1000)) == workload.samples(np.arange(1000).reshape(10, 100))
    assert made.flops()["qkv"] == 2 * 3 * 4096 * 96 * (6 + 2 * 2) * 16
    assert made.flops()["attention"] == pytest.approx(2 * 2 * 3 * 6 * 16 * 4096 * 4097 / 2)


def test_a_measurement_of_the_day_is_never_written_over(tmp_path):
    for name in ("train.json", "train-2.json", "train-3.json"):
        path = benchmark.unused(tmp_path / "train.json")
        assert path.name == name
        path.touch()


@pytest.mark.parametrize(
    "method", [pytest.param("lora", marks=pytest.mark.slow), pytest.param("dpo", marks=pytest.mark.overnight)]
)
def test_fine_tuning_is_measured_against_trl_on_the_same_chats(tmp_path, method):
    """The losses of both backends' first rows are compared before anything is timed."""
    pytest.importorskip("trl")
    sizes = ["--sequence-length", "64", "--batch-size", "2"]
    content = measured(tmp_path, "finetune", "--method", method, *sizes)
    rows = content["rows"]
    assert {f"{row}, {name}" for row in ("learnt tokens/s", "peak GB") for name in ("ours", "trl")} <= rows.keys()
    assert {"trl", "peft"} <= content["environment"].keys()
