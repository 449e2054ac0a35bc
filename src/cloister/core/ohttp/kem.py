"""The key encapsulation mechanisms of HPKE that Cloister speaks.

DHKEM(X25519, HKDF-SHA256) is section 4.1 of RFC 9180. X-Wing (draft-connolly-cfrg-xwing-kem) joins ML-KEM-768
and X25519, so that a shared secret stays secret while either of the two holds.
"""

from __future__ import annotations

import hashlib
import secrets
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from types import MappingProxyType
from typing import Final, NoReturn

from cryptography.hazmat.primitives.asymmetric.mlkem import MLKEM768PrivateKey, MLKEM768PublicKey
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey

from cloister.core.ohttp.kdf import HKDF_SHA256, KDFS
from cloister.core.ohttp.reader import Bytes
from cloister.core.secret import Secret
from cloister.errors import FormatError, Refused, UsageError

X25519_HKDF_SHA256: Final = 0x0020
XWING: Final = 0x647A

_XWING_LABEL: Final = rb"\.//^" + b"\\"  # six octets of ASCII art, domain separation in the combiner
_MLKEM_PUBLIC: Final = 1184  # bytes
_MLKEM_CIPHERTEXT: Final = 1088  # bytes
_MLKEM_SEED: Final = 64  # bytes
_X25519_SIZE: Final = 32  # bytes; private key, public key and shared secret


@dataclass(frozen=True, slots=True, kw_only=True)
class Kem:
    """The lengths of one mechanism, in bytes (RFC 9180, section 7.1)."""

    name: str
    n_secret: int
    n_enc: int
    n_pk: int
    n_sk: int


KEMS: Final[Mapping[int, Kem]] = MappingProxyType(
    {
        X25519_HKDF_SHA256: Kem(name="DHKEM(X25519, HKDF-SHA256)", n_secret=32, n_enc=32, n_pk=32, n_sk=32),
        XWING: Kem(name="X-Wing", n_secret=32, n_enc=1120, n_pk=1216, n_sk=32),
    }
)


class PrivateKey:
    """A KEM private key; it never shows itself, and only `to_secret` gives its bytes out."""

    __slots__ = ("_mlkem", "_secret", "_x25519", "kem_id", "public_bytes")

    kem_id: Final[int]
    public_bytes: Final[bytes]

    def __init__(self, kem_id: int, secret: Secret) -> None:
        """Take ``secret`` (32 bytes for either KEM: the X25519 scalar or the X-Wing seed)."""
        kem = require_kem(kem_id)
        if len(secret) != kem.n_sk:
            raise FormatError(
                f"not a private key of {kem.name}",
                code="hpke.private-key",
                claim="length",
                expected=f"{kem.n_sk} B",
                actual=f"{len(secret)} B",
            )
        self.kem_id = kem_id
        self._secret: Final = secret
        self._mlkem: MLKEM768PrivateKey | None = None
        scalar = secret.reveal()
        public = b""
        if kem_id == XWING:
            expanded = hashlib.shake_256(scalar).digest(_MLKEM_SEED + _X25519_SIZE)
            self._mlkem = MLKEM768PrivateKey.from_seed_bytes(expanded[:_MLKEM_SEED])
            public = self._mlkem.public_key().public_bytes_raw()
            scalar = expanded[_MLKEM_SEED:]
        self._x25519: Final = X25519PrivateKey.from_private_bytes(scalar)
        self.public_bytes = public + self._x25519.public_key().public_bytes_raw()

    @classmethod
    def from_bytes(cls, kem_id: int, data: Bytes) -> PrivateKey:
        """Read a serialised private key.

        Raises:
            UsageError: a KEM that Cloister does not speak (code ``hpke.suite``).
            FormatError: not the KEM's length (code ``hpke.private-key``).
        """
        return cls(kem_id, Secret(data))

    def to_secret(self) -> Secret:
        """The serialised private key, in a `Secret` of its own that the caller may wipe."""
        return Secret(self._secret.reveal())

    def decapsulate(self, enc: Bytes) -> bytes:
        """The shared secret (32 bytes) that was encapsulated to this key as ``enc``.

        Raises:
            FormatError: ``enc`` has another length (code ``hpke.enc``).
            Refused: the X25519 part is a point of low order (code ``hpke.kem``).
        """
        kem = KEMS[self.kem_id]
        raw = bytes(enc)
        _require_length(raw, kem.n_enc, claim="enc", code="hpke.enc")
        public = self.public_bytes[-_X25519_SIZE:]
        point = raw[-_X25519_SIZE:]
        dh = _exchange(self._x25519, point)
        if self._mlkem is None:
            return _dhkem_secret(dh, enc=raw, public=public)
        mlkem_secret = self._mlkem.decapsulate(raw[:_MLKEM_CIPHERTEXT])
        return _xwing_secret(mlkem_secret, dh, point=point, public=public)

    def __repr__(self) -> str:
        return f"<PrivateKey, {KEMS[self.kem_id].name}>"

    def __reduce__(self) -> NoReturn:
        raise TypeError("a PrivateKey is never pickled")


