"""Fine-tuning from the command line: a run learns, resumes exactly, and can be used as weights."""

import dataclasses
import functools
import json
import shutil
from fractions import Fraction

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy

from smollm_jax import weights
from smollm_jax.config import preset
from smollm_jax.config.finetune_recipe import FinetuneRecipe, named
from smollm_jax.config.hf_config import read_config
from smollm_jax.data.examples.examples import Example, Pair
from smollm_jax.data.examples.packing import padded, paired
from smollm_jax.errors import InputFileError, SmolLMError, UsageError
from smollm_jax.finetuning import lora, setup
from smollm_jax.finetuning.batches import RowBatches, split
from smollm_jax.finetuning.chat_format import TEMPLATE, with_chat_format
from smollm_jax.finetuning.flags import Flags
from smollm_jax.finetuning.run import objective_of
from smollm_jax.model import smollm
from smollm_jax.runs.metrics import read_metrics
from smollm_jax.runs.pytree import flatten
from smollm_jax.tokenizer import Tokenizer
from smollm_jax.training import optimizer
from smollm_jax.training.execution import ExecutionConfig
from smollm_jax.training.loss import mean_gradients
from smollm_jax.weights.adapter import CONFIG, TENSORS, read_adapter, write_adapter
from tests.trainer import final_state, losses


def test_a_run_that_dies_goes_on_bit_for_bit_and_is_weights_like_any_other(tmp_path, run, capsys, killed):
    straight, resumed = tmp_path / "straight", tmp_path / "resumed"
    run(straight)
    printed = capsys.readouterr().out
    assert "read 24 chats from 1 file" in printed
    assert printed.index("  before    ") < printed.index("  after     ")

    killed(resumed)
    run(resumed, resume=True)
    assert losses(resumed) == losses(straight)
    assert final_state(resumed) == final_state(straight)

    rows = read_metrics(straight)
    held_out = {row["step"]: row["validation_loss"] for row in rows if "validation_loss" in row}
    assert list(held_out) == [0, 3, 6]
    assert held_out[6] < held_out[0] - 1
    for folder in (straight, resumed):
        answers = json.loads((folder / "answers.json").read_text())
        assert [set(row) for row in answers] == [{"prompt", "before", "after"}]
        assert answers[0]["prompt"].startswith("What is ")
    # Of the base model it has made one that chats, to whoever reads the run.
    assert read_config(straight / "config.json").eos_token_id == 2
    assert json.loads((straight / "generation_config.json").read_text())["eos_token_id"] == 2
    bundle = weights.read(straight)
    assert Tokenizer.from_files(bundle.tokenizer_files, straight).chat_template == TEMPLATE


def test_a_base_model_gets_the_chat_format_of_the_instruct_one(tokenizer, tokenizer_path, weights_path):
    instruct = read_config(weights_path / "config.json")
    plain = dataclasses.replace(instruct, bos_token_id=0, eos_token_id=0, pad_token_id=None)
    made, config, generation = with_chat_format(Tokenizer.load(tokenizer_path), plain)
    assert made.chat_template == tokenizer.chat_template
    assert made.roles == tokenizer.roles
    assert config == dataclasses.replace(instruct, pad_token_id=2)
    assert generation == json.loads((weights_path / "generation_config.json").read_text())
    chat = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]
    assert made.apply_chat_template(chat) == tokenizer.apply_chat_template(chat)
    unchanged, same, none = with_chat_format(tokenizer, instruct)
    assert (unchanged is tokenizer, same is instruct, none) == (True, True, None)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--data", "nothing.jsonl"], "nothing.jsonl"),
        (["--sequence-length", "1000000"], "--sequence-length 1000000 exceeds the model's"),
        (["--data", "a.jsonl:0.5", "b.jsonl"], "a weight to every source or to none"),
        (["--data", "a.jsonl:-1"], "a.jsonl:-1: a weight must be above 0"),
        (["--recipe", "huge"], "--recipe huge: unknown, known: laptop-sft, laptop-dpo, smollm2-sft, smollm2-dpo"),
        (["--learning-rate", "-1"], "learning_rate must be positive"),
        (["--batch-size", "3", "--gradient-accumulation-steps", "2"], "must divide"),
        (["--lora-rank", "0"], "--lora-rank must be at least 1, got 0"),
        (["--lora-alpha", "8"], "need --lora-rank"),
        (["--lora-rank", "4", "--lora-targets", "q_proj,qproj"], "'qproj' is unknown, known: q_proj"),
        (["--lora-rank", "4", "--lora-alpha", "-1"], "--lora-alpha positive"),
        (["--lora-dropout", "0.1"], "and --lora-dropout need --lora-rank"),
        (["--lora-rank", "4", "--lora-dropout", "1"], "--lora-dropout must be at least 0 and below 1, got 1"),
        (["--lora-rank", "4", "--init-adapter", "runs/x/adapter"], "leave the --lora flags out"),
        (["--init-adapter", "nothing"], r"nothing/adapter_config\.json: no such file"),
    ],
)
def test_a_mistake_is_one_clear_line(tmp_path, run, flags, message):
    with pytest.raises(SmolLMError, match=message) as caught:
        run(tmp_path / "run", *flags)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "run").exists(), "a refused start leaves no folder"


