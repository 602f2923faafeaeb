"""The web server's thread ends when it is told to, or serving fails."""

import socket
from unittest.mock import Mock

import pytest
import uvicorn

from longctx.serve.app import Front
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