def generate_private_key(kem_id: int) -> PrivateKey:
    """A fresh private key.

    Raises:
        UsageError: a KEM that Cloister does not speak (code ``hpke.suite``).
    """
    return PrivateKey.from_bytes(kem_id, secrets.token_bytes(require_kem(kem_id).n_sk))


def encapsulate(kem_id: int, public_key: Bytes) -> tuple[bytes, bytes]:
    """A fresh shared secret for the holder of ``public_key``.

    Returns:
        The shared secret (32 bytes) and ``enc`` (32 bytes for X25519, 1120 for X-Wing), which carries it.

    Raises:
        UsageError: a KEM that Cloister does not speak (code ``hpke.suite``).
        FormatError: not a public key of that KEM (code ``hpke.public-key``).
        Refused: the X25519 part is a point of low order (code ``hpke.kem``).
    """
    kem = require_kem(kem_id)
    raw = bytes(public_key)
    _require_length(raw, kem.n_pk, claim="public key", code="hpke.public-key")
    ephemeral = _ephemeral()
    point = ephemeral.public_key().public_bytes_raw()
    public = raw[-_X25519_SIZE:]
    dh = _exchange(ephemeral, public)
    if kem_id == X25519_HKDF_SHA256:
        return _dhkem_secret(dh, enc=point, public=public), point
    mlkem_secret, mlkem_ciphertext = _mlkem_public(raw[:_MLKEM_PUBLIC]).encapsulate()
    return _xwing_secret(mlkem_secret, dh, point=point, public=public), mlkem_ciphertext + point


def require_kem(kem_id: int) -> Kem:
    """The mechanism of that identifier.

    Raises:
        UsageError: none that Cloister speaks (code ``hpke.suite``).
    """
    kem = KEMS.get(kem_id)
    if kem is None:
        known = ", ".join(f"{known_id:#06x}" for known_id in KEMS)
        raise UsageError(
            "unknown KEM", code="hpke.suite", claim="KEM", expected=known, actual=f"{kem_id:#06x}"
        )
    return kem


@lru_cache(maxsize=64)
def _mlkem_public(raw: bytes) -> MLKEM768PublicKey:
    """Parsing expands the matrix, which takes as long as an encapsulation; a pool's key serves many."""
    try:
        return MLKEM768PublicKey.from_public_bytes(raw)
    except ValueError as error:
        raise FormatError(
            "not an ML-KEM-768 public key", code="hpke.public-key", claim="public key"
        ) from error


def _ephemeral() -> X25519PrivateKey:
    return X25519PrivateKey.generate()


def _exchange(private: X25519PrivateKey, public: bytes) -> bytes:
    try:
        return private.exchange(X25519PublicKey.from_public_bytes(public))
    except ValueError:
        # An all-zero result says that the other side sent a point of low order (RFC 9180, section 7.1.4): the
        # secret would be known to everybody.
        raise Refused(
            code="hpke.kem", claim="X25519 shared secret", expected="non-zero", actual="all zero"
        ) from None


def _dhkem_secret(dh: bytes, *, enc: bytes, public: bytes) -> bytes:
    """``ExtractAndExpand`` of RFC 9180, section 4.1."""
    kdf = KDFS[HKDF_SHA256]
    suite_id = b"KEM" + X25519_HKDF_SHA256.to_bytes(2, "big")
    prk = kdf.labeled_extract(suite_id, b"", b"eae_prk", dh)
    return kdf.labeled_expand(suite_id, prk, b"shared_secret", enc + public, 32)


def _xwing_secret(mlkem_secret: bytes, dh: bytes, *, point: bytes, public: bytes) -> bytes:
    """The X-Wing combiner; ML-KEM's ciphertext need not go in, it binds itself."""
    return hashlib.sha3_256(mlkem_secret + dh + point + public + _XWING_LABEL).digest()


def _require_length(data: bytes, length: int, *, claim: str, code: str) -> None:
    if len(data) != length:
        raise FormatError(
            f"{claim} has the wrong length",
            code=code,
            claim=claim,
            expected=f"{length} B",
            actual=f"{len(data)} B",
        )