def test_a_row_that_does_not_fit_names_file_row_and_field(tmp_path, run):
    wrong = tmp_path / "wrong.jsonl"
    wrong.write_text('{"messages": [{"role": "user", "content": "a"}]}\n{"question": "b"}\n')
    with pytest.raises(InputFileError, match=r"wrong\.jsonl.*2.*question"):
        run(tmp_path / "run", "--data", str(wrong))


def test_steps_come_from_the_rows_and_from_flags():
    laptop = named("laptop-sft")
    assert laptop.resolve({"dtype": "float32"}, rows=10).steps == 15  # three epochs of two rows a step
    assert laptop.resolve({"dtype": "float32"}, rows=10_000).steps == 60
    assert laptop.resolve({"dtype": "float32", "steps": 7}, rows=10).warmup_steps == 1
    published = named("smollm2-sft").resolve({}, rows=12_800)
    assert (published.steps, published.warmup_steps, published.schedule) == (200, 20, "cosine")


def test_held_out_examples_are_drawn_by_the_seed_and_are_none_without_a_fraction():
    examples = [Example(np.array([i]), np.array([True])) for i in range(100)]
    train, held_out = split(examples, 0.05, 0)
    numbers = [int(example.ids[0]) for example in (*train, *held_out)]
    assert (len(held_out), sorted(numbers)) == (5, list(range(100)))
    assert [example.ids for example in split(examples, 0.05, 1)[1]] != [example.ids for example in held_out]
    assert split(examples, 0.0, 0) == (examples, [])
    assert [len(part) for part in split(examples[:1], 0.05, 0)] == [1, 0]


def example(number):
    return Example(np.array([number, 1], np.int32), np.array([False, True]))


def numbered(first, count):
    """Rows of one example each, whose first token is its number."""
    return padded([example(first + i) for i in range(count)], 4)


def test_sources_are_mixed_by_weight_and_each_is_seen_whole_before_it_comes_again():
    recipe = FinetuneRecipe(8, 5, 4, learning_rate=1.0, warmup_steps=0, dtype="float32", seed=3)
    sources = [(numbered(0, 12), numbered(0, 4)), (numbered(100, 3), numbered(100, 2))]
    shares = (Fraction(3, 5), Fraction(2, 5))
    mixed = RowBatches(sources, recipe, shares)
    drawn = np.array([mixed.batch(step)["tokens"][:, 0] for step in range(8)])
    assert ((drawn >= 100).sum(axis=1) == 2).all(), "of every five rows two are the second source's"
    for numbers in (drawn[drawn < 100].reshape(2, 12), drawn[drawn >= 100][:15].reshape(5, 3)):
        assert all(np.array_equal(np.sort(epoch), np.unique(numbers)) for epoch in numbers)
        assert len(np.unique(numbers, axis=0)) > 1, "every epoch has another order"
    again = RowBatches(sources, recipe, shares)  # as a resumed run, which begins with a later step
    assert np.array_equal(again.batch(5, slice(1, 4))["tokens"][:, 0], drawn[5, 1:4])
    (held_out,) = mixed.validation(1)
    assert ((held_out["tokens"][:, 0] >= 100).sum(), len(held_out["tokens"])) == (2, 5)
    assert mixed.met().tolist() == list(range(15))
    shorter = mixed.with_recipe(dataclasses.replace(recipe, steps=1))
    assert np.array_equal(shorter.train[shorter.met()].tokens[:, 0], np.sort(drawn[0]))
    one = RowBatches([(numbered(0, 12), numbered(0, 4))], recipe)
    hashes = {batches.sha256 for batches in (mixed, one, RowBatches(sources, recipe, shares[::-1]))}
    assert (len(hashes), again.sha256) == (3, mixed.sha256)


