"""Wires a worker together: joins its pool, renews its lease, serves until it is told to stop."""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
from pathlib import Path
from typing import Final

from cloister.core.protocol.configuration import EnclaveConfiguration
from cloister.enclave.attester import Attester
from cloister.enclave.clock import HintedClock
from cloister.enclave.link import HostLink
from cloister.enclave.server import EnclaveServer
from cloister.enclave.worker.isolation import Children
from cloister.enclave.worker.membership import Membership
from cloister.enclave.worker.models import ModelCache, slot_name
from cloister.enclave.worker.routes import WorkerRoutes
from cloister.enclave.worker.scheduler import Scheduler
from cloister.errors import CloisterError
from cloister.net.front import serve as serve_front
from cloister.net.messages import Answer, Limits

logger: Final = logging.getLogger(__name__)
LIMITS: Final = Limits(max_body=64 << 20)
RETRY: Final = (0.1, 0.2, 0.5, 1.0, 2.0)  # seconds between attempts to join or renew
KEY_CHECK: Final = 5.0  # seconds between looks for keys that died
MIN_REFRESH: Final = 0.5  # seconds between renewals that users ask for


class Worker:
    """Owns the renewal of one worker's lease; everything else hangs on its `membership`."""

    def __init__(self, membership: Membership, models: ModelCache) -> None:
        self.membership: Final = membership
        self.server: EnclaveServer | None = None
        self.problem = ""  # code of the error that keeps the worker out, for the host's health check
        self._models = models
        self._lock = asyncio.Lock()
        self._began = float("-inf")  # the last renewal, whatever came of it

    async def refresh(self) -> None:
        """Renew, `MIN_REFRESH` after the last one at the earliest; one serves all who asked before it began.

        Never raises. It waits rather than leaves it: what was published a moment ago must not seem absent.
        """
        loop = asyncio.get_running_loop()
        asked = loop.time()
        async with self._lock:
            if self._began > asked:
                return
            await asyncio.sleep(max(0.0, self._began + MIN_REFRESH - loop.time()))
            try:
                await self._renew()
            except CloisterError as error:
                logger.warning("%s: %s", error.code, error)

    async def keep(self, stop: asyncio.Event) -> None:
        """Join, then renew in good time, until ``stop``; a failure leaves the lease to run out."""
        failures = 0
        while not stop.is_set():
            try:
                async with self._lock:
                    await self._renew()
                failures = 0
                pause = self.membership.lease_seconds / 3
            except CloisterError as error:
                self.problem = error.code
                logger.warning("%s: %s", error.code, error)
                pause = RETRY[min(failures, len(RETRY) - 1)]
                failures += 1
            await self._wait(stop, pause)

    async def _wait(self, stop: asyncio.Event, seconds: float) -> None:
        """Wait; meanwhile keys that die are dropped, also while the key service is away."""
        loop = asyncio.get_running_loop()
        until = loop.time() + seconds
        while not stop.is_set() and (left := until - loop.time()) > 0:
            self._serve_keys()
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(stop.wait(), min(left, KEY_CHECK))

    async def _renew(self) -> None:
        self._began = asyncio.get_running_loop().time()
        await self.membership.renew()
        self.problem = ""
        self._serve_keys()
        self._models.retain({slot_name(live.statement) for live in self.membership.models.values()})

    def _serve_keys(self) -> None:
        if self.server is not None:
            self.server.replace_keys(self.membership.private_keys())

    def health(self) -> Answer:
        """What the host may know: whether requests can be served, what is in the way, when each step ended.

        The steps are those of joining, in monotonic seconds of the machine; the first is the process's start.
        """
        ready = self.membership.active
        body = json.dumps(
            {
                "ready": ready,
                "pool": self.membership.pool_id.hex(),
                "problem": self.problem,
                "steps": self.membership.steps,
            }
        ).encode()
        return Answer(status=200 if ready else 503, content_type=b"application/json", body=body)


async def serve(
    configuration: EnclaveConfiguration, attester: Attester, link: HostLink, socket: Path, stop: asyncio.Event
) -> None:
    """Serve until ``stop`` is set."""
    settings, clock = configuration.settings, HintedClock()
    membership = Membership(link, attester, configuration, clock)
    children = Children(threads=settings["threads"]) if membership.pool.shared else None
    models = ModelCache(link, budget=settings["memory_mib"] << 20, children=children)
    worker = Worker(membership, models)
    with (
        Scheduler(threads=settings["threads"], queue=settings["queue"]) as scheduler,
        contextlib.nullcontext() if children is None else contextlib.closing(children),  # ends its runs
    ):
        routes = WorkerRoutes(membership, models, clock, scheduler, refresh=worker.refresh)
        worker.server = EnclaveServer(routes, renew=worker.refresh, encrypted=routes.ladder.encrypted)
        gets = {b"/healthz": worker.health, b"/stages": routes.ladder.answer}
        front = await serve_front(worker.server.handle, unix=socket, gets=gets, limits=LIMITS)
        try:
            await worker.keep(stop)
        finally:
            await front.close()
