"""The server answers OpenAI's own client as the engine does alone, and refuses in its envelope what it cannot do."""

import asyncio
import contextlib
import json
import re
import socket
import time
from pathlib import Path

import httpx
import hypothesis
import numpy as np
import openai
import pytest
from hypothesis import strategies as st

from smollm_jax.commands import serve
from smollm_jax.generation.engine import Engine
from smollm_jax.generation.grammar import Grammars
from smollm_jax.generation.sampling import Sampling
from smollm_jax.generation.slots import SlotEngine
from smollm_jax.serve import fields, tools
from tests.api_server import serving
from tests.serving import tiny_weights

CONTEXT = 400
PROMPT = "The capital of France is"
MESSAGES = [{"role": "user", "content": "Say something."}]


@pytest.fixture(scope="module")
def weights(tmp_path_factory, weights_path) -> Path:
    return tiny_weights(tmp_path_factory.mktemp("serve"), weights_path)


@pytest.fixture(scope="module")
def engine(weights) -> Engine:
    return Engine.load(weights)


@pytest.fixture(scope="module")
def url(weights):
    with serving(serve.Flags(weights=weights, slots=4, context=CONTEXT, queue_size=8)) as url:
        yield url


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
        ("chat/completions", {"max_tokens": CONTEXT}, 400, "max_tokens", "exceed the context of 400 tokens"),
        ("chat/completions", {"messages": [{"role": "user", "content": "a b " * 300}]}, 400, "messages", "context"),
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


def test_a_full_queue_is_429_and_a_client_that_leaves_frees_its_slots(url, http, monkeypatch):
    free, lengths = SlotEngine._free, []

    def recorded(self, slot, text):
        lengths.append(len(text.ids))
        free(self, slot, text)

    monkeypatch.setattr(SlotEngine, "_free", recorded)
    long = {"prompt": PROMPT, "max_tokens": 300, "n": 12, "stream": True}

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
    assert lengths
    assert max(lengths) < 300, "a text that nobody waits for ran to its end"
    assert http.post("/v1/completions", json={"prompt": PROMPT, "max_tokens": 1}).status_code == 200


SCHEMA = {
    "type": "object",
    "properties": {"a": {"type": "integer", "minimum": 0, "maximum": 99}, "b": {"enum": ["x", "y"]}},
    "required": ["a", "b"],
    "additionalProperties": False,
}
CITY = {"type": "object", "properties": {"city": {"$ref": "#/$defs/city"}}, "required": ["city"]}
CITY |= {"additionalProperties": False, "$defs": {"city": {"enum": ["Oslo", "Paris"]}}}
TOOLS = [{"type": "function", "function": {"name": name, "parameters": CITY}} for name in ("weather", "time")]


@pytest.fixture(scope="module")
def no_space(engine) -> dict[str, int]:
    """A bias against tokens of white space, which random weights would write between the words of JSON for ever."""
    spaces = [i for i in range(engine.config.vocab_size) if engine.tokenizer.token_bytes(i).isspace()]
    return {str(i): -100 for i in spaces}


def test_a_text_follows_its_schema_beside_others_that_do_not(client, engine, no_space):
    form = {"type": "json_schema", "json_schema": {"name": "x", "schema": SCHEMA, "strict": True}}
    free = client.completions.create(model="tiny", prompt=PROMPT, max_tokens=60, stream=True)
    options = {"temperature": 1.0, "seed": 1, "n": 3, "max_tokens": 60, "logit_bias": no_space}
    answer = client.chat.completions.create(model="tiny", messages=MESSAGES, response_format=form, **options)
    for choice in answer.choices:
        value = json.loads(choice.message.content)
        assert set(value) == {"a", "b"}
        assert 0 <= value["a"] <= 99
        assert value["b"] in ("x", "y")
        assert choice.finish_reason == "stop"
    assert len({choice.message.content for choice in answer.choices}) > 1
    expected = alone(engine, engine.encode(PROMPT), max_new_tokens=60)
    assert "".join(chunk.choices[0].text for chunk in free) == expected.text
    regex = {"structured_outputs": {"regex": "(ab|cd){3}"}}
    text = client.completions.create(model="tiny", prompt=PROMPT, extra_body=regex).choices[0]
    assert re.fullmatch("(ab|cd){3}", text.text)
    assert text.finish_reason == "stop"
    anything = client.chat.completions.create(
        model="tiny", messages=MESSAGES, response_format={"type": "json_object"}, max_tokens=20, logit_bias=no_space
    )
    assert anything.choices[0].message.content.startswith("{")


