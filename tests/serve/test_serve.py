"""The server answers OpenAI's own client as the engine does alone, and refuses in its envelope what it cannot do."""

import asyncio
import contextlib
import json
import re
import threading
import time
from pathlib import Path

import httpx
import openai
import pytest
import uvicorn

from smollm_jax.commands import serve
from smollm_jax.generation.engine import Engine
from smollm_jax.generation.sampling import Sampling
from smollm_jax.web import server
from tests import trainer
from tests.serving import tiny_weights

CONTEXT = 256
PROMPT = "The capital of France is"
MESSAGES = [{"role": "user", "content": "Say something."}]


@pytest.fixture(scope="module")
def weights(tmp_path_factory, weights_path) -> Path:
    return tiny_weights(tmp_path_factory.mktemp("serve"), weights_path)


@pytest.fixture(scope="module")
def engine(weights) -> Engine:
    return Engine.load(weights)


@pytest.fixture(scope="module")
def app(weights):
    flags = serve.Flags(weights=weights, slots=4, context=CONTEXT, queue_size=8)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("JAX_COMPILATION_CACHE_DIR", trainer.CACHE)
        patch.delenv(serve.KEY_VARIABLE, raising=False)
        return serve.build(flags)


@pytest.fixture(scope="module")
def url(app):
    listener = server.bind("127.0.0.1", 0)
    running = uvicorn.Server(uvicorn.Config(app, log_level="error", ws="none", lifespan="on", http=server.protocol()))
    thread = threading.Thread(target=running.run, kwargs={"sockets": [listener]})
    thread.start()
    try:
        while not running.started:
            time.sleep(0.01)
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"
    finally:
        running.should_exit = True
        thread.join()


@pytest.fixture(scope="module")
def client(url):
    with openai.OpenAI(base_url=f"{url}/v1", api_key="unused", max_retries=0, timeout=60) as client:
        yield client


@pytest.fixture(scope="module")
def http(url):
    with httpx.Client(base_url=url, timeout=60) as http:
        yield http


def alone(engine, prompt, **options):
    (completion,) = engine.complete([prompt], **options)
    return completion


def test_a_chat_is_answered_as_the_engine_does(client, engine):
    answer = client.chat.completions.create(model="tiny", messages=MESSAGES, max_tokens=12)
    prompt = engine.chat(MESSAGES)
    expected = alone(engine, prompt, max_new_tokens=12)
    (choice,) = answer.choices
    assert (choice.message.role, choice.message.content, choice.finish_reason) == ("assistant", expected.text, "length")
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (len(prompt), 12)
    assert answer.object == "chat.completion"
    parts = [{"role": "user", "content": [{"type": "text", "text": "Say "}, {"type": "text", "text": "something."}]}]
    again = client.chat.completions.create(model="tiny", messages=parts, max_completion_tokens=12)
    assert again.choices[0].message.content == expected.text


def test_a_stream_joins_to_the_whole_answer_and_ends_with_the_usage(client, http, engine):
    options = {"max_tokens": 12, "temperature": 1.0, "seed": 5, "n": 2, "logprobs": True, "top_logprobs": 2}
    whole = client.chat.completions.create(model="tiny", messages=MESSAGES, **options)
    stream = client.chat.completions.create(
        model="tiny", messages=MESSAGES, stream=True, stream_options={"include_usage": True}, **options
    )
    *chunks, last = list(stream)
    assert last.choices == []
    assert last.usage.completion_tokens == 24
    for choice in whole.choices:
        mine = [c for chunk in chunks for c in chunk.choices if c.index == choice.index]
        assert "".join(c.delta.content or "" for c in mine) == choice.message.content
        assert mine[0].delta.role == "assistant"
        assert [c.finish_reason for c in mine if c.finish_reason] == [choice.finish_reason]
        tokens = [token for c in mine if c.logprobs for token in c.logprobs.content]
        assert [token.token for token in tokens] == [token.token for token in choice.logprobs.content]
        seed = Sampling(temperature=1.0, seed=5 + choice.index)
        expected = alone(engine, engine.chat(MESSAGES), max_new_tokens=12, sampling=seed, alternatives=2)
        assert choice.message.content == expected.text
        for token, other in zip(choice.logprobs.content, expected.tokens, strict=True):
            assert token.logprob == pytest.approx(other.logprob, abs=1e-5)
            assert bytes(token.bytes) == engine.tokenizer.token_bytes(other.id)
            assert len(token.top_logprobs) == 2
    body = {"messages": MESSAGES, "max_tokens": 2, "stream": True}
    assert http.post("/v1/chat/completions", json=body).text.endswith("data: [DONE]\n\n")


