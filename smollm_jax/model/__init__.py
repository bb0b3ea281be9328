"""SmolLM2 in Flax NNX: the model top to bottom, its operations, attention and loss."""
