"""Rung 5: float32 gradients at the full shape, per tensor, against the truth, the twin and transformers."""

import pytest

from parity_tests import compare, ladder
from parity_tests.tolerances import (
    FLOAT32_GRADIENTS,
    FLOAT32_GRADIENTS_BETWEEN,
    FLOAT32_LOSS,
    FLOAT32_LOSS_BETWEEN,
    within,
)


@pytest.fixture(scope="module")
def ours(bundle, window):
    return ladder.jax_gradients(bundle, window, "float32")


def test_gradients_are_close_to_the_truth(ours, true_gradient):
    errors = compare.gradient_errors(ours[1], true_gradient[1])
    assert len(errors) == 272
    assert min(errors.values()) > 0, "computed in float64"
    within(max(errors.values()), FLOAT32_GRADIENTS, "float32 gradients against the truth, worst tensor")
    within(abs(ours[0] / true_gradient[0] - 1), FLOAT32_LOSS, "float32 loss against the truth")


@pytest.mark.parametrize("side", ["twin", "hf"])
def test_gradients_equal_pytorchs(side, ours, window, request):
    loss, theirs = ladder.torch_gradients(request.getfixturevalue(side), window)
    errors = compare.gradient_errors(ours[1], theirs)
    within(max(errors.values()), FLOAT32_GRADIENTS_BETWEEN, f"float32 gradients against {side}, worst tensor")
    within(abs(ours[0] / loss - 1), FLOAT32_LOSS_BETWEEN, f"float32 loss against {side}")


def test_jax_is_no_further_from_the_truth_than_transformers(ours, hf, window, true_gradient):
    theirs = compare.gradient_errors(ladder.torch_gradients(hf, window)[1], true_gradient[1])
    errors = compare.gradient_errors(ours[1], true_gradient[1])
    within(max(errors.values()) / max(theirs.values()), 1.5, "float32 gradient error over transformers', worst tensor")
