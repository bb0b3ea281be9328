"""Whatever happens to a checkpoint folder, the newest verified state survives and damaged data is never restored."""

import os
import resource
import shutil
import subprocess
import sys
import threading
from contextlib import contextmanager, suppress
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from smollm_jax.errors import CheckpointError, DivergedError, StorageError
from smollm_jax.runs import checkpoint, manifest
from smollm_jax.runs.checkpoint import STAGING, CheckpointStore, steps_in
from tests.trainer import ENVIRONMENT, ROOT

SOAK = bool(os.environ.get("SMOLLM_SOAK"))


def items(seed: int):
    key = jax.random.key(seed)
    moments = {"mu.w": jnp.full((8, 3), seed / 7), "count": jnp.asarray(seed, jnp.int32)}
    return {
        "params": {"w": jax.random.normal(key, (8, 3)), "b": jnp.ones(5, jnp.bfloat16) * seed},
        "optimizer": moments,
    }


def like():
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), items(0))


def bits(tree) -> dict[str, bytes]:
    return {f"{item}.{name}": np.asarray(x).tobytes() for item, part in tree.items() for name, x in part.items()}


def newest(folder: Path, **options):
    """Step and content that a resume would restore."""
    with CheckpointStore(folder, create=False) as store:

        def load(step):
            return store.meta(step)["step"], bits(store.restore(step, like()))

        return store.restore_newest_valid(load, **options)


def save_and_wait(store: CheckpointStore, step: int) -> None:
    store.save(step, items(step), {"step": step})
    store.wait()


