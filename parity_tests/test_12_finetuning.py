"""Rung 12: from the same weights on the same batches, fine-tuning takes the steps of TRL's trainers."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from smollm_jax import weights
from smollm_jax.config.finetune_recipe import FinetuneRecipe
from smollm_jax.data.examples.examples import Example
from smollm_jax.data.examples.packing import packed, padded
from smollm_jax.finetuning.batches import RowBatches
from smollm_jax.finetuning.objectives import LearntTokens
from smollm_jax.training import optimizer
from smollm_jax.training.execution import ExecutionConfig
from smollm_jax.training.loss import mean_gradients
from smollm_jax.training.state import init_model, init_train_state
from smollm_jax.training.train_step import train_step
from smollm_parity.ladder import precisely
from smollm_parity.tolerances import FINETUNING_FLOAT32, FINETUNING_FLOAT64, PACKED_LOSS, within
from smollm_parity.torch_backend import load_transformers

trl = pytest.importorskip("trl")
STEPS, LENGTH, ROWS = 20, 48, 4


@pytest.fixture(scope="module")
def examples(tiny):
    """Random tokens of lengths from 8 to 48, of which a stretch at the end is learnt."""
    draw = np.random.default_rng(0)
    lengths = draw.integers(8, LENGTH + 1, STEPS * ROWS)
    return [
        Example(draw.integers(3, tiny.vocab_size, n).astype(np.int32), np.arange(n) >= draw.integers(1, n - 1))
        for n in lengths
    ]


@pytest.fixture(scope="module")
def handed_over(tiny, tmp_path_factory):
    """Fresh weights of the tiny shape as a Hugging Face folder."""
    folder = tmp_path_factory.mktemp("finetuning") / "tiny"
    weights.write(folder, weights.to_bundle(init_model(tiny, seed=0)), "hf")
    return folder


def recipe(dtype="float32", **changes):
    base = FinetuneRecipe(
        steps=STEPS, batch_size=ROWS, sequence_length=LENGTH, learning_rate=1e-3, warmup_steps=2, dtype=dtype
    )
    return dataclasses.replace(base, weight_decay=0.1, packing=False, **changes)


def in_order(examples, recipe):
    """The batches of one epoch in the order of the examples."""
    rows = (packed if recipe.packing else padded)(examples, recipe.sequence_length)
    for start in range(0, len(rows), recipe.batch_size):
        part = rows[start : start + recipe.batch_size]
        yield {"tokens": part.tokens, "targets": part.targets, "documents": part.documents}


def our_losses(folder, examples, recipe):
    with precisely(recipe.dtype):
        model = weights.load(folder, recipe.dtype)[0]
        tx, losses = optimizer.adamw(recipe), []
        execution = ExecutionConfig(recipe.dtype, accumulation_steps=recipe.gradient_accumulation_steps)
        state = init_train_state(model, tx)
        for batch in in_order(examples, recipe):
            batch = jax.tree.map(jnp.asarray, batch)
            state, metrics = train_step(state, batch, tx=tx, execution=execution, objective=LearntTokens())
            losses.append(float(metrics["loss"]))
    return np.array(losses)


def arguments(recipe, folder, **changes):
    """TRL's for our recipe: one device, no dropout, each batch in the order of the data."""
    micro = recipe.batch_size // recipe.gradient_accumulation_steps
    return {
        "output_dir": str(folder),
        "per_device_train_batch_size": micro,
        "gradient_accumulation_steps": recipe.gradient_accumulation_steps,
        "max_steps": recipe.steps,
        "learning_rate": recipe.learning_rate,
        "lr_scheduler_type": recipe.schedule,
        "warmup_steps": recipe.warmup_steps,
        "weight_decay": recipe.weight_decay,
        "max_length": recipe.sequence_length,
        "train_sampling_strategy": "sequential",
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "bf16": False,
        "use_cpu": True,
        "gradient_checkpointing": False,
        "disable_tqdm": True,
    } | changes


