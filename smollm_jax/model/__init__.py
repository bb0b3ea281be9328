"""SmolLM2 in Flax NNX: the model top to bottom (`smollm`), its operations (`ops`), attention and loss."""