@contextmanager
def full_disk(free_bytes: int):
    """No file may grow beyond this: the kernel refuses the write, as it does when the disk is full."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (free_bytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


DAMAGES = {"deleted": None, "emptied": None, "halved": None, "one byte appended": None} | {
    f"bit {k}/8 flipped": k for k in range(8)
}


def damage(path: Path, kind: str) -> None:
    content = bytearray(path.read_bytes())
    if kind == "deleted":
        path.unlink()
        return
    if kind == "emptied":
        content = bytearray()
    elif kind == "halved":
        content = content[: len(content) // 2]
    elif kind == "one byte appended":
        content += b"\n"  # what a JSON reader would not even notice
    else:
        offset = int((2 * DAMAGES[kind] + 1) / 16 * len(content))
        content[offset] ^= 1 << DAMAGES[kind]
    path.write_bytes(bytes(content))


def test_every_damage_to_every_file_is_seen_and_the_step_before_is_used(tmp_path):
    complete = tmp_path / "whole"
    with CheckpointStore(complete) as store:
        for step in (1, 2):
            store.save(step, items(step), {"step": step, "fingerprints": {"data": "ab"}})
    files = sorted(path.relative_to(complete) for path in (complete / "2").rglob("*") if path.is_file())
    assert len(files) > 20
    seen = 0
    for file in files:
        for kind in DAMAGES:
            copy = tmp_path / "copy"
            shutil.copytree(complete, copy)
            damage(copy / file, kind)
            with pytest.raises(CheckpointError, match=file.name):
                manifest.verify(copy / "2")
            seen += 1
            if kind in ("deleted", "bit 3/8 flipped"):  # the whole way back, once slow and once subtle
                assert newest(copy) == (1, bits(items(1))), (file, kind)
                assert (copy / "2.bad").is_dir()
            shutil.rmtree(copy)
    assert newest(complete) == (2, bits(items(2)))
    print(f"{seen} of {len(files) * len(DAMAGES)} damages to {len(files)} files detected")


def test_a_file_too_many_is_damage_too(tmp_path):
    with CheckpointStore(tmp_path / "c") as store:
        store.save(1, items(1), {})
    (tmp_path / "c/1/params/d/extra").write_text("x")
    with pytest.raises(CheckpointError, match=r"params/d/extra: is not in integrity\.json"):
        manifest.verify(tmp_path / "c/1")


STRAYS = (
    ".DS_Store",
    "._params",
    "._integrity.json",
    "params/.nfs000000000004a1b700000001",
    "params/d/._d0",
    "optimizer/Thumbs.db",
    "optimizer/d/desktop.ini",
    "meta/.directory",
    "meta/.fuse_hidden0000000100000002",
    "@eaDir/params@SynoEAStream",
)
STRAYS_OF_TOOLS = (
    ".Trash-1000",
    "params/.Spotlight-V100",
    "meta/.checkpoint.json.swp",
    ".#integrity.json",
    "meta/notes~",
    ".ipynb_checkpoints/integrity-checkpoint.json",
    "__MACOSX/._params",
    "Icon\r",
    ".dropbox.attr",
    ".gitkeep",
)


def test_what_an_operating_system_leaves_in_a_step_is_no_damage_and_said_once(tmp_path, capfd):
    with CheckpointStore(tmp_path / "c") as store:
        store.save(1, items(1), {"step": 1})
        for name in STRAYS:
            (tmp_path / "c/1" / name).parent.mkdir(exist_ok=True)
            (tmp_path / "c/1" / name).write_bytes(b"\0\0\0\1Bud1")
        for name in (".DS_Store", "._1", "._2", "._3.bad"):
            (tmp_path / "c" / name).write_bytes(b"x")
        store.verify(1)
        store.verify(1, item="params")
    assert newest(tmp_path / "c") == (1, bits(items(1)))
    captured = capfd.readouterr()
    assert captured.out == ""
    assert captured.err == (
        f"note: {tmp_path / 'c/1'}: ignoring files of other programs: .DS_Store, ._integrity.json, ._params, "
        "@eaDir/params@SynoEAStream, meta/.directory and 5 more\n"
    )
    with CheckpointStore(tmp_path / "c") as store:
        assert store.steps() == [1]
        store.save(2, items(2), {"step": 2})
    assert newest(tmp_path / "c") == (2, bits(items(2)))


def test_what_tools_leave_in_a_step_is_no_damage(tmp_path):
    with CheckpointStore(tmp_path / "c") as store:
        store.save(1, items(1), {})
    for name in STRAYS_OF_TOOLS:
        (tmp_path / "c/1" / name).parent.mkdir(exist_ok=True)
        (tmp_path / "c/1" / name).write_bytes(b"x")
    manifest.verify(tmp_path / "c/1")


@pytest.mark.parametrize("name", [".DS_Stores", "DS_Store", ".nf", "_.d", "params/thumbs", "params/d/.integrity.json"])
def test_any_other_file_too_many_is_damage(tmp_path, name):
    with CheckpointStore(tmp_path / "c") as store:
        store.save(1, items(1), {})
    (tmp_path / "c/1" / name).write_bytes(b"x")
    with pytest.raises(CheckpointError, match=f"{name}: is not in integrity"):
        manifest.verify(tmp_path / "c/1")


SIGNED_AGAIN = {
    "no files": {"files": None},
    "a list of files": {"files": [1]},
    "a file without a size": {"files": {"a": 7}},
    "a size in words": {"files": {"a": ["1", ""]}},
    "no step": {"step": None},
    "an unknown key": {"more": 1},
    "an environment of another type": {"environment": [1]},
}


@pytest.mark.parametrize("change", SIGNED_AGAIN.values(), ids=SIGNED_AGAIN)
def test_a_manifest_signed_again_with_other_fields_is_damage(tmp_path, change):
    (tmp_path / "a").write_text("x")
    manifest.seal(tmp_path, {"step": 1})
    content = manifest.verify(tmp_path)
    (tmp_path / "integrity.json").write_bytes(manifest._serialize(content | change))
    with pytest.raises(CheckpointError, match=r"integrity\.json: is not a manifest"):
        manifest.verify(tmp_path)


def test_an_empty_folder_a_pipe_and_a_device_in_a_step_are_damage(tmp_path):
    (tmp_path / "a").write_text("x")
    manifest.seal(tmp_path, {"step": 1})
    (tmp_path / "b").mkdir()
    with pytest.raises(CheckpointError, match=r"b: is not in integrity\.json"):
        manifest.verify(tmp_path)
    (tmp_path / "b").rmdir()
    (tmp_path / "a").unlink()
    os.mkfifo(tmp_path / "a")
    with pytest.raises(CheckpointError, match="a: is not a file"):
        manifest.verify(tmp_path)
    (tmp_path / "integrity.json").unlink()
    (tmp_path / "integrity.json").symlink_to("/dev/zero")
    with pytest.raises(CheckpointError, match=r"integrity\.json: is not a file"):
        manifest.verify(tmp_path)


def test_a_file_or_a_number_beyond_64_bits_is_no_step(tmp_path):
    (tmp_path / "3").write_text("x")
    for name in ("2", "10", "9" * 18, "1" + "0" * 18, "1" + "0" * 99):
        (tmp_path / name).mkdir()
    assert steps_in(tmp_path) == [2, 10, 10**18 - 1]


def test_a_step_under_another_number_is_damage(tmp_path):
    with CheckpointStore(tmp_path) as store:
        store.save(1, items(1), {"step": 1})
        (tmp_path / "1").rename(tmp_path / "2")
        with pytest.raises(CheckpointError, match="2: was saved as step 1, but has been renamed"):
            store.verify(2)


def test_a_step_sealed_with_a_stray_file_is_whole_when_the_file_has_gone(tmp_path, monkeypatch):
    with CheckpointStore(tmp_path / "c") as store:
        store.save(1, items(1), {})
    with monkeypatch.context() as before:
        before.setattr(manifest, "STRAYS", ())
        (tmp_path / "c/1/.DS_Store").write_bytes(b"x")
        manifest.seal(tmp_path / "c/1", {"step": 1})
        assert ".DS_Store" in manifest.verify(tmp_path / "c/1")["files"]
    manifest.verify(tmp_path / "c/1")
    (tmp_path / "c/1/.DS_Store").unlink()
    manifest.verify(tmp_path / "c/1")


def test_reading_one_item_does_not_read_the_others_but_sees_what_is_missing(tmp_path):
    with CheckpointStore(tmp_path / "c") as store:
        store.save(1, items(1), {})
        optimizer, params = (max((tmp_path / f"c/1/{item}/d").iterdir()) for item in ("optimizer", "params"))
        damage(optimizer, "bit 3/8 flipped")
        store.verify(1, item="params")
        with pytest.raises(CheckpointError, match=optimizer.name):
            store.verify(1)
        damage(params, "bit 3/8 flipped")
        with pytest.raises(CheckpointError, match=params.name):
            store.verify(1, item="params")


def test_reading_one_item_checks_the_steps_own_files_and_its_meta(tmp_path):
    with CheckpointStore(tmp_path / "c") as store:
        store.save(1, items(1), {"step": 1})
        top_level = [path for path in (tmp_path / "c/1").iterdir() if path.is_file() and path.name != manifest.MANIFEST]
        assert top_level
        for path in (*top_level, tmp_path / "c/1/meta/metadata"):
            content = path.read_bytes()
            damage(path, "bit 3/8 flipped")
            with pytest.raises(CheckpointError, match=f"{path.name}: sha256 differs"):
                store.verify(1, item="params")
            path.write_bytes(content)
        store.verify(1, item="params")


def test_a_step_without_a_manifest_needs_to_be_allowed(tmp_path):
    with CheckpointStore(tmp_path / "c") as store:
        store.save(1, items(1), {"step": 1})
    (tmp_path / "c/1/integrity.json").unlink()
    with pytest.raises(CheckpointError, match="--allow-unverified"):
        newest(tmp_path / "c")
    assert newest(tmp_path / "c", allow_unverified=True) == (1, bits(items(1)))


def test_verify_checkpoint_tells_of_every_step(tmp_path):
    script = [sys.executable, str(ROOT / "scripts/verify_checkpoint.py"), str(tmp_path)]

    def verify():
        return subprocess.run(script, capture_output=True, text=True, check=False, env=ENVIRONMENT)

    assert (verify().returncode, verify().stdout) == (4, "")
    with CheckpointStore(tmp_path / "checkpoints") as store:
        for step in (1, 2):
            store.save(step, items(step), {"environment": {"jax": "1.2.3"}})
    verified = verify()
    assert verified.returncode == 0, verified.stderr
    assert [line.split(",")[0] for line in verified.stdout.splitlines()] == ["step 1: verified", "step 2: verified"]
    assert "saved with jax 1.2.3" in verified.stdout
    damage(tmp_path / "checkpoints/1/meta/metadata", "emptied")
    bad = verify()
    assert bad.returncode == 4
    assert "step 1: BAD: " in bad.stdout
    assert "checkpoints/1/meta/metadata: has 0 bytes" in bad.stdout
    assert "step 2: verified" in bad.stdout
    assert bad.stderr.endswith("1 of 2 checkpoints are bad\n")


def test_numbers_that_are_not_finite_are_neither_saved_nor_restored(tmp_path):
    bad = items(2)
    bad["optimizer"]["mu.w"] = bad["optimizer"]["mu.w"].at[3, 1].set(jnp.inf)
    with CheckpointStore(tmp_path / "c") as store:
        store.save(1, items(1), {"step": 1})
        with pytest.raises(DivergedError, match=r"step 2: optimizer\.mu\.w is not finite"):
            store.save(2, bad, {})
        assert store.steps() == [1]
        with pytest.MonkeyPatch.context() as patch:  # saved by a program that does not look
            patch.setattr("smollm_jax.runs.checkpoint.not_finite", lambda items: [])
            store.save(2, bad, {"step": 2})
    assert newest(tmp_path / "c")[0] == 1
    assert (tmp_path / "c/2.bad").is_dir()


def test_bad_steps_set_aside_do_not_overwrite_each_other(tmp_path):
    for round_ in range(3):
        with CheckpointStore(tmp_path / "c") as store:
            if not round_:
                store.save(1, items(1), {"step": 1})
            store.save(2, items(2), {"step": 2})
        damage(tmp_path / "c/2/_CHECKPOINT_METADATA", "emptied")
        assert newest(tmp_path / "c")[0] == 1
    assert sorted(path.name for path in (tmp_path / "c").iterdir()) == ["1", "2.bad", "2.bad2", "2.bad3"]


# The arrays' files here hold about 300 bytes, the manifest about 4,000.
@pytest.mark.parametrize("free_bytes", [100, 2_000], ids=["in the data", "in the manifest"])
@pytest.mark.parametrize("asynchronous", [False, True])
def test_a_full_disk_is_an_error_and_leaves_the_step_before(tmp_path, free_bytes, asynchronous):
    with CheckpointStore(tmp_path / "c", asynchronous=asynchronous, keep=1) as store:
        store.save(1, items(1), {"step": 1})
        store.wait()
        with full_disk(free_bytes), pytest.raises(StorageError, match="step 2 could not be saved"):
            save_and_wait(store, 2)
        assert not (tmp_path / "c" / STAGING).exists(), "the space is not given back"
        store.save(3, items(3), {"step": 3})
    assert newest(tmp_path / "c") == (3, bits(items(3)))


def test_what_a_failed_save_writes_late_is_removed_too(tmp_path, monkeypatch):
    """Orbax's threads did so when one of them hit a full disk: other threads wrote 20 ms after the error."""

    def fail(folder, **_):
        late.start()
        raise OSError("no space left on device")

    monkeypatch.setattr(checkpoint, "STRAGGLER_SECONDS", 2)  # for a machine whose threads get their turn late
    store = CheckpointStore(tmp_path / "c")
    late = threading.Timer(0.05, lambda: (tmp_path / "c" / STAGING / "1/params").mkdir(parents=True))
    store._orbax.save = fail
    with pytest.raises(StorageError, match="step 1 could not be saved: OSError: no space left"):
        store.save(1, items(1), {})
    late.join()
    assert list((tmp_path / "c").iterdir()) == []


