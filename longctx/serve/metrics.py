"""Metrics of a server in Prometheus' format."""

import time
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from typing import Any

from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from longctx.serve.bodies import RequestRefused
from longctx.serve.request import Ask
from longctx.serve.service import Service, Token

_SECONDS = (0.01, 0.03, 0.1, 0.3, 1, 3, 10, 30, 100, 300)  # upper ends of the histograms' buckets
_FROM = "Time from the arrival of a request's last byte, before it is tokenized, until its "


class Metrics:
    """Counts requests and tokens.

    ``gauges`` has functions by metric name, to which the page adds ``longctx_``.  They are called when the page is
    requested.  A function in ``by_rank`` returns one value for each ring rank.
    """

    def __init__(
        self,
        gauges: Mapping[str, Callable[[], float]],
        by_rank: Mapping[str, Callable[[], Sequence[float]]] | None = None,
    ) -> None:
        self._registry = registry = CollectorRegistry()
        self._requests = Counter("longctx_requests", "Requests, by how they ended", ["end"], registry=registry)
        self._prompt = Counter("longctx_prompt_tokens", "Tokens of prompts, each counted once", registry=registry)
        self._generated = Counter("longctx_generated_tokens", "Tokens of answers", registry=registry)
        self._ttft = Histogram(
            "longctx_ttft_seconds", f"{_FROM}first token is ready", buckets=_SECONDS, registry=registry
        )
        self._whole = Histogram(
            "longctx_request_seconds", f"{_FROM}last token is ready", buckets=_SECONDS, registry=registry
        )
        self._open = Gauge("longctx_open_sequences", "Sequences that wait or are answered", registry=registry)
        for name, read in gauges.items():
            note = ", a prompt counted once per answer" if name.startswith("prefix_") else ""
            Gauge(f"longctx_{name}", name.replace("_", " ") + note, registry=registry).set_function(read)
        self._by_rank = {
            Gauge(f"longctx_{name}", name.replace("_", " "), ["ring_rank"], registry=registry): read
            for name, read in (by_rank or {}).items()
        }

    async def watch(
        self, ask: Ask, events: AsyncIterator[tuple[int, Token]], arrived: float
    ) -> AsyncIterator[tuple[int, Token]]:
        """Yield ``events`` unchanged, (choice, token) in answer to ``ask``; count and time them on the way.

        ``arrived`` is the value of `time.perf_counter` when the request had arrived.
        """
        first, end = True, "cancelled"
        try:
            async for event in events:
                if first:
                    self._prompt.inc(sum(map(len, ask.prompts)))
                    self._ttft.observe(time.perf_counter() - arrived)
                    first = False
                self._generated.inc(event[1].token is not None)
                yield event
            end = "answered"
            self._whole.observe(time.perf_counter() - arrived)
        except RequestRefused as refused:
            end = "" if is_refusal(refused.status) else "failed"  # refusals are counted by `count_refusal`
            raise
        finally:
            await events.aclose()  # type: ignore[attr-defined]
            if end:
                self._requests.labels(end).inc()

    def count_refusal(self) -> None:
        """Count a request that was refused (see `is_refusal`)."""
        self._requests.labels("refused").inc()

    def page(self, open_sequences: int) -> tuple[bytes, str]:
        """Return the page /metrics in Prometheus' text format, and its content type."""
        self._open.set(open_sequences)
        for gauge, read in self._by_rank.items():
            for rank, figure in enumerate(read()):
                gauge.labels(rank).set(figure)
        page: Any = generate_latest(self._registry)
        return page, CONTENT_TYPE_LATEST


def is_refusal(status: int) -> bool:
    """Return True if HTTP ``status`` says that a request was not accepted; 503 is that of a server that is stopping."""
    return 400 <= status < 500 or status == 503


def metrics_of(service: Service) -> Metrics:
    """Return the metrics that read their values from ``service``, for Prometheus."""
    return Metrics(
        {
            "running_sequences": lambda: len(service.scheduler.running),
            "waiting_sequences": lambda: len(service.scheduler.waiting),
            "steps": lambda: service.passes,
            "busy_seconds": lambda: service.seconds,
            "prefix_asked_tokens": lambda: service.prefixes.asked,
            "prefix_reused_tokens": lambda: service.prefixes.reused,
            "prefix_reused_restored_tokens": lambda: service.prefixes.reused_restored,
            "prefix_hit_rate": lambda: service.prefixes.hit_rate,
            "evicted_pages": lambda: service.prefixes.evicted,
        },
        {"cache_bytes": lambda: service.sequence_bytes, "page_bytes": lambda: service.page_bytes},
    )