def logged_losses(trainer):
    """The losses of every step, as the trainer returns them and not as it rounds them."""
    losses, step = [], trainer.training_step
    micro = trainer.args.gradient_accumulation_steps

    def training_step(*inputs, **options):
        losses.append(float(step(*inputs, **options)))
        return torch.tensor(losses[-1])

    trainer.training_step = training_step
    trainer.train()
    return np.array(losses).reshape(-1, micro).sum(1)


def their_losses(folder, tokenizer_path, examples, recipe, out, loaded=lambda: None):
    import datasets
    import transformers

    tokenizer = transformers.AutoTokenizer.from_pretrained(tokenizer_path, pad_token="<|endoftext|>")
    columns = {
        "input_ids": [example.ids.tolist() for example in examples],
        "completion_mask": [example.learnt.astype(int).tolist() for example in examples],
    }
    model = load_transformers(folder, dtype=getattr(torch, recipe.dtype))
    loaded()
    chosen = trl.SFTConfig(**arguments(recipe, out, completion_only_loss=True, packing=False, shuffle_dataset=False))
    data = datasets.Dataset.from_dict(columns)
    return logged_losses(trl.SFTTrainer(model, chosen, train_dataset=data, processing_class=tokenizer))


@pytest.mark.parametrize("micro_batches", [1, 2])
def test_twenty_steps_of_supervised_fine_tuning(handed_over, tokenizer_path, examples, tmp_path, micro_batches):
    chosen = recipe(gradient_accumulation_steps=micro_batches)
    theirs = their_losses(handed_over, tokenizer_path, examples, chosen, tmp_path)
    ours = our_losses(handed_over, examples, chosen)
    within(np.abs(ours / theirs - 1).max(), FINETUNING_FLOAT32, f"loss of 20 SFT steps, {micro_batches} micro-batches")
    assert np.abs(ours - theirs[::-1]).max() > 0.01, "all losses are alike: any step would do"


def test_twenty_steps_of_supervised_fine_tuning_in_float64(
    handed_over, tokenizer_path, examples, tmp_path, monkeypatch
):
    """transformers computes norms, softmax and loss in float32 by name: those names stand for float64 here."""
    chosen = recipe("float64")
    ours = our_losses(handed_over, examples, chosen)

    def widen():
        for name in ("float32", "float"):
            monkeypatch.setattr(torch, name, torch.float64)
        monkeypatch.setattr(torch.Tensor, "float", torch.Tensor.double)

    theirs = their_losses(handed_over, tokenizer_path, examples, chosen, tmp_path, widen)
    within(np.abs(ours / theirs - 1).max(), FINETUNING_FLOAT64, "loss of 20 SFT steps, float64")


def test_packed_rows_have_the_loss_of_separate_ones(tiny, examples):
    model, objective = init_model(tiny, seed=0), LearntTokens()
    execution = ExecutionConfig("float32")
    sums = []
    for lay in (packed, padded):
        rows = lay(examples[:16], LENGTH)
        batch = {"tokens": rows.tokens, "targets": rows.targets, "documents": rows.documents}
        batch = jax.tree.map(jnp.asarray, batch)
        with precisely("float32"):
            sums.append(jax.jit(mean_gradients, static_argnums=(2, 4))(model, batch, execution, None, objective))
    ((packed_loss, _), packed_gradient), ((loss, _), gradient) = sums
    assert len(packed(examples[:16], LENGTH)) < 16
    within(abs(packed_loss / loss - 1), PACKED_LOSS, "loss of packed examples against separate ones")
    norm = lambda tree: float(jnp.sqrt(sum(jnp.square(x).sum() for x in jax.tree.leaves(tree))))  # noqa: E731
    difference = jax.tree.map(jnp.subtract, packed_gradient, gradient)
    within(norm(difference) / norm(gradient), 10 * PACKED_LOSS, "gradient of packed examples against separate ones")


def test_every_row_is_seen_once_an_epoch(examples):
    chosen = recipe(seed=3)
    batches = RowBatches(padded(examples, LENGTH), padded([], LENGTH), chosen)
    epochs = range(STEPS), range(STEPS, 2 * STEPS)
    first, second = ([name for step in steps for name in batches.windows_of(step)] for steps in epochs)
    assert sorted(first) == sorted(second)
    assert len(set(first)) == len(examples)
    assert first != second
