"""The PyTorch twin and transformers as backends of the parity report, on the same weights as JAX."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch

import smollm_torch.train
import smollm_torch.weights
from smollm_jax import weights
from smollm_jax.config import Recipe
from smollm_parity import ladder
from smollm_parity.job import NEW_TOKENS, prompts_of
from smollm_parity.results import write, write_gradient, write_stream

Job = dict[str, np.ndarray]


def measure_torch(backend: str, weights_path: Path, job: Job, out: Path, device: str) -> dict[str, str]:
    """Writes the arrays of "twin" or "transformers" (float64 from the twin only); returns the versions of both."""
    torch_device = "cuda" if device == "gpu" else "cpu"
    torch.backends.cuda.matmul.allow_tf32 = False
    bundle = weights.read(weights_path)
    versions = {"device": torch.cuda.get_device_name() if device == "gpu" else "cpu", "torch": torch.__version__}
    if backend == "transformers":
        import transformers

        versions["transformers"] = transformers.__version__

    def module(dtype: str) -> Any:
        kind = getattr(torch, dtype)
        if backend == "twin":
            return smollm_torch.weights.from_bundle(bundle, kind).to(torch_device)
        return load_transformers(weights_path, dtype=kind).to(torch_device)

    for dtype in ("float64", "float32", "bfloat16") if backend == "twin" else ("float32", "bfloat16"):
        model = module(dtype)
        write_stream(out, dtype, *ladder.torch_stream(model, job["texts"]))
        if dtype != "bfloat16":
            write(out, f"first-{dtype}", ladder.torch_stream(model, job["firsts"])[0])
            write_gradient(out, dtype, *ladder.torch_gradients(model, job["window"]))
    model = module("float32")
    write(out, "logits-autocast", ladder.autocast_logits(model, job["texts"]))
    if backend == "twin":
        training(model, job, out, torch_device)
    else:
        greedy(model, job, out, torch_device)
    return versions


def training(model: Any, job: Job, out: Path, torch_device: str) -> None:
    """The losses of the job's float32 training steps of the twin."""
    recipe = Recipe(**json.loads(str(job["recipe"])))
    adamw, curve = smollm_torch.train.adamw(model.train(), recipe), []
    for step, tokens in enumerate(job["batches"]):
        tokens = torch.from_numpy(tokens.astype(np.int64)).to(torch_device)
        curve.append(smollm_torch.train.train_step(model, adamw, tokens, recipe, step)["loss"])
    write(out, "curve", curve)


def greedy(model: Any, job: Job, out: Path, torch_device: str) -> None:
    """transformers' greedy continuations of the job's prompts; -1 after the end of a text."""
    rows = []
    for prompt in prompts_of(job):
        ids = torch.tensor([prompt], device=torch_device)
        options = {"max_new_tokens": NEW_TOKENS, "do_sample": False, "pad_token_id": 0}
        new = model.generate(ids, attention_mask=torch.ones_like(ids), **options)[0, ids.shape[1] :].tolist()
        rows.append(new + [-1] * (NEW_TOKENS - len(new)))
    write(out, "greedy", rows)


def load_transformers(folder: Path, **options: Any) -> Any:
    """transformers' model of a Hugging Face folder, with eager attention. Fails on missing or unexpected tensors."""
    from transformers import AutoModelForCausalLM

    options = {"attn_implementation": "eager"} | options
    loaded: Any = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True, **options)
    model, info = loaded
    assert not any(info.values()), info
    return model.eval()
