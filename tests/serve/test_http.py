"""The web server's thread ends when it is told to, or serving fails."""

import socket
import threading
from unittest.mock import Mock

import pytest
import uvicorn

from longctx.serve import http
from longctx.serve.app import Front
from longctx.serve.guard import Guard
from longctx.serve.http import serve
from longctx.serve.service import Service


async def no_app(scope: object, receive: object, send: object) -> None:
    """Answer no request."""


def serve_nothing(service: Service, *, stopping: bool) -> None:
    with socket.create_server(("127.0.0.1", 0)) as at:
        serve(service, Mock(Front, closed=None), no_app, at, lambda: stopping)


def test_server_that_is_told_to_stop_lets_the_ranks_leave():
    service = Mock(Service, busy=False)
    serve_nothing(service, stopping=True)
    service.stop.assert_called_once_with()
    service.fail.assert_not_called()


def test_server_that_ends_by_itself_is_a_failure(monkeypatch):
    monkeypatch.setattr(uvicorn.Server, "run", lambda *_, **__: None)
    service = Mock(Service, busy=True)
    with pytest.raises(RuntimeError, match="the web server has ended by itself"):
        serve_nothing(service, stopping=False)
    service.fail.assert_called_once()


@pytest.mark.parametrize("half", ["request", "answer"])
def test_slow_client_is_counted_and_prints_no_traceback(half, monkeypatch, caplog):
    """It has sent half of its request, or its answer is not complete, when the server stops."""
    monkeypatch.setattr(http, "GRACE_S", 0.2)
    begun, front = threading.Event(), Mock(Front, closed=None, key=None, max_bytes=100, cut=0)

    async def begin(scope, receive, send):
        await receive()
        if half == "answer":
            await send({"type": "http.response.start", "status": 200, "headers": []})
        begun.set()
        while True:
            await receive()

    with socket.create_server(("127.0.0.1", 0)) as at, socket.create_connection(at.getsockname()) as client:
        headers = b"Host: a\r\nContent-Type: application/json\r\nContent-Length: 9"
        client.sendall(b"POST / HTTP/1.1\r\n" + headers + b"\r\n\r\nabcd")
        serve(Mock(Service, busy=False), front, Guard(begin, front), at, begun.is_set)
    assert front.cut == 1 and not caplog.records
