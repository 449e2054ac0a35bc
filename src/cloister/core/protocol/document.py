"""The service document: one report for all users and all enclaves (DESIGN, 4.1; TEMPER's report reuse).

A relying party checks, in the order in which the body cites it:

1. the signature, by the key whose thumbprint is the service id;
2. the time: not before, not after, and a bounded lifetime;
3. the key service's attestation, bound to this service, this epoch and these keys;
4. the tree head: signed by the same service.

Whether the head extends the last one seen is checked where that is known (`TreeHead.require_extends`).
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import Any, Final

from cloister.core.encoding import decode, encode, unpack
from cloister.core.identity import SIGNATURE_SIZE, SigningKey, thumbprint, verify_signature
from cloister.core.ohttp.keyconfig import KeyConfiguration
from cloister.core.protocol.attestation import Attestation, Attested, verify_attestation
from cloister.core.protocol.head import TreeHead
from cloister.core.protocol.limits import CLOCK_SKEW, MAX_DOCUMENT_LIFETIME, MAX_EPOCH, MAX_MODELS, MAX_POOLS
from cloister.core.protocol.pool import Pool
from cloister.core.protocol.statement import ServingOptions, owner_of
from cloister.core.verifier.appraisal import AppraisalPolicy
from cloister.core.verifier.result import CollateralMemory, Step
from cloister.errors import BindingRefused, EvidenceRefused, FormatError, NotFound

PURPOSE: Final = "service document"
MAX_NUMBER: Final = 1 << 53  # of epochs and times
MAX_DOCUMENT: Final = 4 << 20  # bytes
KEM_NAMES: Final = {0x647A: "X-Wing", 0x0020: "DHKEM(X25519, HKDF-SHA256)"}
SIGNING_ALGORITHM: Final = "Ed25519"


@dataclass(frozen=True, slots=True, kw_only=True)
class ServedModel:
    """A model in a pool: what the service says of it, to be matched with what the owner signed."""

    model: str
    statement: bytes  # digest, 32 bytes
    plan: bytes  # digest, 32 bytes
    options: ServingOptions
    canary: int = 0  # per mille of requests that a successor serves; 0 until upgrades exist

    def to_data(self) -> dict[str, Any]:
        """Plain data for `cloister.core.encoding`."""
        return {
            "canary": self.canary,
            "model": self.model,
            "options": self.options.to_data(),
            "plan": self.plan,
            "statement": self.statement,
        }

    @classmethod
    def from_data(cls, data: Any) -> ServedModel:
        """Read what `to_data` gave; raises FormatError or UsageError."""
        fields = unpack(data, "served model", canary=int, model=str, options=dict, plan=32, statement=32)
        owner_of(fields["model"])
        if not 0 <= fields["canary"] <= 1000:
            raise FormatError(claim="canary share", expected="0 to 1000 per mille", actual=fields["canary"])
        return cls(**{**fields, "options": ServingOptions.from_data(fields["options"])})


@dataclass(frozen=True, slots=True, kw_only=True)
class PoolEntry:
    """A pool as the service document lists it.

    Attributes:
        pool: What its workers must be.
        owner: Thumbprint of the one owner it serves; None while unclaimed, or where it is shared.
        epoch: Number of the epoch whose keys these are.
        not_after: When the epoch's keys die, Unix seconds.
        keys: One OHTTP key configuration for each suite, the preferred first.
        models: The models that it serves.
    """

    pool: Pool
    owner: bytes | None
    epoch: int
    not_after: int
    keys: tuple[KeyConfiguration, ...]
    models: tuple[ServedModel, ...]

    def model(self, name: str) -> ServedModel:
        """The entry of one model; raises NotFound."""
        for entry in self.models:
            if entry.model == name:
                return entry
        raise NotFound(
            "the pool does not serve this model",
            code="not-found.model",
            claim="model",
            expected=name,
            actual=", ".join(entry.model for entry in self.models) or "no model",
        )

    def to_data(self) -> dict[str, Any]:
        """Plain data for `cloister.core.encoding`."""
        return {
            "epoch": self.epoch,
            "keys": [key.to_bytes() for key in self.keys],
            "models": [entry.to_data() for entry in self.models],
            "not_after": self.not_after,
            "owner": self.owner,
            "pool": self.pool.to_data(),
        }

    @classmethod
    def from_data(cls, data: Any) -> PoolEntry:
        """Read what `to_data` gave; raises FormatError or UsageError."""
        fields = unpack(
            data,
            "pool entry",
            epoch=int,
            keys=list,
            models=list,
            not_after=int,
            owner=(bytes, type(None)),
            pool=dict,
        )
        if len(fields["models"]) > MAX_MODELS:
            raise FormatError(
                claim="models in a pool", expected=f"at most {MAX_MODELS}", actual=len(fields["models"])
            )
        return cls(
            pool=Pool.from_data(fields["pool"]),
            owner=fields["owner"],
            epoch=fields["epoch"],
            not_after=fields["not_after"],
            keys=keys_from_data(fields["keys"]),
            models=tuple(ServedModel.from_data(entry) for entry in fields["models"]),
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class ServiceDocument:
    """What the key service says of itself and of its pools.

    Attributes:
        service: Service id: thumbprint of the identity key (32 bytes).
        custodians: Thumbprints of the custodians; empty where none were named.
        threshold: How many of them must agree.
        attestation: The key service's attestation; it binds ``keys`` and the identity key.
        keys: OHTTP key configurations of the key service itself.
        head: The audit log's signed head.
        epoch: Number of the service epoch.
        pools: Every pool.
        not_before: Unix seconds.
        not_after: Unix seconds.
    """

    service: bytes
    custodians: tuple[bytes, ...]
    threshold: int
    attestation: Attestation
    keys: tuple[KeyConfiguration, ...]
    head: TreeHead
    epoch: int
    pools: tuple[PoolEntry, ...]
    not_before: int
    not_after: int

    def pool(self, pool_id: bytes) -> PoolEntry:
        """The entry of one pool; raises NotFound."""
        for entry in self.pools:
            if entry.pool.id == pool_id:
                return entry
        raise NotFound(
            code="not-found.pool", claim="pool", expected=pool_id.hex(), actual=f"{len(self.pools)} others"
        )

    def pools_of(self, model: str) -> list[PoolEntry]:
        """The pools that serve a model."""
        return [entry for entry in self.pools if any(served.model == model for served in entry.models)]

    def to_bytes(self) -> bytes:
        """The signed text."""
        return encode(
            {
                "attestation": self.attestation.to_data(),
                "custodians": list(self.custodians),
                "epoch": self.epoch,
                "head": self.head.to_data(),
                "keys": [key.to_bytes() for key in self.keys],
                "not_after": self.not_after,
                "not_before": self.not_before,
                "pools": [entry.to_data() for entry in self.pools],
                "service": self.service,
                "threshold": self.threshold,
            }
        )

    @classmethod
    def from_bytes(cls, raw: bytes) -> ServiceDocument:
        """Read a document's text; raises FormatError or UsageError."""
        fields = unpack(
            decode(raw, what="service document", limit=MAX_DOCUMENT),
            "service document",
            attestation=dict,
            custodians=list,
            epoch=int,
            head=dict,
            keys=list,
            not_after=int,
            not_before=int,
            pools=list,
            service=32,
            threshold=int,
        )
        if len(fields["pools"]) > MAX_POOLS:
            raise FormatError(claim="pools", expected=f"at most {MAX_POOLS}", actual=len(fields["pools"]))
        for name in ("epoch", "not_after", "not_before", "threshold"):
            if not 0 <= fields[name] < MAX_NUMBER:
                raise FormatError(claim=name, expected=f"0 to {MAX_NUMBER}", actual=fields[name])
        if not all(type(item) is bytes and len(item) == 32 for item in fields["custodians"]):
            raise FormatError("a custodian is not a thumbprint", claim="custodians")
        return cls(
            service=fields["service"],
            custodians=tuple(fields["custodians"]),
            threshold=fields["threshold"],
            attestation=Attestation.from_data(fields["attestation"]),
            keys=keys_from_data(fields["keys"]),
            head=TreeHead.from_data(fields["head"]),
            epoch=fields["epoch"],
            pools=tuple(PoolEntry.from_data(entry) for entry in fields["pools"]),
            not_before=fields["not_before"],
            not_after=fields["not_after"],
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class SignedDocument:
    """A service document's text, the identity key (32 bytes) and its signature (64 bytes)."""

    text: bytes
    key: bytes
    signature: bytes

    @property
    def digest(self) -> bytes:
        """SHA-256 of the text (32 bytes)."""
        return hashlib.sha256(self.text).digest()

    @classmethod
    def sign(cls, document: ServiceDocument, key: SigningKey) -> SignedDocument:
        """Sign with the service's identity key."""
        text = document.to_bytes()
        return cls(text=text, key=key.public, signature=key.sign(PURPOSE, text))

    def to_bytes(self) -> bytes:
        """What ``/.well-known/cloister`` serves."""
        return encode({"key": self.key, "signature": self.signature, "text": self.text})

    @classmethod
    def from_bytes(cls, raw: bytes) -> SignedDocument:
        """Read what ``/.well-known/cloister`` serves; raises FormatError."""
        data = decode(raw, what="signed service document", limit=MAX_DOCUMENT)
        return cls(**unpack(data, "signed service document", key=32, signature=SIGNATURE_SIZE, text=bytes))


@dataclass(frozen=True, slots=True, kw_only=True)
class VerifiedDocument:
    """A service document that verified.

    Attributes:
        document: What it says.
        digest: Its digest (32 bytes).
        attested: The key service's evidence and configuration.
        steps: Every check made, in order.
        not_after: Until when nothing of this expires, Unix seconds.
    """

    document: ServiceDocument
    digest: bytes
    attested: Attested
    steps: tuple[Step, ...]
    not_after: int


def verify_document(
    raw: bytes,
    *,
    policy: AppraisalPolicy,
    service: bytes,
    now: int,
    seen: CollateralMemory | None = None,
) -> VerifiedDocument:
    """Verify a service document.

    Args:
        raw: What ``/.well-known/cloister`` served.
        policy: The relying party's reference values for key services.
        service: The service id that it pinned (32 bytes).
        now: Its own time, Unix seconds.
        seen: Collateral that it remembers; updated.

    Raises:
        FormatError: it does not parse.
        Tampered: step 1.
        EvidenceRefused: step 2, or the evidence of step 3.
        BindingRefused: another service (step 1, 4), or evidence made for something else (step 3).
        AppraisalRefused: step 3.
    """
    signed = SignedDocument.from_bytes(raw)
    _require_service("service document's signer", service, thumbprint(signed.key))  # step 1
    verify_signature(signed.key, PURPOSE, signed.text, signed.signature)
    document = ServiceDocument.from_bytes(signed.text)
    _require_service("service document's service", service, document.service)
    _require_time(document, now)  # step 2
    attested = verify_attestation(  # step 3
        document.attestation,
        policy=policy,
        now=now,
        purpose="service-document",
        role="key-service",
        service=service,
        pool=None,
        freshness=("epoch", document.epoch.to_bytes(8)),
        seen=seen,
    )
    if attested.binding.keys != attested_keys(document.keys, signed.key):
        raise BindingRefused(
            "the document lists other keys than its evidence binds",
            code="binding.keys",
            claim="key service's keys",
            expected="the attested ones",
            actual="others",
        )
    document.head.verify(service)  # step 4
    return VerifiedDocument(
        document=document,
        digest=signed.digest,
        attested=attested,
        steps=(
            Step(name="service document", outcome="ok", detail=f"signed by service {service.hex()[:16]}"),
            Step(name="validity", outcome="ok", detail=f"{document.not_before} to {document.not_after}"),
            *attested.steps,
            Step(name="tree head", outcome="ok", detail=f"{document.head.size} entries"),
        ),
        not_after=min(document.not_after, attested.not_after),
    )


def attested_keys(
    configurations: tuple[KeyConfiguration, ...], signing_key: bytes
) -> tuple[tuple[str, bytes], ...]:
    """The (algorithm, public key) pairs that REPORTDATA binds for these keys."""
    pairs = [(KEM_NAMES[config.kem_id], config.public_key) for config in configurations]
    return (*pairs, (SIGNING_ALGORITHM, signing_key))


def keys_from_data(data: list[Any]) -> tuple[KeyConfiguration, ...]:
    """One to eight key configurations of known KEMs; raises FormatError."""
    if not 1 <= len(data) <= 8 or not all(type(item) is bytes for item in data):
        raise FormatError(claim="key configurations", expected="1 to 8", actual=len(data))
    configurations = tuple(KeyConfiguration.from_bytes(item) for item in data)
    for configuration in configurations:
        if configuration.kem_id not in KEM_NAMES:
            raise FormatError(claim="KEM id", expected=sorted(KEM_NAMES), actual=configuration.kem_id)
    return configurations


def _require_service(claim: str, expected: bytes, actual: bytes) -> None:
    if expected != actual:
        raise BindingRefused(
            "this is another service than the one pinned",
            code="binding.service",
            claim=claim,
            expected=expected.hex(),
            actual=actual.hex(),
            hint="Check the service id with whoever gave you the policy",
        )


def _require_time(document: ServiceDocument, now: int) -> None:
    lifetime = document.not_after - document.not_before
    if not 0 < lifetime <= MAX_DOCUMENT_LIFETIME:
        raise EvidenceRefused(
            code="document.lifetime",
            claim="service document lifetime",
            expected=f"1 to {MAX_DOCUMENT_LIFETIME} s",
            actual=lifetime,
        )
    if not document.not_before - CLOCK_SKEW <= now <= document.not_after:
        raise EvidenceRefused(
            "the service document is not valid now",
            code="document.expired" if now > document.not_after else "document.not-yet-valid",
            claim="service document validity",
            expected=f"{document.not_before} to {document.not_after}",
            actual=now,
            hint="Its host may be serving an old copy; check your clock, then try again",
        )
    for entry in document.pools:
        if entry.not_after - now > MAX_EPOCH + CLOCK_SKEW:
            raise EvidenceRefused(
                code="document.epoch",
                claim="epoch's end",
                expected=f"within {MAX_EPOCH} s",
                actual=entry.not_after - now,
            )
