"""Model configs by name: the SmolLM2 family, and a tiny one for tests and demos."""

from smollm_jax.config.model import Config
from smollm_jax.errors import UsageError


def _preset(hidden, mlp, layers, heads, kv_heads, theta, positions, std, **overrides) -> Config:
    values = {
        "vocab_size": 49_152,
        "hidden_size": hidden,
        "intermediate_size": mlp,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "head_dim": 64,
        "max_position_embeddings": positions,
        "rope_theta": theta,
        "rms_norm_eps": 1e-5,
        "initializer_range": std,
        "tie_word_embeddings": True,
        "bos_token_id": 0,
        "eos_token_id": 0,
        "pad_token_id": None,
    }
    return Config(**(values | overrides))


# Sources: the released config.json of each model; for "-pretrain" huggingface/smollm,
# text/pretraining/smollm2/config_smollm2_135M.yaml. The two 135M configs differ in theta and length only.
PRESETS: dict[str, Config] = {
    "smollm2-135m": _preset(576, 1536, 30, 9, 3, 100_000.0, 8192, 1 / 24),
    "smollm2-135m-pretrain": _preset(576, 1536, 30, 9, 3, 10_000.0, 2048, 1 / 24),
    "smollm2-360m": _preset(960, 2560, 32, 15, 5, 100_000.0, 8192, 0.02),
    "smollm2-1.7b": _preset(2048, 8192, 24, 32, 32, 130_000.0, 8192, 0.02),
    # For tests: real vocabulary, two KV heads of three query heads each, every size distinct but D = N x H.
    "tiny": _preset(96, 256, 3, 6, 2, 100_000.0, 512, 96**-0.5, head_dim=16),
}


def preset(name: str) -> Config:
    """The config of that name; raises `UsageError` that lists the known names."""
    if name not in PRESETS:
        raise UsageError(f"unknown preset {name!r}, choose from {', '.join(PRESETS)}")
    return PRESETS[name]
