"""The training loop in one process: exact resume, non-finite updates, and settings that may not change."""

import dataclasses
import fcntl
import itertools
import json
import os
import signal
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from smollm_jax.config import Config, Recipe
from smollm_jax.data.batches import Batches
from smollm_jax.errors import CheckpointError, DivergedError, LockedError, StoppedError, UsageError
from smollm_jax.model.smollm import SmolLM
from smollm_jax.runs.checkpoint import CheckpointStore
from smollm_jax.runs.metrics import RunLog, read_metrics
from smollm_jax.runs.provenance import Provenance
from smollm_jax.runs.pytree import flatten
from smollm_jax.runtime.lock import RunLock
from smollm_jax.runtime.signals import StopSignal
from smollm_jax.training import loop, optimizer, train_step
from smollm_jax.training import loss as training_loss
from smollm_jax.training.execution import ExecutionConfig, Intervals
from smollm_jax.training.loop import Trainer
from smollm_jax.training.loss import mean_gradients, mean_loss
from smollm_jax.training.state import Progress, init_model, init_train_state, restore_run
from smollm_jax.web.run_curves import RunCurves
from tests.small_files import of_tokens

POISON = 77
MORE = [(0, 1), (0, 2), (1, 1), (2, 1), (2, 2)]  # seeds and micro-batches


@pytest.fixture(scope="module")
def config(tiny) -> Config:
    return dataclasses.replace(tiny, vocab_size=128, num_hidden_layers=1)


def recipe(**changes) -> Recipe:
    base = {"steps": 12, "batch_size": 4, "sequence_length": 16, "learning_rate": 1e-2, "warmup_steps": 2}
    return Recipe(**(base | {"dtype": "float32", "validation_fraction": 0.1} | changes))


class Poisoned(Batches):
    """Batches of which some are marked: the loss below turns a mark into a NaN."""

    def __init__(self, file, recipe, poisoned_steps=(), stop_before=None, stop=None):
        super().__init__(file, recipe)
        self.poisoned, self.stop_before, self.stop = poisoned_steps, stop_before, stop

    def batch(self, step, rows=slice(None)):
        if step == self.stop_before:  # asked for while the step before runs
            self.stop.request(signal.SIGTERM)
        tokens = super().batch(step, rows)
        tokens[0, 0] = POISON if step + 1 in self.poisoned else 1
        return tokens


def run(folder, config, recipe, *, poisoned_steps=(), stop_before=None, resume=False, save_every=0, asynchronous=False):
    """Trains as the script does; returns state and progress."""
    # 12 windows and more than 10 % held out: batches of 4 begin a new epoch after three steps.
    ids = np.random.default_rng(5).integers(1, 70, 16 * 14 + 1)
    batches = Poisoned(of_tokens(ids), recipe, poisoned_steps, stop_before, stop := StopSignal())
    provenance = Provenance(recipe, config, "numbers", "aa", "bb")
    execution = ExecutionConfig(recipe.dtype, accumulation_steps=recipe.gradient_accumulation_steps)
    store = CheckpointStore(folder / "checkpoints", keep=2, asynchronous=asynchronous)
    log = RunLog(folder, log_every=100, flops_per_token=1.0, peak_flops=None)
    with store, log:
        if resume:
            saved = store.restore_newest_valid(lambda step: restore_run(store, step))
            state, progress = saved.state, saved.progress
        else:
            state = init_train_state(init_model(config, recipe.seed), optimizer.adamw(recipe))
            progress = Progress()
        state = Trainer(
            state, progress, provenance=provenance, batches=batches, store=store, execution=execution,
            intervals=Intervals(save_every, 5), stop=stop, log=log,
        ).run()  # fmt: skip
    return state, progress


def bits(state) -> dict[str, bytes]:
    items = {"params": flatten(state.model), "optimizer": flatten(state.opt_state)}
    return {f"{item}.{name}": np.asarray(x).tobytes() for item, part in items.items() for name, x in part.items()}


def losses(folder, name="loss") -> list[str]:
    return [float(row[name]).hex() for row in read_metrics(folder) if name in row]


@pytest.mark.parametrize(
    ("seed", "accumulate"), [(1, 2), *(pytest.param(*other, marks=pytest.mark.slow) for other in MORE)]
)
def test_stopped_and_resumed_is_bit_equal_also_across_an_epoch(tmp_path, config, seed, accumulate):
    plan = recipe(seed=seed, gradient_accumulation_steps=accumulate)
    straight, _ = run(tmp_path / "straight", config, plan)
    folder = tmp_path / "stopped"
    for number, stop_before in enumerate((2, 5, 9)):  # an epoch has 3 steps; steps 5, 10 and 12 are validated
        with pytest.raises(StoppedError, match=f"SIGTERM: step {stop_before} of 12 is saved and verified"):
            run(folder, config, plan, stop_before=stop_before, resume=number > 0, asynchronous=seed == 1)
    state, progress = run(folder, config, plan, resume=True)
    assert bits(state) == bits(straight)
    for name in ("loss", "validation_loss"):
        assert losses(folder, name) == losses(tmp_path / "straight", name)
    assert (progress.step, progress.tokens_seen) == (12, 12 * 4 * 16)


