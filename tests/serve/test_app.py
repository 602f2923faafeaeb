"""Routes, errors and bounds of the web application, over a service that answers at once or never."""

import asyncio
import gzip
import json
import re
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from starlette.testclient import TestClient

from longctx.config import Sampling
from longctx.hf.config import shape_of
from longctx.infer.sample import TokenLogprob
from longctx.serve.app import Front, make_app
from longctx.serve.bodies import RequestRefused
from longctx.serve.metrics import Metrics
from longctx.serve.request import Reader
from longctx.serve.response import Form
from longctx.serve.schedule import NewSequence
from longctx.serve.service import Emit, Failure, Token
from tests.tiny import tiny_model, tiny_tokenizer

TEXT = "hello"


class Script:
    """A service that answers "hello", letter by letter; with ``silent``, only the first letter."""

    def __init__(self) -> None:
        self.silent, self.failing = False, False
        self.sequences: list[NewSequence] = []
        self.cancelled: list[int] = []

    def submit(self, new: NewSequence, emit: Emit, after: Sequence[int] = ()) -> None:
        self.sequences.append(new)
        for i, letter in enumerate(TEXT[:1] if self.silent or self.failing else TEXT):
            token = ord(letter) - 33
            logprob = None if new.sampling.logprobs is None else TokenLogprob(token, -0.5, ((token, -0.5),))
            scored = new.prompt[1:] if new.score_prompt and i == 0 else ()
            prompt = tuple(TokenLogprob(one, -0.1 * one, ()) for one in scored)
            emit(Token(new.number, token, letter, logprob, "stop" if i == len(TEXT) - 1 else None, prompt))
        if self.failing:
            emit(Failure(new.number, "lost rank 1"))

    def cancel(self, number: int) -> None:
        self.cancelled.append(number)


@pytest.fixture(scope="module")
def reader(tmp_path_factory: pytest.TempPathFactory) -> Reader:
    folder: Path = tiny_model(tmp_path_factory.mktemp("app") / "tiny", max_positions=97)
    return Reader("tiny", shape_of(folder), tiny_tokenizer(), Sampling(), max_tokens=97, max_choices=9)


@pytest.fixture
def script() -> Script:
    return Script()


@pytest.fixture
def front(reader: Reader, script: Script) -> Front:
    metrics = Metrics({"waiting_sequences": lambda: 3.0})
    return Front(reader, script.submit, script.cancel, metrics, max_open=4, max_bytes=2_000)


@pytest.fixture
def client(front: Front) -> Iterator[TestClient]:
    with TestClient(make_app(front), raise_server_exceptions=False) as client:
        yield client


def test_description_names_the_model_and_the_bounds(client: TestClient):
    schemas = client.get("/openapi.json").json()["components"]["schemas"]
    for name in ("CompletionBody", "ChatBody"):
        fields = schemas[name]["properties"]
        assert fields["model"]["enum"] == ["tiny"] and schemas[name]["additionalProperties"] is False
        top_p, _ = fields["top_p"]["anyOf"]
        assert (top_p["type"], top_p["exclusiveMinimum"], top_p["maximum"]) == ("number", 0, 1)


def complete(client: TestClient, **fields: Any) -> Any:
    return client.post("/v1/completions", json={"model": "tiny", "prompt": "ab", **fields})


def chunks(response: Any) -> list[Any]:
    lines = [line.removeprefix("data: ") for line in response.text.split("\n\n") if line]
    assert lines[-1] == "[DONE]"
    return [json.loads(line) for line in lines[:-1]]


def test_completion_has_each_choice_and_its_usage(client, script):
    answer = complete(client, n=2, seed=5, max_tokens=9, logprobs=1, echo=False).json()
    assert [one["text"] for one in answer["choices"]] == [TEXT, TEXT]
    assert [len(one["logprobs"]["tokens"]) for one in answer["choices"]] == [5, 5]
    assert answer["usage"] == {"prompt_tokens": 2, "completion_tokens": 10, "total_tokens": 12}
    assert [(one.max_new_tokens, one.sampling.seed) for one in script.sequences] == [(9, 5), (9, 6)]
    assert script.cancelled == []


def test_stream_joins_to_the_same_text(client):
    events = chunks(complete(client, stream=True, echo=True, n=2, stream_options={"include_usage": True}))
    for index in range(2):
        mine = [one["choices"][0] for one in events[:-1] if one["choices"][0]["index"] == index]
        assert "".join(one["text"] for one in mine) == "ab" + TEXT
        assert [one["finish_reason"] for one in mine] == [None] * (len(mine) - 1) + ["stop"]
    assert events[-1]["usage"]["completion_tokens"] == 10 and events[-1]["choices"] == []


