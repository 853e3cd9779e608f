"""Prometheus metrics of the server, in a separate registry."""

from __future__ import annotations

import time
import traceback
from collections.abc import Iterator
from typing import TYPE_CHECKING

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.registry import Collector
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from loratune import console
from loratune.generation.server.failures import ApiError
from loratune.generation.server.request_queue import Queue

if TYPE_CHECKING:
    from loratune.engine.adapter_store import AdapterStore

SECONDS = (0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300)
HEADERS = {
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cache-control": "no-store",
    "content-security-policy": "default-src 'none'; frame-ancestors 'none'",
    "cross-origin-resource-policy": "same-origin",
}
"""Default headers of every response."""


class Metrics:
    """All metrics of one server."""

    def __init__(self, queue: Queue) -> None:
        self.registry = CollectorRegistry()
        self.requests = Counter(
            "loratune_requests", "Requests by path and status.", ["path", "status"], registry=self.registry
        )
        self.answers = Counter(
            "loratune_answers", "Answers by model and how they ended.", ["model", "finish"], registry=self.registry
        )
        self.tokens = Counter("loratune_tokens", "Tokens by model and kind.", ["model", "kind"], registry=self.registry)
        self.first = Histogram(
            "loratune_first_token_seconds", "Time to first token.", registry=self.registry, buckets=SECONDS
        )
        self.whole = Histogram("loratune_answer_seconds", "Time of an answer.", registry=self.registry, buckets=SECONDS)
        running = Gauge("loratune_running", "Requests being answered.", registry=self.registry)
        running.set_function(lambda: min(len(queue.replies), queue.slots))
        waiting = Gauge("loratune_waiting", "Requests waiting for a slot.", registry=self.registry)
        waiting.set_function(lambda: max(0, len(queue.replies) - queue.slots))

    def add_store(self, store: AdapterStore) -> None:
        """Show what a store of adapters does."""
        self.registry.register(_OfStore(store))

    def page(self) -> bytes:
        """Return the metrics in Prometheus' text format."""
        return generate_latest(self.registry)


class _OfStore(Collector):
    def __init__(self, store: AdapterStore) -> None:
        self._store = store

    def collect(self) -> Iterator[CounterMetricFamily | GaugeMetricFamily]:
        store = self._store
        yield CounterMetricFamily("loratune_adapter_loads", "Adapters read into memory.", value=store.loads)
        yield CounterMetricFamily("loratune_adapter_evictions", "Adapters that made room.", value=store.evictions)
        yield GaugeMetricFamily("loratune_adapters_in_memory", "Adapters in memory.", value=store.in_memory)


class MetricsMiddleware:
    """The outermost middleware: counts responses, adds default headers, and turns exceptions into status 500."""

    def __init__(self, app: ASGIApp, metrics: Metrics) -> None:
        self.app = app
        self.metrics = metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        status = 0

        async def sent(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                present = {name.lower() for name, _ in message["headers"]}
                added = [(name.encode(), value.encode()) for name, value in HEADERS.items()]
                message["headers"] += [pair for pair in added if pair[0] not in present]
            await send(message)

        try:
            await self.app(scope, receive, sent)
        except Exception as bug:
            console.error("".join(traceback.format_exception(bug)))
            if status:
                raise  # closes the connection, so that the answer does not look complete
            await ApiError(500, "a bug in the server; its output has the details").response()(scope, receive, sent)
        path = getattr(scope.get("route"), "path", "other")
        self.metrics.requests.labels(path, str(status or 499)).inc()


class Stopwatch:
    """Reports the timing and tokens of one answer to the metrics."""

    def __init__(self, metrics: Metrics, model: str, started: float) -> None:
        self._metrics = metrics
        self._model = model
        self._started = started
        self._has_begun = False

    def text_came(self) -> None:
        """Record the time to the first text."""
        if not self._has_begun:
            self._has_begun = True
            self._metrics.first.observe(time.monotonic() - self._started)

    def ended(self, finish: str, prompt_tokens: int, tokens: int) -> None:
        """Record the end of the answer.

        Args:
            finish: stop, length, cancelled or error.
            prompt_tokens: tokens of the prompt.
            tokens: generated tokens.
        """
        self._metrics.answers.labels(self._model, finish).inc()
        self._metrics.tokens.labels(self._model, "prompt").inc(prompt_tokens)
        self._metrics.tokens.labels(self._model, "answer").inc(tokens)
        self._metrics.whole.observe(time.monotonic() - self._started)
