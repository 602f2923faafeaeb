"""The web application: OpenAI's routes over a `Service`, which runs in another thread."""

import asyncio
import itertools
import json
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any, TypeVar

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, Response, StreamingResponse
from starlette.exceptions import HTTPException

from longctx.serve.bodies import ChatBody, CompletionBody, RequestRefused, TokenizeBody, describe_invalid
from longctx.serve.guard import ARRIVED, Guard
from longctx.serve.metrics import Metrics, is_refusal
from longctx.serve.request import Ask, Reader
from longctx.serve.response import Choice, Form, Json, error, model_list, refusal
from longctx.serve.schedule import NewSequence
from longctx.serve.service import Emit, Failure, Token

Result = TypeVar("Result")
_RETRY_S = 1  # advice to a client that is refused because too many sequences wait
_CLIENT_GONE = 499  # status, as in nginx: nobody reads the response
_TOKENIZE_AT_ONCE = 4  # requests
_LOOK_S = 0.2  # how often a request that is not streamed checks that its client is still there


@dataclass
class Front:
    """The state that all routes of the web application share.

    ``submit`` and ``cancel`` are the methods of the `Service`.  At most ``max_open`` sequences may wait or be answered,
    and a request may have at most ``max_bytes``.  ``key`` is the API key (None: no key is required).  ``closed`` is the
    reason why no more requests are accepted (None: they are accepted).  ``cut`` counts the requests that the web server
    ended after that, because their clients were too slow.
    """

    reader: Reader
    submit: Callable[[NewSequence, Emit, Sequence[int]], None]
    cancel: Callable[[int], None]
    metrics: Metrics
    max_open: int
    max_bytes: int
    key: str | None = field(default=None, repr=False)
    closed: str | None = None
    cut: int = 0
    created: int = field(default_factory=lambda: int(time.time()))

    def __post_init__(self) -> None:
        self._numbers = itertools.count()
        self.open: set[int] = set()
        self._tokenizing = ThreadPoolExecutor(_TOKENIZE_AT_ONCE)

    async def read(self, parse: Callable[[Any], Result], body: Any) -> Result:
        """Return ``parse(body)``, computed in another thread: tokenizing a long text does not delay other answers.

        A few requests are parsed at a time, so that a short one does not wait for a long one.
        """
        return await asyncio.get_running_loop().run_in_executor(self._tokenizing, parse, body)

    async def answer(self, ask: Ask) -> AsyncIterator[tuple[int, Token]]:
        """Yield (index of the choice, token) for each token of the answers; end all choices if the caller stops.

        Tokens of several choices come in the order in which they are ready.

        Raises `RequestRefused` if the server is ``closed`` or fails, or if too many sequences are open.
        """
        self._refuse_closed(len(ask.choices))
        loop, events = asyncio.get_running_loop(), asyncio.Queue[Token | Failure]()

        def emit(event: Token | Failure) -> None:
            with suppress(RuntimeError):  # the loop has ended
                loop.call_soon_threadsafe(events.put_nowait, event)

        index_of = {next(self._numbers): index for index in range(len(ask.choices))}
        self.open |= index_of.keys()
        left = set(index_of)
        try:
            for number, (prompt, most, sampling) in zip(index_of, ask.choices, strict=True):
                self.submit(NewSequence(number, prompt, most, sampling, ask.score_prompts), emit, ask.after(prompt))
            while left:
                event = await events.get()
                if isinstance(event, Failure):
                    left.discard(event.number)
                    raise RequestRefused(event.message, status=500)
                if event.finish:
                    left.discard(event.number)
                yield index_of[event.number], event
        finally:
            for number in left:
                self.cancel(number)
            self.open -= index_of.keys()

    def _refuse_closed(self, more: int) -> None:
        if self.closed:
            raise RequestRefused(self.closed, status=503)
        if len(self.open) + more > self.max_open:
            raise RequestRefused(
                f"{len(self.open)} answers are open, and at most {self.max_open} may be: try again later",
                status=429,
                code="rate_limit_exceeded",
            )


class RouteHandlers:
    """The functions that answer requests, one for each route of the API."""

    def __init__(self, front: Front) -> None:
        self.front = front

    async def completions(self, body: CompletionBody, request: Request) -> Response:
        """Return the response to /v1/completions: continuations of one prompt or several."""
        return await self._respond(await self.front.read(self.front.reader.completion, body), request)

    async def chat_completions(self, body: ChatBody, request: Request) -> Response:
        """Return the response to /v1/chat/completions: answers to the last message of a conversation."""
        return await self._respond(await self.front.read(self.front.reader.chat, body), request)

    async def _respond(self, ask: Ask, request: Request) -> Response:
        form = Form(ask, self.front.reader.tokenizer)
        events = self.front.metrics.watch(ask, self.front.answer(ask), request.scope[ARRIVED])
        if not ask.stream:
            return await _until_gone(_collect(form, events), request)
        first = await _until_gone(anext(events), request)  # a refusal is raised here, before the response begins
        return StreamingResponse(_stream(form, first, events), media_type="text/event-stream")

    async def tokenize(self, body: TokenizeBody) -> Response:
        """Return the response to /tokenize: the tokens of a text or of a conversation."""
        tokens = await self.front.read(self.front.reader.tokens, body)
        most = self.front.reader.shape.max_positions
        return JSONResponse({"count": len(tokens), "max_model_len": most, "tokens": list(tokens)})

    async def models(self) -> Response:
        """Return the response to /v1/models: a list of models, which has one entry."""
        reader = self.front.reader
        return JSONResponse(model_list(reader.model, self.front.created, reader.shape.max_positions))

    async def health(self) -> Response:
        """Return the response to /health: 200 while requests are accepted, else 503."""
        closed = self.front.closed
        return JSONResponse({"status": closed or "ok"}, 503 if closed else 200)

    async def metrics(self) -> Response:
        """Return the response to /metrics: the server's metrics in Prometheus' text format."""
        text, kind = self.front.metrics.page(len(self.front.open))
        return Response(text, headers={"Content-Type": kind})

    async def refused(self, _: Any, one: RequestRefused) -> Response:
        """Return the error response to a request that was refused, or that failed."""
        if is_refusal(one.status) and one.status != _CLIENT_GONE:
            self.front.metrics.count_refusal()
        headers = {"Retry-After": str(_RETRY_S)} if one.status == 429 else {}
        return JSONResponse(refusal(one), one.status, headers)

    async def invalid(self, _: Any, one: RequestValidationError) -> Response:
        """Return the error response to a body that is not valid."""
        self.front.metrics.count_refusal()
        message, place = describe_invalid(one.errors())
        return JSONResponse(error(message, 400, place), 400)

    async def other(self, _: Any, one: HTTPException) -> Response:
        """Return the error response to a request that no route reads, or whose body cannot be read."""
        if is_refusal(one.status_code):
            self.front.metrics.count_refusal()
        reason = str(one.detail)
        if one.status_code == 400:  # FastAPI does not say why it cannot read a body
            reason = f"the body cannot be read ({one.__cause__}): send JSON in UTF-8"
        return JSONResponse(error(reason, one.status_code), one.status_code, one.headers)