def test_a_tool_is_called(client, no_space):
    options = {"max_tokens": 60, "temperature": 1.0, "logit_bias": no_space, "tools": TOOLS, "seed": 3}
    named = {"type": "function", "function": {"name": "time"}}
    for wanted, names in (("required", {"weather", "time"}), (named, {"time"})):
        answer = client.chat.completions.create(model="tiny", messages=MESSAGES, tool_choice=wanted, **options)
        (choice,) = answer.choices
        (call,) = choice.message.tool_calls
        assert (choice.finish_reason, choice.message.content) == ("tool_calls", None)
        assert call.function.name in names
        assert json.loads(call.function.arguments)["city"] in ("Oslo", "Paris")
    stream = client.chat.completions.create(model="tiny", messages=MESSAGES, tool_choice=named, stream=True, **options)
    (delta,) = [chunk.choices[0].delta for chunk in stream if chunk.choices[0].delta.tool_calls]
    assert delta.tool_calls[0].function.model_dump() == call.function.model_dump()
    replied = [*MESSAGES, choice.message.model_dump(), {"role": "tool", "tool_call_id": call.id, "content": "4"}]
    free = client.chat.completions.create(model="tiny", messages=replied, max_tokens=4, tools=TOOLS)
    assert free.choices[0].message.tool_calls is None
    assert free.choices[0].message.content


# A text of the letter a, whose id is 81: llguidance gives up after 13.
SOON_TOO_COMPLEX = {"structured_outputs": {"regex": "(a.{0,1000}){1000}"}, "logit_bias": {"81": 100}}


@pytest.mark.parametrize(
    ("changed", "param", "named"),
    [
        ({"response_format": {"type": "json_schema"}}, "response_format", "json_schema goes with"),
        ({"response_format": {"type": "json_schema", "json_schema": {"schema": {"type": "objct"}}}}, None, "objct"),
        ({"structured_outputs": {"regex": "(a"}}, "structured_outputs", "unclosed group"),
        ({"structured_outputs": {"regex": "a", "json": {}}}, "structured_outputs", "one of json, regex"),
        ({"structured_outputs": {"regex": "(.{0,300}){300}"}}, "structured_outputs", "too many expressions"),
        (SOON_TOO_COMPLEX | {"max_tokens": 30}, None, "cannot be followed any further: lexer error: too many"),
        ({"structured_outputs": {"json": {"allOf": [{"multipleOf": 997}, {"multipleOf": 0.503}]}}}, None, "multipleOf"),
        ({"response_format": {"type": "json_object"}, "tools": TOOLS}, "tools", "cannot be combined"),
        ({"tool_choice": "required"}, "tool_choice", "needs tools"),
        ({"tools": TOOLS, "tool_choice": {"type": "function", "function": {"name": "x"}}}, "tool_choice", "no tool"),
        ({"tools": [{"type": "function", "function": {"name": "a b"}}]}, "tools", "pattern"),
        ({"tools": [{"type": "function", "function": {"name": "f", "parameters": {"$defs": 5}}}]}, "tools", "object"),
        ({"messages": [{"role": "assistant", "tool_calls": [{"function": 5}]}]}, "messages", "a tool call must have"),
    ],
    ids=str,
)
def test_a_grammar_that_cannot_be_followed_is_refused(http, changed, param, named):
    response = http.post("/v1/chat/completions", json={"messages": MESSAGES, "max_tokens": 1} | changed)
    assert response.status_code == 400, response.text
    error = response.json()["error"]
    assert param in (None, error["param"])
    assert named in error["message"]


