"""Weights written as GGUF are read back bit for bit; what a GGUF cannot store is an error that leaves no file."""

import dataclasses
import json
import runpy
from pathlib import Path

import gguf
import ml_dtypes
import numpy as np
import pytest

from smollm_jax import weights
from smollm_jax.errors import InputFileError, SmolLMError, StorageError, UsageError
from smollm_jax.runtime import gguf_header
from smollm_jax.tokenizer import Tokenizer
from smollm_jax.weights import gguf_writer, mapping, safetensors_file
from smollm_jax.weights.bundle import Bundle
from smollm_jax.weights.gguf_reader import KEPT_KEYS
from tests.small_files import SMALL, gguf_metadata, gguf_name, small_tensors, small_tokenizer, write_gguf
from tests.weights.test_conversion_edges import random_bundle, same

ROOT = Path(__file__).parents[2]


def bundle(**changed) -> Bundle:
    return dataclasses.replace(Bundle(small_tensors(), SMALL, small_tokenizer(), "made for a test"), **changed)


def wide(**changed) -> Bundle:
    """A model that q8_0 can store: hidden size 32, 2 heads of 16, MLP 64."""
    config = dataclasses.replace(SMALL, hidden_size=32, intermediate_size=64, head_dim=16, **changed)
    rng = np.random.default_rng(1)
    tensors = {name: rng.normal(size=shape).astype(np.float32) for name, shape in mapping.hf_shapes(config).items()}
    return Bundle(tensors, config, small_tokenizer(), "made for a test")


def header(path):
    return gguf_header.read_header(path, gguf.GGML_QUANT_SIZES)


@pytest.mark.parametrize("seed", range(60))
def test_any_model_comes_back_the_same_bits(tmp_path, seed):
    """In float32, bfloat16 and float16, any heads and sizes, tied or not: each type keeps what it can represent."""
    start = random_bundle(seed)
    dtype = (np.float32, ml_dtypes.bfloat16, np.float16)[seed % 3]
    start.tensors = {name: tensor.astype(dtype) for name, tensor in start.tensors.items()}
    start.config = dataclasses.replace(start.config, bos_token_id=(None, 1)[seed % 2], eos_token_id=0)
    weights.write(tmp_path / "x.gguf", start, "gguf")
    loaded = weights.read(tmp_path / "x.gguf")
    same(loaded.tensors, {name: tensor.astype(np.float32) for name, tensor in start.tensors.items()})
    assert loaded.config == dataclasses.replace(start.config, initializer_range=start.config.hidden_size**-0.5)
    assert loaded.origin.startswith(start.origin)
    assert [path.name for path in tmp_path.iterdir()] == ["x.gguf"]
    kinds = {info.kind for info in header(tmp_path / "x.gguf")[1] if len(info.shape) == 2}
    assert kinds == {gguf.GGMLQuantizationType[("F32", "BF16", "F16")[seed % 3]]}


def test_the_file_is_what_llama_cpp_itself_would_have(tmp_path):
    """Compares names, row order and bytes of all tensors, and all keys, with a file that does not use our writer."""
    model = bundle(config=dataclasses.replace(SMALL, bos_token_id=None, num_attention_heads=4, num_key_value_heads=2))
    rng = np.random.default_rng(2)
    shapes = mapping.hf_shapes(model.config).items()
    model.tensors = {name: rng.normal(size=shape).astype(np.float32) for name, shape in shapes}
    weights.write(tmp_path / "ours.gguf", model, "gguf")
    write_gguf(tmp_path / "theirs.gguf", model.config, model.tensors)
    (ours, our_tensors), (theirs, their_tensors) = (header(tmp_path / f"{name}.gguf") for name in ("ours", "theirs"))
    contents = [(tmp_path / f"{name}.gguf").read_bytes() for name in ("ours", "theirs")]
    for x, y in zip(our_tensors, their_tensors, strict=True):
        assert (x.name, x.kind, x.shape) == (y.name, y.kind, y.shape)
        assert contents[0][x.start :][: x.bytes] == contents[1][y.start :][: y.bytes], x.name
    for key, value in theirs.items():
        if key in ("tokenizer.ggml.tokens", "tokenizer.ggml.token_type"):
            assert ours[key][: len(value)] == value
        elif key != "zz.last":
            assert ours[key] == value, key
    assert ours["general.file_type"] == 0


