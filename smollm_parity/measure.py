"""One side of the ladder on any weights, measured in a process of its own and left as arrays in a folder.

    python -m smollm_parity.measure jax --weights PATH --job job.npz --out FOLDER [--device gpu]

Torch and JAX in one process fight over cuDNN on a GPU (jax#19004); apart, they also do not share their memory. The
parent, `scripts/parity_report.py`, compares what the sides leave.
"""

import argparse
import dataclasses
import json
import os
from pathlib import Path
from typing import Any, Literal

import numpy as np

from smollm_jax.training.execution import Compute
from smollm_jax.training.state import init_train_state

SIDES = ("jax", "twin", "transformers")
NEW_TOKENS = 48
DECODED: dict[str, Literal["bf16", "int8"]] = {
    "bf16": "bf16",
    "q8_0": "int8",
}  # by --quantize, of what a GGUF rounds to
GGUF_TYPES: tuple[Literal["f16", "bf16", "q8_0"], ...] = ("f16", "bf16", "q8_0")


def write(out: Path, name: str, array: Any) -> None:
    np.save(out / f"{name}.npy", np.asarray(array))


def write_gradient(out: Path, dtype: str, loss: float, gradient: dict[str, np.ndarray]) -> None:
    write(out, f"loss-{dtype}", loss)
    np.savez(out / f"gradient-{dtype}.npz", **gradient)


def measure_jax(weights_path: Path, job: dict[str, np.ndarray], out: Path, device: str) -> None:
    """Streams, logits, gradients, a training curve, greedy text and packed logits of the JAX model."""
    if mutant := os.environ.get("SMOLLM_MUTANT"):  # so that a test can see the report fail
        from smollm_parity import mutants

        mutants.apply(mutant)
    import jax
    import jax.numpy as jnp

    jax.config.update("jax_platforms", "cuda" if device == "gpu" else "cpu")
    from smollm_jax import weights
    from smollm_jax.config import Recipe
    from smollm_jax.errors import UsageError
    from smollm_jax.generation.generate import generate
    from smollm_jax.generation.programs import NO_TOKEN
    from smollm_jax.model.attention import packed
    from smollm_jax.training import optimizer, train_step
    from smollm_jax.weights import gguf_writer
    from smollm_parity import ladder

    bundle = weights.read(weights_path)
    versions = {"device": jax.devices()[0].device_kind, "jax": jax.__version__}
    for dtype in ("float64", "float32", "bfloat16"):
        stream, logits = ladder.jax_stream(bundle, job["texts"], dtype)
        write(out, f"stream-{dtype}", stream.astype(np.float64 if dtype == "float64" else np.float32))
        write(out, f"logits-{dtype}", logits)
        if dtype != "bfloat16":
            write(out, f"first-{dtype}", ladder.jax_stream(bundle, job["firsts"], dtype)[0])
    for kind in GGUF_TYPES:
        try:
            tensors = gguf_writer.rounded(bundle.tensors, kind)
        except UsageError as error:  # rows of another length, numbers too large: no file of this type can be written
            print(error)
            continue
        logits = ladder.jax_stream(dataclasses.replace(bundle, tensors=tensors), job["texts"], "float32")[1]
        write(out, f"logits-{kind}", logits)
        write(out, f"lost-{kind}", gguf_writer.lost(bundle.tensors, tensors))
        if device == "cpu" and kind in DECODED:  # quantised decoding is for CPUs
            write(out, f"decoded-{kind}", ladder.decoded(bundle, job["texts"], DECODED[kind]))
    if device == "gpu":
        stream, logits = ladder.jax_stream(bundle, job["texts"], "bfloat16", implementation="cudnn")
        write(out, "stream-bfloat16-cudnn", stream.astype(np.float32))
        write(out, "logits-bfloat16-cudnn", logits)
    write(out, "logits-operands", ladder.jax_operand_logits(bundle, job["texts"]))
    for dtype in ("float64", "float32"):
        write_gradient(out, dtype, *ladder.jax_gradients(bundle, job["window"], dtype))

    with ladder.precisely("float32"):
        recipe = Recipe(**json.loads(str(job["recipe"])))
        tx, curve = optimizer.adamw(recipe), []
        state = init_train_state(weights.from_bundle(bundle), tx)
        for tokens in job["batches"]:
            state, metrics = train_step.train_step(state, jnp.asarray(tokens), tx=tx, compute=Compute("float32"))
            curve.append(float(metrics["loss"]))
        write(out, "curve", curve)
        del state

        model = weights.from_bundle(bundle)
        prompts = [[int(i) for i in row if i >= 0] for row in job["prompts"]]
        pieces = generate(model, prompts, max_new_tokens=NEW_TOKENS, eos_token_ids=bundle.config.eos_token_ids)
        new = np.concatenate(list(pieces), axis=1)
        assert NO_TOKEN == -1
        write(out, "greedy", np.pad(new, ((0, 0), (0, NEW_TOKENS - new.shape[1])), constant_values=NO_TOKEN))

        # Two documents in one row, against each on its own.
        first, second = job["texts"][:2]
        tokens = jnp.asarray(np.concatenate([first, second])[None])
        segments = jnp.asarray(np.repeat([0, 1], len(first))[None])
        positions = jnp.asarray(np.tile(np.arange(len(first)), 2)[None])
        together = jax.jit(lambda m, t: m(t, attend=packed(segments), positions=positions))(model, tokens)
        apart = jax.jit(lambda m, t: m(t))(model, jnp.asarray(np.stack([first, second])))
        write(out, "packed", np.asarray(together).reshape(apart.shape) - np.asarray(apart))
    (out / "versions.json").write_text(json.dumps(versions))


