"""How well a model predicts text: log-likelihoods, perplexity, and lm-evaluation-harness."""
