"""GGUF files of other programs: optional keys left out, keys that change nothing, and keys that change the model."""

import dataclasses
import struct
from pathlib import Path

import gguf
import numpy as np
import pytest

from smollm_jax import weights
from smollm_jax.errors import InputFileError
from smollm_jax.runtime import gguf_header
from smollm_jax.weights import mapping
from tests.small_files import SMALL, gguf_metadata, small_tensors, write_gguf

# As many tokens as the file lists, as many KV heads as heads, theta 10,000: all that a GGUF may leave out.
PLAIN = dataclasses.replace(SMALL, vocab_size=260, num_key_value_heads=2, bos_token_id=None)
OPTIONAL = (
    "llama.vocab_size",
    "llama.attention.head_count_kv",
    "llama.rope.dimension_count",
    "llama.rope.freq_base",
)


def tensors_of(config) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(3)
    return {name: rng.normal(size=shape).astype(np.float32) for name, shape in mapping.hf_shapes(config).items()}


def written(path: Path, config=PLAIN, without: tuple[str, ...] = (), **changed) -> Path:
    metadata = {key: value for key, value in gguf_metadata(config).items() if key not in without}
    write_gguf(path, config, tensors_of(config), metadata | {k.replace("__", "."): v for k, v in changed.items()})
    return path


def assert_is(path: Path, config):
    bundle = weights.read(path)
    assert dataclasses.replace(bundle.config, initializer_range=config.initializer_range) == config
    for name, tensor in tensors_of(config).items():
        np.testing.assert_array_equal(bundle.tensors[name], tensor, err_msg=name)


@pytest.mark.parametrize("without", [*((key,) for key in OPTIONAL), OPTIONAL])
def test_keys_that_a_gguf_may_leave_out_have_llama_cpps_defaults(tmp_path, without):
    assert_is(written(tmp_path / "x.gguf", without=without), PLAIN)


def test_the_length_of_keys_is_the_size_of_a_head_where_the_rotary_size_is_left_out(tmp_path):
    config = dataclasses.replace(PLAIN, head_dim=6)
    lengths = {"llama__attention__key_length": 6, "llama__attention__value_length": 6}
    assert_is(written(tmp_path / "x.gguf", config, without=("llama.rope.dimension_count",), **lengths), config)
    with pytest.raises(InputFileError, match="value_length=4 differs from llama"):
        weights.read(written(tmp_path / "y.gguf", config, llama__attention__value_length=4))


def test_one_value_for_each_layer_is_read_where_all_are_equal(tmp_path):
    changed = {"llama__attention__head_count": [2, 2], "llama__attention__head_count_kv": [1, 1]}
    config = dataclasses.replace(PLAIN, num_key_value_heads=1)
    assert_is(written(tmp_path / "x.gguf", config, **changed, llama__feed_forward_length=[12, 12]), config)


@pytest.mark.parametrize(
    "changed",
    [
        {"llama__rope__scaling__type": "none"},
        {"llama__rope__scaling__type": "none", "llama__rope__scaling__factor": 4.0},
        {"llama__rope__scaling__type": "linear"},
        {"llama__rope__scaling__type": "linear", "llama__rope__scaling__factor": 1.0},
        {"llama__rope__scaling__factor": 0.0, "llama__rope__scaling__attn_factor": 1.0},
        {"llama__rope__scale_linear": 1.0},
        {"llama__rope__scaling__original_context_length": 64, "llama__rope__scaling__finetuned": False},
        {"llama__expert_count": 0, "llama__expert_used_count": 0},
        {"llama__attention__causal": True, "llama__attention__sliding_window": 0},
        {"llama__tensor_data_layout": "Meta AI original pth"},
        {"general__quantization_version": 2, "general__file_type": 1, "general__license": "mit", "x__y": [1, 2]},
    ],
)
def test_keys_that_change_nothing_are_read(tmp_path, changed):
    assert_is(written(tmp_path / "x.gguf", **changed), PLAIN)


def test_the_suffix_may_be_in_capitals(tmp_path):
    assert_is(written(tmp_path / "x.GGUF"), PLAIN)


def test_a_head_that_equals_the_embedding_is_read_as_a_head(tmp_path):
    embedding = small_tensors()["model.embed_tokens.weight"]
    write_gguf(tmp_path / "x.gguf", SMALL, small_tensors(), extra={"output.weight": embedding})
    bundle = weights.read(tmp_path / "x.gguf")
    assert not bundle.config.tie_word_embeddings
    np.testing.assert_array_equal(bundle.tensors["lm_head.weight"], embedding)


def test_factors_for_the_rotary_frequencies_are_refused(tmp_path):
    """llama.cpp stores Llama 3's RoPE scaling as a tensor, without a key."""
    write_gguf(tmp_path / "x.gguf", SMALL, small_tensors(), extra={"rope_freqs.weight": np.ones(2, np.float32)})
    with pytest.raises(InputFileError, match=r"rope_freqs\.weight is not part of the model"):
        weights.read(tmp_path / "x.gguf")


def test_the_header_of_a_large_vocabulary_is_read(tmp_path):
    """9 MB, as in Llama 3's files: 128,256 tokens and 280,147 merges with scores and types."""

    def field(key: bytes, kind: int, count: int, entry: bytes) -> bytes:
        return struct.pack("<Q", len(key)) + key + struct.pack("<IIQ", 9, kind, count) + entry * count

    fields = [
        field(b"tokens", 8, 128_256, struct.pack("<Q", 10) + b"x" * 10),
        field(b"scores", 6, 128_256, bytes(4)),
        field(b"types", 5, 128_256, bytes(4)),
        field(b"merges", 8, 280_147, struct.pack("<Q", 12) + b"xxxxx xxxxxx"),
    ]
    (tmp_path / "x.gguf").write_bytes(b"GGUF" + struct.pack("<IQQ", 3, 0, len(fields)) + b"".join(fields))
    read, tensors = gguf_header.read_header(tmp_path / "x.gguf", gguf.GGML_QUANT_SIZES)
    assert {key: len(values) for key, values in read.items()} == {
        "tokens": 128_256, "scores": 128_256, "types": 128_256, "merges": 280_147,
    }  # fmt: skip
    assert tensors == []
