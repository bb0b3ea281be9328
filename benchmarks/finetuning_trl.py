"""TRL's trainers as benchmark backends: "trl" pads, "trl-packed" packs, "-compile" under torch.compile.

The trainer runs in a thread of its own and waits after each step, so that a unit of work is a number of its steps and
nothing of its start or end. Saving, logging and evaluation are off.
"""

import importlib
import tempfile
import threading
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import peft
import torch
import transformers

from benchmarks import finetuning
from benchmarks.compare import ROOT
from benchmarks.workload import Prepared, Workload, resident
from smollm_jax.config.finetune_recipe import LORA_TARGETS

trl: Any = importlib.import_module("trl")  # a type checker does not find what it exports


class Pace(transformers.TrainerCallback):
    """Lets the trainer take a step for each permit."""

    def __init__(self) -> None:
        self.permits, self.done = threading.Semaphore(0), threading.Semaphore(0)
        self.error: BaseException | None = None

    def train(self, trainer: Any) -> None:
        """Trains; an error is raised by the next `take`."""
        try:
            trainer.train()
        except BaseException as error:
            self.error = error
        self.done.release()

    def on_step_begin(self, args: Any, state: Any, control: Any, **others: Any) -> None:
        self.permits.acquire()

    def on_step_end(self, args: Any, state: Any, control: Any, **others: Any) -> None:
        self.done.release()

    def take(self, steps: int) -> None:
        """Waits until the trainer has taken so many steps."""
        for _ in range(steps):
            self.permits.release()
        for _ in range(steps):
            self.done.acquire()
            if self.error is not None:
                raise self.error


def prepare(name: str, workload: Workload, folder: Path) -> Prepared:
    """A unit of `finetuning.STEPS` steps of a trainer; `ready` has the loss of its first step."""
    gpu = torch.cuda.is_available()
    square = torch.ones(2048, 2048)

    def gemm() -> int:
        square @ square
        return 1

    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="sdpa")
    model.config.use_cache = False  # with a cache transformers would not separate the documents of a packed row
    trainer = make_trainer(name, workload, model, gpu)
    pace, measured = Pace(), {"tokens": 0, "loss": 0.0}
    trainer.add_callback(pace)
    step = trainer.training_step

    def training_step(model: Any, inputs: dict[str, Any], *others: Any, **options: Any) -> Any:
        if "labels" in inputs:
            measured["tokens"] += int((inputs["labels"][:, 1:] >= 0).sum())
        else:
            measured["tokens"] += int(inputs["completion_mask"][:, 1:].sum())
        loss = step(model, inputs, *others, **options)
        measured["loss"] = float(loss)
        return loss

    trainer.training_step = training_step
    threading.Thread(target=pace.train, args=(trainer,), daemon=True).start()
    pace.take(1)
    first = measured["loss"]

    def unit() -> dict[str, Any]:
        measured["tokens"] = 0
        pace.take(finetuning.STEPS)
        return {"tokens": measured["tokens"]}

    unit()
    ready = {"device": "cuda" if gpu else "cpu", "platform": "gpu" if gpu else "cpu", "losses": []}
    rows = "packed" if "packed" in name else "padded"
    return unit, gemm, ready | {"by_rows": {rows: first}, "peak_bytes": resident("VmHWM")}


def make_trainer(name: str, workload: Workload, model: Any, gpu: bool) -> Any:
    """TRL's trainer for a workload, its batches in the order of the data."""
    recipe = finetuning.recipe(workload, packing="packed" in name)
    settings: dict[str, Any] = {
        "output_dir": tempfile.mkdtemp(),
        "per_device_train_batch_size": recipe.batch_size,
        "max_steps": recipe.steps,
        "learning_rate": recipe.learning_rate,
        "lr_scheduler_type": "constant",
        "warmup_steps": 0,
        "max_length": recipe.sequence_length,
        "train_sampling_strategy": "sequential",
        "logging_steps": 10**9,
        "save_strategy": "no",
        "report_to": "none",
        "bf16": workload.dtype == "bfloat16",
        "use_cpu": not gpu,
        "gradient_checkpointing": False,
        "disable_tqdm": True,
        "torch_compile": "compile" in name,
    }
    tokenizer = transformers.AutoTokenizer.from_pretrained(ROOT / "assets/tokenizer", pad_token="<|endoftext|>")
    if workload.method == "dpo":
        rows = [
            {
                "prompt": tokenizer.decode(pair.chosen.ids[~pair.chosen.learnt]),
                "chosen": tokenizer.decode(pair.chosen.ids[pair.chosen.learnt]),
                "rejected": tokenizer.decode(pair.rejected.ids[pair.rejected.learnt]),
            }
            for pair in finetuning.pairs(workload)
        ]
        chosen = trl.DPOConfig(**settings, precompute_ref_log_probs=True)
        return trl.DPOTrainer(
            model, None, chosen, train_dataset=datasets.Dataset.from_list(rows), processing_class=tokenizer
        )
    examples = finetuning.examples(workload)
    columns = {
        "input_ids": [example.ids.tolist() for example in examples],
        "completion_mask": [example.learnt.astype(np.int64).tolist() for example in examples],
    }
    chosen = trl.SFTConfig(
        **settings, completion_only_loss=True, packing=recipe.packing, packing_strategy="bfd", shuffle_dataset=False
    )
    adapter = None
    if workload.method == "lora":
        adapter = peft.LoraConfig(
            r=finetuning.RANK,
            lora_alpha=2 * finetuning.RANK,
            lora_dropout=0.0,
            target_modules=list(LORA_TARGETS),
            task_type="CAUSAL_LM",
        )
    data = datasets.Dataset.from_dict(columns)
    return trl.SFTTrainer(model, chosen, train_dataset=data, processing_class=tokenizer, peft_config=adapter)
