"""Train the PyTorch twin with the recipe and the batches of a JAX run, to lay the two loss curves over each other.

    python scripts/train_jax.py --steps 50 --out runs/jax
    python scripts/train_torch.py --like runs/jax --out runs/torch
    python scripts/plot_run.py runs/jax runs/torch --out curves.png

Both start from the same weights: the recipe's init drawn by JAX from the run's seed, or --init-from.
"""

import dataclasses
import importlib.util
import os
from pathlib import Path
from typing import Literal

from smollm_jax import errors
from smollm_jax.commands import command_line
from smollm_jax.runtime import install
from smollm_jax.runtime.program import run_main


@dataclasses.dataclass(frozen=True)
class Flags:
    like: Path
    """JAX run whose config, recipe and data are taken."""
    out: Path
    """Run folder to write; must not exist."""
    data: tuple[str, ...] = ("assets/sotu",)
    """What the JAX run was given."""
    init_from: Path | None = None
    """The weights the JAX run was given, if any."""
    steps: int | None = None
    """Stop after this many steps of the run's schedule."""
    device: Literal["cpu", "cuda"] = "cpu"
    """Where to train."""
    eval_every: int = 50
    """Steps between validations."""
    log_every: int = 10
    """Steps between lines when the output is no terminal."""
    debug: bool = False
    """Show a traceback instead of one line when something goes wrong."""


def main(argv: list[str] | None = None) -> None:
    flags = command_line.parse(Flags, argv, __doc__, weights=("init_from",))
    # torch and JAX in one process fight over cuDNN on a GPU (jax#19004); JAX only draws the first weights here.
    os.environ["JAX_PLATFORMS"] = "cpu"
    if importlib.util.find_spec("torch") is None:
        raise errors.UsageError(install.needs("train_torch.py", "torch"))
    import torch

    from smollm_jax import weights
    from smollm_jax.config.hf_config import read_config
    from smollm_jax.data.batches import Batches
    from smollm_jax.data.mixture import open_mixture
    from smollm_jax.model import cost
    from smollm_jax.runs import metrics
    from smollm_jax.runs.checkpoint import CheckpointStore
    from smollm_jax.runs.folder import write_run_files
    from smollm_jax.runs.provenance import Provenance
    from smollm_jax.tokenizer.source import read_tokenizer_files
    from smollm_jax.training.state import init_model
    from smollm_torch import train
    from smollm_torch.weights import from_bundle

    if flags.steps is not None and flags.steps < 1:
        raise errors.UsageError(f"--steps must be at least 1, got {flags.steps}")
    if flags.device == "cuda" and not torch.cuda.is_available():
        raise errors.UsageError("--device cuda: this torch finds no CUDA GPU")
    if flags.out.exists():
        raise errors.UsageError(f"{flags.out}: exists already; name another --out")
    config = read_config(flags.like / "config.json")
    with CheckpointStore(flags.like / "checkpoints", create=False) as store:
        step = store.latest_step()
        store.verify(step, item="meta")
        like = Provenance.from_meta(store.meta(step))
    recipe = like.recipe
    if recipe.mask_documents:
        raise errors.UsageError(f"{flags.like} was trained with --mask-documents, which the twin does not do")
    if like.start_from and not flags.init_from:
        raise errors.UsageError(f"{flags.like} began with {like.start_from}: add --init-from {like.start_from}")
    tokens = open_mixture(flags.data, flags.like, Path("data"))
    if tokens.sha256 != like.data_sha256:
        raise errors.UsageError(f"--data {' '.join(flags.data)} is not what {flags.like} was trained on")
    if flags.init_from:
        bundle = weights.read(flags.init_from)
    else:
        bundle = weights.to_bundle(init_model(config, recipe.seed))
    module = from_bundle(bundle).to(flags.device)
    device = torch.cuda.get_device_name() if flags.device == "cuda" else "cpu"
    print(f"device      {device}, torch {torch.__version__}")
    print(f"model       {cost.count_parameters(config):,} parameters, {config}")
    print(f"recipe      {recipe}")
    if flags.device == "cuda" and not cost.peak_flops(device, recipe.dtype):
        print(cost.no_mfu_note(device, recipe.dtype))
    with metrics.RunLog(
        flags.out,
        log_every=flags.log_every,
        flops_per_token=cost.flops_per_token(config, recipe.sequence_length),
        peak_flops=cost.peak_flops(device, recipe.dtype),
    ) as log:
        train.train(module, recipe, Batches(tokens, recipe), eval_every=flags.eval_every, log=log, stop_at=flags.steps)
    write_run_files(flags.out, config, read_tokenizer_files(flags.like))
    train.save(module, flags.out / "model.safetensors")
    print(f"wrote {flags.out / 'model.safetensors'}")


if __name__ == "__main__":
    run_main(main)
