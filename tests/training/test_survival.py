"""A run survives kill -9, signals, a full disk and bad updates with the bits of an undisturbed run.

Real processes on the tiny model. `make slow` does 25 kills and 8 signals; `make soak` (SMOLLM_SOAK=1) does 200 each.
"""

import functools
import itertools
import json
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from smollm_jax import weights
from smollm_jax.errors import InputFileError
from smollm_jax.runs.checkpoint import STAGING, CheckpointStore, steps_in
from tests.trainer import ENVIRONMENT, ROOT, final_state, losses, rows, start, train, train_here

SOAK = bool(os.environ.get("SMOLLM_SOAK"))
STEPS, SAVE_EVERY = 80, 10
FLAGS = ("--steps", str(STEPS), "--save-every", str(SAVE_EVERY), "--eval-every", "15")


@pytest.fixture(scope="module")
def straight(tmp_path_factory) -> Path:
    """An undisturbed run, which also fills the compilation cache for all others."""
    run = tmp_path_factory.mktemp("runs") / "straight"
    done = train(run, *FLAGS)
    assert done.returncode == 0, done.stderr
    return run


def wait_for(condition, process: subprocess.Popen, seconds: float = 120) -> bool:
    """Whether `what()` came true before the process ended."""
    deadline = time.monotonic() + seconds
    while not condition():
        if process.poll() is not None:
            return False
        assert time.monotonic() < deadline, "the training did not get there"
        time.sleep(0.0005)
    return True


def holds_lock(run: Path, pid: int) -> bool:
    return (run / "lock").exists() and f'"pid": {pid},' in (run / "lock").read_text()


def pause(seconds: float, process: subprocess.Popen) -> None:
    """Waits for this time, or until the process ends."""
    until = time.monotonic() + seconds
    wait_for(lambda: time.monotonic() > until, process)


def assert_same_as(straight: Path, run: Path) -> None:
    expected = dict(enumerate(losses(straight), 1))
    for row in rows(run):  # repeated steps too
        assert float(row["loss"]).hex() == expected[row["step"]], f"step {row['step']} differs"
    assert losses(run) == list(expected.values())
    assert final_state(run) == final_state(straight)
    leftovers = [path.name for path in (run / "checkpoints").iterdir() if not path.name.isdigit()]
    assert leftovers == [], "temporary or bad folders were left"


def most_steps_repeated(run: Path) -> int:
    steps = [row["step"] for row in rows(run)]
    return max((before - after + 1 for before, after in itertools.pairwise(steps)), default=0)


def kill_again_and_again(folder: Path, kills: int, seed: int, *flags: str) -> tuple[int, list[Path]]:
    """Kills runs `kills` times in all and finishes each; returns the number of kills during a save."""
    luck, done, inside, runs = random.Random(seed), 0, 0, []
    while done < kills:
        run = folder / f"run {len(runs)}"
        runs.append(run)
        finished = False
        while done < kills and not finished:
            process = start(run, *FLAGS, *flags)
            if luck.random() < 0.6:  # aim at a save
                wait_for((run / "checkpoints" / STAGING).exists, process)
                time.sleep(luck.uniform(0, 0.12))
            else:
                pause(luck.uniform(0.5, 7), process)
            finished = process.poll() is not None
            process.kill()
            output = process.communicate()[0]
            assert not finished or process.returncode == 0, output
            done += not finished
            inside += (run / "checkpoints" / STAGING).exists() and not finished
        process = start(run, *FLAGS, *flags)
        output = process.communicate()[0]
        assert process.returncode == 0, output
    return inside, runs


