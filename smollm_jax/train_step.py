"""One optimizer step: a batch's loss and gradients on every device, summed, and AdamW's update. Jitted and donated."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, get_args

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Bool, Float, Int

from smollm_jax import optimizer, sharding
from smollm_jax.attention import Implementation, causal, packed
from smollm_jax.config import Config
from smollm_jax.errors import UsageError
from smollm_jax.loss import linear_cross_entropy
from smollm_jax.model import Remat, SmolLM
from smollm_jax.recipe import Recipe


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TrainState:
    """What a step reads and replaces: float32 parameters and AdamW's moments (its step count among them)."""

    model: SmolLM
    opt_state: optax.OptState


@dataclasses.dataclass(frozen=True)
class Compute:
    """How the same numbers are computed; hashable, so that the jitted step takes it as a static argument."""

    dtype: str  # of activations
    implementation: Implementation = "xla"
    remat: Remat = "dots"
    unroll: int = 1
    parts: int = 1  # of a batch, or of what one device has of it, computed one after another
    mesh: jax.sharding.Mesh | None = None  # None: one device
    document_end: int | None = None  # the token that ends documents which shall not see each other
    operands: str = ""  # dtype of what matrix products multiply; default: `dtype`

    def __post_init__(self) -> None:
        object.__setattr__(self, "operands", self.operands or self.dtype)
        if self.unroll < 1:
            raise UsageError(f"unroll must be at least 1, got {self.unroll}")
        if self.remat not in get_args(Remat):
            raise UsageError(f"remat must be one of {', '.join(get_args(Remat))}, got {self.remat!r}")

    @property
    def devices(self) -> int:
        """How many a batch is divided among."""
        return self.mesh.size if self.mesh else 1


def layers_at_once(config: Config, implementation: Implementation) -> int:
    """`Compute.unroll` where nobody chose: all layers with cuDNN's attention, else one.

    A GPU's loop first fills what layers keep with zeros, then copies each result into it: a third of all that is moved
    outside matrix products. Without a loop a step takes three times as long to compile. With attention in blocks, too,
    XLA begins many layers' at once, and `remat` full needs twice the memory.
    """
    return config.num_hidden_layers if implementation == "cudnn" else 1


Step = Callable[[TrainState, Any], tuple[TrainState, dict[str, Any]]]


def begin(model: Any, tx: optax.GradientTransformation, mesh: jax.sharding.Mesh | None = None) -> TrainState:
    """The state before the first step: the model and moments of zero, which lie where the parameters do."""
    if mesh is None:
        return TrainState(model, tx.init(model))
    return TrainState(
        model, jax.jit(tx.init, out_shardings=sharding.shardings(jax.eval_shape(tx.init, model), mesh))(model)
    )


def targets_of(tokens: Int[Array, "B window"], compute: Compute) -> Int[Array, "B T"]:
    """The next token of every token, -1 where none is to be learnt: in rows of -1, and across documents' borders."""
    if compute.document_end is None:
        return tokens[:, 1:]
    return jnp.where(tokens[:, :-1] == compute.document_end, -1, tokens[:, 1:])


def within_documents(tokens: Int[Array, "B T"], document_end: int) -> tuple[Int[Array, "B T"], Int[Array, "B T"]]:
    """Each token's document, counted within its row, and its position in that document."""
    first = jnp.pad(tokens[:, :-1] == document_end, ((0, 0), (1, 0)))
    place = jnp.arange(tokens.shape[1])
    return jnp.cumsum(first, axis=1), place - jax.lax.cummax(jnp.where(first, place, 0), axis=1)


def total_loss(model: SmolLM, tokens: Int[Array, "B window"], compute: Compute) -> Float[Array, ""]:
    """The sum over windows of T + 1 tokens of the next token's -log probability, in nats; rows of -1 count nothing."""
    inputs, positions, attend = jnp.maximum(tokens[:, :-1], 0), None, causal(compute.implementation, compute.operands)
    if compute.document_end is not None:
        documents, positions = within_documents(inputs, compute.document_end)
        attend = packed(documents, compute.implementation, compute.operands)
    hidden, _ = model.hidden_states(
        inputs,
        dtype=compute.dtype,
        operands=compute.operands,
        positions=positions,
        attend=attend,
        remat=compute.remat,
        unroll=compute.unroll,
    )
    targets = targets_of(tokens, compute).reshape(-1)
    return linear_cross_entropy(hidden.reshape(targets.size, -1), model.head, targets, operands=compute.operands)


def mean_loss(
    model: SmolLM, tokens: Int[Array, "B window"], compute: Compute, count: Int[Array, ""] | None = None
) -> Float[Array, ""]:
    """`total_loss` over the number of its targets, or over `count` where these windows are a part of a batch."""
    return total_loss(model, tokens, compute) / ((targets_of(tokens, compute) >= 0).sum() if count is None else count)


def mean_gradients(
    model: SmolLM, tokens: Int[Array, "B window"], compute: Compute, count: Int[Array, ""] | None = None
) -> tuple[Float[Array, ""], SmolLM]:
    """The mean loss and its gradients; of equal parts of the rows, one after another, added up in float32."""
    count = (targets_of(tokens, compute) >= 0).sum() if count is None else count
    if compute.parts == 1:
        return jax.value_and_grad(mean_loss)(model, tokens, compute, count)
    parts = tokens.reshape(compute.parts, -1, tokens.shape[1])

    def add(total: Any, part: Int[Array, "b window"]) -> tuple[Any, None]:
        return jax.tree.map(jnp.add, total, jax.value_and_grad(mean_loss)(model, part, compute, count)), None

    shapes = jax.eval_shape(lambda: jax.value_and_grad(mean_loss)(model, parts[0], compute, count))
    return jax.lax.scan(add, jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes), parts)[0]


