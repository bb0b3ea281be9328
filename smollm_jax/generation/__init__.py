"""Text generation: prompts in, tokens and text out."""
