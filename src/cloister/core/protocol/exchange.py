"""The smaller messages with the key service: challenges, possession, publication, pools."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from cloister.core.encoding import decode, encode, unpack
from cloister.core.identity import (
    CONTEXT,
    SIGNATURE_SIZE,
    THUMBPRINT_SIZE,
    SigningKey,
    thumbprint,
    verify_signature,
)
from cloister.core.merkle import HASH_SIZE, MerkleTree, verify_inclusion
from cloister.core.protocol.head import TreeHead, hashes_from_data
from cloister.core.protocol.limits import MAX_POLICY_ITEMS, MAX_REQUEST_LIFETIME
from cloister.core.protocol.pool import Pool
from cloister.core.protocol.release import CHALLENGE_SIZE
from cloister.core.protocol.statement import SignedStatement, owner_of
from cloister.errors import AccessRefused, FormatError

NONCE_SIZE: Final = 32  # bytes
POSSESSION_PURPOSE: Final = "possession"
QUERY_PURPOSE: Final = "statement query"
MAX_BATCH: Final = 4096  # nonces under one signature
MAX_POOL: Final = 1 << 20  # bytes
_MAX_SMALL: Final = 8 << 10  # bytes
_MAX_FLAT: Final = 64  # items of a message that nests nothing but a signed text


@dataclass(frozen=True, slots=True, kw_only=True)
class HeadRequest:
    """What a challenge or a proof of possession is asked with.

    Attributes:
        nonce: 32 bytes.
        head: The newest tree head that the sender has seen; None on a first visit.
        document: Digest of the service document that it holds (32 bytes), or None.
    """

    nonce: bytes
    head: TreeHead | None
    document: bytes | None = None

    def to_bytes(self) -> bytes:
        """The content of the inner request."""
        head = self.head.to_data() if self.head else None
        return encode({"document": self.document, "head": head, "nonce": self.nonce})

    @classmethod
    def from_bytes(cls, raw: bytes | memoryview) -> HeadRequest:
        """Read what `to_bytes` gave; raises FormatError."""
        data = decode(raw, what="head request", limit=_MAX_SMALL)
        fields = unpack(
            data, "head request", document=(bytes, type(None)), head=(dict, type(None)), nonce=NONCE_SIZE
        )
        if fields["document"] is not None and len(fields["document"]) != HASH_SIZE:
            raise FormatError(
                claim="document digest", expected=f"{HASH_SIZE} B", actual=len(fields["document"])
            )
        return cls(
            nonce=fields["nonce"],
            head=None if fields["head"] is None else TreeHead.from_data(fields["head"]),
            document=fields["document"],
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Possession:
    """Proof that the service holds its key now: a signature over a Merkle tree of clients' nonces.

    Attributes:
        document: Digest of the document that was asked about, if the service served it a moment ago; else of
            the one that it serves now (32 bytes).
        root: Root over the batch's nonces (32 bytes).
        size: Nonces in the batch.
        index: Which of them is the client's.
        path: From it to the root.
        signature: By the identity key over (document digest, root, size).
        head: The log's head now.
        consistency: Proof that it extends the head in the request.
    """

    document: bytes
    root: bytes
    size: int
    index: int
    path: tuple[bytes, ...]
    signature: bytes
    head: TreeHead
    consistency: tuple[bytes, ...]

    @staticmethod
    def sign(key: SigningKey, document: bytes, tree: MerkleTree) -> bytes:
        """Sign one batch for the current document (its digest)."""
        return key.sign(POSSESSION_PURPOSE, [CONTEXT, document, tree.root(), len(tree)])

    def verify(self, request: HeadRequest, *, service: bytes, service_key: bytes) -> None:
        """Check freshness and that the log only grew.

        Whether ``document`` is the one at hand is the caller's to see: a cache may lag behind by a moment.

        Raises:
            Tampered: the signature or the path does not hold for this nonce.
            Rollback: the log does not extend the head in the request.
        """
        verify_inclusion(self.root, self.size, self.index, request.nonce, self.path)
        verify_signature(
            service_key, POSSESSION_PURPOSE, [CONTEXT, self.document, self.root, self.size], self.signature
        )
        self.head.verify(service)
        self.head.require_extends(request.head, list(self.consistency))

    def to_bytes(self) -> bytes:
        """The content of the inner response."""
        return encode(
            {
                "consistency": list(self.consistency),
                "document": self.document,
                "head": self.head.to_data(),
                "index": self.index,
                "path": list(self.path),
                "root": self.root,
                "signature": self.signature,
                "size": self.size,
            }
        )

    @classmethod
    def from_bytes(cls, raw: bytes | memoryview) -> Possession:
        """Read what `to_bytes` gave; raises FormatError."""
        fields = unpack(
            decode(raw, what="possession", limit=_MAX_SMALL),
            "possession",
            consistency=list,
            document=32,
            head=dict,
            index=int,
            path=list,
            root=HASH_SIZE,
            signature=SIGNATURE_SIZE,
            size=int,
        )
        if not 0 <= fields["index"] < fields["size"] <= MAX_BATCH:
            raise FormatError(claim="batch", expected=f"1 to {MAX_BATCH} nonces", actual=fields["size"])
        return cls(
            **{
                **fields,
                "consistency": tuple(hashes_from_data(fields["consistency"], "consistency proof")),
                "head": TreeHead.from_data(fields["head"]),
                "path": tuple(hashes_from_data(fields["path"], "inclusion path")),
            }
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Challenge:
    """A challenge (used once) and the proof that the log extends the head in the request."""

    challenge: bytes
    head: TreeHead
    consistency: tuple[bytes, ...]

    def to_bytes(self) -> bytes:
        """The content of the inner response."""
        return encode(
            {"challenge": self.challenge, "consistency": list(self.consistency), "head": self.head.to_data()}
        )

    @classmethod
    def from_bytes(cls, raw: bytes | memoryview) -> Challenge:
        """Read what `to_bytes` gave; raises FormatError."""
        data = decode(raw, what="challenge", limit=_MAX_SMALL)
        fields = unpack(data, "challenge", challenge=CHALLENGE_SIZE, consistency=list, head=dict)
        return cls(
            challenge=fields["challenge"],
            head=TreeHead.from_data(fields["head"]),
            consistency=tuple(hashes_from_data(fields["consistency"], "consistency proof")),
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Publication:
    """An owner's statement on its way to the key service.

    Attributes:
        statement: Signed.
        sealed_key: The model's key, HPKE-sealed to the service with the statement digest as AAD; None where
        the
            sealed model stays the same.
        key_id: Which of the service's key configurations it is sealed to.
        pool: The pool that shall serve the model (id, 32 bytes).
    """

    statement: SignedStatement
    sealed_key: bytes | None
    key_id: int
    pool: bytes

    def to_bytes(self) -> bytes:
        """The content of the inner request."""
        return encode(
            {
                "key_id": self.key_id,
                "pool": self.pool,
                "sealed_key": self.sealed_key,
                "statement": self.statement.to_data(),
            }
        )

    @classmethod
    def from_bytes(cls, raw: bytes | memoryview) -> Publication:
        """Read what `to_bytes` gave; raises FormatError."""
        fields = unpack(
            decode(raw, what="publication", items=_MAX_FLAT),
            "publication",
            key_id=int,
            pool=32,
            sealed_key=(bytes, type(None)),
            statement=dict,
        )
        return cls(**{**fields, "statement": SignedStatement.from_data(fields["statement"])})


@dataclass(frozen=True, slots=True, kw_only=True)
class PoolCreation:
    """The operator's wish for a pool.

    Attributes:
        pool: What its workers must be.
        owner: Thumbprint of the owner that it is for; None: the first one that publishes to it.
    """

    pool: Pool
    owner: bytes | None = None

    def __post_init__(self) -> None:
        if self.owner is not None and (self.pool.shared or len(self.owner) != THUMBPRINT_SIZE):
            raise FormatError(claim="pool owner", expected="a thumbprint; none where it is shared")

    def to_bytes(self) -> bytes:
        """The content of the inner request."""
        return encode({"owner": self.owner, "pool": self.pool.to_data()})

    @classmethod
    def from_bytes(cls, raw: bytes | memoryview) -> PoolCreation:
        """Read what `to_bytes` gave; raises FormatError or UsageError."""
        data = decode(raw, what="pool creation", limit=MAX_POOL, items=MAX_POLICY_ITEMS)
        fields = unpack(data, "pool creation", owner=(bytes, type(None)), pool=dict)
        return cls(pool=Pool.from_data(fields["pool"]), owner=fields["owner"])


@dataclass(frozen=True, slots=True, kw_only=True)
class StatementQuery:
    """An owner's question for the newest statement of a model; nobody else may read who is granted what.

    Attributes:
        model: Model id.
        time: When it was signed, Unix seconds.
        owner_key: The owner's public key (32 bytes).
        signature: Over service, model and time (64 bytes).
    """

    model: str
    time: int
    owner_key: bytes
    signature: bytes

    @classmethod
    def sign(cls, key: SigningKey, *, service: bytes, model: str, time: int) -> StatementQuery:
        """Ask one service."""
        signature = key.sign(QUERY_PURPOSE, [service, model, time])
        return cls(model=model, time=time, owner_key=key.public, signature=signature)

    def verify(self, *, service: bytes, now: int) -> None:
        """Check who asks, and when.

        Raises:
            Tampered: not signed by the key that it names.
            AccessRefused: not by the model's owner, or too long ago.
        """
        if thumbprint(self.owner_key) != owner_of(self.model):
            raise AccessRefused(
                code="access.owner",
                claim="owner",
                expected=owner_of(self.model).hex(),
                actual=thumbprint(self.owner_key).hex(),
            )
        verify_signature(self.owner_key, QUERY_PURPOSE, [service, self.model, self.time], self.signature)
        if abs(now - self.time) > MAX_REQUEST_LIFETIME:
            raise AccessRefused(
                code="access.query", claim="time of the query", expected=now, actual=self.time
            )

    def to_bytes(self) -> bytes:
        """The content of the inner request."""
        return encode(
            {"model": self.model, "owner_key": self.owner_key, "signature": self.signature, "time": self.time}
        )

    @classmethod
    def from_bytes(cls, raw: bytes | memoryview) -> StatementQuery:
        """Read what `to_bytes` gave; raises FormatError."""
        data = decode(raw, what="statement query", limit=_MAX_SMALL)
        return cls(
            **unpack(data, "statement query", model=str, owner_key=32, signature=SIGNATURE_SIZE, time=int)
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Receipt:
    """The service's word that an entry is in its log: the index, and a head that covers it."""

    index: int
    head: TreeHead

    def to_bytes(self) -> bytes:
        """The content of the inner response."""
        return encode({"head": self.head.to_data(), "index": self.index})

    @classmethod
    def from_bytes(cls, raw: bytes | memoryview) -> Receipt:
        """Read what `to_bytes` gave; raises FormatError."""
        fields = unpack(decode(raw, what="receipt", limit=_MAX_SMALL), "receipt", head=dict, index=int)
        return cls(index=fields["index"], head=TreeHead.from_data(fields["head"]))
