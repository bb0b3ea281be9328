"""An adapter applied to weights by a flag, and as a GGUF for llama.cpp."""

import dataclasses

import gguf
import numpy as np
import pytest

from smollm_jax import weights
from smollm_jax.commands import convert
from smollm_jax.config import preset
from smollm_jax.errors import InputFileError, UsageError
from smollm_jax.generation.engine import Engine
from smollm_jax.weights.adapter import Adapter, merge_adapter, projection_shape, write_adapter
from smollm_jax.weights.gguf_adapter import write_gguf_adapter

LAYERS = preset("tiny").num_hidden_layers


def some_adapter(targets=("q_proj", "k_proj", "down_proj"), rank=4, **fields):
    draw, tensors = np.random.default_rng(0), {}
    for target in targets:
        out_size, in_size = projection_shape(preset("tiny"), target)
        shapes = (LAYERS, rank, in_size), (LAYERS, out_size, rank)
        tensors[target] = tuple(draw.normal(0, 0.1, shape).astype(np.float32) for shape in shapes)
    return Adapter(tensors, rank, 8.0, **fields)


@pytest.fixture
def folder(tmp_path, base):
    write_adapter(tmp_path / "run" / "adapter", some_adapter(base=str(base)))
    return tmp_path / "run" / "adapter"


def test_a_flag_applies_an_adapter_as_reading_its_folder_does(tmp_path, folder, base, capsys):
    expected = weights.read(folder)
    plain = weights.read(base)
    assert not np.array_equal(*(b.tensors["model.layers.0.self_attn.q_proj.weight"] for b in (expected, plain)))
    for place in (folder, folder.parent):  # the adapter itself, and the run that has it
        applied = weights.read(base, adapter=place)
        assert all(np.array_equal(applied.tensors[name], tensor) for name, tensor in expected.tensors.items())
    convert.main([str(base), str(tmp_path / "merged"), "--to", "hf", "--adapter", str(folder)])
    written = weights.read(tmp_path / "merged")
    assert all(np.array_equal(written.tensors[name], tensor) for name, tensor in expected.tensors.items())
    assert "no adapter" not in capsys.readouterr().out


def test_text_is_generated_with_an_adapter(folder, base, tokenizer_path):
    plain = Engine.load(base, tokenizer=tokenizer_path)
    adapted, merged = (
        Engine.load(base, tokenizer=tokenizer_path, adapter=folder),
        Engine.load(folder, tokenizer=tokenizer_path),
    )
    prompt = [plain.encode("The state of")]
    texts = [
        "".join(chunk.text for chunk in engine.stream(prompt, max_new_tokens=8)) for engine in (plain, adapted, merged)
    ]
    assert texts[1] == texts[2] != texts[0]


def test_an_adapter_of_other_weights_is_refused(tmp_path, base):
    write_adapter(tmp_path, some_adapter(base="elsewhere", base_sha256="0" * 64))
    with pytest.raises(InputFileError, match="the adapter was trained on elsewhere, not on these weights"):
        weights.read(base, adapter=tmp_path)
    with pytest.raises(InputFileError, match=r"no adapter: neither it nor .* has an adapter_config\.json"):
        weights.read(base, adapter=base)


@pytest.mark.parametrize("rslora", [pytest.param(False, marks=pytest.mark.slow), True])
def test_a_gguf_adapter_adds_what_the_adapter_does(tmp_path, base, rslora):
    """Read back as llama.cpp does: alpha / rank times B A is added to the weight, whose rows are in GGUF's order."""
    adapter, config = some_adapter(rslora=rslora), preset("tiny")
    path = tmp_path / "adapter.gguf"
    write_gguf_adapter(path, adapter, config)
    reader = gguf.GGUFReader(path)
    assert reader.get_field("general.type").contents() == "adapter"
    assert reader.get_field("adapter.type").contents() == "lora"
    scale = reader.get_field("adapter.lora.alpha").contents() / adapter.rank
    tensors = {tensor.name: tensor.data for tensor in reader.tensors}
    assert len(tensors) == 2 * 3 * LAYERS
    plain = weights.read(base)
    merged = merge_adapter(plain, adapter)
    stored = []
    for name, bundle in (("plain", plain), ("merged", merged)):
        files = dict(bundle.tokenizer_files)
        weights.write(tmp_path / f"{name}.gguf", dataclasses.replace(bundle, tokenizer_files=files), "gguf")
        stored.append({t.name: np.array(t.data) for t in gguf.GGUFReader(tmp_path / f"{name}.gguf").tensors})
    for name, weight in stored[0].items():
        a, b = (tensors.get(f"{name}.lora_{side}") for side in "ab")
        added = 0 if a is None else scale * (b @ a)
        np.testing.assert_allclose(weight + added, stored[1][name], rtol=0, atol=1e-6, err_msg=name)


def test_the_adapter_of_a_run_is_written_as_gguf(tmp_path, folder, capsys):
    convert.main([str(folder), str(tmp_path / "adapter.gguf"), "--to", "gguf-adapter"])
    assert "an adapter of rank 4" in capsys.readouterr().out
    with pytest.raises(UsageError, match="exists already"):
        convert.main([str(folder), str(tmp_path / "adapter.gguf"), "--to", "gguf-adapter"])
    with pytest.raises(UsageError, match="leave --adapter and --tokenizer out"):
        convert.main([str(folder), str(tmp_path / "b.gguf"), "--to", "gguf-adapter", "--adapter", str(folder)])
