"""Signed tree heads of the audit log, and the proof that one extends another (DESIGN, 4.6 and 4.8)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Final

from cloister.core.encoding import decode, encode, unpack
from cloister.core.identity import SIGNATURE_SIZE, SigningKey, thumbprint, verify_signature
from cloister.core.merkle import HASH_SIZE, MAX_PROOF, verify_consistency
from cloister.errors import BindingRefused, FormatError

PURPOSE: Final = "tree head"


@dataclass(frozen=True, slots=True, kw_only=True)
class TreeHead:
    """Size and root of a service's log at a time, signed by the service's identity key.

    Attributes:
        service: Service id (32 bytes).
        size: Entries in the log.
        root: RFC 9162 root over them (32 bytes).
        time: Unix seconds, by the service's clock.
        key: The service's public identity key (32 bytes).
        signature: By that key (64 bytes).
    """

    service: bytes
    size: int
    root: bytes
    time: int
    key: bytes
    signature: bytes

    @classmethod
    def sign(cls, key: SigningKey, *, size: int, root: bytes, time: int) -> TreeHead:
        """Sign a head; the service id is the key's thumbprint."""
        signature = key.sign(PURPOSE, [key.thumbprint, size, root, time])
        return cls(
            service=key.thumbprint, size=size, root=root, time=time, key=key.public, signature=signature
        )

    def verify(self, service: bytes) -> None:
        """Check that this service signed it.

        Raises:
            BindingRefused: it is another service's.
            Tampered: the signature is not by the service's key.
        """
        if self.service != service or thumbprint(self.key) != service:
            raise BindingRefused(
                code="binding.service",
                claim="tree head's service",
                expected=service.hex(),
                actual=self.service.hex(),
            )
        verify_signature(self.key, PURPOSE, [self.service, self.size, self.root, self.time], self.signature)

    def require_extends(self, older: TreeHead | None, proof: list[bytes]) -> None:
        """Refuse a log that does not extend the one of an older head.

        Raises:
            Rollback: this head is smaller, or rewrites what the older one fixed.
        """
        if older is not None:
            verify_consistency(older.size, older.root, self.size, self.root, proof)

    def to_data(self) -> dict[str, Any]:
        """Plain data for `cloister.core.encoding`."""
        return {
            "key": self.key,
            "root": self.root,
            "service": self.service,
            "signature": self.signature,
            "size": self.size,
            "time": self.time,
        }

    @classmethod
    def from_data(cls, data: Any) -> TreeHead:
        """Read what `to_data` gave; raises FormatError."""
        fields = unpack(
            data,
            "tree head",
            key=32,
            root=HASH_SIZE,
            service=32,
            signature=SIGNATURE_SIZE,
            size=int,
            time=int,
        )
        if not 0 <= fields["size"] < 1 << 53:
            raise FormatError(claim="tree size", expected="0 or more", actual=fields["size"])
        return cls(**fields)

    def to_bytes(self) -> bytes:
        """For keeping between runs."""
        return encode(self.to_data())

    @classmethod
    def from_bytes(cls, raw: bytes) -> TreeHead:
        """Read what `to_bytes` gave; raises FormatError."""
        return cls.from_data(decode(raw, what="tree head", limit=1024))


def hashes_from_data(data: Any, what: str) -> list[bytes]:
    """A list of at most 64 hashes (32 bytes each), as proofs carry them; raises FormatError."""
    if not isinstance(data, list) or len(data) > MAX_PROOF:
        raise FormatError(f"{what} is not a list of at most {MAX_PROOF} hashes", claim=what)
    if not all(type(item) is bytes and len(item) == HASH_SIZE for item in data):
        raise FormatError(f"{what} holds something else than hashes", claim=what)
    return list(data)