def test_a_batch_in_parts_gives_the_gradients_of_the_whole(config):
    model = SmolLM(config, key=jax.random.key(0))
    tokens = jax.random.randint(jax.random.key(1), (8, 17), 0, 128)
    gradients = jax.jit(mean_gradients, static_argnums=2)
    whole, accumulation_steps = (
        gradients(model, tokens, ExecutionConfig("float32", accumulation_steps=n)) for n in (1, 4)
    )
    assert float(accumulation_steps[0][0]) == pytest.approx(float(whole[0][0]), rel=1e-6)
    for name, gradient in flatten(whole[1]).items():
        error = jnp.abs(flatten(accumulation_steps[1])[name] - gradient).max() / jnp.abs(gradient).max()
        assert error < 1e-6 * 3, name  # sums of a float32 in another order


@pytest.mark.parametrize(
    ("accumulate", "dtype"),
    [
        (2, "float32"),
        pytest.param(1, "float32", marks=pytest.mark.slow),
        pytest.param(1, "bfloat16", marks=pytest.mark.slow),
        pytest.param(2, "bfloat16", marks=pytest.mark.slow),
    ],
)
def test_a_run_has_the_same_losses_and_dtypes_where_jax_enables_float64(tmp_path, config, dtype, accumulate):
    plan = recipe(dtype=dtype, gradient_accumulation_steps=accumulate, steps=6)
    usual, _ = run(tmp_path / "usual", config, plan)
    with jax.enable_x64(True):
        wide, _ = run(tmp_path / "wide", config, plan)
    assert [x.dtype for x in jax.tree.leaves(wide)] == [x.dtype for x in jax.tree.leaves(usual)]
    pairs = list(zip(read_metrics(tmp_path / "wide"), read_metrics(tmp_path / "usual"), strict=True))
    # In bfloat16 a last bit of the learning rate, which is computed wider, turns roundings of 8 bits over.
    rel = {"float32": 1e-6, "bfloat16": 1e-3}[dtype]
    for row, expected in pairs:
        for name in {"loss", "validation_loss", "learning_rate", "gradient_norm"} & expected.keys():
            assert row[name] == pytest.approx(expected[name], rel=rel), (name, row["step"])


@pytest.fixture
def poison(monkeypatch):
    """Makes the loss, or only the gradient, of marked batches non-finite."""
    true_loss = mean_loss

    def use(where: str):
        def mean_loss(model, tokens, *others):
            (loss, metrics), marked = true_loss(model, tokens, *others), tokens[0, 0] == POISON
            if where == "loss":
                return jnp.where(marked, jnp.nan, 1.0) * loss, metrics
            # A square root at 0 has value 0 and no derivative.
            return loss + jnp.sqrt(jnp.where(marked, 0.0, 1.0) * jnp.square(model.norm).sum()) * 0, metrics

        monkeypatch.setattr(training_loss, "mean_loss", mean_loss)
        train_step.train_step.clear_cache()

    yield use
    monkeypatch.undo()
    train_step.train_step.clear_cache()


@pytest.fixture
def guarded(monkeypatch):
    """Makes the next steps skip bad updates as on this platform; everything else is the CPU's."""
    choose = train_step.update_where

    def use(platform: str):
        def update_where(*arguments):
            with mock.patch.object(jax, "default_backend", return_value=platform):
                return choose(*arguments)

        monkeypatch.setattr(train_step, "update_where", update_where)
        train_step.train_step.clear_cache()

    yield use
    monkeypatch.undo()
    train_step.train_step.clear_cache()


@pytest.mark.parametrize("where", ["gradient", pytest.param("loss", marks=pytest.mark.slow)])
def test_an_update_that_is_not_finite_leaves_the_state_as_it_was(config, poison, guarded, where):
    poison(where)
    tx = optimizer.adamw(recipe())
    execution = ExecutionConfig("float32")
    states: dict[str, list[dict[str, bytes]]] = {"cpu": [], "gpu": []}
    for platform, after in states.items():
        guarded(platform)
        state = init_train_state(SmolLM(config, key=jax.random.key(0)), tx)
        for step, first in enumerate((1, POISON, 1)):
            tokens = jax.random.randint(jax.random.key(step), (4, 17), 1, 70).at[0, 0].set(first)
            before = bits(state)
            state, metrics = train_step.train_step(state, tokens, tx=tx, execution=execution)
            assert np.isfinite(metrics["gradient_norm"]) == (first == 1)
            assert (bits(state) == before) == (first == POISON)
            after.append(bits(state))
    assert states["cpu"] == states["gpu"]


