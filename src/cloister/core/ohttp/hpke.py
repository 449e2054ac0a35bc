"""Hybrid public-key encryption in base mode (RFC 9180): suites, contexts and single-shot sealing.

A context may be used for many messages in order; it belongs to one thread at a time.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from types import MappingProxyType
from typing import Final, TypeAlias

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives import ciphers
from cryptography.hazmat.primitives.ciphers.aead import AESGCM, ChaCha20Poly1305
from cryptography.hazmat.primitives.ciphers.algorithms import AES
from cryptography.hazmat.primitives.ciphers.modes import GCM

from cloister.core.ohttp import kem
from cloister.core.ohttp.kdf import HKDF_SHA256, KDFS, Kdf
from cloister.core.ohttp.kem import PrivateKey, generate_private_key
from cloister.core.ohttp.reader import Bytes, octets
from cloister.errors import FormatError, Refused, Tampered, UsageError

__all__ = [
    "AES_128_GCM",
    "AES_256_GCM",
    "CHACHA20_POLY1305",
    "EXPORT_ONLY",
    "WIRE_SUITES",
    "X25519_HKDF_SHA256_AES256GCM",
    "XWING_HKDF_SHA256_AES256GCM",
    "PrivateKey",
    "ReceiverContext",
    "SenderContext",
    "Suite",
    "generate_private_key",
    "open_from",
    "seal_to",
    "setup_receiver",
    "setup_sender",
]

AES_128_GCM: Final = 0x0001
AES_256_GCM: Final = 0x0002
CHACHA20_POLY1305: Final = 0x0003
EXPORT_ONLY: Final = 0xFFFF

N_NONCE: Final = 12  # bytes, of each AEAD here
N_TAG: Final = 16  # bytes, of each AEAD here
MAX_MESSAGE: Final = 1 << 30  # bytes; the largest plaintext that is sealed as a whole

_MODE_BASE: Final = b"\x00"
_SEQUENCE_LIMIT: Final = (1 << (8 * N_NONCE)) - 1

Cipher: TypeAlias = AESGCM | ChaCha20Poly1305


@dataclass(frozen=True, slots=True, kw_only=True)
class _Aead:
    cipher: type[AESGCM] | type[ChaCha20Poly1305]
    n_key: int  # bytes


_AEADS: Final[Mapping[int, _Aead]] = MappingProxyType(
    {
        AES_128_GCM: _Aead(cipher=AESGCM, n_key=16),
        AES_256_GCM: _Aead(cipher=AESGCM, n_key=32),
        CHACHA20_POLY1305: _Aead(cipher=ChaCha20Poly1305, n_key=32),
    }
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Suite:
    """One choice of KEM, KDF and AEAD, by their IANA identifiers.

    Raises:
        UsageError: an identifier that Cloister does not speak (code ``hpke.suite``).
    """

    kem_id: int
    kdf_id: int
    aead_id: int

    def __post_init__(self) -> None:
        kem.require_kem(self.kem_id)
        if self.kdf_id not in KDFS:
            raise UsageError("unknown KDF", code="hpke.suite", claim="KDF", actual=f"{self.kdf_id:#06x}")
        if self.aead_id not in _AEADS and self.aead_id != EXPORT_ONLY:
            raise UsageError("unknown AEAD", code="hpke.suite", claim="AEAD", actual=f"{self.aead_id:#06x}")

    @property
    def n_enc(self) -> int:
        """Length of ``enc``, in bytes."""
        return kem.KEMS[self.kem_id].n_enc

    @property
    def n_key(self) -> int:
        """Length of the AEAD key, in bytes; 0 for an export-only suite."""
        return 0 if self.aead_id == EXPORT_ONLY else _AEADS[self.aead_id].n_key

    @property
    def kdf(self) -> Kdf:
        """The key derivation function."""
        return KDFS[self.kdf_id]

    def to_bytes(self) -> bytes:
        """The three identifiers, 6 bytes."""
        return b"".join(part.to_bytes(2, "big") for part in (self.kem_id, self.kdf_id, self.aead_id))

    def cipher(self, key: bytes) -> Cipher:
        """The AEAD under ``key`` (``n_key`` bytes)."""
        return _AEADS[self.aead_id].cipher(key)

    def __str__(self) -> str:
        return f"{self.kem_id:#06x}/{self.kdf_id:#06x}/{self.aead_id:#06x}"


XWING_HKDF_SHA256_AES256GCM: Final = Suite(kem_id=kem.XWING, kdf_id=HKDF_SHA256, aead_id=AES_256_GCM)
X25519_HKDF_SHA256_AES256GCM: Final = Suite(
    kem_id=kem.X25519_HKDF_SHA256, kdf_id=HKDF_SHA256, aead_id=AES_256_GCM
)
WIRE_SUITES: Final = (XWING_HKDF_SHA256_AES256GCM, X25519_HKDF_SHA256_AES256GCM)  # preferred first


@lru_cache(maxsize=64)
def _schedule(suite: Suite, info: bytes) -> bytes:
    """What `KeySchedule` makes of public values alone, for mode_base: psk and psk_id are empty."""
    kdf, suite_id = suite.kdf, b"HPKE" + suite.to_bytes()
    psk_id_hash = kdf.labeled_extract(suite_id, b"", b"psk_id_hash", b"")
    return _MODE_BASE + psk_id_hash + kdf.labeled_extract(suite_id, b"", b"info_hash", info)


class _Context:
    """What sender and receiver share: the key schedule's output and a counter (RFC 9180, section 5.2)."""

    __slots__ = ("_base_nonce", "_exporter_secret", "_key", "_sequence", "_suite", "_suite_id")

    def __init__(self, suite: Suite, shared_secret: bytes, info: bytes) -> None:
        kdf, suite_id, schedule = suite.kdf, b"HPKE" + suite.to_bytes(), _schedule(suite, info)
        secret = kdf.labeled_extract(suite_id, shared_secret, b"secret", b"")
        self._suite: Final = suite
        self._suite_id: Final = suite_id
        self._exporter_secret: Final = kdf.labeled_expand(suite_id, secret, b"exp", schedule, kdf.n_h)
        self._sequence = 0
        self._key = b""
        self._base_nonce = 0
        if suite.aead_id != EXPORT_ONLY:
            self._key = kdf.labeled_expand(suite_id, secret, b"key", schedule, suite.n_key)
            nonce = kdf.labeled_expand(suite_id, secret, b"base_nonce", schedule, N_NONCE)
            self._base_nonce = int.from_bytes(nonce, "big")

    def export(self, exporter_context: bytes, length: int) -> bytes:
        """Derive ``length`` bytes, known to both sides, for ``exporter_context`` (RFC 9180, section 5.3).

        Raises:
            UsageError: more than ``255 * Nh`` bytes (code ``hpke.export``).
        """
        kdf = self._suite.kdf
        if not 0 < length <= 255 * kdf.n_h:
            raise UsageError(
                "an export of that length does not exist",
                code="hpke.export",
                claim="length",
                expected=f"1..{255 * kdf.n_h} B",
                actual=f"{length} B",
            )
        return kdf.labeled_expand(self._suite_id, self._exporter_secret, b"sec", exporter_context, length)

    def _next(self) -> tuple[Cipher, bytes]:
        """The cipher and the nonce of the next message."""
        key, nonce = self._next_key()
        return self._suite.cipher(key), nonce

    def _next_gcm(self) -> tuple[bytes, bytes]:
        """The key and the nonce of the next message, of a suite with AES-GCM."""
        if self._suite.aead_id not in (AES_128_GCM, AES_256_GCM):
            raise UsageError(
                "only AES-GCM seals and opens piece by piece",
                code="hpke.suite",
                claim="AEAD",
                expected="AES-GCM",
                actual=f"{self._suite.aead_id:#06x}",
            )
        return self._next_key()

    def _next_key(self) -> tuple[bytes, bytes]:
        if not self._key:
            raise UsageError("an export-only suite seals and opens nothing", code="hpke.export-only")
        if self._sequence >= _SEQUENCE_LIMIT:
            raise Refused(
                "the context is used up",
                code="hpke.message-limit",
                claim="sequence number",
                expected="below 2**96 - 1",
                actual=self._sequence,
            )
        return self._key, (self._base_nonce ^ self._sequence).to_bytes(N_NONCE, "big")

    def __repr__(self) -> str:
        return f"<{type(self).__name__}, {self._suite}>"


