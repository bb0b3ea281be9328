"""The deliberate bugs that `mutants` plants, each with the fast test that must fail.

A mutant is one replacement in one module's source. The text to replace must occur exactly once, so that no mutant goes
stale; `tests/test_mutants.py` checks it.
"""

# ruff: noqa: E501  # one mutant a line reads best
import dataclasses

FAMILY = "parity_tests/test_10_family.py::test_a_small_model"
STEPS = "parity_tests/test_7_training.py::test_ten_steps"
ADAMW = "parity_tests/test_6_optimizer.py"
CACHE = "tests/model/test_attention.py::test_prefill_in_chunks_equals_at_once"
LOSS = "tests/model/test_cross_entropy.py::test_it_equals_the_dense_loss_in_float64"
BLOCKS = "tests/model/test_attention.py::test_blocks_give_the_values_and_gradients_of_attention_at_once"
GENERATE = "tests/generation/test_generate.py"
SLOTS, SERVE, GUARD, MODELS = (
    "tests/generation/test_slots.py",
    "tests/serve/test_serve.py",
    "tests/serve/test_guard.py",
    "tests/serve/test_models.py",
)
TEXT_ALONE = f"{SLOTS}::test_every_text_is_the_one_it_gets_alone"
CACHED_PREFIX = f"{SLOTS}::test_what_a_text_left_in_the_cache_is_not_computed_again"
MODEL = "tests/model/test_model.py"
OPERANDS = "tests/model/test_operands.py"
QUANTIZED = "tests/generation/test_quantized.py"
PRODUCT = f"{QUANTIZED}::test_a_product_is_that_of_the_numbers_stored"
ROUNDED = f"{QUANTIZED}::test_it_computes_what_the_rounded_model_does"
EXAMPLES = "tests/data/examples/test_examples.py"
LEARNT, TARGETS = (
    f"{EXAMPLES}::test_what_is_learnt_of_a_row",
    f"{EXAMPLES}::test_targets_are_the_tokens_that_follow_and_are_learnt",
)
LORA = "tests/finetuning/test_finetune.py::test_pairs_beside_the_weights_compute_what_merged_ones_do"
DROPOUT, TRAINING_ALONE = (
    "tests/finetuning/test_finetune.py::test_dropout_zeroes_its_share_of_elements_and_scales_up_the_others",
    "tests/finetuning/test_finetune.py::test_dropout_is_in_training_alone",
)
PREFERENCES = "tests/finetuning/test_preferences.py"
PAPERS, PADDED_PAIRS = (
    f"{PREFERENCES}::test_the_losses_of_pairs_are_those_of_their_papers",
    f"{PREFERENCES}::test_padding_rows_count_for_nothing",
)
ANSWERS = f"{PREFERENCES}::test_the_reference_is_the_log_probability_of_each_answer"
LOG_PROBS = "tests/model/test_cross_entropy.py::test_log_probs_of_tokens_and_their_gradients_are_the_dense_ones"
PEFT, PEFT_START = (
    "parity_tests/test_12_finetuning.py::test_an_adapter_computes_what_it_does_in_peft",
    "parity_tests/test_12_finetuning.py::test_an_adapter_begins_as_pefts",
)
AS_IT_LIES = f"{QUANTIZED}::test_a_q8_0_gguf_is_decoded_as_it_lies"
BATCHES = "tests/data/test_batches.py"
EPOCHS = f"{BATCHES}::test_every_epoch_of_every_source_has_another_order_for_another_seed"
SPREAD = f"{BATCHES}::test_validation_takes_windows_evenly_spread_and_its_last_batch_may_be_smaller"
UNEQUAL = "tests/training/test_unequal_parts.py"
WEIGHTED = f"{UNEQUAL}::test_a_validation_weighs_each_batch_by_the_tokens_learnt_of_it"
ESCAPING = "tests/web/test_escaping.py"
FAULTS_AS_TEXT, STATUS_AS_TEXT = (
    f"{ESCAPING}::test_progress_and_faults_are_shown_as_text",
    f"{ESCAPING}::test_the_status_line_shows_a_name_a_title_and_a_device_as_text",
)
PROTECTED = "tests/tokenizer/test_chat_protection.py::test_no_message_of_a_conversation_brings_a_special_token"
STORE = "tests/runs/test_store.py"
ENGINE = "tests/generation/test_engine.py"
TYPES = "tests/weights/test_gguf_export.py::test_a_type_rounds_the_weights_themselves_and_not_what_another_type_rounded"
MIDDLEWARE = "tests/web/test_middleware.py"
TERMS = "tests/training/test_memory_terms.py"
FOUR_DEVICES = "tests/parallel/test_four_devices.py"
EVERYWHERE = f"{FOUR_DEVICES}::test_loss_metrics_and_gradients_are_one_devices_whatever_is_learnt_of_each_row"
OWN_SHARD = f"{FOUR_DEVICES}::test_each_device_has_its_rows_and_its_shard"
SAMPLING = "tests/generation/test_sampling.py"
DRAWS, ALONE, KEPT = (
    f"{SAMPLING}::test_draws_follow_the_reference_distribution",
    f"{SAMPLING}::test_every_row_is_drawn_as_if_it_were_alone",
    f"{SAMPLING}::test_the_tokens_kept_of_a_real_vocabulary_are_the_references",
)
SCORES = "tests/evaluation/test_loglikelihood.py"
EXPORTED = "tests/weights/test_gguf_export.py"
PARQUET = "tests/data/test_file_types.py::test_parquet_that_would_fill_the_memory_is_refused_or_read_in_smaller_batches"


@dataclasses.dataclass(frozen=True)
class Mutant:
    name: str
    module: str
    old: str
    new: str
    test: str  # the test that catches it

    @property
    def qualified(self) -> str:
        return f"smollm_jax.{self.module}"