def test_nan_at_steps_1_50_51_52_is_left_out_counted_and_logged(tmp_path, config, poison):
    poison("loss")
    bad, plan = (1, 50, 51, 52), recipe(steps=60, warmup_steps=0, decay_fraction=0.5)
    state, progress = run(tmp_path / "run", config, plan, poisoned_steps=bad)
    assert (progress.skipped, progress.recently_skipped) == (4, list(bad))
    rows = [row for row in read_metrics(tmp_path / "run") if "loss" in row]
    assert [row["step"] for row in rows if row["loss"] is None] == list(bad)
    batches = Batches(of_tokens(np.zeros(16 * 14 + 1)), plan)
    for row in rows:
        expected = batches.windows_of(row["step"] - 1) if row["step"] in bad else None
        assert row.get("skipped_windows") == expected
    rate = float(optimizer.learning_rate(plan)(60 - 1 - 4))
    assert rows[-1]["learning_rate"] == pytest.approx(rate), "the log tells another learning rate than was taken"
    counts = [int(x) for name, x in flatten(state.opt_state).items() if name.endswith("count")]
    assert counts == [56, 56], "a skipped update took a step of the schedule or of Adam's bias correction"


def test_the_counters_survive_a_resume_and_ten_bad_updates_end_a_run(tmp_path, config, poison):
    poison("loss")
    plan = recipe(steps=40, warmup_steps=0, decay_fraction=0.0)
    with pytest.raises(StoppedError):
        run(tmp_path, config, plan, poisoned_steps=range(3, 8), stop_before=20)
    with pytest.raises(DivergedError, match=r"step 34: 10 of the last 1,000 updates"):
        run(tmp_path, config, plan, poisoned_steps=range(30, 99), resume=True, save_every=2)
    with CheckpointStore(tmp_path / "checkpoints", create=False) as store:
        assert store.steps() == [30, 32]
        saved = restore_run(store, 32)
    assert (saved.progress.skipped, saved.progress.recently_skipped) == (8, [3, 4, 5, 6, 7, 30, 31, 32])


def test_bad_updates_a_thousand_steps_apart_do_not_end_a_run():
    progress = Progress()
    for step in itertools.chain(range(1, 10), range(1001, 1010), range(5000, 5009)):
        progress.skip(step)
    assert progress.skipped == 27
    with pytest.raises(DivergedError):
        progress.skip(5999)


def test_ruined_parameters_are_not_saved(tmp_path, config, monkeypatch):
    """A bug or faulty memory can ruin them although the loss of the step before was finite."""
    spoil = jax.jit(lambda model: jax.tree.map(lambda x: x * jnp.nan, model))
    true_step = train_step.train_step

    def ruining_step(state, tokens, **options):
        state, metrics = true_step(state, tokens, **options)
        return dataclasses.replace(state, model=spoil(state.model)), metrics

    monkeypatch.setattr(loop, "train_step", ruining_step)
    with pytest.raises(DivergedError, match=r"step 1: params\.embed_tokens is not finite: not saved"):
        run(tmp_path, config, recipe(), save_every=1)
    with CheckpointStore(tmp_path / "checkpoints", create=False) as store:
        assert store.steps() == []


CHANGED = {
    "batch_size": 8, "sequence_length": 8, "learning_rate": 1e-3, "warmup_steps": 1, "dtype": "bfloat16",
    "schedule": "cosine", "decay_fraction": 0.5, "beta1": 0.8, "beta2": 0.9, "eps": 1e-6, "weight_decay": 0.1,
    "clip": 2.0, "validation_fraction": 0.2, "seed": 1, "gradient_accumulation_steps": 2, "mask_documents": True,
    "vocab_size": 256, "hidden_size": 48, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 2,
    "num_key_value_heads": 1, "head_dim": 32, "max_position_embeddings": 64, "rope_theta": 1e4, "rms_norm_eps": 1e-6,
    "initializer_range": 0.02, "tie_word_embeddings": False, "bos_token_id": 1, "eos_token_id": 1, "pad_token_id": 1,
    "data": "cc", "tokenizer": "dd",
}  # fmt: skip


def changed(provenance: Provenance, name: str) -> Provenance:
    for part in ("recipe", "config"):
        if name in {field.name for field in dataclasses.fields(getattr(provenance, part))}:
            inner = dataclasses.replace(getattr(provenance, part), **{name: CHANGED[name]})
            return dataclasses.replace(provenance, **{part: inner})
    return dataclasses.replace(provenance, **{f"{name}_sha256": CHANGED[name]})


