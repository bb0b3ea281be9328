"""SmolLM2 in JAX/Flax NNX. Importing the package imports no framework; import the module you need.

Imports point down: errors <- runtime, parallel <- config, tokenizer <- runs, model, data <- weights <- generation <-
training, evaluation, web <- commands.
"""

__version__ = "0.1.0"
