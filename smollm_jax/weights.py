"""Weights by name: one table of rules between our stacked parameters and Hugging Face's tensors, both directions.

`load` gives a JAX model from any kind of file; `read` and `write` convert between kinds. The table and the checks are
framework-free, so that the PyTorch twin goes through the same door.
"""

import dataclasses
import functools
import math
import re
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import einops
import ml_dtypes
import numpy as np

from smollm_jax import formats, gguf_file, integrity, tensor_names
from smollm_jax.checkpoint import CheckpointStore, flatten, unflatten
from smollm_jax.config import Config
from smollm_jax.errors import InputFileError, StorageError, UsageError
from smollm_jax.formats import Bundle
from smollm_jax.generation_config import UNKNOWN, GenerationConfig
from smollm_jax.gguf_writer import GgufType
from smollm_jax.hub import locate
from smollm_jax.safetensors_file import native
from smollm_jax.tokenizer_source import run_folder

if TYPE_CHECKING:
    from smollm_jax.model import SmolLM

Kind = Literal["orbax", "hf", "pt", "safetensors", "gguf"]

# HF name ("*" = layer index, stacked to L): (our path, how HF's array becomes ours).
# Load: einops.rearrange(x, rule). Save: the same rule with its two sides swapped.
RULES = {
    "model.embed_tokens.weight": ("embed_tokens", "V D -> V D"),
    "model.layers.*.input_layernorm.weight": ("layers.input_layernorm", "L D -> L D"),
    "model.layers.*.self_attn.q_proj.weight": ("layers.self_attn.q_proj", "L (N H) D -> L D N H"),
    "model.layers.*.self_attn.k_proj.weight": ("layers.self_attn.k_proj", "L (K H) D -> L D K H"),
    "model.layers.*.self_attn.v_proj.weight": ("layers.self_attn.v_proj", "L (K H) D -> L D K H"),
    "model.layers.*.self_attn.o_proj.weight": ("layers.self_attn.o_proj", "L D (N H) -> L N H D"),
    "model.layers.*.post_attention_layernorm.weight": ("layers.post_attention_layernorm", "L D -> L D"),
    "model.layers.*.mlp.gate_proj.weight": ("layers.mlp.gate_proj", "L F D -> L D F"),
    "model.layers.*.mlp.up_proj.weight": ("layers.mlp.up_proj", "L F D -> L D F"),
    "model.layers.*.mlp.down_proj.weight": ("layers.mlp.down_proj", "L D F -> L F D"),
    "model.norm.weight": ("norm", "D -> D"),
    "lm_head.weight": ("lm_head", "V D -> V D"),  # only where the head is not tied
}
PICKLES = (".bin", ".npy", ".npz", ".pkl", ".pickle", ".pth", ".ckpt")
INSTEAD = "give model.safetensors, or a .pt that torch.save wrote from the state dict (read as tensors only)"
FLOATS = (np.float32, np.float64, np.float16, ml_dtypes.bfloat16)


def rules(config: Config) -> dict[str, tuple[str, str]]:
    """The rules that apply to a config: all but the head's when the head is tied."""
    return {name: rule for name, rule in RULES.items() if name != "lm_head.weight" or not config.tie_word_embeddings}


def dims(config: Config) -> dict[str, int]:
    """The sizes of the letters in the rules."""
    return {
        "V": config.vocab_size,
        "D": config.hidden_size,
        "F": config.intermediate_size,
        "L": config.num_hidden_layers,
        "N": config.num_attention_heads,
        "K": config.num_key_value_heads,
        "H": config.head_dim,
    }


def hf_shapes(config: Config) -> dict[str, tuple[int, ...]]:
    """Name and shape of every tensor of the Hugging Face layout, in the model's order: 272 for SmolLM2-135M."""
    sizes = dims(config)

    def shape(rule: str) -> tuple[int, ...]:
        groups = re.findall(r"\(([^)]*)\)|(\w)", rule.split("->")[0].replace("L ", ""))
        return tuple(int(np.prod([sizes[letter] for letter in (a or b).split()])) for a, b in groups)

    whole = {name: shape(rule) for name, (_, rule) in rules(config).items()}
    stacked = [name for name in whole if "*" in name]
    layers = range(config.num_hidden_layers)
    expanded = {name.replace("*", str(index)): whole[name] for index in layers for name in stacked}
    head = {name: whole[name] for name in whole if name == "model.embed_tokens.weight"}
    tail = {name: whole[name] for name in ("model.norm.weight", "lm_head.weight") if name in whole}
    return head | expanded | tail


