"""Owner statements: what a model may do, signed by its owner and chained by digest (DESIGN, 4.3)."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field
from typing import Any, Final, Literal, cast, get_args

from cloister.core.encoding import decode, encode, unpack
from cloister.core.identity import SIGNATURE_SIZE, SigningKey, thumbprint, verify_signature
from cloister.core.protocol.limits import MAX_GRANTS, MAX_POLICY_ITEMS, MAX_SEALED_MODEL
from cloister.core.protocol.pool import require_name
from cloister.core.verifier.appraisal import AppraisalPolicy
from cloister.errors import AccessRefused, FormatError, UsageError

Batching = Literal["none", "same-user", "cross-user"]
Isolation = Literal["shared", "strict"]
PURPOSE: Final = "statement"
MAX_STATEMENT: Final = 2 << 20  # bytes
FULL_PLAN: Final = hashlib.sha256(b"cloister/v1 plan full").digest()


def model_id(owner: bytes, name: str) -> str:
    """``<owner>/<name>``: the owner's thumbprint in hex and the model's name; raises UsageError."""
    require_name(name, "model name")
    return f"{owner.hex()}/{name}"


def owner_of(model: str) -> bytes:
    """The owner's thumbprint in a model id; raises FormatError where it isn't one."""
    owner, slash, name = model.partition("/")
    try:
        raw = bytes.fromhex(owner)
    except ValueError:
        raw = b""
    if not slash or len(raw) != 32 or raw.hex() != owner:
        raise FormatError(claim="model id", expected="<64 hex digits>/<name>", actual=model[:200])
    require_name(name, "model name")
    return raw


@dataclass(frozen=True, slots=True, kw_only=True)
class SealedModel:
    """What a sealed model must be: digests (32 bytes each) of its header and of its ciphertext."""

    header: bytes
    blob: bytes
    size: int  # bytes of ciphertext

    def to_data(self) -> dict[str, Any]:
        """Plain data for `cloister.core.encoding`."""
        return {"blob": self.blob, "header": self.header, "size": self.size}

    @classmethod
    def from_data(cls, data: Any) -> SealedModel:
        """Read what `to_data` gave; raises FormatError."""
        fields = unpack(data, "sealed model", blob=32, header=32, size=int)
        if not 0 < fields["size"] <= MAX_SEALED_MODEL:
            raise FormatError(
                claim="sealed model size", expected=f"1 to {MAX_SEALED_MODEL} B", actual=fields["size"]
            )
        return cls(**fields)


@dataclass(frozen=True, slots=True, kw_only=True)
class ServingOptions:
    """How a model may be served.

    Attributes:
        slo_ms: The latency objective, milliseconds at the 99th percentile; 0 for none.
        batching: Whose requests may share a batch, where the model's rows don't depend on each other.
        isolation: ``strict`` is SeSeMI's sequential mode: one request at a time in each worker, no batches.
    """

    slo_ms: int = 0
    batching: Batching = "none"
    isolation: Isolation = "shared"

    def __post_init__(self) -> None:
        if type(self.slo_ms) is not int or not 0 <= self.slo_ms <= 3_600_000:
            raise UsageError(claim="slo_ms", expected="a whole number, 0 to 3600000", actual=self.slo_ms)
        if self.batching not in get_args(Batching):
            raise UsageError(claim="batching", expected="none, same-user or cross-user", actual=self.batching)
        if self.isolation not in get_args(Isolation):
            raise UsageError(claim="isolation", expected="shared or strict", actual=self.isolation)

    def to_data(self) -> dict[str, Any]:
        """Plain data for `cloister.core.encoding`."""
        return {"batching": self.batching, "isolation": self.isolation, "slo_ms": self.slo_ms}

    @classmethod
    def from_data(cls, data: Any) -> ServingOptions:
        """Read what `to_data` gave; raises FormatError or UsageError."""
        return cls(**unpack(data, "serving options", batching=str, isolation=str, slo_ms=int))


@dataclass(frozen=True, slots=True, kw_only=True)
class Statement:
    """One version of what an owner allows.

    Attributes:
        service: The service id it is meant for (32 bytes); no other service accepts it.
        model: ``<owner>/<name>``.
        version: 1 for the first, then one more each.
        previous: Digest of the statement before (32 bytes); zeros for the first.
        sealed_model: The ciphertext it speaks of.
        release_policy: The workers that may hold the model's key.
        key_service: The key services that may hold it.
        plan: Digest of the placement plan.
        grants: User id -> expiry, Unix seconds.
        options: How it may be served.
    """

    service: bytes
    model: str
    version: int
    previous: bytes
    sealed_model: SealedModel
    release_policy: AppraisalPolicy
    key_service: AppraisalPolicy
    plan: bytes = FULL_PLAN
    grants: dict[bytes, int] = field(default_factory=dict)
    options: ServingOptions = field(default_factory=ServingOptions)

    @property
    def owner(self) -> bytes:
        """The owner's thumbprint."""
        return owner_of(self.model)

    @property
    def digest(self) -> bytes:
        """SHA-256 of `to_bytes` (32 bytes)."""
        return hashlib.sha256(self.to_bytes()).digest()

    def require_grant(self, user: bytes, now: int) -> None:
        """Refuse a user whom the owner does not grant the model.

        Raises:
            AccessRefused: no grant, or an expired one.
        """
        expiry = self.grants.get(user)
        if expiry is None:
            raise AccessRefused(
                "the owner does not grant this model to this user",
                code="access.grant",
                claim="grant",
                expected=f"a grant for user {user.hex()[:16]}",
                actual="none",
                hint="Ask the owner to grant it to your user id at this owner",
            )
        if expiry <= now:
            raise AccessRefused(
                code="access.expired", claim="grant expiry", expected=f"after {now}", actual=expiry
            )

    def to_bytes(self) -> bytes:
        """The signed text."""
        return encode(
            {
                "grants": self.grants,
                "key_service": self.key_service.to_data(),
                "model": self.model,
                "options": self.options.to_data(),
                "plan": self.plan,
                "previous": self.previous,
                "release_policy": self.release_policy.to_data(),
                "sealed_model": self.sealed_model.to_data(),
                "service": self.service,
                "version": self.version,
            }
        )

    @classmethod
    def from_bytes(cls, raw: bytes) -> Statement:
        """Read a statement text; raises FormatError or UsageError."""
        fields = unpack(
            decode(raw, what="statement", limit=MAX_STATEMENT, items=2 * (MAX_GRANTS + MAX_POLICY_ITEMS)),
            "statement",
            grants=dict,
            key_service=dict,
            model=str,
            options=dict,
            plan=32,
            previous=32,
            release_policy=dict,
            sealed_model=dict,
            service=32,
            version=int,
        )
        grants = fields["grants"]
        if len(grants) > MAX_GRANTS:
            raise FormatError(claim="grants", expected=f"at most {MAX_GRANTS}", actual=len(grants))
        if not all(
            type(user) is bytes and len(user) == 32 and type(at) is int for user, at in grants.items()
        ):
            raise FormatError("a grant is not a user id and an expiry", claim="grants")
        if not 1 <= fields["version"] < 1 << 53:
            raise FormatError(claim="statement version", expected="at least 1", actual=fields["version"])
        owner_of(fields["model"])
        return cls(
            service=fields["service"],
            model=fields["model"],
            version=fields["version"],
            previous=fields["previous"],
            sealed_model=SealedModel.from_data(fields["sealed_model"]),
            release_policy=AppraisalPolicy.from_data(fields["release_policy"]),
            key_service=AppraisalPolicy.from_data(fields["key_service"]),
            plan=fields["plan"],
            grants=grants,
            options=ServingOptions.from_data(fields["options"]),
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class SignedStatement:
    """A statement's text, the owner's public key (32 bytes) and signature (64 bytes)."""

    text: bytes
    owner_key: bytes
    signature: bytes

    @classmethod
    def sign(cls, statement: Statement, key: SigningKey) -> SignedStatement:
        """Sign as the owner named in the model id; raises UsageError for another key."""
        if key.thumbprint != statement.owner:
            raise UsageError(claim="owner key", expected=statement.owner.hex(), actual=key.thumbprint.hex())
        text = statement.to_bytes()
        return cls(text=text, owner_key=key.public, signature=key.sign(PURPOSE, text))

    def open(self) -> Statement:
        """The statement, once its signature is checked.

        Raises:
            Tampered: not signed by the key that it names.
            AccessRefused: signed by somebody else than the model's owner.
            FormatError: not a statement.
        """
        verify_signature(self.owner_key, PURPOSE, self.text, self.signature)
        statement = Statement.from_bytes(self.text)
        if thumbprint(self.owner_key) != statement.owner:
            raise AccessRefused(
                "the statement is signed by somebody else than the model's owner",
                code="access.owner",
                claim="owner",
                expected=statement.owner.hex(),
                actual=thumbprint(self.owner_key).hex(),
            )
        return statement

    def to_data(self) -> dict[str, Any]:
        """Plain data for `cloister.core.encoding`."""
        return {"owner_key": self.owner_key, "signature": self.signature, "text": self.text}

    @classmethod
    def from_data(cls, data: Any) -> SignedStatement:
        """Read what `to_data` gave; raises FormatError."""
        fields = unpack(data, "signed statement", owner_key=32, signature=SIGNATURE_SIZE, text=bytes)
        return cls(**cast(dict[str, bytes], fields))
