"""X.509 certificates, short chains and revocation lists, as the TEE vendors use them. No trust decision.

Parsing is cached by content, in small bounded caches: every quote brings the same few.
"""

from __future__ import annotations

import base64
import hashlib
import re
import threading
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Final, TypeAlias

from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec, padding, rsa
from cryptography.x509.oid import ExtensionOID, NameOID, SignatureAlgorithmOID

from cloister.errors import EvidenceError

MAX_CERTIFICATE: Final = 4096  # bytes, DER
MAX_PEM: Final = 16 << 10  # bytes of a chain

PublicKey: TypeAlias = ec.EllipticCurvePublicKey | rsa.RSAPublicKey

_PEM: Final = re.compile(
    rb"[\r\n]*-----BEGIN CERTIFICATE-----\r?\n([A-Za-z0-9+/=\r\n]{1,6000})-----END CERTIFICATE-----[\r\n]*"
)
_KNOWN_CRITICAL: Final = frozenset({ExtensionOID.BASIC_CONSTRAINTS, ExtensionOID.KEY_USAGE})
_MIN_RSA: Final = 2048  # bits
_CURVES: Final = {"secp256r1": "P-256", "secp384r1": "P-384"}
_PSS_SALT: Final = 48  # bytes
_UNBOUNDED: Final = 255  # stands for a CA without a path length
_QUIET: Final = threading.Lock()  # held while warnings are off


@dataclass(frozen=True, slots=True, kw_only=True)
class Profile:
    """What the certificates of one vendor look like; others don't parse.

    Attributes:
        name: For errors.
        keys: Kinds of public keys: ``"P-256"``, ``"P-384"``, ``"RSA"``.
        signatures: How certificates and revocation lists are signed.
        max_chain: Most certificates from leaf to root.
    """

    name: str
    keys: frozenset[str]
    signatures: frozenset[x509.ObjectIdentifier]
    max_chain: int