def test_completions_of_several_prompts_with_stops(client, engine):
    texts = [PROMPT, "Once upon a time"]
    expected = [alone(engine, engine.encode(text), max_new_tokens=16) for text in texts]
    stop = expected[0].text[3:5]
    answer = client.completions.create(model="tiny", prompt=texts, n=2, stop=[stop])
    assert [choice.index for choice in answer.choices] == [0, 1, 2, 3]
    for choice, i in zip(answer.choices, (0, 0, 1, 1), strict=True):
        text = expected[i].text
        assert choice.text == text.partition(stop)[0]
        assert choice.finish_reason == ("stop" if stop in text else "length")
    assert answer.usage.prompt_tokens == sum(len(engine.encode(text)) for text in texts)


def test_echo_gives_the_log_probabilities_of_the_prompt(client, engine):
    ids = engine.encode(PROMPT)
    answer = client.completions.create(model="tiny", prompt=[ids], max_tokens=1, logprobs=1, echo=True)
    (choice,) = answer.choices
    expected = alone(engine, ids, max_new_tokens=1, alternatives=1)
    assert choice.text == PROMPT + expected.text
    assert choice.logprobs.tokens == [engine.tokenizer.decode([i]) for i in [*ids, expected.tokens[0].id]]
    assert choice.logprobs.token_logprobs[0] is None
    assert len(choice.logprobs.token_logprobs) == len(ids) + 1
    assert choice.logprobs.text_offset == [len(engine.tokenizer.decode(ids[:i])) for i in range(len(ids) + 1)]
    only = client.completions.create(model="tiny", prompt=PROMPT, max_tokens=0, logprobs=1, echo=True)
    assert only.choices[0].text == PROMPT
    assert only.choices[0].logprobs.token_logprobs == choice.logprobs.token_logprobs[:-1]
    streamed = client.completions.create(model="tiny", prompt=PROMPT, max_tokens=3, echo=True, stream=True)
    assert "".join(chunk.choices[0].text for chunk in streamed).startswith(PROMPT)


