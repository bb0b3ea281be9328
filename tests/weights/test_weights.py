"""Weights keep every bit through every format, and all faulty tensors are named in one error."""

import dataclasses
import functools
import json
import os
import subprocess
import sys
import tracemalloc

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from smollm_jax import weights
from smollm_jax.config import preset
from smollm_jax.errors import CheckpointError, InputFileError, StorageError, UsageError
from smollm_jax.model.smollm import SmolLM
from smollm_jax.runs import manifest
from smollm_jax.runs.pytree import flatten
from smollm_jax.weights import bundle as formats
from smollm_jax.weights import mapping, safetensors_file
from smollm_jax.weights.safetensors_file import read_safetensors, safetensors_bytes, write_safetensors
from tests.trainer import ENVIRONMENT


@pytest.fixture(scope="module")
def bundle(tiny_model):
    return weights.to_bundle(tiny_model, "tiny, random")


def same(a, b):
    assert a.keys() == b.keys()
    for name in a:
        assert a[name].dtype == b[name].dtype, name
        assert a[name].tobytes() == b[name].tobytes(), name


def test_the_table_names_the_272_tensors_of_the_released_model():
    shapes = mapping.hf_shapes(preset("smollm2-135m"))
    assert len(shapes) == 272
    assert shapes["model.layers.29.self_attn.k_proj.weight"] == (192, 576)
    assert shapes["model.layers.0.mlp.down_proj.weight"] == (576, 1536)
    assert sum(int(np.prod(shape)) for shape in shapes.values()) == 134_515_008


def test_each_rule_puts_each_number_where_it_belongs(tiny):
    """All values are distinct, so that a missing transpose or a swap of two square matrices fails."""
    counter = iter(range(10**9))
    tensors = {}
    for name, shape in mapping.hf_shapes(tiny).items():
        tensors[name] = np.array([next(counter) for _ in range(int(np.prod(shape)))]).reshape(shape)
    ours = mapping.from_hf(tensors, tiny)
    N, K, H = tiny.num_attention_heads, tiny.num_key_value_heads, tiny.head_dim
    for layer in range(tiny.num_hidden_layers):
        hf = {n.split(".")[-2]: t for n, t in tensors.items() if f"layers.{layer}." in n}
        for head in range(N):
            rows = slice(head * H, (head + 1) * H)
            np.testing.assert_array_equal(ours["layers.self_attn.q_proj"][layer, :, head], hf["q_proj"][rows].T)
            np.testing.assert_array_equal(ours["layers.self_attn.o_proj"][layer, head], hf["o_proj"][:, rows].T)
        for head in range(K):
            rows = slice(head * H, (head + 1) * H)
            np.testing.assert_array_equal(ours["layers.self_attn.k_proj"][layer, :, head], hf["k_proj"][rows].T)
            np.testing.assert_array_equal(ours["layers.self_attn.v_proj"][layer, :, head], hf["v_proj"][rows].T)
        for name in ("gate_proj", "up_proj", "down_proj"):
            np.testing.assert_array_equal(ours[f"layers.mlp.{name}"][layer], hf[name].T)
        for name in ("input_layernorm", "post_attention_layernorm"):
            np.testing.assert_array_equal(ours[f"layers.{name}"][layer], hf[name])
    same(mapping.to_hf(ours, tiny), tensors)


@pytest.mark.parametrize("kind", ["hf", "orbax", "safetensors"])
@pytest.mark.parametrize("dtype", [np.float32, np.float64, np.float16, ml_dtypes.bfloat16])
@pytest.mark.parametrize("tied", [True, False])
def test_every_format_keeps_every_bit(tmp_path, tiny, kind, dtype, tied):
    config = dataclasses.replace(tiny, tie_word_embeddings=tied, vocab_size=512, eos_token_id=(0, 2))
    model = SmolLM(config, key=jax.random.key(2))
    bundle = weights.to_bundle(model, "random")
    bundle.tensors = {name: tensor.astype(dtype) for name, tensor in bundle.tensors.items()}
    path = tmp_path / ("x.safetensors" if kind == "safetensors" else "folder with ö")
    weights.write(path, bundle, kind)
    loaded = weights.read(path)
    same(loaded.tensors, bundle.tensors)
    assert (loaded.config, loaded.origin) == (config, "random")


