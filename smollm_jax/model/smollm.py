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
from jaxtyping import Array, Float, Int, Key, UInt32

from smollm_jax.config import Config
from smollm_jax.config.recipe import Remat
from smollm_jax.errors import UsageError
from smollm_jax.model.attention import Attend, causal
from smollm_jax.model.ops import apply_rope, fused_swiglu, linear, rms_norm, rope_cos_sin, swiglu


def normal(key: Key[Array, ""], shape: tuple[int, ...], std: float) -> nnx.Param:
    """A float32 parameter drawn from a normal distribution around 0."""
    return nnx.Param(std * jax.random.normal(key, shape, jnp.float32))


def dropped(x: Float[Array, "B T I"], keys: UInt32[Array, "B 2"], rate: float) -> Float[Array, "B T I"]:
    """x with each element zero with probability `rate`, and else divided by 1 - rate (Srivastava et al. 2014).

    Each row's mask is a function of its key, threefry's data, so that it is the same in whatever batch, on whatever
    device, and when it is computed again for the backward pass.
    """
    draw = jax.vmap(lambda key: jax.random.bernoulli(key, 1 - rate, x.shape[1:]))
    return jnp.where(draw(jax.random.wrap_key_data(keys, impl="threefry2x32")), x / (1 - rate), 0)


