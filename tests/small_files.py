"""Valid files of a tiny model, for tests to convert or to damage."""

import functools
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np

from smollm_jax.config import Config
from smollm_jax.data.mixture import Mixture
from smollm_jax.data.token_file import TokenFile, TokenSet
from smollm_jax.tokenizer.gguf import build_tokenizer, tokenizer_files
from smollm_jax.tokenizer.special_tokens import byte_symbols
from smollm_jax.weights import mapping

SMALL = Config(300, 8, 12, 2, 2, 1, 4, 64, 1e4, 1e-5, 0.1, True, 0, 0, None)


@functools.cache
def small_tensors() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    return {name: rng.normal(size=shape).astype(np.float32) for name, shape in mapping.hf_shapes(SMALL).items()}


def small_tokenizer() -> dict[str, bytes]:
    """The files of a byte-level tokenizer of 260 entries."""
    core = build_tokenizer(
        ["<|endoftext|>", *byte_symbols(), "Ġt", "he", "Ġthe"], ["Ġ t", "h e", "Ġt he"], ["<|endoftext|>"]
    )
    return tokenizer_files(core, 64, {"eos": "<|endoftext|>"}, "{{ messages }}")


def tokenizer_folder(folder: Path, **changed: bytes) -> Path:
    folder.mkdir(exist_ok=True)
    for name, content in (small_tokenizer() | changed).items():
        (folder / name).write_bytes(content)
    return folder


GGUF_NAMES = {
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
    "output": "lm_head",
}


def gguf_name(name: str) -> str:
    hf_names = {hf: gguf for gguf, hf in GGUF_NAMES.items()}
    name = name.removesuffix(".weight")
    if name in hf_names:
        return f"{hf_names[name]}.weight"
    _, _, layer, suffix = name.split(".", 3)
    return f"blk.{layer}.{hf_names[suffix]}.weight"


def gguf_metadata(config: Config) -> dict[str, Any]:
    """llama.cpp's metadata for a tokenizer of 260 entries; floats are written as float32, ints as uint32."""
    return {
        "llama.vocab_size": config.vocab_size,
        "llama.embedding_length": config.hidden_size,
        "llama.feed_forward_length": config.intermediate_size,
        "llama.block_count": config.num_hidden_layers,
        "llama.attention.head_count": config.num_attention_heads,
        "llama.attention.head_count_kv": config.num_key_value_heads,
        "llama.rope.dimension_count": config.head_dim,
        "llama.context_length": config.max_position_embeddings,
        "llama.rope.freq_base": config.rope_theta,
        "llama.attention.layer_norm_rms_epsilon": config.rms_norm_eps,
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "smollm",
        "tokenizer.ggml.tokens": ["<|endoftext|>", *byte_symbols(), "Ġt", "he", "Ġthe"],
        "tokenizer.ggml.token_type": [3] + [1] * 259,
        "tokenizer.ggml.merges": ["Ġ t", "h e", "Ġt he"],
        "tokenizer.ggml.eos_token_id": config.eos_token_ids[0],
        "zz.last": 7,
    }


def write_gguf(
    path: Path,
    config: Config,
    tensors: dict[str, np.ndarray],
    metadata: dict[str, Any] | None = None,
    extra: dict[str, np.ndarray] | None = None,
):
    """Writes a GGUF of Hugging Face tensors, q and k permuted as in llama.cpp, and of `extra` tensors unchanged."""
    import gguf

    metadata = gguf_metadata(config) if metadata is None else metadata
    writer = gguf.GGUFWriter(path, metadata.get("general.architecture", "llama"))
    for key, value in metadata.items():
        kind = {bool: "BOOL", int: "UINT32", float: "FLOAT32", str: "STRING", bytes: "STRING", list: "ARRAY"}
        if key != "general.architecture":
            signed = type(value) is int and value < 0
            writer.add_key_value(key, value, gguf.GGUFValueType["INT32" if signed else kind[type(value)]])
    heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
    for name, tensor in tensors.items():
        array = np.ascontiguousarray(tensor)
        if (count := heads.get(name.split(".")[-2])) is not None:
            array = np.ascontiguousarray(array.reshape(count, 2, -1, array.shape[1]).swapaxes(1, 2)).reshape(
                array.shape
            )
        if array.dtype.name == "bfloat16":
            raw, kind = array.view(np.uint8), gguf.GGMLQuantizationType.BF16
            writer.add_tensor(gguf_name(name), raw, raw_dtype=kind)
        else:
            writer.add_tensor(gguf_name(name), array)
    for name, array in (extra or {}).items():
        writer.add_tensor(name, array)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def of_tokens(*parts: np.ndarray, shares: tuple[str, ...] = ("1",)) -> Mixture:
    """Data in memory: a mixture of these token arrays."""
    files = [
        TokenFile(Path(f"{i}/tokens.bin"), part.astype(np.uint16), np.array([part.size]), str(i), "", 0, 0)
        for i, part in enumerate(parts)
    ]
    return Mixture(tuple((TokenSet(file.path.parent, (file,)),) for file in files), tuple(map(Fraction, shares)))
