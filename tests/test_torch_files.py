"""`.pt` files: every bit kept, and no code in them ever run."""

import dataclasses
import os
import pickle

import ml_dtypes
import numpy as np
import pytest
import torch

from smollm_jax import weights
from smollm_jax.errors import InputFileError


@pytest.fixture(scope="module")
def bundle(tiny_model):
    return weights.to_bundle(tiny_model, "tiny, random")


@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16])
def test_pt_keeps_every_bit(tmp_path, bundle, dtype):
    cast = dataclasses.replace(bundle, tensors={name: t.astype(dtype) for name, t in bundle.tensors.items()})
    weights.write(tmp_path / "x.pt", cast, "pt")
    found = weights.read(tmp_path / "x.pt")
    assert found.config == bundle.config
    for name, tensor in cast.tensors.items():
        assert found.tensors[name].dtype == dtype
        assert found.tensors[name].tobytes() == tensor.tobytes()


def test_a_bare_state_dict_takes_the_config_beside_it(tmp_path, bundle):
    torch.save({name: torch.tensor(tensor) for name, tensor in bundle.tensors.items()}, tmp_path / "x.pt")
    with pytest.raises(InputFileError, match=r"x\.pt: carries no config"):
        weights.read(tmp_path / "x.pt")
    weights.write_run_files(tmp_path, bundle.config, {})
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


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04", {"state_dict": 3}, {"state_dict": {"a": "b"}}, [1]])
def test_a_pt_file_without_weights_is_refused_by_name(tmp_path, content):
    if isinstance(content, bytes):
        (tmp_path / "x.pt").write_bytes(content)
    else:
        torch.save(content, tmp_path / "x.pt")
    with pytest.raises(InputFileError, match=r"x\.pt"):
        weights.read(tmp_path / "x.pt")
