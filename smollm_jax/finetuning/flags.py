"""The flags of `finetune.py`. Imports no JAX, so that --help is quick."""

import dataclasses
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from smollm_jax.config.finetune_recipe import FinetuneRecipe, Learn, Method, PairLoss
from smollm_jax.config.recipe import Remat, Schedule


@dataclasses.dataclass(frozen=True)
class Flags:
    """None: chosen by the device, the recipe or the run that is resumed."""

    data: tuple[str, ...] | None = None
    """Chats or other examples: .jsonl (.gz, .zst), .json or .parquet files, or folders of them. Recognized by their
    columns: messages, conversations, prompt and completion, instruction and output, or text; with --method dpo chosen
    and rejected. Several are one after another; as PATH:WEIGHT they are mixed, and each source has its share of the
    rows, which with --no-packing are examples and with --method dpo pairs. Default for a new run: the conversations
    that fetch_assets.py chats brings into assets/chats."""
    weights: Annotated[Path | None, tyro.conf.arg(aliases=("--init-from",))] = None
    """Weights to start from, of any kind that convert_weights.py reads. Default: assets/SmolLM2-135M-Instruct."""
    recipe: str | None = None
    """A run's numbers, which the flags below override: laptop-sft (default), smollm2-sft, laptop-dpo or smollm2-dpo
    (smollm_jax/config/finetune_recipe.py)."""
    method: Method | None = None
    """sft (default): the answers' tokens are learnt. dpo: of two answers the chosen one becomes likelier than the
    rejected one, measured from the weights that the run starts from."""
    out: Path | None = None
    """Run folder; default: runs/<time>-<method>, or with --resume the newest run under runs/."""
    resume: bool = False
    """Go on from the run's newest verified checkpoint, under the run's own recipe."""
    allow_change: tuple[str, ...] = ()
    """With --resume: what may differ from the saved run, by name (learning_rate, data ...)."""
    allow_unverified: bool = False
    """With --resume: take a checkpoint that has no integrity.json."""
    learn: Learn | None = None
    """Which tokens are learnt: assistant, each of the assistant's turns with the token that ends it (default);
    completion, the last of them; all."""
    show_mask: int = 0
    """Print so many examples token by token, what is learnt in green between brackets, and end: nothing is trained."""
    packing: bool = True
    """Several examples in one row, which do not see each other; --no-packing: one example a row."""
    validation_fraction: float | None = None
    """Share of the examples that is held out, drawn by the seed; default 0.05, and 0 with --eval-every 0."""
    on_bad_text: Literal["stop", "skip", "replace"] = "stop"
    """What becomes of a text that has no tokens, as in prepare_data.py."""
    steps: int | None = None
    """Optimizer steps in all; default: the recipe's epochs of the data, for laptop-sft 3 and at most 60 steps."""
    batch_size: int | None = None
    """Rows a step."""
    gradient_accumulation_steps: int | None = None
    """Micro-batches a batch is computed in, one after another, to save memory; default 1."""
    sequence_length: int | None = None
    """Tokens a row; a longer example loses its end."""
    learning_rate: float | None = None
    """Peak; the recipe's."""
    schedule: Schedule | None = None
    """After the warm-up: linear to 0 (default), cosine, constant, or wsd."""
    warmup_steps: int | None = None
    """Steps of linear warm-up; default the recipe's share of the steps."""
    lora_rank: int | None = None
    """Train a LoRA adapter of this rank, for example 16, and leave the weights as they are; RUN/adapter is the newest
    adapter in peft's files. Default: all parameters are trained."""
    lora_alpha: float | None = None
    """The adapter is multiplied by alpha / rank; default: twice the rank."""
    lora_targets: str | None = None
    """The projections that get an adapter: all-linear (default), or names separated by commas: q_proj,v_proj."""
    rslora: bool = False
    """Multiply by alpha / sqrt(rank) instead."""
    lora_dropout: float | None = None
    """The share of the adapter's inputs that are set to zero at random in training, for example 0.05, the others being
    scaled up to make up for it; none in validation, in DPO's reference and in generation. Default: 0."""
    init_adapter: Path | None = None
    """Start from this adapter, RUN/adapter or another folder in peft's layout, with its rank, alpha and targets, and
    its dropout unless --lora-dropout is given."""
    beta: float | None = None
    """DPO: how strongly the model is held to the weights it starts from; default 0.1."""
    loss_type: PairLoss | None = None
    """DPO: sigmoid (default), ipo, apo_zero, or robust."""
    label_smoothing: float | None = None
    """DPO with --loss-type robust: the share of pairs whose two answers are taken to be swapped; default 0."""
    weight_decay: float | None = None
    """Decoupled, on all parameters but the norms' scales; default 0."""
    adam_beta2: float | None = None
    """AdamW's second decay rate; default 0.999."""
    mesh: str | None = None
    """Devices to train on: data=8, fsdp=8 or data=4,fsdp=2. Default: one device."""
    dtype: Literal["bfloat16", "float32"] | None = None
    """Of the matrix products; weights and optimizer state are float32. Default: bfloat16 on a GPU or a CPU that
    multiplies it fast (AVX-512 BF16, AMX), else float32."""
    seed: int | None = None
    """Of the order of the data and of what is held out; default 0."""
    attention: Literal["xla", "cudnn"] | None = None
    """Default: cudnn on a CUDA GPU in bfloat16, where it takes the length, else xla."""
    remat: Remat | None = None
    """What a layer keeps for its backward pass, as in train_jax.py."""
    unroll: int | None = None
    """Layers unrolled per step of the layer scan; default: all with cudnn, else 1."""
    save_every: int | None = None
    """Steps between checkpoints; default 500 on a GPU, 100 without. The last step is always saved."""
    keep_checkpoints: Annotated[int, tyro.conf.arg(aliases=("--keep",))] = 2
    """Number of checkpoints to keep, the newest."""
    async_save: bool = False
    """Write checkpoints in the background, from a copy of the state in memory."""
    eval_every: int | None = None
    """Steps between validations on held-out examples; 0: none, and all examples are trained on. Default 250 on a GPU,
    20 without."""
    log_every: int = 10
    """Steps between lines when the output is no terminal; metrics.jsonl has every step."""
    tensorboard: bool = False
    """Also write TensorBoard files into the run folder."""
    track: Literal["wandb", "trackio"] | None = None
    """Also send what metrics.jsonl gets to Weights & Biases (WANDB_MODE=offline: into the run folder) or to trackio."""
    prompt: tuple[str, ...] = ()
    """Questions that are answered before and after training; default: those of three held-out examples."""
    debug: bool = False
    """Show a traceback instead of one line when something goes wrong."""

    def recipe_fields(self) -> dict[str, Any]:
        """The fields of a `FinetuneRecipe` that were given; 0 is given, too."""
        given = {name: getattr(self, name) for name in RECIPE} | {"beta2": self.adam_beta2}
        # A switch that was not given is the default, or that of the run that is resumed.
        given |= {"packing": None if self.packing else False, "rslora": self.rslora or None}
        return {name: value for name, value in given.items() if value is not None}

    def interval_fields(self) -> dict[str, int]:
        """The fields of an `Intervals` that were given."""
        return {name: value for name in ("save_every", "eval_every") if (value := getattr(self, name)) is not None}


_NAMES = {field.name for field in dataclasses.fields(Flags)}
RECIPE = tuple(field.name for field in dataclasses.fields(FinetuneRecipe) if field.name in _NAMES)
GROUPS = {  # the titles under which --help shows the flags
    "run": ("data", "weights", "recipe", "method", "out", "resume", "allow_change", "allow_unverified", "debug"),
    "examples": ("learn", "show_mask", "packing", "validation_fraction", "on_bad_text"),
    "batch": ("steps", "batch_size", "gradient_accumulation_steps", "sequence_length", "seed"),
    "optimizer": ("learning_rate", "schedule", "warmup_steps", "weight_decay", "adam_beta2"),
    "LoRA": ("lora_rank", "lora_alpha", "lora_targets", "rslora", "lora_dropout", "init_adapter"),
    "DPO": ("beta", "loss_type", "label_smoothing"),
    "computing": ("mesh", "dtype", "attention", "remat", "unroll"),
    "saving": ("save_every", "keep_checkpoints", "async_save"),
    "logging": ("log_every", "tensorboard", "track", "eval_every", "prompt"),
}
