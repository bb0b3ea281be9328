"""Training continues exactly where it stopped, learns, and never overwrites a run. Real processes, tiny model."""

import json
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest

from smollm_jax import weights
from smollm_jax.config import PRESETS, Recipe
from smollm_jax.config.hf_config import config_from_hf, config_to_hf
from smollm_jax.data.batches import Batches
from smollm_jax.data.mixture import open_mixture
from smollm_jax.evaluation.quality import quality
from smollm_jax.runs.checkpoint import CheckpointStore
from smollm_jax.runs.metrics import read_metrics
from smollm_jax.runtime import cpu
from smollm_jax.tokenizer import Tokenizer
from smollm_jax.training import memory, train_step
from smollm_jax.training import run as run_module
from tests.trainer import ENVIRONMENT, ROOT, command, final_state, losses, refused, speeches, train, train_here


def kill_after(run: Path, step: int, *flags: str, **options) -> None:
    """Starts a run and kills it with SIGKILL once `step` is in its log."""
    with subprocess.Popen(
        command(run, *flags, **options), cwd=run.parent, env=ENVIRONMENT, stdout=subprocess.DEVNULL
    ) as process:
        metrics, deadline = run / "metrics.jsonl", time.monotonic() + 600
        while not (metrics.is_file() and f'"step": {step},' in metrics.read_text()):
            assert process.poll() is None, "training ended before it could be killed"
            assert time.monotonic() < deadline, "training did not get there"
            time.sleep(0.005)
        process.send_signal(signal.SIGKILL)


FLAGS = ("--steps", "20", "--save-every", "10")


@pytest.fixture(scope="module")
def straight(tmp_path_factory) -> Path:
    """An uninterrupted run of 20 steps."""
    run = tmp_path_factory.mktemp("runs") / "straight"
    done = train_here(run, *FLAGS)
    assert done.returncode == 0, done.stderr
    (run.parent / "printed").write_text(done.stdout)
    return run


@pytest.mark.parametrize(
    "preset",
    ["tiny", pytest.param("smollm2-135m-pretrain", marks=pytest.mark.overnight)],  # full shape: about 8 minutes
)
def test_killed_and_resumed_is_bit_equal_to_straight(tmp_path, straight, preset):
    if preset != "tiny":
        straight = tmp_path / "straight"
        assert train(straight, *FLAGS, preset=preset).returncode == 0
    kill_after(tmp_path / "killed", 13, *FLAGS, preset=preset)
    resumed = train(tmp_path / "killed", *FLAGS, "--resume", preset=preset)
    assert resumed.returncode == 0, resumed.stderr
    assert "resumed from step 10" in resumed.stdout
    assert losses(tmp_path / "killed") == losses(straight)
    assert len(losses(straight)) == 20
    state = final_state(straight)
    assert final_state(tmp_path / "killed") == state
    assert len(state) == 11 + 2 * 11 + 2, "parameters, two moments of each, two step counts"
    assert not list((tmp_path / "killed/checkpoints").glob("*tmp*"))


def test_training_learns(straight):
    rows = read_metrics(straight)
    first, last = (row["loss"] for row in (rows[0], [row for row in rows if "loss" in row][-1]))
    assert last < first - 1
    assert rows[-1]["validation_loss"] < first - 1
    assert rows[-1]["validation_perplexity"] == pytest.approx(np.exp(rows[-1]["validation_loss"]))


def test_the_run_folder_is_complete_and_loads_as_weights(straight):
    import jax.numpy as jnp

    from smollm_jax.tokenizer import Tokenizer

    model, config = weights.load(straight)
    assert model(jnp.asarray([Tokenizer.load(straight).encode("The quick")])).shape[-1] == config.vocab_size
    assert sorted(p.name for p in (straight / "checkpoints").iterdir()) == ["10", "20"]
    meta = json.loads((straight / "checkpoints/20/meta/metadata").read_text())
    assert meta["tokens_seen"] == 20 * 2 * 64