@pytest.mark.parametrize(
    ("path", "changed", "status", "param", "named"),
    [
        ("chat/completions", {"messages": []}, 400, "messages", "at least 1"),
        ("chat/completions", {"messages": [{"role": "user", "content": 5}]}, 400, "messages", "messages.0.content"),
        ("chat/completions", {"temperature": "1"}, 400, "temperature", "valid number"),
        ("chat/completions", {"temperature": -1}, 400, "temperature", "greater than or equal to 0"),
        ("chat/completions", {"n": True}, 400, "n", "valid integer"),
        ("chat/completions", {"n": 100}, 400, "n", "at most 12 can run and wait"),
        ("chat/completions", {"stop": ["x"] * 17}, 400, "stop", "at most 16"),
        ("chat/completions", {"stop": ""}, 400, "stop", "at least 1"),
        ("chat/completions", {"logit_bias": {"x": 1}}, 400, "logit_bias", "'x' is not a token id below 49,152"),
        ("chat/completions", {"top_logprobs": 2}, 400, "top_logprobs", "needs logprobs"),
        ("chat/completions", {"max_tokens": 256}, 400, "max_tokens", "exceed the context of 256 tokens"),
        ("chat/completions", {"messages": [{"role": "user", "content": "a b " * 200}]}, 400, "messages", "context"),
        ("chat/completions", {"functions": [{}]}, 400, "functions", "functions is not supported"),
        ("chat/completions", {"min_tokens": 3}, 400, "min_tokens", "unknown field 'min_tokens'"),
        ("chat/completions", {"stream_options": {}}, 400, "stream_options", "needs stream"),
        ("chat/completions", {"model": "gpt-4"}, 404, None, "no such model: 'gpt-4', only tiny"),
        ("completions", {"prompt": ""}, 200, None, ""),
        ("completions", {"prompt": [99_999]}, 400, "prompt", "token id 99999 is outside the vocabulary"),
        ("completions", {"prompt": "a\ud800"}, 400, "prompt", "surrogate"),
        ("completions", {"prompt": "x" * 1_000_000}, 400, "prompt", "exceeds the context"),
        ("completions", {"prompt": None}, 400, "prompt", "prompt"),
        ("completions", {"suffix": "x"}, 400, "suffix", "not supported"),
        ("completions", {"logprobs": 21}, 400, "logprobs", "less than or equal to 20"),
        ("completions", {"user": "me", "best_of": 1, "max_tokens": 1}, 200, None, ""),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_what_cannot_be_done_is_refused_with_the_field(http, path, changed, status, param, named):
    body = {"messages": MESSAGES} if path == "chat/completions" else {"prompt": PROMPT}
    content = json.dumps({"max_tokens": 1} | body | changed)
    response = http.post(f"/v1/{path}", content=content, headers={"content-type": "application/json"})
    assert response.status_code == status, response.text
    if status != 200:
        error = response.json()["error"]
        assert error["param"] == param
        assert named in error["message"]
        assert error["type"]
        assert len(error["message"].splitlines()) == 1


@pytest.mark.parametrize("content", ["", "{", "[" * 100_000, "null", '{"temperature": NaN, "prompt": "a"}', "1" * 5000])
def test_a_body_that_is_no_request_is_refused(http, content):
    response = http.post("/v1/completions", content=content, headers={"content-type": "application/json"})
    assert response.status_code == 400
    assert response.json()["error"]["message"]


def test_the_other_routes(http, client, engine):
    assert http.get("/health").status_code == 200
    assert [model.id for model in client.models.list()] == ["tiny"]
    assert client.models.retrieve("tiny").max_model_len == CONTEXT
    with pytest.raises(openai.NotFoundError, match="no such model"):
        client.models.retrieve("other")
    report = http.get("/metrics").text
    assert 'vllm:num_requests_running{model_name="tiny"} 0.0' in report
    assert "vllm:time_to_first_token_seconds_bucket" in report
    tokens = http.post("/tokenize", json={"prompt": PROMPT}).json()
    assert (tokens["tokens"], tokens["count"]) == (engine.encode(PROMPT), len(engine.encode(PROMPT)))
    assert http.post("/tokenize", json={"messages": MESSAGES}).json()["tokens"] == engine.chat(MESSAGES)
    assert http.post("/tokenize", json={}).status_code == 400
    assert http.get("/docs").status_code == 404
    assert "/v1/chat/completions" in http.get("/openapi.json").json()["paths"]
    with pytest.raises(openai.NotFoundError):
        client.embeddings.create(model="tiny", input="x")


def busy(http) -> list[float]:
    """How many texts run and wait, as /metrics says."""
    return [
        float(value) for value in re.findall(r"^vllm:num_requests_\w+\{.*\} (\S+)$", http.get("/metrics").text, re.M)
    ]


def test_a_full_queue_is_429_and_a_client_that_leaves_frees_its_slots(url, http):
    long = {"prompt": PROMPT, "max_tokens": 200, "n": 12, "stream": True}

    async def leave() -> None:
        async with httpx.AsyncClient(base_url=url, timeout=60) as visitor:
            async with visitor.stream("POST", "/v1/completions", json=long) as response:
                async for _ in response.aiter_lines():
                    break
                refused = await visitor.post("/v1/completions", json={"prompt": PROMPT})
                assert refused.status_code == 429
                assert refused.headers["retry-after"] == "1"
                assert refused.json()["error"]["type"] == "rate_limit_error"
            with contextlib.suppress(httpx.ReadTimeout):  # one that waits for a whole answer leaves too
                await visitor.post("/v1/completions", json=long | {"stream": False}, timeout=0.2)

    asyncio.run(leave())
    deadline = time.monotonic() + 30
    while any(value > 0 for value in busy(http)):
        assert time.monotonic() < deadline, "the slots are still in use"
        time.sleep(0.01)
    assert http.post("/v1/completions", json={"prompt": PROMPT, "max_tokens": 1}).status_code == 200
