"""Malformed weight files, each with words that its error must have; `test_hostile_files.py` reads them.

A case is a function that is given a folder and returns the path to read; what it names is a regular expression.
"""

import json
import re
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from smollm_jax.config.hf_config import config_to_hf
from smollm_jax.weights.safetensors_file import write_safetensors
from tests.small_files import SMALL, gguf_metadata, small_tensors, write_gguf

Cases = dict[str, tuple[Callable[[Path], Path], str]]
Q0, Q1 = (f"model.layers.{i}.self_attn.q_proj.weight" for i in (0, 1))


# ------------------------------------------------------------------------------------------------ safetensors


def safetensors_bytes(folder: Path, tensors: dict[str, np.ndarray] | None = None, **metadata: str) -> bytes:
    header = {"config": json.dumps(config_to_hf(SMALL))} | metadata
    write_safetensors(folder / "made", small_tensors() if tensors is None else tensors, header)
    return (folder / "made").read_bytes()


def patched(change: Callable[[bytes], bytes]) -> Callable[[Path], Path]:
    """A valid file with its bytes changed."""

    def write(folder: Path) -> Path:
        (folder / "x.safetensors").write_bytes(change(safetensors_bytes(folder)))
        return folder / "x.safetensors"

    return write


def headed(change: Callable[[dict[str, Any]], Any]) -> Callable[[Path], Path]:
    """A valid file whose header `change` edits in place, or replaces by its return value (a dict or text)."""

    def write(content: bytes) -> bytes:
        end = 8 + int.from_bytes(content[:8], "little")
        header = json.loads(content[8:end])
        new = change(header)
        new = header if new is None else new
        text = new if isinstance(new, bytes) else (new if isinstance(new, str) else json.dumps(new)).encode()
        return len(text).to_bytes(8, "little") + text + content[end:]

    return patched(write)


def foreign(header: dict[str, Any]) -> None:
    """A file of another program, without a digest."""
    header["__metadata__"] = {"config": header["__metadata__"]["config"]}


def swap(header: dict[str, Any]) -> None:
    header[Q0], header[Q1] = header[Q1], header[Q0]


def shift(header: dict[str, Any]) -> None:
    last = max(header.values(), key=lambda entry: entry.get("data_offsets", [0, 0])[1])
    last["data_offsets"] = [n + 4 for n in last["data_offsets"]]


def overlap(header: dict[str, Any]) -> None:
    header[Q1]["data_offsets"] = header[Q0]["data_offsets"]


def setting(name: str, key: str, value: Any) -> Callable[[Path], Path]:
    return headed(lambda header: header[name].update({key: value}))


def with_tensors(change: Callable[[dict[str, np.ndarray]], Any], **metadata: str) -> Callable[[Path], Path]:
    """A well-formed file with other tensors and their correct digest."""

    def write(folder: Path) -> Path:
        tensors = dict(small_tensors())
        change(tensors)
        (folder / "x.safetensors").write_bytes(safetensors_bytes(folder, tensors, **metadata))
        return folder / "x.safetensors"

    return write


def spoiled(value: float) -> Callable[[Path], Path]:
    tensors = small_tensors()
    return with_tensors(lambda t: t.update({Q0: np.where(np.arange(64).reshape(8, 8) == 9, value, tensors[Q0])}))


def twice(header: dict[str, Any]) -> str:
    entry = json.dumps(header[Q0])
    return json.dumps(header)[:-1] + f', "{Q0}": {entry}}}'


def flipped(content: bytes) -> bytes:
    return content[:-1] + bytes([content[-1] ^ 1])