def test_what_goes_wrong_in_the_background_is_raised_by_the_next_save_and_at_the_end(tmp_path):
    store = CheckpointStore(tmp_path / "c", asynchronous=True)
    with full_disk(100):
        store.save(1, items(1), {})
        with pytest.raises(StorageError, match="step 1"):
            store.save(2, items(2), {})
        store.save(3, items(3), {})
        with pytest.raises(StorageError, match="step 3"):
            store.__exit__(None, None, None)
    assert steps_in(tmp_path / "c") == []


def test_a_background_save_holds_the_numbers_of_its_moment(tmp_path):
    """The trainer donates its state to the next step, which overwrites the buffers during the save."""
    change = jax.jit(lambda tree: jax.tree.map(lambda x: x * 0 + 1, tree), donate_argnums=0)
    with CheckpointStore(tmp_path / "c", asynchronous=True) as store:
        save, changed = store._orbax.save, threading.Event()
        store._orbax.save = lambda *args, **options: changed.wait(60) and save(*args, **options)
        state = items(5)
        store.save(1, state, {"step": 1})
        jax.block_until_ready(change(state))
        changed.set()
    assert newest(tmp_path / "c") == (1, bits(items(5)))


class Killed(BaseException):
    """Stands for kill -9: nothing after it runs (tests/training/test_survival.py has the real one)."""