def test_there_and_back_through_jax_is_bit_equal(tmp_path, bundle, tiny_model):
    weights.write(tmp_path / "hf", bundle, "hf")
    model, config = weights.load(tmp_path / "hf")
    assert config == tiny_model.config
    for name, array in flatten(tiny_model).items():
        np.testing.assert_array_equal(flatten(model)[name], array)
    same(weights.to_bundle(model).tensors, bundle.tensors)


def test_shards_are_read(tmp_path, bundle):
    index = sharded(tmp_path / "hf", bundle)
    (tmp_path / "hf/model.safetensors.index.json").write_text(json.dumps(index))
    same(weights.read(tmp_path / "hf").tensors, bundle.tensors)


def sharded(folder, bundle):
    """Writes the bundle as two shards with an index, and returns the index."""
    weights.write(folder, bundle, "hf")
    (folder / "model.safetensors").unlink()
    names = list(bundle.tensors)
    parts = {"model-00001-of-00002.safetensors": names[:9], "model-00002-of-00002.safetensors": names[9:]}
    for file, part in parts.items():
        write_safetensors(folder / file, {n: bundle.tensors[n] for n in part}, {})
    return {"weight_map": {name: file for file, part in parts.items() for name in part}}


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (
            lambda index: index["weight_map"].update({"model.norm.weight": "model-00001-of-00002.safetensors"}),
            "disagree",
        ),
        (lambda index: index["weight_map"].pop("model.norm.weight"), "disagree on 1 tensor.*model.norm.weight"),
        (lambda index: index["weight_map"].update(a="model-00001-of-00002.safetensors"), "disagree on 1 tensor.*'a'"),
        (lambda index: index["weight_map"].update(a="nowhere.safetensors"), "nowhere.safetensors: no such file"),
        (lambda index: index["weight_map"].update(a="../model.safetensors"), "is not a plain file name"),
        (lambda index: index["weight_map"].update(a=3), "has no weight_map"),
        (lambda index: index.clear(), "has no weight_map"),
    ],
)
def test_an_index_that_disagrees_with_its_shards_is_refused(tmp_path, bundle, change, named):
    index = sharded(tmp_path / "hf", bundle)
    change(index)
    (tmp_path / "hf/model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(InputFileError, match=named):
        weights.read(tmp_path / "hf")


def test_a_folder_of_both_one_file_and_shards_is_not_guessed_at(tmp_path, bundle):
    weights.write(tmp_path / "hf", bundle, "hf")
    (tmp_path / "hf/model.safetensors.index.json").write_text("{}")
    with pytest.raises(InputFileError, match=r"hf: holds both model\.safetensors and model\.safetensors\.index\.json"):
        weights.read(tmp_path / "hf")


def test_a_tokenizer_file_too_long_to_be_one_is_not_read(tmp_path, bundle):
    weights.write(tmp_path / "hf", bundle, "hf")
    with (tmp_path / "hf/tokenizer.json").open("wb") as file:
        file.truncate(33 << 20)
    with pytest.raises(InputFileError, match=r"tokenizer\.json: too large: 34,603,008 bytes"):
        weights.read(tmp_path / "hf")


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_load_gives_the_dtype_asked_for(tmp_path, bundle, dtype):
    weights.write(tmp_path / "hf", bundle, "hf")
    model, _ = weights.load(tmp_path / "hf", dtype)
    assert {leaf.dtype for leaf in jax.tree.leaves(model)} == {jnp.dtype(dtype)}
    assert model(jnp.array([[1, 2]])).dtype == jnp.float32


def test_a_model_is_made_without_a_second_copy_of_its_weights(tiny, monkeypatch):
    """NumPy's memory is counted here, JAX's is not: beside the tensors themselves, one or two stacks at a time.

    JAX copies a stack in the background and holds it until then, which on a busy machine is late: waited for here.
    """
    copy = jnp.array
    monkeypatch.setattr(jnp, "array", lambda array: jax.block_until_ready(copy(array)))
    config = dataclasses.replace(tiny, num_hidden_layers=64)
    tensors = {name: np.zeros(shape, np.float32) for name, shape in mapping.hf_shapes(config).items()}
    weights.from_bundle(formats.Bundle(tensors, config))  # what is allocated once
    tracemalloc.start()
    weights.from_bundle(formats.Bundle(tensors, config))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    total_bytes = sum(tensor.nbytes for tensor in tensors.values())
    assert peak < 0.6 * total_bytes, f"{peak:,} of {total_bytes:,}"


def test_parameters_begin_where_jax_need_not_move_them(bundle):
    """On a CPU JAX copies memory aligned to 64 bytes once, and any other twice."""
    stacks = mapping.from_hf(bundle.tensors, bundle.config)
    assert not any(stack.ctypes.data % 64 for stack in stacks.values())
    for stack in stacks.values():
        on_device = jax.device_put(stack)
        assert on_device.unsafe_buffer_pointer() == stack.ctypes.data
        assert jnp.array(stack).unsafe_buffer_pointer() != stack.ctypes.data


@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16])
@pytest.mark.parametrize("spaces", range(8))
def test_a_mapped_file_has_the_bits_of_one_that_is_copied_wherever_they_begin(tmp_path, bundle, dtype, spaces):
    path = tmp_path / "x.safetensors"
    tensors = {name: tensor.astype(dtype) for name, tensor in bundle.tensors.items()}
    weights.write(path, formats.Bundle(tensors, bundle.config), "safetensors")
    content = path.read_bytes()
    length = int.from_bytes(content[:8], "little")
    header = content[8 : 8 + length] + b" " * spaces
    path.write_bytes(len(header).to_bytes(8, "little") + header + content[8 + length :])
    mapped = weights.read(path, mapped=True).tensors
    same(mapped, weights.read(path).tensors)
    assert [*map(np.shape, mapped.values())] == [*map(np.shape, tensors.values())]
    assert not any(tensor.flags.writeable for tensor in mapped.values())