@pytest.mark.slow
def test_a_run_killed_again_and_again_has_the_bits_of_one_that_was_not(straight, tmp_path):
    kills = 200 if SOAK else 25
    for name in ("saving", "saving in the background"):
        (tmp_path / name).mkdir()
    with ThreadPoolExecutor(2) as pool:
        first = pool.submit(kill_again_and_again, tmp_path / "saving", kills - kills // 3, 1)
        second = pool.submit(kill_again_and_again, tmp_path / "saving in the background", kills // 3, 2, "--async-save")
        (inside, runs), (inside_async, runs_async) = first.result(), second.result()
    for run in runs + runs_async:
        assert_same_as(straight, run)
    repeated, repeated_async = (max(map(most_steps_repeated, some)) for some in (runs, runs_async))
    print(
        f"{kills} kills, {inside + inside_async} inside a save; at most {repeated} steps repeated, "
        f"{repeated_async} saving in the background"
    )
    assert inside + inside_async >= kills / 3
    assert repeated <= SAVE_EVERY
    assert repeated_async <= 2 * SAVE_EVERY  # the save before the last may still be under way


def stop_again_and_again(folder: Path, signals: int, seed: int) -> tuple[list[int], list[Path]]:
    """Stops runs by `signals` signals in all and finishes each; returns the steps at which they were saved."""
    luck, saved, runs = random.Random(seed), [], []
    while len(saved) < signals:
        run = folder / f"run {len(runs)}"
        runs.append(run)
        while len(saved) < signals and (steps_in(run / "checkpoints") or [0])[-1] < STEPS:
            process = start(run, *FLAGS)
            wait_for(functools.partial(holds_lock, run, process.pid), process)
            pause(luck.uniform(0, 6), process)
            process.send_signal(luck.choice([signal.SIGTERM, signal.SIGINT]))
            logged = (rows(run) or [{"step": 0}])[-1]["step"]
            output = process.communicate(timeout=120)[0]
            if process.returncode == 0 and "next: python" in output:
                break  # the signal came when it had ended
            assert process.returncode == 75, output
            assert "saved and verified" in output
            saved.append(steps_in(run / "checkpoints")[-1])
            assert saved[-1] <= logged + 1
        done = train(run, *FLAGS, "--resume")
        assert done.returncode == 0, done.stderr
    return saved, runs


@pytest.mark.slow
def test_a_run_stopped_by_signals_again_and_again_has_the_bits_of_one_that_was_not(straight, tmp_path):
    """Signals at random moments: during imports, compilation, a step, a save, validation, sampling."""
    half = (200 if SOAK else 8) // 2
    folders = [tmp_path / "a", tmp_path / "b"]
    with ThreadPoolExecutor(2) as pool:
        for folder in folders:
            folder.mkdir()
        (saved, runs), (more_saved, more_runs) = pool.map(stop_again_and_again, folders, (half, half), (3, 4))
    for run in runs + more_runs:
        assert_same_as(straight, run)
    print(f"{2 * half} of {2 * half} signals ended in exit 75, saved at steps {saved + more_saved}")


@pytest.mark.slow
def test_a_second_signal_ends_the_run_at_once_and_breaks_nothing(straight, tmp_path, monkeypatch):
    run = tmp_path / "run"
    process = start(run, *FLAGS)
    wait_for(lambda: len(rows(run)) > SAVE_EVERY + 2, process)
    process.kill()
    process.communicate()
    monkeypatch.setitem(ENVIRONMENT, "JAX_ENABLE_COMPILATION_CACHE", "false")
    process = start(run, *FLAGS)
    wait_for(functools.partial(holds_lock, run, process.pid), process)
    while process.poll() is None:  # it imports and compiles for more than the second in which signals count once
        process.send_signal(signal.SIGTERM)
        time.sleep(0.1)
    output = process.communicate()[0]
    assert process.returncode == 128 + signal.SIGTERM, output
    assert output.count("SIGTERM: ") == 1
    done = train(run, *FLAGS, "--resume")
    assert done.returncode == 0, done.stderr
    assert_same_as(straight, run)


@pytest.mark.slow
def test_two_trainers_do_not_share_a_run_and_a_killed_one_holds_nothing(tmp_path):
    run = tmp_path / "run"
    process = start(run, "--steps", "100000", "--save-every", "30")
    try:
        wait_for(lambda: len(rows(run)) > 2, process)
        for flags in ((), ("--resume",)):
            if flags:
                wait_for(lambda: bool(steps_in(run / "checkpoints")), process)
            before = resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime
            second = train(run, "--steps", "100000", *flags)
            assert second.returncode == 6, second.stderr
            assert f'"pid": {process.pid}, "host": "{os.uname().nodename}"' in second.stderr
            assert len(second.stderr.strip().splitlines()) == 1
            # Nothing heavy is imported before: a user must not wait to be told. Of the processor, not of a busy clock.
            assert resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime - before < 2
    finally:
        process.kill()
        process.communicate()
    assert train(run, "--steps", "100000", "--resume", prefix=("timeout", "--preserve-status", "12")).returncode == 75


# Stands for a full disk: a write beyond 200 KiB of a file fails, with EFBIG.
FULL_DISK = ("bash", "-c", 'ulimit -f 200; exec "$@"', "bash")


def checkpoint_files(run: Path) -> dict[Path, bytes]:
    """All files except those in the staging folder, which threads of a failed save may create again."""
    files = [path for path in (run / "checkpoints").rglob("*") if path.is_file()]
    return {path: path.read_bytes() for path in files if STAGING not in path.parts}


@pytest.mark.slow
@pytest.mark.parametrize("flags", [(), ("--async-save",)])
def test_a_full_disk_stops_a_run_before_the_next_step_and_loses_nothing(straight, tmp_path, flags):
    run = tmp_path / "run"
    process = start(run, *FLAGS)
    wait_for(lambda: len(rows(run)) > SAVE_EVERY + 2, process)
    process.send_signal(signal.SIGTERM)
    process.communicate()
    steps = steps_in(run / "checkpoints")
    before = checkpoint_files(run)
    full = train(run, *FLAGS, "--resume", *flags, prefix=FULL_DISK)
    assert full.returncode == 5, full.stderr
    assert "could not be saved" in full.stderr
    assert len(full.stderr.strip().splitlines()) == 1
    failed = -(-(steps[-1] + 1) // SAVE_EVERY) * SAVE_EVERY
    assert failed <= rows(run)[-1]["step"] <= failed + (SAVE_EVERY if flags else 0)
    assert before == checkpoint_files(run)
    resumed = train(run, *FLAGS, "--resume")
    assert resumed.returncode == 0, resumed.stderr
    assert not (run / "checkpoints" / STAGING).exists()
    assert_same_as(straight, run)


@pytest.mark.slow
def test_an_export_to_a_full_disk_leaves_nothing(straight, tmp_path):
    targets = [("x", ["--to", "hf"]), ("x.safetensors", []), ("y", ["--to", "orbax"])]
    for name, more in targets + ([] if os.environ.get("SMOLLM_WITHOUT_TORCH") else [("x.pt", [])]):
        script = [sys.executable, str(ROOT / "scripts/convert_weights.py"), str(straight), str(tmp_path / name), *more]
        done = subprocess.run([*FULL_DISK, *script], capture_output=True, text=True, check=False, env=ENVIRONMENT)
        assert done.returncode == 5, done.stderr
        assert str(tmp_path / name) in done.stderr
        assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
@pytest.mark.parametrize("where", ["missing/parents/läuft mit €", "link"])
def test_a_run_folder_may_be_anywhere(tmp_path, where):
    if where == "link":
        (tmp_path / "real").mkdir()
        (tmp_path / "link").symlink_to(tmp_path / "real")
    done = train(tmp_path / where, "--steps", "2")
    assert done.returncode == 0, done.stderr
    assert steps_in(tmp_path / where / "checkpoints") == [2]


def test_a_run_folder_that_cannot_be_one_is_a_storage_error(tmp_path):
    (tmp_path / "file").write_text("mine")
    for run in (tmp_path / "file", Path("/proc/run"), tmp_path / "file/inside"):  # nobody can write to /proc
        done = train(run, "--steps", "2")
        assert done.returncode == 5, done.stderr
        assert str(run) in done.stderr
        assert len(done.stderr.strip().splitlines()) == 1
    assert (tmp_path / "file").read_text() == "mine"


def damage_newest(run: Path) -> Path:
    folder = run / "checkpoints" / str(steps_in(run / "checkpoints")[-1])
    largest = max((path for path in folder.rglob("*") if path.is_file()), key=lambda path: path.stat().st_size)
    content = bytearray(largest.read_bytes())
    content[len(content) // 2] ^= 1
    largest.write_bytes(content)
    return largest


def test_a_flipped_bit_costs_the_steps_since_the_checkpoint_before_and_no_more(tmp_path):
    straight, run, flags = tmp_path / "straight", tmp_path / "run", ("--steps", "20", "--save-every", "5")
    assert train_here(straight, *flags).returncode == 0
    assert train_here(run, *flags, dies_after=12).returncode == -signal.SIGKILL
    older, newest = steps_in(run / "checkpoints")[-2:]
    damaged = damage_newest(run)
    done = train_here(run, *flags, "--resume")
    assert done.returncode == 0, done.stderr
    warnings = [line for line in done.stderr.splitlines() if line.startswith("warning:")]
    assert len(warnings) == 1
    assert f"{newest}/{damaged.relative_to(run / 'checkpoints' / str(newest))}: sha256 differs" in warnings[0]
    assert f"resumed from step {older}" in done.stdout
    aside = run / f"checkpoints/{newest}.bad"
    assert aside.is_dir(), "a bad checkpoint is never deleted"
    aside.rename(tmp_path / "aside")
    assert_same_as(straight, run)


def test_without_a_good_checkpoint_nothing_starts_and_nothing_is_touched(tmp_path):
    run = tmp_path / "run"
    flags = ("--steps", "20", "--save-every", "5")
    assert train_here(run, *flags, dies_after=12).returncode == -signal.SIGKILL
    damage_newest(run)
    (run / "checkpoints/5/integrity.json").unlink()
    before = sorted(path.name for path in (run / "checkpoints").iterdir())
    done = train_here(run, *flags, "--resume")
    assert done.returncode == 4, done.stderr
    assert "checkpoints/10/" in done.stderr
    assert "sha256 differs" in done.stderr
    assert "checkpoints/5/integrity.json: is missing" in done.stderr
    assert before == sorted(path.name for path in (run / "checkpoints").iterdir())
    accepted = train_here(run, *flags, "--resume", "--allow-unverified")
    assert accepted.returncode == 0, accepted.stderr
    assert "resumed from step 5" in accepted.stdout


@pytest.mark.slow
def test_a_change_that_is_allowed_is_made_and_named(tmp_path):
    run = tmp_path / "run"
    assert train(run, "--steps", "2", "--decay-fraction", "0").returncode == 0
    flags = ("--steps", "4", "--resume", "--seed", "7", "--sequence-length", "32")
    refused = train(run, *flags, "--allow-change", "seed")
    assert refused.returncode == 2
    assert "these changed: sequence_length: 64 -> 32" in refused.stderr
    assert "seed: 0" not in refused.stderr
    done = train(run, *flags, "--allow-change", "seed", "sequence_length")
    assert done.returncode == 0, done.stderr
    assert "note: changed, allowed by --allow-change: seed: 0 -> 7" in done.stdout
    with CheckpointStore(run / "checkpoints", create=False) as store:
        assert store.meta(4)["tokens_seen"] == 2 * 2 * 64 + 2 * 2 * 32
        assert store.meta(4)["recipe"]["seed"] == 7


@pytest.mark.slow
def test_a_config_edited_after_training_is_named(tmp_path):
    run = tmp_path / "run"
    assert train(run, "--steps", "2").returncode == 0
    config = json.loads((run / "config.json").read_text())
    config["rope_theta"] = config["rope_parameters"]["rope_theta"] = 10_000.0
    (run / "config.json").write_text(json.dumps(config))
    edited = train(run, "--steps", "4", "--resume", preset=None)
    assert edited.returncode == 2
    assert "rope_theta: 100000.0 -> 10000.0" in edited.stderr
    with pytest.raises(InputFileError, match=r"config\.json: changed since step 2 was saved: rope_theta"):
        weights.read(run)
    resumed = train(run, "--steps", "4", "--resume", preset="tiny")
    assert resumed.returncode == 0, resumed.stderr
    assert json.loads((run / "config.json").read_text())["rope_theta"] == 100_000.0


@pytest.mark.slow
def test_a_changed_model_that_is_allowed_is_the_one_that_is_trained(tmp_path):
    """Long-context training continues from a checkpoint with another rope_theta; other shapes cannot change."""
    run, copy = tmp_path / "run", tmp_path / "kept"
    assert train(run, "--steps", "2", "--decay-fraction", "0").returncode == 0
    shutil.copytree(run, copy)
    unchanged = train(copy, "--steps", "3", "--resume")
    assert unchanged.returncode == 0, unchanged.stderr
    config = json.loads((run / "config.json").read_text())
    config["rope_theta"] = config["rope_parameters"]["rope_theta"] = 100.0
    (run / "config.json").write_text(json.dumps(config))
    done = train(run, "--steps", "3", "--resume", "--allow-change", "rope_theta", preset=None)
    assert done.returncode == 0, done.stderr
    assert losses(run)[2] != losses(copy)[2], "the change was said and not made"
    with CheckpointStore(run / "checkpoints", create=False) as store:
        assert store.meta(3)["config"]["rope_theta"] == 100.0
    config["intermediate_size"] = 128
    (run / "config.json").write_text(json.dumps(config))
    refused = train(run, "--steps", "4", "--resume", "--allow-change", "intermediate_size", preset=None)
    assert refused.returncode == 2
    assert "do not fit the changed model: layers.mlp.down_proj has shape (3, 256, 96)" in refused.stderr
    assert steps_in(run / "checkpoints") == [2, 3]


@pytest.mark.slow
@pytest.mark.parametrize("how", ["closed pipe", "hang-up"])
def test_a_terminal_or_pipe_that_goes_away_ends_no_run_unsaved(straight, tmp_path, how):
    run = tmp_path / "run"
    process = start(run, *FLAGS, "--log-every", "1")
    wait_for(lambda: len(rows(run)) > 2, process)
    process.stdout.close()
    if how == "hang-up":
        process.send_signal(signal.SIGHUP)
    assert process.wait(120) == (75 if how == "hang-up" else 0)
    if how == "hang-up":
        assert train(run, *FLAGS, "--resume").returncode == 0
    assert_same_as(straight, run)


@pytest.mark.slow
def test_a_step_that_is_whole_but_cannot_be_understood_is_not_set_aside(tmp_path):
    from smollm_jax.runs import manifest as integrity

    run = tmp_path / "run"
    assert train(run, "--steps", "4", "--save-every", "2").returncode == 0
    folder = run / "checkpoints/4"
    meta = json.loads((folder / "meta/metadata").read_text())
    meta["recipe"]["invented_later"] = 1
    (folder / "meta/metadata").write_text(json.dumps(meta))
    manifest = json.loads((folder / "integrity.json").read_text())
    integrity.seal(folder, {name: manifest[name] for name in ("step", "fingerprints", "environment")})
    done = train(run, "--steps", "6", "--resume")
    assert done.returncode == 4
    assert "step 4: it was saved by another version of this trainer" in done.stderr
    assert steps_in(run / "checkpoints") == [2, 4]
