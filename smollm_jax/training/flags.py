"""What `train_jax.py` may be told, as its flags. Imports no JAX, so that --help is quick."""

import dataclasses
from pathlib import Path
from typing import Any, Literal

from smollm_jax.config.recipe import Recipe, Remat


@dataclasses.dataclass(frozen=True)
class TrainingFlags:
    """None: chosen by the device, the recipe or the run that goes on."""

    recipe: str | None = None
    """A whole run's preset and numbers, which the flags below override: demo, gpu-demo, one-gpu-day, smollm2-135m or
    smollm2-135m-long (smollm_jax/config/named_runs.py). Default: demo, or on a GPU gpu-demo."""
    preset: str | None = None
    """Model to train from scratch: see smollm_jax/config/presets.py; default the recipe's, smollm2-135m-pretrain."""
    data: tuple[str, ...] | None = None
    """Prepared data sets (prepare_data.py), or text as it takes it, which is prepared under data/. Several are read as
    one, or in the proportion of weights: --data data/web:0.6 data/code:0.4. Default: assets/sotu."""
    on_bad_text: Literal["stop", "skip", "replace"] = "stop"
    """Of --data that is text: what becomes of a document without tokens, as in prepare_data.py."""
    special_tokens: bool = False
    """Of --data that is text: a special token written in it, such as <|im_start|>, is one; give it again to resume."""
    tokenizer: Path | None = None
    """Folder with tokenizer.json (or a GGUF), for --init-from weights that have none of their own. Without --init-from
    the default is assets/tokenizer."""
    init_from: Path | None = None
    """Start from these weights (any kind convert_weights.py reads) instead of the recipe's init. They are validated
    before the first step."""
    out: Path | None = None
    """Run folder; default: runs/<time>-<preset>, or with --resume the newest run under runs/."""
    resume: bool = False
    """Go on from the run's newest verified checkpoint, under the run's own recipe."""
    allow_change: tuple[str, ...] = ()
    """With --resume: what may differ from the saved run, by name (learning_rate, data, rope_theta ...). The batch of
    step n is that of the new recipe's step n."""
    allow_unverified: bool = False
    """With --resume: take a checkpoint that has no integrity.json."""
    steps: int | None = None
    """Optimizer steps in all."""
    batch_size: int | Literal["auto"] | None = None
    """Sequences a step; auto: the most that fit under --remat, or dots without it. A resumed run keeps its number."""
    gradient_accumulation_steps: int | None = None
    """Parts a batch is computed in, one after another, to save memory; default 1."""
    sequence_length: int | None = None
    """Tokens a sequence."""
    learning_rate: float | None = None
    """Peak; default 1e-3, and with --init-from 3e-5, for what suits new parameters damages trained ones. A recipe's own
    peak counts where the recipe was made for such a start."""
    schedule: Literal["wsd", "cosine"] | None = None
    """Warmup-stable-decay (default), or cosine."""
    warmup_steps: int | None = None
    """Default: 5 % of the steps; with --init-from at least 10, or half of a run of fewer than 20 steps."""
    decay_fraction: float | None = None
    """Share of the steps, at the end, in which wsd goes to 0; default 0.2."""
    weight_decay: float | None = None
    """Decoupled, on all parameters; default 0.01."""
    mask_documents: bool = False
    """Let tokens see their own document only, positions from 0 in each; the recipe's windows run across borders."""
    mesh: str | None = None
    """Devices to train on: data=8, fsdp=8 or data=4,fsdp=2; fsdp shares parameters and moments out. Default: one
    device, or with --distributed all of them along data."""
    distributed: bool = False
    """One of several processes of a run, met through Slurm, MPI or the three flags below; needs --out and prepared
    --data that all of them see."""
    coordinator_address: str | None = None
    """HOST:PORT where the first process listens."""
    num_processes: int | None = None
    """How many processes there are."""
    process_id: int | None = None
    """Which of them this is, from 0."""
    dtype: Literal["bfloat16", "float32"] | None = None
    """Of the matrix products; weights and moments are float32. Default: the recipe's; of "demo" bfloat16 on a GPU or a
    CPU that multiplies it fast (AVX-512 BF16, AMX), else float32."""
    seed: int | None = None
    """Of the init and of the order of the data; default 0."""
    attention: Literal["xla", "cudnn"] | None = None
    """Default: cudnn on a CUDA GPU in bfloat16, where it takes the length and --mask-documents, else xla."""
    save_every: int | None = None
    """Steps between checkpoints; default 500 on a GPU, 100 without. The last step is always saved."""
    keep: int = 2
    """Newest checkpoints that are kept."""
    async_save: bool = False
    """Write checkpoints while training goes on, from a copy of the state in memory."""
    eval_every: int | None = None
    """Steps between validations on held-out text, 0: after the last step only; default 250 on a GPU, 50 without."""
    log_every: int = 10
    """Steps between lines when the output is no terminal; metrics.jsonl has every step."""
    remat: Remat | None = None
    """What a layer keeps for its backward pass: all; the results of matrix products, attention and SwiGLU; those but
    SwiGLU's; its input. Default: dots, on a GPU the first of none, swiglu, dots that is planned to fit."""
    unroll: int | None = None
    """Layers unrolled per step of the layer scan; default: all with cudnn, else 1."""
    tensorboard: bool = False
    """Also write TensorBoard files into the run folder."""
    track: Literal["wandb", "trackio"] | None = None
    """Also send what metrics.jsonl gets to Weights & Biases (WANDB_MODE=offline: into the run folder) or to trackio."""
    reference: Path | None = None
    """Weights to measure on the same held-out text at the end, for scale; default: assets/SmolLM2-135M-Instruct, where
    it has been fetched. Their tokenizer must be the run's."""
    prompt: str = "The quick brown fox"
    """Continued at each validation and after the last step; "" begins from nothing."""
    sample: bool = True
    """Print the prompt's continuation at each validation, too."""
    debug: bool = False
    """Show a traceback instead of one line when something goes wrong."""

    def recipe_fields(self) -> dict[str, Any]:
        """Those that were given of what a `Recipe` or its `resolve` takes; 0 is given, too."""
        given = {name: getattr(self, name) for name in RECIPE}
        return {name: value for name, value in given.items() if value is not None and value is not False}

    def cadence_fields(self) -> dict[str, int]:
        """Those that were given of a `Cadence`."""
        return {name: value for name in CADENCE if (value := getattr(self, name)) is not None}


_NAMES = {field.name for field in dataclasses.fields(TrainingFlags)}
RECIPE = tuple(field.name for field in dataclasses.fields(Recipe) if field.name in _NAMES)
CADENCE = ("save_every", "eval_every")
GROUPS = {  # the titles under which --help shows the flags
    "run": ("recipe", "out", "resume", "allow_change", "allow_unverified", "debug"),
    "model": ("preset", "init_from", "tokenizer"),
    "data": ("data", "on_bad_text", "special_tokens", "mask_documents"),
    "batch": ("steps", "batch_size", "gradient_accumulation_steps", "sequence_length", "seed"),
    "optimizer": ("learning_rate", "schedule", "warmup_steps", "decay_fraction", "weight_decay"),
    "computing": ("dtype", "attention", "remat", "unroll"),
    "devices": ("mesh", "distributed", "coordinator_address", "num_processes", "process_id"),
    "saving": ("save_every", "keep", "async_save"),
    "logging": ("log_every", "tensorboard", "track"),
    "validation": ("eval_every", "reference", "prompt", "sample"),
}