SAFETENSORS: Cases = {
    "empty": (patched(lambda c: b""), "a header of 0 bytes in a file of 0"),
    "seven bytes": (patched(lambda c: c[:7]), "in a file of 7"),
    "header longer than the file": (patched(lambda c: len(c).to_bytes(8, "little") + c[8:]), "a header of"),
    "header of 2**63 bytes": (patched(lambda c: (1 << 63).to_bytes(8, "little") + c[8:]), "9,223,372,036,854,775,808"),
    "header of 2**64 - 1 bytes": (patched(lambda c: b"\xff" * 8 + c[8:]), "18,446,744,073,709,551,615"),
    "header of 17 MiB": (
        patched(lambda c: (17 << 20).to_bytes(8, "little") + b" " * (17 << 20)),
        "the limit is 16,777,216",
    ),
    "header no JSON": (headed(lambda h: "{not json"), "header: not readable as JSON"),
    "header nested too deeply": (headed(lambda h: "[" * 100_000), "nested too deeply"),
    "header no UTF-8": (headed(lambda h: b'{"\xff": 1}'), "byte 2 of the header"),
    "header a list": (headed(lambda h: [1, 2]), "not a JSON object of tensors"),
    "metadata with a number": (headed(lambda h: h["__metadata__"].update(a=3)), "whose metadata are strings"),
    "a name twice": (headed(twice), f"{re.escape(Q0)}' occurs twice"),
    "a name with a line break": (headed(lambda h: h.update({"a\nb": h.pop(Q0)})), r"named 'a\\nb'"),
    "a hole": (headed(shift), "a gap or an overlap"),
    "an overlap": (headed(overlap), "a gap or an overlap"),
    "truncated": (patched(lambda c: c[:-1]), "its header describes"),
    "appended": (patched(lambda c: c + b"\0"), "its header describes"),
    "no data": (patched(lambda c: c[: 8 + int.from_bytes(c[:8], "little")]), "its header describes"),
    "offsets as text": (setting(Q0, "data_offsets", ["0", "9"]), f"{Q0} is described by"),
    "offsets negative": (setting(Q0, "data_offsets", [-256, 0]), "a gap or an overlap"),
    "offsets of 10**90": (setting(Q0, "data_offsets", [10**90, 10**90 + 256]), "a gap or an overlap"),
    "a size negative": (setting(Q0, "shape", [-8, -8]), rf"{Q0} has shape \[-8, -8\]"),
    "a size true": (setting(Q0, "shape", [64, True]), f"{Q0} has shape"),
    "sizes that overflow": (setting(Q0, "shape", [2**40, 2**40]), f"{Q0}, F32"),
    "too many sizes": (setting(Q0, "shape", [1] * 9), f"{Q0} has shape"),
    "dtype unknown": (setting(Q0, "dtype", "F8_E4M3"), f"{Q0} has dtype 'F8_E4M3'"),
    "dtype of another size": (setting(Q0, "dtype", "F64"), f"{Q0}, F64"),
    "shape wrong": (setting(Q0, "shape", [64]), "were changed or swapped"),
    "shape wrong, foreign": (headed(lambda h: (foreign(h), h[Q0].update(shape=[64]))[:0] or None), rf"{Q0} has shape"),
    "dtype wrong": (with_tensors(lambda t: t.update({Q0: t[Q0].astype(np.int32)})), f"{Q0} has dtype int32"),
    "a tensor missing": (with_tensors(lambda t: t.pop(Q0)), f"{Q0} is missing"),
    "a tensor more": (with_tensors(lambda t: t.update(bias=t[Q0])), "bias is not part of the model"),
    "ten thousand tensors more": (with_tensors(lambda t: t.update({f"t{i}": t[Q0][0] for i in range(10**4)})), "more"),
    "NaN": (spoiled(np.nan), f"{Q0} has non-finite"),
    "infinite": (spoiled(-np.inf), f"{Q0} has non-finite"),
    "two tensors swapped": (headed(swap), "were changed or swapped"),
    "a bit flipped": (patched(flipped), "were changed or swapped"),
    "no config": (headed(lambda h: h["__metadata__"].pop("config") and None), "holds no config: put"),
    "config no JSON": (with_tensors(lambda t: None, config="{"), "metadata 'config': not readable as JSON"),
    "config of a billion layers": (
        with_tensors(lambda t: None, config=json.dumps(config_to_hf(SMALL) | {"num_hidden_layers": 10**9})),
        "num_hidden_layers must be an integer from 1 to 1024",
    ),
}

# ------------------------------------------------------------------------------------------------------- GGUF


def gguf_with(*, without: str = "", **changed: Any) -> Callable[[Path], Path]:
    """A GGUF with changed metadata; "__" in a key of `changed` stands for "."."""

    def write(folder: Path) -> Path:
        changes = {key.replace("__", "."): value for key, value in changed.items()}
        metadata = gguf_metadata(SMALL) | changes
        metadata.pop(without, None)
        write_gguf(folder / "x.gguf", SMALL, small_tensors(), metadata)
        return folder / "x.gguf"

    return write


