"""Text continued by a model: prompts in, tokens and text out."""
