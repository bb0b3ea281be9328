"""What lies in a run folder: checkpoints with their manifest, provenance, metrics."""
