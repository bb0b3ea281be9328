"""Readers of compiled XLA programs: their kernels, communication and profiles."""
