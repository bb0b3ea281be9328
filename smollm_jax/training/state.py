"""The state of a training: parameters and optimizer state, progress, and how they are restored."""

import dataclasses
import functools
from typing import Any

import jax
import optax

from smollm_jax.config import Config, Recipe
from smollm_jax.errors import CheckpointError, DivergedError, UsageError
from smollm_jax.model.smollm import SmolLM
from smollm_jax.parallel import sharding
from smollm_jax.runs.checkpoint import CheckpointStore
from smollm_jax.runs.provenance import Provenance, environment
from smollm_jax.runs.pytree import flatten, unflatten
from smollm_jax.training import optimizer
from smollm_jax.training.execution import Cadence, Compute

# Updates that were not finite end a run when 1 % of the last 1,000 were: so ten in a row do, too.
SKIP_LIMIT, SKIP_WINDOW = 10, 1000


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TrainState:
    """What a step reads and replaces: float32 parameters and AdamW's moments (its step count among them)."""

    model: SmolLM
    opt_state: optax.OptState


def init_train_state(model: Any, tx: optax.GradientTransformation, mesh: jax.sharding.Mesh | None = None) -> TrainState:
    """The state before the first step: the model and moments of zero, which lie where the parameters do."""
    if mesh is None:
        return TrainState(model, tx.init(model))
    return TrainState(
        model, jax.jit(tx.init, out_shardings=sharding.shardings(jax.eval_shape(tx.init, model), mesh))(model)
    )


def abstract_state(config: Config, recipe: Recipe) -> Any:
    """The shapes and dtypes of a run's state, in its structure."""
    tx = optimizer.adamw(recipe)
    return jax.eval_shape(lambda: init_train_state(SmolLM(config, key=jax.random.key(0)), tx))


def init_model(config: Config, seed: int, mesh: jax.sharding.Mesh | None = None) -> SmolLM:
    """A model with the recipe's init, drawn in one compiled program, each device its part; the same on every mesh."""
    draw = functools.partial(SmolLM, config)
    key = jax.random.key(seed)
    where = None if mesh is None else sharding.shardings(jax.eval_shape(lambda: draw(key=key)), mesh)
    return jax.jit(draw, out_shardings=where)(key=key)


@dataclasses.dataclass
class Progress:
    """How far a run is, and which updates it left out because they were not finite."""

    step: int = 0
    tokens_seen: int = 0
    skipped: int = 0
    recently_skipped: list[int] = dataclasses.field(default_factory=list)  # steps, of the last SKIP_WINDOW

    def skip(self, step: int) -> None:
        """Notes a skipped update; raises `DivergedError` when they are too many."""
        self.skipped += 1
        self.recently_skipped = [s for s in self.recently_skipped if s > step - SKIP_WINDOW] + [step]
        if len(self.recently_skipped) >= SKIP_LIMIT:
            raise DivergedError(
                f"step {step}: {len(self.recently_skipped)} of the last {SKIP_WINDOW:,} updates were not finite and "
                "left out; the checkpoints on disk are intact"
            )


@dataclasses.dataclass
class Saved:
    """What a checkpoint holds: all a run needs to go on."""

    provenance: Provenance
    progress: Progress
    cadence: Cadence
    environment: dict[str, Any]
    state: TrainState

    def state_under(self, config: Config) -> TrainState:
        """The state as a model of another config holds it; `UsageError` when its parameters have other shapes."""
        like = abstract_state(config, self.provenance.recipe)
        try:
            model = unflatten(like.model, flatten(self.state.model))
            return TrainState(model, unflatten(like.opt_state, flatten(self.state.opt_state)))
        except CheckpointError as error:
            raise UsageError(f"the saved parameters do not fit the changed model: {error}") from error


def restore_run(store: CheckpointStore, step: int, mesh: jax.sharding.Mesh | None = None) -> Saved:
    """What a step holds, laid on a mesh or this process's first device, whatever layout saved it.

    Raises `CheckpointError` when that is not a whole run.
    """
    meta = store.meta(step)
    try:
        provenance = Provenance.from_meta(meta)
        progress = Progress(**{field.name: meta[field.name] for field in dataclasses.fields(Progress)})
        cadence, environment = Cadence(**meta["cadence"]), meta["environment"]
    except (CheckpointError, KeyError) as error:
        raise CheckpointError(f"{store.folder}: step {step}: {error}") from error
    like = abstract_state(provenance.config, provenance.recipe)
    items = {"params": flatten(like.model), "optimizer": flatten(like.opt_state)}
    arrays = store.restore(step, sharding.abstract(items, mesh))
    state = TrainState(unflatten(like.model, arrays["params"]), unflatten(like.opt_state, arrays["optimizer"]))
    return Saved(provenance, progress, cadence, environment, state)


def environment_of(compute: Compute) -> dict[str, Any]:
    """What the last bit of a run's numbers depends on, apart from its provenance."""
    device = jax.devices()[0]
    fields = {field.name: getattr(compute, field.name) for field in dataclasses.fields(compute)}
    mesh = None if compute.mesh is None else dict(compute.mesh.shape)
    return environment(device.device_kind, jax.device_count()) | fields | {"mesh": mesh}
