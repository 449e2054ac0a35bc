"""Signing identities: Ed25519 keys named by their thumbprint, and signatures that serve one purpose only."""

from __future__ import annotations

from functools import lru_cache
from typing import Any, Final

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

from cloister.core.encoding import digest, encode
from cloister.core.secret import Secret
from cloister.errors import FormatError, Tampered

CONTEXT: Final = "cloister/v1"
KEY_SIZE: Final = 32  # bytes, of an Ed25519 seed and of a public key
SIGNATURE_SIZE: Final = 64  # bytes
THUMBPRINT_SIZE: Final = 32  # bytes

Thumbprint = bytes


@lru_cache(maxsize=4096)
def thumbprint(public_key: bytes) -> Thumbprint:
    """Name of an Ed25519 public key (32 bytes): SHA-256 over its algorithm and its bytes."""
    if len(public_key) != KEY_SIZE:
        raise FormatError(
            "not an Ed25519 public key", claim="length", expected=KEY_SIZE, actual=len(public_key)
        )
    return digest([CONTEXT, "thumbprint", "ed25519", public_key])


class SigningKey:
    """An Ed25519 private key. Its ``repr`` shows the thumbprint, never the key."""

    __slots__ = ("_key", "public", "thumbprint")

    def __init__(self, seed: Secret) -> None:
        if len(seed) != KEY_SIZE:
            raise FormatError("not an Ed25519 seed", claim="length", expected=KEY_SIZE, actual=len(seed))
        self._key = Ed25519PrivateKey.from_private_bytes(seed.reveal())
        self.public: Final = self._key.public_key().public_bytes_raw()
        self.thumbprint: Final = thumbprint(self.public)

    @classmethod
    def generate(cls) -> SigningKey:
        """A fresh key from the operating system's generator."""
        return cls(Secret(Ed25519PrivateKey.generate().private_bytes_raw()))

    def seed(self) -> Secret:
        """The 32-byte seed, for sealing."""
        return Secret(self._key.private_bytes_raw())

    def sign(self, purpose: str, value: Any) -> bytes:
        """Sign plain data for one purpose (64 bytes)."""
        return self._key.sign(encode([CONTEXT, purpose, value]))

    def __repr__(self) -> str:
        return f"<SigningKey {self.thumbprint.hex()[:16]}>"


def verify_signature(public_key: bytes, purpose: str, value: Any, signature: bytes) -> None:
    """Check a signature that `SigningKey.sign` made.

    Raises:
        Tampered: the signature is not one by this key over this value for this purpose.
    """
    try:
        Ed25519PublicKey.from_public_bytes(public_key).verify(signature, encode([CONTEXT, purpose, value]))
    except (InvalidSignature, ValueError) as error:
        raise Tampered(
            f"the {purpose} is not signed by the key it names",
            code="tampered.signature",
            claim=f"signature of the {purpose}",
            expected=f"by key {public_key.hex()[:16]}",
            actual="no valid signature",
        ) from error


def derive_user_key(secret: Secret, owner: Thumbprint) -> SigningKey:
    """A user's key at one owner: HKDF-SHA256 over the user's secret and the owner's thumbprint (DESIGN 4.4).

    Keys of one user at two owners don't link.
    """
    info = encode([CONTEXT, "user", owner])
    return SigningKey(Secret(HKDF(SHA256(), KEY_SIZE, None, info).derive(secret.reveal())))
