"""The routes of the server: a request becomes jobs of the `SlotEngine`, their events become the answer."""

import asyncio
import contextlib
import dataclasses
import re
from collections.abc import AsyncIterator, Callable, Sequence
from typing import Any

import fastapi
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, PlainTextResponse, Response, StreamingResponse
from prometheus_client import CONTENT_TYPE_LATEST
from starlette.exceptions import HTTPException

from smollm_jax.errors import InputFileError, UsageError, short_repr
from smollm_jax.generation.engine import Chunk, Engine
from smollm_jax.generation.grammar import Grammars
from smollm_jax.generation.slots import ClosedError, Event, Job, PromptTokens, QueueFullError, SlotEngine, Ticket
from smollm_jax.runtime.files import utf8
from smollm_jax.serve import answers, fields
from smollm_jax.serve.answers import Answer, Choice, Usage, error_body
from smollm_jax.serve.fields import COMPLETION_TOKENS, ChatRequest, CompletionRequest, FieldError, TokenizeRequest
from smollm_jax.serve.metrics import Metrics, ModelMetrics, Stopwatch
from smollm_jax.serve.tools import with_tools

RETRY_SECONDS = 1  # after which a refused client may try again
# In the published document; without it FastAPI would promise its own form of an error, with status 422.
Responses = dict[int | str, dict[str, Any]]
REFUSALS: Responses = {
    "4XX": {
        "description": "An error in OpenAI's envelope",
        "content": {"application/json": {"schema": answers.ERROR_SCHEMA}},
    }
}
STREAM: Responses = {200: {"content": {"text/event-stream": {"schema": {"type": "string"}}}}}


@dataclasses.dataclass(frozen=True)
class Served:
    """A model by the name that clients ask for."""

    name: str
    slots: SlotEngine
    created: int  # seconds since 1970
    longest_token: int  # bytes
    grammars: Grammars

    @property
    def engine(self) -> Engine:
        return self.slots.engine

    def card(self) -> dict[str, Any]:
        """What /v1/models says of it."""
        card = {"id": self.name, "object": "model", "created": self.created, "owned_by": "smollm-jax"}
        return {**card, "max_model_len": self.slots.context}

    def encode(self, field: str, text: str) -> list[int]:
        """The ids of a prompt; special tokens written in it are parsed, as by vLLM and llama-server."""
        self.check_size(field, len(text.encode("utf-8", "surrogatepass")))
        with _names(field):
            return self.engine.encode(text, parse_special=True)

    def check_size(self, field: str, size: int) -> None:
        """Raises `FieldError` for a text that exceeds the context even if it consists of the longest tokens."""
        if size // self.longest_token > self.slots.context:
            raise FieldError(
                field,
                f"{field}: a text of {size:,} bytes exceeds the context of {self.slots.context:,} tokens",
                "context_length_exceeded",
            )


@contextlib.contextmanager
def _names(field: str):
    """Names the field in the errors of what is done with it."""
    try:
        yield
    except FieldError:
        raise
    except (UsageError, InputFileError) as error:
        raise FieldError(field, f"{field}: {error}") from error


class Outcome:
    """The texts of one request: the events of its jobs, as the engine's thread delivers them."""

    def __init__(self, served: Served, jobs: Sequence[Job], metrics: ModelMetrics):
        self._loop, self._events = asyncio.get_running_loop(), asyncio.Queue[Event]()
        self._metrics = metrics
        self._watches = {job.row: Stopwatch(metrics) for job in jobs}
        self._left = len(jobs)
        try:
            self._tickets: list[Ticket] = served.slots.submit(jobs, self._deliver)
        except (QueueFullError, ClosedError) as error:
            closed = isinstance(error, ClosedError)
            message = "the server is stopping" if closed else "too many requests wait: try again later"
            status, code = (503, "stopping") if closed else (429, "queue_full")
            raise HTTPException(status, message, {"retry-after": str(RETRY_SECONDS), "x-code": code}) from error

    def _deliver(self, event: Event) -> None:
        self._loop.call_soon_threadsafe(self._events.put_nowait, event)

    async def events(self) -> AsyncIterator[PromptTokens | Chunk]:
        """The events of all texts until each has ended; the texts are cancelled if it is closed before."""
        try:
            while self._left:
                event = await self._events.get()
                if isinstance(event, Exception):
                    raise event
                if isinstance(event, Chunk):
                    self._count(event)
                yield event
        finally:
            self.cancel()

    def cancel(self) -> None:
        """Ends the texts that have not ended."""
        for ticket in self._tickets:
            ticket.cancel()

    def _count(self, chunk: Chunk) -> None:
        if chunk.tokens:
            self._watches[chunk.row].tokens(len(chunk.tokens))
            self._metrics.generation_tokens.inc(len(chunk.tokens))
        if chunk.finish:
            self._left -= 1
            self._watches[chunk.row].end()
            self._metrics.finished(answers.FINISH[chunk.finish])
            ticket = self._tickets[chunk.row]
            self._metrics.prefix_queries.inc(len(ticket.job.prompt))
            self._metrics.prefix_hits.inc(ticket.cached_tokens)

    @property
    def cached_tokens(self) -> list[int]:
        """How many tokens of each text's prompt were in the cache."""
        return [ticket.cached_tokens for ticket in self._tickets]