@pytest.mark.slow
@pytest.mark.parametrize("flags", [[], ["--method", "dpo"]], ids=["packed", "pairs"])
def test_a_killed_run_of_a_mixture_resumes_bit_for_bit_and_refuses_other_weights(
    tmp_path, run, killed, capsys, chats, flags
):
    rows = [json.loads(line) for line in chats.read_text().splitlines()]
    if flags == ["--method", "dpo"]:
        nobody = {"role": "assistant", "content": "Nobody knows."}
        both = [row["messages"] for row in rows]
        rows = [{"prompt": [asked], "chosen": [answer], "rejected": [nobody]} for asked, answer in both]
    for name, part in (("a", rows[:16]), ("b", rows[16:])):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in part))
    mixture = [f"{tmp_path}/a.jsonl:0.7", f"{tmp_path}/b.jsonl:0.3"]
    straight, resumed = tmp_path / "straight", tmp_path / "resumed"
    run(straight, *flags, "--data", *mixture)
    assert f"0.3 of the rows from {tmp_path}/b.jsonl" in " ".join(capsys.readouterr().out.split())
    killed(resumed, *flags, "--data", *mixture)
    with pytest.raises(SmolLMError, match="data"):
        run(resumed, "--data", mixture[0], f"{tmp_path}/b.jsonl:0.4", resume=True)
    run(resumed, resume=True)
    assert losses(resumed) == losses(straight)
    assert final_state(resumed) == final_state(straight)


@pytest.mark.parametrize(
    ("schedule", "rates"), [("linear", [0, 0.5, 1, 0.75, 0.5, 0.25]), ("constant", [0, 0.5, 1, 1, 1, 1])]
)
def test_schedules_of_transformers(schedule, rates):
    recipe = FinetuneRecipe(6, 1, 8, learning_rate=1.0, warmup_steps=2, dtype="float32", schedule=schedule)
    assert [float(optimizer.learning_rate(recipe)(step)) for step in range(6)] == pytest.approx(rates)


def test_weight_decay_leaves_the_norms_alone(tiny_model):
    decayed = flatten(optimizer.without_norms(tiny_model))
    assert {name for name, value in decayed.items() if not value} == {
        "layers.input_layernorm",
        "layers.post_attention_layernorm",
        "norm",
    }


LORA = ["--lora-rank", "4", "--lora-targets", "q_proj,v_proj,down_proj"]


