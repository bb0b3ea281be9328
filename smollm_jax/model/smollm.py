"""SmolLM2: a Llama-style decoder in Flax NNX, read top to bottom.

One `DecoderLayer` holds the parameters of all layers, stacked along a leading axis L, and `jax.lax.scan` runs it.
Modules are pytrees: `jax.jit`, `jax.grad` and `jax.tree.map` work on them as on any tree of arrays.

B batch, T query tokens, D hidden, N query heads, K KV heads, H head dim, F MLP, V vocab, L layers.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float, Int, Key

from smollm_jax.config import Config
from smollm_jax.config.recipe import Remat
from smollm_jax.errors import UsageError
from smollm_jax.model.attention import Attend, causal
from smollm_jax.model.ops import project, rms_norm, rotary_angles, rotate, swiglu, swiglu_of_both


def normal(key: Key[Array, ""], shape: tuple[int, ...], std: float) -> nnx.Param:
    """A float32 parameter drawn from a normal distribution around 0."""
    return nnx.Param(std * jax.random.normal(key, shape, jnp.float32))


class Attention(nnx.Module):
    """Grouped-query self-attention with rotary positions (Ainslie et al. 2023)."""

    def __init__(self, config: Config, *, key: Key[Array, ""]):
        D, H = config.hidden_size, config.head_dim
        N, K = config.num_attention_heads, config.num_key_value_heads
        q, k, v, o = jax.random.split(key, 4)
        std = config.initializer_range
        self.q_proj = normal(q, (D, N, H), std)
        self.k_proj = normal(k, (D, K, H), std)
        self.v_proj = normal(v, (D, K, H), std)
        self.o_proj = normal(o, (N, H, D), residual_std(config))
        self.qkv_proj: Any = nnx.data(None)  # see `fused`
        self.operands: Any = None  # see `multiplying`

    def __call__(self, x: Float[Array, "B T D"], cos: Array, sin: Array, attend: Attend, memory: Any):
        N, H, D = self.o_proj.shape
        product = functools.partial(project, operands=self.operands)
        if self.qkv_proj is None:
            q, k, v = (product(x, w[...], kept=False) for w in (self.q_proj, self.k_proj, self.v_proj))
        else:
            qkv = product(x, self.qkv_proj[...], kept=False)
            q, k, v = jnp.split(qkv, (N, (N + qkv.shape[-2]) // 2), axis=-2)
        with jax.named_scope("attention"):  # a name for `scripts/profile_train.py`
            # Kept once they are turned: their gradients ask for nothing of what they were before.
            q, k, v = (checkpoint_name(y, "kept") for y in (rotate(q, cos, sin), rotate(k, cos, sin), v))
            out, memory = attend(q, k, v, memory)
        return product(out.reshape(*x.shape[:-1], N * H), self.o_proj.reshape(N * H, D)), memory


class MLP(nnx.Module):
    """SwiGLU (Shazeer 2020): down(silu(gate(x)) * up(x))."""

    def __init__(self, config: Config, *, key: Key[Array, ""]):
        D, F = config.hidden_size, config.intermediate_size
        gate, up, down = jax.random.split(key, 3)
        self.gate_proj = normal(gate, (D, F), config.initializer_range)
        self.up_proj = normal(up, (D, F), config.initializer_range)
        self.down_proj = normal(down, (F, D), residual_std(config))
        self.gate_up_proj: Any = nnx.data(None)  # see `fused`
        self.operands: Any = None  # see `multiplying`

    def __call__(self, x: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
        product = functools.partial(project, operands=self.operands)
        if self.gate_up_proj is None:
            hidden = swiglu(product(x, self.gate_proj[...]), product(x, self.up_proj[...]))
        else:
            hidden = swiglu_of_both(product(x, self.gate_up_proj[...]))
        return product(checkpoint_name(hidden, "swiglu"), self.down_proj[...])


class DecoderLayer(nnx.Module):
    """Pre-norm attention and MLP, each added to the residual stream."""

    def __init__(self, config: Config, *, key: Key[Array, ""]):
        attention, mlp = jax.random.split(key)
        self.input_layernorm = nnx.Param(jnp.ones(config.hidden_size, jnp.float32))
        self.self_attn = Attention(config, key=attention)
        self.post_attention_layernorm = nnx.Param(jnp.ones(config.hidden_size, jnp.float32))
        self.mlp = MLP(config, key=mlp)
        self.eps = config.rms_norm_eps

    def __call__(self, x: Float[Array, "B T D"], cos: Array, sin: Array, attend: Attend, memory: Any):
        h, memory = self.self_attn(rms_norm(x, self.input_layernorm[...], self.eps), cos, sin, attend, memory)
        x = x + h
        return x + self.mlp(rms_norm(x, self.post_attention_layernorm[...], self.eps)), memory


def fused(layers: DecoderLayer) -> DecoderLayer:
    """Layers that compute q, k and v in one product, and gate and up in one: from weights laid side by side.

    Only for computing with: parameters, optimizer and files keep Hugging Face's names.
    """
    layers = jax.tree.map(lambda parameter: parameter, layers)  # a copy; the modules in it are ours to change
    attention: Any = layers.self_attn
    mlp: Any = layers.mlp
    qkv = attention.q_proj[...], attention.k_proj[...], attention.v_proj[...]
    attention.qkv_proj = nnx.Param(jnp.concatenate(qkv, axis=-2))
    mlp.gate_up_proj = nnx.Param(jnp.concatenate([mlp.gate_proj[...], mlp.up_proj[...]], axis=-1))
    attention.q_proj = attention.k_proj = attention.v_proj = mlp.gate_proj = mlp.up_proj = None
    return layers


def multiplying(layers: DecoderLayer, operands: jax.typing.DTypeLike) -> DecoderLayer:
    """Layers whose products multiply numbers rounded to `operands`, each where it is used, and give what they gave.

    Not one cast for all layers: to write one layer of a bfloat16 stack, XLA:CPU turns all of it into float32 and back.
    """
    layers = jax.tree.map(lambda parameter: parameter, layers)  # a copy; the modules in it are ours to change
    layers.self_attn.operands = layers.mlp.operands = jnp.dtype(operands)
    return layers


class SmolLM(nnx.Module):
    """The whole model. `model(tokens)` gives next-token logits.

    Fresh parameters follow the pre-training recipe: normal with std `initializer_range`, the projections into the
    residual stream divided by sqrt(2 L), norms 1 (HF's `from_config` uses one std everywhere).
    Source: huggingface/smollm, config_smollm2_135M.yaml; huggingface/nanotron, scaling/parametrization.py.
    """

    def __init__(self, config: Config, *, key: Key[Array, ""]):
        embed, layers, head = jax.random.split(key, 3)
        vocabulary = (config.vocab_size, config.hidden_size)
        self.config = config
        self.embed_tokens = normal(embed, vocabulary, config.initializer_range)
        # One DecoderLayer whose every parameter has a leading layer axis L.
        self.layers = jax.vmap(lambda k: DecoderLayer(config, key=k))(
            jax.random.split(layers, config.num_hidden_layers)
        )
        self.norm = nnx.Param(jnp.ones(config.hidden_size, jnp.float32))
        # A tied head is the embedding itself, stored once; None keeps the attribute readable.
        self.lm_head = None if config.tie_word_embeddings else normal(head, vocabulary, config.initializer_range)

    @property
    def head(self) -> Float[Array, "V D"]:
        """The matrix that turns hidden states into logits, at its stored precision."""
        return (self.embed_tokens if self.lm_head is None else self.lm_head)[...]

    def hidden_states(
        self,
        tokens: Int[Array, "B T"],
        *,
        dtype: jax.typing.DTypeLike | None = None,
        operands: jax.typing.DTypeLike | None = None,
        positions: Int[Array, "#B T"] | None = None,
        attend: Attend | None = None,
        memory: Any = None,
        remat: Remat = "dots",
        unroll: int = 1,
    ) -> tuple[Float[Array, "B T D"], Any]:
        """The last norm's output in `dtype` (default: the parameters'), and what `attend` left in `memory`.

        Matrix products multiply numbers rounded to `operands` (default: `dtype`) and give `dtype`. `remat` says what
        each layer keeps for the backward pass; `unroll` layers are unrolled per step of the scan. A token id outside
        the vocabulary gives NaN (indexing alone would clamp it).
        """
        dtype = jnp.dtype(self.embed_tokens.dtype if dtype is None else dtype)
        operands = dtype if operands is None else jnp.dtype(operands)
        attend = causal(operands=operands) if attend is None else attend
        positions = jnp.arange(tokens.shape[1])[None] if positions is None else positions
        cos, sin = rotary_angles(positions, self.config, dtype)
        # Gathered before the cast, so that the gradients of a token's many occurrences are summed in float32.
        rows = self.embed_tokens[...].at[tokens].get(mode="fill", fill_value=jnp.nan, wrap_negative_indices=False)
        layers, norm = jax.tree.map(lambda parameter: parameter.astype(dtype), (self.layers, self.norm[...]))
        if dtype != self.embed_tokens.dtype:  # the cast copies every weight, so that laying some together costs nothing
            layers = fused(layers)
        if operands != dtype:
            layers = multiplying(layers, operands)

        def step(carry, layer: DecoderLayer):
            x, memory = carry
            return layer(x, cos, sin, attend, memory), None

        if remat != "none":
            # Where one loop runs forward and another backward, nothing can be found equal and kept after all.
            loops = unroll < self.config.num_hidden_layers
            step = jax.checkpoint(step, prevent_cse=not loops, policy=KEEP[remat])
        (x, memory), _ = jax.lax.scan(step, (rows.astype(dtype), memory), layers, unroll=unroll)
        return rms_norm(x, norm, self.config.rms_norm_eps), memory

    def logits(
        self, hidden: Float[Array, "B T D"], operands: jax.typing.DTypeLike | None = None
    ) -> Float[Array, "B T V"]:
        """Logits of hidden states, in at least float32: no scale, no bias. `operands` as in `hidden_states`."""
        operands = jnp.dtype(hidden.dtype if operands is None else operands)
        if operands == jnp.bfloat16:
            pair = hidden.astype(operands), self.head.astype(operands)
            return jnp.einsum("BTD,VD->BTV", *pair, preferred_element_type=jnp.float32)
        return project(hidden, self.head.astype(hidden.dtype).T)

    def __call__(self, tokens: Any, **options: Any) -> Float[Array, "B T V"]:
        """Next-token logits, float32 (float64 when computed in float64); options as in `hidden_states`.

        `tokens` are integers [B, T]: a JAX array, or lists or a NumPy array, whose ids are checked (`UsageError`).
        """
        hidden, _ = self.hidden_states(_token_ids(tokens, self.config.vocab_size), **options)
        return self.logits(hidden, options.get("operands"))


def _token_ids(tokens: Any, vocab_size: int) -> Int[Array, "B T"]:
    """Token ids as the model takes them; those of a JAX array are not looked at, which would wait for the device."""
    try:
        ids = tokens if isinstance(tokens, jax.Array) else np.asarray(tokens)
    except ValueError as error:
        raise UsageError("tokens must be rows of equal length") from error
    if ids.ndim != 2 or not jnp.issubdtype(ids.dtype, jnp.integer):
        raise UsageError(f"tokens must be integers [batch, length], got {ids.dtype} {list(ids.shape)}")
    if isinstance(ids, jax.Array):
        return ids
    # Before the cast to int32, which would make a valid id of 2**32 + 5.
    if ids.size == 0:
        raise UsageError(f"tokens must hold at least one, got {list(ids.shape)}")
    if (wrong := ids[(ids < 0) | (ids >= vocab_size)]).size:
        raise UsageError(f"token ids {wrong[:5].tolist()} are outside the vocabulary of {vocab_size}")
    return jnp.asarray(ids, jnp.int32)


def _keep_dots(primitive: Any, *_: Any, **options: Any) -> bool:
    """Whether `Remat` "dots" keeps what a primitive gives."""
    named = primitive.name == "name" and options["name"] in ("kept", "attention")
    return named or primitive.name.startswith("dot_product_attention_fwd")  # cuDNN's, which names nothing


def _keep_dots_and_swiglu(primitive: Any, *_: Any, **options: Any) -> bool:
    """Whether `Remat` "swiglu" keeps what a primitive gives."""
    return _keep_dots(primitive, **options) or (primitive.name == "name" and options["name"] == "swiglu")


KEEP = {"swiglu": _keep_dots_and_swiglu, "dots": _keep_dots, "full": None}  # as `jax.checkpoint` takes it


def residual_std(config: Config) -> float:
    """Init std of the projections that add to the residual stream: their 2 L sums then keep its variance."""
    return config.initializer_range / (2 * config.num_hidden_layers) ** 0.5