def test_a_type_rounds_the_weights_themselves_and_not_what_another_type_rounded(tmp_path):
    """float32 weights with more digits than a float16 or bfloat16 has, in q8_0 as the gguf package computes it."""
    model, q8_0 = wide(), gguf.GGMLQuantizationType.Q8_0
    matrices = {name: tensor for name, tensor in model.tensors.items() if tensor.ndim == 2}
    assert any((tensor.astype(np.float16) != tensor).any() for tensor in matrices.values())
    expected = {
        "q8_0": {name: gguf.quants.dequantize(gguf.quants.quantize(x, q8_0), q8_0) for name, x in matrices.items()},
        "f16": {name: x.astype(np.float16).astype(np.float32) for name, x in matrices.items()},
        "bf16": {name: x.astype(ml_dtypes.bfloat16).astype(np.float32) for name, x in matrices.items()},
    }
    for kind, tensors in expected.items():
        weights.write(tmp_path / f"{kind}.gguf", model, "gguf", gguf_type=kind)
        loaded = weights.read(tmp_path / f"{kind}.gguf").tensors
        for name, tensor in tensors.items():
            np.testing.assert_array_equal(loaded[name], tensor, err_msg=f"{kind} {name}")
        for name in model.tensors.keys() - matrices.keys():
            np.testing.assert_array_equal(loaded[name], model.tensors[name], err_msg="a norm is kept in float32")


def test_a_tied_head_is_not_written_and_an_untied_one_is(tmp_path):
    for tied in (True, False):
        model = wide(tie_word_embeddings=tied)
        weights.write(tmp_path / f"{tied}.gguf", model, "gguf")
        names = {info.name for info in header(tmp_path / f"{tied}.gguf")[1]}
        assert ("output.weight" in names) is not tied


def test_tokens_fill_the_embedding_and_special_ones_are_marked(tmp_path):
    """llama.cpp refuses a vocabulary shorter than the embedding."""
    weights.write(tmp_path / "x.gguf", bundle(), "gguf")
    fields, _ = header(tmp_path / "x.gguf")
    tokens, types = fields["tokenizer.ggml.tokens"], fields["tokenizer.ggml.token_type"]
    assert len(tokens) == len(set(tokens)) == len(types) == SMALL.vocab_size
    assert (tokens[0], tokens[259], tokens[260], tokens[-1]) == ("<|endoftext|>", "Ġthe", "[PAD260]", "[PAD299]")
    assert (types[0], types[1], types[260]) == (3, 1, 5)
    assert [fields[f"tokenizer.ggml.{name}_token_id"] for name in ("bos", "eos")] == [0, 0]
    assert fields["tokenizer.ggml.add_bos_token"] is False


def model_keys(fields):
    """The keys that describe the model and its tokenizer, not their name, author or license."""
    return [key for key in fields if not key.startswith(("smollm_jax.", "general.")) or key in KEPT_KEYS]


def value_offset(content: bytes, key: str, value: object) -> int:
    """The offset of a number, or of the first character or number of a metadata key's value."""
    written = len(key).to_bytes(8, "little") + key.encode()
    before = 20 if isinstance(value, list) and isinstance(value[0], str) else 12 if isinstance(value, list) else 0
    return content.index(written) + len(written) + 4 + (8 if isinstance(value, str) else before)


