"""LoRA: low-rank pairs are trained beside the frozen weights (Hu et al. 2021), with peft's initialization and scale."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float

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
    return Adapter(tensors, recipe.lora_rank, recipe.lora_alpha, recipe.rslora, base, recipe.base_sha256)


def with_pairs(model: SmolLM, pairs: Pairs, scale: float) -> SmolLM:
    """The model with pairs beside its projections; its outputs are differentiable in model and pairs."""
    model = jax.tree.map(lambda parameter: parameter, model)  # a copy of the modules, which are changed below
    scaled = {target: {"a": pair["a"], "b": pair["b"] * scale} for target, pair in pairs.items()}
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
    """An objective of the adapted model: the pairs are trained, `frozen` is the base model."""

    objective: Objective
    scale: float

    def count(self, batch: Any, execution: ExecutionConfig) -> Any:
        return self.objective.count(batch, execution)

    def total(
        self, model: Any, batch: Any, execution: ExecutionConfig, frozen: Any
    ) -> tuple[Float[Array, ""], dict[str, Array]]:
        return self.objective.total(with_pairs(frozen, model, self.scale), batch, execution, None)


def abstract_training_state(config: Config, recipe: Recipe) -> Any:
    """A run's state as `jax.ShapeDtypeStruct`s, whether it trains all parameters or the pairs of an adapter."""
    if not isinstance(recipe, FinetuneRecipe) or not recipe.lora_rank:
        return abstract_state(config, recipe)
    tx = optimizer.adamw(recipe)
    return jax.eval_shape(lambda: init_train_state(init_pairs(config, recipe), tx))
