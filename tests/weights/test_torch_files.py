"""`.pt` files: every bit is kept, and code in them is never run."""

import dataclasses
import os
import pickle
import time
import zipfile

import ml_dtypes
import numpy as np
import pytest
import torch

from scripts import train_torch
from smollm_jax import weights
from smollm_jax.config import Recipe
from smollm_jax.config.hf_config import config_to_hf
from smollm_jax.errors import InputFileError, StorageError, UsageError
from smollm_jax.runs.checkpoint import CheckpointStore
from smollm_jax.runs.folder import write_run_files
from smollm_jax.runs.provenance import Provenance
from smollm_jax.weights.safetensors_file import DIGEST
from tests.small_files import SMALL, small_tensors


@pytest.fixture(scope="module")
def bundle(tiny_model):
    return weights.to_bundle(tiny_model, "tiny, random")


@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16])
def test_pt_keeps_every_bit(tmp_path, bundle, dtype):
    cast = dataclasses.replace(bundle, tensors={name: t.astype(dtype) for name, t in bundle.tensors.items()})
    weights.write(tmp_path / "x.pt", cast, "pt")
    loaded = weights.read(tmp_path / "x.pt")
    assert loaded.config == bundle.config
    for name, tensor in cast.tensors.items():
        assert loaded.tensors[name].dtype == dtype
        assert loaded.tensors[name].tobytes() == tensor.tobytes()


def test_a_bare_state_dict_takes_the_config_beside_it(tmp_path, bundle):
    torch.save({name: torch.tensor(tensor) for name, tensor in bundle.tensors.items()}, tmp_path / "x.pt")
    with pytest.raises(InputFileError, match=r"x\.pt: holds no config: put"):
        weights.read(tmp_path / "x.pt")
    write_run_files(tmp_path, bundle.config, {})
    assert weights.read(tmp_path / "x.pt").config == bundle.config


class Evil:
    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return (os.mkdir, (self.marker,))


@pytest.mark.parametrize("name", ["evil.pt", "evil.safetensors", "evil.gguf"])
@pytest.mark.parametrize("save", [lambda o, p: torch.save(o, p), lambda o, p: p.write_bytes(pickle.dumps(o))])
def test_pickled_code_is_refused_and_never_runs(tmp_path, name, save):
    marker = tmp_path / "it ran"
    save({"state_dict": Evil(str(marker))}, tmp_path / name)
    with pytest.raises(InputFileError, match=name):
        weights.read(tmp_path / name)
    assert not marker.exists()


def packed(path, content):
    """A state dict in a zip with compressed entries: 64 MB of zeros in 64 KB."""
    torch.save(content, path)
    with zipfile.ZipFile(path) as archive:
        entries = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in entries.items():
            archive.writestr(name, data)


def repickled(path, content, old: bytes, new: bytes):
    """A state dict in whose pickle (names and shapes) `old` is replaced by `new`."""
    torch.save(content, path)
    with zipfile.ZipFile(path) as archive:
        entries = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(path, "w") as archive:
        for name, data in entries.items():
            archive.writestr(name, data.replace(old, new) if name.endswith("data.pkl") else data)


def nested(depth: int) -> list:
    """A list of 2**depth leaves stored in a few bytes: each level contains the next one twice."""
    nested: list = []
    for _ in range(depth):
        nested = [nested, nested]
    return nested


def whole(**changed):
    state = {name: torch.tensor(tensor) for name, tensor in small_tensors().items()}
    return {"config": config_to_hf(SMALL), "origin": "", "state_dict": state} | changed


