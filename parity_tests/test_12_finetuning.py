"""Rung 12: from the same weights on the same batches, fine-tuning takes the steps of TRL's trainers."""

import dataclasses
import functools
import json
import re
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
import torch

from smollm_jax import weights
from smollm_jax.config.finetune_recipe import FinetuneRecipe
from smollm_jax.data.examples.examples import Example, read_pairs
from smollm_jax.data.examples.packing import packed, padded, paired
from smollm_jax.finetuning import lora
from smollm_jax.finetuning.batches import RowBatches
from smollm_jax.finetuning.lora import Adapted
from smollm_jax.finetuning.objectives import LearntTokens, PreferencePairs, answer_log_probs
from smollm_jax.model.smollm import dropped
from smollm_jax.tokenizer import Tokenizer
from smollm_jax.training import optimizer
from smollm_jax.training.execution import ExecutionConfig
from smollm_jax.training.loss import mean_gradients
from smollm_jax.training.state import init_model, init_train_state
from smollm_jax.training.train_step import train_step
from smollm_jax.weights.adapter import TENSORS, read_adapter, write_adapter
from smollm_parity.ladder import precisely
from smollm_parity.tolerances import (
    FINETUNING_FLOAT32,
    FINETUNING_FLOAT64,
    LORA_GRADIENTS,
    LORA_LOGITS,
    PACKED_LOSS,
    PREFERENCE_GRADIENTS,
    PREFERENCE_LOGPS,
    within,
)
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
    return dataclasses.replace(base, **{"weight_decay": 0.1, "packing": False} | changes)


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


def their_losses(folder, tokenizer_path, examples, recipe, out, loaded=lambda: None, model=None):
    import datasets
    import transformers

    tokenizer = transformers.AutoTokenizer.from_pretrained(tokenizer_path, pad_token="<|endoftext|>")
    columns = {
        "input_ids": [example.ids.tolist() for example in examples],
        "completion_mask": [example.learnt.astype(int).tolist() for example in examples],
    }
    model = load_transformers(folder, dtype=getattr(torch, recipe.dtype)) if model is None else model
    loaded()
    chosen = trl.SFTConfig(**arguments(recipe, out, completion_only_loss=True, packing=False, shuffle_dataset=False))
    data = datasets.Dataset.from_dict(columns)
    return logged_losses(trl.SFTTrainer(model, chosen, train_dataset=data, processing_class=tokenizer))


@pytest.mark.parametrize("micro_batches", [2, pytest.param(1, marks=pytest.mark.slow)])
def test_twenty_steps_of_supervised_fine_tuning(handed_over, tokenizer_path, examples, tmp_path, micro_batches):
    chosen = recipe(gradient_accumulation_steps=micro_batches)
    theirs = their_losses(handed_over, tokenizer_path, examples, chosen, tmp_path)
    ours = our_losses(handed_over, examples, chosen)
    within(np.abs(ours / theirs - 1).max(), FINETUNING_FLOAT32, f"loss of 20 SFT steps, {micro_batches} micro-batches")
    assert np.abs(ours - theirs[::-1]).max() > 0.01, "all losses are alike: any step would do"


@pytest.mark.slow
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
    batches = RowBatches([(padded(examples, LENGTH), padded([], LENGTH))], chosen)
    epochs = range(STEPS), range(STEPS, 2 * STEPS)
    first, second = ([name for step in steps for name in batches.windows_of(step)] for steps in epochs)
    assert sorted(first) == sorted(second)
    assert len(set(first)) == len(examples)
    assert first != second


# ------------------------------------------------------------------------------------------------- LoRA against peft

LORAS = {"all-linear": {}, "q and v, rslora": {"lora_targets": "q_proj,v_proj", "rslora": True}}


@pytest.fixture(params=["all-linear", pytest.param("q and v, rslora", marks=pytest.mark.slow)])
def adapted(request, tiny, handed_over, tmp_path):
    """A recipe with LoRA, an adapter whose B is not zero, and its folder in peft's layout."""
    peft = pytest.importorskip("peft")
    chosen = recipe(**({"lora_rank": 4, "lora_alpha": 6.0} | LORAS[request.param]))
    draw = np.random.default_rng(1)
    pairs = lora.init_pairs(tiny, chosen)
    pairs = {
        target: pair | {"b": jnp.asarray(draw.normal(0, 0.05, pair["b"].shape), jnp.float32)}
        for target, pair in pairs.items()
    }
    folder = tmp_path / "adapter"
    write_adapter(folder, lora.adapter_of(pairs, chosen, str(handed_over)))
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)  # peft warns of keys that do not fit, and goes on
        base = load_transformers(handed_over, dtype=torch.float32)
        theirs = peft.PeftModel.from_pretrained(base, folder, is_trainable=True)
    return chosen, pairs, folder, theirs