MUTANTS = [
    Mutant("rotary interleaved", "model.ops", "jnp.split(x, 2, axis=-1)", "(x[..., ::2], x[..., 1::2])", FAMILY),
    Mutant("rotary backwards", "model.ops", "a * cos - b * sin, b * cos + a * sin", "a * cos + b * sin, b * cos - a * sin", FAMILY),
    Mutant("theta 10,000 for 100,000", "config.model", "self.rope_theta**exponent", "10_000.0**exponent", FAMILY),
    Mutant(
        "frequencies in bfloat16",
        "model.ops",
        "np.array(config.rotary_frequencies)",
        "np.array(config.rotary_frequencies, jnp.bfloat16).astype(float)",
        FAMILY,
    ),
    Mutant(
        "frequencies one ulp off",
        "config.model",
        "_float32(1.0 / _float32(self.rope_theta**exponent))",
        "_float32(1.0 / _float32(self.rope_theta**exponent) * (1 + 2**-23))",
        "parity_tests/test_4_modules.py::test_rotary_frequencies_are_transformers_bits",
    ),
    Mutant(
        "queries one position late",
        "model.smollm",
        "(apply_rope(q, cos, sin), apply_rope(k",
        "(apply_rope(q, jnp.roll(cos, -1, 1), jnp.roll(sin, -1, 1)), apply_rope(k",
        FAMILY,
    ),
    Mutant("KV heads tiled", "model.flash_attention", "heads, N // heads, H).transpose(1, 0, 3, 4, 2, 5)", "N // heads, heads, H).transpose(1, 0, 4, 3, 2, 5)", FAMILY),
    Mutant("scale 1/H", "model.flash_attention", "_query_blocks(q * q.shape[3] ** -0.5,", "_query_blocks(q * q.shape[3] ** -1.0,", FAMILY),
    Mutant("mask off by one", "model.flash_attention", "query_offset[:, None] >= jnp.arange(block)", "query_offset[:, None] >= jnp.arange(block) - 1", f"{MODEL}::test_the_future_does_not_change_the_past"),
    Mutant("attention in bfloat16", "model.flash_attention", "_from_blocks(output / row_sum, heads, block)", "_from_blocks((output / row_sum).astype(jnp.bfloat16), heads, block)", FAMILY),
    Mutant("online softmax never rescaled", "model.flash_attention", "jnp.exp(row_max - new_max), ", "1.0, ", BLOCKS),
    Mutant("softmax gradient without its mean", "model.flash_attention", " - mean[i])", ")", BLOCKS),
    Mutant("keys' gradient of the last block only", "model.flash_attention", "_update_block(dk, dk[j] + ", "_update_block(dk, 0 * dk[j] + ", BLOCKS),
    Mutant(
        "q rows in another head order", "weights.mapping", '"L (N H) D -> L D N H"', '"L (H N) D -> L D N H"', FAMILY
    ),
    Mutant("o_proj transposed", "weights.mapping", '"L D (N H) -> L N H D"', '"L (N H) D -> L N H D"', FAMILY),
    Mutant(
        "k and v swapped",
        "weights.mapping",
        '("layers.self_attn.k_proj", "L (K H) D -> L D K H"),\n'
        '    "model.layers.*.self_attn.v_proj.weight": ("layers.self_attn.v_proj"',
        '("layers.self_attn.v_proj", "L (K H) D -> L D K H"),\n'
        '    "model.layers.*.self_attn.v_proj.weight": ("layers.self_attn.k_proj"',
        FAMILY,
    ),
    Mutant(
        "GGUF k rows with q's heads",
        "weights.gguf_reader",
        '"k_proj": config.num_key_value_heads',
        '"k_proj": 1',
        "parity_tests/test_conversion.py::test_a_gguf_is_read_as_transformers_reads_it",
    ),
    Mutant("gate and up swapped", "model.ops", "jax.nn.silu(gate) * up", "jax.nn.silu(up) * gate", FAMILY),
    Mutant("gelu for silu", "model.ops", "jax.nn.silu(gate)", "jax.nn.gelu(gate)", FAMILY),
    Mutant(
        "norm scaled before it is rounded",
        "model.ops",
        "return _normalize(x, eps)[0].astype(x.dtype) * scale",
        "return (_normalize(x, eps)[0] * scale).astype(x.dtype)",
        f"{MODEL}::test_rms_norm_rounds_before_it_scales",
    ),
    Mutant("norm scaled by 1 + weight", "model.ops", "_normalize(x, eps)[0].astype(x.dtype) * scale", "_normalize(x, eps)[0].astype(x.dtype) * (1 + scale)", FAMILY),
    Mutant("eps 1e-6", "model.ops", "keepdims=True) + eps)", "keepdims=True) + 1e-6)", FAMILY),
    Mutant(
        "eps outside the root",
        "model.ops",
        "jax.lax.rsqrt(jnp.mean(jnp.square(x), axis=-1, keepdims=True) + eps)",
        "1 / (jnp.sqrt(jnp.mean(jnp.square(x), axis=-1, keepdims=True)) + eps)",
        FAMILY,
    ),
    Mutant("norm's gradient not projected", "model.ops", "(gradient - normalized * jnp.mean(gradient * normalized, axis=-1, keepdims=True))", "gradient", f"{MODEL}::test_gradients_written_out_are_those_of_the_function"),
    Mutant("gradients of gate and up swapped", "model.ops", "jnp.arange(2)[:, None] == 0", "jnp.arange(2)[:, None] == 1", f"{MODEL}::test_gradients_written_out_are_those_of_the_function"),
    Mutant("norm before the MLP skipped", "model.smollm", "self.mlp(rms_norm(x, self.post_attention_layernorm[...], self.eps))", "self.mlp(x)", FAMILY),
    Mutant("last norm skipped", "model.smollm", "return rms_norm(x, norm, self.config.rms_norm_eps), cache", "return x, cache", FAMILY),
    Mutant("head scaled", "model.smollm", "return linear(hidden, self.head.astype(hidden.dtype).T)", "return linear(hidden, self.head.astype(hidden.dtype).T) / 24", FAMILY),
    Mutant(
        "residual projections not scaled at init",
        "model.smollm",
        "return config.initializer_range / (2 * config.num_hidden_layers) ** 0.5",
        "return config.initializer_range",
        f"{MODEL}::test_the_init_is_the_recipes",
    ),
    Mutant(
        "head not trained", "training.loss", "model.head, targets", "jax.lax.stop_gradient(model.head), targets", STEPS
    ),
    Mutant(
        "labels shifted twice", "training.loss", "return tokens[:, 1:]", "return jnp.roll(tokens[:, 1:], -1, 1)", STEPS
    ),
    Mutant(
        "loss averaged per chunk",
        "model.cross_entropy",
        "jnp.where(valid, log_normalizer - target_logit, 0.0), logits",
        "jnp.where(valid, log_normalizer - target_logit, 0.0) * h.shape[0] / jnp.maximum(valid.sum(), 1), logits",
        LOSS,
    ),
    Mutant("head's gradient of the last chunk only", "model.cross_entropy", "(total + losses.sum(), head_gradient + d_weight)", "(total + losses.sum(), d_weight)", LOSS),
    Mutant(
        "1/tokens rounded to bfloat16",
        "model.cross_entropy",
        "(hidden_gradient.astype(cotangent.dtype) * cotangent).astype(hidden_gradient.dtype)",
        "hidden_gradient * cotangent.astype(hidden_gradient.dtype)",
        "tests/model/test_cross_entropy.py::test_the_mean_over_any_number_of_tokens_is_scaled_right_in_bfloat16",
    ),
    Mutant("masked labels in the gradient", "model.cross_entropy", "(d_logits * scale[:, None])", "(d_logits)", LOSS),
    Mutant("decay not on the norms", "training.optimizer", "mask=None if recipe.decays_norms or not", "mask=None if not", ADAMW),
    Mutant("beta2 0.999", "training.optimizer", "b2=recipe.beta2", "b2=0.999", ADAMW),
    Mutant("bias correction missing", "training.optimizer", "optax.adamw(\n", "(lambda lr, b1, b2, eps, weight_decay: optax.chain(optax.scale_by_rms(b2, eps), optax.ema(b1, debias=False), optax.add_decayed_weights(weight_decay), optax.scale_by_learning_rate(lr)))(\n", ADAMW),
    Mutant("clip by value", "training.optimizer", "clip_by_global_norm(recipe.clip)", "optax.clip(recipe.clip)", ADAMW),
    Mutant("warmup off by one", "training.optimizer", "schedule(jnp.asarray(count, float))", "schedule(jnp.asarray(count + 1, float))", ADAMW),
    Mutant("cache written one slot late", "model.attention", "at = (cache.layer, zero, cache.length, zero, zero)", "at = (cache.layer, zero, cache.length + 1, zero, zero)", CACHE),
    Mutant("unwritten cache slots attended", "model.attention", "(slot <= query[:, None])", "(slot <= query[:, None] + 1)", CACHE),
    Mutant("cache of the first layer read", "model.attention", "keys[cache.layer], values[cache.layer]", "keys[0], values[0]", CACHE),
    Mutant("left padding attended", "model.attention", " & (slot >= start[:, None, None])", " & (slot >= 0 * start[:, None, None])", "tests/model/test_attention.py::test_left_padding_is_never_attended"),
    Mutant("decoded tokens one position late", "generation.programs", "positions = (state.cache.length - state.start)[:, None]", "positions = (state.cache.length - state.start)[:, None] + 1", f"{GENERATE}::test_greedy_with_a_cache_equals_greedy_without"),
    Mutant("top-p drops the token that crosses it", "generation.sampling", "(bits <= threshold[:, None]) |", "(bits < threshold[:, None]) |", "tests/generation/test_sampling.py::test_draws_follow_the_reference_distribution"),
    Mutant("prefill sees the left padding", "model.attention", "(jnp.arange(q.shape[1]) >= start[:, None])", "(jnp.arange(q.shape[1]) >= 0 * start[:, None])", f"{GENERATE}::test_the_bucket_of_a_prompt_changes_nothing"),
    Mutant("packed documents see each other", "model.flash_attention", "(query_segments[i][:, :, None] == key_segments[j][:, None, :])", "(query_segments[i][:, :, None] >= key_segments[j][:, None, :])", "tests/model/test_attention.py::test_packed_attention_is_the_formula_with_the_segments_mask"),
    Mutant("bfloat16 operands not rounded", "model.ops", "jnp.matmul(x.astype(operands), w.astype(operands),", "jnp.matmul(x, w,", f"{OPERANDS}::test_a_product_multiplies_rounded_numbers_and_rounds_nothing_else"),
    Mutant("a matmul's incoming gradient not rounded", "model.ops", "(y.astype(operands) for y in (x, w, gradient))", "(*(y.astype(operands) for y in (x, w)), gradient)", f"{OPERANDS}::test_a_product_multiplies_rounded_numbers_and_rounds_nothing_else"),
    Mutant("parameters' gradients rounded", "model.ops", "preferred_element_type=dtype).astype(w.dtype)", "preferred_element_type=dtype).astype(operands).astype(w.dtype)", f"{OPERANDS}::test_a_product_multiplies_rounded_numbers_and_rounds_nothing_else"),
    Mutant("loss of float32 hidden states", "model.cross_entropy", "d_logits, h.astype(weight.dtype), preferred", "d_logits, h, preferred", f"{OPERANDS}::test_the_loss_and_its_gradients_take_rounded_numbers_and_sum_in_float32"),
    Mutant("activations between CPU matmuls in bfloat16", "model.precision", '("float32", dtype) if', "(dtype, dtype) if", f"{OPERANDS}::test_only_a_cpu_keeps_float32_between_products"),
    Mutant("held-out tokens trained on", "data.batches", "starts = [max(len(file.tokens) - held, 0)", "starts = [max(len(file.tokens) - 17, 0)", "tests/data/test_data.py::test_held_out_tokens_are_never_trained_on"),
    Mutant("scales of the previous row", "generation.quantized", "matrix.scales[..., None].astype", "jnp.roll(matrix.scales, 1, 0)[..., None].astype", PRODUCT),
    Mutant("last block left out", "generation.quantized", "(values * matrix.scales[..., None]", "(values.at[:, -1].set(0) * matrix.scales[..., None]", PRODUCT),
    Mutant("inputs cast to bfloat16", "generation.quantized", "optimization_barrier((x / ones", "optimization_barrier((x.astype(jnp.bfloat16).astype(x.dtype) / ones", PRODUCT),
    Mutant("dequantised values cast to bfloat16", "generation.quantized", "reshape(matrix.values.shape)", "reshape(matrix.values.shape).astype(jnp.bfloat16).astype(jnp.float32)", f"{QUANTIZED}::test_blocks_are_ggmls"),
    Mutant("values divided by float16 scales", "generation.quantized", "np.divide(1, scales,", "np.divide(1, stored.astype(np.float32),", f"{QUANTIZED}::test_blocks_are_ggmls"),
    Mutant("halves rounded to even", "generation.quantized", "np.trunc(x + np.copysign(np.float32(0.5), x))", "np.rint(x)", f"{QUANTIZED}::test_blocks_are_ggmls"),
    Mutant("quantised q and k swapped", "generation.quantized", '"self_attn.q_proj", "self_attn.k_proj",', '"self_attn.k_proj", "self_attn.q_proj",', ROUNDED),
    Mutant("quantised gate and up swapped", "generation.quantized", '"mlp.gate_proj", "mlp.up_proj"', '"mlp.up_proj", "mlp.gate_proj"', ROUNDED),
    Mutant("decoded tokens see an unwritten slot", "model.attention", "(slot <= cache.length)", "(slot <= cache.length + 1)", ROUNDED),
    Mutant("layer caches see the left padding", "model.attention", " & (slot >= start[:, None])\n", " & (slot >= 0 * start[:, None])\n", ROUNDED),
    Mutant("layer cache written one slot late", "model.attention", "(zero, self.length, zero))", "(zero, self.length + 1, zero))", ROUNDED),
    Mutant("rows of a q8_0 file in GGUF's order", "weights.gguf_reader", "_in_hf_order(rows, name, config).reshape", "rows.reshape", AS_IT_LIES),
    Mutant("a q8_0 file quantised again", "generation.quantized", "(stored or {}).get(name) or ", "", AS_IT_LIES),
    Mutant("the assistant's header learnt", "tokenizer.chat_tokens", "chat.text(messages[:answer], add_generation_prompt=True)", "chat.text(messages[:answer])", LEARNT),
    Mutant("the end of a turn not learnt", "tokenizer.chat_tokens", "place(next(ends, len(whole)))", "place(next(ends, len(whole))) - 1", LEARNT),
    Mutant("the newline after a turn learnt", "tokenizer.chat_tokens", "place(next(ends, len(whole)))", "place(len(whole))", LEARNT),
    Mutant("a message's weight ignored", "data.examples.rows", "return weight != 0", "return True", LEARNT),
    Mutant("targets not shifted", "data.examples.packing", "np.where(example.learnt, example.ids, -1)[1:]", "np.where(example.learnt, example.ids, -1)[:-1]", TARGETS),
    Mutant("targets with the pad id masked", "data.examples.packing", "np.where(example.learnt, example.ids, -1)[1:]", "np.where(example.learnt & (example.ids != 2), example.ids, -1)[1:]", TARGETS),
    Mutant("a document's first token a target", "data.examples.packing", "targets[row, start : stop - 1] = np.where(example.learnt, example.ids, -1)[1:]", "targets[row, max(start - 1, 0) : stop - 1] = np.where(example.learnt, example.ids, -1)[not start :]", TARGETS),
    Mutant("documents of a row not separated", "data.examples.packing", "documents[row, start:stop] = number", "documents[row, start:stop] = 0", TARGETS),
    Mutant("the row with the most space filled", "data.examples.packing", "min(fitting, default=space)", "max(fitting, default=space)", f"{EXAMPLES}::test_the_row_with_the_least_space_is_filled_and_of_equal_ones_the_first"),
    Mutant("a long row cut at its start", "data.examples.examples", "Example(example.ids[:bound], example.learnt[:bound])", "Example(example.ids[-bound:], example.learnt[-bound:])", f"{EXAMPLES}::test_rows_of_which_nothing_is_learnt_are_counted_and_said"),
    Mutant("rows without a learnt token kept", "data.examples.examples", "if not cut.learnt[1:].any()", "if not cut.learnt[1:].size", f"{EXAMPLES}::test_rows_of_which_nothing_is_learnt_are_counted_and_said"),
    Mutant("an adapter scaled twice", "finetuning.lora", 'pair["b"] * scale}', 'pair["b"] * scale * scale}', LORA),
    Mutant("an adapter beside every projection but the last", "model.smollm", 'return added(hidden, "down_proj", matmul(hidden, self.down_proj[...]))', "return matmul(hidden, self.down_proj[...])", LORA),
    Mutant("dropout not scaled", "model.smollm", "x / (1 - rate), 0)", "x, 0)", DROPOUT),
    Mutant("one mask of dropout for all layers", "finetuning.lora", "jnp.arange(layers) * len(LORA_TARGETS)", "jnp.arange(layers) * 0", DROPOUT),
    Mutant("dropout in evaluation", "finetuning.batches", "yield self.held_out[numbers[start : start + size]].arrays()", "yield self.held_out[numbers[start : start + size]].arrays() | self._dropout_keys(0, slice(None))", TRAINING_ALONE),
    Mutant("the same masks at every step", "finetuning.batches", "(self.recipe.seed, step, DROPOUT)", "(self.recipe.seed, 0, DROPOUT)", TRAINING_ALONE),
    Mutant("B not zero at the start", "finetuning.lora", "jnp.zeros((L, out_size, r), jnp.float32)", "jnp.ones((L, out_size, r), jnp.float32)", PEFT_START),
    Mutant("A from he_uniform, as in tunix", "finetuning.lora", "in_size**-0.5", "(6 / in_size) ** 0.5", PEFT_START),
    Mutant("rslora ignored", "weights.adapter", "(rank**0.5 if rslora else rank)", "rank", PEFT),
    Mutant("an adapter merged without its scale", "weights.adapter", "np.float32(adapter.scale) * (", "np.float32(1) * (", PEFT),
    Mutant("beta on one side", "finetuning.objectives", "logits = beta * (chosen - rejected)", "logits = beta * chosen - rejected", PAPERS),
    Mutant("chosen and rejected swapped", "finetuning.objectives", "chosen, rejected = log_ratios[:, 0], log_ratios[:, 1]", "rejected, chosen = log_ratios[:, 0], log_ratios[:, 1]", PAPERS),
    Mutant("smoothing where TRL has none", "finetuning.objectives", 'if loss_type == "robust":', 'if loss_type in ("robust", "sigmoid"):', PAPERS),
    Mutant("ipo summed over tokens", "finetuning.objectives", "per_token = log_ratios / jnp.maximum(lengths, 1)", "per_token = log_ratios", PAPERS),
    Mutant("the reference drifts with the policy", "finetuning.objectives", 'log_probs - batch["reference"]', "log_probs - jax.lax.stop_gradient(log_probs)", PADDED_PAIRS),
    Mutant("padding counts as a pair", "finetuning.objectives", 'return (batch["targets"] >= 0).any(axis=(1, 2))', 'return batch["targets"].any(axis=(1, 2))', PADDED_PAIRS),
    Mutant("an answer's mean instead of its sum", "finetuning.objectives", "log_probs.reshape(B, 2, T).sum(axis=2)", "log_probs.reshape(B, 2, T).mean(axis=2)", ANSWERS),
    Mutant("the weight of a token ignored", "model.cross_entropy", "valid * weights[i]", "-1.0 * valid", LOG_PROBS),
    Mutant("tokens left in sorted order", "model.cross_entropy", "jnp.zeros_like(log_probs).at[order].set(log_probs)", "log_probs", LOG_PROBS),
    Mutant("only the first chunk computed", "model.cross_entropy", "(chunk_targets[:, 0] >= 0).sum()", "(chunk_targets[:1, 0] >= 0).sum()", LOG_PROBS),
    Mutant("chat protection of the last message only", "tokenizer.chat_template", "given = given.map_texts(mark)", "given = dataclasses.replace(given, messages=[*given.messages[:-1], *given.map_texts(mark).messages[-1:]])", PROTECTED),
    Mutant("a weights' name as HTML", "web.responses", "<b>{html.escape(title or str(name))}</b>", "<b>{title or name}</b>", STATUS_AS_TEXT),
    Mutant("a device's name as HTML", "web.responses", "{html.escape(self.device)}, ", "{self.device}, ", STATUS_AS_TEXT),
    Mutant("a fault as HTML", "web.events", "{html.escape(error_message(error), quote=False)}", "{error_message(error)}", FAULTS_AS_TEXT),
    Mutant("a fault in a corner as HTML", "web.events", "message = html.escape(error_message(error), quote=False)", "message = error_message(error)", FAULTS_AS_TEXT),
    Mutant("progress as HTML", "web.events", "{html.escape(doing)}", "{doing}", FAULTS_AS_TEXT),
    Mutant("a damaged checkpoint's fault as HTML", "web.responses", "{html.escape(str(error))}", "{error}", f"{ESCAPING}::test_a_checkpoint_that_cannot_be_read_and_its_runs_name_are_shown_as_text"),
    Mutant("the seed ignored from the second epoch on", "data.batches", "key = (self.recipe.seed, int(epoch), source_id)", "key = (self.recipe.seed if epoch == 0 else 0, int(epoch), source_id)", EPOCHS),
    Mutant("every epoch in the same order", "data.batches", "key = (self.recipe.seed, int(epoch), source_id)", "key = (self.recipe.seed, 0, source_id)", EPOCHS),
    Mutant("rows in another order whatever the seed", "finetuning.batches", "(self.recipe.seed, int(epoch), source))", "(0, int(epoch), source))", EPOCHS),
    Mutant("4 rounds of the permutation", "data.shuffle", "ROUNDS = 12", "ROUNDS = 4", "tests/data/test_shuffle.py::test_every_order_of_few_numbers_comes_about_equally_often"),
    Mutant("the last batch of a validation dropped", "data.batches", "for start in range(0, len(windows), B):", "for start in range(0, len(windows) - B + 1, B):", SPREAD),
    Mutant("the first held-out windows", "data.batches", "np.linspace(0, source.held_out.count - 1, count).round().astype(int)", "np.arange(count)", SPREAD),
    Mutant("the first held-out rows", "finetuning.batches", "np.linspace(0, rows - 1, count).round().astype(int)", "np.arange(count)", SPREAD),
    Mutant("the last batch of held-out rows dropped", "finetuning.batches", "for start in range(0, len(numbers), size):", "for start in range(0, len(numbers) - size + 1, size):", SPREAD),
    Mutant("a plain mean over unequal batches", "training.validation", "sizes.append(int(objective.count(jax.tree.map(jnp.asarray, batch), execution)))", "sizes.append(1)", WEIGHTED),
    Mutant("masked documents weighted by all tokens", "training.validation", "sizes.append(int(objective.count(jax.tree.map(jnp.asarray, batch), execution)))", "sizes.append(jax.tree.leaves(batch)[0][:, 1:].size)", WEIGHTED),
    Mutant("micro-batches as a mean of means", "training.loss", "learn(model, micro_batch, execution, count, objective, frozen)), None", "learn(model, micro_batch, execution, objective.count(micro_batch, execution) * execution.accumulation_steps, objective, frozen)), None", f"{UNEQUAL}::test_micro_batches_add_up_to_the_mean_over_all_learnt_tokens"),
    Mutant("the first eos id only ends a text", "generation.engine", "self.eos_token_ids = self.generation.eos_token_ids", "self.eos_token_ids = self.generation.eos_token_ids[:1]", f"{ENGINE}::test_a_streamed_text_is_whole_characters_and_ends_before_eos"),
    Mutant("a list of eos ids cut to one", "config.generation_config", "return tuple(dict.fromkeys(i for i in ids if i != -1))", "return tuple(dict.fromkeys(i for i in ids if i != -1))[:1]", "tests/tokenizer/test_own_tokenizer.py::test_end_tokens_and_sampling_of_another_programs_gguf_are_used"),
    Mutant("eos as the last allowed token called length", "generation.engine", 'finish = "eos"\n', 'finish = "length" if self.count == self._max_new_tokens else "eos"\n', f"{ENGINE}::test_eos_as_the_last_token_allowed_ends_the_text_and_not_the_limit"),
    Mutant("chat_template.jinja left behind", "tokenizer.source", '    "chat_template.jinja",\n', "", "tests/tokenizer/test_own_tokenizer.py::test_every_file_of_a_tokenizer_goes_along_into_runs_and_exports"),
    Mutant("special tokens of a corpus parsed", "data.prepare_worker", "tokenizer.core.encode_special_tokens = not job.special_tokens", "tokenizer.core.encode_special_tokens = False", "tests/data/test_bad_text.py::test_special_tokens_of_a_corpus_are_special_on_request_and_else_there_is_a_warning"),
    Mutant("the penalty forgets what slid out", "generation.generate", "zip(seen, self.texts, strict=False)", "zip(seen, self.windows, strict=False)", f"{GENERATE}::test_the_repetition_penalty_remembers_what_slid_out_of_the_context"),
    Mutant("q8_0 of a file from float16", "weights.gguf_writer", "exact = np.asarray(tensor, np.float32)", "exact = np.asarray(tensor.astype(np.float16), np.float32)", TYPES),
    Mutant("q8_0 for decoding from float16", "generation.quantized", "blocks = np.asarray(matrix, np.float32)", "blocks = np.asarray(matrix.astype(np.float16), np.float32)", f"{QUANTIZED}::test_blocks_are_ggmls"),
    Mutant("one item verified without the step's own files", "runs.manifest", 'if not items or "/" not in name or name', "if not items or name", f"{STORE}::test_reading_one_item_checks_the_steps_own_files_and_its_meta"),
    Mutant("a manifest signed again believed", "runs.manifest", "    if not valid:", "    if False:", f"{STORE}::test_a_manifest_signed_again_with_other_fields_is_damage"),
    Mutant("an unknown key of a manifest ignored", "runs.manifest", "content.keys() <= names\n        and ", "", f"{STORE}::test_a_manifest_signed_again_with_other_fields_is_damage"),
    Mutant("an empty folder in a step ignored", "runs.manifest", "if not path.is_dir() or not any(path.iterdir()))", "if not path.is_dir())", f"{STORE}::test_an_empty_folder_a_pipe_and_a_device_in_a_step_are_damage"),
    Mutant("a file named as a step is one", "runs.checkpoint", 'checkpoints.glob("*") if path.is_dir())', 'checkpoints.glob("*"))', f"{STORE}::test_a_file_or_a_number_beyond_64_bits_is_no_step"),
    Mutant("a step beyond 64 bits is one", "runs.checkpoint", "[1-9][0-9]{0,17}", "[1-9][0-9]*", f"{STORE}::test_a_file_or_a_number_beyond_64_bits_is_no_step"),
    Mutant("one step too few kept", "runs.checkpoint", "self.steps()[: -self._keep]", "self.steps()[: 1 - self._keep]", "tests/runs/test_checkpoint.py::test_the_newest_checkpoints_are_kept"),
    Mutant("a value that is not finite saved", "runs.checkpoint", 'raise DivergedError(f"step {step}: {names[0]}', 'print(f"step {step}: {names[0]}', f"{STORE}::test_numbers_that_are_not_finite_are_neither_saved_nor_restored"),
    Mutant("a background save of the arrays themselves", "runs.checkpoint", "jax.tree.map(jnp.copy, items), meta)", "items, meta)", f"{STORE}::test_a_background_save_holds_the_numbers_of_its_moment"),
    Mutant("a renamed step restored", "runs.checkpoint", 'if content["step"] != step:', "if False:", f"{STORE}::test_a_step_under_another_number_is_damage"),
    Mutant("a checkpoint's meta of another type", "runs.checkpoint", "if not isinstance(meta, dict):", "if False:", "tests/weights/test_weights.py::test_a_checkpoint_sealed_again_with_another_meta_is_refused_in_one_line"),
    Mutant("a field of another type in a checkpoint", "runs.provenance", "if name in hints and not _has_type(value, hints[name]):", "if False:", "tests/weights/test_weights.py::test_a_checkpoint_sealed_again_with_another_meta_is_refused_in_one_line"),
    Mutant("true taken for a number of a checkpoint", "runs.provenance", " and (hint is bool or type(value) is not bool)", "", "tests/training/test_resume.py::test_a_checkpoint_with_another_meta_is_not_resumed"),
    Mutant("a template's text of any length", "tokenizer.template_worker", "if len(text) <= max_characters else", "if True else", "tests/tokenizer/test_chat_template.py::test_the_length_of_a_text_is_bounded_in_the_process_that_renders"),
    Mutant("an interrupted rendering answers the next", "tokenizer.template_process", "                self.close()\n                raise", "                raise", "tests/tokenizer/test_chat_template.py::test_a_fork_and_an_interrupt_do_not_mix_up_renderings"),
    Mutant("a fork renders in its parent's process", "tokenizer.template_process", " or self._owner != os.getpid():", ":", "tests/tokenizer/test_chat_template.py::test_a_fork_and_an_interrupt_do_not_mix_up_renderings"),
    Mutant("a panic of tokenizers is not caught", "runtime.panics", "except BaseException as error:  # Panic", "except Exception as error:  # Panic", "tests/tokenizer/test_tokenizer.py::test_a_regex_that_gives_up_on_a_text_is_refused_by_name"),
    Mutant("a line of metrics of any length", "runs.metrics", "while line := file.readline(MAX_ROW_BYTES + 1):", "while line := file.readline():", "tests/web/test_web_parts.py::test_a_log_without_a_line_end_is_not_read_whole"),
    Mutant("a device read as a log", "web.run_curves", "if not S_ISREG(stat.st_mode):", "if False:", "tests/web/test_web_parts.py::test_a_log_that_is_a_device_or_has_a_huge_line_is_told"),
    Mutant("a step beyond 64 bits read from a log", "runs.metrics", "if len(digits) > 19 or abs(value := int(digits)) >= 1 << 63:", "if (value := int(digits)) is None:", "tests/web/test_web_parts.py::test_a_line_that_is_no_row_is_told_and_what_came_before_is_kept"),
    Mutant("an export's tensors not compared with their digest", "weights.gguf_reader", "    if exported:", "    if False:", f"{EXPORTED}::test_a_flipped_bit_anywhere_in_an_export_is_refused"),
    Mutant("an export's metadata not compared with their digest", "weights.gguf_reader", "    if stored != actual:", "    if False:", f"{EXPORTED}::test_a_flipped_bit_anywhere_in_an_export_is_refused"),
    Mutant("an export's file type left out of the digest", "weights.gguf_reader", "or key in KEPT_KEYS)", "or False)", f"{EXPORTED}::test_what_other_programs_make_of_an_export_is_read"),
    Mutant("a Parquet file larger than its rows allow", "data.text_tables", "if size > 2 * max(1, num_rows * len(chunks)) * limit + PAGE_OVERHEAD or (", "if (", PARQUET),
    Mutant("a Parquet file that expands a thousandfold", "data.text_tables", "size > 64 * limit and size > EXPANSION * stored", "False", PARQUET),
    Mutant("64 rows of a Parquet file whatever their size", "data.text_tables", "rows = max(1, min(64, 64 * limit // max(1, size)))", "rows = 64", PARQUET),
    Mutant("a text of a table of any length", "data.text_tables", "if text is not None and len(text) > limit:", "if False:", PARQUET),
    Mutant("an idle connection kept", "web.server", "                self.transport.close()", "                pass", "tests/web/test_app.py::test_a_connection_that_asks_for_nothing_is_closed_and_a_slow_answer_is_not"),
    Mutant("a slow answer taken for an idle connection", "web.server", "if self.cycle is last and answered:", "if self.cycle is last or True:", "tests/web/test_app.py::test_a_connection_that_asks_for_nothing_is_closed_and_a_slow_answer_is_not"),
    Mutant("a proxy's headers believed without one", "web.middleware", "if not self.behind_proxy:", "if False:", "tests/web/test_app.py::test_the_headers_of_a_proxy_are_believed_only_behind_one"),
    Mutant("any host name allowed", "web.middleware", "if self.hosts is not None and host_name(host) not in self.hosts:", "if False:", f"{MIDDLEWARE}::test_other_hosts_origins_methods_and_routes_are_refused"),
    Mutant("another origin allowed", "web.middleware", "if origin is not None and origin not in [", "if origin is not None and not origin and origin not in [", f"{MIDDLEWARE}::test_other_hosts_origins_methods_and_routes_are_refused"),
    Mutant("events of a session that nobody opened", "web.middleware", "if not self.has_session(session):", "if False:", f"{MIDDLEWARE}::test_events_are_for_a_session_that_has_called"),
    Mutant("a body of any size", "web.middleware", "if len(body) > limit:", "if False:", f"{MIDDLEWARE}::test_a_body_is_read_whole_up_to_its_limit_of_size_and_time"),
    Mutant("a call with too few values", "web.middleware", "or len(data) != self.input_counts[number]", "", f"{MIDDLEWARE}::test_a_call_is_of_a_function_of_the_page_with_its_values"),
    Mutant("what a killed conversion left is kept", "runtime.atomic", "file=sys.stderr)\n                    _remove(path)", "file=sys.stderr)", "tests/weights/test_conversion_edges.py::test_what_a_killed_conversion_left_is_removed_by_the_next_one_to_the_same_target"),
    Mutant("what a live process writes is removed", "runtime.atomic", "fcntl.flock(folder, fcntl.LOCK_EX | fcntl.LOCK_NB)", "pass", "tests/weights/test_conversion_edges.py::test_what_a_killed_conversion_left_is_removed_by_the_next_one_to_the_same_target"),
    Mutant("a resumed run leaves out a validation", "training.loop", "self.is_validated(progress.step) and log.lacks_validation(progress.step)", "False", "tests/training/test_resume.py::test_stopped_and_resumed_is_bit_equal_also_across_an_epoch"),
    Mutant("top-k keeps one more", "generation.sampling", "lambda mask: mask.sum(axis=-1) >= k)", "lambda mask: mask.sum(axis=-1) > k)", DRAWS),
    Mutant("top-p of all tokens, not of those top-k kept", "generation.sampling", "mass = jnp.where(top_k, relative, 0)", "mass = relative", DRAWS),
    Mutant("min-p of the whole probability", "generation.sampling", "(relative >= sampling.min_p[:, None])", "(relative / relative.sum(axis=-1, keepdims=True) >= sampling.min_p[:, None])", DRAWS),
    Mutant("the penalty multiplies positive logits", "generation.sampling", "jnp.where(logits < 0, logits * penalty, logits / penalty)", "jnp.where(logits < 0, logits / penalty, logits * penalty)", DRAWS),
    Mutant("the penalty of the first row for all", "generation.sampling", "penalty = penalty[:, None].astype(logits.dtype)", "penalty = penalty[:1, None].astype(logits.dtype)", ALONE),
    Mutant("the noise of the first row for all", "generation.sampling", "jax.vmap(gumbel)(sampling.seed, count)", "gumbel(sampling.seed[0], count[0])[None]", ALONE),
    Mutant("the same noise at every token", "generation.sampling", "jax.random.fold_in(jax.random.key(seed), count)", "jax.random.key(seed)", DRAWS),
    Mutant("the noise divided by the temperature", "generation.sampling", "jnp.where(mask, scaled + noise, -jnp.inf)", "jnp.where(mask, shifted + noise, -jnp.inf)", DRAWS),
    Mutant("a threshold 16 bits too coarse", "generation.sampling", "jax.lax.fori_loop(0, 31, bisect", "jax.lax.fori_loop(0, 15, bisect", KEPT),
    Mutant("one moment of two planned", "training.memory", "optimizer_state=2 * trained // fsdp", "optimizer_state=trained // fsdp", f"{TERMS}::test_in_float32_on_one_device"),
    Mutant("planned residuals of one layer", "training.memory", "residuals = L * M * elements * (wide if", "residuals = M * elements * (wide if", f"{TERMS}::test_in_float32_on_one_device"),
    Mutant("a planned softmax without its logsumexp", "training.memory", 'residuals += L * M * wide * N if execution.remat != "full" else 0', "residuals += 0", f"{TERMS}::test_what_layers_keep_depends_on_remat"),
    Mutant("gathered parameters not planned", "training.memory", "gathered_parameters=_gathered_parameters(shape) if fsdp > 1 else 0", "gathered_parameters=0", f"{TERMS}::test_on_a_mesh_of_four_with_two_micro_batches"),
    Mutant("sums over micro-batches not planned", "training.memory", "accumulated_gradients=trained if execution.accumulation_steps > 1 else 0", "accumulated_gradients=0", f"{TERMS}::test_on_a_mesh_of_four_with_two_micro_batches"),
    Mutant("a planned batch not divided by its micro-batches", "training.memory", "(self.execution.devices * self.execution.accumulation_steps)", "self.execution.devices", f"{TERMS}::test_on_a_mesh_of_four_with_two_micro_batches"),
    Mutant("logits planned for all tokens at once", "training.memory", "logits = -(-M // chunks) *", "logits = M *", f"{TERMS}::test_the_loss_holds_one_chunk_of_logits_and_two_gradients_of_the_head"),
    Mutant("masks planned for half of the pairs of blocks", "training.memory", "n * (n + 1) // 2 * shape.rows", "n * n // 2 * shape.rows", f"{TERMS}::test_masks_of_pairs_of_blocks_and_of_documents"),
    Mutant("the planned peak a sum of phases", "training.memory", "max(computing, self.update)", "computing + self.update", f"{TERMS}::test_the_peak_is_the_loss_the_backward_pass_or_the_update"),
    Mutant("cuDNN's workspace of the shorter length", "training.memory", "(-(-length // 128) * 128)", "length", f"{TERMS}::test_masks_of_pairs_of_blocks_and_of_documents"),
    Mutant("gradients summed over one axis", "parallel.sharding", "return jax.lax.psum(x, AXES)", 'return jax.lax.psum(x, "fsdp")', EVERYWHERE),
    Mutant("scattered gradients not summed over data", "parallel.sharding", 'return jax.lax.psum(jax.lax.psum_scatter(x, "fsdp", scatter_dimension=len(spec) - 1, tiled=True), "data")', 'return jax.lax.psum_scatter(x, "fsdp", scatter_dimension=len(spec) - 1, tiled=True)', EVERYWHERE),
    Mutant("each device's mean of its own tokens", "training.loss", "count = jax.lax.psum(objective.count(batch, execution), sharding.AXES)", "count = jax.lax.axis_size(sharding.AXES) * objective.count(batch, execution)", EVERYWHERE),
    Mutant("a device reads the first rows", "parallel.sharding", "read_rows(index[0])", "read_rows(slice(0, index[0].stop - index[0].start))", OWN_SHARD),
    Mutant("padding rows of zeros", "training.validation", "constant_values=-1", "constant_values=0", OWN_SHARD),
    Mutant("a leaf sharded along its smallest dimension", "parallel.sharding", "int(np.argmax(sizes))", "int(np.argmin(sizes))", "tests/parallel/test_sharding.py::test_a_leaf_is_sharded_along_its_largest_divisible_dimension_or_not_at_all"),
    Mutant("a leaf sharded that does not divide", "parallel.sharding", "size if shards > 1 and size % shards == 0 else 0", "size if shards > 1 else 0", "tests/parallel/test_sharding.py::test_a_leaf_is_sharded_along_its_largest_divisible_dimension_or_not_at_all"),
    Mutant("a document begins one token early", "training.loss", "jnp.pad(tokens[:, :-1] == separator_id, ((0, 0), (1, 0)))", "tokens == separator_id", "tests/parallel/test_sharding.py::test_documents_and_positions_are_counted_from_the_ends"),
    Mutant("positions not restarted in a document", "training.loss", "index - jax.lax.cummax(jnp.where(is_first, index, 0), axis=1)", "index + 0 * jax.lax.cummax(jnp.where(is_first, index, 0), axis=1)", "tests/parallel/test_sharding.py::test_documents_and_positions_are_counted_from_the_ends"),
    Mutant("the first token of a document learnt", "training.loss", "jnp.where(tokens[:, :-1] == execution.separator_id, -1, tokens[:, 1:])", "tokens[:, 1:]", "tests/parallel/test_sharding.py::test_masked_documents_are_learnt_as_if_each_stood_alone"),
    Mutant("continuations see each other", "evaluation.loglikelihood", "(same_segment | (segment_ids == CONTEXT)[:, None, :])", "(same_segment | (segment_ids >= CONTEXT)[:, None, :])", f"{SCORES}::test_scores_are_those_of_each_request_alone"),
    Mutant("continuations one after another in position", "evaluation.loglikelihood", "range(last + 1, last + 1 + inputs)", "range(end, end + inputs)", f"{SCORES}::test_scores_are_those_of_each_request_alone"),
    Mutant("scores summed in float32", "evaluation.loglikelihood", "np.zeros(len(requests)), np.ones", "np.zeros(len(requests), np.float32), np.ones", f"{SCORES}::test_the_log_probabilities_of_a_long_text_are_summed_in_float64"),
    Mutant("windows of a text overlap by one", "data.batches", "self._ends[i - 1] if i else 0)) * self._T", "self._ends[i - 1] if i else 0)) * (self._T - 1)", f"{BATCHES}::test_each_token_is_learnt_once_an_epoch_and_held_out_ones_never"),
    Mutant("a window of a file that ends one token early", "data.batches", "max(stop - start - 1, 0) // T", "max(stop - start, 0) // T", f"{BATCHES}::test_each_token_is_learnt_once_an_epoch_and_held_out_ones_never"),
    Mutant("layers unrolled in reverse", "generation.unrolled", "jax.tree.map(lambda x, i=i: x[i], stacked)", "jax.tree.map(lambda x, i=i: x[-1 - i], stacked)", f"{GENERATE}::test_layers_laid_out_give_the_models_logits"),
    Mutant("unrolled logits rounded to bfloat16", "generation.unrolled", ", preferred_element_type=jnp.float32)", ")", f"{GENERATE}::test_layers_laid_out_give_the_models_logits"),
    Mutant("unrolled without the last norm", "generation.unrolled", "return rms_norm(x, self.model.norm[...], self.config.rms_norm_eps), cache", "return x, cache", f"{GENERATE}::test_layers_laid_out_give_the_models_logits"),
    Mutant("q before v in fused projections", "model.smollm", "qkv = attention.q_proj[...], attention.k_proj[...], attention.v_proj[...]", "qkv = attention.q_proj[...], attention.v_proj[...], attention.k_proj[...]", f"{GENERATE}::test_layers_laid_out_give_the_models_logits"),
    Mutant("up before gate in fused projections", "model.smollm", "jnp.concatenate([mlp.gate_proj[...], mlp.up_proj[...]], axis=-1)", "jnp.concatenate([mlp.up_proj[...], mlp.gate_proj[...]], axis=-1)", f"{GENERATE}::test_layers_laid_out_give_the_models_logits"),
    Mutant("a grown cache shifted", "model.attention", "padding = [(0, 0), (0, 0), (0, cache_size - self.keys.shape[2]), (0, 0), (0, 0)]", "padding = [(0, 0), (0, 0), (cache_size - self.keys.shape[2], 0), (0, 0), (0, 0)]", f"{GENERATE}::test_a_cache_that_grows_changes_nothing"),
    Mutant("a quantised cache not transposed back", "model.attention", "values = cache.values.transpose(0, 1, 3, 2, 4).reshape(L, B * K, S, H)", "values = cache.values.reshape(L, B * K, S, H)", ROUNDED),
    Mutant("attention of a decoded token not normalized", "model.attention", "/ weights.sum(axis=-1, keepdims=True)", "/ 1", ROUNDED),
    Mutant("a quantised query not scaled", "model.attention", "N // K, H) * H**-0.5, keys)", "N // K, H), keys)", ROUNDED),
    Mutant("int8 where bfloat16 is asked for", "generation.quantized", 'return to_blocks(matrix) if kind == "int8" else', "return to_blocks(matrix) if kind else", f"{QUANTIZED}::test_bf16_rounds_to_bfloat16_and_int8_to_blocks"),
    Mutant("logits rounded to bfloat16", "model.smollm", 'return jnp.einsum("BTD,VD->BTV", hidden, head, preferred_element_type=jnp.float32)', 'return jnp.einsum("BTD,VD->BTV", hidden, head)', f"{MODEL}::test_logits_are_float32_and_close_in_every_compute_dtype"),
    Mutant("angles of rotary positions in bfloat16", "model.ops", "angle_dtype = jnp.promote_types(dtype, jnp.float32)", "angle_dtype = jnp.dtype(dtype)", f"{MODEL}::test_rotary_angles_are_not_rounded_to_bfloat16"),
    Mutant("a norm computed in bfloat16", "model.ops", "x = x.astype(jnp.promote_types(x.dtype, jnp.float32))", "x = x", f"{MODEL}::test_rms_norm_rounds_before_it_scales"),
    Mutant("decay of the learning rate one step late", "training.optimizer", "boundaries=[warmup, recipe.decay_start]", "boundaries=[warmup, recipe.decay_start + 1]", ADAMW),
    Mutant("decay on the norms in fine-tuning", "training.optimizer", 'lambda path, _: "norm" not in', 'lambda path, _: "nothing" not in', "tests/finetuning/test_finetune.py::test_weight_decay_leaves_the_norms_alone"),
    Mutant("a gradient larger than the limit by its factor", "training.optimizer", "jnp.where(norm < limit, 1, limit / norm)", "jnp.where(norm < limit, 1, norm / limit)", ADAMW),
    Mutant("an update that is not finite applied", "training.train_step", "update_where(jnp.isfinite(loss) & jnp.isfinite(norm), update, state)", "update_where(jnp.isfinite(loss) | jnp.isfinite(norm), update, state)", "tests/training/test_resume.py::test_an_update_that_is_not_finite_leaves_the_state_as_it_was"),
    Mutant("a slot that sees one token too few", "model.slot_cache", "jnp.arange(block) <= last", "jnp.arange(block) < last", TEXT_ALONE),
    Mutant("idle slots written to", "model.slot_cache", "jnp.where(active, length, cache.keys.shape[-1])", "length", TEXT_ALONE),
    Mutant("blocks of a cache not corrected for a larger score", "model.slot_cache", "out * correction + new", "out + new", TEXT_ALONE),
    Mutant("a part of a prompt at the first positions", "generation.slot_programs", "(length + jnp.arange(T))[None]", "jnp.arange(T)[None]", TEXT_ALONE),
    Mutant("the noise of a slot stands still", "generation.slot_programs", "count=rows.count + active", "count=rows.count", TEXT_ALONE),
    Mutant("the sampling of a slot forgets its text", "generation.slot_programs", "seen=rows.seen.at[index].max(active)", "seen=rows.seen", f"{SLOTS}::test_penalties_count_the_tokens_of_the_text_and_not_of_the_prompt"),
    Mutant("a frequency penalty counts once", "generation.slot_programs", "frequency * rows.counts", "frequency * (rows.counts > 0)", f"{SLOTS}::test_penalties_count_the_tokens_of_the_text_and_not_of_the_prompt"),
    Mutant("log-probabilities after the bias", "generation.slot_programs", "lambda: token_logprobs(logits, token)", "lambda: token_logprobs(adjusted, token)", f"{SLOTS}::test_a_bias_forbids_or_forces_a_token_and_log_probabilities_stay_the_models"),
    Mutant("a part of a prompt beyond the end of the cache", "generation.slots", "start = min(text.read, self._cache.keys.shape[-1] - size)", "start = text.read", CACHED_PREFIX),
    Mutant("the last token of a text counted as cached", "generation.slots", "*self.ids[:-1]]", "*self.ids]", CACHED_PREFIX),
    Mutant("a slot not copied", "generation.slot_programs", "jax.lax.dynamic_slice_in_dim(x, source, 1, 1), target, 1)", "jax.lax.dynamic_slice_in_dim(x, target, 1, 1), target, 1)", CACHED_PREFIX),
    Mutant("what a slot held is lost", "generation.slots", "lost >= SMALLEST_COPY and", "lost < 0 and", CACHED_PREFIX),
    Mutant("a queue without an end", "generation.slots", "if len(self._queue) + len(jobs) > self.queue_size + free", "if len(jobs) > self.queue_size + free", f"{SLOTS}::test_more_than_can_wait_is_refused_whole"),
    Mutant("the same seed for every choice", "serve.fields", "seed=(seed + i) % 2**32", "seed=seed % 2**32", f"{SERVE}::test_a_stream_joins_to_the_whole_answer_and_ends_with_the_usage"),
    Mutant("a grammar that stands still", "generation.slots", "text.job.grammar.add(token.id)", "pass", f"{SERVE}::test_a_text_follows_its_schema_beside_others_that_do_not"),
    Mutant("every name gets the first model", "serve.app", "return self.models_by_name[name]", "return self.default", f"{MODELS}::test_each_model_gives_its_own_text_whoever_else_is_asked"),
    Mutant("the adapters share all weights", "generation.engine", "theirs if np.array_equal(mine, theirs) else mine", "theirs", f"{MODELS}::test_what_an_adapter_does_not_change_is_in_memory_once"),
    Mutant("any key will do", "serve.guard", "return any(matches) and header", "return header", f"{GUARD}::test_hosts_origins_keys_and_sizes"),
    Mutant("every page may ask", "serve.guard", "return origin in own or origin in self.origins", "return True or origin in self.origins", f"{GUARD}::test_hosts_origins_keys_and_sizes"),
]  # fmt: skip
