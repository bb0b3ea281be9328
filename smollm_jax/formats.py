"""The file formats weights come in: Hugging Face folder, safetensors file, torch `.pt`, GGUF.

Every reader gives, and every writer takes, the same `Bundle`: Hugging Face's tensor names and layout as NumPy arrays.
Framework-free: torch is imported for `.pt` only, gguf for `.gguf` only. What the tensors must be is checked in
`weights.py`; here only the container is.
"""

import dataclasses
import importlib
import json
import os
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import einops
import ml_dtypes
import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from smollm_jax.config import Config
from smollm_jax.errors import InputFileError, StorageError, UsageError

TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja")


@dataclasses.dataclass
class Bundle:
    """Weights on their way between formats. `origin` says in words where the numbers come from."""

    tensors: dict[str, np.ndarray]
    config: Config
    tokenizer_files: dict[str, bytes] = dataclasses.field(default_factory=dict)
    origin: str = ""

    @property
    def dtype(self) -> str:
        """The dtype most of the numbers have, by numpy's name."""
        sizes: dict[str, int] = {}
        for tensor in self.tensors.values():
            sizes[tensor.dtype.name] = sizes.get(tensor.dtype.name, 0) + tensor.size
        return max(sizes, key=lambda name: sizes[name])


@contextmanager
def replacing(target: Path) -> Iterator[Path]:
    """A temporary sibling to write; renamed to `target` when the block ends well, removed when it does not.

    Raises `UsageError` if `target` exists: nothing is overwritten.
    """
    if target.exists():
        raise UsageError(f"{target}: exists already; name another target or remove it first")
    temporary = target.with_name(f".{target.name}.{uuid.uuid4().hex[:8]}.tmp")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        yield temporary
        os.rename(temporary, target)
    except (OSError, SafetensorError) as error:  # safetensors reports a full disk as its own error
        raise StorageError(f"{target}: cannot be written: {error}") from error
    finally:
        if temporary.is_dir():
            shutil.rmtree(temporary, ignore_errors=True)
        else:
            temporary.unlink(missing_ok=True)


def need(module: str, path: Path) -> Any:
    """An optional package, imported; raises `UsageError` naming the extra that has it."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise UsageError(f"{path}: needs the extra: pip install smollm-jax[{module}]") from error


def read_json(path: Path) -> Any:
    """The JSON value in a file; raises `InputFileError` naming the file and the line."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, json.JSONDecodeError, RecursionError) as error:
        raise InputFileError(f"{path}: not a readable JSON file: {error}") from error


def read_config(path: Path) -> Config:
    """The config in a `config.json`; raises `InputFileError` naming the file and the field."""
    return _config(read_json(path), path)


def _config(values: Any, path: Path) -> Config:
    try:
        return Config.from_hf(values)
    except UsageError as error:
        raise InputFileError(f"{path}: {error}") from error


def read_tokenizer_files(folder: Path) -> dict[str, bytes]:
    """The tokenizer files a folder holds, by name."""
    return {name: (folder / name).read_bytes() for name in TOKENIZER_FILES if (folder / name).is_file()}


# ------------------------------------------------------------------------------------------------ safetensors


def read_safetensors(path: Path) -> tuple[dict[str, np.ndarray], dict[str, str]]:
    """Tensors and metadata of one file; raises `InputFileError` when the file is malformed."""
    try:
        with safe_open(path, framework="numpy") as file:
            return {name: file.get_tensor(name) for name in file.keys()}, file.metadata() or {}  # noqa: SIM118
    except (SafetensorError, OSError, TypeError, ValueError, KeyError, AttributeError) as error:
        raise InputFileError(f"{path}: not a readable safetensors file: {error}") from error


def write_safetensors(path: Path, tensors: dict[str, np.ndarray], metadata: dict[str, str]) -> None:
    """The one writer of safetensors: makes arrays contiguous, reads back what it wrote and compares the bytes.

    safetensors 0.8.0 writes the memory of a non-contiguous array in the wrong order without an error
    (safetensors#825), and gives files the mode 0600 (#782).
    """
    native = {name: np.ascontiguousarray(t, dtype=t.dtype.newbyteorder("=")) for name, t in tensors.items()}
    save_file(native, path, metadata={"format": "pt"} | metadata)
    umask = os.umask(0)
    os.umask(umask)
    path.chmod(0o666 & ~umask)
    written, _ = read_safetensors(path)
    for name, tensor in native.items():
        if written[name].dtype != tensor.dtype or written[name].tobytes() != tensor.tobytes():
            raise StorageError(f"{path}: tensor {name} reads back different from what was written")


def read_safetensors_file(path: Path) -> Bundle:
    """A lone safetensors file; its config is in its metadata, or in a config.json beside it."""
    tensors, metadata = read_safetensors(path)
    if "config" in metadata:
        try:
            values = json.loads(metadata["config"])
        except json.JSONDecodeError as error:
            raise InputFileError(f"{path}: metadata 'config' is not JSON: {error}") from error
        config = _config(values, path)
    else:
        config = _config_beside(path)
    return Bundle(tensors, config, read_tokenizer_files(path.parent), metadata.get("origin", ""))