NORM, FLOAT8 = "model.norm.weight", torch.float8_e4m3fn
HOSTILE = {
    "empty": (lambda p: p.write_bytes(b""), "not a torch file"),
    "a zip cut": (lambda p: p.write_bytes(b"PK\x03\x04"), "not a torch file"),
    "another zip": (lambda p: zipfile.ZipFile(p, "w").writestr("a", "b"), "not a weights-only torch file"),
    "of PyTorch 1.5": (lambda p: torch.save({}, p, _use_new_zipfile_serialization=False), "PyTorch 1.6 or later"),
    "packed": (lambda p: packed(p, {"a": torch.zeros(1 << 24)}), "its entries are compressed"),
    "a pickle of 3 MB": (lambda p: torch.save({"origin": "a" * 3_000_000}, p), "data.pkl has over 2,097,152 bytes"),
    "a storage that claims more": (
        lambda p: repickled(p, {"a": torch.arange(4.0)}, b"K\x04", b"K\xc8"),
        "not a weights-only torch file",
    ),
    "terabytes of one number": (
        lambda p: torch.save({"a": torch.zeros(1).expand(1 << 20, 1 << 20)}, p),
        r"tensor a has shape \[1048576, 1048576\], but the file stores fewer",
    ),
    "a number": (lambda p: torch.save(whole(state_dict=3), p), "holds no state dict"),
    "a list": (lambda p: torch.save([1], p), "holds no state dict"),
    "text for a tensor": (lambda p: torch.save(whole(state_dict={"a": "b"}), p), "holds no state dict"),
    "a number for a name": (lambda p: torch.save(whole(state_dict={3: torch.zeros(1)}), p), "a tensor is named 3"),
    "a line break in a name": (lambda p: torch.save({"a\nb": torch.zeros(1)}, p), r"a tensor is named 'a\\nb'"),
    "sparse": (lambda p: torch.save({"a": torch.eye(3).to_sparse()}, p), "tensor a is not a plain dense array"),
    "of no device": (lambda p: torch.save({"a": torch.zeros(2, device="meta")}, p), "tensor a"),
    "float8": (lambda p: torch.save({"a": torch.zeros(2, dtype=FLOAT8)}, p), "tensor a is not a plain dense array"),
    "complex": (lambda p: torch.save(whole(state_dict={NORM: torch.zeros(8, dtype=torch.complex64)}), p), "complex64"),
    "no tensor": (lambda p: torch.save(whole(state_dict={}), p), "embed_tokens.weight is missing"),
    "NaN": (
        lambda p: torch.save(whole(state_dict=whole()["state_dict"] | {NORM: torch.full((8,), float("nan"))}), p),
        "model.norm.weight has non-finite",
    ),
    "a config in a list": (lambda p: torch.save(whole(config=[1]), p), "must be a JSON object, got list"),
    "a config of tensors": (lambda p: torch.save(whole(config={"a": torch.zeros(1)}), p), "config key 'a'="),
    "a config with a number for a key": (lambda p: torch.save(whole(config={3: 1, "a": 1}), p), "config key 3="),
    "a config of 2**60 lists": (
        lambda p: torch.save(whole(config=config_to_hf(SMALL) | {"eos_token_id": nested(60)}), p),
        "eos_token_id must be a token id",
    ),
    "an origin of 2**60 lists": (lambda p: torch.save(whole(origin=nested(60)), p), "origin must be a string"),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_malformed_pt_file_is_refused_in_one_line_that_names_it(tmp_path, capfd, name):
    write, named = HOSTILE[name]
    write(tmp_path / "x.pt")
    capfd.readouterr()
    began = time.perf_counter()
    with pytest.raises(InputFileError, match=named) as raised:
        weights.read(tmp_path / "x.pt")
    assert time.perf_counter() - began < 2
    assert str(raised.value).startswith(str(tmp_path / "x.pt"))
    assert str(raised.value).isprintable()
    assert capfd.readouterr() == ("", "")


def test_swapped_tensors_of_equal_shape_are_noticed_in_our_files_and_foreign_ones_still_load(tmp_path, bundle):
    weights.write(tmp_path / "x.pt", bundle, "pt")
    content = torch.load(tmp_path / "x.pt")
    state = content["state_dict"]
    a, b = "model.layers.0.mlp.up_proj.weight", "model.layers.0.mlp.gate_proj.weight"
    state[a], state[b] = state[b], state[a]
    torch.save(content, tmp_path / "swapped.pt")
    with pytest.raises(InputFileError, match=r"swapped\.pt: tensors were changed or swapped"):
        weights.read(tmp_path / "swapped.pt")
    del content[DIGEST]
    torch.save(content, tmp_path / "foreign.pt")
    assert weights.read(tmp_path / "foreign.pt").tensors[a].tobytes() == bundle.tensors[b].tobytes()


def test_a_pt_that_reads_back_different_is_not_kept(tmp_path, bundle, monkeypatch):
    save = torch.save

    def garbage(content, path):
        content["state_dict"][NORM] = content["state_dict"][NORM] + 1
        save(content, path)

    monkeypatch.setattr(torch, "save", garbage)
    with pytest.raises(StorageError, match=r"x\.pt: tensors read back different"):
        weights.write(tmp_path / "x.pt", bundle, "pt")
    assert list(tmp_path.iterdir()) == []


def test_the_twin_refuses_a_run_whose_documents_were_masked(tmp_path, tiny):
    run = tmp_path / "run"
    recipe = Recipe(1, 1, 8, learning_rate=1e-3, warmup_steps=0, dtype="float32", mask_documents=True)
    write_run_files(run, tiny, {})
    with CheckpointStore(run / "checkpoints") as store:
        metadata = Provenance(recipe, tiny, "text", "aa", "bb").meta()
        store.save(1, {"params": {"norm": np.ones(1, np.float32)}}, metadata)
    with pytest.raises(UsageError, match=f"{run} was trained with --mask-documents, which the twin does not do"):
        train_torch.main(["--like", str(run), "--out", str(tmp_path / "twin")])