def test_an_adapter_computes_what_it_does_in_peft(adapted, handed_over, examples):
    chosen, pairs, folder, theirs = adapted
    (batch, *_) = in_order(examples, chosen)
    tokens, targets = (torch.from_numpy(batch[name].astype(np.int64)) for name in ("tokens", "targets"))
    with precisely("float32"):
        bundle = weights.read(handed_over)
        base, scale = weights.from_bundle(bundle), lora.scale_of(chosen)
        logits = lora.with_pairs(base, pairs, scale)(batch["tokens"])
        plain, merged = base(batch["tokens"]), lora.merge(base, pairs, scale)(batch["tokens"])
        read = weights.from_bundle(weights.read(folder))(batch["tokens"])
        (loss, _), gradients = jax.jit(mean_gradients, static_argnums=(2, 4))(
            pairs, jax.tree.map(jnp.asarray, batch), ExecutionConfig("float32"), None,
            Adapted(LearntTokens(), scale), base,
        )  # fmt: skip
    their_logits = theirs(tokens).logits
    their_loss = torch.nn.functional.cross_entropy(their_logits.flatten(0, 1), targets.flatten(), ignore_index=-1)
    their_loss.backward()
    largest = np.abs(logits).max()
    assert np.abs(logits - plain).max() > 0.01 * largest, "the adapter does nothing: anything would agree"
    within(np.abs(logits - their_logits.detach().numpy()).max() / largest, LORA_LOGITS, "logits with an adapter")
    within(np.abs(merged - logits).max() / largest, LORA_LOGITS, "logits with an adapter merged")
    within(np.abs(read - merged).max() / largest, LORA_LOGITS, "logits of peft's folder read as weights")
    within(abs(float(loss) / float(their_loss.detach()) - 1), 1e-6, "loss with an adapter")
    compare_gradients(theirs, gradients, "")


def compare_gradients(theirs, gradients, note):
    parameters = {name.replace(".default", ""): p for name, p in theirs.named_parameters() if p.requires_grad}
    assert len(parameters) == 2 * len(gradients) * len(next(iter(gradients.values()))["a"])
    for name, parameter in parameters.items():
        layer, target, side = re.search(r"layers\.(\d+)\.\w+\.(\w+)\.lora_([AB])", name).groups()
        ours, grad = gradients[target][side.lower()][int(layer)], parameter.grad.numpy()
        within(np.linalg.norm(ours - grad) / np.linalg.norm(grad), LORA_GRADIENTS, f"gradient of {name}{note}")


class OurMasks(torch.nn.Module):
    """Stands for peft's dropout of one projection, with the mask that we draw for it."""

    def __init__(self, factors):
        super().__init__()
        self.factors = torch.from_numpy(np.array(factors))

    def forward(self, x):
        return x * self.factors


def test_dropout_acts_where_it_does_in_peft(adapted, handed_over, examples):
    chosen, pairs, _, theirs = adapted
    chosen = dataclasses.replace(chosen, lora_dropout=0.3)
    batch = RowBatches([(padded(examples, LENGTH), padded([], LENGTH))], chosen).batch(0)
    tokens, targets = (torch.from_numpy(batch[name].astype(np.int64)) for name in ("tokens", "targets"))
    keys, scale = batch["dropout_keys"], lora.scale_of(chosen)
    for name, module in theirs.named_modules():
        if place := re.search(r"layers\.(\d+)\.\w+\.(\w+)\.lora_dropout$", name):
            layer, target = int(place[1]), place[2]
            ones = jnp.ones((ROWS, LENGTH, pairs[target]["a"].shape[-1]))
            mask_keys = lora.dropout_keys(keys, target, len(pairs[target]["a"]))[layer]
            module["default"] = OurMasks(dropped(ones, mask_keys, chosen.lora_dropout))
    with precisely("float32"):
        base = weights.load(handed_over)[0]
        logits = lora.with_pairs(base, pairs, scale, chosen.lora_dropout, keys)(batch["tokens"])
        plain = lora.with_pairs(base, pairs, scale)(batch["tokens"])
        (loss, _), gradients = jax.jit(mean_gradients, static_argnums=(2, 4))(
            pairs, jax.tree.map(jnp.asarray, batch), ExecutionConfig("float32"), None,
            Adapted(LearntTokens(), scale, chosen.lora_dropout), base,
        )  # fmt: skip
    their_logits = theirs(tokens).logits
    their_loss = torch.nn.functional.cross_entropy(their_logits.flatten(0, 1), targets.flatten(), ignore_index=-1)
    their_loss.backward()
    largest = np.abs(logits).max()
    assert np.abs(logits - plain).max() > 0.01 * largest, "no dropout: anything would agree"
    within(np.abs(logits - their_logits.detach().numpy()).max() / largest, LORA_LOGITS, "logits with dropout")
    within(abs(float(loss) / float(their_loss.detach()) - 1), 1e-6, "loss with dropout")
    compare_gradients(theirs, gradients, " with dropout")


