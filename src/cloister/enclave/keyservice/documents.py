"""Makes and signs service documents: one attestation for an epoch, one signature for each change."""

from __future__ import annotations

import asyncio
import time
from typing import Final

from cloister.core.ohttp.kem import PrivateKey
from cloister.core.protocol.attestation import Attestation, Binding
from cloister.core.protocol.configuration import EnclaveConfiguration
from cloister.core.protocol.document import (
    PoolEntry,
    ServedModel,
    ServiceDocument,
    SignedDocument,
    attested_keys,
)
from cloister.core.verifier import verify
from cloister.core.verifier.result import VerifiedEvidence
from cloister.enclave.attester import Attester
from cloister.enclave.keyservice.epochs import Epoch, Epochs
from cloister.enclave.keyservice.log import Log
from cloister.enclave.keyservice.state import State
from cloister.errors import BindingRefused

RECENT: Final = 60.0  # seconds after its end that a worker may name a document
CURRENT: Final = 1.0  # seconds after its end that a document still counts as served: caches and networks lag
MAX_RECENT: Final = 4096  # documents


class DocumentMaker:
    """Holds the document that is served now.

    Args:
        log: Signs, and says what there is.
        attester: Collects evidence, once an epoch.
        configuration: The key service's own, attested with it.
    """

    def __init__(self, log: Log, attester: Attester, configuration: EnclaveConfiguration) -> None:
        self._log: Final = log
        self._attester: Final = attester
        self._configuration: Final = configuration
        self._seconds: Final = configuration.settings["document_seconds"]
        self.epochs: Final = Epochs(seconds=configuration.settings["epoch_seconds"], overlap=self._seconds)
        self._attestation: Attestation | None = None
        self._recent: dict[bytes, float] = {}  # digest -> monotonic seconds of its end
        self._not_after = 0
        self._first: tuple[bytes, bool] | None = None  # measurement and debug, by the first evidence
        self.own_evidence: VerifiedEvidence
        self.raw = b""
        self.digest = b""

    async def rotate(self) -> None:
        """Begin the next epoch: log it, make its keys, attest them, sign a document."""
        number = self._log.state.epoch + 1
        await self._log.append("epoch", {"epoch": number})
        now = self._log.clock.now()
        epoch = self.epochs.make(number, now)
        attestation = await asyncio.to_thread(self._attest, epoch)
        # A service whose own evidence doesn't verify under its own anchors must not come up.
        evidence = verify(attestation.evidence, anchors=self._configuration.anchors, now=now)
        evidence.require_report_data(attestation.binding.report_data)
        self._require_same(evidence)
        self.epochs.begin(epoch)  # from here on nothing fails: all of it changes together
        self._attestation, self.own_evidence = attestation, evidence
        self.sign()

    def _require_same(self, evidence: VerifiedEvidence) -> None:
        """Refuse evidence that says something else of this enclave than that of its first epoch did.

        The host carries what is signed to the quoting service, where another enclave may ask with our report
        data. Whoever verifies the document notices by its own policy; this keeps us from believing it.
        """
        found = (evidence.measurement, evidence.debug)
        if self._first is None:
            self._first = found
        elif found != self._first:
            raise BindingRefused(
                "the TEE device gave evidence of another enclave",
                code="binding.measurement",
                claim="own measurement",
                expected=self._first[0].hex(),
                actual=evidence.measurement.hex(),
            )

    async def renew(self) -> None:
        """Rotate or sign anew when it is due."""
        now = self._log.clock.now()
        if self.epochs.due(now):
            await self.rotate()
        elif now >= self._not_after - self._seconds // 2:
            self.sign()

    def sign(self) -> None:
        """Sign a document over the state as it is now."""
        assert self._attestation is not None
        now, epoch = self._log.clock.now(), self.epochs.current
        self._not_after = min(now + self._seconds, epoch.not_after, self.own_evidence.not_after)
        document = ServiceDocument(
            service=self._log.service,
            custodians=(),
            threshold=0,
            attestation=self._attestation,
            keys=tuple(key.configuration for key in epoch.service),
            head=self._log.head(),
            epoch=epoch.number,
            pools=_pool_entries(self._log.state, epoch),
            not_before=now,
            not_after=self._not_after,
        )
        signed = SignedDocument.sign(document, self._log.identity)
        ended = time.monotonic()
        if self.digest not in (b"", signed.digest):
            self._recent[self.digest] = ended
        while self._recent and (
            len(self._recent) > MAX_RECENT or next(iter(self._recent.values())) < ended - RECENT
        ):
            self._recent.pop(next(iter(self._recent)))
        self.raw, self.digest = signed.to_bytes(), signed.digest

    def current(self, digest: bytes | None) -> bytes:
        """That document's digest, if it was served within `CURRENT` seconds; else the present one's."""
        ended = self._recent.get(digest) if digest is not None else None
        return (
            digest if digest is not None and ended is not None and _since(ended) <= CURRENT else self.digest
        )

    def require_recent(self, digest: bytes) -> None:
        """Refuse a document that this start of the service did not serve lately; raises BindingRefused."""
        if digest != self.digest and _since(self._recent.get(digest, float("-inf"))) > RECENT:
            raise BindingRefused(
                "the exchange names a service document that isn't current",
                code="binding.document",
                claim="service document",
                expected=self.digest.hex(),
                actual=digest.hex(),
                hint="Fetch the service document again",
            )

    def private_key(self, key_id: int) -> PrivateKey:
        """One of the key service's own keys that live; raises BindingRefused."""
        for key, private_key in self.private_keys():
            if key == key_id:
                return private_key
        raise BindingRefused(
            code="ohttp.key", claim="key id", expected="a live key of this service", actual=key_id
        )

    def private_keys(self) -> list[tuple[int, PrivateKey]]:
        """(key id, private key) of every live key of the key service itself."""
        return [
            (key.configuration.key_id, key.private_key)
            for epoch in self.epochs.live(self._log.clock.now())
            for key in epoch.service
        ]

    def _attest(self, epoch: Epoch) -> Attestation:
        raw = self._configuration.to_bytes()
        binding = Binding(
            purpose="service-document",
            role="key-service",
            service=self._log.service,
            pool=None,
            keys=attested_keys(tuple(key.configuration for key in epoch.service), self._log.identity.public),
            freshness=("epoch", epoch.number.to_bytes(8)),
            configuration=self._configuration.digest,
        )
        return Attestation(
            evidence=self._attester.evidence(binding.report_data), configuration=raw, binding=binding
        )


def _since(moment: float) -> float:
    return time.monotonic() - moment


def _pool_entries(state: State, epoch: Epoch) -> tuple[PoolEntry, ...]:
    return tuple(
        PoolEntry(
            pool=pool,
            owner=state.owners.get(pool_id),
            epoch=epoch.number,
            not_after=epoch.not_after,
            keys=tuple(key.configuration for key in epoch.pool(pool_id)),
            models=tuple(
                ServedModel(
                    model=model.statement.model,
                    statement=model.digest,
                    plan=model.statement.plan,
                    options=model.statement.options,
                )
                for model in state.models_of(pool_id)
            ),
        )
        for pool_id, pool in state.pools.items()
    )