class SenderContext(_Context):
    """Seals messages, in order, to the holder of one private key."""

    __slots__ = ()

    def seal(self, plaintext: Bytes, aad: Bytes = b"") -> bytes:
        """Encrypt the next message; the result is 16 bytes longer.

        Raises:
            UsageError: an export-only suite (code ``hpke.export-only``), or more than `MAX_MESSAGE` bytes.
            Refused: the context is used up (code ``hpke.message-limit``).
        """
        require_size(octets(plaintext).nbytes)
        out = bytearray(octets(plaintext).nbytes + N_TAG)
        self.seal_into(plaintext, aad, out)
        return bytes(out)

    def seal_into(self, plaintext: Bytes, aad: Bytes, out: bytearray | memoryview) -> None:
        """`seal` into ``out``, which is 16 bytes longer than ``plaintext`` and does not overlap it."""
        require_size(octets(plaintext).nbytes)
        cipher, nonce = self._next()
        cipher.encrypt_into(nonce, plaintext, aad, out)
        self._sequence += 1

    def seal_piecewise(self) -> ciphers.AEADEncryptionContext:
        """Begin the next message, to be encrypted piece by piece: the tag comes at its end, no AAD.

        Raises:
            UsageError: a suite whose AEAD isn't AES-GCM (code ``hpke.suite``).
            Refused: the context is used up (code ``hpke.message-limit``).
        """
        key, nonce = self._next_gcm()
        self._sequence += 1
        return ciphers.Cipher(AES(key), GCM(nonce)).encryptor()