def add_low_rank(
    pairs: dict[str, dict[str, Array]],
    x: Float[Array, "B T I"],
    name: str,
    out: Float[Array, "B T ..."],
    *,
    operands: jax.typing.DTypeLike | None,
    dropout: float,
) -> Float[Array, "B T ..."]:
    """out + (x @ A.T) @ B.T with the pair of the projection `name`, `out` itself if it has none.

    Hu et al. 2021 (LoRA), section 4.1. A pair is {"a": A `[r, I]`, "b": B `[O, r]`}, with B already scaled; where it
    has "dropout_keys" `[B, 2]`, A reads x with dropout, as in peft.
    """
    if name not in pairs:
        return out
    a, b = pairs[name]["a"], pairs[name]["b"]
    if "dropout_keys" in pairs[name]:
        x = dropped(x, pairs[name]["dropout_keys"], dropout)
    inner = linear(x, a.T, save=False, operands=operands)
    return out + linear(inner, b.T, save=False, operands=operands).reshape(out.shape)


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
        self.qkv_proj: Any = nnx.data(None)  # set by `fuse_projections`
        self.low_rank: Any = nnx.data(None)  # LoRA's pairs by projection, set by `finetuning.lora.with_pairs`
        self.dropout = 0.0  # of what reads A of a pair that has keys
        self.operands: Any = None  # see `with_operand_dtype`

    def __call__(self, x: Float[Array, "B T D"], cos: Array, sin: Array, attend: Attend, cache: Any):
        N, H, D = self.o_proj.shape
        matmul = functools.partial(linear, operands=self.operands)
        if self.qkv_proj is None:
            q, k, v = (matmul(x, w[...], save=False) for w in (self.q_proj, self.k_proj, self.v_proj))
        else:
            qkv = matmul(x, self.qkv_proj[...], save=False)
            q, k, v = jnp.split(qkv, (N, (N + qkv.shape[-2]) // 2), axis=-2)
        pairs = self.low_rank or {}
        added = functools.partial(add_low_rank, pairs, operands=self.operands, dropout=self.dropout)
        q, k, v = added(x, "q_proj", q), added(x, "k_proj", k), added(x, "v_proj", v)
        with jax.named_scope("attention"):  # a name for `scripts/profile_train.py`
            # Saved after the rotation: its gradient needs cos and sin, not the unrotated q and k.
            q, k, v = (checkpoint_name(y, "dots") for y in (apply_rope(q, cos, sin), apply_rope(k, cos, sin), v))
            out, cache = attend(q, k, v, cache)
        heads = out.reshape(*x.shape[:-1], N * H)
        return added(heads, "o_proj", matmul(heads, self.o_proj.reshape(N * H, D))), cache


class MLP(nnx.Module):
    """SwiGLU (Shazeer 2020): down(silu(gate(x)) * up(x))."""

    def __init__(self, config: Config, *, key: Key[Array, ""]):
        D, F = config.hidden_size, config.intermediate_size
        gate, up, down = jax.random.split(key, 3)
        self.gate_proj = normal(gate, (D, F), config.initializer_range)
        self.up_proj = normal(up, (D, F), config.initializer_range)
        self.down_proj = normal(down, (F, D), residual_std(config))
        self.gate_up_proj: Any = nnx.data(None)  # set by `fuse_projections`
        self.low_rank: Any = nnx.data(None)  # as in `Attention`
        self.dropout = 0.0
        self.operands: Any = None  # see `with_operand_dtype`

    def __call__(self, x: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
        matmul = functools.partial(linear, operands=self.operands)
        if self.low_rank is not None:
            return self._with_low_rank(x, matmul)
        if self.gate_up_proj is None:
            hidden = swiglu(matmul(x, self.gate_proj[...]), matmul(x, self.up_proj[...]))
        else:
            hidden = fused_swiglu(matmul(x, self.gate_up_proj[...]))
        return matmul(checkpoint_name(hidden, "swiglu"), self.down_proj[...])

    def _with_low_rank(self, x: Float[Array, "B T D"], matmul: Any) -> Float[Array, "B T D"]:
        if self.gate_up_proj is None:
            gate, up = matmul(x, self.gate_proj[...]), matmul(x, self.up_proj[...])
        else:
            gate, up = jnp.split(matmul(x, self.gate_up_proj[...]), 2, axis=-1)
        added = functools.partial(add_low_rank, self.low_rank, operands=self.operands, dropout=self.dropout)
        hidden = checkpoint_name(swiglu(added(x, "gate_proj", gate), added(x, "up_proj", up)), "swiglu")
        return added(hidden, "down_proj", matmul(hidden, self.down_proj[...]))


class DecoderLayer(nnx.Module):
    """Pre-norm attention and MLP, each added to the residual stream."""

    def __init__(self, config: Config, *, key: Key[Array, ""]):
        attention, mlp = jax.random.split(key)
        self.input_layernorm = nnx.Param(jnp.ones(config.hidden_size, jnp.float32))
        self.self_attn = Attention(config, key=attention)
        self.post_attention_layernorm = nnx.Param(jnp.ones(config.hidden_size, jnp.float32))
        self.mlp = MLP(config, key=mlp)
        self.eps = config.rms_norm_eps

    def __call__(self, x: Float[Array, "B T D"], cos: Array, sin: Array, attend: Attend, cache: Any):
        h, cache = self.self_attn(rms_norm(x, self.input_layernorm[...], self.eps), cos, sin, attend, cache)
        x = x + h
        return x + self.mlp(rms_norm(x, self.post_attention_layernorm[...], self.eps)), cache


def fuse_projections(layers: DecoderLayer) -> DecoderLayer:
    """Layers with concatenated weights: one matmul for q, k and v, and one for gate and up.

    Only for computation: parameters, optimizer state and files keep Hugging Face's names.
    """
    layers = jax.tree.map(lambda parameter: parameter, layers)  # a copy of the modules, which are changed below
    attention: Any = layers.self_attn
    mlp: Any = layers.mlp
    qkv = attention.q_proj[...], attention.k_proj[...], attention.v_proj[...]
    attention.qkv_proj = nnx.Param(jnp.concatenate(qkv, axis=-2))
    mlp.gate_up_proj = nnx.Param(jnp.concatenate([mlp.gate_proj[...], mlp.up_proj[...]], axis=-1))
    attention.q_proj = attention.k_proj = attention.v_proj = mlp.gate_proj = mlp.up_proj = None
    return layers


def with_operand_dtype(layers: DecoderLayer, operands: jax.typing.DTypeLike) -> DecoderLayer:
    """Layers whose matmuls round their inputs to `operands`; the results keep their dtype.

    Each weight is cast where it is used, not all layers at once: to write the gradient of one layer into a bfloat16
    stack, XLA:CPU converts the whole stack to float32 and back.
    """
    layers = jax.tree.map(lambda parameter: parameter, layers)  # a copy of the modules, which are changed below
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
        # A tied head is the embedding itself, stored once.
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
        cache: Any = None,
        remat: Remat = "dots",
        unroll: int = 1,
    ) -> tuple[Float[Array, "B T D"], Any]:
        """The last norm's output in `dtype` (default: the parameters' dtype), and the cache that `attend` updated.

        Matmuls round their inputs to `operands` (default: `dtype`) and return `dtype`. `remat` selects what each layer
        saves for the backward pass; `unroll` layers are unrolled per step of the scan. A token id outside the
        vocabulary gives NaN (indexing alone would clamp it).
        """
        dtype = jnp.dtype(self.embed_tokens.dtype if dtype is None else dtype)
        operands = dtype if operands is None else jnp.dtype(operands)
        attend = causal(operands=operands) if attend is None else attend
        positions = jnp.arange(tokens.shape[1])[None] if positions is None else positions
        cos, sin = rope_cos_sin(positions, self.config, dtype)
        # Gathered before the cast, so that the gradients of repeated tokens are summed in float32.
        embeddings = self.embed_tokens[...].at[tokens].get(mode="fill", fill_value=jnp.nan, wrap_negative_indices=False)
        cast = lambda array: array.astype(dtype) if jnp.issubdtype(array.dtype, jnp.floating) else array  # noqa: E731
        layers, norm = jax.tree.map(cast, (self.layers, self.norm[...]))  # all but the keys of dropout
        if dtype != self.embed_tokens.dtype:  # the cast copies every weight anyway, so concatenating is free
            layers = fuse_projections(layers)
        if operands != dtype:
            layers = with_operand_dtype(layers, operands)

        def step(carry, layer: DecoderLayer):
            x, cache = carry
            return layer(x, cos, sin, attend, cache), None

        if remat != "none":
            # Between a forward and a backward loop, CSE cannot undo the remat; in fully unrolled code it can.
            fully_unrolled = unroll >= self.config.num_hidden_layers
            step = jax.checkpoint(step, prevent_cse=fully_unrolled, policy=REMAT_POLICIES[remat])
        (x, cache), _ = jax.lax.scan(step, (embeddings.astype(dtype), cache), layers, unroll=unroll)
        return rms_norm(x, norm, self.config.rms_norm_eps), cache

    def logits(
        self, hidden: Float[Array, "B T D"], operands: jax.typing.DTypeLike | None = None
    ) -> Float[Array, "B T V"]:
        """Logits of hidden states, in at least float32: no scale, no bias. `operands` as in `hidden_states`."""
        operands = jnp.dtype(hidden.dtype if operands is None else operands)
        if operands == jnp.bfloat16:
            hidden, head = hidden.astype(operands), self.head.astype(operands)
            return jnp.einsum("BTD,VD->BTV", hidden, head, preferred_element_type=jnp.float32)
        return linear(hidden, self.head.astype(hidden.dtype).T)

    def __call__(self, tokens: Any, **options: Any) -> Float[Array, "B T V"]:
        """Next-token logits, float32 (float64 when computed in float64); options as in `hidden_states`.

        `tokens` are integers [B, T]. Ids in lists and NumPy arrays are checked (`UsageError`), those in a JAX array
        are not.
        """
        hidden, _ = self.hidden_states(_token_ids(tokens, self.config.vocab_size), **options)
        return self.logits(hidden, options.get("operands"))


def _token_ids(tokens: Any, vocab_size: int) -> Int[Array, "B T"]:
    """Checked token ids as int32; a JAX array's values are not checked, because that would wait for the device."""
    try:
        ids = tokens if isinstance(tokens, jax.Array) else np.asarray(tokens)
    except ValueError as error:
        raise UsageError("tokens must be rows of equal length: pad them, or pass one row at a time") from error
    if ids.ndim != 2 or not jnp.issubdtype(ids.dtype, jnp.integer):
        raise UsageError(f"tokens must be integers [batch, length], got {ids.dtype} {list(ids.shape)}")
    if isinstance(ids, jax.Array):
        return ids
    # Checked before the cast to int32, which would turn 2**32 + 5 into a valid id.
    if ids.size == 0:
        raise UsageError(f"tokens must hold at least one token, got shape {list(ids.shape)}")
    if (wrong := ids[(ids < 0) | (ids >= vocab_size)]).size:
        raise UsageError(f"token ids {wrong[:5].tolist()} are outside the vocabulary of {vocab_size}")
    return jnp.asarray(ids, jnp.int32)


def _save_dots(primitive: Any, *_: Any, **options: Any) -> bool:
    """Whether `Remat` "dots" saves the result of a primitive."""
    named = primitive.name == "name" and options["name"] in ("dots", "attention")
    # cuDNN attention has no checkpoint_name, so its primitive is matched.
    return named or primitive.name.startswith("dot_product_attention_fwd")


def _save_dots_and_swiglu(primitive: Any, *_: Any, **options: Any) -> bool:
    """Whether `Remat` "swiglu" saves the result of a primitive."""
    return _save_dots(primitive, **options) or (primitive.name == "name" and options["name"] == "swiglu")


REMAT_POLICIES = {"swiglu": _save_dots_and_swiglu, "dots": _save_dots, "full": None}  # for `jax.checkpoint`


def residual_std(config: Config) -> float:
    """Init std of the projections into the residual stream, scaled so that 2 L additions do not grow its variance."""
    return config.initializer_range / (2 * config.num_hidden_layers) ** 0.5
