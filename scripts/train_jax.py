"""Train SmolLM2 on text.

    python scripts/train_jax.py                                  # everything chosen for this machine
    python scripts/train_jax.py --resume                         # go on with the newest run
    python scripts/train_jax.py --data my_text/ --init-from assets/SmolLM2-135M-Instruct --learning-rate 1e-4

On a GPU: 5,000 steps of 8 x 2,048 tokens in bfloat16. Without one: the same 134.5M parameters at a demo size that
takes about 10 minutes on 2 cores. A flag left out is chosen by the device and printed before training starts.
"""

import dataclasses
import time
from pathlib import Path
from typing import Literal

import tyro

from smollm_jax import errors


@dataclasses.dataclass(frozen=True)
class Flags:
    preset: str = "smollm2-135m-pretrain"
    """Model to train from scratch: see smollm_jax/config.py. Not with --init-from, whose config counts."""
    data: Path = Path("assets/sotu")
    """Text file, folder of text, .jsonl with a "text" field, or a prepared token file."""
    tokenizer: Path | None = None
    """Folder with tokenizer.json; default: --init-from's if it has one, else assets/tokenizer."""
    init_from: Path | None = None
    """Start from these weights (any kind convert_weights.py reads) instead of the recipe's init."""
    out: Path | None = None
    """Run folder; default: runs/<time>-<preset>, or with --resume the newest run under runs/."""
    resume: bool = False
    """Go on from the run's newest checkpoint."""
    steps: int | None = None
    """Optimizer steps in all; default 5,000 on a GPU."""
    batch_size: int | None = None
    """Sequences a step."""
    sequence_length: int | None = None
    """Tokens a sequence."""
    learning_rate: float = 1e-3
    """Peak learning rate (the pre-training recipe's 3e-3 is for 1M tokens a step)."""
    schedule: Literal["wsd", "cosine"] = "wsd"
    """Warmup-stable-decay, or cosine."""
    warmup_steps: int | None = None
    """Default: 5 % of the steps."""
    weight_decay: float = 0.01
    """Decoupled, on all parameters."""
    dtype: Literal["bfloat16", "float32"] | None = None
    """Of the matrix products; weights and moments are float32. Default: bfloat16 on a GPU, float32 without."""
    attention: Literal["xla", "cudnn"] | None = None
    """Default: cudnn on a CUDA GPU in bfloat16, else xla."""
    save_every: int | None = None
    """Steps between checkpoints; default 500 on a GPU. The last step is always saved."""
    eval_every: int | None = None
    """Steps between validations on held-out text."""
    log_every: int = 10
    """Steps between lines when the output is no terminal; metrics.jsonl has every step."""
    remat: bool = False
    """Recompute each layer in the backward pass: less memory, about a third more time."""
    unroll: int = 1
    """Layers laid out per step of the layer scan."""
    seed: int = 0
    """Of the init and of the order of the data."""
    tensorboard: bool = False
    """Also write TensorBoard files into the run folder."""
    prompt: str = "The quick brown fox"
    """Continued after the last step."""
    debug: bool = False
    """Show a traceback instead of one line when something goes wrong."""


