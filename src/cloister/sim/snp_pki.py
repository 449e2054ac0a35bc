"""Certificates and revocation lists of the simulated AMD, in the shape that AMD gives its own.

Every common name is AMD's after the words "Cloister Simulated". Two things differ: ARK and ASK have 2048
bits, so that new ones are made quickly, and no serial number is 0, because the library refuses to write that.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from typing import Final

from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec, padding, rsa
from cryptography.hazmat.primitives.serialization import Encoding
from cryptography.x509.oid import NameOID

from cloister.core.evidence.snp import SnpTcb
from cloister.core.evidence.vek import ARC, CHIP_ID, PRODUCT_NAME, PROVIDER, TCB_PARTS
from cloister.sim.pki import Identity, key_usage, load_pair

PREFIX: Final = "Cloister Simulated "  # of every common name

_RSA_BITS: Final = 2048
_STRUCTURE_VERSION: Final = "1"  # an arc, as the two below
_UNUSED: Final = ("3.4", "3.5", "3.6", "3.7")
_INTEGER, _IA5 = 0x02, 0x16
_PSS: Final = padding.PSS(mgf=padding.MGF1(hashes.SHA384()), salt_length=48)

Authority = Identity[rsa.RSAPrivateKey]
Endorser = Identity[ec.EllipticCurvePrivateKey]


def restore_authority(key_pem: bytes, certificate_pem: bytes) -> Authority:
    """An `Authority` as its ``to_pem`` gave it; raises ValueError for anything damaged."""
    key, certificate = load_pair(key_pem, certificate_pem)
    if not isinstance(key, rsa.RSAPrivateKey):
        raise ValueError("not an RSA key")  # noqa: TRY004
    return Identity(key=key, certificate=certificate)


def issue_authority(
    name: str, issuer: Authority | None, *, not_before: int, not_after: int, path_length: int | None = None
) -> Authority:
    """A CA with a new key; an ARK where ``issuer`` is None. Times in unix seconds."""
    key = rsa.generate_private_key(65537, _RSA_BITS)
    builder = (
        _builder(name, key.public_key(), issuer, not_before, not_after)
        .add_extension(key_usage("key_cert_sign", *(("crl_sign",) if issuer is None else ())), critical=True)
        .add_extension(x509.BasicConstraints(ca=True, path_length=path_length), critical=True)
    )
    return Identity(key=key, certificate=_sign(builder, key if issuer is None else issuer.key))


def issue_endorser(
    name: str,
    issuer: Authority,
    *,
    key: ec.EllipticCurvePrivateKey,
    not_before: int,
    not_after: int,
    extensions: Mapping[str, bytes],
) -> Endorser:
    """A VCEK or VLEK: with AMD's extensions, but, as AMD's, without basic constraints and key usage."""
    builder = _builder(name, key.public_key(), issuer, not_before, not_after)
    for arc, value in extensions.items():
        extension = x509.UnrecognizedExtension(x509.ObjectIdentifier(ARC + arc), value)
        builder = builder.add_extension(extension, critical=False)
    return Identity(key=key, certificate=_sign(builder, issuer.key))


def vcek_extensions(name: str, tcb: SnpTcb, chip_id: bytes) -> dict[str, bytes]:
    """What a VCEK says, by the arcs below AMD's."""
    return {**_extensions(0, name, tcb), CHIP_ID: chip_id}


def vlek_extensions(name: str, tcb: SnpTcb, provider: str) -> dict[str, bytes]:
    """What a VLEK says, likewise."""
    return {**_extensions(1, name, tcb), PROVIDER: _text(provider)}


def revoke(serials: Sequence[int], issuer: Authority, *, issued: int, next_update: int, number: int) -> bytes:
    """A revocation list in DER that names ``serials``; times in unix seconds."""
    builder = (
        x509.CertificateRevocationListBuilder()
        .issuer_name(issuer.certificate.subject)
        .last_update(_time(issued))
        .next_update(_time(next_update))
        .add_extension(x509.CRLNumber(number), critical=False)
    )
    for serial in serials:
        entry = x509.RevokedCertificateBuilder().serial_number(serial).revocation_date(_time(issued)).build()
        builder = builder.add_revoked_certificate(entry)
    return builder.sign(issuer.key, hashes.SHA384(), rsa_padding=_PSS).public_bytes(Encoding.DER)


def _extensions(structure: int, name: str, tcb: SnpTcb) -> dict[str, bytes]:
    numbers = {TCB_PARTS[part]: number for part, number in tcb.parts.items()} | dict.fromkeys(_UNUSED, 0)
    found = {_STRUCTURE_VERSION: _integer(structure), PRODUCT_NAME: _text(name)}
    return found | {arc: _integer(number) for arc, number in sorted(numbers.items())}


def _builder(
    name: str,
    key: rsa.RSAPublicKey | ec.EllipticCurvePublicKey,
    issuer: Authority | None,
    not_before: int,
    not_after: int,
) -> x509.CertificateBuilder:
    subject = x509.Name(
        [
            x509.NameAttribute(NameOID.COMMON_NAME, PREFIX + name),
            x509.NameAttribute(NameOID.ORGANIZATION_NAME, "Cloister Simulated Platform"),
        ]
    )
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(subject if issuer is None else issuer.certificate.subject)
        .public_key(key)
        .serial_number(x509.random_serial_number())
        .not_valid_before(_time(not_before))
        .not_valid_after(_time(not_after))
    )


def _sign(builder: x509.CertificateBuilder, key: rsa.RSAPrivateKey) -> x509.Certificate:
    return builder.sign(key, hashes.SHA384(), rsa_padding=_PSS)


def _integer(number: int) -> bytes:
    content = number.to_bytes(number.bit_length() // 8 + 1, "big")
    return bytes((_INTEGER, len(content))) + content


def _text(text: str) -> bytes:
    return bytes((_IA5, len(text))) + text.encode("ascii")


def _time(seconds: int) -> datetime:
    return datetime.fromtimestamp(seconds, UTC)