def test_calls_are_read_from_a_text_and_what_is_none_stays():
    call = '<tool_call>{"name": "f", "arguments": {"x": "</tool_call>"}}</tool_call>'
    content, calls = tools.parse(f"First {call} then\n{call}", only_call=False)
    assert content == "First  then\n"
    assert [call["function"] for call in calls] == [{"name": "f", "arguments": '{"x": "</tool_call>"}'}] * 2
    assert len({call["id"] for call in calls}) == 2
    assert tools.parse(call, only_call=False)[0] is None
    for text in (call[:-1], "<tool_call>{}</tool_call>", "<tool_call>5</tool_call>", "none", ""):
        assert tools.parse(text, only_call=False) == (text, [])
        assert tools.parse(text, only_call=True) == (text, [])


def test_amid_a_text_a_call_must_follow_its_schema(engine):
    grammars = Grammars(engine.tokenizer, engine.config.vocab_size, engine.eos_token_ids)
    matcher = grammars.calls_in_text(tools.call_schema([tool["function"] for tool in TOOLS]))

    def allowed() -> np.ndarray:
        bits = np.zeros(-(-engine.config.vocab_size // 32), np.int32)
        matcher.write_allowed(bits)
        return np.unpackbits(bits.view(np.uint8), bitorder="little").astype(bool)

    anything = allowed()
    assert anything[engine.tokenizer.encode("Well")].all()
    assert anything[engine.eos_token_ids[0]]
    for i in engine.tokenizer.encode("Well, <tool_call>"):
        matcher.add(i)
    inside = {engine.tokenizer.token_bytes(i).strip()[:1] for i in np.flatnonzero(allowed())}
    assert inside <= {b"", b"{"}


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=5,
)
FIELDS = st.sampled_from(
    sorted({*fields.ChatRequest.model_fields, *fields.CompletionRequest.model_fields, *fields.IGNORED, "x"})
)


@hypothesis.settings(max_examples=60, deadline=None, derandomize=True)
@hypothesis.given(
    st.sampled_from(["v1/chat/completions", "v1/completions", "tokenize"]),
    st.dictionaries(FIELDS, VALUES, max_size=3),
    st.booleans(),
)
def test_no_body_is_an_error_of_the_server(http, path, changed, whole):
    base = {"messages": MESSAGES} if path == "v1/chat/completions" else {"prompt": PROMPT}
    body = (base | {"max_tokens": 1, "max_completion_tokens": 1} if whole else {}) | changed
    if path == "v1/completions":
        body.pop("max_completion_tokens", None)
    response = http.post(f"/{path}", content=json.dumps(body), headers={"content-type": "application/json"})
    assert response.status_code in (200, 400, 404, 429), response.text
    if response.status_code != 200:
        assert response.json()["error"]["message"]


@pytest.mark.slow
def test_clients_that_send_or_read_nothing_harm_no_other(url, http, engine):
    host, port = url.removeprefix("http://").split(":")
    long = json.dumps({"prompt": PROMPT, "max_tokens": 300, "stream": True})
    head = f"POST /v1/completions HTTP/1.1\r\nHost: {host}\r\nContent-Type: application/json\r\n"
    with contextlib.ExitStack() as stack:
        for i in range(200):
            connection = stack.enter_context(socket.create_connection((host, int(port))))
            if i < 4:  # never reads
                connection.sendall(f"{head}Content-Length: {len(long)}\r\n\r\n{long}".encode())
            elif i < 50:  # never ends
                connection.sendall(f"{head}Content-Length: {len(long)}\r\n\r\n{{".encode())
            elif i < 100:
                connection.sendall(b"GET /he")
        expected = alone(engine, engine.encode(PROMPT), max_new_tokens=8)
        answer = http.post("/v1/completions", json={"prompt": PROMPT, "max_tokens": 8}).json()
        assert answer["choices"][0]["text"] == expected.text
        late = stack.enter_context(socket.create_connection((host, int(port)), timeout=30))
        late.sendall(f"{head}Content-Length: 10\r\n\r\n{{".encode())
        assert b" 408 " in late.recv(100)
    deadline = time.monotonic() + 60
    while any(value > 0 for value in busy(http)):
        assert time.monotonic() < deadline, "the slots are still in use"
        time.sleep(0.1)