def test_every_field_of_a_run_is_in_the_list_below():
    fields = [field.name for part in (Recipe, Config) for field in dataclasses.fields(part)]
    assert {*fields, "data", "tokenizer"} - CHANGED.keys() == {"steps"}


@pytest.mark.parametrize("name", CHANGED)
def test_a_changed_field_is_refused_by_name_with_old_and_new_unless_allowed(config, name):
    saved = Provenance(recipe(), config, "text", "aa", "bb")
    now = changed(Provenance.from_meta(saved.meta()), name)
    with pytest.raises(UsageError, match=rf"these changed: {name}: .+ -> .+ \(--allow-change"):
        now.check_resumes(saved, [])
    with pytest.raises(UsageError, match=f"these changed: {name}"):
        now.check_resumes(saved, ["eps" if name == "clip" else "clip"])
    (warning,) = now.check_resumes(saved, [name])
    assert warning.startswith(f"{name}: ")
    longer = dataclasses.replace(saved, recipe=dataclasses.replace(saved.recipe, steps=99))
    assert longer.check_resumes(saved, []) == []
    with pytest.raises(UsageError, match="--allow-change colour: no such field; choose from"):
        now.check_resumes(saved, ["colour"])


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"cadence": {"save_every": 5}}, "'eval_every'"),
        ({"cadence": {"save_every": "5", "eval_every": 5}}, "its Intervals has save_every '5'"),
        ({"recently_skipped": ["x"]}, r"its Progress has recently_skipped \['x'\]"),
        ({"environment": 1}, "its environment is 1, not an object"),
        ({"step": True}, "its Progress has step True"),
        ({"recipe": None}, "its Recipe is None, not an object"),
    ],
)
def test_a_checkpoint_with_another_meta_is_not_resumed(tmp_path, monkeypatch, config, change, reason):
    meta = Provenance(recipe(), config, "text", "aa", "bb").meta() | dataclasses.asdict(Progress())
    meta |= {"cadence": {"save_every": 5, "eval_every": 5}, "environment": {}} | change
    monkeypatch.setattr(CheckpointStore, "meta", lambda *_: meta)
    with CheckpointStore(tmp_path) as store, pytest.raises(CheckpointError, match=f": step 1: .*{reason}"):
        restore_run(store, 1)


def test_half_a_line_of_metrics_does_not_spoil_the_rest(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "loss": 2.5}\n{"step": 2, "lo')
    with RunLog(tmp_path, log_every=1, flops_per_token=1.0, peak_flops=None) as log:
        log.start(1, 3, 10)
        log.step(2, loss=2.25, learning_rate=0.1, gradient_norm=1.0)
    assert [(row["step"], row["loss"]) for row in read_metrics(tmp_path)] == [(1, 2.5), (2, 2.25)]


def test_what_a_resume_went_back_over_counts_as_it_was_done_last(tmp_path):
    steps = [{"step": n, "loss": float(n)} for n in (1, 2, 3, 4)]
    seen = [{"step": 2, "validation_loss": 9.0}, {"step": 4, "validation_loss": 8.0}]
    repeated = [{"step": 3, "loss": 3.5}]
    rows = [*steps[:2], seen[0], *steps[2:], seen[1], *repeated]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert read_metrics(tmp_path) == [*steps[:2], seen[0], *repeated]
    late = [*steps, seen[0], *repeated]  # step 2 is validated after a resume at it
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in late))
    assert read_metrics(tmp_path) == [*steps[:2], seen[0], *repeated]
    curves = RunCurves(tmp_path / "metrics.jsonl")
    curves.read_new_rows()
    assert curves.curves["loss"] == [(1, 1.0), (2, 2.0), (3, 3.5)]


def test_a_lock_is_held_once_also_while_another_gives_up(tmp_path):
    """A run that fails early removes its folder; a process that opened the lock file before does not hold the lock."""
    first = RunLock(tmp_path / "run").__enter__()
    late = os.open(tmp_path / "run/lock", os.O_RDWR)
    first.__exit__()
    assert not (tmp_path / "run").exists()
    fcntl.flock(late, fcntl.LOCK_EX | fcntl.LOCK_NB)  # of a file that is gone
    with RunLock(tmp_path / "run"), pytest.raises(LockedError, match=f'"pid": {os.getpid()}'):
        RunLock(tmp_path / "run").__enter__()
    os.close(late)


def test_the_same_data_in_another_place_is_the_same_data(config):
    saved = Provenance(recipe(), config, "here", "aa", "bb")
    assert dataclasses.replace(saved, data="there").check_resumes(saved, []) == []
