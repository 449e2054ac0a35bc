"""The gateway's figures for Prometheus: what an operator sees anyway, and what workers tell of their stages.

A request only adds to plain numbers; they take Prometheus' form when somebody asks for them. Of stages there
are histograms for each pool, over all of its workers and models. Workers hold back what would tell of single
answers (docs/threat-model.md).
"""

from __future__ import annotations

import time
from bisect import bisect_left
from collections import Counter as Count
from collections import OrderedDict
from collections.abc import Iterable, Iterator
from typing import Final

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
    Metric,
)

from cloister.core.protocol import stages
from cloister.core.protocol.stages import BOUNDS, Figures

CONTENT_TYPE: Final = "text/plain; version=0.0.4; charset=utf-8"
MAX_WORKERS: Final = 4096  # whose figures are remembered
MAX_POOLS: Final = 64  # label values; a peer can't grow memory with pools that it invents
_SECONDS: Final = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)


class Metrics:
    """One gateway's metrics, in a collector registry of its own."""

    def __init__(self) -> None:
        self._registry = CollectorRegistry()
        self._registry.register(self)
        self._requests: dict[tuple[str, str], int] = {}  # by pool and outcome
        self._seconds: dict[str, list[float]] = {}  # by pool: requests per bucket, then the sum of seconds
        self._received = 0
        self._sent = 0
        self._workers: Count[str] = Count()

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
        self._requests[label, outcome] = self._requests.get((label, outcome), 0) + 1
        times = self._seconds[label]
        times[bisect_left(_SECONDS, seconds)] += 1
        times[-1] += seconds
        self._received += received
        self._sent += sent

    def render(self, pools_of_workers: Iterable[str]) -> bytes:
        """The exposition text, with one pool named per worker that is up."""
        self._workers = Count(self._label(pool) for pool in pools_of_workers)
        return generate_latest(self._registry)

    def collect(self) -> Iterator[Metric]:
        """The figures as Prometheus' registry asks for them."""
        requests = CounterMetricFamily(
            "cloister_gateway_requests", "Requests for /ohttp", labels=("pool", "outcome")
        )
        for labels, count in self._requests.items():
            requests.add_metric(labels, count)
        yield requests
        seconds = HistogramMetricFamily(
            "cloister_gateway_seconds", "Time from a request's head to its answer", labels=("pool",)
        )
        for pool, (*counts, total) in self._seconds.items():
            bounds = [*map(str, _SECONDS), "+Inf"]
            up_to = [(bound, sum(counts[: n + 1])) for n, bound in enumerate(bounds)]
            seconds.add_metric((pool,), up_to, total)
        yield seconds
        size = CounterMetricFamily("cloister_gateway_bytes", "Body bytes of /ohttp", labels=("direction",))
        size.add_metric(("in",), self._received)
        size.add_metric(("out",), self._sent)
        yield size
        workers = GaugeMetricFamily("cloister_gateway_workers", "Workers that are up", labels=("pool",))
        for pool, count in self._workers.items():
            workers.add_metric((pool,), count)
        yield workers

    def _label(self, pool: str) -> str:
        if pool not in self._seconds:
            if len(self._seconds) >= MAX_POOLS:
                pool = "other"
            self._seconds.setdefault(pool, [0.0] * (len(_SECONDS) + 2))
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
