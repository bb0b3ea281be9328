"""LoRA: low-rank pairs are trained beside the frozen weights (Hu et al. 2021), with peft's initialization and scale."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, UInt32

from smollm_jax.config import Config, Recipe
from smollm_jax.config.finetune_recipe import LORA_TARGETS, FinetuneRecipe
from smollm_jax.model.smollm import SmolLM
from smollm_jax.training import optimizer
from smollm_jax.training.execution import ExecutionConfig
from smollm_jax.training.loss import Objective
from smollm_jax.training.state import abstract_state, init_train_state
from smollm_jax.weights.adapter import Adapter, lora_scale, parse_targets, projection_shape

Pairs = dict[str, dict[str, Array]]  # by target: "a" [L, rank, in] and "b" [L, out, rank], float32
ATTENTION_TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj")


def scale_of(recipe: FinetuneRecipe) -> float:
    """The factor of B @ A in a run with this recipe."""
    return lora_scale(recipe.lora_rank, recipe.lora_alpha, recipe.rslora)


def init_pairs(config: Config, recipe: FinetuneRecipe) -> Pairs:
    """Initial pairs: A uniform in +-1/sqrt(in), B zero, so that the adapted model starts as its base.

    Source: peft, tuners/lora/layer.py, reset_lora_parameters (kaiming_uniform_ with a = sqrt(5)).
    """
    pairs: Pairs = {}
    keys = dict(zip(LORA_TARGETS, jax.random.split(jax.random.key(recipe.seed), len(LORA_TARGETS)), strict=True))
    for target in parse_targets(recipe.lora_targets):
        out_size, in_size = projection_shape(config, target)
        L, r, bound = config.num_hidden_layers, recipe.lora_rank, in_size**-0.5
        a = jax.random.uniform(keys[target], (L, r, in_size), jnp.float32, -bound, bound)
        pairs[target] = {"a": a, "b": jnp.zeros((L, out_size, r), jnp.float32)}
    return pairs


def pairs_of(adapter: Adapter) -> Pairs:
    """The pairs of an adapter, as copies on the default device."""
    return {target: {"a": jnp.array(a), "b": jnp.array(b)} for target, (a, b) in adapter.tensors.items()}


def adapter_of(pairs: Pairs, recipe: FinetuneRecipe, base: str) -> Adapter:
    """Trained pairs as an adapter of the weights at `base`."""
    tensors = {
        target: (np.asarray(pairs[target]["a"]), np.asarray(pairs[target]["b"]))
        for target in parse_targets(recipe.lora_targets)
    }
    scaling = recipe.lora_rank, recipe.lora_alpha, recipe.rslora
    return Adapter(tensors, *scaling, base, recipe.base_sha256, recipe.lora_dropout)


def dropout_keys(row_keys: UInt32[Array, "B 2"], target: str, layers: int) -> UInt32[Array, "L B 2"]:
    """The keys of the masks of one target in each layer, from a key for each row of a batch."""
    keys = jax.random.wrap_key_data(row_keys, impl="threefry2x32")
    fold_in_rows = jax.vmap(jax.random.fold_in, (0, None))
    numbers = jnp.arange(layers) * len(LORA_TARGETS) + LORA_TARGETS.index(target)
    return jax.random.key_data(jax.vmap(fold_in_rows, (None, 0))(keys, numbers))


def with_pairs(
    model: SmolLM, pairs: Pairs, scale: float, dropout: float = 0.0, row_keys: UInt32[Array, "B 2"] | None = None
) -> SmolLM:
    """The model with pairs beside its projections; its outputs are differentiable in model and pairs.

    With a key for each row of the batch that it will read, the inputs of A have `dropout`, without them none.
    """
    model = jax.tree.map(lambda parameter: parameter, model)  # a copy of the modules, which are changed below
    scaled = {target: {"a": pair["a"], "b": pair["b"] * scale} for target, pair in pairs.items()}
    if row_keys is not None:
        for target, pair in scaled.items():
            pair["dropout_keys"] = dropout_keys(row_keys, target, model.config.num_hidden_layers)
        model.layers.self_attn.dropout = model.layers.mlp.dropout = dropout
    attention = {target: pair for target, pair in scaled.items() if target in ATTENTION_TARGETS}
    mlp = {target: pair for target, pair in scaled.items() if target not in ATTENTION_TARGETS}
    model.layers.self_attn.low_rank = nnx.data(attention or None)
    model.layers.mlp.low_rank = nnx.data(mlp or None)
    return model


def merge(model: SmolLM, pairs: Pairs, scale: float) -> SmolLM:
    """The model with scale * B @ A added to its projections."""
    model = jax.tree.map(lambda parameter: parameter, model)  # a copy of the modules, which are changed below
    for target, pair in pairs.items():
        module: Any = model.layers.self_attn if target in ATTENTION_TARGETS else model.layers.mlp
        weight = getattr(module, target)[...]
        added = scale * jnp.einsum("Lor,Lri->Lio", pair["b"], pair["a"], precision="highest")
        setattr(module, target, nnx.Param(weight + added.reshape(weight.shape)))
    return model


@dataclasses.dataclass(frozen=True)
class Adapted:
    """An objective of the adapted model: the pairs are trained, `frozen` is the base model.

    A batch with "dropout_keys", a key for each of its rows, has `dropout`: a batch to train on, none to validate with.
    """

    objective: Objective
    scale: float
    dropout: float = 0.0

    def count(self, batch: Any, execution: ExecutionConfig) -> Any:
        return self.objective.count(batch, execution)

    def total(
        self, model: Any, batch: Any, execution: ExecutionConfig, frozen: Any
    ) -> tuple[Float[Array, ""], dict[str, Array]]:
        row_keys = batch["dropout_keys"].reshape(-1, 2) if "dropout_keys" in batch else None
        adapted = with_pairs(frozen, model, self.scale, self.dropout, row_keys)
        return self.objective.total(adapted, batch, execution, None)


def compile_options(config: Config, recipe: Recipe) -> dict[str, Any]:
    """What `train_step.compile_step` takes beside a batch for a run with an adapter; nothing for one without."""
    if not isinstance(recipe, FinetuneRecipe) or not recipe.lora_rank:
        return {}
    return {"state": abstract_training_state(config, recipe), "frozen": abstract_state(config, recipe).model}


def abstract_training_state(config: Config, recipe: Recipe) -> Any:
    """A run's state as `jax.ShapeDtypeStruct`s, whether it trains all parameters or the pairs of an adapter."""
    if not isinstance(recipe, FinetuneRecipe) or not recipe.lora_rank:
        return abstract_state(config, recipe)
    tx = optimizer.adamw(recipe)
    return jax.eval_shape(lambda: init_train_state(init_pairs(config, recipe), tx))