@pytest.mark.parametrize("kind", ["f32", "q8_0"])
def test_a_flipped_bit_anywhere_in_an_export_is_refused(tmp_path, kind):
    path = tmp_path / "x.gguf"
    weights.write(path, wide(), "gguf", gguf_type=kind)
    content = path.read_bytes()
    fields, infos = header(path)
    if kind == "f32":
        assert fields["smollm_jax.sha256"] == safetensors_file.digest(weights.read(path).tensors)
    places = [8 * info.start + 5 for info in infos] + [8 * (info.start + info.bytes) - 2 for info in infos]
    # Whoever quantises an export again changes its file type, so that alone is no damage.
    keys = [key for key in model_keys(fields) if key != "general.file_type"]
    places += [8 * value_offset(content, key, fields[key]) for key in keys]
    for place in places:
        damaged = bytearray(content)
        damaged[place // 8] ^= 1 << place % 8
        path.write_bytes(damaged)
        with pytest.raises(InputFileError, match=r"x\.gguf"):
            weights.read(path)


def test_what_other_programs_make_of_an_export_is_read(tmp_path):
    path, other = tmp_path / "x.gguf", tmp_path / "y.gguf"
    weights.write(path, wide(), "gguf", gguf_type="f16")
    fields, _ = header(path)
    tensors = {name: np.float32(2) * tensor for name, tensor in weights.read(path).tensors.items()}
    kept = {key: fields[key] for key in ("smollm_jax.sha256", "smollm_jax.metadata_sha256")}
    metadata = {key: value for key, value in fields.items() if key not in kept}
    for changed in ({}, kept | {"general.file_type": 0}):  # without our keys; quantised by a program that keeps them
        other.unlink(missing_ok=True)
        write_gguf(other, wide().config, tensors, metadata | changed)
        same(weights.read(other).tensors, tensors)
    other.unlink()
    original = weights.read(path).tensors
    write_gguf(other, wide().config, original, metadata | kept | {"general.name": "renamed"})
    same(weights.read(other).tensors, original)
    other.unlink()
    write_gguf(other, wide().config, original, metadata | kept | {"tokenizer.ggml.add_bos_token": True})
    with pytest.raises(InputFileError, match="metadata were changed since the export"):
        weights.read(other)


def test_keys_of_our_own_keep_their_names(tmp_path):
    """Existing files have these keys: a module may be renamed, a key of a file format may not."""
    several = dataclasses.replace(SMALL, eos_token_id=(0, 3))
    made = bundle(config=several, generation_config={"eos_token_id": [0, 7]})
    weights.write(tmp_path / "x.gguf", made, "gguf")
    fields, _ = header(tmp_path / "x.gguf")
    assert json.loads(fields["smollm_jax.generation_config"]) == {"eos_token_id": [0, 7]}
    assert list(fields["smollm_jax.config.eos_token_id"]) == [0, 3]
    weights.write(tmp_path / "x.safetensors", made, "safetensors")
    size = int.from_bytes((tmp_path / "x.safetensors").read_bytes()[:8], "little")
    metadata = json.loads((tmp_path / "x.safetensors").read_bytes()[8 : 8 + size])["__metadata__"]
    assert metadata.keys() == {"config", "format", "generation_config", "origin", "smollm_jax.sha256"}


def test_the_real_tokenizer_comes_back_whole(tmp_path, tokenizer, weights_path):
    """All ids, special tokens and the chat template of SmolLM2-135M-Instruct, with another model of its vocabulary."""
    files = weights.read(weights_path).tokenizer_files
    config = dataclasses.replace(SMALL, vocab_size=49_152, bos_token_id=1, eos_token_id=2, pad_token_id=2)
    rng = np.random.default_rng(0)
    tensors = {n: rng.normal(size=s).astype(np.float32) for n, s in mapping.hf_shapes(config).items()}
    weights.write(tmp_path / "x.gguf", Bundle(tensors, config, files), "gguf")
    weights.write(tmp_path / "hf", weights.read(tmp_path / "x.gguf"), "hf")
    reloaded = Tokenizer.load(tmp_path / "hf")
    assert json.loads(reloaded.core.to_str()) == json.loads(tokenizer.core.to_str())
    assert (reloaded.chat_template, reloaded.eos_token_id) == (tokenizer.chat_template, tokenizer.eos_token_id)
    before, after = (json.loads((f / "special_tokens_map.json").read_text()) for f in (weights_path, tmp_path / "hf"))
    assert after == before
    assert set(after) == {"bos_token", "eos_token", "unk_token", "pad_token"}


@pytest.mark.parametrize(("kind", "error"), [("f32", 0), ("bf16", 2**-8), ("f16", 2**-10), ("q8_0", 2**-6)])
def test_a_smaller_type_rounds_the_matrices_and_keeps_the_norms(tmp_path, kind, error):
    model = wide()
    weights.write(tmp_path / "x.gguf", model, "gguf", gguf_type=kind)
    loaded = weights.read(tmp_path / "x.gguf").tensors
    for name, tensor in model.tensors.items():
        worst = np.abs(loaded[name] - tensor).max() / np.abs(tensor).max()
        assert worst <= (error if tensor.ndim == 2 else 0), name
        assert (worst > 0) == (tensor.ndim == 2 and kind != "f32"), name


def with_file(name, content):
    return {"tokenizer_files": small_tokenizer() | {name: content}}


def changed_tokenizer(**changes):
    return with_file("tokenizer.json", json.dumps(json.loads(small_tokenizer()["tokenizer.json"]) | changes).encode())


def affixes(*names: str) -> dict:
    """A post-processor that adds these entries around the text "$A"."""
    core = json.loads(small_tokenizer()["tokenizer.json"])
    ids = {name: core["model"]["vocab"][name] for name in names if name != "$A"}
    pieces = [
        {"Sequence": {"id": "A", "type_id": 0}} if name == "$A" else {"SpecialToken": {"id": name, "type_id": 0}}
        for name in names
    ]
    special = {name: {"id": name, "ids": [i], "tokens": [name]} for name, i in ids.items()}
    pair = [*pieces, {"Sequence": {"id": "B", "type_id": 1}}]
    return {"type": "TemplateProcessing", "single": pieces, "pair": pair, "special_tokens": special}


CASES = [
    ({"tokenizer_files": {}}, None, UsageError, "have no tokenizer.json: give one"),
    ({"config": dataclasses.replace(SMALL, eos_token_id=(0, 2, 3, 4))}, None, UsageError, "can only store 3"),
    ({"config": dataclasses.replace(SMALL, eos_token_id=5)}, None, UsageError, "eos_token_id is 5 in .* but 0 in"),
    ({"config": dataclasses.replace(SMALL, rope_theta=1e5 + 1e-4)}, None, UsageError, "rope_theta is 100000.0001"),
    ({"config": dataclasses.replace(SMALL, vocab_size=259)}, None, UsageError, "ids up to 259"),
    (changed_tokenizer(pre_tokenizer={"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True,
                                      "use_regex": False}), None, UsageError, "pre_tokenizer differs from SmolLM2's"),
    (changed_tokenizer(post_processor=affixes("he", "$A")), None, UsageError, r"adds \[258\] before a text"),
    (with_file("tokenizer.json", b"{"), None, InputFileError, "the weights/tokenizer.json: not readable"),
    ({}, "q8_0", UsageError, "q8_0 needs rows of a multiple of 32 values, got 8"),
]  # fmt: skip


@pytest.mark.parametrize(("changes", "kind", "error", "named"), CASES)
def test_what_a_gguf_cannot_hold_is_refused_and_leaves_nothing(tmp_path, changes, kind, error, named):
    model = bundle(**changes)
    if "config" in changes:
        shapes = mapping.hf_shapes(model.config).items()
        model.tensors = {name: np.ones(shape, np.float32) for name, shape in shapes}
    with pytest.raises(error, match=named):
        weights.write(tmp_path / "x.gguf", model, "gguf", gguf_type=kind)
    assert list(tmp_path.iterdir()) == []


def test_numbers_no_type_holds_are_refused(tmp_path):
    tensors = small_tensors()
    large = {name: tensor * np.float32(1e6) for name, tensor in tensors.items()}
    with pytest.raises(UsageError, match=r"embed_tokens\.weight: has values beyond 65,504, the largest float16"):
        weights.write(tmp_path / "x.gguf", bundle(tensors=large), "gguf", gguf_type="f16")
    for dtypes in ([np.float64], [np.float32, np.float16]):
        mixed = {name: tensor.astype(dtypes[i % len(dtypes)]) for i, (name, tensor) in enumerate(tensors.items())}
        with pytest.raises(UsageError, match="no GGUF type stores them exactly"):
            weights.write(tmp_path / "x.gguf", bundle(tensors=mixed), "gguf")
    assert list(tmp_path.iterdir()) == []


def test_a_type_for_another_kind_is_refused(tmp_path):
    with pytest.raises(UsageError, match="type f16 is for GGUF files"):
        weights.write(tmp_path / "x", bundle(), "hf", gguf_type="f16")


def test_a_file_that_reads_back_different_is_no_file(tmp_path, monkeypatch):
    """The rows of q stay in Hugging Face's order, an error that no reader could detect."""
    monkeypatch.setattr(gguf_writer, "rotary_heads", lambda name, config: None)
    with pytest.raises(StorageError, match=r"x\.gguf: tensor .*q_proj\.weight read back different") as caught:
        weights.write(tmp_path / "x.gguf", bundle(), "gguf")
    assert isinstance(caught.value, SmolLMError)
    assert list(tmp_path.iterdir()) == []


def test_the_command_writes_the_type_that_is_asked_for(tmp_path, capsys):
    main = runpy.run_path(str(ROOT / "scripts/convert_weights.py"))["main"]
    weights.write(tmp_path / "hf", wide(), "hf")
    main([str(tmp_path / "hf"), str(tmp_path / "x.gguf"), "--type", "q8_0"])
    output = capsys.readouterr().out
    assert "q8_0, format gguf" in output
    before, after = (
        np.concatenate([t.ravel() for t in weights.read(tmp_path / x).tensors.values()]) for x in ("hf", "x.gguf")
    )
    error = np.sqrt(np.mean(np.square(after - before)) / np.mean(np.square(before)))
    assert f"rounding error: {error:.2e} of the weights, RMS" in output
    assert 1e-3 < error < 1e-2  # 8 bits a number
    main([str(tmp_path / "hf"), str(tmp_path / "y.gguf")])
    assert "rounding error: none, every bit is kept" in capsys.readouterr().out
    assert {info.kind for info in header(tmp_path / "x.gguf")[1]} == {0, 8}
    with pytest.raises(UsageError, match="--type q8_0 is for GGUF files"):
        main([str(tmp_path / "hf"), str(tmp_path / "x.pt"), "--type", "q8_0"])


@pytest.mark.parametrize("kind", ["F32", "F16", "BF16", "Q8_0", "Q4_0", "Q4_1", "Q4_K", "Q6_K"])
def test_every_listed_type_is_read_as_gguf_dequantises_it(tmp_path, kind):
    """Random blocks of each type, with q and k rows in llama.cpp's order; origin and model card name the type."""
    config = dataclasses.replace(SMALL, hidden_size=256, intermediate_size=512, head_dim=128)
    quantization, rng, expected = gguf.GGMLQuantizationType[kind], np.random.default_rng(3), {}
    writer = gguf.GGUFWriter(tmp_path / "x.gguf", "llama")
    for key, value in gguf_metadata(config).items():
        kinds = {int: "UINT32", float: "FLOAT32", str: "STRING", list: "ARRAY"}
        writer.add_key_value(key, value, gguf.GGUFValueType[kinds[type(value)]])
    for name, shape in mapping.hf_shapes(config).items():
        if len(shape) == 1:
            expected[name] = rng.normal(size=shape).astype(np.float32)
            writer.add_tensor(gguf_name(name), expected[name])
            continue
        block, size = gguf.GGML_QUANT_SIZES[quantization]
        # Below 0x3C a byte cannot make a scale infinite: float16's largest exponents begin with 0x7C.
        raw = rng.integers(0, 0x3C, (shape[0], shape[1] // block * size), np.uint8)
        writer.add_tensor(gguf_name(name), raw, raw_dtype=quantization)
        array = np.array(gguf.quants.dequantize(raw, quantization), np.float32).reshape(shape)
        heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}.get(name.split(".")[-2])
        if heads:  # pairs (2 i, 2 i + 1) of each head become i and i + half
            array = np.concatenate([np.concatenate([head[0::2], head[1::2]]) for head in np.split(array, heads)])
        expected[name] = array
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    loaded = weights.read(tmp_path / "x.gguf")
    same(loaded.tensors, expected)
    assert kind in loaded.origin
    weights.write(tmp_path / "hf", loaded, "hf")
    assert f"dequantised from GGUF ({', '.join(sorted({'F32', kind}))})" in (tmp_path / "hf/README.md").read_text()
