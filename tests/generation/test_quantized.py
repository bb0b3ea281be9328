"""A quantised model computes with exactly its rounded values, and a q8_0 GGUF is used without being quantised again."""

import dataclasses

import gguf
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from smollm_jax import weights
from smollm_jax.errors import UsageError
from smollm_jax.generation import programs
from smollm_jax.generation import quantized as quantized_module
from smollm_jax.generation.engine import Engine
from smollm_jax.generation.generate import generate
from smollm_jax.generation.quantized import Blocks, Quantized, dequantize, quantized_linear, to_blocks
from smollm_jax.generation.sampling import GREEDY, Sampling
from smollm_jax.model.attention import UnstackedKVCache, cached, cached_unstacked
from smollm_jax.model.smollm import SmolLM
from smollm_jax.weights.gguf_reader import METADATA_DIGEST

PROMPTS = [[5, 17, 400], [9], list(range(100, 140))]
Q8_0 = gguf.GGMLQuantizationType.Q8_0


def texts(model, prompts=PROMPTS, max_new_tokens=12, sampling=GREEDY):
    return np.concatenate(list(generate(model, prompts, max_new_tokens=max_new_tokens, sampling=sampling)), axis=1)


@pytest.fixture(scope="module", params=["int8", pytest.param("bf16", marks=pytest.mark.slow)])
def quantized(request, tiny_model) -> Quantized:
    return Quantized.from_model(tiny_model, request.param)


def test_blocks_are_ggmls():
    """Equal to the gguf package's rounding, on rows of zeros, halves, huge and tiny numbers."""
    rng = np.random.default_rng(0)
    matrix = rng.normal(size=(64, 96)).astype(np.float32) * 10.0 ** rng.integers(-6, 4, (64, 1)).astype(np.float32)
    matrix[3] = 0
    matrix[4] = np.resize(np.array([127, 0.5, -0.5, 1.5, 2.5, -2.5, 126.5, -127], np.float32), 96)
    blocks = to_blocks(matrix)
    raw = gguf.quants.quantize(matrix, Q8_0).reshape(64, 3, 34)
    np.testing.assert_array_equal(blocks.scales.view(np.uint16), raw[..., :2].copy().view(np.uint16)[..., 0])
    np.testing.assert_array_equal(blocks.values.reshape(64, 3, 32), raw[..., 2:].view(np.int8))
    np.testing.assert_array_equal(dequantize(blocks), gguf.quants.dequantize(raw.reshape(64, -1), Q8_0))


@pytest.mark.parametrize("rows", [1, 3, 8])
@pytest.mark.parametrize("kind", ["bf16", "int8"])
def test_a_product_is_that_of_the_numbers_stored(kind, rows):
    """Compared with float64: no block, row or last element is skipped or gets another's scale."""
    rng = np.random.default_rng(rows)
    matrix = (rng.normal(size=(40, 96)) * np.exp(rng.normal(size=(40, 1)))).astype(np.float32)
    if kind == "int8":
        stored = jax.tree.map(jnp.array, blocks := to_blocks(matrix))
        numbers = blocks.values * np.repeat(blocks.scales.astype(np.float64), 32, axis=1)
    else:
        stored = jnp.asarray(matrix, jnp.bfloat16)
        numbers = np.asarray(stored, np.float64)
    x = rng.normal(size=(rows, 1, 96)).astype(np.float32)
    truth, sizes = x.astype(np.float64) @ numbers.T, np.abs(x).astype(np.float64) @ np.abs(numbers.T)
    error = np.abs(np.asarray(jax.jit(quantized_linear)(jnp.asarray(x), stored, jnp.ones(100))) - truth) / sizes
    assert error.max() < 96 * 2**-24


