"""Key release (DESIGN, 4.2): the messages between worker and key service, and what binds them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Final

from cloister.core.encoding import decode, digest, encode, unpack
from cloister.core.identity import CONTEXT, SIGNATURE_SIZE, SigningKey, thumbprint, verify_signature
from cloister.core.protocol.attestation import Attestation
from cloister.core.protocol.limits import MAX_LEASE, MAX_LEASE_REQUESTS, MAX_MODELS, MAX_REQUEST_ITEMS
from cloister.core.protocol.statement import SignedStatement
from cloister.core.secret import Secret
from cloister.errors import BindingRefused, FormatError

CHALLENGE_SIZE: Final = 56  # bytes: nonce 16, expiry 8, MAC 32
INCARNATION_SIZE: Final = 16  # bytes
MODEL_KEY_SIZE: Final = 32  # bytes
MAX_RELEASE: Final = 8 << 20  # bytes
CERTIFICATE_PURPOSE: Final = "worker certificate"


@dataclass(frozen=True, slots=True, kw_only=True)
class ReleaseRequest:
    """What a worker asks with.

    Attributes:
        challenge: From the key service, used once.
        document: Digest of the service document that the worker verified (32 bytes).
        incarnation: Random, one for each start of the worker (16 bytes).
        attestation: Purpose ``release``; binds the worker's KEM and signing keys and the challenge.
    """

    challenge: bytes
    document: bytes
    incarnation: bytes
    attestation: Attestation

    def to_bytes(self) -> bytes:
        """The content of the inner request."""
        return encode(
            {
                "attestation": self.attestation.to_data(),
                "challenge": self.challenge,
                "document": self.document,
                "incarnation": self.incarnation,
            }
        )

    @classmethod
    def from_bytes(cls, raw: bytes | memoryview) -> ReleaseRequest:
        """Read what `to_bytes` gave; raises FormatError."""
        fields = unpack(
            decode(raw, what="release request", limit=MAX_RELEASE, items=MAX_REQUEST_ITEMS),
            "release request",
            attestation=dict,
            challenge=CHALLENGE_SIZE,
            document=32,
            incarnation=INCARNATION_SIZE,
        )
        return cls(**{**fields, "attestation": Attestation.from_data(fields["attestation"])})


@dataclass(frozen=True, slots=True, kw_only=True)
class PoolKey:
    """One private OHTTP key of a pool, with its configuration (RFC 9458) and its epoch."""

    epoch: int
    not_after: int  # Unix seconds
    configuration: bytes
    private_key: Secret

    def to_data(self) -> dict[str, Any]:
        """Plain data for `cloister.core.encoding`; it holds the secret."""
        return {
            "configuration": self.configuration,
            "epoch": self.epoch,
            "not_after": self.not_after,
            "private_key": self.private_key.reveal(),
        }

    @classmethod
    def from_data(cls, data: Any) -> PoolKey:
        """Read what `to_data` gave; raises FormatError."""
        fields = unpack(data, "pool key", configuration=bytes, epoch=int, not_after=int, private_key=bytes)
        return cls(**{**fields, "private_key": Secret(fields["private_key"])})


@dataclass(frozen=True, slots=True, kw_only=True)
class ReleasedModel:
    """A model's key with the statement under which it is released."""

    statement: SignedStatement
    key: Secret

    def to_data(self) -> dict[str, Any]:
        """Plain data for `cloister.core.encoding`; it holds the secret."""
        return {"key": self.key.reveal(), "statement": self.statement.to_data()}

    @classmethod
    def from_data(cls, data: Any) -> ReleasedModel:
        """Read what `to_data` gave; raises FormatError."""
        fields = unpack(data, "released model", key=MODEL_KEY_SIZE, statement=dict)
        return cls(key=Secret(fields["key"]), statement=SignedStatement.from_data(fields["statement"]))