def test_stream_has_the_same_log_probabilities_of_prompt_and_answer(client):
    fields = {"prompt": ["abc", "d"], "echo": True, "logprobs": 1, "max_tokens": 9}
    whole = complete(client, **fields).json()["choices"]
    events = [one["choices"][0] for one in chunks(complete(client, stream=True, **fields))]
    for index, expected in enumerate(whole):
        mine = [one["logprobs"] for one in events if one["index"] == index]
        for name, values in expected["logprobs"].items():
            assert [value for one in mine for value in one[name]] == values, name
        assert len(expected["logprobs"]["tokens"]) == (8, 6)[index]


def test_refusals_have_openais_form(client, front):
    for fields, status, param in (
        ({"model": "other"}, 404, "model"),
        ({"temperature": "hot"}, 400, "temperature"),
        ({"max_tokens": 96}, 400, "max_tokens"),
        ({"prompt": "x" * 3_000}, 413, None),
        ({"n": 5}, 429, None),
        ({"tools": [{"type": "function"}]}, 400, "tools"),
    ):
        response = complete(client, **fields)
        problem = response.json()["error"]
        assert (response.status_code, problem["param"]) == (status, param), fields
        assert problem["message"] and problem["type"]
        assert ("retry-after" in response.headers) == (status == 429)
    assert client.post("/v1/completions", content=b"{", headers={"content-type": "application/json"}).status_code == 400
    assert client.get("/v1/completions").json()["error"]["type"] == "invalid_request_error"
    assert client.get("/nowhere").status_code == 404
    assert not front.open
    for prompt, field in (("\ud800", "prompt"), ("a", "unknown\ud800")):
        body = json.dumps({"model": "tiny", "prompt": prompt, field: prompt})
        assert (
            client.post("/v1/completions", content=body, headers={"content-type": "application/json"}).status_code
            == 400
        )
    assert 'longctx_requests_total{end="refused"} 11.0' in client.get("/metrics").text


def test_error_of_the_server_is_500_or_ends_the_stream(client, script):
    script.failing = True
    response = complete(client)
    assert (response.status_code, response.json()["error"]["message"]) == (500, "lost rank 1")
    page = client.get("/metrics").text
    assert 'longctx_requests_total{end="failed"} 1.0' in page and 'end="refused"' not in page
    last = complete(client, stream=True).text.strip().split("\n\n")[-1]
    assert json.loads(last.removeprefix("data: "))["error"]["type"] == "server_error"


def test_error_in_a_stream_has_its_field_and_code(client, front, monkeypatch):
    async def answer(_: Any) -> Any:
        yield 0, Token(0, 1, "h")
        raise RequestRefused("too long", "prompt", code="context_length_exceeded")

    monkeypatch.setattr(front, "answer", answer)
    last = complete(client, stream=True).text.strip().split("\n\n")[-1]
    problem = json.loads(last.removeprefix("data: "))["error"]
    assert (problem["param"], problem["code"]) == ("prompt", "context_length_exceeded")


def test_key_is_asked_for_everywhere_but_health(front):
    client = TestClient(make_app(replace(front, key="s3cret")))
    for header in ({}, {"Authorization": "Bearer wrong"}, {"Authorization": "Bearer s3cret\u00e9".encode("latin-1")}):
        response = client.get("/v1/models", headers=header)
        assert (response.status_code, response.json()["error"]["code"]) == (401, "invalid_api_key")
        assert client.get("/metrics", headers=header).status_code == 401
    assert client.get("/v1/models", headers={"Authorization": "Bearer s3cret"}).json()["data"][0]["id"] == "tiny"
    assert client.get("/health").status_code == 200


@pytest.mark.parametrize(
    ("header", "status"),
    [("bearer s3cret", 200), ("BEARER  s3cret", 200), ("s3cret", 401), ("Basic s3cret", 401), ("Bearers3cret", 401)],
)
def test_key_is_a_bearer_token(front, header, status):
    client = TestClient(make_app(replace(front, key="s3cret")))
    assert client.get("/v1/models", headers={"Authorization": header}).status_code == status


@pytest.mark.parametrize("stream", [True, False])
def test_stopping_server_takes_no_requests(client, front, stream):
    front.closed = "the server is stopping"
    assert complete(client, stream=stream).status_code == 503 == client.get("/health").status_code
    page = client.get("/metrics").text
    assert 'longctx_requests_total{end="refused"} 1.0' in page and 'end="failed"' not in page


JSON = {"content-type": "application/json"}
BODY = json.dumps({"model": "tiny", "prompt": "a"}).encode()
GZIPPED = gzip.compress(BODY, mtime=0)  # with the time, the test would have another name in each process


