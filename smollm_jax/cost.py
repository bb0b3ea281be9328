"""What a model costs, by arithmetic from its config alone: parameters, FLOPs and cache bytes.

`python -m smollm_jax.cost` prints the README's parameter table.
"""

from smollm_jax.config import Config, preset

# Dense bf16 tensor-core peak, FLOP/s, from the vendor's datasheets; keys are substrings of jax's `device_kind`.
PEAK_FLOPS = {"H100": 989e12, "H200": 989e12, "A100": 312e12, "L40S": 362e12, "RTX 4090": 165e12, "B200": 2250e12}


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
    """FLOPs to train on one token: forward x 3, counting every matrix product and the causal half of attention.

    2 FLOPs a multiply-add. A token attends to (T + 1) / 2 keys on average, so the two attention products cost
    2 x 2 x N x H x (T + 1) / 2 a layer. Elementwise work and the optimizer are not counted.
    """
    D, F, L, V = config.hidden_size, config.intermediate_size, config.num_hidden_layers, config.vocab_size
    query, key_value = config.num_attention_heads * config.head_dim, config.num_key_value_heads * config.head_dim
    products = L * (D * (2 * query + 2 * key_value) + 3 * D * F) + V * D
    attention = L * query * (sequence_length + 1)
    return 3.0 * 2.0 * (products + attention)


def cache_bytes_per_token(config: Config, bytes_per_number: int) -> int:
    """Bytes of keys and values one token leaves in the cache: 23,040 for SmolLM2-135M in bfloat16."""
    return 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim * bytes_per_number


def peak_flops(device_kind: str) -> float | None:
    """The dense bf16 peak of a device in FLOP/s, or None when we do not know it."""
    return next((peak for name, peak in PEAK_FLOPS.items() if name in device_kind), None)


if __name__ == "__main__":
    smollm = preset("smollm2-135m")
    print("| part | arithmetic | parameters |\n|---|---|---:|")
    for part, arithmetic, count in parameter_table(smollm):
        print(f"| {part} | {arithmetic} | {count:,} |")
    print(f"| **all** | | **{count_parameters(smollm):,}** |")