def test_what_training_prints(straight):
    printed = (straight.parent / "printed").read_text()
    precision = "bfloat16 matmuls with float32 results" if cpu.has_fast_bfloat16() else "float32 matmuls"
    for part in ("no GPU found", "5,014,176 parameters", f"precision   {precision}", "2 x 64 = 128 tokens each"):
        assert part in printed
    assert "The quick brown fox -> " in printed
    assert "predicted next token:" in printed


def test_a_finished_run_says_so_and_goes_on_when_asked_for_more(tmp_path):
    assert train_here(tmp_path / "run", "--steps", "2", "--decay-fraction", "0", "--warmup-steps", "1").returncode == 0
    resumed = train_here(tmp_path / "run", "--resume")
    assert resumed.returncode == 0
    assert "already at step 2 of 2" in resumed.stdout
    more = train_here(tmp_path / "run", "--steps", "4", "--resume")
    assert more.returncode == 0
    assert len(losses(tmp_path / "run")) == 4


def test_a_run_is_never_written_over(straight):
    before = (straight / "metrics.jsonl").read_bytes()
    refusal = refused(straight, *FLAGS)
    assert refusal.exit_code == 2
    assert "--resume" in str(refusal)
    assert (straight / "metrics.jsonl").read_bytes() == before


CHANGES = {
    ("--seed", "1"): "seed: 0 -> 1",
    ("--learning-rate", "1e-4"): "learning_rate: 0.003 -> 0.0001",
    ("--batch-size", "4"): "batch_size: 2 -> 4",
}


@pytest.mark.parametrize(
    "flags", [tuple(CHANGES), *(pytest.param((flag,), marks=pytest.mark.slow) for flag in CHANGES)]
)
def test_resuming_under_another_recipe_is_refused_by_name(straight, flags):
    done = train_here(straight, "--steps", "60", "--resume", *(word for flag in flags for word in flag))
    assert done.returncode == 2
    assert all(CHANGES[flag] in done.stderr for flag in flags)


@pytest.mark.slow
def test_resuming_on_other_data_is_refused(straight, tmp_path):
    other = tmp_path / "other.txt"
    other.write_text("entirely different words " * 4000)
    done = train_here(straight, "--steps", "60", "--resume", data=other)
    assert done.returncode == 2
    assert "data: " in done.stderr