class Routes:
    """The handlers of all routes. A request that names no model gets the first."""

    def __init__(self, models: Sequence[Served]):
        self.models_by_name = {model.name: model for model in models}
        self.default = models[0]
        self.metrics = Metrics({model.name: model.slots for model in models})

    async def chat(self, request: fastapi.Request, body: ChatRequest) -> Response:
        """Answers a conversation."""
        served = self._check(body)
        engine = served.engine
        messages, offered = fields.as_conversation(body.messages), body.offered
        served.check_size("messages", sum(len(str(message.get("content", ""))) for message in messages))

        def encode() -> list[int]:
            with _names("messages"):
                if "tools" in engine.tokenizer.templates.source(tools=bool(offered)):
                    return engine.chat(messages, tools=offered or None)
                return engine.chat(with_tools(messages, offered))

        prompt = await asyncio.to_thread(encode)
        field, limit = body.max_new_tokens
        jobs = await self._jobs(served, body, [prompt], field, limit, body.alternatives)
        answer = Answer("chat", served.name, engine.tokenizer, logprobs=body.alternatives is not None)
        answer.calls = "only" if offered and body.must_call else "amid" if offered else None
        return await self._respond(served, request, body, answer, jobs, [""])

    async def completions(self, request: fastapi.Request, body: CompletionRequest) -> Response:
        """Continues texts."""
        served = self._check(body)
        prompts = await asyncio.to_thread(_encode_prompts, served, body)
        limit = COMPLETION_TOKENS if body.max_tokens is None else body.max_tokens
        jobs = await self._jobs(served, body, prompts, "max_tokens", limit, body.logprobs)
        if body.echo and body.logprobs is not None:
            jobs = [dataclasses.replace(job, prompt_alternatives=body.logprobs) for job in jobs]
        answer = Answer("text", served.name, served.engine.tokenizer, logprobs=body.logprobs is not None)
        echoes = [served.engine.tokenizer.decode(prompt) if body.echo else "" for prompt in prompts]
        return await self._respond(served, request, body, answer, jobs, echoes)

    def _check(self, body: ChatRequest | CompletionRequest) -> Served:
        """The model that a request asks for; raises for a request that cannot be answered."""
        body.reject_unsupported()
        if body.stream_options is not None and not body.stream:
            raise FieldError("stream_options", "stream_options needs stream: true")
        return self._model(body.model)

    def _model(self, name: str | None) -> Served:
        """The model of this name; raises `HTTPException` with status 404 if there is none."""
        if name is None:
            return self.default
        if name not in self.models_by_name:
            message = f"no such model: {short_repr(name)}, only {', '.join(self.models_by_name)}"
            raise HTTPException(404, message, {"x-code": "model_not_found"})
        return self.models_by_name[name]

    async def _jobs(
        self,
        served: Served,
        body: ChatRequest | CompletionRequest,
        prompts: Sequence[list[int]],
        field: str,
        limit: int | None,
        alternatives: int | None,
    ) -> list[Job]:
        """The jobs of every prompt and choice, numbered as the choices of the answer."""
        most = served.slots.queue_size + served.slots.slot_count
        if (count := len(prompts) * body.choices) > most:
            raise FieldError("n", f"n: {count:,} texts in a request, at most {most:,} can run and wait")
        bias = body.biases(served.engine.config.vocab_size)
        grammar = await asyncio.to_thread(body.grammar, served.grammars)
        jobs = []
        for prompt in prompts:
            space = served.slots.context - len(prompt)
            if space < (1 if limit is None else limit):
                raise FieldError(
                    field if space > 0 else "messages" if isinstance(body, ChatRequest) else "prompt",
                    f"a prompt of {len(prompt):,} tokens and {limit or 1:,} new ones exceed the context of "
                    f"{served.slots.context:,} tokens",
                    "context_length_exceeded",
                )
            for sampling in body.samplings(served.engine.generation):
                jobs.append(
                    Job(
                        prompt,
                        space if limit is None else limit,
                        sampling,
                        body.stops,
                        alternatives,
                        logit_bias=bias,
                        frequency_penalty=body.frequency_penalty or 0.0,
                        presence_penalty=body.presence_penalty or 0.0,
                        grammar=grammar and grammar.copy(),
                        row=len(jobs),
                    )
                )
        return jobs

    async def _respond(
        self,
        served: Served,
        request: fastapi.Request,
        body: ChatRequest | CompletionRequest,
        answer: Answer,
        jobs: Sequence[Job],
        echoes: Sequence[str],
    ) -> Response:
        usage = Usage(sum(len(job.prompt) for job in jobs[:: body.choices]))
        metrics = self.metrics.of_model(served.name)
        outcome = Outcome(served, jobs, metrics)
        metrics.prompt_tokens.inc(usage.prompt_tokens)
        if body.stream:
            stream = self._stream(outcome, answer, len(jobs), echoes, usage, include_usage=body.include_usage)
            return StreamingResponse(stream, media_type="text/event-stream")
        choices = [Choice(row) for row in range(len(jobs))]
        for choice in choices:
            choice.text = echoes[choice.index // body.choices]

        async def collect() -> None:
            async for event in outcome.events():
                if isinstance(event, PromptTokens):
                    choices[event.row].tokens += event.tokens
                else:
                    choices[event.row].add(event)
                    usage.completion_tokens += len(event.tokens)

        if not await _unless_gone(request, collect()):
            return Response(status_code=499)  # nobody reads it
        usage.cached_tokens = sum(outcome.cached_tokens[:: body.choices])
        return JSONResponse(answer.whole(choices, usage))

    async def _stream(
        self,
        outcome: Outcome,
        answer: Answer,
        count: int,
        echoes: Sequence[str],
        usage: Usage,
        *,
        include_usage: bool,
    ) -> AsyncIterator[str]:
        offsets, held = [0] * count, [Choice(row) for row in range(count)]
        choices = count // len(echoes)
        pending = {row: echo for row, echo in ((row, echoes[row // choices]) for row in range(count)) if echo}
        try:
            if answer.kind == "chat":
                for row in range(count):
                    yield answer.opening(row)
            async for event in outcome.events():
                row, echo = event.row, pending.pop(event.row, "")
                text = echo + ("" if isinstance(event, PromptTokens) else event.text)
                finish = None if isinstance(event, PromptTokens) else event.finish
                if not isinstance(event, PromptTokens):
                    usage.completion_tokens += len(event.tokens)
                finish = None if finish is None else answers.FINISH[finish]
                if answer.calls and isinstance(event, Chunk):  # where a call ends is known at the end
                    held[row].add(event)
                    if finish:
                        yield answer.with_calls(held[row])
                    continue
                if piece := answer.piece(row, text, event.tokens, finish, offsets[row]):
                    yield piece
                offsets[row] += len(text)
            usage.cached_tokens = sum(outcome.cached_tokens[::choices])
            if include_usage:
                yield answer.usage(usage)
        except UsageError as error:
            yield answers.event(error_body(str(error), kind="invalid_request_error"))
        except Exception:  # logged where it was raised
            yield answers.event(error_body("internal error: see the server's log", kind="server_error"))
        finally:
            outcome.cancel()
        yield answers.DONE

    async def models(self) -> dict[str, Any]:
        """Lists what can be asked for."""
        return {"object": "list", "data": [model.card() for model in self.models_by_name.values()]}

    async def model(self, name: str) -> dict[str, Any]:
        """One of them."""
        return self._model(name).card()

    async def health(self) -> Response:
        """200 once a request can be served at full speed, and until an engine fails or the server stops."""
        alive = all(model.slots.alive for model in self.models_by_name.values())
        return Response(status_code=200 if alive else 503)

    async def report(self) -> Response:
        """The metrics."""
        return Response(self.metrics.text(), media_type=CONTENT_TYPE_LATEST)

    async def tokenize(self, body: TokenizeRequest) -> dict[str, Any]:
        """The tokens of a text or of a chat, as vLLM's route of this name gives them."""
        served = self._model(body.model)
        if (body.prompt is None) == (body.messages is None):
            raise FieldError("prompt", "give either prompt or messages")
        ids = await asyncio.to_thread(_tokenize, served, body)
        strings = [served.engine.tokenizer.core.id_to_token(i) for i in ids] if body.return_token_strs else None
        return {"count": len(ids), "max_model_len": served.slots.context, "tokens": ids, "token_strs": strings}


def _encode_prompts(served: Served, body: CompletionRequest) -> list[list[int]]:
    prompts = [prompt if isinstance(prompt, list) else served.encode("prompt", prompt) for prompt in body.prompts]
    size = served.engine.config.vocab_size
    for prompt in prompts:
        if invalid := next((i for i in prompt if i >= size), None):
            raise FieldError("prompt", f"prompt: token id {short_repr(invalid)} is outside the vocabulary of {size:,}")
    return prompts


def _tokenize(served: Served, body: TokenizeRequest) -> list[int]:
    if body.prompt is not None:
        served.check_size("prompt", len(body.prompt.encode("utf-8", "surrogatepass")))
        with _names("prompt"):
            return served.engine.encode(body.prompt, parse_special=True, add_special_tokens=body.add_special_tokens)
    with _names("messages"):
        messages = fields.as_conversation(body.messages or [])
        return served.engine.chat(messages, add_generation_prompt=body.add_generation_prompt)


def build(models: Sequence[Served]) -> fastapi.FastAPI:
    """The ASGI app of some models, the first for requests that name none. Their started engines end with the app."""
    routes = Routes(models)

    @contextlib.asynccontextmanager
    async def lifespan(_: fastapi.FastAPI) -> AsyncIterator[None]:
        yield
        for model in models:
            await asyncio.to_thread(model.slots.close)

    app = fastapi.FastAPI(title="smollm serve", docs_url=None, redoc_url=None, lifespan=lifespan)
    table: list[tuple[str, str, Callable[..., Any], type[Response], Responses]] = [
        ("POST", "/v1/chat/completions", routes.chat, JSONResponse, STREAM),
        ("POST", "/v1/completions", routes.completions, JSONResponse, STREAM),
        ("GET", "/v1/models", routes.models, JSONResponse, {}),
        ("GET", "/v1/models/{name:path}", routes.model, JSONResponse, {}),
        ("GET", "/health", routes.health, Response, {}),
        ("GET", "/metrics", routes.report, PlainTextResponse, {}),
        ("POST", "/tokenize", routes.tokenize, JSONResponse, {}),
    ]
    for method, path, handler, kind, responses in table:
        options: dict[str, Any] = {"response_class": kind, "response_model": None, "responses": REFUSALS | responses}
        app.add_api_route(path, handler, methods=[method], **options)

    _answer_errors(app, routes.metrics)
    return app


def _answer_errors(app: fastapi.FastAPI, metrics: Metrics) -> None:
    """Answers every error in OpenAI's envelope, and counts it."""

    def refuse(status: int, message: str, **fields: Any) -> JSONResponse:
        metrics.refused(status)
        kind = {404: "not_found_error", 429: "rate_limit_error"}.get(status, "invalid_request_error")
        headers = fields.pop("headers", None)
        return JSONResponse(
            error_body(utf8(message), kind="server_error" if status >= 500 else kind, **fields), status, headers
        )

    async def on_field(_: fastapi.Request, error: Exception) -> Response:
        assert isinstance(error, FieldError)
        return refuse(400, str(error), param=error.param, code=error.code)

    async def on_usage(_: fastapi.Request, error: Exception) -> Response:
        return refuse(400, str(error))

    async def on_invalid(_: fastapi.Request, error: Exception) -> Response:
        assert isinstance(error, RequestValidationError)
        # Of a value that may be of several types, the error of the type that it has.
        worst = max(error.errors(), key=lambda item: not item["type"].endswith("_type"))
        path = [utf8(str(part)) for part in worst["loc"][1:] if part != "str" and re.fullmatch(r"\w+", str(part))]
        where = ".".join(path)
        return refuse(400, f"{where}: {worst['msg']}" if where else worst["msg"], param=path[0] if path else None)

    async def on_http(_: fastapi.Request, error: Exception) -> Response:
        assert isinstance(error, HTTPException)
        headers = dict(error.headers or {})
        code = headers.pop("x-code", None)
        return refuse(error.status_code, str(error.detail), code=code, headers=headers)

    async def on_bug(_: fastapi.Request, error: Exception) -> Response:
        return refuse(500, "internal error: see the server's log")

    app.add_exception_handler(FieldError, on_field)
    app.add_exception_handler(UsageError, on_usage)  # raised while a text is generated
    app.add_exception_handler(RequestValidationError, on_invalid)
    app.add_exception_handler(HTTPException, on_http)
    app.add_exception_handler(Exception, on_bug)


async def _unless_gone(request: fastapi.Request, work: Any) -> bool:
    """Awaits `work`, and gives it up when the client disconnects before; whether it was done."""

    async def gone() -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass

    tasks = [asyncio.ensure_future(work), asyncio.ensure_future(gone())]
    try:
        await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        if not tasks[0].done():
            return False
        await tasks[0]
        return True
    finally:
        for task in tasks:
            task.cancel()