def test_a_killed_run_of_an_adapter_resumes_bit_for_bit_and_is_weights(tmp_path, run, base, killed, capsys):
    straight, resumed, dropout = tmp_path / "straight", tmp_path / "resumed", ["--lora-dropout", "0.1"]
    run(straight, *LORA, *dropout)
    printed = capsys.readouterr().out
    assert "an adapter of 8,064 parameters, trained" in printed
    assert "dropout 0.1" in printed
    assert json.loads((straight / "adapter" / CONFIG).read_text())["lora_dropout"] == 0.1
    killed(resumed, *LORA, *dropout)
    run(resumed, resume=True)
    assert losses(resumed) == losses(straight)
    assert final_state(resumed) == final_state(straight)
    files = [(folder / "adapter" / TENSORS).read_bytes() for folder in (straight, resumed)]
    assert files[0] == files[1]

    held_out = [row["validation_loss"] for row in read_metrics(straight) if "validation_loss" in row]
    assert held_out[-1] < held_out[0] - 0.5
    before, of_run, of_folder = (weights.read(path) for path in (base, straight, straight / "adapter"))
    changed = {name for name in before.tensors if not np.array_equal(before.tensors[name], of_run.tensors[name])}
    assert changed == {
        f"model.layers.{layer}.{module}.weight"
        for layer in range(before.config.num_hidden_layers)
        for module in ("self_attn.q_proj", "self_attn.v_proj", "mlp.down_proj")
    }
    for name, tensor in of_run.tensors.items():
        assert np.array_equal(tensor, of_folder.tensors[name]), name
    # Another run starts from the adapter where this one ended.
    again = tmp_path / "again"
    run(again, "--init-adapter", str(straight / "adapter"))
    first = next(row for row in read_metrics(again) if "validation_loss" in row)
    assert first["validation_loss"] == pytest.approx(held_out[-1], rel=1e-5)


def test_an_adapter_needs_the_weights_it_was_trained_on(tmp_path, run, base):
    other, out = tmp_path / "base", tmp_path / "run"
    shutil.copytree(base, other)
    run(out, "--weights", str(other), "--steps", "1", *LORA)
    bundle = weights.read(other)
    bundle.tensors["model.norm.weight"] = bundle.tensors["model.norm.weight"] * 2
    shutil.rmtree(other)
    weights.write(other, bundle, "hf")
    with pytest.raises(InputFileError, match=r"the weights .*base, which its adapter was trained on, have changed"):
        weights.read(out)
    shutil.rmtree(other)
    with pytest.raises(InputFileError, match="which does not exist"):
        weights.read(out)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t, c: t.pop(next(iter(t))), "is missing"),
        (lambda t, c: t.update({"base_model.model.lm_head.lora_A.weight": np.zeros((4, 96), np.float32)}), "lm_head"),
        (lambda t, c: c.update(r=8), r"has shape \[4, 96\], expected \[8, 96\]"),
        (lambda t, c: c.update(use_dora=True), "use_dora True is not supported, only False"),
        (lambda t, c: c.update(lora_dropout=1.5), "lora_dropout must be at least 0 and below 1, got 1.5"),
        (lambda t, c: c.update(lora_alpha=0), "r and lora_alpha must be positive"),
        (lambda t, c: c.update(init_lora_weights="pissa"), "init_lora_weights 'pissa' is not supported"),
        (lambda t, c: t.clear(), "has no LoRA tensors"),
    ],
)
def test_an_adapter_that_does_not_fit_is_an_error(tmp_path, change, message):
    config = preset("tiny")
    recipe, pairs = small_adapter(config, lora_targets="q_proj")
    write_adapter(tmp_path, lora.adapter_of(pairs, recipe, "base"))
    read_adapter(tmp_path, config)
    tensors, values = safetensors.numpy.load_file(tmp_path / TENSORS), json.loads((tmp_path / CONFIG).read_text())
    change(tensors, values)
    safetensors.numpy.save_file(tensors, tmp_path / TENSORS)
    (tmp_path / CONFIG).write_text(json.dumps(values))
    with pytest.raises(InputFileError, match=message):
        read_adapter(tmp_path, config)


def test_a_resumed_run_keeps_its_adapter(tmp_path, run):
    run(tmp_path / "run", *LORA, "--steps", "2")
    resume = functools.partial(run, tmp_path / "run", resume=True)
    for flags, message in [
        (["--lora-rank", "8"], "--lora-rank 8: this run has 4"),
        (["--lora-targets", "q_proj"], "--lora-targets q_proj: this run has q_proj,v_proj,down_proj"),
        (["--rslora"], "--rslora True: this run has False"),
        (["--init-adapter", "x"], "--init-adapter is for a new run"),
    ]:
        with pytest.raises(UsageError, match=message):
            resume(*flags)
    resume("--lora-rank", "4", "--lora-targets", "down_proj,v_proj,q_proj", "--steps", "3")
    assert read_metrics(tmp_path / "run")[-1]["step"] == 3


