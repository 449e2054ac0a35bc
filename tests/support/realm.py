"""A service in one process: a simulated authority, a store in memory, a key service and workers' evidence.

Nothing here is faked that the tests look at: evidence is signed and verified, records are sealed, messages
travel encapsulated. What stands in for something else are the clock, the store and the host's link.
"""

from __future__ import annotations

import asyncio
import os
import tempfile
import threading
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any, Final

import httpx

from cloister.core.evidence.bundle import Collateral, Evidence
from cloister.core.identity import SigningKey
from cloister.core.ohttp import hpke
from cloister.core.ohttp.kem import PrivateKey, generate_private_key
from cloister.core.ohttp.keyconfig import select
from cloister.core.protocol.attestation import Attestation, Binding
from cloister.core.protocol.configuration import EnclaveConfiguration
from cloister.core.protocol.conversation import Conversation, Trust
from cloister.core.protocol.document import (
    KEM_NAMES,
    SIGNING_ALGORITHM,
    SignedDocument,
    VerifiedDocument,
    verify_document,
)
from cloister.core.protocol.exchange import HeadRequest, PoolCreation, Publication
from cloister.core.protocol.flow import Outgoing
from cloister.core.protocol.pool import Pool
from cloister.core.protocol.release import ReleaseRequest, model_key_info
from cloister.core.protocol.statement import SealedModel, SignedStatement, Statement, model_id
from cloister.core.secret import Secret
from cloister.core.verifier.appraisal import SGX_ATTRIBUTES_MASK, AppraisalPolicy
from cloister.enclave.clock import HintedClock
from cloister.enclave.keyservice.log import Log
from cloister.enclave.keyservice.routes import KeyServiceRoutes
from cloister.enclave.keyservice.service import KeyService
from cloister.enclave.server import EnclaveServer
from cloister.errors import NotFound, TransportError, Unavailable
from cloister.net.body import Body
from cloister.net.messages import Answer, Head
from cloister.sim.authority import SimulatedAuthority
from cloister.sim.quote import ATTRIBUTES

NOW: Final = 1_800_000_000
KEY_SERVICE: Final = b"k" * 32  # measurements
WORKER: Final = b"w" * 32
STRANGER: Final = b"x" * 32
DAY: Final = 86400


def authority(name: str = "main") -> SimulatedAuthority:
    """The simulated authority of these tests; another name is another root."""
    return _authority(name)


@cache
def _authority(name: str) -> SimulatedAuthority:
    with tempfile.TemporaryDirectory(prefix=f"authority-{name}-") as folder:
        return SimulatedAuthority.create(Path(folder), now=NOW)


@cache
def _collateral(name: str, hour: int) -> Collateral:
    return authority(name).collateral(hour * 3600)


def policy(*measurements: bytes, root: str | None = "main", **changes: Any) -> AppraisalPolicy:
    """Reference values for these measurements; ``root=None`` is a production policy."""
    values: dict[str, Any] = {
        "tee": "sgx",
        "mr_enclave": frozenset(measurements),
        "attributes": bytes(a & m for a, m in zip(ATTRIBUTES, SGX_ATTRIBUTES_MASK, strict=True)),
        "attributes_mask": SGX_ATTRIBUTES_MASK,
        "allowed_tcb": frozenset({"UpToDate"}),
        "any_platform": True,
        "dangerous_simulated_roots": None if root is None else authority(root).roots_der,
    }
    return AppraisalPolicy(**{**values, **changes})