def write_safetensors_file(path: Path, bundle: Bundle) -> None:
    """The PyTorch twin's weights as one file that carries its config."""
    metadata = {"config": json.dumps(bundle.config.to_hf(bundle.dtype)), "origin": bundle.origin}
    with replacing(path) as temporary:
        write_safetensors(temporary, bundle.tensors, metadata)


def _config_beside(path: Path) -> Config:
    if not (path.parent / "config.json").is_file():
        raise InputFileError(f"{path}: carries no config, and no config.json lies beside it")
    return read_config(path.parent / "config.json")


# ----------------------------------------------------------------------------------------- Hugging Face folder


def read_hf(folder: Path) -> Bundle:
    """A Hugging Face model folder: config.json, and model.safetensors or its shards."""
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        content = read_json(index)
        shards = content.get("weight_map") if isinstance(content, dict) else None
        if not isinstance(shards, dict) or not all(isinstance(name, str) for name in shards.values()):
            raise InputFileError(f"{index}: has no weight_map of tensor name to file name")
        tensors: dict[str, np.ndarray] = {}
        for name in sorted(set(shards.values())):
            if Path(name).name != name:
                raise InputFileError(f"{index}: shard {name!r} is not a plain file name")
            tensors |= read_safetensors(folder / name)[0]
    else:
        tensors, _ = read_safetensors(folder / "model.safetensors")
    config = read_config(folder / "config.json")
    origin = folder / "ORIGIN.txt"
    words = origin.read_text(encoding="utf-8").strip() if origin.is_file() else ""
    return Bundle(tensors, config, read_tokenizer_files(folder), words)


def write_hf(folder: Path, bundle: Bundle) -> None:
    """A folder that `AutoModelForCausalLM` and `AutoTokenizer` load, with the tied head left out."""
    config = bundle.config
    names = ("bos_token_id", "eos_token_id", "pad_token_id")
    ids = {name: value for name, value in config.to_hf().items() if name in names and value is not None}
    with replacing(folder) as temporary:
        temporary.mkdir()
        write_safetensors(temporary / "model.safetensors", bundle.tensors, {})
        texts = {
            "config.json": json.dumps(config.to_hf(bundle.dtype), indent=2) + "\n",
            "generation_config.json": json.dumps(ids, indent=2) + "\n",
            "README.md": _model_card(bundle),
            "ORIGIN.txt": bundle.origin + "\n",
        }
        for name, text in texts.items():
            (temporary / name).write_text(text, encoding="utf-8")
        for name, content in bundle.tokenizer_files.items():
            (temporary / name).write_bytes(content)


def _model_card(bundle: Bundle) -> str:
    parameters = sum(tensor.size for tensor in bundle.tensors.values())
    return (
        "---\nlibrary_name: transformers\npipeline_tag: text-generation\n---\n"
        f"# SmolLM2, {parameters:,} parameters, {bundle.dtype}\n\n"
        f"Origin of the numbers: {bundle.origin or 'not recorded'}.\n"
    )


# -------------------------------------------------------------------------------------------------- torch .pt


def read_pt(path: Path) -> Bundle:
    """A `.pt` file that holds {"config": ..., "state_dict": ...} or a bare state dict; never runs pickled code."""
    torch = need("torch", path)

    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises many kinds, pickle's among them
        raise InputFileError(
            f"{path}: not a weights-only torch file: {(str(error) or repr(error)).splitlines()[0]}"
        ) from error
    if isinstance(content, dict) and "state_dict" in content:
        state, config, origin = content["state_dict"], content.get("config"), content.get("origin", "")
    else:
        state, config, origin = content, None, ""
    if not isinstance(state, dict) or not all(isinstance(tensor, torch.Tensor) for tensor in state.values()):
        raise InputFileError(f"{path}: holds no state dict of tensors")
    tensors = {name: from_torch(tensor) for name, tensor in state.items()}
    values = _config_beside(path) if config is None else _config(config, path)
    return Bundle(tensors, values, read_tokenizer_files(path.parent), str(origin))


def write_pt(path: Path, bundle: Bundle) -> None:
    """The PyTorch twin's weights as {"config", "origin", "state_dict"}, read back and compared."""
    torch = need("torch", path)

    state = {name: to_torch(tensor) for name, tensor in bundle.tensors.items()}
    with replacing(path) as temporary:
        content = {"config": bundle.config.to_hf(bundle.dtype), "origin": bundle.origin, "state_dict": state}
        try:
            torch.save(content, temporary)
        except RuntimeError as error:  # what torch makes of a full disk
            raise StorageError(f"{path}: cannot be written: {error}") from error
        for name, tensor in torch.load(temporary, weights_only=True)["state_dict"].items():
            if from_torch(tensor).tobytes() != np.ascontiguousarray(bundle.tensors[name]).tobytes():
                raise StorageError(f"{path}: tensor {name} reads back different from what was written")


