"""Benchmarks of this package against other implementations, and readers of compiled XLA programs (`xla/`)."""