def check(bundle: Bundle, source: str | Path) -> Bundle:
    """The bundle, complete and in the model's order; raises one `InputFileError` that names every fault.

    Names are made Hugging Face's (`tensor_names.py`). A copy of a tied head is dropped when it equals the embedding and
    is a fault when it does not; alone, it is the embedding: safetensors' `save_model` keeps one name of a tied pair.
    """
    expected = hf_shapes(bundle.config)
    tensors, faults = tensor_names.standard(bundle.tensors, bundle.config)
    tensors = {name: t if t.dtype.isnative else native(t) for name, t in tensors.items()}
    if bundle.config.tie_word_embeddings and "lm_head.weight" in tensors:
        head = tensors.pop("lm_head.weight")
        embedding = tensors.setdefault("model.embed_tokens.weight", head)
        if head is not embedding and (head.shape != embedding.shape or head.tobytes() != embedding.tobytes()):
            faults.append("lm_head.weight differs from model.embed_tokens.weight though the config ties them")
    faults += [f"{name} is missing" for name in expected if name not in tensors]
    faults += [f"{name} is not part of the model" for name in sorted(set(tensors) - set(expected))]
    for name, shape in expected.items():
        if name not in tensors:
            continue
        tensor = tensors[name]
        if tensor.dtype not in FLOATS:
            faults.append(f"{name} has dtype {tensor.dtype}, expected a float")
        if tensor.shape != shape:
            faults.append(f"{name} has shape {list(tensor.shape)}, expected {list(shape)}")
        elif tensor.dtype in FLOATS and not np.isfinite(tensor).all():
            faults.append(f"{name} has non-finite values")
    if faults:
        more = f"; and {len(faults) - 20} more" if len(faults) > 20 else ""
        raise InputFileError(f"{source}: {len(faults)} fault(s) in the weights: {'; '.join(faults[:20])}{more}")
    return dataclasses.replace(bundle, tensors={name: tensors[name] for name in expected})


def to_ours(tensors: dict[str, np.ndarray], config: Config, dtype: Any = None) -> dict[str, np.ndarray]:
    """Hugging Face's tensors as our stacked parameters, by path, as `dtype` (default: their own): fresh arrays."""
    return dict(_stacked(tensors, config, dtype))


def _stacked(tensors: dict[str, np.ndarray], config: Config, dtype: Any) -> Iterator[tuple[str, np.ndarray]]:
    """Layer by layer into their place: stacking, turning and casting one after another takes 3 times as long."""
    for name, (path, rule) in rules(config).items():
        sizes, stacked = _split_sizes(rule, config), "*" in name
        names = [name.replace("*", str(index)) for index in range(config.num_hidden_layers if stacked else 1)]
        turned = [einops.rearrange(tensors[one], rule.replace("L ", ""), **sizes) for one in names]
        array = _aligned((len(turned), *turned[0].shape), dtype or np.result_type(*turned))
        for place, one in zip(array, turned, strict=True):
            place[...] = one
        yield path, array if stacked else array[0]


def _aligned(shape: tuple[int, ...], dtype: Any) -> np.ndarray:
    """An empty array that begins on a 64-byte line: JAX copies any other twice on a CPU, in 3 times the time."""
    size = math.prod(shape) * np.dtype(dtype).itemsize
    memory = np.empty(size + 63, np.uint8)
    begin = -memory.ctypes.data % 64
    return memory[begin : begin + size].view(dtype).reshape(shape)


def to_hf(parameters: dict[str, np.ndarray], config: Config) -> dict[str, np.ndarray]:
    """Our stacked parameters, by path, as Hugging Face's tensors: the inverse of `to_ours`, bit for bit."""
    tensors = {}
    for name, (path, rule) in rules(config).items():
        left, right = rule.split(" -> ")
        array = einops.rearrange(np.asarray(parameters[path]), f"{right} -> {left}")
        if "*" in name:
            tensors |= {name.replace("*", str(index)): layer for index, layer in enumerate(array)}
        else:
            tensors[name] = array
    return {name: tensors[name] for name in hf_shapes(config)}


