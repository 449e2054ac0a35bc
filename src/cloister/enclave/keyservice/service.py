"""The key service: appends before it acts, releases to whom pool and owner admit, signs documents."""

from __future__ import annotations

import asyncio
import logging
from typing import Final

from cloister.core.ohttp import hpke
from cloister.core.protocol.attestation import Attested, verify_attestation
from cloister.core.protocol.configuration import EnclaveConfiguration
from cloister.core.protocol.document import KEM_NAMES, SIGNING_ALGORITHM
from cloister.core.protocol.exchange import (
    Challenge,
    HeadRequest,
    PoolCreation,
    Possession,
    Publication,
    Receipt,
    StatementQuery,
)
from cloister.core.protocol.head import TreeHead
from cloister.core.protocol.limits import MAX_MODELS, MAX_POOLS
from cloister.core.protocol.pool import Pool
from cloister.core.protocol.release import (
    MAX_RELEASE,
    MODEL_KEY_SIZE,
    Lease,
    Release,
    ReleasedModel,
    ReleaseRequest,
    SealedRelease,
    WorkerCertificate,
    model_key_info,
    release_info,
)
from cloister.core.protocol.statement import Statement
from cloister.core.secret import Secret
from cloister.core.verifier.appraisal import appraise
from cloister.core.verifier.result import CollateralMemory
from cloister.enclave.attester import Attester
from cloister.enclave.challenges import Challenges
from cloister.enclave.keyservice.documents import DocumentMaker
from cloister.enclave.keyservice.log import Log
from cloister.enclave.keyservice.possession import PossessionDesk
from cloister.enclave.keyservice.state import ModelState, require_service
from cloister.errors import (
    AppraisalRefused,
    BindingRefused,
    CloisterError,
    InvalidRequest,
    NotFound,
    Overloaded,
    Refused,
    Rollback,
)

logger: Final = logging.getLogger(__name__)
MAX_POOL_STATEMENTS: Final = MAX_RELEASE // 2  # bytes
MAX_DOCUMENT_MODELS: Final = 8192  # over all pools; each takes about 300 B of the document
RELEASE_OVERHEAD: Final = 512  # bytes for each model beside its statement
MAX_APPRAISALS: Final = 32  # release requests that wait for appraisal at once
REFUSALS_PER_MINUTE: Final = 6  # that enter the log; the rest are counted in the next that does