DCAP: Final = Profile(
    name="Intel",
    keys=frozenset({"P-256"}),
    signatures=frozenset({SignatureAlgorithmOID.ECDSA_WITH_SHA256}),
    max_chain=3,
)
AMD: Final = Profile(
    name="AMD",
    keys=frozenset({"RSA", "P-384"}),
    signatures=frozenset({SignatureAlgorithmOID.RSASSA_PSS}),
    max_chain=3,
)
NITRO: Final = Profile(
    name="AWS",
    keys=frozenset({"P-384"}),
    signatures=frozenset({SignatureAlgorithmOID.ECDSA_WITH_SHA384}),
    max_chain=8,
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Certificate:
    """A parsed certificate; times are unix seconds.

    Attributes:
        der: The certificate itself.
        parsed: The same, as ``cryptography`` parsed it.
        key: Its public key, of a kind that its profile allows.
        common_name: The subject's, or empty.
        not_before: First second of validity.
        not_after: Last second of validity.
        path_length: How many CAs may follow a CA; -1 for a certificate that is no CA.
    """

    der: bytes
    parsed: x509.Certificate = field(compare=False, repr=False)
    key: PublicKey = field(compare=False, repr=False)
    common_name: str
    not_before: int
    not_after: int
    path_length: int

    @property
    def fingerprint(self) -> bytes:
        """SHA-256 of the DER form, 32 B."""
        return hashlib.sha256(self.der).digest()


@dataclass(frozen=True, slots=True, kw_only=True)
class RevocationList:
    """A parsed CRL; times are unix seconds."""

    der: bytes = field(repr=False)
    parsed: x509.CertificateRevocationList = field(compare=False, repr=False)
    issued: int
    next_update: int
    number: int


def parse_certificate(der: bytes) -> x509.Certificate:
    """What the parser makes of a certificate in DER, without its remark on AMD's serial numbers, which are 0.

    The filters for warnings are the whole process's. Threads take turns here, or else one would restore what
    another had set, and warnings would stay off.

    Raises:
        Exception: of many kinds; each means that these bytes are no certificate.
    """
    with _QUIET, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return x509.load_der_x509_certificate(der)


@lru_cache(maxsize=64)
def load_certificate(der: bytes, profile: Profile = DCAP) -> Certificate:
    """Parse one DER certificate.

    Raises:
        EvidenceError: no certificate, too long, another kind of key or signature than the profile's, or an
            unknown critical extension.
    """
    if len(der) > MAX_CERTIFICATE:
        raise _unreadable("certificate", f"longer than {MAX_CERTIFICATE} B")
    try:
        parsed = parse_certificate(der)
        key = parsed.public_key()
        extensions = list(parsed.extensions)
        names = parsed.subject.get_attributes_for_oid(NameOID.COMMON_NAME)
        common_name = str(names[0].value) if names else ""
        parsed.issuer.public_bytes()
        algorithm = _algorithm(parsed)
        not_before, not_after = parsed.not_valid_before_utc, parsed.not_valid_after_utc
    except Exception as error:  # the parser has many kinds of failure; each means that these bytes are no use
        raise _unreadable("certificate", "malformed") from error
    if not isinstance(key, ec.EllipticCurvePublicKey | rsa.RSAPublicKey) or key_kind(key) not in profile.keys:
        raise _unreadable("certificate", f"its key is not of a kind that {profile.name} uses")
    if algorithm not in profile.signatures:
        raise _unreadable("certificate", f"not signed in the way that {profile.name} signs")
    _require_known(extensions, "certificate")
    return Certificate(
        der=der,
        parsed=parsed,
        key=key,
        common_name=common_name,
        not_before=int(not_before.timestamp()),
        not_after=int(not_after.timestamp()),
        path_length=_path_length(extensions),
    )


@lru_cache(maxsize=64)
def load_chain(pem: bytes, profile: Profile = DCAP) -> tuple[Certificate, ...]:
    """Parse a PEM chain, leaf first; NUL bytes may end it.

    Raises:
        EvidenceError: anything but 1 to ``profile.max_chain`` certificates.
    """
    return tuple(load_certificate(der, profile) for der in read_pem(pem, most=profile.max_chain))


def read_pem(pem: bytes, *, most: int) -> list[bytes]:
    """The DER forms of 1 to ``most`` certificates in PEM; NUL bytes may end them; raises EvidenceError."""
    if len(pem) > MAX_PEM:
        raise _unreadable("certificate chain", f"longer than {MAX_PEM} B")
    rest = pem.rstrip(b"\0")
    found: list[bytes] = []
    while rest:
        match = _PEM.match(rest)
        if match is None or len(found) == most:
            raise _unreadable("certificate chain", f"not 1 to {most} certificates in PEM")
        text = b"".join(match[1].split())
        try:
            der = base64.b64decode(text, validate=True)
        except ValueError as error:
            raise _unreadable("certificate chain", "not base64") from error
        if base64.b64encode(der) != text:
            raise _unreadable("certificate chain", "not canonical base64")
        found.append(der)
        rest = rest[match.end() :]
    if not found:
        raise _unreadable("certificate chain", "empty")
    return found


@lru_cache(maxsize=16)
def load_crl(der: bytes, profile: Profile = DCAP) -> RevocationList:
    """Parse one DER revocation list.

    Raises:
        EvidenceError: no list, without number or next update, partial, or not signed in the profile's way.
    """
    try:
        parsed = x509.load_der_x509_crl(der)
        extensions = list(parsed.extensions)
        number = parsed.extensions.get_extension_for_class(x509.CRLNumber).value.crl_number
        parsed.issuer.public_bytes()
        algorithm = _algorithm(parsed)
        issued, next_update = parsed.last_update_utc, parsed.next_update_utc
    except Exception as error:  # as in load_certificate
        raise _unreadable("revocation list", "malformed") from error
    if next_update is None:
        raise _unreadable("revocation list", "without a next update")
    if not 0 <= number < 1 << 63:
        raise _unreadable("revocation list", "an impossible number")
    if algorithm not in profile.signatures:
        raise _unreadable("revocation list", f"not signed in the way that {profile.name} signs")
    _require_known(extensions, "revocation list")  # a delta or partial list says so in a critical extension
    return RevocationList(
        der=der,
        parsed=parsed,
        issued=int(issued.timestamp()),
        next_update=int(next_update.timestamp()),
        number=number,
    )


def key_kind(key: PublicKey) -> str:
    """What `Profile.keys` calls a key; empty for a key that no vendor uses."""
    if isinstance(key, rsa.RSAPublicKey):
        return "RSA" if key.key_size >= _MIN_RSA else ""
    return _CURVES.get(key.curve.name, "")


def _algorithm(signed: x509.Certificate | x509.CertificateRevocationList) -> x509.ObjectIdentifier | None:
    """How something is signed; None for PSS with other parameters than SHA-384 throughout, salt of 48 B."""
    oid = signed.signature_algorithm_oid
    if oid != SignatureAlgorithmOID.RSASSA_PSS:
        return oid
    parameters = signed.signature_algorithm_parameters  # the parser takes MGF1 with the same hash only
    salt = parameters._salt_length if isinstance(parameters, padding.PSS) else None
    return oid if isinstance(signed.signature_hash_algorithm, hashes.SHA384) and salt == _PSS_SALT else None


def _path_length(extensions: Sequence[x509.Extension[x509.ExtensionType]]) -> int:
    for extension in extensions:
        if isinstance(extension.value, x509.BasicConstraints) and extension.value.ca:
            length = extension.value.path_length
            return _UNBOUNDED if length is None else length
    return -1


def _require_known(extensions: Sequence[x509.Extension[x509.ExtensionType]], what: str) -> None:
    for extension in extensions:
        if extension.critical and extension.oid not in _KNOWN_CRITICAL:
            raise _unreadable(what, f"unknown critical extension {extension.oid.dotted_string}")


def _unreadable(what: str, detail: str) -> EvidenceError:
    return EvidenceError(f"unusable {what}: {detail}", code="evidence.certificate", claim=what)
