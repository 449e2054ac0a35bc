"""The gateway's figures for Prometheus. They say what an operator sees anyway."""

from __future__ import annotations

from collections import Counter as Count
from collections.abc import Iterable
from typing import Final

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

CONTENT_TYPE: Final = "text/plain; version=0.0.4; charset=utf-8"
MAX_POOLS: Final = 64  # label values; a peer can't grow memory with pools that it invents
_SECONDS: Final = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)


class Metrics:
    """One gateway's metrics, in a collector registry of its own."""

    def __init__(self) -> None:
        self._registry = CollectorRegistry()
        self._pools: set[str] = set()
        self._requests = Counter(
            "cloister_gateway_requests", "Requests for /ohttp", ["pool", "outcome"], registry=self._registry
        )
        self._seconds = Histogram(
            "cloister_gateway_seconds",
            "Time from a whole request to its answer",
            ["pool"],
            buckets=_SECONDS,
            registry=self._registry,
        )
        self._bytes = Counter(
            "cloister_gateway_bytes", "Body bytes of /ohttp", ["direction"], registry=self._registry
        )
        self._workers = Gauge(
            "cloister_gateway_workers", "Workers that are up", ["pool"], registry=self._registry
        )

    def observe(self, pool: str, outcome: str, seconds: float, received: int, sent: int) -> None:
        """Count one request.

        Args:
            pool: A pool that exists, or ``unknown``.
            outcome: ``ok``, or the last part of an error's code.
            seconds: Until the answer.
            received: Bytes of the request's body.
            sent: Bytes of the answer's body.
        """
        label = self._label(pool)
        self._requests.labels(label, outcome).inc()
        self._seconds.labels(label).observe(seconds)
        self._bytes.labels("in").inc(received)
        self._bytes.labels("out").inc(sent)

    def render(self, pools_of_workers: Iterable[str]) -> bytes:
        """The exposition text, with one pool named per worker that is up."""
        counts = Count(self._label(pool) for pool in pools_of_workers)
        self._workers.clear()
        for label, count in counts.items():
            self._workers.labels(label).set(count)
        return generate_latest(self._registry)

    def _label(self, pool: str) -> str:
        if pool not in self._pools:
            if len(self._pools) >= MAX_POOLS:
                return "other"
            self._pools.add(pool)
        return pool