@pytest.mark.parametrize(
    ("flags", "code", "named"),
    [
        (["--steps", "0"], 2, "steps"),
        (["--log-every", "0"], 2, "--log-every"),
        (["--preset", "smollm3"], 2, "smollm2-135m-pretrain"),
        (["--sequence-length", "1024"], 2, "512 positions"),
        (["--attention", "cudnn"], 2, "cudnn"),
        (["--data", "nowhere"], 3, "nowhere"),
        (["--data", "nowhere/*.txt"], 3, "nowhere/*.txt"),
        (["--data", "a:0.5", "b"], 2, "weight to every source or to none"),
        (["--init-from", "nowhere"], 3, "nowhere"),
        (["--tokenizer", "nowhere"], 3, "nowhere"),
        (["--compare-with", "nowhere"], 3, "nowhere"),
        (["--prompt", "a b " * 300], 2, "--prompt"),
        (["--track", "trackio"], 2, "pip install trackio"),
        (["--resume"], 4, "checkpoint"),
    ],
)
def test_what_cannot_be_trained_is_one_line_and_an_exit_code(tmp_path, capsys, flags, code, named):
    refusal = refused(tmp_path / "run", *flags)
    assert refusal.exit_code == code
    assert named in str(refusal)
    assert capsys.readouterr() == ("", ""), "said before anything is announced"
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("flags", "named"),
    [
        pytest.param(["--data", "nowhere"], "nowhere", marks=pytest.mark.slow),
        pytest.param(["--data", "short.txt", "--sequence-length", "1024"], "512 positions", marks=pytest.mark.slow),
        pytest.param(["--data", "short.txt", "--batch-size", "1000000"], "--batch-size", marks=pytest.mark.slow),
        (["--data", "broken.txt"], "broken.txt: byte 4 is not UTF-8"),  # while text is prepared
        (["--data", "short.txt", "--track", "wandb"], "--track wandb: no network"),  # once the run's files are written
    ],
)
def test_a_start_that_is_refused_leaves_nothing_behind(tmp_path, flags, named):
    (tmp_path / "broken.txt").write_bytes(b"abc \xff def")
    (tmp_path / "short.txt").write_text("a few words " * 400)
    (tmp_path / "wandb.py").write_text("Settings = dict\ndef init(**_): raise OSError('no network')")
    there = sorted(tmp_path.iterdir())
    script = [sys.executable, str(ROOT / "scripts/train_jax.py"), "--preset", "tiny", "--sequence-length", "64"]
    environment = ENVIRONMENT | {"PYTHONPATH": f"{ROOT}:{tmp_path}", "PYTHONDONTWRITEBYTECODE": "1"}
    done = subprocess.run(
        [*script, "--tokenizer", str(ROOT / "assets/tokenizer"), *flags],
        cwd=tmp_path, env=environment, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert named in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1
    if "--track" in flags:  # prepared text is good and kept
        assert [path.name for path in (tmp_path / "data").iterdir()]
        shutil.rmtree(tmp_path / "data")
    assert sorted(tmp_path.iterdir()) == there


@pytest.mark.slow
def test_a_diverged_run_stops_and_keeps_its_checkpoint(tmp_path):
    run = tmp_path / "run"
    done = train(run, "--steps", "30", "--save-every", "1", "--learning-rate", "1e9", "--warmup-steps", "0")
    assert done.returncode == 7
    assert "10 of the last 1,000 updates were not finite" in done.stderr
    assert "is not finite, update skipped; training windows [" in done.stdout
    with CheckpointStore(run / "checkpoints", create=False) as store:
        assert store.steps()


def test_what_a_run_left_that_died_before_its_first_checkpoint_is_replaced(tmp_path):
    """Above all its config: weights read with another rope_theta than they were trained with are silently wrong."""
    run = tmp_path / "run"
    (run / "checkpoints/1.orbax-checkpoint-tmp").mkdir(parents=True)
    (run / "config.json").write_text(json.dumps(config_to_hf(PRESETS["smollm2-135m"])))
    (run / "metrics.jsonl").write_text('{"step": 1, "loss": 1.0}\n')
    assert train_here(run, *FLAGS).returncode == 2, "a folder without a lock is somebody else's"
    (run / "lock").write_text("")
    assert train_here(run, *FLAGS, "--resume").returncode == 4
    replaced = train_here(run, *FLAGS)
    assert replaced.returncode == 0
    assert f"its earlier metrics are now {run}/metrics.jsonl.1" in replaced.stdout
    assert (run / "metrics.jsonl.1").read_text() == '{"step": 1, "loss": 1.0}\n'
    assert config_from_hf(json.loads((run / "config.json").read_text())) == PRESETS["tiny"]
    assert len(losses(run)) == 20


def test_a_folder_of_weights_is_not_written_over(tmp_path, straight):
    folder = tmp_path / "hf"
    weights.write(folder, weights.read(straight), "hf")
    refusal = refused(folder, "--steps", "2")
    assert refusal.exit_code == 2
    assert "is not a run of this trainer" in str(refusal)


def greedy(run: Path, prompt: list[int], tokenizer: Tokenizer) -> str:
    """32 greedy tokens, each from a forward pass over all tokens before it."""
    import jax

    model, _ = weights.load(run)
    forward = jax.jit(lambda tokens: model(tokens))
    ids = list(prompt)
    for _ in range(32):
        tokens = np.zeros((1, 64), np.int32)  # of one shape; nothing looks at what comes later
        tokens[0, : len(ids)] = ids
        ids.append(int(forward(tokens)[0, len(ids) - 1].argmax()))
    return tokenizer.decode(ids[len(prompt) :])


@pytest.mark.parametrize(("prompt", "devices"), [("The\nquick", 1), pytest.param("", 2, marks=pytest.mark.slow)])
def test_training_starts_at_given_weights_and_each_validation_prints_what_they_write(
    tmp_path, straight, prompt, devices
):
    """Also with sharded parameters, and from the token that starts a document; the first are those of --init-from."""
    begin = straight
    if devices == 1:
        weights.write(begin := tmp_path / "hf", weights.read(straight), "hf")
    flags = ["--steps", "4", "--eval-every", "2", "--prompt", prompt, "--init-from", str(begin)]
    flags += ["--mesh", f"fsdp={devices}"] if devices > 1 else []
    if devices == 1:
        done = train_here(tmp_path / "run", *flags)
    else:
        prefix = ("env", f"XLA_FLAGS=--xla_force_host_platform_device_count={devices}")
        done = train(tmp_path / "run", *flags, prefix=prefix)
    assert done.returncode == 0, done.stderr
    assert "warm-up by default for trained weights" in done.stdout
    first = read_metrics(tmp_path / "run")[0]
    assert first["step"] == 0
    assert first["validation_loss"] == pytest.approx(read_metrics(straight)[-1]["validation_loss"], rel=1e-5)
    samples = re.findall(r"^step (\d+)/4  sample: (.*)$", done.stdout, re.MULTILINE)
    assert [int(step) for step, _ in samples] == [0, 2, 4]
    tokenizer = Tokenizer.load(straight)
    start = tokenizer.encode(prompt) or [0]  # <|endoftext|>, the tiny model's bos and eos
    for run, (_, line) in ((straight, samples[0]), (tmp_path / "run", samples[-1])):
        assert line == f"{prompt!r} -> {greedy(run, start, tokenizer)!r}"


@pytest.mark.slow
def test_samples_can_be_left_out(tmp_path):
    done = train(tmp_path / "run", "--steps", "2", "--no-sample")
    assert done.returncode == 0, done.stderr
    assert "sample:" not in done.stdout
    assert "The quick brown fox -> " in done.stdout


WHAT_IS_WHEN = """
import gc
import sys
from pathlib import Path
from scripts import train_jax
from smollm_jax import weights
from smollm_jax.data import mixture
def said(name, function):
    def wrapped(*given, **options):
        mapped = "model.safetensors" in Path("/proc/self/maps").read_text()
        print(name, mapped, gc.isenabled(), file=sys.stderr)
        return function(*given, **options)
    return wrapped
weights.from_bundle = said("from_bundle", weights.from_bundle)
mixture.open_mixture = said("prepare", mixture.open_mixture)
train_jax.main(sys.argv[3:])  # after the command it stands for
"""


@pytest.mark.slow
def test_before_text_is_read_the_file_a_run_begins_with_is_let_go_and_garbage_collected_again(tmp_path, straight):
    """Reading text may take hours, during which a write to the file would change verified weights."""
    weights.write(tmp_path / "hf", weights.read(straight), "hf")
    prefix = (sys.executable, "-c", WHAT_IS_WHEN)
    done = train(tmp_path / "run", "--steps", "1", "--init-from", str(tmp_path / "hf"), prefix=prefix)
    assert done.returncode == 0, done.stderr
    reported = [line for line in done.stderr.splitlines() if line.startswith(("from_bundle", "prepare"))]
    assert reported == ["from_bundle True False", "prepare False True"]


@pytest.mark.slow
def test_tensorboard_files_are_written_on_request(tmp_path):
    assert train(tmp_path / "run", "--steps", "2", "--tensorboard").returncode == 0
    assert list((tmp_path / "run/tensorboard").iterdir())


@pytest.mark.slow
def test_without_instructions_for_bfloat16_a_run_multiplies_float32_and_bfloat16_means_the_same(tmp_path):
    """As on a CPU with AVX2 only."""
    old = ("env", "XLA_FLAGS=--xla_cpu_max_isa=AVX2")
    done = train(tmp_path / "default", "--steps", "3", prefix=old)
    assert done.returncode == 0, done.stderr
    assert "precision   float32 matmuls, attention xla" in done.stdout
    curves = []
    for name, prefix in (("old", old), ("own", ())):
        done = train(tmp_path / name, "--steps", "3", "--dtype", "bfloat16", prefix=prefix)
        assert done.returncode == 0, done.stderr
        assert "precision   bfloat16 matmuls with float32 results, attention xla" in done.stdout
        curves.append([row["loss"] for row in read_metrics(tmp_path / name) if "loss" in row])
    assert len(curves[0]) == 3
    assert curves[0] == pytest.approx(curves[1], rel=1e-4)
    assert curves[0] != [row["loss"] for row in read_metrics(tmp_path / "default") if "loss" in row]


@pytest.mark.slow
def test_the_quality_of_the_run_and_of_a_reference_are_said_in_bits_per_byte(tmp_path, straight, tokenizer_path):
    """The same bits per byte by the trainer and, of the same windows, by what `scripts/evaluate.py` measures with."""
    run = tmp_path / "run"
    done = train(run, "--steps", "2", "--dtype", "float32", "--compare-with", str(straight))
    assert done.returncode == 0, done.stderr
    tokenizer = Tokenizer.load(tokenizer_path)
    recipe = Recipe(2, batch_size=2, sequence_length=64, learning_rate=1e-3, warmup_steps=0, dtype="float32")
    batches = Batches(open_mixture(speeches(), tokenizer_path, tmp_path / "data"), recipe)
    windows = [window.tolist() for batch in batches.validation(8) for window in batch]
    documents = [(window, tokenizer.byte_count(window[1:])) for window in windows]
    match = re.search(rf"for comparison: {straight}, (\S+) bits per byte", done.stdout)
    for weights_, bits_per_byte in [
        (run, read_metrics(run)[-1]["validation_bits_per_byte"]),
        (straight, float(match[1])),
    ]:
        model, _ = weights.load(weights_)
        expected = quality(model, documents, length=64, stride=64).bits_per_byte
        assert bits_per_byte == pytest.approx(expected, rel=1e-6 if weights_ == run else 1e-3)


@pytest.mark.slow
def test_a_reference_that_reads_other_tokens_is_refused(tmp_path, straight):
    other = tmp_path / "other"
    shutil.copytree(straight, other)
    text = (other / "tokenizer.json").read_text(encoding="utf-8")
    (other / "tokenizer.json").write_text(text.replace('"<repo_name>"', '"<another>"'), encoding="utf-8")
    done = train(tmp_path / "run", "--steps", "2", "--compare-with", str(other))
    assert done.returncode == 2
    assert f"--compare-with {other}: its tokenizer differs from that of" in done.stderr


def test_the_step_is_compiled_once_while_the_data_are_read(tmp_path, monkeypatch):
    compiling, reading, compiled = threading.Event(), threading.Event(), []
    compile_within, prepare = memory.compile_within, run_module.open_mixture

    def compiles(*arguments, **options):
        compiling.set()
        assert reading.wait(60), "the step is compiled before the data are read"
        compiled.append(compile_within(*arguments, **options))
        return compiled[-1]

    def prepares(*arguments, **options):
        reading.set()
        assert compiling.wait(60), "the data are read before the step is compiled"
        return prepare(*arguments, **options)

    monkeypatch.setattr(memory, "compile_within", compiles)
    monkeypatch.setattr(run_module, "open_mixture", prepares)
    before = train_step.train_step._cache_size()
    done = train_here(tmp_path / "run", *FLAGS[:2])
    assert done.returncode == 0, done.stderr
    assert len(compiled) == 1
    assert train_step.train_step._cache_size() == before, "compiled again at its first call"