def gguf_patched(change: Callable[[bytearray], Any]) -> Callable[[Path], Path]:
    """A valid GGUF whose bytes are edited in place, or replaced by the return value."""

    def write(folder: Path) -> Path:
        content = bytearray(gguf_with()(folder).read_bytes())
        content = change(content) or content
        (folder / "x.gguf").write_bytes(content)
        return folder / "x.gguf"

    return write


def put(form: str, value: int, after: str = "", skip: int = 0) -> Callable[[Path], Path]:
    """A valid GGUF with one number changed, `skip` bytes from its beginning or from the end of a name."""

    def change(content: bytearray) -> None:
        start = content.index(struct.pack("<Q", len(after)) + after.encode()) + 8 + len(after) if after else 0
        struct.pack_into(f"<{form}", content, start + skip, value)

    return gguf_patched(change)


LAST_TENSOR = "output_norm.weight"  # one dimension: rank, size, kind and offset are at 0, 4, 12 and 16
EMBEDDING = "token_embd.weight"  # two dimensions: rank, sizes, kind and offset are at 0, 4, 12, 20 and 24
TOKENS = "tokenizer.ggml.tokens"  # type, element type, count and the first length are at 0, 4, 8 and 16


def rename(old: bytes, new: bytes) -> Callable[[bytearray], bytearray]:
    return lambda content: content.replace(old, new, 1)


def gguf_arrays(*arrays: bytes) -> Callable[[Path], Path]:
    """A GGUF that has only arrays a, b, ..., each given by its type and entries."""

    def write(folder: Path) -> Path:
        fields = (struct.pack("<Q1sI", 1, bytes([97 + i]), 9) + array for i, array in enumerate(arrays))
        (folder / "x.gguf").write_bytes(b"GGUF" + struct.pack("<IQQ", 3, 0, len(arrays)) + b"".join(fields))
        return folder / "x.gguf"

    return write


EMPTY_STRINGS = struct.pack("<IQ", 8, 1 << 20) + bytes(8 << 20)
DOUBLES = struct.pack("<IQ", 12, 1 << 20) + bytes(8 << 20)


def gguf_both(folder: Path) -> Path:
    extra = {"model.norm.weight": small_tensors()["model.norm.weight"]}
    write_gguf(folder / "x.gguf", SMALL, small_tensors(), extra=extra)
    return folder / "x.gguf"


def gguf_twice(folder: Path) -> Path:
    path = gguf_with(yy__last=8)(folder)
    path.write_bytes(path.read_bytes().replace(b"yy.last", b"zz.last"))
    return path