def _split_sizes(rule: str, config: Config) -> dict[str, int]:
    """The sizes einops needs to split a rule's parenthesised axes."""
    return {letter: dims(config)[letter] for letter in "".join(re.findall(r"\(([^)]*)\)", rule)).replace(" ", "")}


def kind_of(path: Path) -> Kind:
    """What kind of weights a path holds; raises `InputFileError` when none can be recognised."""
    if not path.exists():
        raise InputFileError(f"{path}: no such file or folder")
    suffix = path.suffix.lower()
    if path.is_file() and suffix in PICKLES:
        raise InputFileError(f"{path}: a {path.suffix} file can hold code that runs when it is read; {INSTEAD}")
    if path.is_file() and suffix in (".pt", ".safetensors", ".gguf"):
        return suffix[1:]  # type: ignore[return-value]  # one of the three just tested
    steps = path / "checkpoints"
    if steps.is_dir() and (any(entry.name.isdigit() for entry in steps.iterdir()) or not _is_hf(path)):
        return "orbax"
    if _is_hf(path):
        return "hf"
    if run_folder(path):
        return "orbax"
    if path.is_dir() and any(path.glob("pytorch_model*.bin")):
        raise InputFileError(f"{path}: holds pytorch_model.bin only, which can run code when it is read; {INSTEAD}")
    raise InputFileError(
        f"{path}: not recognised as weights; give a run folder (or one step under its checkpoints/), "
        "a Hugging Face folder with model.safetensors, or a .pt, .safetensors or .gguf file"
    )


def _is_hf(path: Path) -> bool:
    """Whether a path is a folder with weights by Hugging Face's names."""
    return path.is_dir() and any(path.glob("model*.safetensors"))


def read(path: str | Path, *, allow_unverified: bool = False, mapped: bool = False) -> Bundle:
    """The weights at a path of any kind, checked, in Hugging Face's names and layout at their stored precision.

    Where there is no such path it may be a model's name on the Hugging Face hub, see `hub.locate`.
    A checkpoint whose files are not what was written is a `CheckpointError`; one without a manifest too, unless
    `allow_unverified`. `mapped`: for who copies the tensors at once; those of a safetensors file are views of it.
    """
    path = locate(path)
    readers = {
        "orbax": functools.partial(_read_orbax, allow_unverified=allow_unverified),
        "hf": functools.partial(formats.read_hf, mapped=mapped),
        "pt": formats.read_pt,
        "safetensors": functools.partial(formats.read_safetensors_file, mapped=mapped),
        "gguf": formats.read_gguf,
    }
    return check(readers[kind_of(path)](path), path)


def write(path: str | Path, bundle: Bundle, kind: Kind, *, gguf_type: GgufType | None = None) -> None:
    """Writes checked weights as `kind`; the target must not exist, and is complete or not there at all.

    `gguf_type` is how a GGUF stores its matrices (None: what keeps every bit) and goes with no other kind.
    """
    path = Path(path)
    if gguf_type is not None and kind != "gguf":
        raise UsageError(f"{path}: type {gguf_type} is for GGUF files, not for kind {kind}")
    writers = {
        "orbax": _write_orbax,
        "hf": formats.write_hf,
        "pt": formats.write_pt,
        "safetensors": formats.write_safetensors_file,
        "gguf": functools.partial(formats.write_gguf, kind=gguf_type),
    }
    if kind not in writers:
        raise UsageError(f"{path}: cannot write kind {kind!r}, only {', '.join(writers)}")
    writers[kind](path, check(bundle, path))


def _read_orbax(path: Path, allow_unverified: bool) -> Bundle:
    above = run_folder(path)
    step, run = (None, path) if above is None else (int(path.name), above)
    config = formats.read_config(run / "config.json")
    with CheckpointStore(run / "checkpoints", create=False) as store:
        step = store.latest_step() if step is None else step
        store.verify(step, item="params", allow_unverified=allow_unverified)
        meta = store.meta(step)
        parameters = store.read(step, "params")
    trained = Config(**meta["config"]) if "config" in meta else config
    if trained != config:
        fields = [name for name in vars(config) if getattr(config, name) != getattr(trained, name)]
        changes = [f"{name}: {getattr(trained, name)!r} -> {getattr(config, name)!r}" for name in fields]
        raise InputFileError(f"{run / 'config.json'}: is not what step {step} was saved with: {'; '.join(changes)}")
    origin = meta.get("origin") or f"step {step} of run {run.name}"
    expected = {name for name, _ in rules(config).values()}
    if set(parameters) != expected:
        differing = sorted(set(parameters) ^ expected)
        raise InputFileError(f"{path}: step {step} does not hold this config's parameters: {', '.join(differing)}")
    try:
        tensors = to_hf(parameters, config)
    except einops.EinopsError as error:
        raise InputFileError(f"{path}: step {step} has a parameter of the wrong shape: {error}") from error
    return Bundle(tensors, config, formats.read_tokenizer_files(run), origin, formats.read_generation_config(run))


