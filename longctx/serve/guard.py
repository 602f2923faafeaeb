"""Checks of a request before the web application reads it: its key, its form and its size."""

from __future__ import annotations

import asyncio
import hmac
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from starlette.exceptions import HTTPException
from starlette.responses import JSONResponse

from longctx.serve.bodies import RequestRefused
from longctx.serve.response import refusal

if TYPE_CHECKING:
    from longctx.serve.app import Front

ARRIVED = "longctx.arrived"  # key of the ASGI scope: `time.perf_counter` when the last byte of the request had arrived


@dataclass(frozen=True)
class Guard:
    """Checks the API key, the form and the size of each request before ``app`` reads it; /health needs no key."""

    app: Any
    front: Front

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        """Handle one request, with the arguments of an ASGI application."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        size = 0

        async def receive_bounded() -> Any:
            nonlocal size
            message = await receive()
            if message["type"] == "http.request":
                scope[ARRIVED] = time.perf_counter()
            size += len(message.get("body", b""))
            if size > self.front.max_bytes:
                raise HTTPException(413, f"the request has over {self.front.max_bytes:,} bytes: send a shorter one")
            return message

        try:
            self._refuse(scope)
        except RequestRefused as refused:
            self.front.metrics.count_refusal()
            await JSONResponse(refusal(refused), refused.status)(scope, receive, send)
            return
        try:
            await self.app(scope, receive_bounded, send)
        except asyncio.CancelledError:
            self.front.cut += 1
            raise

    def _refuse(self, scope: Any) -> None:
        headers = {name: value.decode("latin-1") for name, value in scope["headers"]}
        if scope["path"] != "/health" and self.front.key is not None:
            _refuse_key(headers.get(b"authorization", ""), self.front.key)
        if scope["method"] == "POST":
            _refuse_form(headers)


def _refuse_key(header: str, key: str) -> None:
    """Raise `RequestRefused` unless the ``header`` Authorization has the API ``key``."""
    scheme, _, given = header.partition(" ")
    if scheme.lower() != "bearer" or not hmac.compare_digest(given.strip().encode(), key.encode()):
        message = "the API key is missing or wrong: send the header Authorization: Bearer KEY"
        raise RequestRefused(message, status=401, code="invalid_api_key")


def _refuse_form(headers: Mapping[bytes, str]) -> None:
    """Raise `RequestRefused` unless the ``headers`` of a request announce JSON that is not compressed."""
    kind = headers.get(b"content-type", "").partition(";")[0].strip().lower()
    coding = headers.get(b"content-encoding", "identity").strip()
    if not kind.startswith("application/") or not kind.endswith(("/json", "+json")):
        given = f"Content-Type: {kind}" if kind else "no Content-Type"
        raise RequestRefused(f"the request has {given}: send Content-Type: application/json", status=415)
    if coding.lower() != "identity":
        raise RequestRefused(f"the request has Content-Encoding: {coding}: send it without one", status=415)