def test_it_computes_what_the_rounded_model_does(quantized):
    """Logits and cache of a padded prompt of two rows and of three more tokens equal those of the float32 model."""
    start = jnp.asarray([0, 3], jnp.int32)
    cache, _ = programs.prefill(quantized.model, jnp.arange(20).reshape(2, 10) * 7, start, cache_size=16)
    ours = programs.unstack_cache(cache)
    for token in ([7, 300], [12, 5], [400, 1]):
        tokens, positions = jnp.asarray(token, jnp.int32)[:, None], (cache.length - start)[:, None]
        hidden, ours = quantized.hidden_states(tokens, positions=positions, attend=cached_unstacked(start), cache=ours)
        theirs, cache = quantized.model.hidden_states(tokens, positions=positions, attend=cached(start), cache=cache)
        expected = np.asarray(quantized.model.logits(theirs))
        np.testing.assert_allclose(quantized.logits(hidden), expected, rtol=0, atol=2e-6 * np.abs(expected).max())
        cache, ours = cache.advance(1), ours.advance(1)
    unstacked = UnstackedKVCache.from_stacked(cache)
    for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(unstacked), strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=1e-5)


def test_the_model_holds_the_rounded_numbers(quantized, tiny_model):
    """Every matrix, q and k too, in the model's layout; norms are unchanged."""
    before, after = (weights.to_bundle(m).tensors for m in (tiny_model, quantized.model))
    for name, tensor in before.items():
        if tensor.ndim == 1:
            np.testing.assert_array_equal(after[name], tensor)
        elif isinstance(quantized.head, Blocks):
            expected = gguf.quants.dequantize(gguf.quants.quantize(tensor, Q8_0), Q8_0)
            np.testing.assert_array_equal(after[name], expected)
        else:
            np.testing.assert_array_equal(after[name], np.asarray(jnp.asarray(tensor, jnp.bfloat16), np.float32))


def test_greedy_text_is_the_rounded_models(quantized):
    np.testing.assert_array_equal(texts(quantized), texts(quantized.model))


@pytest.mark.parametrize(
    "sampling", [pytest.param(Sampling(), marks=pytest.mark.slow), Sampling(1.0, 50, 0.9, 0.01, 1.2, seed=3)]
)
def test_a_prompt_gives_the_same_text_alone_in_a_batch_and_again(quantized, sampling):
    together = texts(quantized, sampling=sampling)
    np.testing.assert_array_equal(together, texts(quantized, sampling=sampling))
    for row, prompt in zip(together, PROMPTS, strict=True):
        np.testing.assert_array_equal(row, texts(quantized, [prompt], sampling=sampling)[0])


@pytest.mark.slow
def test_a_cache_that_grows_changes_nothing(quantized, monkeypatch):
    whole = texts(quantized, max_new_tokens=100)
    monkeypatch.setattr(programs, "SMALLEST_QUANTIZED_CACHE", 64)
    np.testing.assert_array_equal(texts(quantized, max_new_tokens=100), whole)


@pytest.mark.slow
def test_an_untied_head_is_the_one_that_is_used(tiny):
    model = SmolLM(dataclasses.replace(tiny, tie_word_embeddings=False), key=jax.random.key(1))
    quantized = Quantized.from_model(model, "int8")
    np.testing.assert_array_equal(dequantize(quantized.head), quantized.model.head)
    np.testing.assert_array_equal(texts(quantized), texts(quantized.model))