def test_twenty_steps_of_lora(adapted, handed_over, tokenizer_path, examples, tmp_path):
    chosen, pairs, _, theirs = adapted
    with precisely("float32"):
        base, tx, ours = weights.load(handed_over)[0], optimizer.adamw(chosen), []
        state = init_train_state(pairs, tx)
        objective = Adapted(LearntTokens(), lora.scale_of(chosen))
        for batch in in_order(examples, chosen):
            options = {"tx": tx, "execution": ExecutionConfig("float32"), "objective": objective}
            state, metrics = train_step(state, jax.tree.map(jnp.asarray, batch), base, **options)
            ours.append(float(metrics["loss"]))
    losses = their_losses(handed_over, tokenizer_path, examples, chosen, tmp_path / "trl", model=theirs)
    within(np.abs(np.array(ours) / losses - 1).max(), FINETUNING_FLOAT32, "loss of 20 LoRA steps")
    # What peft saves then is read here, and written again to the same bits.
    theirs.save_pretrained(tmp_path / "theirs")
    read = read_adapter(tmp_path / "theirs", base.config)
    write_adapter(tmp_path / "ours", read)
    saved, again = (safetensors.numpy.load_file(tmp_path / side / TENSORS) for side in ("theirs", "ours"))
    assert saved.keys() == again.keys()
    assert all(saved[name].tobytes() == again[name].tobytes() for name in saved)


def test_an_adapter_begins_as_pefts(tiny):
    stats = pytest.importorskip("scipy.stats")
    chosen = recipe(lora_rank=8, lora_alpha=8.0)
    for target, pair in lora.init_pairs(tiny, chosen).items():
        scaled = np.asarray(pair["a"]).ravel() * pair["a"].shape[-1] ** 0.5
        assert stats.kstest(scaled, "uniform", args=(-1, 2)).pvalue > 0.01, target
        assert not np.any(pair["b"])


# ----------------------------------------------------------------------------------------------- DPO against DPOTrainer

LOSSES = {"sigmoid": 0.0, "ipo": 0.0, "apo_zero": 0.0, "robust": 0.1}
PAIR_STEPS, PAIRS = 6, 4


@pytest.fixture(scope="module")
def preferences(tmp_path_factory):
    """Pairs of texts of many lengths, two of them longer than the context."""
    draw = np.random.default_rng(3)
    words = ["the", "state", "of", "our", "union", "is", "strong", "and", "people", "share", "what", "they", "made"]

    def text(low, high):
        return " ".join(draw.choice(words, draw.integers(low, high)))

    file = tmp_path_factory.mktemp("preferences") / "pairs.jsonl"
    rows = [{"prompt": text(2, 9), "chosen": " " + text(1, 20), "rejected": " " + text(1, 20)} for _ in range(24)]
    rows[5]["chosen"] += " " + text(60, 70)
    rows[11]["rejected"] += " " + text(60, 70)
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


@pytest.fixture(scope="module")
def reference_weights(tiny, tmp_path_factory):
    """Other weights than the policy's, so that no log-ratio is zero at the first step."""
    folder = tmp_path_factory.mktemp("reference") / "tiny"
    weights.write(folder, weights.to_bundle(init_model(tiny, seed=1)), "hf")
    return folder


def pair_recipe(**changes):
    return recipe(steps=PAIR_STEPS, batch_size=PAIRS, method="dpo", beta=0.3, **changes)


def pair_batches(folder, tokenizer_path, preferences, chosen):
    """The batches in the order of the file, with the log-probabilities of the reference."""
    pairs, report = read_pairs([preferences], Tokenizer.load(tokenizer_path), max_length=chosen.sequence_length)
    assert report.truncated == 2
    rows, reference = paired(pairs, chosen.sequence_length), weights.load(folder)[0]
    for start in range(0, len(rows), PAIRS):
        batch = jax.tree.map(jnp.asarray, rows[start : start + PAIRS].arrays())
        batch["reference"] = jax.jit(answer_log_probs, static_argnums=2)(reference, batch, ExecutionConfig("float32"))
        yield batch


