"""Entries of the key service's log: the whole of its state is the log, replayed in order.

An entry's public part is a leaf of the Merkle tree; its secret part (a model's key) is sealed beside it and
enters the tree only as a commitment, so that proofs can be shown to anybody.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import Any, Final, Literal, cast, get_args

from cloister.core.encoding import decode, encode, unpack
from cloister.core.secret import Secret
from cloister.errors import FormatError

Kind = Literal["start", "epoch", "pool", "statement", "release", "refusal"]
KINDS: Final = get_args(Kind)
MAX_ENTRY: Final = 4 << 20  # bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class Entry:
    """One thing that happened.

    Attributes:
        kind: What.
        time: When, Unix seconds by the service's clock; never before the entry before.
        body: What an owner or an auditor may see of it: plain data.
        secret: What they may not; None where there is nothing.
    """

    kind: Kind
    time: int
    body: dict[str, Any]
    secret: Secret | None = None

    @property
    def leaf(self) -> bytes:
        """The bytes that enter the Merkle tree."""
        commitment = (
            None
            if self.secret is None
            else hashlib.sha256(b"cloister/v1 secret" + self.secret.reveal()).digest()
        )
        return encode({"body": self.body, "commitment": commitment, "kind": self.kind, "time": self.time})

    def to_bytes(self) -> bytes:
        """The plaintext of the sealed record."""
        secret = None if self.secret is None else self.secret.reveal()
        return encode({"body": self.body, "kind": self.kind, "secret": secret, "time": self.time})

    @classmethod
    def from_bytes(cls, raw: bytes) -> Entry:
        """Read what `to_bytes` gave; raises FormatError."""
        fields = unpack(
            decode(raw, what="log entry", limit=MAX_ENTRY),
            "log entry",
            body=dict,
            kind=str,
            secret=(bytes, type(None)),
            time=int,
        )
        if fields["kind"] not in KINDS:
            raise FormatError(claim="log entry", expected=KINDS, actual=fields["kind"])
        return cls(
            kind=cast(Kind, fields["kind"]),
            time=fields["time"],
            body=fields["body"],
            secret=None if fields["secret"] is None else Secret(fields["secret"]),
        )
