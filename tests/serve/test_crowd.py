"""Fifty clients at once, who join and leave at random: each gets what the engine gives it alone, to the last token.

SMOLLM_SOAK=1 asks 10,000 times, and more examples of each property; `make soak`.
"""

import asyncio
import itertools
import json
import os
import random
from collections.abc import Callable
from typing import Any

import httpx
import hypothesis
import pytest
from hypothesis import strategies as st

from smollm_jax.commands import serve
from smollm_jax.generation.engine import Engine
from smollm_jax.generation.sampling import Sampling
from tests.api_server import serving
from tests.serving import tiny_weights

SOAK = bool(os.environ.get("SMOLLM_SOAK"))
CLIENTS, REQUESTS = 50, 10_000 if SOAK else 300
CONTEXT, SLOTS = 256, 8
DIFFERENT = 64  # jobs; many begin with the same tokens, as the turns of a chat do


@pytest.fixture(scope="module")
def weights(tmp_path_factory, weights_path):
    return tiny_weights(tmp_path_factory.mktemp("crowd"), weights_path)


@pytest.fixture(scope="module")
def url(weights):
    with serving(serve.Flags(weights=weights, slots=SLOTS, context=CONTEXT, queue_size=4 * CLIENTS)) as url:
        yield url


def jobs() -> list[dict[str, Any]]:
    """The bodies of different requests: short and long prompts, greedy and sampled."""
    rng, made = random.Random(0), []
    beginnings = [[rng.randrange(1, 40_000) for _ in range(100)] for _ in range(4)]
    for i in range(DIFFERENT):
        prompt = rng.choice(beginnings)[: rng.choice([0, 1, 40, 70, 100])]
        prompt = [*prompt, *(rng.randrange(1, 40_000) for _ in range(rng.choice([1, 2, 7, 30, 100])))]
        made.append({"prompt": prompt, "max_tokens": rng.randrange(1, 24), "logprobs": 1, "seed": i})
        made[-1]["temperature"] = rng.choice([0.0, 0.0, 1.0])
    return made


JOBS = jobs()


@pytest.fixture(scope="module")
def alone(weights):
    """What each job gives alone, before any client asks: the text and the log-probability of each token."""
    engine, answers = Engine.load(weights), []
    for job in JOBS:
        (completion,) = engine.complete(
            [job["prompt"]],
            max_new_tokens=job["max_tokens"],
            sampling=Sampling(temperature=job["temperature"], seed=job["seed"]),
            alternatives=1,
        )
        answers.append((completion.text, [token.logprob for token in completion.tokens]))
    return answers


async def ask(http: httpx.AsyncClient, number: int, *, stream: bool, leave_after: int | None = None):
    """The text and the log-probabilities of a job, None for a client that left after so many events."""
    if not stream:
        (choice,) = (await http.post("/v1/completions", json=JOBS[number])).json()["choices"]
        return choice["text"], choice["logprobs"]["token_logprobs"]
    text, logprobs, events = "", [], 0
    async with http.stream("POST", "/v1/completions", json=JOBS[number] | {"stream": True}) as response:
        assert response.status_code == 200
        async for line in response.aiter_lines():
            if events == leave_after:
                return None
            if line.startswith("data: {"):
                (choice,) = json.loads(line[6:])["choices"]
                text, events = text + choice["text"], events + 1
                logprobs += choice["logprobs"]["token_logprobs"]
    assert line == "" or line == "data: [DONE]"
    return text, logprobs


def check(answer, expected) -> None:
    text, logprobs = expected
    assert answer[0] == text
    assert answer[1] == pytest.approx(logprobs, abs=1e-5)


def crowd(url: str, clients: Callable[[httpx.AsyncClient], list[Any]]) -> list[Any]:
    """The results of clients that run at once, each a coroutine."""

    async def run():
        # A connection for each request: one that is used again may just be closed by the server as idle.
        limits = httpx.Limits(max_connections=2 * CLIENTS, max_keepalive_connections=0)
        async with httpx.AsyncClient(base_url=url, timeout=120, limits=limits) as http:
            return await asyncio.gather(*clients(http))

    return asyncio.run(run())


CLIENT = st.tuples(
    st.integers(0, DIFFERENT - 1), st.integers(0, 200), st.none() | st.none() | st.integers(0, 12), st.booleans()
)


@pytest.mark.slow
@hypothesis.settings(max_examples=100 if SOAK else 4, deadline=None, derandomize=not SOAK)
@hypothesis.given(st.lists(CLIENT, min_size=CLIENTS, max_size=CLIENTS))
def test_fifty_clients_each_get_what_they_get_alone(url, alone, clients):
    """Each joins after some milliseconds; some leave after some events."""

    async def client(http, number, milliseconds, leave_after, stream):
        await asyncio.sleep(milliseconds / 1000)
        return await ask(http, number, stream=stream or leave_after is not None, leave_after=leave_after)

    answers = crowd(url, lambda http: [client(http, *values) for values in clients])
    for (number, *_), answer in zip(clients, answers, strict=True):
        if answer is not None:
            check(answer, alone[number])


@pytest.mark.slow
def test_no_answer_is_mixed_with_another(url, alone):
    rng = random.Random(1)
    numbers = itertools.count()

    async def client(http):
        for _ in iter(lambda: next(numbers) < REQUESTS, False):
            number, leaves = rng.randrange(DIFFERENT), rng.random() < 0.1
            answer = await ask(
                http, number, stream=leaves or rng.random() < 0.5, leave_after=rng.randrange(10) if leaves else None
            )
            if answer is not None:
                check(answer, alone[number])

    crowd(url, lambda http: [client(http) for _ in range(CLIENTS)])
