"""PyTorch's backend: transformers' LlamaForCausalLM and what it runs, or the twin; eager or under torch.compile."""

import functools
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch._inductor import config as inductor
from torch.nn import functional
from transformers import CompileConfig, LlamaForCausalLM
from transformers.loss.loss_utils import ForCausalLMLoss

import smollm_torch.loss
import smollm_torch.train
from benchmarks.workload import GEMM, Prepared, Unit, Workload, decoded, per_call, rates, resident, samples
from smollm_torch import weights

GPU = torch.cuda.is_available() and os.environ.get("JAX_PLATFORMS") != "cpu"
DEVICE = "cuda" if GPU else "cpu"


def prepare(name: str, workload: Workload, folder: Path) -> Prepared:
    """A unit of work, a GEMM to time, and the backend's `ready` report."""
    if workload.dtype == "float32":
        torch.backends.cuda.matmul.allow_tf32 = False
    square = torch.ones((GEMM, GEMM), dtype=torch.bfloat16 if GPU else torch.float32, device=DEVICE)
    repeats = 200 if GPU else 1

    def gemm() -> int:
        repeat(lambda: torch.mm(square, square), repeats)
        return repeats

    kernels = {"loss": head_loss, "attention": attend, "gemm": matmuls}
    if workload.what in kernels:
        unit, ready = kernels[workload.what](workload, name)
    elif workload.training:
        unit, ready = step(workload, name, folder)
    else:
        unit, ready = inference(workload, name, folder)
    device = torch.cuda.get_device_name() if GPU else "cpu"
    return unit, gemm, {"device": device, "platform": "gpu" if GPU else "cpu", "losses": []} | ready


def compiled(name: str, function: Callable[..., Any]) -> Any:
    """`function`, compiled in the way that the backend's name specifies."""
    if "-freeze" in name:  # weights become constants: for inference only
        inductor.freezing = True
    if "-max" in name:
        return torch.compile(function, mode="max-autotune")
    return torch.compile(function) if "-compile" in name else function


def wait() -> None:
    if GPU:
        torch.cuda.synchronize()


def transformers_model(workload: Workload, folder: Path) -> Any:
    dtype = torch.float32 if workload.training else getattr(torch, workload.dtype)
    model: Any = LlamaForCausalLM.from_pretrained(folder, dtype=dtype, attn_implementation="sdpa")
    model.generation_config.eos_token_id = None  # always generate all tokens
    return model.to(DEVICE)


def transformers_loss(forward: Any, tokens: torch.Tensor, workload: Workload) -> torch.Tensor:
    targets = tokens[:, 1:].contiguous()
    with torch.autocast(
        DEVICE, getattr(torch, workload.dtype), enabled=workload.training and workload.dtype == "bfloat16"
    ):
        # `shift_labels`: transformers' own loss over T positions, as ours, instead of T + 1 with the last one masked.
        return forward(input_ids=tokens[:, :-1], labels=targets, shift_labels=targets, use_cache=False).loss


def step(workload: Workload, name: str, folder: Path) -> tuple[Unit, dict[str, Any]]:
    """Optimizer steps, with their peak memory."""
    recipe, tokens = workload.recipe(), torch.from_numpy(workload.tokens()).long().to(DEVICE)
    if twin := name.startswith("twin"):
        model: Any = weights.load(folder)[0].to(DEVICE)
        smollm_torch.train.mean_loss = forward = compiled(name, smollm_torch.loss.mean_loss)
    else:
        model = transformers_model(workload, folder)
        forward = compiled(name, model)
    adamw = torch.optim.AdamW(
        model.train().parameters(),
        recipe.learning_rate,
        betas=(recipe.beta1, recipe.beta2),
        eps=recipe.eps,
        weight_decay=recipe.weight_decay,
        fused=True,
    )

    def transformers_step() -> float:
        adamw.zero_grad(set_to_none=True)
        loss = transformers_loss(forward, tokens, workload)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), recipe.clip)
        adamw.step()
        return float(loss.detach())

    def unit() -> dict[str, Any]:
        loss = smollm_torch.train.train_step(model, adamw, tokens, recipe, 0)["loss"] if twin else transformers_step()
        wait()
        return {"loss": loss}

    ready: dict[str, Any] = {"before_bytes": torch.cuda.memory_allocated() if GPU else resident("VmRSS")}
    ready["losses"] = [unit()["loss"] for _ in range(1 if workload.what == "startup" else 2)]
    ready["peak_bytes"] = torch.cuda.max_memory_allocated() if GPU else resident("VmHWM")
    return unit, ready


