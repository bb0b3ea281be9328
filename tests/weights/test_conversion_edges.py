"""Conversions between all formats keep every bit, on 200 small random models and in every memory order."""

import dataclasses
import itertools
import os

import ml_dtypes
import numpy as np
import pytest

from smollm_jax import weights
from smollm_jax.config import Config
from smollm_jax.errors import InputFileError, StorageError
from smollm_jax.runtime.atomic import replacing
from smollm_jax.weights import mapping, safetensors_file
from smollm_jax.weights.bundle import Bundle
from smollm_jax.weights.safetensors_file import DIGEST, digest
from tests.small_files import small_tokenizer, write_gguf

# The Makefile says so where PyTorch is left out.
TARGETS = ["hf", "orbax", "safetensors"] + ([] if os.environ.get("SMOLLM_WITHOUT_TORCH") else ["pt"])
EDGES = list(itertools.product(["gguf", *TARGETS], TARGETS))
DTYPES = (np.float32, ml_dtypes.bfloat16, np.float16)
MODELS = 200
FEW = 20  # one a way: `make test`
ORDERS = ("transposed", "Fortran", "strided", "negative strides", "broadcast")
# ml_dtypes has no big-endian bfloat16.
LAYOUTS = [*itertools.product(ORDERS, DTYPES), ("big-endian", np.float32), ("big-endian", np.float16)]


def path_of(folder, kind, stem):
    return folder / (stem if kind in ("hf", "orbax") else f"{stem}.{kind}")