@pytest.mark.parametrize("kind", ["hf", "safetensors"])
def test_safetensors_are_read_without_a_framework(tmp_path, bundle, kind):
    """The trainer reads them in a thread while its main thread imports JAX."""
    weights.write(tmp_path / f"x.{kind}", bundle, kind)
    program = "import sys; from smollm_jax import weights\n"
    program += "print(len(weights.read(sys.argv[1], mapped=True).tensors))\n"
    program += "assert not {'jax', 'flax', 'orbax', 'torch'} & set(sys.modules)"
    command = [sys.executable, "-c", program, str(tmp_path / f"x.{kind}")]
    result = subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True, check=False)
    assert (result.stdout, result.stderr) == (f"{len(bundle.tensors)}\n", "")


def after_the_header(monkeypatch, happens):
    """Calls a function after a file's header was read and before its tensors are."""
    check_header = safetensors_file.check_header

    def checked(path, file):
        loaded = check_header(path, file)
        happens(path)
        return loaded

    monkeypatch.setattr(safetensors_file, "check_header", checked)


@pytest.mark.parametrize("mapped", [False, True])
def test_a_file_that_is_cut_short_while_it_is_read_is_refused(tmp_path, bundle, monkeypatch, mapped):
    weights.write(tmp_path / "x.safetensors", bundle, "safetensors")
    after_the_header(monkeypatch, lambda path: os.truncate(path, path.stat().st_size - 4096))
    with pytest.raises(InputFileError, match=r"x\.safetensors: not a readable"):
        weights.read(tmp_path / "x.safetensors", mapped=mapped)


