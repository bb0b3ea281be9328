"""A model's parameters, FLOPs and cache bytes, computed from its config, and the peak speeds of GPUs.

`python -m smollm_jax.model.cost` prints the parameter table of docs/quickstart.md.
"""

from smollm_jax.config import Config, preset

# (TFLOP/s of dense bfloat16 matmuls with float32 accumulation, memory bandwidth in GB/s) by the full name the driver
# reports (JAX's `device_kind` without "NVIDIA "). Where NVIDIA publishes only the figure with sparsity, half of it.
# Names must match in full: "H100" is part of the names of cards of three speeds and of MIG slices, "H200" of a GH200's,
# "RTX 4090" of a laptop's. GeForce cards accumulate in float32 at half the speed of float16.
# Source: NVIDIA's data sheets, and for RTX cards the appendices of its architecture whitepapers (GA102, Ada, RTX
# Blackwell).
GPU_PEAKS = {
    "GeForce RTX 3090": (71, 936),
    "GeForce RTX 3090 Ti": (80, 1008),
    "GeForce RTX 4090": (165.2, 1008),
    "GeForce RTX 5090": (209.5, 1792),
    "RTX A6000": (154.8, 768),
    "RTX 6000 Ada Generation": (364.2, 960),
    "A10": (125, 600),
    "A10G": (70, 600),
    "A100-SXM4-40GB": (312, 1555),
    "A100-SXM4-80GB": (312, 2039),
    "A100-PCIE-40GB": (312, 1555),
    "A100 80GB PCIe": (312, 1935),
    "L4": (121, 300),
    "L40": (181, 864),
    "L40S": (362, 864),
    "H100 80GB HBM3": (989, 3350),  # SXM
    "H100 PCIe": (756, 2000),
    "H100 NVL": (835, 3900),
    "H200": (989, 4800),  # SXM
    "H200 NVL": (835, 4800),
    "B200": (2250, 8000),
}


def parameter_table(config: Config) -> list[tuple[str, str, int]]:
    """Rows (part, arithmetic, parameters) that sum to the whole model, a tied head counted once."""
    D, F, L, V = config.hidden_size, config.intermediate_size, config.num_hidden_layers, config.vocab_size
    query, key_value = config.num_attention_heads * config.head_dim, config.num_key_value_heads * config.head_dim
    rows = [
        ("embedding", f"{V:,} x {D}", V * D),
        ("attention, all blocks", f"{L} x {D} x (2 x {query} + 2 x {key_value})", L * D * (2 * query + 2 * key_value)),
        ("MLP, all blocks", f"{L} x 3 x {D} x {F}", L * 3 * D * F),
        ("norms, all blocks", f"{L} x 2 x {D}", L * 2 * D),
        ("last norm", f"{D}", D),
    ]
    return rows if config.tie_word_embeddings else [*rows, ("head", f"{V:,} x {D}", V * D)]


def count_parameters(config: Config) -> int:
    """Parameters in the whole model: 134,515,008 for SmolLM2-135M."""
    return sum(count for _, _, count in parameter_table(config))


def flops_per_token(config: Config, sequence_length: int) -> float:
    """FLOPs to train on one token: forward x 3, counting every matmul and the causal half of attention.

    2 FLOPs per multiply-add. A token attends to (T + 1) / 2 keys on average, so the two attention matmuls cost
    2 x 2 x N x H x (T + 1) / 2 per layer. Elementwise operations and the optimizer are not counted.
    """
    D, F, L, V = config.hidden_size, config.intermediate_size, config.num_hidden_layers, config.vocab_size
    query, key_value = config.num_attention_heads * config.head_dim, config.num_key_value_heads * config.head_dim
    matmuls = L * (D * (2 * query + 2 * key_value) + 3 * D * F) + V * D
    attention = L * query * (sequence_length + 1)
    return 3.0 * 2.0 * (matmuls + attention)


def cache_bytes_per_token(config: Config, bytes_per_number: int) -> int:
    """Bytes of keys and values that the cache stores per token: 23,040 for SmolLM2-135M in bfloat16."""
    return 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim * bytes_per_number


def peak_flops(device_kind: str, dtype: str = "bfloat16") -> float | None:
    """The peak FLOP/s of dense matmuls on a device, or None if unknown; only known for bfloat16."""
    peaks = GPU_PEAKS.get(device_kind.removeprefix("NVIDIA "))
    return 1e12 * peaks[0] if peaks and dtype == "bfloat16" else None


def bandwidth(device_kind: str) -> float | None:
    """A device's memory bandwidth in bytes/s by its data sheet, or None if unknown."""
    peaks = GPU_PEAKS.get(device_kind.removeprefix("NVIDIA "))
    return 1e9 * peaks[1] if peaks else None


def no_mfu_note(device_kind: str, dtype: str) -> str:
    """The note that explains why a run reports no MFU."""
    return f"note: MFU is not reported: smollm_jax/model/cost.py has no peak for {device_kind} in {dtype}"


if __name__ == "__main__":
    smollm = preset("smollm2-135m")
    print("| part | arithmetic | parameters |\n|---|---|---:|")
    for part, arithmetic, count in parameter_table(smollm):
        print(f"| {part} | {arithmetic} | {count:,} |")
    print(f"| **all** | | **{count_parameters(smollm):,}** |")
