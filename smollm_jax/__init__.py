"""SmolLM2 in JAX/Flax NNX. Importing the package imports no framework; import the module you need.

Reading order: config, model, attention, loss, optimizer, train, then weights, generate, checkpoint, data.
"""

__version__ = "0.1.0"