@pytest.mark.parametrize("mapped", [False, True])
def test_a_file_that_another_takes_the_place_of_is_one_of_both(tmp_path, monkeypatch, mapped):
    """Files without a digest, of the same size, with the same tensors at other offsets."""
    path, old = tmp_path / "x.safetensors", {"a": np.zeros(3, np.float32), "b": np.ones(3, np.float32)}
    new = {"a": old["b"], "b": old["a"] + 2}
    safetensors_file.save_file(new, tmp_path / "other")
    other = (tmp_path / "other").read_bytes().replace(b'"a"', b'"c"').replace(b'"b"', b'"a"').replace(b'"c"', b'"b"')
    (tmp_path / "other").write_bytes(other)
    new = {"a": new["b"], "b": new["a"]}
    safetensors_file.save_file(old, path)
    after_the_header(monkeypatch, (tmp_path / "other").rename)
    same(safetensors_file.read_safetensors(path, mapped=mapped)[0], old if mapped else new)


def test_a_model_is_loaded_without_a_second_copy_of_its_file(tmp_path, tiny, monkeypatch):
    """Beside JAX's arrays, which are not counted, there is the stack under way and no more: as above."""
    copy = jnp.array
    monkeypatch.setattr(jnp, "array", lambda array: jax.block_until_ready(copy(array)))
    config = dataclasses.replace(tiny, num_hidden_layers=64)
    tensors = {name: np.zeros(shape, np.float32) for name, shape in mapping.hf_shapes(config).items()}
    weights.write(tmp_path / "hf", formats.Bundle(tensors, config), "hf")
    total_bytes = sum(tensor.nbytes for tensor in tensors.values())
    weights.load(tmp_path / "hf")  # what is allocated once
    peaks = []
    for read in (weights.read, functools.partial(weights.read, mapped=True), weights.load):
        tracemalloc.start()
        read(tmp_path / "hf")
        peaks.append(tracemalloc.get_traced_memory()[1] / total_bytes)
        tracemalloc.stop()
    copied, mapped, loaded = peaks
    assert copied > 1
    assert mapped < 0.2, peaks  # of one tensor, which of its numbers are finite
    assert loaded < 0.6, peaks


def test_float64_is_refused_where_jax_would_truncate_it(tmp_path, bundle):
    weights.write(tmp_path / "hf", bundle, "hf")
    with pytest.raises(UsageError, match="JAX_ENABLE_X64"):
        weights.load(tmp_path / "hf", np.float64)


def test_one_error_names_every_fault_and_nothing_is_written(tmp_path, bundle):
    tensors = dict(bundle.tensors)
    del tensors["model.layers.1.mlp.up_proj.weight"]
    tensors["model.layers.7.mlp.up_proj.weight"] = tensors["model.norm.weight"]
    tensors["model.layers.0.mlp.down_proj.weight"] = tensors["model.layers.0.mlp.down_proj.weight"].T
    tensors["model.layers.2.self_attn.q_proj.weight"] = tensors["model.layers.2.self_attn.q_proj.weight"].astype(int)
    tensors["model.norm.weight"] = np.full_like(tensors["model.norm.weight"], np.nan)
    faulty = dataclasses.replace(bundle, tensors=tensors)
    with pytest.raises(InputFileError) as raised:
        weights.write(tmp_path / "out", faulty, "hf")
    message = str(raised.value)
    for part in (
        "5 fault(s)",
        "layers.1.mlp.up_proj.weight is missing",
        "layers.7.mlp.up_proj.weight is not part of the model",
        "layers.0.mlp.down_proj.weight has shape [256, 96], expected [96, 256]",
        "layers.2.self_attn.q_proj.weight has dtype int64",
        "model.norm.weight has non-finite values",
    ):
        assert part in message
    assert list(tmp_path.iterdir()) == []


