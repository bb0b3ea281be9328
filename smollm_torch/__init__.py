"""The PyTorch twin of `smollm_jax.model`: the same names in the same order, so that the two can be read side by side."""
