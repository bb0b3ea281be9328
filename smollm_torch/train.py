"""The twin's training loop: the train step and optimizer of `smollm_jax/training` in PyTorch."""

import math
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.nn import functional

from smollm_jax.config import Recipe
from smollm_jax.data.batches import Batches
from smollm_jax.errors import DivergedError
from smollm_jax.runs.metrics import RunLog
from smollm_torch.model import SmolLM


def learning_rate(recipe: Recipe, step: int) -> float:
    """Learning rate of a step (0 = the first), written out; the JAX trainer takes the same schedule from optax."""
    peak, warmup = recipe.learning_rate, recipe.warmup_steps
    if step < warmup:
        return peak * step / warmup
    if recipe.schedule == "cosine":
        return peak * 0.5 * (1 + math.cos(math.pi * (step - warmup) / (recipe.steps - warmup)))
    if step < recipe.decay_start:
        return peak
    return peak * (recipe.steps - step) / (recipe.steps - recipe.decay_start)


def adamw(module: SmolLM, recipe: Recipe) -> torch.optim.AdamW:
    """AdamW with the recipe's hyperparameters and decay on all parameters; the learning rate is set each step."""
    betas = (recipe.beta1, recipe.beta2)
    return torch.optim.AdamW(
        module.parameters(), recipe.learning_rate, betas=betas, eps=recipe.eps, weight_decay=recipe.weight_decay
    )


def mean_loss(module: SmolLM, tokens: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """The mean next-token cross-entropy of `tokens` `[B, T + 1]`, in at least float32.

    Computed with a copy of the parameters in `dtype`, cast once per step as in the JAX trainer; gradients flow to the
    original parameters. (Autocast would keep the residual stream in float32 and round the logits.)
    """
    parameters = {name: parameter.to(dtype) for name, parameter in module.named_parameters()}
    logits = torch.func.functional_call(module, parameters, (tokens[:, :-1],))
    return functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())


def clip_gradients(module: SmolLM, clip: float) -> torch.Tensor:
    """Scales the gradients in place to a global norm of at most `clip`; returns the norm before clipping.

    `torch.nn.utils.clip_grad_norm_` is not used: on a CPU its float32 norm of the embedding's 28M gradients is 1.6e-3
    off, where `sum` is accurate to 1e-7 (torch 2.13), and it divides by (norm + 1e-6).
    """
    gradients = [parameter.grad for parameter in module.parameters() if parameter.grad is not None]
    norm = torch.stack([gradient.square().sum() for gradient in gradients]).sum().sqrt()
    if norm > clip:
        for gradient in gradients:
            gradient.mul_(clip / norm)
    return norm


def train_step(
    module: SmolLM, optimizer: torch.optim.AdamW, tokens: torch.Tensor, recipe: Recipe, step: int
) -> dict[str, float]:
    """Takes one optimizer step in place; returns its loss and the gradient norm before clipping."""
    for group in optimizer.param_groups:
        group["lr"] = learning_rate(recipe, step)
    optimizer.zero_grad(set_to_none=True)
    loss = mean_loss(module, tokens, getattr(torch, recipe.dtype))
    loss.backward()
    norm = clip_gradients(module, recipe.clip)
    optimizer.step()
    return {"loss": float(loss.detach()), "gradient_norm": float(norm)}


@torch.no_grad()
def validation_loss(module: SmolLM, recipe: Recipe, batches: Batches, count: int) -> float:
    """The mean loss over up to `count` batches of held-out tokens."""
    device, total, rows = next(module.parameters()).device, 0.0, 0
    for tokens in batches.validation(count):
        loss = mean_loss(module, torch.from_numpy(tokens.astype(np.int64)).to(device), getattr(torch, recipe.dtype))
        total, rows = total + float(loss) * len(tokens), rows + len(tokens)
    return total / rows


def train(
    module: SmolLM, recipe: Recipe, batches: Batches, *, eval_every: int, log: RunLog, stop_at: int | None = None
) -> SmolLM:
    """Trains the twin with float32 parameters, on the same batches in the same order as the JAX trainer.

    `stop_at` ends the run early without changing the schedule.
    """
    module.train()
    device = next(module.parameters()).device
    optimizer = adamw(module, recipe)
    last = recipe.steps if stop_at is None else min(stop_at, recipe.steps)
    log.start(0, last, recipe.tokens_per_step)
    for step in range(last):
        tokens = torch.from_numpy(batches.batch(step).astype(np.int64)).to(device)
        metrics: dict[str, Any] = train_step(module, optimizer, tokens, recipe, step)
        log.step(step + 1, learning_rate=learning_rate(recipe, step), **metrics)
        if not math.isfinite(metrics["loss"]):
            raise DivergedError(f"step {step + 1}: the loss is {metrics['loss']}: lower the learning rate")
        if step + 1 == last or (eval_every and (step + 1) % eval_every == 0):
            log.validation(step + 1, validation_loss(module, recipe, batches, 8))
            log.resume_clock()
    return module.eval()


def save(module: SmolLM, path: Path) -> None:
    """Writes the twin's weights as a safetensors file with its config."""
    from smollm_jax import weights
    from smollm_torch.weights import to_bundle

    weights.write(path, to_bundle(module, f"trained by train_torch.py, {path.parent.name}"), "safetensors")