def test_a_copy_of_the_tied_head_is_dropped_and_a_different_one_refused(bundle):
    head = bundle.tensors["model.embed_tokens.weight"].copy()
    with_head = dataclasses.replace(bundle, tensors=bundle.tensors | {"lm_head.weight": head})
    same(mapping.check(with_head, "x").tensors, bundle.tensors)
    head[0, 0] += 1
    with pytest.raises(InputFileError, match=r"lm_head\.weight differs"):
        mapping.check(with_head, "x")


def arrays():
    base = np.random.default_rng(0).normal(size=(6, 8)).astype(np.float32)
    return {
        "transposed": base.T,
        "fortran": np.asfortranarray(base),
        "strided": base[::2, ::3],
        "reversed": base[::-1],
        "broadcast": np.broadcast_to(base[0], (5, 8)),
        "scalar": np.array(3.5, np.float32),
        "big endian": base.astype(">f4"),
        "bfloat16, transposed": base.astype(ml_dtypes.bfloat16).T,
    }


def test_the_safetensors_writer_keeps_arrays_of_any_memory_order(tmp_path):
    write_safetensors(tmp_path / "x.safetensors", arrays(), {})
    loaded, _ = read_safetensors(tmp_path / "x.safetensors")
    for name, array in arrays().items():
        np.testing.assert_array_equal(loaded[name], array, err_msg=name, strict=name != "big endian")
    assert (tmp_path / "x.safetensors").stat().st_mode & 0o044, "others cannot read the file"