def small_adapter(config, **changes):
    """A recipe with LoRA, and pairs for it whose B is not zero."""
    fields = {"lora_rank": 4, "lora_alpha": 8.0} | changes
    recipe = FinetuneRecipe(1, 1, 8, learning_rate=1.0, warmup_steps=0, dtype="float32", **fields)
    pairs = lora.init_pairs(config, recipe)
    draw = np.random.default_rng(0)
    for pair in pairs.values():
        pair["b"] = jnp.asarray(draw.normal(0, 0.05, pair["b"].shape), jnp.float32)
    return recipe, pairs


@pytest.mark.parametrize(
    ("dtype", "operands", "bound"),
    [("float32", "float32", 1e-5), ("float32", "bfloat16", 0.02), ("bfloat16", "bfloat16", 0.03)],
)
@pytest.mark.parametrize("targets", ["all-linear", "q_proj,down_proj", "gate_proj"])
def test_pairs_beside_the_weights_compute_what_merged_ones_do(tiny_model, dtype, operands, bound, targets):
    recipe, pairs = small_adapter(tiny_model.config, lora_targets=targets)
    tokens = np.random.default_rng(1).integers(0, tiny_model.config.vocab_size, (2, 24))
    models = tiny_model, *(apply(tiny_model, pairs, lora.scale_of(recipe)) for apply in (lora.with_pairs, lora.merge))
    plain, beside, merged = (np.asarray(model(tokens, dtype=dtype, operands=operands)) for model in models)
    largest = np.abs(merged).max()
    assert np.abs(beside - merged).max() < bound * largest
    assert np.abs(beside - plain).max() > 0.05 * largest, "the adapter has no effect"


def test_an_adapter_goes_on_with_its_own_dropout_unless_a_flag_says_otherwise(tmp_path, base):
    bundle, laptop = weights.read(base), named("laptop-sft")
    recipe, pairs = small_adapter(bundle.config, lora_dropout=0.25, lora_targets="q_proj")
    write_adapter(tmp_path, lora.adapter_of(pairs, recipe, str(base)))
    fields = [
        flags.recipe_fields() | setup._adapter_fields(flags, bundle, laptop)
        for flags in (Flags(init_adapter=tmp_path), Flags(init_adapter=tmp_path, lora_dropout=0.0))
    ]
    assert [row["lora_dropout"] for row in fields] == [0.25, 0.0]


def row_keys(*shape):
    return np.random.default_rng(2).integers(0, 1 << 32, (*shape, 2), np.uint32)


def test_dropout_zeroes_its_share_of_elements_and_scales_up_the_others():
    keys = lora.dropout_keys(jnp.asarray(row_keys(2)), "o_proj", 3)
    others = lora.dropout_keys(jnp.asarray(row_keys(2)), "k_proj", 3)
    assert len(np.unique(np.concatenate([keys, others]).reshape(-1, 2), axis=0)) == 12, "of target, layer and row"
    rows = jnp.ones((2, 64, 96)), keys[1], 0.25
    dropped = np.asarray(smollm.dropped(*rows))
    assert set(np.unique(dropped)) == {0, np.float32(1 / 0.75)}
    deviation = (0.25 * 0.75 / dropped.size) ** 0.5
    assert abs((dropped == 0).mean() - 0.25) < 4 * deviation
    assert np.array_equal(smollm.dropped(*rows), dropped), "a mask is a function of its key"
    assert (dropped[0] != dropped[1]).any()


def dropping_out(config):
    """A recipe with dropout, pairs, and batches of two rows, always the same."""
    recipe, pairs = small_adapter(config, lora_dropout=0.5, lora_targets="q_proj,down_proj")
    return recipe, pairs, RowBatches([(numbered(0, 1), numbered(0, 2))], dataclasses.replace(recipe, batch_size=2))


