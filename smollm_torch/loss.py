"""The twin's loss with the algorithm of `smollm_jax/model/cross_entropy.py`, so that benchmarks compare equal work.

Training and the parity tests use `smollm_torch.train.mean_loss`, plain cross-entropy over all logits, as an independent
reference.
"""

from typing import Any

import torch
from torch import Tensor, nn

from smollm_jax.config.recipe import CHUNK_TOKENS, CPU_CHUNK_TOKENS
from smollm_torch.model import SmolLM


class LinearCrossEntropy(torch.autograd.Function):
    """The sum over tokens of -log softmax(hidden @ head.T)[target]; both gradients are computed in the forward pass."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, head: Tensor, targets: Tensor, chunk_tokens: int) -> Tensor:
        acc_dtype = torch.promote_types(hidden.dtype, torch.float32)
        weight = head.to(hidden.dtype)
        total, head_gradient = (
            torch.zeros((), dtype=acc_dtype, device=hidden.device),
            torch.zeros_like(head, dtype=acc_dtype),
        )
        d_hidden = []
        for h, target in zip(hidden.split(chunk_tokens), targets.split(chunk_tokens), strict=True):
            logits = (h @ weight.T).to(acc_dtype)
            log_normalizer = logits.logsumexp(1, keepdim=True)
            total = total + (log_normalizer - logits.gather(1, target[:, None])).sum()
            classes = torch.arange(head.shape[0], device=hidden.device)
            d_logits = ((logits - log_normalizer).exp() - (classes == target[:, None]).to(acc_dtype)).to(h.dtype)
            head_gradient = head_gradient + d_logits.T @ h
            d_hidden.append(d_logits @ weight)
        ctx.save_for_backward(torch.cat(d_hidden), head_gradient.to(head.dtype))
        return total

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        hidden_gradient, head_gradient = ctx.saved_tensors
        (cotangent,) = gradients
        scaled = (hidden_gradient.to(cotangent.dtype) * cotangent).to(hidden_gradient.dtype)
        return scaled, head_gradient * cotangent.to(head_gradient.dtype), None, None


class HiddenStates(nn.Module):
    """A module whose `forward` is the twin's `hidden_states`, for `functional_call`."""

    def __init__(self, module: SmolLM):
        super().__init__()
        self.module = module

    def forward(self, tokens: Tensor) -> Tensor:
        return self.module.hidden_states(tokens)


def mean_loss(module: SmolLM, tokens: Tensor, dtype: torch.dtype) -> Tensor:
    """`smollm_torch.train.mean_loss` without storing all logits; logits are rounded to `dtype`, as in transformers."""
    parameters = {f"module.{name}": parameter.to(dtype) for name, parameter in module.named_parameters()}
    hidden: Any = torch.func.functional_call(HiddenStates(module), parameters, (tokens[:, :-1],))
    targets = tokens[:, 1:].flatten()
    chunk = CPU_CHUNK_TOKENS if tokens.device.type == "cpu" else CHUNK_TOKENS
    total: Any = LinearCrossEntropy.apply(hidden.flatten(0, 1), module.lm_head.weight, targets, chunk)
    return total / targets.numel()
