"""What `tests/parallel/test_sharding.py` looks at, computed in a process with eight virtual CPU devices; writes JSON.

python -m tests.eight_devices FILE
"""

import dataclasses
import itertools
import json
import sys
import tempfile
from pathlib import Path

import jax
import numpy as np

from smollm_jax.config import Recipe, preset
from smollm_jax.parallel import sharding
from smollm_jax.runs.checkpoint import CheckpointStore
from smollm_jax.runs.provenance import Provenance
from smollm_jax.runs.pytree import flatten
from smollm_jax.training import optimizer, train_step
from smollm_jax.training.execution import ExecutionConfig
from smollm_jax.training.state import TrainState, init_model, init_train_state, restore_run
from smollm_jax.training.validation import eval_step, shard_padded_batch

# Layouts, each with its gradient accumulation steps.
RUNS = ((None, 1), ("data=8", 2), ("fsdp=8", 1), ("data=4,fsdp=2", 2))
RESTORED = ((None, "data=4,fsdp=2"), ("data=2", "fsdp=8"), ("fsdp=4", "data=8"))  # each way
STEPS, END = 20, 0
CONFIG = dataclasses.replace(preset("tiny"), vocab_size=512, num_hidden_layers=2)
RECIPE = Recipe(STEPS, batch_size=16, sequence_length=32, learning_rate=1e-2, warmup_steps=2, dtype="float32")
TX = optimizer.adamw(RECIPE)


def batches() -> np.ndarray:
    """Tokens `[steps, B, T + 1]`; rows have different numbers of end-of-document tokens."""
    rng = np.random.default_rng(0)
    tokens = rng.integers(1, CONFIG.vocab_size, (STEPS, RECIPE.batch_size, RECIPE.sequence_length + 1))
    ends = rng.random(tokens.shape) < np.linspace(0, 0.3, RECIPE.batch_size)[:, None]
    return np.where(ends, END, tokens).astype(np.int32)


def new_state(mesh) -> TrainState:
    return init_train_state(init_model(CONFIG, 0, mesh), TX, mesh)


def largest_bytes(state) -> int:
    """Bytes of the state on the device that holds most of it."""
    held: dict = {}
    for shard in itertools.chain.from_iterable(x.addressable_shards for x in jax.tree.leaves(state)):
        held[shard.device] = held.get(shard.device, 0) + shard.data.nbytes
    return max(held.values())


def has_shardings(tree, mesh) -> bool:
    """Whether every array has the sharding that `sharding.shardings` gives it."""
    equivalent = jax.tree.map(lambda x, s: x.sharding.is_equivalent_to(s, x.ndim), tree, sharding.shardings(tree, mesh))
    return all(jax.tree.leaves(equivalent))


def run(layout: str | None, accumulation_steps: int, separator_id: int | None) -> dict:
    mesh = sharding.make_mesh(layout) if layout else None
    execution = ExecutionConfig("float32", accumulation_steps=accumulation_steps, mesh=mesh, separator_id=separator_id)
    state = new_state(mesh)
    before = largest_bytes(state)
    step = train_step.compile_step(CONFIG, RECIPE, execution)
    losses = []
    for tokens in batches():
        rows = sharding.shard_batch(lambda rows, tokens=tokens: tokens[rows], tokens.shape, mesh)
        state, metrics = step(state, rows)
        losses.append(float(metrics["loss"]))
    assert has_shardings(state, mesh), "a step changed a sharding"
    odd = batches()[0][:13]  # validation's last batch may have any number of rows
    evaluated, _ = eval_step(state.model, shard_padded_batch(odd, mesh), execution=execution)
    return {"losses": losses, "bytes": before, "program": step.as_text(), "evaluated": float(evaluated)}


def restored(pairs) -> dict:
    """Whether a checkpoint saved in one layout is restored bit for bit in another, for each pair of layouts."""
    equal = {}
    provenance = Provenance(RECIPE, CONFIG, "numbers", "aa", "bb")
    progress = {"skipped": 0, "recently_skipped": [], "cadence": {"save_every": 1, "eval_every": 1}, "environment": {}}
    meta = provenance.meta() | {"step": 1, "tokens_seen": 1} | progress
    for saved, layout in (*pairs, *(pair[::-1] for pair in pairs)):
        with tempfile.TemporaryDirectory() as folder, CheckpointStore(Path(folder)) as store:
            state = new_state(sharding.make_mesh(saved) if saved else None)
            store.save(1, {"params": flatten(state.model), "optimizer": flatten(state.opt_state)}, meta)
            mesh = sharding.make_mesh(layout) if layout else None
            loaded = restore_run(store, 1, mesh).state
            same = jax.tree.map(lambda a, b: np.array_equal(np.asarray(a), np.asarray(b)), state, loaded)
            equal[f"{saved} -> {layout}"] = has_shardings(loaded, mesh) and all(jax.tree.leaves(same))
    return equal


if __name__ == "__main__":
    results = {"runs": {str(layout): run(layout, parts, END) for layout, parts in RUNS}, "restored": restored(RESTORED)}
    jax.distributed.is_initialized = lambda: True  # from here on
    results["runs"]["between processes"] = run("data=4,fsdp=2", 1, END)
    Path(sys.argv[1]).write_text(json.dumps(results))