def inference(workload: Workload, name: str, folder: Path) -> tuple[Unit, dict[str, Any]]:
    """Greedy decoding, or one forward pass that fills a cache."""
    model, tokens = transformers_model(workload, folder), torch.from_numpy(workload.tokens()).long().to(DEVICE)
    forward = model if workload.what == "decode" else compiled(name, model)
    prompt = tokens[:, :-1]

    def decode() -> dict[str, Any]:
        clock = Clock()
        options: dict[str, Any] = {"do_sample": False, "pad_token_id": 0, "max_new_tokens": workload.new_tokens}
        if "-compile" in name:
            compile_config: Any = CompileConfig(mode="max-autotune") if "-max" in name else CompileConfig()
            compile_config._compile_all_devices = True  # by default it compiles on a GPU only
            options |= {"cache_implementation": "static", "compile_config": compile_config}
        model.generate(prompt, attention_mask=torch.ones_like(prompt), streamer=clock, **options)
        return decoded(clock.pieces[1:], clock.times[1:])  # [0] is the prompt

    def prefill() -> dict[str, Any]:
        with torch.inference_mode():
            forward(input_ids=prompt, use_cache=True, logits_to_keep=1)
        wait()
        return {}

    unit = decode if workload.what == "decode" else prefill
    with torch.inference_mode():
        losses = [float(transformers_loss(forward, tokens, workload))]
    return unit, {"losses": losses, "ids": unit().get("ids")}


class Clock:
    """A streamer for transformers' `generate` that records when the prompt and each token arrive."""

    def __init__(self) -> None:
        self.pieces, self.times = [], []

    def put(self, tokens: Any) -> None:
        self.times.append(time.perf_counter())
        self.pieces.append(tokens.reshape(len(tokens), -1).numpy())

    def end(self) -> None:
        pass


# --------------------------------------------------------------------------------------------------------- kernels


def head_loss(workload: Workload, name: str) -> tuple[Unit, dict[str, Any]]:
    """transformers' loss of hidden states, with all logits in memory, and its two gradients."""
    hidden, head, targets = (torch.from_numpy(array).to(DEVICE) for array in workload.head())
    hidden, targets = hidden.to(getattr(torch, workload.dtype)).requires_grad_(), targets.long()
    head.requires_grad_()

    def mean(hidden: torch.Tensor, head: torch.Tensor) -> torch.Tensor:
        logits = functional.linear(hidden, head.to(hidden.dtype))
        return ForCausalLMLoss(logits, None, head.shape[0], shift_labels=targets)

    forward = compiled(name, mean)

    def loss_and_gradients() -> tuple[torch.Tensor, tuple[torch.Tensor, ...]]:
        loss = forward(hidden, head)
        return loss, torch.autograd.grad(loss, (hidden, head))

    loss, gradients = loss_and_gradients()
    ready = {"losses": [float(loss.detach())], "flops": 3 * workload.flops()["head"]}
    sampled = zip(("d hidden", "d head"), map(sampled_values, gradients), strict=True)
    return per_call(functools.partial(repeat, loss_and_gradients)), ready | {"samples": dict(sampled)}


def sdpa(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """Causal attention of `[B, heads, T, H]`, with the arguments that transformers passes."""
    return functional.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)


def heads(workload: Workload) -> list[torch.Tensor]:
    """q, k, v and the gradient of out `[B, heads, T, H]`, as views of `[B, T, heads, H]`: transformers' strides."""
    on_device = (torch.from_numpy(x).to(DEVICE, getattr(torch, workload.dtype)) for x in workload.heads())
    q, k, v, gradient = (x.transpose(1, 2) for x in on_device)
    return [q.requires_grad_(), k.requires_grad_(), v.requires_grad_(), gradient]


def attend(workload: Workload, name: str) -> tuple[Unit, dict[str, Any]]:
    """Causal attention and its gradients."""
    q, k, v, gradient = heads(workload)
    forward = compiled(name, sdpa)

    def forward_and_backward() -> tuple[torch.Tensor, ...]:
        out = forward(q, k, v)
        return out, *torch.autograd.grad(out, (q, k, v), gradient)

    results = (sampled_values(x.transpose(1, 2)) for x in forward_and_backward())
    sampled = zip(("out", "d q", "d k", "d v"), results, strict=True)
    ready = {"samples": dict(sampled), "flops": workload.flops()["attention both ways"]}
    return per_call(functools.partial(repeat, forward_and_backward)), ready


def matmuls(workload: Workload, name: str) -> tuple[Unit, dict[str, Any]]:
    """FLOP/s of each matmul of the model's forward pass, and of its attention."""
    work: dict[str, Callable[[int], None]] = {}
    for title, (rows, inner, columns) in workload.matmuls().items():
        dtype = getattr(torch, workload.dtype)
        x = torch.ones((rows, inner), dtype=dtype, device=DEVICE)
        weight = torch.ones((columns, inner), dtype=dtype, device=DEVICE)  # a Linear's layout
        work[title] = functools.partial(repeat, functools.partial(compiled(name, functional.linear), x, weight))
    q, k, v, gradient = heads(workload)
    forward = compiled(name, sdpa)

    def forward_only() -> None:
        with torch.no_grad():
            forward(q, k, v)

    def forward_and_backward() -> None:
        torch.autograd.grad(forward(q, k, v), (q, k, v), gradient)

    work["attention"] = functools.partial(repeat, forward_only)
    work["attention both ways"] = functools.partial(repeat, forward_and_backward)
    return rates(workload, work), {}


def repeat(function: Callable[[], Any], times: int) -> None:
    for _ in range(times):
        function()
    wait()


def sampled_values(tensor: torch.Tensor) -> list[float]:
    return samples(tensor.detach().float().cpu().numpy())