@dataclass(frozen=True, slots=True, kw_only=True)
class Lease:
    """How long a worker may serve without asking again: in seconds and in requests (DESIGN, 4.7)."""

    seconds: int
    requests: int

    def to_data(self) -> dict[str, Any]:
        """Plain data for `cloister.core.encoding`."""
        return {"requests": self.requests, "seconds": self.seconds}

    @classmethod
    def from_data(cls, data: Any) -> Lease:
        """Read what `to_data` gave; raises FormatError."""
        fields = unpack(data, "lease", requests=int, seconds=int)
        if not (0 < fields["seconds"] <= MAX_LEASE and 0 < fields["requests"] <= MAX_LEASE_REQUESTS):
            raise FormatError(claim="lease", expected=f"at most {MAX_LEASE} s", actual=fields["seconds"])
        return cls(**fields)


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkerCertificate:
    """The service's word for a worker's signing key: which code, which start, which pool and epoch."""

    service: bytes
    pool: bytes
    epoch: int
    measurement: bytes
    incarnation: bytes
    public_key: bytes
    not_after: int
    signature: bytes

    @classmethod
    def sign(cls, key: SigningKey, **fields: Any) -> WorkerCertificate:
        """Issue one; ``fields`` are the attributes but ``service`` and ``signature``."""
        signature = key.sign(CERTIFICATE_PURPOSE, {"service": key.thumbprint, **fields})
        return cls(service=key.thumbprint, signature=signature, **fields)

    def verify(self, service_key: bytes) -> None:
        """Check that the service signed it; raises BindingRefused or Tampered."""
        if thumbprint(service_key) != self.service:
            raise BindingRefused(
                code="binding.service",
                claim="certificate's issuer",
                expected=self.service.hex(),
                actual=thumbprint(service_key).hex(),
            )
        fields = self.to_data()
        signature = fields.pop("signature")
        verify_signature(service_key, CERTIFICATE_PURPOSE, fields, signature)

    def to_data(self) -> dict[str, Any]:
        """Plain data for `cloister.core.encoding`."""
        return {name: getattr(self, name) for name in self.__slots__}

    @classmethod
    def from_data(cls, data: Any) -> WorkerCertificate:
        """Read what `to_data` gave; raises FormatError."""
        return cls(
            **unpack(
                data,
                "worker certificate",
                service=32,
                pool=32,
                epoch=int,
                measurement=bytes,
                incarnation=INCARNATION_SIZE,
                public_key=32,
                not_after=int,
                signature=SIGNATURE_SIZE,
            )
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Release:
    """What a worker gets: what its role may have, and no more.

    Attributes:
        pool_keys: Private OHTTP keys of the pool, one for each live epoch and suite.
        models: Keys and statements of the models that the pool serves.
        lease: How long this holds.
        certificate: For the worker's signing key.
        service_key: The service's identity key, which signed the certificate.
    """

    pool_keys: tuple[PoolKey, ...]
    models: tuple[ReleasedModel, ...]
    lease: Lease
    certificate: WorkerCertificate
    service_key: bytes

    def to_bytes(self) -> bytes:
        """The plaintext that is sealed to the worker."""
        return encode(
            {
                "certificate": self.certificate.to_data(),
                "lease": self.lease.to_data(),
                "models": [model.to_data() for model in self.models],
                "pool_keys": [key.to_data() for key in self.pool_keys],
                "service_key": self.service_key,
            }
        )

    @classmethod
    def from_bytes(cls, raw: bytes) -> Release:
        """Read what `to_bytes` gave; raises FormatError."""
        fields = unpack(
            decode(raw, what="release", limit=MAX_RELEASE),
            "release",
            certificate=dict,
            lease=dict,
            models=list,
            pool_keys=list,
            service_key=32,
        )
        if len(fields["models"]) > MAX_MODELS:
            raise FormatError(
                claim="released models", expected=f"at most {MAX_MODELS}", actual=len(fields["models"])
            )
        return cls(
            pool_keys=tuple(PoolKey.from_data(item) for item in fields["pool_keys"]),
            models=tuple(ReleasedModel.from_data(item) for item in fields["models"]),
            lease=Lease.from_data(fields["lease"]),
            certificate=WorkerCertificate.from_data(fields["certificate"]),
            service_key=fields["service_key"],
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class SealedRelease:
    """A release, sealed to the attested KEM key; from the digests the worker computes ``info``."""

    statements: tuple[bytes, ...]
    sealed: bytes

    def to_bytes(self) -> bytes:
        """The content of the inner response."""
        return encode({"sealed": self.sealed, "statements": list(self.statements)})

    @classmethod
    def from_bytes(cls, raw: bytes | memoryview) -> SealedRelease:
        """Read what `to_bytes` gave; raises FormatError."""
        data = decode(raw, what="sealed release", limit=MAX_RELEASE)
        fields = unpack(data, "sealed release", sealed=bytes, statements=list)
        if not all(type(item) is bytes and len(item) == 32 for item in fields["statements"]):
            raise FormatError("a statement digest has another length", claim="statements")
        return cls(sealed=fields["sealed"], statements=tuple(fields["statements"]))


def release_info(request: ReleaseRequest, *, pool: bytes, statements: tuple[bytes, ...]) -> bytes:
    """HPKE ``info`` of a release (32 bytes): everything that this one exchange is about."""
    return digest(
        [
            CONTEXT,
            "release",
            request.challenge,
            request.attestation.digest,
            request.document,
            request.incarnation,
            pool,
            list(statements),
        ]
    )


def model_key_info(service: bytes) -> bytes:
    """HPKE ``info`` under which an owner seals a model's key; the statement digest is the AAD."""
    return digest([CONTEXT, "model key", service])
