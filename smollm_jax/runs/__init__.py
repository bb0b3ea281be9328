"""The contents of a run folder: checkpoints with their manifests, provenance, metrics."""
