"""What the published OpenAPI document allows and forbids, and bodies of any bytes: no error of the server, no hang."""

import json
import os

import httpx
import hypothesis
import pytest
from hypothesis import strategies as st

from smollm_jax.commands import serve
from tests.api_server import serving
from tests.serving import tiny_weights

SOAK = bool(os.environ.get("SMOLLM_SOAK"))
SECONDS = 60  # after which a request hangs
EXAMPLES, CHECKS = 2000 if SOAK else 50, list(hypothesis.HealthCheck)
GETS = ("/v1/models", "/v1/models/{name}", "/health", "/metrics")
POSTS = ("/v1/chat/completions", "/v1/completions", "/tokenize")
CHAT = {"messages": [{"role": "user", "content": "Hi"}], "max_tokens": 2, "stop": ["x"], "seed": 1, "logprobs": True}
COMPLETION = {"prompt": ["a", "b"], "max_tokens": 2, "logit_bias": {"5": -1.5}, "stream": True, "echo": True}


@pytest.fixture(scope="module")
def url(tmp_path_factory, weights_path):
    weights = tiny_weights(tmp_path_factory.mktemp("published"), weights_path)
    with serving(serve.Flags(weights=weights, slots=4, context=64, queue_size=16)) as url:
        yield url


@pytest.fixture(scope="module")
def http(url):
    with httpx.Client(base_url=url, timeout=SECONDS) as http:
        yield http


@pytest.mark.slow
@pytest.mark.parametrize("route", [*(f"GET {path}" for path in GETS), *(f"POST {path}" for path in POSTS)])
def test_every_request_is_answered_as_the_published_document_says(url, route):
    """Those that it allows, and those that it forbids."""
    import schemathesis

    method, path = route.split()
    operation = schemathesis.openapi.from_url(f"{url}/openapi.json")[path][method]
    # Of what a schema allows, a text may be too long for the context, and a grammar not be one.
    excluded = [schemathesis.checks.CHECKS.get_one("positive_data_acceptance")]

    modes = schemathesis.GenerationMode
    for mode in (modes.POSITIVE, modes.NEGATIVE) if method == "POST" else (modes.POSITIVE,):

        @hypothesis.settings(max_examples=EXAMPLES, deadline=None, derandomize=not SOAK, suppress_health_check=CHECKS)
        @hypothesis.given(operation.as_strategy(generation_mode=mode))
        def check(case):
            response = case.call(timeout=SECONDS)
            assert response.status_code < 500, case.as_curl_command()
            case.validate_response(response, excluded_checks=excluded)

        check()


def mutated(text: bytes, edits: list[tuple[int, int, bytes]]) -> bytes:
    """A body in which some places have other bytes."""
    for start, length, new in edits:
        start %= len(text) + 1
        text = text[:start] + new + text[start + length :]
    return text


PIECES = st.binary(max_size=8) | st.sampled_from(
    [b"null", b"-1", b"1e999", b"[[", b"{}", b'"', b"\\ud800", b"\xff", b"NaN", b"true", b"0" * 400, b"[" * 200, b","]
)


@hypothesis.settings(max_examples=20_000 if SOAK else 100, deadline=None, derandomize=not SOAK)
@hypothesis.given(
    st.sampled_from(POSTS),
    st.sampled_from([CHAT, COMPLETION]),
    st.lists(st.tuples(st.integers(0, 300), st.integers(0, 12), PIECES), max_size=4),
    st.sampled_from(["application/json", "application/json", "text/plain", "", "multipart/form-data; boundary=x"]),
)
def test_no_bytes_are_an_error_of_the_server(http, path, body, edits, kind):
    content = mutated(json.dumps(body).encode(), edits)
    response = http.post(path, content=content, headers={"content-type": kind})
    assert response.status_code in (200, 400, 404, 429), response.text
    if response.status_code != 200:
        assert response.json()["error"]["message"]