GGUF: Cases = {
    "empty": (gguf_patched(lambda c: c.clear()), "is empty"),
    "no magic": (gguf_patched(rename(b"GGUF", b"GGJT")), "begins with b'GGJT'"),
    "version 1": (put("I", 1, skip=4), "version 1,"),
    "version 4": (put("I", 4, skip=4), "version 4,"),
    "big-endian": (put("I", 3 << 24, skip=4), "little-endian"),
    "2**60 tensors": (put("Q", 1 << 60, skip=8), "the tensor count claims 1,152,921,504,606,846,976"),
    "a tensor fewer": (put("Q", 19, skip=8), "tensor|bytes follow"),
    "a tensor more": (put("Q", 21, skip=8), "tensor 20"),
    "2**60 keys": (put("Q", 1 << 60, skip=16), "the metadata count claims 1,152,921,504,606,846,976"),
    "a key more": (put("Q", 19, skip=16), "metadata|tensor"),
    "a key's name of 2**60 bytes": (put("Q", 1 << 60, skip=24), "metadata key 0 claims"),
    "a key's name of 300 bytes": (put("Q", 300, skip=24), "metadata key 0 claims 300 bytes, at most 256"),
    "metadata of 40 MiB": (gguf_arrays(*[DOUBLES] * 5), "metadata d lies beyond the first 33,554,432 bytes"),
    "two million strings": (
        gguf_arrays(*[EMPTY_STRINGS] * 2),
        "metadata b makes 2,097,152 strings in all, at most 1,048,576",
    ),
    "a string of 2**60 bytes": (put("Q", 1 << 60, "tokenizer.ggml.pre", 4), r"tokenizer\.ggml\.pre claims"),
    "a string longer than the file": (put("Q", 1 << 24, "tokenizer.ggml.pre", 4), r"tokenizer\.ggml\.pre claims"),
    "an array of 2**60 strings": (put("Q", 1 << 60, TOKENS, 8), r"tokenizer\.ggml\.tokens claims"),
    "an array of 2**60 bytes": (
        # gguf's own reader never comes back from this one.
        gguf_patched(
            lambda c: bytearray(c[:16] + struct.pack("<QQ", 1, 1) + b"a" + struct.pack("<IIQ", 9, 0, 1 << 60))
        ),
        "metadata a claims 1,152,921,504,606,846,976",
    ),
    "an array longer than the file": (put("Q", 1 << 20, "tokenizer.ggml.token_type", 8), "token_type claims"),
    "an array of arrays": (put("I", 9, TOKENS, 4), "tokens is an array of arrays"),
    "an array of an unknown type": (put("I", 77, TOKENS, 4), "tokens is an array of the unknown type 77"),
    "an unknown type": (put("I", 77, TOKENS), "tokens has the unknown type 77"),
    "a token that is not UTF-8": (gguf_patched(rename("Ġthe".encode(), b"\xff\xffthe")), "tokens is not UTF-8"),
    "a key that is not UTF-8": (gguf_patched(rename(b"zz.last", b"zz.\xffast")), "metadata key 17 is not UTF-8"),
    "a key with a line break": (gguf_patched(rename(b"zz.last", b"zz\nlast")), r"metadata key 17 is 'zz\\nlast'"),
    "a key twice": (gguf_twice, "metadata key zz.last occurs twice"),
    "a tensor twice": (gguf_patched(rename(b"blk.1.attn_q", b"blk.0.attn_q")), r"blk\.0\.attn_q\.weight occurs twice"),
    "a tensor by another name": (gguf_patched(rename(b"blk.1.attn_q", b"blk.9.attn_q")), "layers.9.self_attn.q_proj"),
    "a tensor by both its names": (
        gguf_both,
        "tensor model.norm.weight: there is already a tensor for model.norm.weight",
    ),
    "an offset beyond the end": (put("Q", 1 << 40, LAST_TENSOR, 16), "output_norm.weight begins at byte"),
    "an offset of another tensor": (put("Q", 0, LAST_TENSOR, 16), "output_norm.weight begins at byte 0"),
    "no dimension": (put("I", 0, LAST_TENSOR), "output_norm.weight has 0 dimensions"),
    "2**31 dimensions": (put("I", 1 << 31, LAST_TENSOR), "output_norm.weight has 2,147,483,648 dimensions"),
    "a size of 0": (put("Q", 0, EMBEDDING, 4), r"token_embd.weight has shape \[300, 0\]"),
    "a size of 2**62": (put("Q", 1 << 62, EMBEDDING, 12), "token_embd.weight ends at byte"),
    "sizes that overflow": (
        gguf_patched(
            lambda c: [struct.pack_into("<Q", c, c.index(b"token_embd.weight") + 21 + i, 1 << 33) for i in (0, 8)][:0]
        ),
        "token_embd.weight ends at byte",
    ),
    "an unknown quantisation": (put("I", 999, EMBEDDING, 20), "token_embd.weight has the unknown quantisation 999"),
    "a quantisation of whole numbers": (put("I", 26, EMBEDDING, 20), "token_embd.weight cannot be dequantised"),
    "a quantisation of other blocks": (
        put("I", 3, EMBEDDING, 20),
        r"shape \[300, 8\], but its rows are stored in blocks of 32",
    ),
    "truncated in the counts": (gguf_patched(lambda c: c[:20]), "the metadata count claims 8 bytes, but only 4 follow"),
    "truncated in the metadata": (gguf_patched(lambda c: c[:1000]), "metadata tokenizer.ggml"),
    "truncated in a tensor's entry": (gguf_patched(lambda c: c[: c.index(b"blk.1.attn_q")]), "the name of tensor"),
    "truncated in the data": (gguf_patched(lambda c: c[:-200]), "ends at byte"),
    "appended": (gguf_patched(lambda c: c + bytes(100)), "bytes follow the last tensor"),
    "an alignment of 3": (gguf_with(general__alignment=3), "general.alignment must be a power of two, got 3"),
    "an alignment in words": (gguf_with(general__name="x", general__alignment="x"), "general.alignment"),
    "another architecture": (gguf_with(general__architecture="mistral"), "architecture is 'mistral'"),
    "a key missing": (
        gguf_with(without="llama.attention.layer_norm_rms_epsilon"),
        "is missing llama.attention.layer_norm",
    ),
    "no length of contexts": (gguf_with(without="llama.context_length"), "is missing llama.context_length"),
    "heads in words": (
        gguf_with(llama__attention__head_count="two"),
        "head_count must be a positive integer, got 'two'",
    ),
    "heads a fraction": (gguf_with(llama__attention__head_count=2.0), "head_count must be a positive integer, got 2.0"),
    "heads true": (gguf_with(llama__attention__head_count=True), "head_count must be a positive integer, got True"),
    "other heads in each layer": (gguf_with(llama__attention__head_count=[2, 1]), r"integer, got \[2, 1\]"),
    "heads for more layers": (gguf_with(llama__attention__head_count=[2, 2, 2]), r"integer, got \[2, 2, 2\]"),
    "heads in fractions": (gguf_with(llama__attention__head_count=[2.0, 2.0]), "integer, got 2.0"),
    "no head": (gguf_with(llama__attention__head_count=0), "head_count must be a positive integer, got 0"),
    "more heads than rows": (gguf_with(llama__attention__head_count=7), "q_proj.weight has shape"),
    "a billion layers": (gguf_with(llama__block_count=10**9), "num_hidden_layers must be an integer from 1 to 1024"),
    "theta NaN": (gguf_with(llama__rope__freq_base=float("nan")), "freq_base must be a positive number, got nan"),
    "theta infinite": (gguf_with(llama__rope__freq_base=float("inf")), "rope_theta must be a number from 1"),
    "scaled rotary": (gguf_with(llama__rope__scaling__type="yarn"), "llama.rope.scaling.type='yarn'"),
    "scaled linearly": (
        gguf_with(llama__rope__scaling__type="linear", llama__rope__scaling__factor=4.0),
        r"llama.rope.scaling.factor=4.0 is not supported, only 1.0 or 0.0 is",
    ),
    "scaled by the old key": (gguf_with(llama__rope__scale_linear=2.0), "llama.rope.scale_linear=2.0"),
    "not causal": (gguf_with(llama__attention__causal=False), "llama.attention.causal=False"),
    "a sliding window": (gguf_with(llama__attention__sliding_window=64), "llama.attention.sliding_window=64"),
    "experts": (gguf_with(llama__expert_count=8), "llama.expert_count=8"),
    "an unknown key of Llama": (gguf_with(llama__swin_norm=True), "does not support: 'llama.swin_norm'"),
    "keys of another length": (gguf_with(llama__attention__key_length=8), "key_length=8"),
    "no tokens": (gguf_with(without=TOKENS), "tokenizer.ggml.tokens must be an array of str"),
    "tokens of numbers": (gguf_with(tokenizer__ggml__tokens=[1, 2]), "tokenizer.ggml.tokens must be an array of str"),
    "a token twice": (gguf_with(tokenizer__ggml__tokens=["a"] * 260), "260 tokens, 1 of them distinct"),
    "types too few": (gguf_with(tokenizer__ggml__token_type=[1, 1]), "2 types"),
    "more tokens than the vocabulary": (
        gguf_with(llama__vocab_size=259),
        "has 260 tokens, the embedding only 259 rows",
    ),
    "a merge of nothing": (gguf_with(tokenizer__ggml__merges=["no where"]), "tokenizer.ggml.merges"),
    "a merge of one": (gguf_with(tokenizer__ggml__merges=["a"]), "tokenizer.ggml.merges"),
    "eos beyond the tokens": (gguf_with(tokenizer__ggml__eos_token_id=299), "eos_token_id is 299"),
    "unknown token negative": (gguf_with(tokenizer__ggml__unknown_token_id=-1), "unknown_token_id is -1"),
    "a template that is a number": (gguf_with(tokenizer__chat_template=3), "tokenizer.chat_template must be a string"),
    "bos asked for and not named": (gguf_with(tokenizer__ggml__add_bos_token=True), "names no bos"),
    "bos asked for by a number": (gguf_with(tokenizer__ggml__add_bos_token=1), "add_bos_token must be a bool"),
    "a generation config with a fault": (
        gguf_with(smollm_jax__generation_config="{"),
        "not readable as JSON",
    ),
    "a name that is a number": (gguf_with(general__name=3), "general.name must be a string"),
}
