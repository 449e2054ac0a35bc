"""A worker's side of key release (DESIGN, 4.2): the steps, the lease, what it may serve meanwhile."""

from __future__ import annotations

import asyncio
import os
import time
from dataclasses import dataclass
from typing import Final

from cloister.core.identity import SigningKey
from cloister.core.ohttp import hpke
from cloister.core.ohttp.kem import PrivateKey, generate_private_key
from cloister.core.ohttp.keyconfig import KeyConfiguration
from cloister.core.protocol.attestation import Attestation, Binding
from cloister.core.protocol.configuration import EnclaveConfiguration
from cloister.core.protocol.conversation import ask_key_service
from cloister.core.protocol.document import KEM_NAMES, SIGNING_ALGORITHM, ServiceDocument, verify_document
from cloister.core.protocol.exchange import Challenge, HeadRequest
from cloister.core.protocol.flow import drive_async
from cloister.core.protocol.head import TreeHead
from cloister.core.protocol.limits import CLOCK_SKEW, MAX_EPOCH
from cloister.core.protocol.pool import Pool
from cloister.core.protocol.release import (
    INCARNATION_SIZE,
    PoolKey,
    Release,
    ReleasedModel,
    ReleaseRequest,
    SealedRelease,
    release_info,
)
from cloister.core.protocol.statement import Statement
from cloister.core.secret import Secret
from cloister.core.verifier.result import CollateralMemory
from cloister.enclave.attester import Attester
from cloister.enclave.clock import HintedClock
from cloister.enclave.link import HostLink
from cloister.enclave.worker.stages import process_started
from cloister.errors import BindingRefused, LeaseExpired, Rollback, UsageError


@dataclass(frozen=True, slots=True, kw_only=True)
class LiveKey:
    """A pool key that opens requests, and when it dies: by the hinted clock, and by the monotonic one.

    The host can hold back the first alone, and the second only with the whole machine.
    """

    epoch: int
    not_after: int
    dies: float  # monotonic seconds
    private_key: PrivateKey

    def lives(self, now: int) -> bool:
        """Whether it may still open requests."""
        return now < self.not_after and time.monotonic() < self.dies


@dataclass(frozen=True, slots=True, kw_only=True)
class LiveModel:
    """A model that this worker may serve: its statement, the statement's digest, and the model key."""

    statement: Statement
    digest: bytes
    key: Secret