class KeyService:
    """One replica. Its `Log` orders everything; `start` and `rotate` drive its epochs.

    Args:
        log: The service's identity, log and state.
        attester: Collects the evidence for service documents.
        configuration: Its own attested configuration.
    """

    def __init__(self, log: Log, attester: Attester, configuration: EnclaveConfiguration) -> None:
        self.log: Final = log
        self.documents: Final = DocumentMaker(log, attester, configuration)
        self._configuration: Final = configuration
        self._challenges: Final = Challenges()
        self._collateral: Final = CollateralMemory()
        self._possession: Final = PossessionDesk(log, self.documents.current)
        self._appraisals: Final = asyncio.Semaphore(1)
        self._appraising = 0
        self._publishing: Final = asyncio.Lock()
        self._released: dict[bytes, tuple[object, ...]] = {}
        self._halted: TreeHead | None = None
        self._refusals = (0, 0, 0)  # minute, logged in it, suppressed since

    @property
    def halted(self) -> bool:
        """Whether it stopped serving since its store was put back."""
        return self._halted is not None

    async def start(self) -> None:
        """Begin the first epoch of this start and sign a document."""
        await self.log.append("start", {"configuration": self._configuration.digest})
        await self.documents.rotate()

    async def tick(self) -> None:
        """Rotate or renew what is due; called every second or so."""
        if self._halted is None:
            await self.documents.renew()

    def challenge(self, request: HeadRequest) -> Challenge:
        """Step 1 of a release: a challenge, and the proof that the log extends what the worker saw."""
        self._require_current(request.head)
        return Challenge(
            challenge=self._challenges.issue(self.log.clock.now()),
            head=self.log.head(),
            consistency=self.log.consistency(request.head),
        )

    async def possession(self, request: HeadRequest) -> Possession:
        """Proof that this service, with this document, is alive, and extends what the client saw."""
        self._require_current(request.head)
        return await self._possession.prove(request)

    async def create_pool(self, creation: PoolCreation) -> Receipt:
        """Create a pool; the same one again changes nothing.

        Raises:
            AppraisalRefused: its policy names another trust anchor than this service appraises with.
            Overloaded: there are too many pools.
        """
        self._require_current(None)
        pool = creation.pool
        if pool.policy.anchors.digest != self._configuration.anchors.digest:
            raise AppraisalRefused(
                "the pool's policy names another trust anchor than this service was configured with",
                code="appraisal.anchor",
                claim="trust anchor",
                expected=self._configuration.anchors.digest.hex(),
                actual=pool.policy.anchors.digest.hex(),
            )
        async with self._publishing:
            await self.log.settle()
            if pool.id in self.log.state.pools:
                return self._receipt(self.log.state.pool_entries[pool.id])
            if len(self.log.state.pools) >= MAX_POOLS:
                raise Overloaded(
                    claim="pools", expected=f"at most {MAX_POOLS}", actual=len(self.log.state.pools)
                )
            index = await self.log.append("pool", {"owner": creation.owner, "pool": pool.to_data()})
            self.documents.sign()
            return self._receipt(index)

    async def publish(self, publication: Publication) -> Receipt:
        """Take an owner's statement; the newest one again changes nothing.

        Raises:
            Tampered, AccessRefused: not signed by the model's owner.
            BindingRefused: for another service.
            Rollback: not the next in its chain.
            AppraisalRefused: it accepts no key service of this measurement, or not every worker of the pool.
            InvalidRequest: a new sealed model without a key.
        """
        self._require_current(None)
        try:
            return await self._publish(publication)
        except Refused as error:
            await self._log_refusal("statement", publication.pool, error)
            raise

    async def release(self, request: ReleaseRequest) -> SealedRelease:
        """Steps 4 of a release (DESIGN, 4.2): appraise, log, seal.

        Raises:
            BindingRefused, Replayed: the challenge or the document is not a current one of this service.
            EvidenceRefused, AppraisalRefused: the worker is not one that the pool admits.
            Overloaded: too many releases wait.
        """
        self._require_current(None)
        now = self.log.clock.now()
        self._challenges.spend(request.challenge, now)
        self.documents.require_recent(request.document)
        pool_id = request.attestation.binding.pool
        if pool_id is None:
            raise BindingRefused(code="binding.pool", claim="pool", expected="a pool id", actual="none")
        pool = self.log.state.pool(pool_id)
        try:
            attested = await self._appraise(request, pool, now)
        except Refused as error:
            await self._log_refusal("release", pool_id, error)
            raise
        models = self._admitted(attested, pool_id, now)
        digests = tuple(model.digest for model in models)
        release = self._release(request, attested, pool_id, models)
        kem_id, public_key = _kem_key(attested)
        info = release_info(request, pool=pool_id, statements=digests)
        suite = next(suite for suite in hpke.WIRE_SUITES if suite.kem_id == kem_id)
        sealed = hpke.seal_to(suite, public_key, release.to_bytes(), info=info)
        await self._log_release(request, attested, release.certificate, digests)  # before it leaves
        return SealedRelease(statements=digests, sealed=sealed)

    def statement_of(self, query: StatementQuery) -> ModelState:
        """The newest statement of a model, for its owner alone; raises AccessRefused or NotFound."""
        query.verify(service=self.log.service, now=self.log.clock.now())
        found = self.log.state.models.get(query.model)
        if found is None:
            raise NotFound(
                code="not-found.model", claim="model", expected="a published one", actual=query.model[-80:]
            )
        return found

    async def _publish(self, publication: Publication) -> Receipt:
        statement = publication.statement.open()
        require_service(statement, self.log.service)
        _require_served(statement)
        async with self._publishing:
            await self.log.settle()
            state = self.log.state
            current = state.models.get(statement.model)
            if (
                current is not None
                and current.digest == statement.digest
                and current.pool == publication.pool
            ):
                return self._receipt(current.index)
            state.require_next(statement)
            self._require_room(statement, publication.pool)
            appraise(self.documents.own_evidence, statement.key_service, now=self.log.clock.now())
            state.require_pool(statement, publication.pool)
            key = self._model_key(publication, statement, current)
            self._require_deliverable(statement, publication)
            body = {"pool": publication.pool, "statement": publication.statement.to_data()}
            index = await self.log.append("statement", body, key)
            self.documents.sign()
            return self._receipt(index)

    def _require_current(self, head: TreeHead | None) -> None:
        """Stop serving for good once somebody shows a head of ours that our log does not extend."""
        if self._halted is not None:
            raise _rolled_back(self._halted, len(self.log.tree))
        if head is None:
            return
        head.verify(self.log.service)
        if self.log.contradicts(head):
            self._halted = head
            logger.error("halted: a presented tree head proves that the store was put back")
            raise _rolled_back(head, len(self.log.tree))

    def _require_deliverable(self, statement: Statement, publication: Publication) -> None:
        """Refuse a statement with which the pool's release could no longer be delivered to workers."""
        others = sum(
            len(model.signed.text) + RELEASE_OVERHEAD
            for model in self.log.state.models_of(publication.pool)
            if model.statement.model != statement.model
        )
        size = others + len(publication.statement.text) + RELEASE_OVERHEAD
        if size > MAX_POOL_STATEMENTS:
            raise Overloaded(
                "the pool's statements are too large together",
                code="overloaded.pool",
                claim="statements of the pool",
                expected=f"at most {MAX_POOL_STATEMENTS} B",
                actual=f"{size} B",
                hint="Use another pool, or fewer grants",
            )

    def _require_room(self, statement: Statement, pool: bytes) -> None:
        models = self.log.state.models_of(pool)
        if statement.model not in self.log.state.models and len(self.log.state.models) >= MAX_DOCUMENT_MODELS:
            raise Overloaded(
                claim="models", expected=f"at most {MAX_DOCUMENT_MODELS}", actual=len(self.log.state.models)
            )
        if len(models) >= MAX_MODELS and all(model.statement.model != statement.model for model in models):
            raise Overloaded(claim="models in the pool", expected=f"at most {MAX_MODELS}", actual=len(models))

    def _model_key(
        self, publication: Publication, statement: Statement, current: ModelState | None
    ) -> Secret | None:
        if publication.sealed_key is None:
            if current is None or current.statement.sealed_model.header != statement.sealed_model.header:
                raise InvalidRequest(
                    "the statement names a new sealed model but brings no key",
                    code="request.model-key",
                    claim="model key",
                    expected="sealed to this service",
                    actual="none",
                )
            return None
        private_key = self.documents.private_key(publication.key_id)
        suite = next(suite for suite in hpke.WIRE_SUITES if suite.kem_id == private_key.kem_id)
        key = hpke.open_from(
            suite,
            private_key,
            publication.sealed_key,
            info=model_key_info(self.log.service),
            aad=statement.digest,
        )
        if len(key) != MODEL_KEY_SIZE:
            raise InvalidRequest(claim="model key", expected=f"{MODEL_KEY_SIZE} B", actual=f"{len(key)} B")
        return Secret(key)

    async def _appraise(self, request: ReleaseRequest, pool: Pool, now: int) -> Attested:
        if self._appraising >= MAX_APPRAISALS:
            raise Overloaded(
                claim="waiting releases", expected=f"at most {MAX_APPRAISALS}", actual=self._appraising
            )
        self._appraising += 1
        try:
            async with self._appraisals:  # one at a time, off the event loop: requests of others go on
                attested = await asyncio.to_thread(
                    verify_attestation,
                    request.attestation,
                    policy=pool.policy,
                    now=now,
                    purpose="release",
                    role="worker",
                    service=self.log.service,
                    pool=pool.id,
                    freshness=("challenge", request.challenge),
                    seen=self._collateral,
                )
        finally:
            self._appraising -= 1
        accepted = attested.configuration.key_service
        if accepted is not None:  # a worker that would follow another key service gets nothing of this one
            appraise(self.documents.own_evidence, accepted, now=now)
        configured = attested.configuration.pool
        if (
            configured is None
            or configured.id != pool.id
            or attested.configuration.service != self.log.service
        ):
            raise BindingRefused(
                code="binding.configuration",
                claim="worker configuration",
                expected=f"pool {pool.id.hex()[:16]} of this service",
                actual="another",
            )
        return attested

    def _admitted(self, attested: Attested, pool_id: bytes, now: int) -> list[ModelState]:
        admitted = []
        for model in self.log.state.models_of(pool_id):
            try:
                appraise(attested.evidence, model.statement.release_policy, now=now)
                appraise(self.documents.own_evidence, model.statement.key_service, now=now)
            except AppraisalRefused:
                continue
            admitted.append(model)
        return admitted

    def _release(
        self, request: ReleaseRequest, attested: Attested, pool_id: bytes, models: list[ModelState]
    ) -> Release:
        settings = self._configuration.settings
        now = self.log.clock.now()
        epochs = self.documents.epochs.live(now)
        certificate = WorkerCertificate.sign(
            self.log.identity,
            pool=pool_id,
            epoch=self.documents.epochs.current.number,
            measurement=attested.evidence.measurement,
            incarnation=request.incarnation,
            public_key=attested.binding.key(SIGNING_ALGORITHM),
            not_after=now + settings["lease_seconds"],
        )
        return Release(
            pool_keys=tuple(key for epoch in epochs for key in epoch.pool_keys(pool_id)),
            models=tuple(ReleasedModel(statement=model.signed, key=model.key) for model in models),
            lease=Lease(seconds=settings["lease_seconds"], requests=settings["lease_requests"]),
            certificate=certificate,
            service_key=self.log.identity.public,
        )

    async def _log_release(
        self,
        request: ReleaseRequest,
        attested: Attested,
        certificate: WorkerCertificate,
        statements: tuple[bytes, ...],
    ) -> None:
        """Log what is released to an incarnation when it is more than a renewal of the same."""
        what = (certificate.epoch, certificate.pool, certificate.public_key, statements)
        if self._released.get(request.incarnation) == what:
            return
        await self.log.append(
            "release",
            {
                "epoch": certificate.epoch,
                "evidence": request.attestation.digest,
                "incarnation": request.incarnation,
                "measurement": attested.evidence.measurement,
                "pool": certificate.pool,
                "statements": list(statements),
            },
        )
        if len(self._released) >= 10_000:
            self._released.pop(next(iter(self._released)))
        self._released[request.incarnation] = what

    async def _log_refusal(self, what: str, pool_id: bytes, error: CloisterError) -> None:
        minute, logged, suppressed = self._refusals
        now = self.log.clock.now() // 60
        if now != minute:
            minute, logged = now, 0
        if logged >= REFUSALS_PER_MINUTE:
            self._refusals = (minute, logged, suppressed + 1)
            return
        self._refusals = (minute, logged + 1, 0)
        await self.log.append(
            "refusal", {"code": error.code, "pool": pool_id, "suppressed": suppressed, "what": what}
        )

    def _receipt(self, index: int) -> Receipt:
        return Receipt(index=index, head=self.log.head())


def _rolled_back(head: TreeHead, size: int) -> Rollback:
    return Rollback(
        "the key service's store was put back to an older state; it serves no more",
        code="rollback.store",
        claim="audit log",
        expected=f"at least {head.size} entries, root {head.root.hex()[:16]}",
        actual=f"{size} entries",
        hint="The operator must restore the newest store",
    )


def _require_served(statement: Statement) -> None:
    """Refuse serving options that contradict each other; raises InvalidRequest."""
    options = statement.options
    if options.isolation == "strict" and options.batching != "none":
        raise InvalidRequest(
            code="request.options",
            claim="serving options",
            expected="no batching with strict isolation",
            actual=f"isolation {options.isolation}, batching {options.batching}",
        )


def _kem_key(attested: Attested) -> tuple[int, bytes]:
    """KEM id and public key that the worker attested, the preferred suite first; raises InvalidRequest."""
    bound = dict(attested.binding.keys)
    for suite in hpke.WIRE_SUITES:
        if KEM_NAMES[suite.kem_id] in bound:
            return suite.kem_id, attested.binding.key(KEM_NAMES[suite.kem_id])
    raise InvalidRequest("the worker attested no KEM key", code="request.kem", claim="attested keys")
