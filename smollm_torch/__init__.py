"""The PyTorch twin of `smollm_jax.model.smollm`: same names, same order, so that the two can be read side by side."""