def test_dropout_is_in_training_alone(tiny_model):
    recipe, pairs, batches = dropping_out(tiny_model.config)
    plainly = dataclasses.replace(recipe, lora_dropout=0.0)

    @functools.partial(jax.jit, static_argnums=0)
    def loss(objective, batch):
        return objective.total(pairs, batch, ExecutionConfig("float32"), tiny_model)[0]

    first, second = batches.batch(0), batches.batch(1)
    assert np.array_equal(first["tokens"], second["tokens"])
    first_loss, second_loss = (float(loss(objective_of(recipe), batch)) for batch in (first, second))
    del first["dropout_keys"]
    plain = float(loss(objective_of(plainly), first))
    assert len({plain, first_loss, second_loss}) == 3, "each step has other masks"
    first["tokens"] = batches.held_out.tokens
    (held_out,) = batches.validation(1)
    assert float(loss(objective_of(recipe), held_out)) == float(loss(objective_of(plainly), first))
    without = RowBatches([(numbered(0, 1), numbered(0, 1))], plainly)
    assert set(without.batch(0)) == set(without.shapes) == {"tokens", "targets", "documents"}
    pair = paired([Pair(example(0), example(1))], 4)
    of_pairs = RowBatches([(pair, pair)], dataclasses.replace(recipe, method="dpo", packing=False, batch_size=3))
    assert of_pairs.shapes["dropout_keys"] == of_pairs.batch(0)["dropout_keys"].shape == (3, 2, 2)


@pytest.mark.slow
def test_the_masks_of_dropout_are_the_same_in_the_backward_pass_and_in_micro_batches(tiny_model):
    recipe, pairs, batches = dropping_out(tiny_model.config)
    batch, objective = jax.tree.map(jnp.asarray, batches.batch(0)), objective_of(recipe)
    results = [
        jax.jit(mean_gradients, static_argnums=(2, 4))(pairs, batch, execution, None, objective, tiny_model)
        for execution in (
            ExecutionConfig("float32", remat="none"),
            ExecutionConfig("float32", remat="full"),
            ExecutionConfig("float32", accumulation_steps=2),
        )
    ]
    for other in results[1:]:
        for ours, theirs in zip(jax.tree.leaves(results[0]), jax.tree.leaves(other), strict=True):
            np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-6)


def test_a_model_with_an_adapter_of_zeros_is_its_base(tiny_model):
    recipe, pairs = small_adapter(tiny_model.config)
    pairs = {target: pair | {"b": 0 * pair["b"]} for target, pair in pairs.items()}
    tokens = np.arange(48).reshape(2, 24)
    adapted = lora.with_pairs(tiny_model, pairs, lora.scale_of(recipe))
    assert np.array_equal(adapted(tokens), tiny_model(tokens))
    assert tiny_model.layers.self_attn.low_rank is None, "the model that was given is changed"


def test_merging_into_bfloat16_weights_gives_float32_ones(tmp_path, base):
    bundle = weights.read(base)
    bundle.tensors = {name: tensor.astype(ml_dtypes.bfloat16) for name, tensor in bundle.tensors.items()}
    weights.write(tmp_path / "bfloat16", bundle, "hf")
    recipe, pairs = small_adapter(bundle.config)
    write_adapter(tmp_path / "adapter", lora.adapter_of(pairs, recipe, str(tmp_path / "bfloat16")))
    merged = weights.read(tmp_path / "adapter")
    expected = lora.merge(weights.load(tmp_path / "bfloat16")[0], pairs, lora.scale_of(recipe))
    for name, tensor in weights.to_bundle(expected).tensors.items():
        assert merged.tensors[name].dtype == np.float32
        np.testing.assert_allclose(merged.tensors[name], tensor, rtol=0, atol=1e-7)


def test_an_adapter_that_names_itself_as_its_base_is_an_error(tmp_path):
    recipe, pairs = small_adapter(preset("tiny"))
    write_adapter(tmp_path, lora.adapter_of(pairs, recipe, str(tmp_path)))
    with pytest.raises(InputFileError, match="leads back to an adapter itself"):
        weights.read(tmp_path)
    write_adapter(tmp_path, lora.adapter_of(pairs, recipe, ""))
    with pytest.raises(InputFileError, match="names no base_model_name_or_path"):
        weights.read(tmp_path)
