"""The gateway's figures for Prometheus: what an operator sees anyway, and what workers tell of their stages.

Of stages there are histograms for each pool, over all of its workers and models. Workers hold back what would
tell of single answers (docs/threat-model.md).
"""

from __future__ import annotations

import time
from collections import Counter as Count
from collections import OrderedDict
from collections.abc import Iterable, Iterator
from typing import Final

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.metrics_core import HistogramMetricFamily

from cloister.core.protocol import stages
from cloister.core.protocol.stages import BOUNDS, Figures

CONTENT_TYPE: Final = "text/plain; version=0.0.4; charset=utf-8"
MAX_WORKERS: Final = 4096  # whose figures are remembered
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

        self._stages = _Stages()
        self._registry.register(self._stages)

    def take(self, worker: str, pool: str, figures: Figures) -> None:
        """Count what a worker has told of its stages since it told of them before.

        Args:
            worker: Its id.
            pool: Its pool.
            figures: All that it counted since it started.
        """
        self._stages.take(worker, self._label(pool), figures)

    def observe(self, pool: str, outcome: str, seconds: float, received: int, sent: int) -> None:
        """Count one request.

        Args:
            pool: A pool that exists, or ``unknown``.
            outcome: ``ok``, ``gone`` where the client didn't wait, or an error's code.
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


class _Stages:
    """Collects workers' histograms by pool: a sum that only grows, whatever workers come and go."""

    def __init__(self) -> None:
        self._before: OrderedDict[str, Figures] = OrderedDict()  # by worker, the last to tell at the end
        self._sums: dict[tuple[str, str], stages.Histogram] = {}  # by pool and stage
        self._began = time.monotonic()

    def take(self, worker: str, pool: str, figures: Figures) -> None:
        before = self._before.pop(worker, None)
        self._before[worker] = figures
        if len(self._before) > MAX_WORKERS:
            self._before.popitem(last=False)
        if before is None and figures.age > time.monotonic() - self._began:
            return  # it is older than this gateway, whose sums have no place for its past
        restarted = before is None or figures.age < before.age
        for name, now in figures.stages.items():
            then = None if restarted or before is None else before.stages.get(name)
            new = now if then is None else now.since(then)
            self._sums.setdefault((pool, name), stages.Histogram()).add(new)

    def collect(self) -> Iterator[HistogramMetricFamily]:
        """What the registry asks for."""
        family = HistogramMetricFamily(
            "cloister_stage_seconds",
            "Stages of workers' starts and loads; those of answers, many at a time",
            labels=("pool", "stage"),
        )
        for (pool, name), each in sorted(self._sums.items()):
            total, buckets = 0, []
            for bound, count in zip((*map(str, BOUNDS), "+Inf"), each.counts, strict=True):
                total += count
                buckets.append((bound, total))
            family.add_metric((pool, name), buckets, each.seconds)
        yield family