def measure_torch(side: str, weights_path: Path, job: dict[str, np.ndarray], out: Path, device: str) -> None:
    """The same of the twin, or of transformers on the same weights (float64 from the twin only)."""
    import torch

    import smollm_torch.train
    import smollm_torch.weights
    from smollm_jax import weights
    from smollm_jax.config import Recipe
    from smollm_parity import ladder

    on = "cuda" if device == "gpu" else "cpu"
    torch.backends.cuda.matmul.allow_tf32 = False
    bundle = weights.read(weights_path)
    versions = {"device": torch.cuda.get_device_name() if on == "cuda" else "cpu", "torch": torch.__version__}
    if side == "transformers":
        import transformers

        versions["transformers"] = transformers.__version__

    def module(dtype: str) -> Any:
        kind = getattr(torch, dtype)
        if side == "twin":
            return smollm_torch.weights.from_bundle(bundle, kind).to(on)
        return load_transformers(weights_path, dtype=kind).to(on)

    for dtype in ("float64", "float32", "bfloat16") if side == "twin" else ("float32", "bfloat16"):
        model = module(dtype)
        stream, logits = ladder.torch_stream(model, job["texts"])
        write(out, f"stream-{dtype}", stream.astype(np.float64 if dtype == "float64" else np.float32))
        write(out, f"logits-{dtype}", logits)
        if dtype != "bfloat16":
            write(out, f"first-{dtype}", ladder.torch_stream(model, job["firsts"])[0])
            write_gradient(out, dtype, *ladder.torch_gradients(model, job["window"]))
    model = module("float32")
    write(out, "logits-autocast", ladder.autocast_logits(model, job["texts"]))
    if side == "twin":
        recipe = Recipe(**json.loads(str(job["recipe"])))
        adamw, curve = smollm_torch.train.adamw(model.train(), recipe), []
        for step, tokens in enumerate(job["batches"]):
            tokens = torch.from_numpy(tokens.astype(np.int64)).to(on)
            curve.append(smollm_torch.train.train_step(model, adamw, tokens, recipe, step)["loss"])
        write(out, "curve", curve)
    else:
        rows = []
        for row in job["prompts"]:
            ids = torch.tensor([[int(i) for i in row if i >= 0]], device=on)
            options = {"max_new_tokens": NEW_TOKENS, "do_sample": False, "pad_token_id": 0}
            new = model.generate(ids, attention_mask=torch.ones_like(ids), **options)[0, ids.shape[1] :].tolist()
            rows.append(new + [-1] * (NEW_TOKENS - len(new)))
        write(out, "greedy", rows)
    (out / "versions.json").write_text(json.dumps(versions))


def load_transformers(folder: Path, **options: Any) -> Any:
    """transformers' own model of a Hugging Face folder, eager; it would load missing tensors without an exception."""
    from transformers import AutoModelForCausalLM

    options = {"attn_implementation": "eager"} | options
    model, info = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True, **options)
    assert not any(info.values()), info
    return model.eval()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("side", choices=SIDES)
    parser.add_argument("--weights", type=Path, required=True)
    parser.add_argument("--job", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--device", choices=("cpu", "gpu"), default="cpu")
    flags = parser.parse_args()
    with np.load(flags.job) as file:
        job = dict(file)
    flags.out.mkdir(parents=True)
    if flags.side == "jax":
        measure_jax(flags.weights, job, flags.out, flags.device)
    else:
        measure_torch(flags.side, flags.weights, job, flags.out, flags.device)


if __name__ == "__main__":
    main()