def evidence(
    report_data: bytes, measurement: bytes, *, root: str = "main", debug: bool = False, now: int = NOW
) -> Evidence:
    """Genuine-format evidence over ``report_data``."""
    quote = authority(root).quote(
        report_data=report_data,
        mr_enclave=measurement,
        mr_signer=b"s" * 32,
        isv_prod_id=0,
        isv_svn=0,
        debug=debug,
        now=now,
    )
    return Evidence(tee="sgx", quote=quote, collateral=_collateral(root, now // 3600))


class Clock:
    """The host's clock, which a test sets."""

    def __init__(self, now: float = NOW) -> None:
        self.time = now

    def __call__(self) -> float:
        return self.time

    def now(self) -> int:
        return int(self.time)


class Attester:
    """The simulated TEE of one enclave."""

    simulated = True

    def __init__(self, measurement: bytes, clock: Clock, root: str = "main") -> None:
        self.measurement = measurement
        self.root = root
        self.made = 0
        self._clock = clock

    def evidence(self, report_data: bytes) -> Evidence:
        self.made += 1
        return evidence(report_data, self.measurement, root=self.root, now=self._clock.now())

    def sealing_key(self) -> Secret:
        return authority(self.root).sealing_key(self.measurement)


@dataclass
class MemoryHost:
    """What a host keeps and carries: records, blobs, the service document. It can be told to misbehave."""

    records: dict[str, dict[bytes, tuple[int, bytes]]] = field(default_factory=dict)
    blobs: dict[bytes, bytes] = field(default_factory=dict)
    writes: str = "ok"  # "refused": nothing is written; "lost": written, but the answer is lost
    piece: int = 64 << 10
    fetched: int = 0
    served: Callable[[], bytes] | None = None
    carry: Callable[[bytes], Awaitable[Answer]] | None = None
    closed: bool = False

    async def document(self) -> bytes:
        if self.served is None:
            raise TransportError("no document")
        return self.served()

    async def send(self, outgoing: Outgoing) -> Answer:
        if self.carry is None:
            raise TransportError("no key service")
        return await self.carry(bytes(outgoing.body))

    async def record(self, table: str, key: bytes) -> tuple[int, bytes] | None:
        return self.records.get(table, {}).get(key)

    async def scan(self, table: str) -> AsyncIterator[tuple[bytes, int, bytes]]:
        for key, (version, value) in sorted(self.records.get(table, {}).items()):
            yield key, version, value

    async def apply(self, writes: Sequence[tuple[str, bytes, int, bytes | None]]) -> None:
        if self.writes == "refused":
            raise Unavailable("the store is away", code="host.status")
        for table, key, version, value in writes:
            rows = self.records.setdefault(table, {})
            if rows.get(key, (0, b""))[0] != version:
                raise Unavailable("another version", code="store.conflict")
            assert value is not None
            rows[key] = (version + 1, value)
        if self.writes == "lost":
            raise TransportError("the answer was lost")

    async def blob(self, digest: bytes, size: int) -> AsyncIterator[memoryview]:
        self.fetched += 1
        if digest not in self.blobs:
            raise NotFound(code="not-found.host")
        data = memoryview(self.blobs[digest])
        for start in range(0, len(data), self.piece):
            await asyncio.sleep(0)
            yield data[start : start + self.piece]

    async def aclose(self) -> None:
        self.closed = True


def configuration(role: str = "key-service", **fields: Any) -> EnclaveConfiguration:
    """A simulated enclave's configuration."""
    return EnclaveConfiguration(**{"role": role, "anchor_roots": authority().roots_der, **fields})


def owner_key(name: str = "owner") -> SigningKey:
    """A fixed owner's key."""
    return SigningKey(Secret(name.encode().ljust(32, b"-")))


def sealed_model(tag: bytes = b"m") -> SealedModel:
    """Digests of no sealed model in particular."""
    return SealedModel(header=tag * 32, blob=tag.upper() * 32, size=1000)


def statement(
    service: bytes, *, owner: SigningKey | None = None, name: str = "digits", **changes: Any
) -> Statement:
    """A first statement."""
    fields: dict[str, Any] = {
        "service": service,
        "model": model_id((owner or owner_key()).thumbprint, name),
        "version": 1,
        "previous": bytes(32),
        "sealed_model": sealed_model(),
        "release_policy": policy(WORKER),
        "key_service": policy(KEY_SERVICE),
    }
    return Statement(**{**fields, **changes})


class Realm:
    """A key service in this process, with what it needs and who talks to it."""

    def __init__(self, host: MemoryHost, clock: Clock, service: KeyService) -> None:
        self.host: Final = host
        self.clock: Final = clock
        self.service: Final = service
        self.id: Final = service.log.service
        self.pool: Final = Pool(name="pool", policy=policy(WORKER))
        self.owner: Final = owner_key()
        self.server: Final = EnclaveServer(KeyServiceRoutes(service), service.documents.private_keys())
        host.served = lambda: service.documents.raw
        host.carry = self.outer

    @classmethod
    async def start(
        cls,
        host: MemoryHost | None = None,
        clock: Clock | None = None,
        *,
        measurement: bytes = KEY_SERVICE,
        **settings: int,
    ) -> Realm:
        """Open the log in the host's store and begin an epoch."""
        host, clock = host or MemoryHost(), clock or Clock()
        attester = Attester(measurement, clock)
        log = await Log.open(host, attester.sealing_key(), HintedClock(clock))
        service = KeyService(log, attester, configuration(settings=settings))
        await service.start()
        return cls(host, clock, service)

    async def outer(self, message: bytes, fields: dict[bytes, bytes] | None = None) -> Answer:
        """An encapsulated request to the key service, as its front hands it in."""
        self.server.replace_keys(self.service.documents.private_keys())
        head = Head(
            method=b"POST",
            target=b"/ohttp",
            fields={b"content-type": b"message/ohttp-req", b"cloister-sender": b"enclave", **(fields or {})},
        )
        return await self.server.handle(head, Body.of(bytearray(message)))

    def document(self) -> VerifiedDocument:
        """The service document, verified as a client does."""
        return verify_document(
            self.service.documents.raw, policy=policy(KEY_SERVICE), service=self.id, now=self.clock.now()
        )

    def signed(self) -> SignedDocument:
        return SignedDocument.from_bytes(self.service.documents.raw)

    def conversation(self, **options: Any) -> Conversation:
        return Conversation(trust=Trust(service=self.id, key_service=policy(KEY_SERVICE)), **options)

    async def create_pool(self, pool: Pool | None = None, owner: bytes | None = None) -> Pool:
        pool = pool or self.pool
        await self.service.create_pool(PoolCreation(pool=pool, owner=owner))
        return pool

    def publication(
        self,
        said: Statement,
        *,
        key: bytes | None = b"K" * 32,
        owner: SigningKey | None = None,
        pool: bytes | None = None,
        **changes: Any,
    ) -> Publication:
        """A statement on its way, its model key sealed to the service."""
        config, suite = select(self.document().document.keys)
        sealed = None
        if key is not None:
            info = model_key_info(self.id)
            sealed = hpke.seal_to(suite, config.public_key, key, info=info, aad=said.digest)
        fields = {
            "statement": SignedStatement.sign(said, owner or self.owner),
            "sealed_key": sealed,
            "key_id": config.key_id,
            "pool": pool or self.pool.id,
        }
        return Publication(**{**fields, **changes})

    async def publish(self, said: Statement | None = None, **options: Any) -> Statement:
        said = said or statement(self.id)
        await self.service.publish(self.publication(said, **options))
        return said

    def next(self, said: Statement, **changes: Any) -> Statement:
        """The statement that follows another."""
        fields = {name: getattr(said, name) for name in said.__slots__}
        return Statement(**{**fields, "version": said.version + 1, "previous": said.digest, **changes})

    def worker_configuration(self, **changes: Any) -> EnclaveConfiguration:
        fields = {"service": self.id, "pool": self.pool, "key_service": policy(KEY_SERVICE)}
        return configuration("worker", **{**fields, **changes})

    def release_request(
        self,
        *,
        measurement: bytes = WORKER,
        challenge: bytes | None = None,
        root: str = "main",
        config: EnclaveConfiguration | None = None,
        kem: PrivateKey | None = None,
        signing: SigningKey | None = None,
        document: bytes | None = None,
        incarnation: bytes = b"i" * 16,
        debug: bool = False,
        **binding: Any,
    ) -> ReleaseRequest:
        """A worker's request, wrong wherever a test wants it."""
        if challenge is None:
            challenge = self.challenge()
        config = config or self.worker_configuration()
        kem = kem or kem_key()
        bound = Binding(
            **{
                "purpose": "release",
                "role": "worker",
                "service": self.id,
                "pool": self.pool.id,
                "keys": (
                    (KEM_NAMES[kem.kem_id], kem.public_bytes),
                    (SIGNING_ALGORITHM, (signing or owner_key("worker")).public),
                ),
                "freshness": ("challenge", challenge),
                "configuration": config.digest,
                **binding,
            }
        )
        proof = evidence(bound.report_data, measurement, root=root, debug=debug, now=self.clock.now())
        return ReleaseRequest(
            challenge=challenge,
            document=document or self.service.documents.digest,
            incarnation=incarnation,
            attestation=Attestation(evidence=proof, configuration=config.to_bytes(), binding=bound),
        )

    def challenge(self) -> bytes:
        return self.service.challenge(HeadRequest(nonce=os.urandom(32), head=None)).challenge


@cache
def kem_key(kem_id: int = 0x647A, /) -> PrivateKey:
    """One private key of a KEM, made once."""
    return generate_private_key(kem_id)


class Backstage:
    """An event loop in a thread, so that blocking code can talk to a service in this process."""

    def __init__(self) -> None:
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)
        self._thread.start()

    def run(self, work: Coroutine[Any, Any, Any]) -> Any:
        return asyncio.run_coroutine_threadsafe(work, self._loop).result(30)

    def close(self) -> None:
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(10)
        self._loop.close()


Workers = dict[bytes, EnclaveServer]


async def gateway(realm: Realm, workers: Workers, request: httpx.Request, body: bytes) -> httpx.Response:
    """What a gateway answers: the document, blobs, encapsulated requests by pool."""
    path = request.url.path
    if path == "/.well-known/cloister":
        return httpx.Response(200, stream=httpx.ByteStream(realm.service.documents.raw))
    if path.startswith("/blobs/"):
        realm.host.blobs[bytes.fromhex(path.rpartition("/")[2])] = body
        return httpx.Response(201, stream=httpx.ByteStream(b""))
    if path != "/ohttp":
        return httpx.Response(404)
    fields = {name.lower(): value for name, value in request.headers.raw}
    pool = fields.get(b"cloister-pool", b"")
    if pool == b"key-service":
        answer = await realm.outer(body, {b"content-type": fields[b"content-type"]})
    elif pool in workers:
        head = Head(method=b"POST", target=b"/ohttp", fields=fields)
        answer = await workers[pool].handle(head, Body.of(bytearray(body)))
    else:
        return httpx.Response(404)
    return httpx.Response(
        answer.status,
        stream=httpx.ByteStream(bytes(answer.body)),
        headers=[(b"content-type", answer.content_type)],
    )