class Membership:
    """Owns the worker's place in its pool. `renew` is the only way in, and the only way to stay.

    Args:
        link: The way to the key service.
        attester: Collects this worker's evidence.
        configuration: Its attested configuration.
        clock: Hinted by the host.
    """

    def __init__(
        self, link: HostLink, attester: Attester, configuration: EnclaveConfiguration, clock: HintedClock
    ) -> None:
        if configuration.service is None or configuration.pool is None or configuration.key_service is None:
            raise UsageError("not a worker's configuration", claim="configuration")
        self.service: Final[bytes] = configuration.service
        self.pool: Final[Pool] = configuration.pool
        self.pool_id: Final = configuration.pool.id
        self.incarnation: Final = os.urandom(INCARNATION_SIZE)
        self.keys: dict[int, LiveKey] = {}
        self.models: dict[str, LiveModel] = {}
        self.head: TreeHead | None = None
        self.steps: dict[str, float] = {"began": time.monotonic()}  # when each step of joining ended
        if (started := process_started()) is not None:
            self.steps["started"] = min(started, self.steps["began"])
        self._collateral: Final = CollateralMemory()
        self._key_service: Final = configuration.key_service
        self._configuration: Final = configuration
        self._link: Final = link
        self._attester: Final = attester
        self._clock: Final = clock
        self._signing_key: Final = SigningKey.generate()
        self._lease_end = 0.0  # monotonic seconds
        self._lease_requests = 0
        self.lease_seconds = 0

    @property
    def active(self) -> bool:
        """Whether the lease holds."""
        return time.monotonic() < self._lease_end and self._lease_requests > 0

    def spend(self) -> None:
        """Take one request from the lease; raises LeaseExpired where it is used up."""
        if not self.active:
            raise lease_expired()
        self._lease_requests -= 1

    async def renew(self) -> None:
        """The five steps. On success the lease, keys and models are the new ones.

        On failure nothing changes but the newest head, which every later service must extend.

        Raises:
            Rollback: the key service's log does not extend what this worker saw.
            Refused: the key service isn't one to trust, or it refuses this worker.
            Unavailable: it could not be reached.
        """
        asked = time.monotonic()  # the lease counts from before the question
        now = self._clock.now()
        verified = verify_document(  # step 2
            await self._link.document(),
            policy=self._key_service,
            service=self.service,
            now=now,
            seen=self._collateral,
        )
        document = verified.document
        challenge = await self._challenge(document)  # step 1
        challenged = time.monotonic()
        kem = generate_private_key(hpke.WIRE_SUITES[0].kem_id)
        request = ReleaseRequest(  # step 3
            challenge=challenge.challenge,
            document=verified.digest,
            incarnation=self.incarnation,
            attestation=await asyncio.to_thread(self._attest, kem, challenge.challenge),
        )
        attested = time.monotonic()
        answer = SealedRelease.from_bytes(await self._ask(document, b"/releases", request.to_bytes()))
        release = self._open(request, kem, answer)  # step 5
        self._install(release, answer, now)
        self._lease_end = asked + release.lease.seconds
        self._lease_requests = release.lease.requests
        self.lease_seconds = release.lease.seconds
        if "released" not in self.steps:
            self.steps |= {"challenged": challenged, "attested": attested, "released": time.monotonic()}

    def private_keys(self) -> list[tuple[int, PrivateKey]]:
        """(key id, private key) of every pool key that has not died."""
        now = self._clock.now()
        self.keys = {key_id: key for key_id, key in self.keys.items() if key.lives(now)}
        return [(key_id, key.private_key) for key_id, key in self.keys.items()]

    async def _challenge(self, document: ServiceDocument) -> Challenge:
        request = HeadRequest(nonce=os.urandom(32), head=self.head)
        challenge = Challenge.from_bytes(await self._ask(document, b"/challenges", request.to_bytes()))
        challenge.head.verify(self.service)
        self._clock.raise_floor(challenge.head.time)
        challenge.head.require_extends(self.head, list(challenge.consistency))
        self.head = challenge.head  # whatever becomes of the rest: a later service must extend it
        if document.head.size > challenge.head.size:
            raise Rollback(
                code="rollback.head",
                claim="tree size",
                expected=f"at least {document.head.size}",
                actual=challenge.head.size,
            )
        return challenge

    def _attest(self, kem: PrivateKey, challenge: bytes) -> Attestation:
        binding = Binding(
            purpose="release",
            role="worker",
            service=self.service,
            pool=self.pool_id,
            keys=((KEM_NAMES[kem.kem_id], kem.public_bytes), (SIGNING_ALGORITHM, self._signing_key.public)),
            freshness=("challenge", challenge),
            configuration=self._configuration.digest,
        )
        return Attestation(
            evidence=self._attester.evidence(binding.report_data),
            configuration=self._configuration.to_bytes(),
            binding=binding,
        )

    async def _ask(self, document: ServiceDocument, path: bytes, content: bytes) -> memoryview:
        flow = ask_key_service(document, path, content)
        return await drive_async(flow, self._link.send, asyncio.sleep)

    def _open(self, request: ReleaseRequest, kem: PrivateKey, answer: SealedRelease) -> Release:
        info = release_info(request, pool=self.pool_id, statements=answer.statements)
        raw = hpke.open_from(hpke.WIRE_SUITES[0], kem, answer.sealed, info=info)
        release = Release.from_bytes(raw)
        certificate = release.certificate
        certificate.verify(release.service_key)
        expected = (self.service, self.pool_id, self.incarnation, self._signing_key.public)
        actual = (certificate.service, certificate.pool, certificate.incarnation, certificate.public_key)
        if actual != expected:
            raise BindingRefused(
                "the release's certificate is for somebody else",
                code="binding.certificate",
                claim="worker certificate",
                expected="this service, pool, incarnation and key",
                actual="others",
            )
        return release

    def _install(self, release: Release, answer: SealedRelease, now: int) -> None:
        if len(release.models) != len(answer.statements):
            raise BindingRefused(
                code="binding.statement",
                claim="released models",
                expected=len(answer.statements),
                actual=len(release.models),
            )
        models = {}
        for model, digest in zip(release.models, answer.statements, strict=True):
            statement = self._opened(model, digest)
            models[statement.model] = LiveModel(statement=statement, digest=digest, key=model.key)
        keys = {key_id: key for key_id, key in self.keys.items() if key.lives(now)}
        for pool_key in release.pool_keys:
            key_id, live = _live_key(pool_key, now)
            keys[key_id] = live
        self.models, self.keys = models, keys

    def _opened(self, model: ReleasedModel, digest: bytes) -> Statement:
        """The owner's statement, checked again: the key service can't invent one."""
        statement = model.statement.open()
        before = self.models.get(statement.model)
        if statement.digest != digest or statement.service != self.service:
            raise BindingRefused(
                code="binding.statement",
                claim="statement",
                expected=digest.hex(),
                actual=statement.digest.hex(),
            )
        if before is not None and statement.version < before.statement.version:
            raise Rollback(
                code="rollback.statement",
                claim="statement version",
                expected=f"at least {before.statement.version}",
                actual=statement.version,
            )
        return statement


def lease_expired() -> LeaseExpired:
    """The error of a worker that the key service has not renewed."""
    return LeaseExpired(
        "the worker's lease has run out and the key service has not renewed it",
        claim="lease",
        expected="a renewed lease",
        actual="expired",
        hint="Try again; the operator should look at the key service",
    )


def _live_key(pool_key: PoolKey, now: int) -> tuple[int, LiveKey]:
    configuration = KeyConfiguration.from_bytes(pool_key.configuration)
    private_key = PrivateKey.from_bytes(configuration.kem_id, pool_key.private_key.reveal())
    if private_key.public_bytes != configuration.public_key:
        raise BindingRefused(
            code="binding.pool-key",
            claim="pool key",
            expected="the key of its configuration",
            actual="another",
        )
    return configuration.key_id, LiveKey(
        epoch=pool_key.epoch,
        not_after=pool_key.not_after,
        dies=time.monotonic() + min(pool_key.not_after - now, MAX_EPOCH + CLOCK_SKEW),
        private_key=private_key,
    )
