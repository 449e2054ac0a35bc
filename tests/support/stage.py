"""A whole service in one process: key service, gateway and one worker that really runs models."""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

import httpx
import numpy as np

from cloister.client.identity import Identity
from cloister.core.protocol.flow import drive_async
from cloister.core.protocol.statement import SealedModel, Statement, model_id
from cloister.core.protocol.trust import UserPolicy
from cloister.core.sealing import Section, seal
from cloister.core.secret import Secret
from cloister.enclave.clock import HintedClock
from cloister.enclave.server import EnclaveServer
from cloister.enclave.worker.main import Worker
from cloister.enclave.worker.membership import Membership
from cloister.enclave.worker.models import ModelCache
from cloister.enclave.worker.routes import WorkerRoutes
from cloister.enclave.worker.scheduler import Scheduler
from cloister.net.body import Body
from cloister.net.messages import Answer, Head
from cloister.owner.model import load_model
from support.realm import (
    DAY,
    KEY_SERVICE,
    NOW,
    WORKER,
    Attester,
    Backstage,
    Realm,
    gateway,
    policy,
    statement,
)

DIGITS: Final = Path(__file__).resolve().parents[2] / "examples" / "models" / "digits.onnx"
IMAGE: Final = np.random.default_rng(5).random((2, 1, 8, 8), dtype=np.float32)
USER: Final = Identity(Secret(b"u" * 32))


class Stage:
    """Key service and worker; `send` is the gateway. Make it with `open`, in the loop that shall run it.

    Attributes:
        outgoing: Every outer request, in order.
        before: Called with each; may give an answer, or raise, in place of the service.
    """

    def __init__(self, realm: Realm) -> None:
        self.realm = realm
        self.outgoing: list[Any] = []
        self.pauses: list[float] = []
        self.before: Callable[[Any], Answer | None] = lambda outgoing: None
        self.after: Callable[[Any, Answer], Answer] = lambda outgoing, answer: answer
        self.pool = realm.pool
        clock = HintedClock(realm.clock)
        self.membership = Membership(
            realm.host,  # type: ignore[arg-type]
            Attester(WORKER, realm.clock),
            realm.worker_configuration(),
            clock,
        )
        cache = ModelCache(realm.host, budget=64 << 20)  # type: ignore[arg-type]
        self.worker = Worker(self.membership, cache)
        self.scheduler = Scheduler(threads=1, queue=64)
        self.routes = WorkerRoutes(self.membership, cache, clock, self.scheduler, refresh=self.worker.refresh)
        self.worker.server = EnclaveServer(self.routes, renew=self.worker.refresh)

    @classmethod
    async def open(cls, *, publish: bool = True, **settings: int) -> Stage:
        realm = await Realm.start(**settings)
        stage = cls(realm)
        await realm.create_pool(owner=realm.owner.thumbprint)
        if publish:
            await stage.publish()
            await stage.worker.refresh()
        return stage

    @property
    def model(self) -> str:
        return model_id(self.realm.owner.thumbprint, "digits")

    async def publish(self, *, user: Identity = USER) -> Statement:
        """Seal the digits and publish them, granted to the user."""
        split = load_model(DIGITS)
        made = seal(
            [Section.of("graph", split.graph), Section.of("weights", split.weights)],
            model_id=self.model,
            key=Secret(b"K" * 32),
        )
        blob = b"".join(bytes(piece) for piece in made)
        digest = hashlib.sha256(blob).digest()
        self.realm.host.blobs[digest] = blob
        sealed = SealedModel(header=made.header.digest, blob=digest, size=len(blob))
        grants = {user.user_id(self.realm.owner.thumbprint): NOW + DAY}
        return await self.realm.publish(statement(self.realm.id, sealed_model=sealed, grants=grants))

    @property
    def current(self) -> Statement:
        return self.realm.service.log.state.models[self.model].statement

    def user_policy(self, **changes: Any) -> UserPolicy:
        fields = {"service": self.realm.id, "key_service": policy(KEY_SERVICE), "worker": policy(WORKER)}
        return UserPolicy(**{**fields, **changes})

    async def send(self, outgoing: Any) -> Answer:
        self.outgoing.append(outgoing)
        answer = self.before(outgoing)
        if answer is None:
            answer = self.after(outgoing, await self._serve(outgoing))
        return answer

    async def _serve(self, outgoing: Any) -> Answer:
        if outgoing.method == b"GET":
            return Answer(body=self.realm.service.documents.raw)
        fields = dict(outgoing.fields)
        if fields[b"cloister-pool"] == b"key-service":
            return await self.realm.outer(bytes(outgoing.body))
        assert fields[b"cloister-pool"] == self.pool.id.hex().encode()
        return await self.to_worker(bytes(outgoing.body))

    async def to_worker(self, body: bytes) -> Answer:
        assert self.worker.server is not None
        head = Head(method=b"POST", target=b"/ohttp", fields={b"content-type": b"message/ohttp-req"})
        return await self.worker.server.handle(head, Body.of(bytearray(body)))

    async def sleep(self, seconds: float) -> None:
        self.pauses.append(seconds)
        await asyncio.sleep(0)

    async def run(self, flow: Any) -> Any:
        return await drive_async(flow, self.send, self.sleep)

    def close(self) -> None:
        self.scheduler.close()


class Theatre:
    """A stage in a thread of its own, and an httpx transport to it."""

    def __init__(self, **options: Any) -> None:
        self.backstage = Backstage()
        self.stage: Stage = self.backstage.run(Stage.open(**options))
        self.requests: list[httpx.Request] = []

    @property
    def realm(self) -> Realm:
        return self.stage.realm

    def transport(self) -> httpx.MockTransport:
        def handle(request: httpx.Request) -> httpx.Response:
            body = request.read()
            self.requests.append(request)
            return self.backstage.run(self._answer(request, body))

        return httpx.MockTransport(handle)

    def async_transport(self) -> httpx.MockTransport:
        async def handle(request: httpx.Request) -> httpx.Response:
            body = await request.aread()
            self.requests.append(request)
            return await asyncio.to_thread(self.backstage.run, self._answer(request, body))

        return httpx.MockTransport(handle)

    async def _answer(self, request: httpx.Request, body: bytes) -> httpx.Response:
        assert self.stage.worker.server is not None
        workers = {self.stage.pool.id.hex().encode(): self.stage.worker.server}
        return await gateway(self.realm, workers, request, body)

    def close(self) -> None:
        self.stage.close()
        self.backstage.close()
