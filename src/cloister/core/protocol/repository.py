"""The model repository extension as it travels: paths, what a signature covers, nonces (docs/protocol.md).

Source: Triton's model repository extension. Its routes change what a worker holds in memory, so each request
carries a nonce of that very worker, and its signature covers the nonce.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
from typing import Final, Literal

from cloister.core.protocol.authorization import REQUEST_ID_SIZE
from cloister.errors import AccessRefused, FormatError

PREFIX: Final = b"/v2/repository/"
INDEX: Final = PREFIX + b"index"
NONCE: Final = PREFIX + b"nonce"
MODELS: Final = PREFIX + b"models/"
FIELD: Final = b"cloister-nonce"
NONCE_SIZE: Final = 56  # bytes
MAX_NONCES: Final = 32  # in one request: which worker of a pool it meets is the gateway's choice
ENTIRE: Final = "repository/index"  # what the signature of an index request covers in a model's place

Action = Literal["load", "unload"]


def subject(model: str, action: Action) -> str:
    """What the owner's signature covers in the model's place, so that it serves this action alone."""
    return f"{model}/{action}"


def action_path(model: str, action: Action) -> bytes:
    """Path of an action."""
    return MODELS + f"{model}/{action}".encode()


def request_id(field: bytes) -> bytes:
    """The request id (16 bytes) of a request with these nonces: so the signature covers them."""
    return hashlib.sha256(field).digest()[:REQUEST_ID_SIZE]


def join_nonces(nonces: list[bytes]) -> bytes:
    """The value of `FIELD`."""
    return b",".join(map(base64.urlsafe_b64encode, nonces))


def split_nonces(field: bytes | None) -> list[bytes]:
    """The nonces in the value of `FIELD`.

    Raises:
        AccessRefused: there is none.
        FormatError: they aren't nonces, or too many.
    """
    if field is None:
        raise AccessRefused(
            "the request carries no nonce of this worker",
            code="access.nonce",
            claim="nonce",
            expected="one from GET /v2/repository/nonce",
            actual="none",
        )
    parts = field.split(b",", MAX_NONCES)
    try:
        nonces = [base64.b64decode(part, altchars=b"-_", validate=True) for part in parts[:MAX_NONCES]]
    except binascii.Error:
        nonces = []
    if len(parts) > MAX_NONCES or not nonces or any(len(nonce) != NONCE_SIZE for nonce in nonces):
        raise FormatError(
            claim="nonces", expected=f"1 to {MAX_NONCES} of {NONCE_SIZE} B in base64url", actual="others"
        )
    return nonces