class ReceiverContext(_Context):
    """Opens the messages of one `SenderContext`, in order."""

    __slots__ = ()

    def open(self, ciphertext: Bytes, aad: Bytes = b"") -> bytes:
        """Decrypt the next message.

        A message that is refused does not count: the next one is expected at the same place.

        Raises:
            FormatError: shorter than a tag (code ``hpke.length``).
            Tampered: not the next message of this context, or altered (code ``hpke.open``).
            UsageError: an export-only suite (code ``hpke.export-only``).
            Refused: the context is used up (code ``hpke.message-limit``).
        """
        return bytes(self.open_new(ciphertext, aad))

    def open_new(self, ciphertext: Bytes, aad: Bytes) -> bytearray:
        """`open` into a new array that the caller may overwrite after use."""
        cipher, nonce = self._next()
        out = open_new(cipher, nonce, ciphertext, aad, code="hpke.open")
        self._sequence += 1
        return out

    def open_piecewise(self) -> ciphers.AEADDecryptionContext:
        """Begin the next message, to be decrypted piece by piece: nothing of it counts before its tag does.

        Raises:
            UsageError: a suite whose AEAD isn't AES-GCM (code ``hpke.suite``).
            Refused: the context is used up (code ``hpke.message-limit``).
        """
        key, nonce = self._next_gcm()
        self._sequence += 1
        return ciphers.Cipher(AES(key), GCM(nonce)).decryptor()


