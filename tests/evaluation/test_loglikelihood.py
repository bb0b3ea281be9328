"""Log-likelihoods of continuations and texts: requests that share a forward pass score as if each were alone."""

import math

import jax
import numpy as np
import pytest
import scipy.special

from smollm_jax.errors import UsageError
from smollm_jax.evaluation import loglikelihood
from smollm_jax.evaluation.loglikelihood import Request
from smollm_jax.evaluation.quality import quality, windows

forward = jax.jit(lambda model, row: model(row))


def logits_of(model, tokens):
    """Logits `[T, V]` of one text. Tokens that no earlier one attends fill the row, so that one program serves all."""
    row = np.zeros((1, 96), np.int32)
    row[0, : len(tokens)] = tokens
    return np.asarray(forward(model, row))[0, : len(tokens)]


def alone(model, request):
    """The same score from all logits of one row, summed in float64."""
    logits = logits_of(model, [*request.context, *request.continuation])
    logits = logits.astype(np.float64)[len(request.context) - 1 : -1]
    logprobs = scipy.special.log_softmax(logits, axis=-1)
    expected = sum(row[token] for row, token in zip(logprobs, request.continuation, strict=True))
    return expected, bool((logits.argmax(-1) == request.continuation).all())


def requests(model, seed=0):
    """Contexts of several lengths with one or more continuations each, one of them the greedy one."""
    draw = np.random.default_rng(seed)

    def tokens(count):
        return tuple(int(token) for token in draw.integers(model.config.vocab_size, size=count))

    result = []
    for length in (1, 5, 63, 70):
        context = tokens(length)
        likeliest, after = (int(logits_of(model, ids)[-1].argmax()) for ids in (context, (*context, 7)))
        result += [Request(context, (likeliest,)), Request(context, (likeliest, 7)), Request(context, (7, after))]
        result += [Request(context, tokens(9))]
    result += [Request(tokens(40), tokens(20)), Request(tokens(3), tokens(1))]
    return [result[i] for i in draw.permutation(len(result))]


def test_scores_are_those_of_each_request_alone(tiny_model):
    batch = requests(tiny_model)
    reported = []
    scores = loglikelihood.score(tiny_model, batch, progress=reported.append)
    for got, request in zip(scores, batch, strict=True):
        expected, greedy = alone(tiny_model, request)
        assert got.logprob == pytest.approx(expected, rel=1e-5)
        assert got.is_greedy == greedy
    assert sum(reported) == sum(len(request.continuation) for request in batch)
    assert {score.is_greedy for score in scores} == {True, False}


def test_continuations_of_one_context_share_its_forward_pass(tiny_model, monkeypatch):
    """The last token of a continuation is not an input; every other token of the requests is an input once."""
    batch, rows, original = requests(tiny_model), [], loglikelihood._score

    def counted(model, tokens, positions, segments, *rest, **options):
        rows.append(int((segments >= loglikelihood.CONTEXT).sum()))
        # TF32, which a GPU would take for float32, makes other log-probabilities.
        assert jax.config.jax_default_matmul_precision == "float32"
        return original(model, tokens, positions, segments, *rest, **options)

    monkeypatch.setattr(loglikelihood, "_score", counted)
    loglikelihood.score(tiny_model, batch)
    contexts = {request.context for request in batch}
    assert len(contexts) == 6 < len(batch) == 18
    assert sum(rows) == sum(map(len, contexts)) + sum(len(request.continuation) - 1 for request in batch)


def test_the_log_probabilities_of_a_long_text_are_summed_in_float64(tiny_model, monkeypatch):
    def constant(model, tokens, positions, segments, indices, targets, **_):
        return np.full(indices.shape, -0.1, np.float32), np.ones(indices.shape, bool)

    monkeypatch.setattr(loglikelihood, "_score", constant)
    (score,) = loglikelihood.score(tiny_model, [Request((1,), (2,) * 500)])
    assert score.logprob == pytest.approx(-500 * float(np.float32(0.1)), rel=1e-12)


def test_more_continuations_than_a_row_holds_are_laid_in_several(tiny_model, monkeypatch):
    monkeypatch.setattr(loglikelihood, "LONGEST_SHARED_ROW", 80)
    context = tuple(range(60))
    batch = [Request(context, tuple(range(i, i + 12))) for i in range(8)]
    for got, request in zip(loglikelihood.score(tiny_model, batch), batch, strict=True):
        assert got.logprob == pytest.approx(alone(tiny_model, request)[0], rel=1e-5)


@pytest.mark.parametrize(
    ("request_", "named"),
    [
        (Request((), (1,)), "at least one token"),
        (Request((1,), ()), "at least one token"),
        (Request((1,), (49152,)), "vocabulary"),
        (Request((1,) * 8000, (1,) * 8000), "exceeds the context"),
    ],
)
def test_what_cannot_be_scored_is_refused(tiny_model, request_, named):
    with pytest.raises(UsageError, match=named):
        loglikelihood.score(tiny_model, [request_])


@pytest.mark.parametrize(
    ("count", "length", "stride"), [(1, 8, 4), (8, 8, 8), (9, 8, 8), (50, 8, 3), (50, 8, 8), (50, 64, 1)]
)
def test_windows_score_every_token_but_the_first_once(count, length, stride):
    tokens = list(range(count))
    result = list(windows(tokens, length, stride))
    assert [token for window in result for token in window.continuation] == tokens[1:]
    for window in result:
        window_tokens = [*window.context, *window.continuation]
        assert window_tokens == tokens[window_tokens[0] : window_tokens[-1] + 1]
        assert len(window_tokens) <= length + 1
    for window in result[1:]:
        assert len(window.context) == length - stride + 1


def test_quality_counts_nats_over_tokens_and_bytes(tiny_model):
    documents = [(list(range(100, 150)), 200), ([3, 4, 5], 7)]
    result = quality(tiny_model, documents, length=32, stride=16)
    batch = [window for ids, _ in documents for window in windows(ids, 32, 16)]
    nats = -sum(alone(tiny_model, request)[0] for request in batch)
    assert (result.tokens, result.bytes, result.documents) == (51, 207, 2)
    assert result.nats == pytest.approx(nats, rel=1e-6)
    assert result.loss == pytest.approx(nats / 51, rel=1e-6)
    assert result.perplexity == pytest.approx(math.exp(nats / 51), rel=1e-5)
    assert result.bits_per_byte == pytest.approx(nats / math.log(2) / 207, rel=1e-6)


@pytest.mark.parametrize(
    ("documents", "length", "stride", "named"),
    [
        ([([1, 2], 2)], 8, 9, "stride must be from 1"),
        ([([1, 2], 2)], 8, 0, "stride must be from 1"),
        ([([1, 2], 2)], 10**6, 1, "length must be from 1"),
        ([([1], 0)], 8, 4, "no token to score"),
        ([], 8, 4, "no token to score"),
    ],
)
def test_a_quality_that_cannot_be_measured_is_refused(tiny_model, documents, length, stride, named):
    with pytest.raises(UsageError, match=named):
        quality(tiny_model, documents, length=length, stride=stride)
