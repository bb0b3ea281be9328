"""The parity layer: the same computation in JAX, PyTorch and transformers, compared rung by rung."""
