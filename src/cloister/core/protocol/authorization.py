"""A user's signature over one request (DESIGN, 4.4): nothing that a compromised worker could reuse."""

from __future__ import annotations

import base64
import binascii
from dataclasses import dataclass
from typing import Any, Final

from cloister.core.encoding import decode, encode, unpack
from cloister.core.identity import SIGNATURE_SIZE, SigningKey, thumbprint, verify_signature
from cloister.core.protocol.limits import CLOCK_SKEW, MAX_REQUEST_LIFETIME
from cloister.errors import AccessRefused, BindingRefused, FormatError, Tampered

PURPOSE: Final = "request"
FIELD: Final = b"cloister-authorization"  # of the inner request
REQUEST_ID_SIZE: Final = 16  # bytes
MAX_FIELD: Final = 1024  # characters


@dataclass(frozen=True, slots=True, kw_only=True)
class RequestContext:
    """What a request belongs to. The worker fills it in from what it knows, never from the request.

    Attributes:
        service: Service id (32 bytes).
        pool: Pool id (32 bytes).
        epoch: Epoch of the pool key that opened the request.
        model: Model id in the request's path.
        enc: The HPKE encapsulated key of this very request.
    """

    service: bytes
    pool: bytes
    epoch: int
    model: str
    enc: bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class RequestAuthorization:
    """The part of a request's signature that travels with it.

    Attributes:
        user_key: The user's public key at this owner (32 bytes); its thumbprint is the user id.
        statement: Digest of the statement that the user accepted (32 bytes).
        request_id: Random (16 bytes).
        expiry: Unix seconds.
        allow_cross_user_batching: Whether the request may share a batch with other users'.
        allow_outside_stages: Whether intermediate results may leave the enclave.
        signature: Over all of this and the `RequestContext` (64 bytes).
    """

    user_key: bytes
    statement: bytes
    request_id: bytes
    expiry: int
    allow_cross_user_batching: bool
    allow_outside_stages: bool
    signature: bytes

    @property
    def user(self) -> bytes:
        """The user id (32 bytes)."""
        return thumbprint(self.user_key)

    @classmethod
    def sign(
        cls,
        key: SigningKey,
        context: RequestContext,
        *,
        statement: bytes,
        request_id: bytes,
        expiry: int,
        allow_cross_user_batching: bool = False,
        allow_outside_stages: bool = False,
    ) -> RequestAuthorization:
        """Sign one request."""
        consents = (allow_cross_user_batching, allow_outside_stages)
        signature = key.sign(PURPOSE, _signed(context, statement, request_id, expiry, consents))
        return cls(
            user_key=key.public,
            statement=statement,
            request_id=request_id,
            expiry=expiry,
            allow_cross_user_batching=allow_cross_user_batching,
            allow_outside_stages=allow_outside_stages,
            signature=signature,
        )

    def verify(self, context: RequestContext, *, now: int) -> None:
        """Check the time, then the signature, over what the verifier knows of this request.

        Raises:
            AccessRefused: expired, or valid for too long.
            BindingRefused: not signed by this user for this service, pool, epoch, model and encapsulation.
        """
        if not now <= self.expiry <= now + MAX_REQUEST_LIFETIME + CLOCK_SKEW:
            raise AccessRefused(
                "the request's signature is not valid now",
                code="access.request-expiry",
                claim="request expiry",
                expected=f"{now} to {now + MAX_REQUEST_LIFETIME + CLOCK_SKEW}",
                actual=self.expiry,
                hint="Check the clock of the machine that signed it",
            )
        consents = (self.allow_cross_user_batching, self.allow_outside_stages)
        signed = _signed(context, self.statement, self.request_id, self.expiry, consents)
        try:
            verify_signature(self.user_key, PURPOSE, signed, self.signature)
        except Tampered as error:
            raise BindingRefused(
                "the request is not signed for this service, pool, epoch, model and encapsulation",
                code="binding.request",
                claim="request signature",
                expected=f"by user {self.user.hex()[:16]} over this request",
                actual="no valid signature",
            ) from error

    def to_field(self) -> bytes:
        """The value of the inner request's field."""
        return base64.urlsafe_b64encode(
            encode(
                [
                    self.user_key,
                    self.statement,
                    self.request_id,
                    self.expiry,
                    self.allow_cross_user_batching,
                    self.allow_outside_stages,
                    self.signature,
                ]
            )
        )

    @classmethod
    def from_field(cls, value: bytes) -> RequestAuthorization:
        """Read what `to_field` gave; raises FormatError."""
        if len(value) > MAX_FIELD:
            raise FormatError(claim="authorization", expected=f"at most {MAX_FIELD} B", actual=len(value))
        try:
            raw = base64.b64decode(value, altchars=b"-_", validate=True)
        except binascii.Error as error:
            raise FormatError("the authorization is not base64url", code="format.authorization") from error
        names = ("user_key", "statement", "request_id", "expiry", "cross_user", "outside", "signature")
        values = decode(raw, what="authorization", limit=MAX_FIELD)
        if not isinstance(values, list) or len(values) != len(names):
            raise FormatError("the authorization has other fields", code="format.authorization")
        fields = unpack(
            dict(zip(names, values, strict=True)),
            "authorization",
            user_key=32,
            statement=32,
            request_id=REQUEST_ID_SIZE,
            expiry=int,
            cross_user=bool,
            outside=bool,
            signature=SIGNATURE_SIZE,
        )
        fields["allow_cross_user_batching"] = fields.pop("cross_user")
        fields["allow_outside_stages"] = fields.pop("outside")
        return cls(**fields)


def _signed(
    context: RequestContext, statement: bytes, request_id: bytes, expiry: int, consents: tuple[bool, bool]
) -> list[Any]:
    return [
        context.service,
        context.pool,
        context.epoch,
        context.model,
        statement,
        context.enc,
        request_id,
        expiry,
        *consents,
    ]
