"""A run's state: parameters, optimizer state and progress, and how a checkpoint restores them."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import optax

from smollm_jax.config import Config, Recipe
from smollm_jax.errors import CheckpointError, DivergedError, UsageError, short_repr
from smollm_jax.model.smollm import SmolLM
from smollm_jax.parallel import sharding
from smollm_jax.runs.checkpoint import CheckpointStore
from smollm_jax.runs.provenance import Provenance, environment, from_json
from smollm_jax.runs.pytree import flatten, unflatten
from smollm_jax.training import optimizer
from smollm_jax.training.execution import ExecutionConfig, Intervals

# A run ends when 10 of the last 1,000 updates (1 %) were not finite, for example ten in a row.
SKIP_LIMIT, SKIP_WINDOW = 10, 1000


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TrainState:
    """What a step reads and replaces: float32 parameters and AdamW's state, step count included."""

    model: Any  # what is trained: a `SmolLM`, or the pairs of a LoRA adapter
    opt_state: optax.OptState


def init_train_state(model: Any, tx: optax.GradientTransformation, mesh: jax.sharding.Mesh | None = None) -> TrainState:
    """The state before the first step: the model, and zero moments that are sharded as the parameters are."""
    if mesh is None:
        return TrainState(model, tx.init(model))
    return TrainState(
        model, jax.jit(tx.init, out_shardings=sharding.shardings(jax.eval_shape(tx.init, model), mesh))(model)
    )


def abstract_state(config: Config, recipe: Recipe) -> Any:
    """A run's state as `jax.ShapeDtypeStruct`s."""
    tx = optimizer.adamw(recipe)
    return jax.eval_shape(lambda: init_train_state(SmolLM(config, key=jax.random.key(0)), tx))


def init_model(config: Config, seed: int, mesh: jax.sharding.Mesh | None = None) -> SmolLM:
    """A model with random parameters. Each device draws its own shards in one compiled program; values do not depend on
    the mesh."""
    init = functools.partial(SmolLM, config)
    key = jax.random.key(seed)
    out_shardings = None if mesh is None else sharding.shardings(jax.eval_shape(lambda: init(key=key)), mesh)
    return jax.jit(init, out_shardings=out_shardings)(key=key)


@dataclasses.dataclass
class Progress:
    """How far a run is, and which updates it skipped because they were not finite."""

    step: int = 0
    tokens_seen: int = 0
    skipped: int = 0
    recently_skipped: list[int] = dataclasses.field(default_factory=list)  # steps within SKIP_WINDOW

    def skip(self, step: int) -> None:
        """Records a skipped update; raises `DivergedError` if there are too many."""
        self.skipped += 1
        self.recently_skipped = [s for s in self.recently_skipped if s > step - SKIP_WINDOW] + [step]
        if len(self.recently_skipped) >= SKIP_LIMIT:
            raise DivergedError(
                f"step {step}: {len(self.recently_skipped)} of the last {SKIP_WINDOW:,} updates were not finite and "
                "were skipped; the checkpoints on disk are intact: start again with a lower --learning-rate"
            )


@dataclasses.dataclass
class RestoredRun:
    """A run as a checkpoint restores it: all that it needs to continue."""

    provenance: Provenance
    progress: Progress
    intervals: Intervals
    environment: dict[str, Any]
    state: TrainState

    def with_config(self, config: Config) -> TrainState:
        """The state as a model of another config; raises `UsageError` if its parameters have other shapes."""
        template = abstract_state(config, self.provenance.recipe)
        try:
            model = unflatten(template.model, flatten(self.state.model))
            return TrainState(model, unflatten(template.opt_state, flatten(self.state.opt_state)))
        except CheckpointError as error:
            raise UsageError(f"the saved parameters do not fit the changed model: {error}") from error


def restore_run(
    store: CheckpointStore,
    step: int,
    mesh: jax.sharding.Mesh | None = None,
    abstract: Callable[[Config, Recipe], Any] = abstract_state,
) -> RestoredRun:
    """The run in a step's checkpoint, sharded over `mesh` whatever mesh saved it; None: on this process's first device.

    `abstract` returns the shapes of the state. Raises `CheckpointError` if the checkpoint lacks anything a run needs.
    """
    meta = store.meta(step)
    try:
        provenance = Provenance.from_meta(meta)
        progress = from_json(Progress, {field.name: meta[field.name] for field in dataclasses.fields(Progress)})
        intervals, environment = from_json(Intervals, meta["cadence"]), meta["environment"]
        if not isinstance(environment, dict):
            raise CheckpointError(f"its environment is {short_repr(environment)}, not an object")
    except (CheckpointError, KeyError) as error:
        raise CheckpointError(f"{store.folder}: step {step}: {error}") from error
    template = abstract(provenance.config, provenance.recipe)
    items = {"params": flatten(template.model), "optimizer": flatten(template.opt_state)}
    arrays = store.restore(step, sharding.abstract(items, mesh))
    state = TrainState(unflatten(template.model, arrays["params"]), unflatten(template.opt_state, arrays["optimizer"]))
    return RestoredRun(provenance, progress, intervals, environment, state)


def recorded_environment(execution: ExecutionConfig) -> dict[str, Any]:
    """What the last bit of a run's numbers depends on, apart from its provenance, under the names in checkpoints."""
    device = jax.devices()[0]
    return environment(device.device_kind, jax.device_count()) | {
        "dtype": execution.dtype,
        "implementation": execution.attention,
        "remat": execution.remat,
        "unroll": execution.unroll,
        "parts": execution.accumulation_steps,
        "mesh": None if execution.mesh is None else dict(execution.mesh.shape),
        "document_end": execution.separator_id,
        "operands": execution.operands,
    }
