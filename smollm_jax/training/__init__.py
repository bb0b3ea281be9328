"""Training: `run` goes from flags to the last checkpoint, `loop` runs steps, saves, validates and stops on a signal,
`train_step` and `loss` compute one update, and `optimizer` is AdamW with its schedule (change it there)."""