def test_a_damaged_or_unsealed_checkpoint_is_not_read_as_weights(tmp_path, bundle):
    weights.write(tmp_path / "run", bundle, "orbax")
    seal = tmp_path / "run/checkpoints/0/integrity.json"
    sealed = seal.read_bytes()
    seal.unlink()
    with pytest.raises(CheckpointError, match="--allow-unverified"):
        weights.read(tmp_path / "run")
    same(weights.read(tmp_path / "run", allow_unverified=True).tensors, bundle.tensors)
    seal.write_bytes(sealed)
    same(weights.read(tmp_path / "run").tensors, bundle.tensors)
    largest = max((tmp_path / "run/checkpoints/0/params").rglob("?" * 32), key=lambda path: path.stat().st_size)
    content = bytearray(largest.read_bytes())
    content[len(content) // 2] ^= 1
    largest.write_bytes(content)
    for allow in (False, True):
        with pytest.raises(CheckpointError, match=f"{largest.name}: sha256 differs"):
            weights.read(tmp_path / "run", allow_unverified=allow)


def test_a_checkpoint_sealed_again_with_another_meta_is_refused_in_one_line(tmp_path, bundle):
    weights.write(tmp_path / "run", bundle, "orbax")
    step = tmp_path / "run/checkpoints/0"
    config = json.loads(json.dumps(dataclasses.asdict(bundle.config)))
    provenance = {"config": config, "data": "", "data_sha256": "", "tokenizer_sha256": "", "start_from": "nowhere"}
    recipe = {"steps": 1, "batch_size": 1, "sequence_length": 8, "learning_rate": 1.0, "warmup_steps": 0}
    recipe |= {"dtype": "float32", "method": "sft", "lora_rank": 2, "lora_alpha": 1.0}
    for meta, reason in {
        "[1]": r"meta is \[1\], not an object",
        json.dumps({"config": {name: value for name, value in config.items() if name != "head_dim"}}): "'head_dim'",
        json.dumps({"config": [1]}): r"its Config is \[1\], not an object",
        json.dumps({"recipe": 7}): "its recipe is 7, not an object",
        json.dumps({"recipe": {"lora_rank": 2}}): "another version of this trainer: 'recipe'|'config'",
        json.dumps(provenance | {"recipe": recipe | {"lora_rank": "2"}}): "its FinetuneRecipe has lora_rank '2'",
        json.dumps(provenance | {"recipe": recipe | {"dtype": "int8"}}): "its FinetuneRecipe has dtype 'int8'",
        json.dumps(provenance | {"data": None, "recipe": recipe}): "its Provenance has data None",
        json.dumps(provenance | {"recipe": recipe | {"lora_targets": "x"}}): "lora_targets name .*, which is no proj",
    }.items():
        (step / "meta/metadata").write_text(meta)
        manifest.seal(step, {"step": 0})
        with pytest.raises((CheckpointError, InputFileError), match=f"run.*{reason}"):
            weights.read(tmp_path / "run")


def test_equal_weights_make_equal_files(tmp_path):
    names = [tmp_path / f"{number}.safetensors" for number in range(8)]
    for name in names:
        write_safetensors(name, {"ä": np.ones(3, np.float32)}, {"origin": 'ö "x"\n', "config": "{}"})
    assert len({name.read_bytes() for name in names}) == 1
    assert read_safetensors(names[0])[1]["origin"] == 'ö "x"\n'
    tensors = {"b": np.ones(3, np.float32), "a": np.arange(4)}
    contents = {safetensors_bytes(tensors, {"origin": "ö", "fingerprint": "0"}) for _ in range(8)}
    assert len(contents) == 1
    small = tmp_path / "small.safetensors"
    small.write_bytes(contents.pop())
    same(read_safetensors(small)[0], tensors)
    damaged = bytearray(small.read_bytes())
    damaged[-1] ^= 1
    small.write_bytes(damaged)
    with pytest.raises(InputFileError, match="tensors were changed or swapped"):
        read_safetensors(small)


def test_the_writer_notices_what_reads_back_different(tmp_path, monkeypatch):
    def garbage(tensors, path, metadata):
        formats_save({name: tensor + 1 for name, tensor in tensors.items()}, path, metadata)

    formats_save = safetensors_file.save_file
    monkeypatch.setattr(safetensors_file, "save_file", garbage)
    with pytest.raises(StorageError, match="tensor a reads back different"):
        write_safetensors(tmp_path / "x.safetensors", {"a": np.ones(3, np.float32)}, {})


def test_an_existing_target_is_never_touched(tmp_path, bundle):
    (tmp_path / "out").mkdir()
    with pytest.raises(UsageError, match="exists already"):
        weights.write(tmp_path / "out", bundle, "hf")
    assert list((tmp_path / "out").iterdir()) == []


@pytest.mark.parametrize("content", [b"", b"\xff" * 7, b"\xff" * 4096, (10**12).to_bytes(8, "little") + b"{}"])
def test_a_malformed_safetensors_file_is_refused_by_name(tmp_path, content):
    (tmp_path / "x.safetensors").write_bytes(content)
    with pytest.raises(InputFileError, match=r"x\.safetensors"):
        weights.read(tmp_path / "x.safetensors")


@pytest.mark.parametrize("content", [b"", b"GGUF", b"GGUF" + bytes(64), b"no gguf at all" * 9])
def test_a_malformed_gguf_file_is_refused_by_name(tmp_path, content):
    (tmp_path / "x.gguf").write_bytes(content)
    with pytest.raises(InputFileError, match=r"x\.gguf"):
        weights.read(tmp_path / "x.gguf")


def test_a_path_that_is_no_weights_is_refused(tmp_path):
    for path in (tmp_path / "nowhere", tmp_path):
        with pytest.raises(InputFileError, match=str(path.name)):
            weights.read(path)


def test_the_real_weights_are_whole(weights_path):
    bundle = weights.read(weights_path)
    assert len(bundle.tensors) == 272
    assert sum(tensor.size for tensor in bundle.tensors.values()) == 134_515_008
    assert "dequantised Q4_1" in bundle.origin
    assert bundle.config == dataclasses.replace(preset("smollm2-135m"), bos_token_id=1, eos_token_id=2, pad_token_id=2)