def random_bundle(seed: int) -> Bundle:
    rng = np.random.default_rng(seed)
    kv_heads = int(rng.integers(1, 4))
    config = Config(
        vocab_size=int(rng.integers(260, 300)),
        hidden_size=int(rng.integers(1, 17)),
        intermediate_size=int(rng.integers(1, 17)),
        num_hidden_layers=int(rng.integers(1, 4)),
        num_attention_heads=kv_heads * int(rng.integers(1, 4)),
        num_key_value_heads=kv_heads,
        head_dim=2 * int(rng.integers(1, 5)),
        max_position_embeddings=int(rng.integers(1, 100)),
        rope_theta=float(rng.choice([1e4, 1e5, 130_000.0])),
        rms_norm_eps=float(rng.choice([1e-5, 1e-6])),
        initializer_range=float(rng.uniform(0.01, 1)),
        tie_word_embeddings=bool(rng.integers(2)),
        bos_token_id=(None, 1)[rng.integers(2)],
        eos_token_id=((0, 2), 2, None)[rng.integers(3)],
        pad_token_id=(None, 0)[rng.integers(2)],
    )
    dtype = DTYPES[seed // len(EDGES) % 3]
    shapes = mapping.hf_shapes(config).items()
    tensors = {name: rng.normal(size=shape).astype(np.float32).astype(dtype) for name, shape in shapes}
    return Bundle(tensors, config, small_tokenizer(), f"drawn from seed {seed}")


def same(a, b):
    assert a.keys() == b.keys()
    for name in a:
        assert (a[name].dtype, a[name].shape) == (b[name].dtype, b[name].shape), name
        assert a[name].tobytes() == b[name].tobytes(), name


@pytest.mark.parametrize("models", [FEW, pytest.param(MODELS, marks=pytest.mark.slow)])
@pytest.mark.parametrize("edge", range(len(EDGES)), ids=[" to ".join(edge) for edge in EDGES])
def test_every_edge_keeps_every_bit_of_every_model(tmp_path, edge, models):
    """Also config and origin, and the tokenizer if the format is a folder."""
    source, target = EDGES[edge]
    for seed in range(edge, models, len(EDGES)):
        bundle, folder = random_bundle(seed), tmp_path / str(seed)
        folder.mkdir()
        start, end = path_of(folder, source, "start"), path_of(folder, target, "end")
        if source == "gguf":  # has one eos at most, no initializer_range, and is read as float32
            eos = bundle.config.eos_token_ids[:1] or (0,)
            config = dataclasses.replace(bundle.config, eos_token_id=eos[0], bos_token_id=None, pad_token_id=None)
            write_gguf(start, config, bundle.tensors)
            config = dataclasses.replace(config, initializer_range=config.hidden_size**-0.5)
            floats = {name: tensor.astype(np.float32) for name, tensor in bundle.tensors.items()}
            bundle = dataclasses.replace(bundle, config=config, tensors=floats)
        else:
            weights.write(start, bundle, source)
        loaded = weights.read(start)
        same(loaded.tensors, bundle.tensors)
        weights.write(end, loaded, target)
        reloaded = weights.read(end)
        same(reloaded.tensors, bundle.tensors)
        assert loaded.config == reloaded.config == bundle.config
        assert source == "gguf" or loaded.origin == reloaded.origin == bundle.origin
        if source in ("hf", "orbax") and target in ("hf", "orbax"):
            assert reloaded.tokenizer_files == bundle.tokenizer_files


def laid_out(kind: str, array: np.ndarray) -> np.ndarray:
    """The same array in another memory layout; "broadcast" repeats one row."""
    wide = np.zeros([2 * n for n in array.shape], array.dtype)
    every_other = wide[(slice(None, None, 2),) * array.ndim]
    every_other[...] = array
    return {
        "transposed": array.T.copy().T,
        "Fortran": np.asfortranarray(array),
        "strided": every_other,
        "negative strides": np.flip(np.flip(array).copy()),
        "broadcast": np.broadcast_to(array[:1], array.shape),
        "big-endian": array.astype(array.dtype.newbyteorder(">")),
    }[kind]


@pytest.mark.parametrize("kind", TARGETS)
@pytest.mark.parametrize(("order", "dtype"), LAYOUTS)
def test_every_writer_keeps_arrays_of_any_memory_order(tmp_path, kind, dtype, order):
    bundle = random_bundle(7)
    bundle.tensors = {name: laid_out(order, t.astype(dtype)) for name, t in bundle.tensors.items()}
    assert any(not t.flags.c_contiguous or not t.dtype.isnative for t in bundle.tensors.values())
    weights.write(path_of(tmp_path, kind, "x"), bundle, kind)
    expected = {name: np.array(t, dtype, order="C") for name, t in bundle.tensors.items()}
    same(weights.read(path_of(tmp_path, kind, "x")).tensors, expected)


def test_a_single_number_keeps_its_shape(tmp_path):
    """`np.ascontiguousarray` would make it an array of shape [1]."""
    for dtype in (*DTYPES, ">f4"):
        safetensors_file.write_safetensors(tmp_path / "x", {"a": np.array(3.5, dtype)}, {})
        loaded, _ = safetensors_file.read_safetensors(tmp_path / "x")
        same(loaded, {"a": np.array(3.5, np.dtype(dtype).newbyteorder("="))})


def test_the_digest_tells_names_dtypes_shapes_and_bytes_apart_and_nothing_else():
    a, b = np.arange(6, dtype=np.float32), np.ones(6, np.float32)
    base = digest({"a": a, "b": b})
    assert base == digest({"b": b, "a": a}) == digest({"a": a.astype(">f4"), "b": b[::-1]})
    others = [
        {"a": b, "b": a},
        {"a": a.reshape(2, 3), "b": b},
        {"a": a.view(np.int32), "b": b},
        {"a": a, "c": b},
        {"a": a},
        {"a": a, "b": np.nextafter(b, 2)},
    ]
    assert len({base, *map(digest, others)}) == len(others) + 1


def test_a_folder_of_ours_has_a_digest_and_one_without_still_loads(tmp_path):
    bundle = random_bundle(0)
    weights.write(tmp_path / "hf", bundle, "hf")
    file = tmp_path / "hf/model.safetensors"
    tensors, metadata = safetensors_file.read_safetensors(file)
    assert metadata[DIGEST] == digest(bundle.tensors)
    names = [name for name in tensors if "layernorm" in name][:2]
    tensors[names[0]], tensors[names[1]] = tensors[names[1]], tensors[names[0]]
    safetensors_file.save_file(tensors, file, metadata=metadata)
    with pytest.raises(InputFileError, match=r"model\.safetensors: tensors were changed or swapped"):
        weights.read(tmp_path / "hf")
    safetensors_file.save_file(tensors, file)
    same(weights.read(tmp_path / "hf").tensors, tensors)


def test_what_a_killed_conversion_left_is_removed_by_the_next_one_to_the_same_target(tmp_path, capsys):
    target = tmp_path / "x.gguf"
    left, others = (tmp_path / f".x.gguf.0123abc{n}.tmp" for n in "de"), (".x.gguf.tmp", ".y.gguf.0123abcd.tmp")
    file, folder = left
    file.touch()
    (folder / "sub").mkdir(parents=True)
    for name in others:
        (tmp_path / name).touch()
    with replacing(target) as first:
        assert not file.exists()
        assert not folder.exists()
        assert capsys.readouterr().err.count("left behind by a process that was killed: removed\n") == 2
        first.touch()
        with pytest.raises(StorageError), replacing(target):  # another process at the same time: writes nothing
            assert first.exists(), "what a live process writes was removed"
    assert {path.name for path in tmp_path.iterdir()} == {"x.gguf", *others}
