"""Rung 3: in bfloat16 JAX's distributions are no further from the truth than transformers'."""

import torch

from parity_tests import compare, ladder
from parity_tests.conftest import load_hf
from parity_tests.tolerances import BFLOAT16_ARGMAX_LOSS, BFLOAT16_KL_RATIO, BFLOAT16_PERPLEXITY, within


def test_distributions_are_no_further_from_the_truth(bundle, weights_path, texts, texts_truth):
    theirs = ladder.torch_stream(load_hf(weights_path, dtype=torch.bfloat16), texts)
    ours = ladder.jax_stream(bundle, texts, "bfloat16")
    found, wanted = (compare.distribution(side[1], texts_truth[1], texts) for side in (ours, theirs))
    exact = compare.distribution(texts_truth[1], texts_truth[1], texts)
    print("truth", exact, "JAX", found, "transformers", wanted)
    assert found["kl"] > 1e-5, "the bfloat16 model was computed in float32"
    within(found["kl"] / wanted["kl"], BFLOAT16_KL_RATIO, "bfloat16 KL over transformers'")
    within(wanted["argmax"] - found["argmax"], BFLOAT16_ARGMAX_LOSS, "bfloat16 argmaxes lost against transformers")
    within(
        abs(found["perplexity"] / exact["perplexity"] - 1), BFLOAT16_PERPLEXITY, "bfloat16 perplexity against the truth"
    )
