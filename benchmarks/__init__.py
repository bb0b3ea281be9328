"""Ours against other implementations, measured; and what XLA makes of our programs."""