def test_a_q8_0_gguf_is_decoded_as_it_lies(tiny_model, tokenizer_path, tmp_path):
    """Every block's largest value is below 127, so that quantising it again would change its scale."""
    from smollm_jax.tokenizer.source import read_tokenizer_files

    path = tmp_path / "x.gguf"
    bundle = weights.to_bundle(tiny_model, "random", read_tokenizer_files(tokenizer_path))
    weights.write(path, bundle, "gguf", gguf_type="q8_0")
    halve_values(path)
    stored = Engine.load(path, quantize="int8").decoder
    assert isinstance(stored, Quantized)
    raw = {tensor.name: tensor for tensor in gguf.GGUFReader(path).tensors}
    for i, layer in enumerate(stored.layers):
        gguf_names = {"down_proj": ["ffn_down"], "gate_up_proj": ["ffn_gate", "ffn_up"], "o_proj": ["attn_output"]}
        for ours, theirs in gguf_names.items():
            rows = np.concatenate([raw[f"blk.{i}.{name}.weight"].data for name in theirs])
            assert_is_stored(getattr(layer, ours), rows)
        config = tiny_model.config
        heads = [("attn_q", config.num_attention_heads), ("attn_k", config.num_key_value_heads), ("attn_v", 0)]
        pieces = [in_halves(raw[f"blk.{i}.{name}.weight"].data, count) for name, count in heads]
        assert_is_stored(layer.qkv_proj, np.concatenate(pieces))
    assert_is_stored(stored.head, raw["token_embd.weight"].data)
    np.testing.assert_array_equal(stored.model.head, dequantize(stored.head))
    assert isinstance(stored.head, Blocks)
    assert np.abs(stored.head.values).max() <= 64


def in_halves(rows, heads):
    """Rows of q or k in Hugging Face's order: the first of all pairs, then the second."""
    return rows.reshape(heads, -1, 2, rows.shape[1]).swapaxes(1, 2).reshape(rows.shape) if heads else rows


def assert_is_stored(blocks, rows):
    parts = rows.reshape(len(rows), -1, 34)
    np.testing.assert_array_equal(np.asarray(blocks.values), parts[..., 2:].view(np.int8).reshape(len(rows), -1))
    np.testing.assert_array_equal(np.asarray(blocks.scales).view(np.uint8).reshape(len(rows), -1, 2), parts[..., :2])


def halve_values(path):
    """Halves every int8 of the file's matrices and removes a digest, as a file of a writer with another rule."""
    path.write_bytes(path.read_bytes().replace(METADATA_DIGEST.encode(), b"x" * len(METADATA_DIGEST)))
    header = gguf.GGUFReader(path, "r+")
    for tensor in header.tensors:
        if tensor.tensor_type == Q8_0:
            values = tensor.data.reshape(-1, 34)[:, 2:].view(np.int8)
            values[...] = values // 2
    header.data.flush()


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"quantize": "int4"}, "quantize must be one of bf16, int8, got 'int4'"),
        (
            {"quantize": "int8", "dtype": "bfloat16"},
            "--quantize int8 computes in float32: use --dtype float32, not bfloat16",
        ),
    ],
)
def test_what_makes_no_sense_is_refused(change, named, tiny_model, tokenizer_path, tmp_path):
    from smollm_jax.tokenizer.source import read_tokenizer_files

    weights.write(tmp_path / "hf", weights.to_bundle(tiny_model, "", read_tokenizer_files(tokenizer_path)), "hf")
    with pytest.raises(UsageError, match=named):
        Engine.load(tmp_path / "hf", **change)


def test_bf16_rounds_to_bfloat16_and_int8_to_blocks():
    matrix = np.random.default_rng(0).normal(size=(4, 64)).astype(np.float32)
    rounded = quantized_module._quantize(matrix, "bf16")
    assert rounded.dtype == jnp.bfloat16
    np.testing.assert_array_equal(rounded, np.asarray(jnp.asarray(matrix, jnp.bfloat16)))
    blocks = quantized_module._quantize(matrix, "int8")
    np.testing.assert_array_equal(blocks.values, to_blocks(matrix).values)


def test_rows_that_are_no_blocks_are_refused():
    with pytest.raises(UsageError, match="--quantize int8 needs rows of a multiple of 32 values, got 40"):
        to_blocks(np.ones((2, 40), np.float32))


def test_a_gpu_is_refused(tiny_model, monkeypatch):
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    with pytest.raises(UsageError, match="--quantize bf16 is only for CPUs, not a gpu: use --dtype bfloat16"):
        Quantized.from_model(tiny_model, "bf16")