def over_devices(of_rows: Callable[..., Any], model: SmolLM, tokens: Int[Array, "B window"], compute: Compute) -> Any:
    """`mean_loss` or `mean_gradients` of the rows of all devices."""
    mesh = compute.mesh
    if mesh is None:
        return of_rows(model, tokens, compute)
    specs = sharding.specs(model, mesh)
    out_specs = sharding.ONCE if of_rows is mean_loss else (sharding.ONCE, specs)

    # Unchecked: each device computes for itself, and every sum over devices is written out here.
    @functools.partial(jax.shard_map, mesh=mesh, in_specs=(specs, sharding.ROWS), out_specs=out_specs, check_vma=False)
    def on_each(shards: Any, tokens: Any) -> Any:
        count = jax.lax.psum((targets_of(tokens, compute) >= 0).sum(), sharding.AXES)
        return sharding.summed(of_rows(sharding.gathered(shards, specs), tokens, compute, count), out_specs)

    return on_each(model, tokens)


@functools.partial(jax.jit, static_argnames=("tx", "compute"), donate_argnames="state")
def train_step(
    state: TrainState, tokens: Int[Array, "B window"], *, tx: optax.GradientTransformationExtraArgs, compute: Compute
) -> tuple[TrainState, dict[str, Float[Array, ""]]]:
    """The state after one optimizer step, and its loss and gradient norm (before clipping) as device scalars.

    When either is not finite the state comes back as it was, to the last bit, its step count too.
    """
    gradients: Any
    loss, gradients = over_devices(mean_gradients, state.model, tokens, compute)
    with jax.named_scope("optimizer"):  # names for `scripts/profile_train.py`
        norm = optax.tree.norm(gradients)

    @jax.named_scope("optimizer")
    def update(state: TrainState) -> TrainState:
        parameters: Any = state.model  # optax's types know arrays and dicts; a module is a pytree like them
        updates, opt_state = tx.update(gradients, state.opt_state, parameters, norm=norm)
        model: Any = optax.apply_updates(parameters, updates)
        return TrainState(model, opt_state)

    state = update_where(jnp.isfinite(loss) & jnp.isfinite(norm), update, state)
    if compute.mesh is not None:  # each part stays where it was, so that the donated memory is the result's
        state = jax.lax.with_sharding_constraint(state, sharding.shardings(state, compute.mesh))
    return state, {"loss": loss, "gradient_norm": norm}


def update_where(finite: Bool[Array, ""], update: Callable[[TrainState], TrainState], state: TrainState) -> TrainState:
    """`update(state)` where `finite` holds, else `state`, to the last bit.

    A branch costs a CPU nothing, where choosing number by number costs 11 % of a step. A GPU chooses as it writes the
    new state over the donated one; a branch there splits the step, and what it returns may be copied. Not
    `optax.apply_if_finite`: it applies the NaN after its limit.
    """
    if jax.default_backend() == "cpu":
        return jax.lax.cond(finite, update, lambda state: state, state)
    with jax.named_scope("optimizer"):
        return jax.tree.map(lambda new, old: jnp.where(finite, new, old), update(state), state)


def compile_step(config: Config, recipe: Recipe, compute: Compute) -> Step:
    """A run's `train_step`, compiled from shapes alone: before there are data, beside whatever else a start must do."""
    where = jax.sharding.NamedSharding(compute.mesh, sharding.ROWS) if compute.mesh is not None else None
    tokens = jax.ShapeDtypeStruct((recipe.batch_size, recipe.sequence_length + 1), jnp.int32, sharding=where)
    state = sharding.abstract(abstract_state(config, recipe), compute.mesh)
    return train_step.lower(state, tokens, tx=optimizer.adamw(recipe), compute=compute).compile()


@functools.partial(jax.jit, static_argnames="compute")
def eval_step(model: SmolLM, tokens: Int[Array, "B window"], compute: Compute) -> Float[Array, ""]:
    """The mean loss over windows, on all devices."""
    return over_devices(mean_loss, model, tokens, compute)


def put_padded(tokens: np.ndarray, mesh: jax.sharding.Mesh | None) -> Array:
    """Rows on their devices, with rows of -1, which count nothing, up to a number that the devices divide."""
    if mesh is not None:
        tokens = np.pad(tokens, ((0, -len(tokens) % mesh.size), (0, 0)), constant_values=-1)
    return sharding.put_rows(lambda rows: tokens[rows], tokens.shape, mesh)


def abstract_state(config: Config, recipe: Recipe) -> Any:
    """The shapes and dtypes of a run's state, in its structure."""
    tx = optimizer.adamw(recipe)
    return jax.eval_shape(lambda: begin(SmolLM(config, key=jax.random.key(0)), tx))


def fresh(config: Config, seed: int, mesh: jax.sharding.Mesh | None = None) -> SmolLM:
    """A model with the recipe's init, drawn in one compiled program, each device its part; the same on every mesh."""
    draw = functools.partial(SmolLM, config)
    key = jax.random.key(seed)
    where = None if mesh is None else sharding.shardings(jax.eval_shape(lambda: draw(key=key)), mesh)
    return jax.jit(draw, out_shardings=where)(key=key)
