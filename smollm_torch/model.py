"""SmolLM2 in PyTorch, the reference twin of `smollm_jax/model/smollm.py`: same names, same order, same mathematics.

`state_dict` keys are Hugging Face's. From `smollm_jax` it imports only the config.

B batch, T query tokens, D hidden, N query heads, K KV heads, H head dim, F MLP, V vocab, L layers.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from smollm_jax.config import Config


class RMSNorm(nn.Module):
    """Root-mean-square norm, computed in at least float32 and rounded to `x.dtype` before scaling."""

    def __init__(self, config: Config):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(config.hidden_size))
        self.eps = config.rms_norm_eps

    def forward(self, x: Tensor) -> Tensor:  # [B, T, D]
        dtype, x = x.dtype, x.to(torch.promote_types(x.dtype, torch.float32))
        normalized = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + self.eps)
        return self.weight * normalized.to(dtype)


def rope_cos_sin(positions: Tensor, config: Config, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """cos and sin `[B, 1, T, H/2]` of every position and frequency, evaluated in at least float32."""
    angle_dtype = torch.promote_types(dtype, torch.float32)
    frequency = torch.tensor(config.rotary_frequencies, dtype=angle_dtype, device=positions.device)
    angle = positions[:, None, :, None].to(angle_dtype) * frequency
    return angle.cos().to(dtype), angle.sin().to(dtype)


def apply_rope(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Heads `[B, heads, T, H]` rotated by position, in HF's half-split layout."""
    a, b = x.chunk(2, dim=-1)
    return torch.cat([a * cos - b * sin, b * cos + a * sin], dim=-1)


class Attention(nn.Module):
    """Grouped-query causal self-attention with rotary positions."""

    def __init__(self, config: Config):
        super().__init__()
        D, H = config.hidden_size, config.head_dim
        N, K = config.num_attention_heads, config.num_key_value_heads
        self.q_proj = nn.Linear(D, N * H, bias=False)
        self.k_proj = nn.Linear(D, K * H, bias=False)
        self.v_proj = nn.Linear(D, K * H, bias=False)
        self.o_proj = nn.Linear(N * H, D, bias=False)
        self.head_dim = H

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        q = apply_rope(self._heads(self.q_proj(x)), cos, sin)
        k = apply_rope(self._heads(self.k_proj(x)), cos, sin)
        v = self._heads(self.v_proj(x))
        out = functional.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        return self.o_proj(out.transpose(1, 2).flatten(2))

    def _heads(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (-1, self.head_dim)).transpose(1, 2)


class MLP(nn.Module):
    """SwiGLU: down(silu(gate(x)) * up(x))."""

    def __init__(self, config: Config):
        super().__init__()
        D, F = config.hidden_size, config.intermediate_size
        self.gate_proj = nn.Linear(D, F, bias=False)
        self.up_proj = nn.Linear(D, F, bias=False)
        self.down_proj = nn.Linear(F, D, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(functional.silu(self.gate_proj(x)) * self.up_proj(x))


class DecoderLayer(nn.Module):
    """Pre-norm attention and MLP, each added to the residual stream."""

    def __init__(self, config: Config):
        super().__init__()
        self.self_attn = Attention(config)
        self.mlp = MLP(config)
        self.input_layernorm = RMSNorm(config)
        self.post_attention_layernorm = RMSNorm(config)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        x = x + self.self_attn(self.input_layernorm(x), cos, sin)
        return x + self.mlp(self.post_attention_layernorm(x))


class Decoder(nn.Module):
    """All modules but the head: the `model.` prefix of Hugging Face's names."""

    def __init__(self, config: Config):
        super().__init__()
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(DecoderLayer(config) for _ in range(config.num_hidden_layers))
        self.norm = RMSNorm(config)


class SmolLM(nn.Module):
    """The whole model. `model(tokens)` gives next-token logits; fresh parameters follow the pre-training recipe."""

    def __init__(self, config: Config):
        super().__init__()
        self.config = config
        self.model = Decoder(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        if config.tie_word_embeddings:
            self.lm_head.weight = self.model.embed_tokens.weight
            self.register_load_state_dict_pre_hook(_fill_tied_head)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """The recipe's init, as in `smollm_jax.model.smollm.SmolLM` (the random numbers are torch's own)."""
        std = self.config.initializer_range
        for name, parameter in self.named_parameters():
            if name.endswith("norm.weight"):
                nn.init.ones_(parameter)
            elif name.endswith(("o_proj.weight", "down_proj.weight")):
                nn.init.normal_(parameter, std=std / (2 * self.config.num_hidden_layers) ** 0.5)
            else:
                nn.init.normal_(parameter, std=std)

    def hidden_states(self, tokens: Tensor, positions: Tensor | None = None) -> Tensor:
        """The last norm's output `[B, T, D]`. Raises `IndexError` for a token id outside the vocabulary."""
        positions = torch.arange(tokens.shape[1], device=tokens.device)[None] if positions is None else positions
        x = self.model.embed_tokens(tokens)
        cos, sin = rope_cos_sin(positions, self.config, x.dtype)
        for layer in self.model.layers:
            x = layer(x, cos, sin)
        return self.model.norm(x)

    def forward(self, tokens: Tensor, positions: Tensor | None = None) -> Tensor:
        """Next-token logits `[B, T, V]`, rounded to at least float32."""
        hidden = self.hidden_states(tokens, positions)
        logits_dtype = torch.promote_types(hidden.dtype, torch.float32)
        # Operands are cast up first: products of two bfloat16 values are exact in float32, as in the JAX model.
        return functional.linear(hidden.to(logits_dtype), self.lm_head.weight.to(hidden.dtype).to(logits_dtype))


def _fill_tied_head(module: nn.Module, state_dict: dict[str, Any], *_: Any) -> None:
    """Lets `strict=True` load state dicts without the tied head, such as Hugging Face's."""
    if "model.embed_tokens.weight" in state_dict:
        state_dict.setdefault("lm_head.weight", state_dict["model.embed_tokens.weight"])