def main(argv: list[str] | None = None) -> None:
    flags = tyro.cli(Flags, args=argv, description=__doc__)
    import jax

    from smollm_jax import cost, data, formats, metrics, train, weights
    from smollm_jax.config import preset
    from smollm_jax.recipe import Recipe
    from smollm_jax.tokenizer import Tokenizer, folder_beside

    device = jax.devices()[0]
    on_gpu = device.platform == "gpu"
    run = flags.out or (newest_run() if flags.resume else Path(f"runs/{time.strftime('%Y%m%d-%H%M%S')}-{flags.preset}"))
    bundle = weights.read(flags.init_from) if flags.init_from and not flags.resume else None
    if flags.resume:
        config = formats.read_config(run / "config.json")
    else:
        config = bundle.config if bundle else preset(flags.preset)
    dtype = flags.dtype or ("bfloat16" if on_gpu else "float32")
    steps = flags.steps or (5000 if on_gpu else DEMO["steps"])
    recipe = Recipe(
        steps=steps,
        batch_size=flags.batch_size or (8 if on_gpu else DEMO["batch_size"]),
        sequence_length=flags.sequence_length or (2048 if on_gpu else DEMO["sequence_length"]),
        learning_rate=flags.learning_rate,
        warmup_steps=steps // 20 if flags.warmup_steps is None else flags.warmup_steps,
        dtype=dtype,
        schedule=flags.schedule,
        weight_decay=flags.weight_decay,
        seed=flags.seed,
    )
    if recipe.sequence_length > config.max_position_embeddings:
        raise errors.UsageError(
            f"--sequence-length {recipe.sequence_length} exceeds the model's {config.max_position_embeddings} positions"
        )
    attention = flags.attention or ("cudnn" if on_gpu and dtype == "bfloat16" else "xla")
    if attention == "cudnn" and not (on_gpu and dtype == "bfloat16"):
        raise errors.UsageError(f"--attention cudnn needs a CUDA GPU and bfloat16, not {device.platform} and {dtype}")
    compute = train.Compute(dtype, attention, flags.remat, flags.unroll)
    cadence = train.Cadence(
        save_every=(500 if on_gpu else DEMO["save_every"]) if flags.save_every is None else flags.save_every,
        eval_every=(250 if on_gpu else DEMO["eval_every"]) if flags.eval_every is None else flags.eval_every,
    )
    tokenizer_folder = flags.tokenizer or folder_beside(run if flags.resume else flags.init_from)
    tokenizer = Tokenizer.load(tokenizer_folder)
    if tokenizer.vocab_size > config.vocab_size:
        raise errors.UsageError(f"{tokenizer_folder} has {tokenizer.vocab_size} tokens, the model {config.vocab_size}")

    if not on_gpu:
        print("no GPU found: training the full-size model on the CPU, at a demo size")
    print(f"device      {device.device_kind} x {jax.device_count()}, jax {jax.__version__}")
    print(f"model       {cost.count_parameters(config):,} parameters, {config}")
    start = f"weights of {flags.init_from} ({bundle.origin})" if bundle else f"recipe's init, seed {flags.seed}"
    print(f"start       {'newest checkpoint' if flags.resume else start}")
    print(f"products    {dtype}, attention {attention}; weights, moments and loss float32")
    tokens_per_step = f"{recipe.batch_size} x {recipe.sequence_length} = {recipe.tokens_per_step:,} tokens a step"
    print(f"steps       {recipe.steps:,} of {tokens_per_step}, {recipe.schedule}, peak {recipe.learning_rate}")
    print(f"run         {run}", flush=True)

    tokens = data.prepare(flags.data, tokenizer_folder, Path("data"))
    batches = data.Batches(tokens, recipe)
    print(f"data        {flags.data}: {tokens.documents:,} documents, {len(tokens.tokens):,} tokens in {tokens.path}")
    if not flags.resume and not (run / "checkpoints").exists():
        weights.write_run_files(run, config, formats.read_tokenizer_files(tokenizer_folder))
    model = weights.from_bundle(bundle) if bundle else train.fresh(config, flags.seed)
    flops = cost.flops_per_token(config, recipe.sequence_length)
    peak = cost.peak_flops(device.device_kind)
    with metrics.RunLog(
        run, log_every=flags.log_every, flops_per_token=flops, peak_flops=peak, tensorboard=flags.tensorboard
    ) as log:
        model = train.train(
            model,
            recipe,
            batches,
            run=run,
            compute=compute,
            cadence=cadence,
            data_sha256=tokens.sha256,
            resume=flags.resume,
            log=log,
        )
    show(model, tokenizer, flags.prompt)
    print(f"\nnext: python scripts/generate.py --weights {run} --prompt {flags.prompt!r}")


# About 10 minutes on 2 cores, loss clearly down.
DEMO = {"steps": 200, "batch_size": 2, "sequence_length": 256, "save_every": 100, "eval_every": 50}


def newest_run() -> Path:
    """The newest run under runs/ that has a checkpoint."""
    runs = [folder for folder in Path("runs").glob("*") if any((folder / "checkpoints").glob("[0-9]*"))]
    if not runs:
        raise errors.CheckpointError("--resume: no run under runs/ has a checkpoint; name one with --out")
    return max(runs, key=lambda folder: max(p.stat().st_mtime for p in (folder / "checkpoints").glob("[0-9]*")))


def show(model, tokenizer, prompt: str, max_new_tokens: int = 32) -> None:
    """Prints a greedy continuation of a prompt and the likeliest next tokens."""
    import jax
    import jax.numpy as jnp
    import numpy as np

    from smollm_jax.generate import NO_TOKEN, generate

    ids = tokenizer.encode(prompt)
    pieces = generate(model, [ids], max_new_tokens=max_new_tokens, eos_token_ids=model.config.eos_token_ids)
    new = np.concatenate(list(pieces), axis=1)[0]
    print(f"\n{prompt}|{tokenizer.decode(new[new != NO_TOKEN])}")
    probability = jax.nn.softmax(jax.jit(lambda model, ids: model(ids)[0, -1])(model, jnp.asarray([ids])))
    top = [f"{tokenizer.decode([int(i)])!r} {float(probability[i]):.3f}" for i in jnp.argsort(-probability)[:5]]
    print(f"predicted next token: {', '.join(top)}")


if __name__ == "__main__":
    errors.run(main)
