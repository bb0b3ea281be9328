"""The flags of `train_jax.py`. Imports no JAX, so that --help is quick."""

import dataclasses
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from smollm_jax.config.recipe import Recipe, Remat


@dataclasses.dataclass(frozen=True)
class TrainingFlags:
    """Fields left None are chosen from the device, the recipe, or the run being resumed."""

    recipe: str | None = None
    """Named run: sets the preset and all numbers; other flags override them. One of demo, gpu-demo, one-gpu-day,
    smollm2-135m, smollm2-135m-long (smollm_jax/config/named_runs.py). Default: demo, or on a GPU gpu-demo."""
    preset: str | None = None
    """Model shape to train from scratch (smollm_jax/config/presets.py). Default: the recipe's."""
    data: tuple[str, ...] | None = None
    """Prepared data sets (prepare_data.py), or text in any form it reads, which is then prepared under data/. Several
    are concatenated, or mixed by weight: --data data/web:0.6 data/code:0.4. Default: assets/sotu."""
    on_bad_text: Literal["stop", "skip", "replace"] = "stop"
    """For --data that is text: what to do with a document that cannot be encoded, as in prepare_data.py."""
    special_tokens: bool = False
    """For --data that is text: encode a special token such as <|im_start|> as one token. Repeat it with --resume."""
    tokenizer: Path | None = None
    """Folder with tokenizer.json (or a GGUF), for --init-from weights without a tokenizer. Default without --init-from:
    assets/tokenizer."""
    init_from: Path | None = None
    """Start from these weights (any format that convert_weights.py reads) instead of a random initialization. They are
    validated before the first step."""
    out: Path | None = None
    """Run folder. Default: runs/<time>-<preset>, or with --resume the newest run under runs/."""
    resume: bool = False
    """Continue from the run's newest verified checkpoint, with the run's own recipe."""
    allow_change: tuple[str, ...] = ()
    """With --resume: names of settings that may differ from the saved run (learning_rate, data, rope_theta ...). Step n
    then takes the batch that the new settings give step n."""
    allow_unverified: bool = False
    """With --resume: accept a checkpoint without integrity.json."""
    steps: int | None = None
    """Optimizer steps in total."""
    batch_size: int | Literal["auto"] | None = None
    """Sequences per step, over all devices. auto: the most that fit with --remat, or with dots if --remat is not given;
    a resumed run keeps its batch size."""
    gradient_accumulation_steps: int | None = None
    """Micro-batches per step, to save memory. Default: 1."""
    sequence_length: int | None = None
    """Tokens per sequence."""
    learning_rate: float | None = None
    """Peak learning rate. Default: 1e-3; with --init-from 3e-5, because a peak for random weights damages trained ones,
    unless the recipe is made for trained weights."""
    schedule: Literal["wsd", "cosine"] | None = None
    """Learning rate schedule: warmup-stable-decay (default) or cosine."""
    warmup_steps: int | None = None
    """Steps of linear warm-up. Default: 5 % of the steps; with --init-from at least 10, or half of a run of fewer than
    20 steps."""
    decay_fraction: float | None = None
    """Fraction of the steps, at the end, in which wsd decays to 0. Default: 0.2."""
    weight_decay: float | None = None
    """Decoupled weight decay, on all parameters. Default: 0.01."""
    mask_documents: bool = False
    """Mask attention across documents, and start positions at 0 in each. Default: windows cross document borders, as in
    the published recipe."""
    mesh: str | None = None
    """Device mesh: data=8, fsdp=8 or data=4,fsdp=2. data replicates parameters and optimizer state, fsdp shards them.
    Default: one device; with --distributed all devices, on data."""
    distributed: bool = False
    """Run as one of several processes, found through Slurm, MPI or the three flags below. Needs --out and prepared
    --data that all of them can read."""
    coordinator_address: str | None = None
    """HOST:PORT of the first process."""
    num_processes: int | None = None
    """Number of processes."""
    process_id: int | None = None
    """Index of this process, from 0."""
    dtype: Literal["bfloat16", "float32"] | None = None
    """Dtype of matmuls; weights and optimizer state are float32. Default: the recipe's; for demo bfloat16 on a GPU or a
    CPU with bfloat16 instructions (AVX-512 BF16, AMX), else float32."""
    seed: int | None = None
    """Seed of the initialization and of the order of the data. Default: 0."""
    attention: Literal["xla", "cudnn"] | None = None
    """Attention implementation. Default: cudnn on a CUDA GPU in bfloat16 if it supports the sequence length and
    --mask-documents, else xla."""
    save_every: int | None = None
    """Steps between checkpoints. Default: 500 on a GPU, else 100. The last step is always saved."""
    keep_checkpoints: Annotated[int, tyro.conf.arg(aliases=["--keep"])] = 2
    """Number of checkpoints to keep, the newest."""
    async_save: bool = False
    """Write checkpoints in the background, from a copy of the state in memory."""
    eval_every: int | None = None
    """Steps between validations on held-out text; 0: after the last step only. Default: 250 on a GPU, else 50."""
    log_every: int = 10
    """Steps between log lines if the output is not a terminal; metrics.jsonl has every step."""
    remat: Remat | None = None
    """What a layer keeps for its backward pass. none: everything. swiglu: outputs of matmuls, attention and SwiGLU.
    dots: those without SwiGLU's. full: its input only. Default: dots; on a GPU the first of none, swiglu, dots that is
    estimated to fit."""
    unroll: int | None = None
    """Layers unrolled per step of the layer scan. Default: all with cudnn, else 1."""
    tensorboard: bool = False
    """Also write TensorBoard files into the run folder."""
    track: Literal["wandb", "trackio"] | None = None
    """Also send the metrics to Weights & Biases (WANDB_MODE=offline: into the run folder) or to trackio."""
    compare_with: Annotated[Path | None, tyro.conf.arg(aliases=["--reference"])] = None
    """Weights to evaluate on the same held-out text after training. Default: assets/SmolLM2-135M-Instruct, if it has
    been fetched. Their tokenizer must be the run's."""
    prompt: str = "The quick brown fox"
    """Text to continue at each validation and after the last step; "" starts a new document."""
    sample: bool = True
    """Also print the continuation at each validation."""
    debug: bool = False
    """Show a traceback instead of one line when something goes wrong."""

    def recipe_fields(self) -> dict[str, Any]:
        """The flags that were given (0 counts as given) and are fields of a `Recipe`."""
        values = {name: getattr(self, name) for name in RECIPE}
        return {name: value for name, value in values.items() if value is not None and value is not False}

    def interval_fields(self) -> dict[str, int]:
        """The flags that were given and are fields of `Intervals`."""
        return {name: value for name in INTERVALS if (value := getattr(self, name)) is not None}


_NAMES = {field.name for field in dataclasses.fields(TrainingFlags)}
RECIPE = tuple(field.name for field in dataclasses.fields(Recipe) if field.name in _NAMES)
INTERVALS = ("save_every", "eval_every")
GROUPS = {  # the titles under which --help shows the flags
    "run": ("recipe", "out", "resume", "allow_change", "allow_unverified", "debug"),
    "model": ("preset", "init_from", "tokenizer"),
    "data": ("data", "on_bad_text", "special_tokens", "mask_documents"),
    "batch": ("steps", "batch_size", "gradient_accumulation_steps", "sequence_length", "seed"),
    "optimizer": ("learning_rate", "schedule", "warmup_steps", "decay_fraction", "weight_decay"),
    "execution": ("dtype", "attention", "remat", "unroll"),
    "devices": ("mesh", "distributed", "coordinator_address", "num_processes", "process_id"),
    "saving": ("save_every", "keep_checkpoints", "async_save"),
    "logging": ("log_every", "tensorboard", "track"),
    "validation": ("eval_every", "compare_with", "prompt", "sample"),
}
