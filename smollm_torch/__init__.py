"""The PyTorch twin of `smollm_jax.model`: same names, same order, so that the two can be read side by side."""