def make_app(front: Front) -> Any:
    """Return the ASGI application with all routes of the API; `Guard` checks requests before they reach a route."""
    app, routes = FastAPI(title="longctx", docs_url=None, redoc_url=None), RouteHandlers(front)
    app.add_api_route("/v1/completions", routes.completions, methods=["POST"])
    app.add_api_route("/v1/chat/completions", routes.chat_completions, methods=["POST"])
    app.add_api_route("/tokenize", routes.tokenize, methods=["POST"])
    app.add_api_route("/v1/models", routes.models, methods=["GET"])
    app.add_api_route("/health", routes.health, methods=["GET"])
    app.add_api_route("/metrics", routes.metrics, methods=["GET"])
    app.add_exception_handler(RequestRefused, routes.refused)
    app.add_exception_handler(RequestValidationError, routes.invalid)
    app.add_exception_handler(HTTPException, routes.other)
    app.add_exception_handler(Exception, _failed)
    _describe(app, front.reader.model)
    return Guard(app, front)


def _describe(app: FastAPI, model: str) -> None:
    """State in /openapi.json that ``model`` is the only valid model, and that requests have no unlisted fields.

    Unlisted fields are accepted if they have no effect, but a client that reads the description needs none.
    """
    for name in ("CompletionBody", "ChatBody"):
        body = app.openapi()["components"]["schemas"][name]
        body["properties"]["model"]["enum"] = [model]
        body["additionalProperties"] = False


async def _failed(_: Any, one: Exception) -> Response:
    return JSONResponse(error(f"{type(one).__name__}: an error of the server", 500), 500)


async def _until_gone(work: Awaitable[Result], request: Request) -> Result:
    """Return the result of ``work``; if the client disconnects first, cancel ``work`` and raise `RequestRefused`."""
    task = asyncio.ensure_future(work)
    try:
        while not (await asyncio.wait({task}, timeout=_LOOK_S))[0]:
            if await request.is_disconnected():
                raise RequestRefused("the client has gone", status=_CLIENT_GONE)
        return task.result()
    finally:
        task.cancel()
        with suppress(asyncio.CancelledError, Exception):
            await task


async def _collect(form: Form, events: AsyncIterator[tuple[int, Token]]) -> Response:
    """Return the response after the last token; another thread writes it, since many log-probabilities take long."""
    choices = [Choice() for _ in form.ask.choices]
    async for index, event in events:
        _record(choices[index], event)
    return await asyncio.to_thread(lambda: JSONResponse(form.whole(choices)))


def _record(choice: Choice, event: Token) -> None:
    choice.text, choice.tokens = choice.text + event.piece, choice.tokens + (event.token is not None)
    choice.finish, choice.began = event.finish, True
    choice.logprobs += [event.logprob] if event.logprob else []
    choice.prompt_logprobs = event.prompt or choice.prompt_logprobs


async def _stream(form: Form, first: tuple[int, Token], events: Any) -> AsyncIterator[str]:
    """Yield the server-sent events of a streamed response, with its ``first`` token and then those of ``events``.

    A `RequestRefused` ends the stream with an event that holds the error.
    """
    choices = [Choice() for _ in form.ask.choices]
    offsets = [form.offsets(index) for index in range(len(choices))]
    try:
        index, event = first
        while True:
            if (form.ask.chat or form.ask.echo) and not choices[index].began:
                yield await asyncio.to_thread(_first_event, form, index, event)
            _record(choices[index], event)
            if event.piece or event.finish or event.logprob:
                offset = offsets[index].add(event.logprob.token) if event.logprob else 0
                yield _server_sent(form.chunk(index, event.piece, event.logprob, event.finish, offset=offset))
            if (following := await anext(events, None)) is None:
                break
            index, event = following
        if form.ask.include_usage:
            yield _server_sent(form.last(choices))
        yield "data: [DONE]\n\n"
    except RequestRefused as refused:
        yield _server_sent(refusal(refused))
    finally:
        await events.aclose()


def _first_event(form: Form, index: int, event: Token) -> str:
    return _server_sent(form.first(index, event.prompt))


def _server_sent(value: Json) -> str:
    return f"data: {json.dumps(value)}\n\n"