def from_torch(tensor: Any) -> np.ndarray:
    """A CPU tensor as a NumPy array; bfloat16 bit for bit."""
    import torch

    tensor = tensor.detach()
    if tensor.dtype == torch.bfloat16:  # NumPy has no bfloat16 of its own
        return tensor.contiguous().view(torch.int16).numpy().view(ml_dtypes.bfloat16)
    return tensor.numpy()


def to_torch(array: np.ndarray) -> Any:
    """A NumPy array as a tensor that owns its memory; bfloat16 bit for bit."""
    import torch

    array = np.array(array, order="C")  # a copy: torch must not share memory it may write to
    if array.dtype == ml_dtypes.bfloat16:
        return torch.from_numpy(array.view(np.int16)).view(torch.bfloat16)
    return torch.from_numpy(array)


# ------------------------------------------------------------------------------------------------------- GGUF

_GGUF_LAYER = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_GGUF_TOP = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}


def read_gguf(path: Path) -> Bundle:
    """A Llama GGUF, dequantised to float32 by the `gguf` package, with the tokenizer in its metadata.

    GGUF stores the rows of q and k for interleaved rotary pairs; here they go back to HF's half-split order, each
    with its own number of heads. Source: llama.cpp, conversion of LlamaModel (`permute`).
    """
    gguf = need("gguf", path)
    from smollm_jax.tokenizer import files_from_gguf

    try:
        reader = gguf.GGUFReader(path)
        fields = {name: field.contents() for name, field in reader.fields.items()}
        config = _gguf_config(fields, path, tied=all(tensor.name != "output.weight" for tensor in reader.tensors))
        tensors, kinds = {}, set()
        for tensor in reader.tensors:
            array = np.array(gguf.quants.dequantize(tensor.data, tensor.tensor_type), np.float32)
            name = _hf_name(tensor.name)
            heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
            for projection, count in heads.items():
                if name.endswith(f"self_attn.{projection}.weight"):
                    array = einops.rearrange(array, "(heads h two) D -> (heads two h) D", heads=count, two=2)
            tensors[name] = array
            kinds.add(tensor.tensor_type.name)
    except InputFileError:
        raise
    except Exception as error:  # the reader raises whatever a malformed byte leads it to
        raise InputFileError(f"{path}: not a readable GGUF file: {type(error).__name__}: {error}") from error
    origin = f"{fields.get('general.name', path.name)}, dequantised from GGUF ({', '.join(sorted(kinds))})"
    return Bundle(tensors, config, files_from_gguf(fields, path), origin)


def _hf_name(name: str) -> str:
    """Hugging Face's name for a GGUF tensor; an unknown name comes back as it is, for the check to name it."""
    parts = name.split(".")
    if parts[0] == "blk" and len(parts) == 4 and parts[2] in _GGUF_LAYER:
        return f"model.layers.{parts[1]}.{_GGUF_LAYER[parts[2]]}.{parts[3]}"
    if len(parts) == 2 and parts[0] in _GGUF_TOP:
        return f"{_GGUF_TOP[parts[0]]}.{parts[1]}"
    return name


def _gguf_config(fields: dict[str, Any], path: Path, tied: bool) -> Config:
    if fields.get("general.architecture") != "llama":
        raise InputFileError(f"{path}: architecture {fields.get('general.architecture')!r}, only 'llama' is supported")
    if fields.get("llama.rope.scaling.type", "none") != "none":
        raise InputFileError(f"{path}: llama.rope.scaling.type={fields['llama.rope.scaling.type']!r} is not supported")
    keys = {
        "vocab_size": "llama.vocab_size",
        "hidden_size": "llama.embedding_length",
        "intermediate_size": "llama.feed_forward_length",
        "num_hidden_layers": "llama.block_count",
        "num_attention_heads": "llama.attention.head_count",
        "num_key_value_heads": "llama.attention.head_count_kv",
        "head_dim": "llama.rope.dimension_count",
        "max_position_embeddings": "llama.context_length",
        "rope_theta": "llama.rope.freq_base",
        "rms_norm_eps": "llama.attention.layer_norm_rms_epsilon",
    }
    if missing := [key for key in keys.values() if key not in fields]:
        raise InputFileError(f"{path}: metadata lacks {', '.join(missing)}")
    values = {name: fields[key] for name, key in keys.items()}
    # GGUF holds float32: 9.99999974e-06 is 1e-5, found again as the shortest decimal with the same float32.
    values |= {name: float(str(np.float32(values[name]))) for name in ("rope_theta", "rms_norm_eps")}
    tokens = {name: fields.get(f"tokenizer.ggml.{key}_token_id") for name, key in _GGUF_TOKENS.items()}
    # Not in a GGUF and not used by trained weights: the recipe's 1/sqrt(hidden).
    fixed = {"initializer_range": values["hidden_size"] ** -0.5, "tie_word_embeddings": tied}
    return _config(values | tokens | fixed, path)


_GGUF_TOKENS = {"bos_token_id": "bos", "eos_token_id": "eos", "pad_token_id": "padding"}
