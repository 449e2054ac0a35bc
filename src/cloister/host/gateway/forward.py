"""Forwarding of encapsulated requests to a worker of their pool.

A request goes to another worker only while it is certain that none of its bytes left. After that the gateway
never sends them again: a worker may have executed it, and only the client can tell, by encapsulating anew.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Final

from cloister.core.protocol import outer
from cloister.errors import CloisterError, FormatError, TransportError
from cloister.host.gateway.metrics import Metrics
from cloister.host.gateway.registry import Registry, Worker
from cloister.host.problems import problem, status_of
from cloister.net.body import Body
from cloister.net.front import Answer, Head, Limits, Tap
from cloister.net.link import Peer, Upstream

REQUEST_TYPE: Final = b"message/ohttp-req"
MAX_EARLY: Final = 64  # requests that are passed on while they arrive; others wait until they are whole
_FIELDS: Final = ((b"content-type", REQUEST_TYPE),)
_PASSED_ON: Final = (outer.POOL, outer.MODEL, outer.DEADLINE)
_PASSED_BACK: Final = frozenset({b"retry-after", b"cache-control"})
_TARGET: Final = b"/ohttp"
_EARLY: Final = 4 << 10  # bytes of a body after which it is passed on while it arrives
_STATUS: Final = {"transport.timeout": 504, "gateway.content-type": 415}


class Forwarder:
    """Answers ``POST /ohttp`` with what a worker of the named pool answers.

    Args:
        registry: The workers.
        metrics: Where requests are counted.
        limits: For the links to workers.
        timeout: Seconds that a worker may take.
        clock: The registry's clock, in seconds.
        tap: Sees every byte on the links.
    """

    def __init__(
        self,
        registry: Registry,
        metrics: Metrics,
        *,
        limits: Limits | None = None,
        timeout: float = 120.0,
        clock: Callable[[], float] = time.monotonic,
        tap: Tap | None = None,
    ) -> None:
        self._registry = registry
        self._metrics = metrics
        self._limits = limits or Limits()
        self._timeout = timeout
        self._clock = clock
        self._tap = tap
        self._links: dict[Path, Upstream] = {}
        self._early: set[Body] = set()  # requests that were passed on before they were whole, at least

    async def handle(self, head: Head, body: Body, *, sender: bytes = b"") -> Answer:
        """Answer one request; every error becomes a problem.

        Args:
            head: Its head.
            body: Its body, passed on as it comes.
            sender: Whose socket it came through; empty for the public. What a peer says of that is dropped.
        """
        start = time.monotonic()
        pool, outcome = "unknown", "ok"
        try:
            name = head.fields.get(outer.POOL, b"").decode("latin-1")
            if head.fields.get(b"content-type") != REQUEST_TYPE:
                raise FormatError(
                    "not encapsulated", code="gateway.content-type", expected="message/ohttp-req"
                )
            if not name:
                raise FormatError("no pool is named", code="gateway.pool", claim="cloister-pool")
            if self._registry.knows(name):  # else the label of the metric would be the peer's to choose
                pool = name
            answer = await self._forward(name, head, body, sender)
        except CloisterError as error:
            outcome = error.code
            status = _STATUS.get(error.code) or status_of(error)
            answer = problem(status, error.code, retry_after=1 if status == 503 else 0)
        except asyncio.CancelledError:
            self._metrics.observe(pool, "gone", time.monotonic() - start, body.received, 0)
            raise
        seconds = time.monotonic() - start
        self._metrics.observe(pool, outcome, seconds, body.received, len(answer.body))
        return answer

    async def prune(self) -> None:
        """Forget workers whose heartbeat is over, and close the connections that nobody uses any more."""
        now = self._clock()
        self._registry.expire(now)
        used = {each.worker.socket for each in self._registry.workers(now)}
        idle = {each: link for each, link in self._links.items() if each not in used and not link.busy}
        for socket in idle:
            del self._links[socket]
        for link in idle.values():
            await link.aclose()
        for link in self._links.values():
            link.trim(asyncio.get_running_loop().time())

    async def aclose(self) -> None:
        """Close all links."""
        links = list(self._links.values())
        self._links.clear()
        for link in links:
            await link.aclose()

    def link(self, worker: Worker) -> Upstream:
        """The link to a worker, opened at its first request."""
        found = self._links.get(worker.socket)
        if found is None:
            idle = self._limits.max_connections  # as many as were needed at once are kept, for some seconds
            found = Upstream(Peer(unix=worker.socket), max_idle=idle, limits=self._limits, tap=self._tap)
            self._links[worker.socket] = found
        return found

    async def _forward(self, pool: str, head: Head, body: Body, sender: bytes) -> Answer:
        """Try workers until one has taken the request."""
        if body.received < _EARLY:
            await body.more(min(len(body), _EARLY) - 1)  # who sends nothing occupies no worker
        if not body.complete and not self._passes_early():
            await body.whole()
        fields = _FIELDS + tuple((name, head.fields[name]) for name in _PASSED_ON if name in head.fields)
        if sender:
            fields += ((outer.SENDER, sender),)
        tried: frozenset[str] = frozenset()
        self._early.add(body)
        try:
            while True:
                entry = self._registry.choose(pool, self._clock(), tried=tried)
                entry.in_flight += 1
                try:
                    answer = await self.link(entry.worker).request(
                        b"POST", _TARGET, fields, body, timeout=self._timeout
                    )
                    break
                except TransportError as error:
                    if error.sent:
                        raise
                    entry.suspect = True
                    tried |= {entry.worker.id}
                finally:
                    entry.in_flight -= 1
        finally:
            self._early.discard(body)
        if answer.fields:
            passed = tuple(each for each in answer.fields if each[0] in _PASSED_BACK)
            answer = replace(answer, fields=passed)
        return answer

    def _passes_early(self) -> bool:
        """Whether one more request may occupy a worker before all of it is there.

        What halts then holds at most so many connections to workers, and keeps no whole request from them.
        """
        if len(self._early) >= MAX_EARLY:
            self._early = {each for each in self._early if not each.complete}
        return len(self._early) < MAX_EARLY