def kill(*_, **__):
    raise Killed


class Store(RuleBasedStateMachine):
    """Saves, failing saves, kills at every stage, damage and resumes in any order, against a plain list."""

    @initialize(asynchronous=st.booleans(), keep=st.sampled_from([1, 2, 3]))
    def begin(self, asynchronous, keep):
        self.folder = Path(os.environ["SMOLLM_STORE_FOLDER"]) / os.urandom(4).hex()
        self.options = {"asynchronous": asynchronous, "keep": keep}
        self.good: list[int] = []  # saved, verified and undamaged, oldest first
        self.step = 0
        self.store = CheckpointStore(self.folder, **self.options)

    @rule()
    def save(self):
        self.step += 1
        save_and_wait(self.store, self.step)
        self.good = [*self.good, self.step][-self.options["keep"] :]
        assert steps_in(self.folder) == self.good

    @rule(free_bytes=st.sampled_from([50, 100, 250, 1_000, 2_000]))
    def save_on_a_full_disk(self, free_bytes):
        self.step += 1
        with full_disk(free_bytes), pytest.raises(StorageError):
            save_and_wait(self.store, self.step)

    @rule(stage=st.sampled_from(["before Orbax", "before the manifest", "before the rename", "after it", "pruning"]))
    def kill_in_a_save(self, stage):
        self.step += 1
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(CheckpointStore, "_remove_staging", lambda *_: None)  # the dead clean nothing up
            if stage == "before Orbax":
                patch.setattr(self.store._orbax, "save", kill)
            elif stage == "before the manifest":
                patch.setattr(manifest, "seal", kill)
            elif stage == "after it":
                patch.setattr(checkpoint, "sync", lambda path: kill() if path == self.store.folder else None)
            else:
                rename, last = Path.rename, {"before the rename": str(self.step), "pruning": ".removed"}[stage]
                patch.setattr(Path, "rename", lambda a, b: kill() if str(b).endswith(last) else rename(a, b))
            with suppress(Killed):
                save_and_wait(self.store, self.step)
        if self.step in steps_in(self.folder):  # it had been moved to its place
            self.good.append(self.step)
        self.store = CheckpointStore(self.folder, **self.options)

    @precondition(lambda self: len(self.good) > 1)
    @rule(number=st.integers(0, 9999), kind=st.sampled_from(sorted(DAMAGES)))
    def damage_the_newest(self, number, kind):
        folder = self.folder / str(self.good.pop())
        files = sorted(path for path in folder.rglob("*") if path.is_file())
        damage(files[number % len(files)], kind)  # how many files Orbax writes differs from save to save
        self.resume()

    @precondition(lambda self: self.good)
    @rule()
    def resume(self):
        self.store.wait()
        step, content = newest(self.folder)
        assert step == self.good[-1]
        assert content == bits(items(step))
        self.step = max(self.step, step)
        self.store = CheckpointStore(self.folder, **self.options)

    @invariant()
    def the_newest_verified_state_is_there(self):
        if getattr(self, "good", None):
            manifest.verify(self.folder / str(self.good[-1]))

    @invariant()
    def nothing_is_half_done(self):
        if hasattr(self, "folder"):
            names = {path.name for path in self.folder.glob("*")}
            assert all(name.isdigit() or ".bad" in name for name in names), names


@pytest.mark.slow
@pytest.mark.parametrize("lives", [500 if SOAK else 25])
def test_the_newest_verified_state_is_never_lost(tmp_path, monkeypatch, lives):
    from hypothesis.stateful import run_state_machine_as_test

    monkeypatch.setenv("SMOLLM_STORE_FOLDER", str(tmp_path))
    run_state_machine_as_test(Store, settings=settings(max_examples=lives, stateful_step_count=20, deadline=None))