def _write_orbax(path: Path, bundle: Bundle) -> None:
    with formats.replacing(path) as temporary:
        write_run_files(temporary, bundle.config, bundle.tokenizer_files, bundle.dtype, bundle.generation_config)
        with CheckpointStore(temporary / "checkpoints") as store:
            store.save(0, {"params": to_ours(bundle.tensors, bundle.config)}, {"origin": bundle.origin})


def write_run_files(
    run: Path,
    config: Config,
    tokenizer_files: dict[str, bytes],
    dtype: str = "float32",
    generation_config: dict[str, Any] | None = None,
) -> None:
    """What lies beside the checkpoints of a run: configs and the tokenizer's files, each whole or as it was."""
    import json

    run.mkdir(parents=True, exist_ok=True)
    texts = {"config.json": json.dumps(config.to_hf(dtype), indent=2) + "\n"}
    if generation_config is not None:
        texts["generation_config.json"] = formats.generation_text(config, generation_config)
    for name, content in ({name: text.encode() for name, text in texts.items()} | tokenizer_files).items():
        target, temporary = run / name, run / f"{name}.tmp"
        target.parent.mkdir(exist_ok=True)
        if target.is_file() and target.read_bytes() == content:
            continue
        try:
            temporary.write_bytes(content)
            integrity.sync(temporary)
            temporary.rename(target)
            integrity.sync(run)
        except OSError as error:
            temporary.unlink(missing_ok=True)
            raise StorageError(f"{target}: cannot be written: {error.strerror}") from error


def generation_of(path: Path) -> GenerationConfig:
    """How weights ask to be written with, without reading a tensor; greedy for the kinds that would need that."""
    kind, source = kind_of(path), f"{path}: generation_config"
    if kind == "gguf":
        config, values = gguf_file.read_generation(path)
        return GenerationConfig.of(values, config, source)
    if kind not in ("hf", "orbax"):
        return UNKNOWN
    folder = run_folder(path) or path
    config = formats.read_config(folder / "config.json")
    return GenerationConfig.of(formats.generation_of_folder(folder, config), config, source)


def load(path: str | Path, dtype: Any = np.float32) -> "tuple[SmolLM, Config]":
    """The JAX model at a path of any kind, its parameters as `dtype`, and its config.

    float64 needs `jax.config.update("jax_enable_x64", True)` first, else `UsageError`: JAX would truncate in silence.
    """
    bundle = read(path, mapped=True)
    return from_bundle(bundle, dtype), bundle.config


def from_bundle(bundle: Bundle, dtype: Any = np.float32) -> "SmolLM":
    """The JAX model of checked weights."""
    import jax
    import jax.numpy as jnp

    from smollm_jax.model import SmolLM

    dtype = np.dtype(dtype)
    if dtype == np.float64 and not jax.config.jax_enable_x64:  # pyright: ignore[reportAttributeAccessIssue]
        raise UsageError("float64 needs jax_enable_x64: set JAX_ENABLE_X64=1")
    abstract = jax.eval_shape(lambda: SmolLM(bundle.config, key=jax.random.key(0)))
    # One at a time: the next takes the memory of one that JAX has copied. Memory that it only borrowed from NumPy a
    # training step could not overwrite in place.
    ours = _stacked(bundle.tensors, bundle.config, dtype)
    return unflatten(abstract, {path: jnp.array(array) for path, array in ours})


def to_bundle(model: "SmolLM", origin: str = "", tokenizer_files: dict[str, bytes] | None = None) -> Bundle:
    """A JAX model's parameters as Hugging Face's tensors."""
    parameters = {path: np.asarray(array) for path, array in flatten(model).items()}
    return Bundle(to_hf(parameters, model.config), model.config, tokenizer_files or {}, origin)