def require_size(length: int) -> None:
    """Refuse a plaintext that is too long to be sealed as a whole, before anything is allocated.

    Raises:
        UsageError: more than `MAX_MESSAGE` bytes (code ``hpke.length``).
    """
    if length > MAX_MESSAGE:
        raise UsageError(
            "plaintext is too long",
            code="hpke.length",
            claim="plaintext",
            expected=f"at most {MAX_MESSAGE} B",
            actual=f"{length} B",
        )


def open_new(cipher: Cipher, nonce: bytes, ciphertext: Bytes, aad: Bytes, *, code: str) -> bytearray:
    """Decrypt ``ciphertext`` into a new array.

    Raises:
        FormatError: shorter than a tag (code ``hpke.length``).
        Tampered: it does not authenticate (the given ``code``).
    """
    length = octets(ciphertext).nbytes - N_TAG
    if length < 0:
        raise FormatError(
            "ciphertext is too short",
            code="hpke.length",
            claim="ciphertext",
            expected=f"at least {N_TAG} B",
            actual=f"{length + N_TAG} B",
        )
    out = bytearray(length)
    try:
        cipher.decrypt_into(nonce, ciphertext, aad, out)
    except InvalidTag:
        raise Tampered(
            "the message does not open", code=code, claim="AEAD tag", expected="valid", actual="invalid"
        ) from None
    return out


def setup_sender(suite: Suite, public_key: Bytes, info: bytes) -> tuple[bytes, SenderContext]:
    """``SetupBaseS`` of RFC 9180, section 5.1.1.

    Args:
        suite: The algorithms.
        public_key: The receiver's serialised public key.
        info: What both sides must agree upon; it is bound, not sent.

    Returns:
        ``enc``, to be sent once, and the context.

    Raises:
        FormatError: not a public key of the suite's KEM (code ``hpke.public-key``).
        Refused: a public key of low order (code ``hpke.kem``).
    """
    shared_secret, enc = kem.encapsulate(suite.kem_id, public_key)
    return enc, SenderContext(suite, shared_secret, info)


def setup_receiver(suite: Suite, private_key: PrivateKey, enc: Bytes, info: bytes) -> ReceiverContext:
    """``SetupBaseR`` of RFC 9180, section 5.1.1.

    Raises:
        UsageError: the key is of another KEM (code ``hpke.private-key``).
        FormatError: ``enc`` has another length (code ``hpke.enc``).
        Refused: ``enc`` is of low order (code ``hpke.kem``).
    """
    if private_key.kem_id != suite.kem_id:
        raise UsageError(
            "the private key is of another KEM",
            code="hpke.private-key",
            claim="KEM",
            expected=f"{suite.kem_id:#06x}",
            actual=f"{private_key.kem_id:#06x}",
        )
    return ReceiverContext(suite, private_key.decapsulate(enc), info)


def seal_to(suite: Suite, public_key: Bytes, plaintext: Bytes, *, info: bytes, aad: Bytes = b"") -> bytes:
    """Seal one message: ``enc`` followed by its ciphertext (RFC 9180, section 6.1).

    Raises:
        UsageError: an export-only suite (code ``hpke.export-only``).
        FormatError: not a public key of the suite's KEM (code ``hpke.public-key``).
        Refused: a public key of low order (code ``hpke.kem``).
    """
    enc, context = setup_sender(suite, public_key, info)
    return enc + context.seal(plaintext, aad)


def open_from(
    suite: Suite, private_key: PrivateKey, message: Bytes, *, info: bytes, aad: Bytes = b""
) -> bytes:
    """Open what `seal_to` made.

    Raises:
        UsageError: the key is of another KEM, or an export-only suite.
        FormatError: too short for ``enc`` and a tag (codes ``hpke.enc``, ``hpke.length``).
        Refused: ``enc`` is of low order (code ``hpke.kem``).
        Tampered: another key, info or aad, or an altered message (code ``hpke.open``).
    """
    view = octets(message)
    context = setup_receiver(suite, private_key, view[: suite.n_enc], info)
    return context.open(view[suite.n_enc :], aad)