@pytest.mark.parametrize(
    ("body", "headers", "status", "message"),
    [
        (BODY, {}, 415, "the request has no Content-Type: send Content-Type: application/json"),
        (BODY, {"content-type": "text/plain; charset=utf-8"}, 415, "has Content-Type: text/plain: send Content-Type"),
        (GZIPPED, {**JSON, "content-encoding": "gzip"}, 415, "has Content-Encoding: gzip: send it without"),
        (BODY[:-1], JSON, 400, "the body is not JSON: Expecting ',' delimiter, at character 31"),
        ('{"prompt": "é"}'.encode("latin-1"), JSON, 400, "the body cannot be read .*: send JSON in UTF-8"),
        (b" " * 2_001, JSON, 413, "over 2,000 bytes"),
    ],
)  # fmt: skip
def test_body_that_is_not_read_gets_the_reason_and_is_counted(client, body, headers, status, message):
    response = client.post("/v1/completions", content=body, headers=headers)
    assert response.status_code == status and re.search(message, response.json()["error"]["message"])
    assert 'longctx_requests_total{end="refused"} 1.0' in client.get("/metrics").text
    accepted = {"content-type": "Application/JSON; charset=utf-8", "content-encoding": "identity"}
    assert client.post("/v1/completions", content=BODY, headers=accepted).status_code == 200


def test_times_count_from_the_arrival_and_a_long_text_delays_no_other(front, client):
    """The first request is tokenized until the second is answered: both times have this wait."""
    parse, answered = front.reader.completion, threading.Event()

    def slow(body: Any) -> Any:
        if (body.model_extra or {}).get("user") == "slow":
            assert answered.wait(20)
            time.sleep(0.2)
        return parse(body)

    front.reader = SimpleNamespace(**vars(front.reader), completion=slow)
    with ThreadPoolExecutor(1) as pool:
        long = pool.submit(complete, client, user="slow")
        assert complete(client).status_code == 200
        answered.set()
        assert long.result().status_code == 200
    page = client.get("/metrics").text
    for name in ("ttft", "request"):
        assert float(re.search(rf"longctx_{name}_seconds_sum (\S+)", page)[1]) >= 0.2
        assert f"# HELP longctx_{name}_seconds Time from the arrival of a request's last byte" in page


@pytest.mark.parametrize(("fields", "method"), [({}, "whole"), ({"stream": True, "echo": True}, "first")])
def test_long_response_is_written_beside_the_event_loop(client, monkeypatch, fields, method):
    """The thread of the event loop answers /health while a response is written."""
    write, threads = getattr(Form, method), []

    def watch(*args: Any) -> Any:
        with pytest.raises(RuntimeError, match="no running event loop"):
            asyncio.get_running_loop()
        threads.append(threading.get_ident())
        return write(*args)

    monkeypatch.setattr(Form, method, watch)
    assert complete(client, logprobs=1, **fields).status_code == 200 and threads


def test_tokens_and_figures_are_shown(client):
    assert client.post("/tokenize", json={"prompt": "ab"}).json()["count"] == 2
    complete(client, n=2)
    page = client.get("/metrics").text
    for line in ("longctx_prompt_tokens_total 2.0", "longctx_generated_tokens_total 10.0",
                 'longctx_requests_total{end="answered"} 1.0', "longctx_waiting_sequences 3.0"):  # fmt: skip
        assert line in page


@pytest.mark.parametrize("stream", [True, False])
def test_client_that_goes_away_frees_its_sequence(front, script, stream):
    """The client sends its request, gets the first piece if it is streamed, and closes the connection."""
    script.silent = True
    body = json.dumps({"model": "tiny", "prompt": "ab", "n": 2, "stream": stream}).encode()

    async def run() -> None:
        app, sent, began = make_app(front), [], asyncio.Event()
        arrivals = iter([{"type": "http.request", "body": body, "more_body": False}])

        async def receive() -> dict[str, Any]:
            if (message := next(arrivals, None)) is not None:
                return message
            if stream:
                await began.wait()
            return {"type": "http.disconnect"}

        async def send(message: dict[str, Any]) -> None:
            sent.append(message)
            if message.get("body"):
                began.set()

        headers = [(b"content-type", b"application/json")]
        scope = {"type": "http", "asgi": {"spec_version": "2.3"}, "method": "POST", "path": "/v1/completions",
                 "raw_path": b"", "query_string": b"", "headers": headers, "scheme": "http", "root_path": "",
                 "http_version": "1.1", "client": ("127.0.0.1", 1), "server": ("127.0.0.1", 2)}  # fmt: skip
        await asyncio.wait_for(app(scope, receive, send), 20)

    asyncio.run(run())
    assert sorted(script.cancelled) == [0, 1] and not front.open
