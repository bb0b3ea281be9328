"""A LoRA adapter as a GGUF, for llama.cpp's --lora.

Source of keys and layout: llama.cpp, convert_lora_to_gguf.py. llama.cpp multiplies by alpha / rank.
"""

import contextlib
from pathlib import Path

import einops
import numpy as np

from smollm_jax.config import Config
from smollm_jax.runtime.atomic import replacing
from smollm_jax.runtime.files import import_optional
from smollm_jax.weights.adapter import Adapter, tensor_name
from smollm_jax.weights.gguf_writer import gguf_name, rotary_heads


def write_gguf_adapter(path: Path, adapter: Adapter, config: Config) -> None:
    """Writes an adapter, float32, atomically; the target must not exist.

    Raises `UsageError` if it does or if the `gguf` package is missing.
    """
    gguf = import_optional("gguf", path)
    with replacing(path) as temporary, contextlib.closing(gguf.GGUFWriter(temporary, "llama")) as writer:
        writer.add_type("adapter")
        writer.add_string("adapter.type", "lora")
        writer.add_float32("adapter.lora.alpha", adapter.scale * adapter.rank)  # of rslora too
        for target, (a, b) in adapter.tensors.items():
            for layer in range(len(a)):
                name = tensor_name(layer, target)
                out = b[layer]
                if (count := rotary_heads(name, config)) is not None:  # B's rows are the weight's rows
                    out = einops.rearrange(out, "(heads two h) r -> (heads h two) r", heads=count, two=2)
                for suffix, tensor in (("lora_a", a[layer]), ("lora_b", out)):
                    writer.add_tensor(f"{gguf_name(name)}.{suffix}", np.ascontiguousarray(tensor, np.float32))
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