def dpo_trainer(handed_over, reference_weights, tokenizer_path, preferences, chosen, out, **changes):
    """TRL's trainer, and the gradients of its first step, which it fills in."""
    import datasets
    import transformers

    tokenizer = transformers.AutoTokenizer.from_pretrained(tokenizer_path, pad_token="<|endoftext|>")
    policy, reference = (load_transformers(path, dtype=torch.float32) for path in (handed_over, reference_weights))
    settings = trl.DPOConfig(
        **arguments(chosen, out) | changes,
        loss_type=[chosen.loss_type],
        beta=chosen.beta,
        label_smoothing=chosen.label_smoothing,
    )
    data = datasets.load_dataset("json", data_files=str(preferences), split="train", cache_dir=str(out / "cache"))
    trainer = trl.DPOTrainer(policy, reference, settings, train_dataset=data, processing_class=tokenizer)
    gradients, step = {}, trainer.training_step

    def first_step(model, *inputs, **options):
        loss = step(model, *inputs, **options)
        if not gradients:
            gradients.update({name: p.grad.clone().numpy() for name, p in model.named_parameters()})
        return loss

    trainer.training_step = first_step
    return trainer, gradients


@pytest.mark.parametrize(
    "loss_type", [name if name == "sigmoid" else pytest.param(name, marks=pytest.mark.slow) for name in LOSSES]
)
def test_steps_of_preference_optimization(
    handed_over, reference_weights, tokenizer_path, preferences, tmp_path, loss_type
):
    chosen = pair_recipe(loss_type=loss_type, label_smoothing=LOSSES[loss_type])
    objective = PreferencePairs(chosen.loss_type, chosen.beta, chosen.label_smoothing)
    with precisely("float32"):
        model, tx, execution = weights.load(handed_over)[0], optimizer.adamw(chosen), ExecutionConfig("float32")
        state, rows = init_train_state(model, tx), []
        batches = list(pair_batches(reference_weights, tokenizer_path, preferences, chosen))
        gradients = jax.jit(mean_gradients, static_argnums=(2, 4))(model, batches[0], execution, None, objective)[1]
        gradients = weights.to_bundle(gradients).tensors
        for batch in batches:
            state, metrics = train_step(state, batch, tx=tx, execution=execution, objective=objective)
            rows.append({name: float(value) for name, value in metrics.items()})
    trainer, their_gradients = dpo_trainer(
        handed_over, reference_weights, tokenizer_path, preferences, chosen, tmp_path
    )
    losses = logged_losses(trainer)
    logged = [row for row in trainer.state.log_history if "rewards/chosen" in row]
    assert len(logged) == len(rows) == PAIR_STEPS
    ours = np.array([row["loss"] for row in rows])
    size = np.maximum(np.abs(losses), 0.5)  # robust's is a difference of terms of about 1, and can be 0
    within((np.abs(ours - losses) / size).max(), FINETUNING_FLOAT32, f"loss of {PAIR_STEPS} DPO steps, {loss_type}")
    assert np.abs(ours - losses[::-1]).max() > 1e-3, "all losses are alike: any step would do"
    for name in ("logps/chosen", "logps/rejected", "rewards/chosen", "rewards/rejected", "rewards/margins"):
        mine, theirs = (np.array([row[name] for row in table]) for table in (rows, logged))
        scale = np.abs([row["logps/chosen"] for row in logged]) * (chosen.beta if "rewards" in name else 1)
        within((np.abs(mine - theirs) / scale).max(), PREFERENCE_LOGPS, f"{name}, {loss_type}")
    assert [row["rewards/accuracies"] for row in rows] == [row["rewards/accuracies"] for row in logged]
    for name, theirs in their_gradients.items():
        mine = gradients[name]
        within(np.linalg.norm(mine - theirs) / np.linalg.norm(theirs), PREFERENCE_GRADIENTS, f"gradient of {name}")


@pytest.mark.slow
def test_micro_batches_of_pairs_have_the_loss_of_one_batch(handed_over, reference_weights, tokenizer_path, preferences):
    chosen = pair_recipe()
    batch = next(pair_batches(reference_weights, tokenizer_path, preferences, chosen))
    learn = functools.partial(jax.jit, static_argnums=(2, 4))(mean_gradients)
    objective, model = PreferencePairs("sigmoid", 0.3, 0.0), weights.load(handed_over)[0]
    whole, halves = (
        learn(model, batch, ExecutionConfig("float32", accumulation_steps=steps), None, objective) for steps in (1, 2)
    )
    for one, two in zip(jax.tree.leaves(whole), jax.tree.leaves(halves), strict=True):
        np.testing.assert_allclose(one, two, rtol=1e-4, atol=1e-6)
