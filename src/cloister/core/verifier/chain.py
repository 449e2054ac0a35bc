"""Chains, revocation lists and signatures, checked by the rules of the TEE vendors.

Generic path validation rejects the vendors' chains, so each rule is written out here. Whether a certificate's
key signed another certificate, a list or a document is cached, in small bounded caches: every quote brings
the same few. These are facts about bytes, true at any time. Dates are looked at each time, and no trust
decision is cached.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from itertools import pairwise
from typing import Final

from cryptography import x509
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec, utils

from cloister.core.times import time_text
from cloister.core.verifier.certificates import Certificate, PublicKey, RevocationList, key_kind
from cloister.errors import EvidenceRefused

_SIGNED_WITH: Final = {("P-256", 64): hashes.SHA256(), ("P-384", 96): hashes.SHA384()}


def verify_chain(
    chain: Sequence[Certificate],
    *,
    now: int,
    code: str,
    what: str,
    leaf_is_ca: bool = False,
    leaf_states_usage: bool = True,
) -> None:
    """Check signatures, issuer names, CA bits, key usages and dates, from the leaf to the pinned root.

    Args:
        chain: Leaf first.
        now: Unix seconds.
        code: Of a refusal.
        what: The chain's name in a refusal.
        leaf_is_ca: Whether the first certificate is a CA, too.
        leaf_states_usage: Whether an end entity must say that its key signs; AMD's say nothing.

    Raises:
        EvidenceRefused: with ``code``, or ``evidence.expired`` / ``evidence.not-yet-valid`` for a date.
    """
    for depth, (subject, issuer) in enumerate(pairwise(chain), start=int(leaf_is_ca)):
        if issuer.path_length < depth or not _key_usage(issuer).key_cert_sign:
            raise EvidenceRefused(
                code=code,
                claim=f"{what}: {issuer.common_name}",
                expected=f"a CA over {depth} more",
                actual=f"path length {issuer.path_length}",
            )
        if not _issued(subject, issuer):
            same = subject.parsed.issuer == issuer.parsed.subject
            raise EvidenceRefused(
                code=code,
                claim=f"{what}: issuer of {subject.common_name}",
                expected=issuer.common_name,
                actual="another signature" if same else subject.parsed.issuer.rfc4514_string(),
            )
    leaf = chain[0]
    if not leaf_is_ca and (
        leaf.path_length >= 0 or (leaf_states_usage and not _key_usage(leaf).digital_signature)
    ):
        raise EvidenceRefused(
            code=code,
            claim=f"{what}: {leaf.common_name}",
            expected="an end entity that signs",
            actual="other",
        )
    for certificate in chain:
        require_dates(
            f"{what}: {certificate.common_name}", certificate.not_before, certificate.not_after, now=now
        )


@lru_cache(maxsize=128)
def _issued(subject: Certificate, issuer: Certificate) -> bool:
    """Whether the issuer's name and key made this certificate."""
    try:
        subject.parsed.verify_directly_issued_by(issuer.parsed)
    except (InvalidSignature, ValueError, TypeError):
        return False
    return True


def verify_crl(crl: RevocationList, issuer: Certificate, *, now: int, code: str, what: str) -> None:
    """Check that ``issuer`` signed ``crl`` and that it is in force.

    Raises:
        EvidenceRefused: with ``code``, or ``evidence.expired`` / ``evidence.not-yet-valid``.
    """
    if crl.parsed.issuer != issuer.parsed.subject:
        raise EvidenceRefused(
            code=code,
            claim=f"issuer of {what}",
            expected=issuer.parsed.subject.rfc4514_string(),
            actual=crl.parsed.issuer.rfc4514_string(),
        )
    if not _key_usage(issuer).crl_sign or not _listed(crl, issuer):
        raise _another_signature(code, what, issuer.common_name)
    require_dates(what, crl.issued, crl.next_update, now=now)


@lru_cache(maxsize=16)
def _listed(crl: RevocationList, issuer: Certificate) -> bool:
    """Whether the issuer's key signed this list."""
    return crl.parsed.is_signature_valid(issuer.key)


def require_not_revoked(certificate: Certificate, crl: RevocationList) -> None:
    """Refuse a certificate whose serial number is on its issuer's list.

    Raises:
        EvidenceRefused: code ``evidence.revoked``.
    """
    entry = crl.parsed.get_revoked_certificate_by_serial_number(certificate.parsed.serial_number)
    if entry is not None:
        raise EvidenceRefused(
            code="evidence.revoked",
            claim=f"revocation of {certificate.common_name}",
            expected="not revoked",
            actual=f"revoked on {time_text(int(entry.revocation_date_utc.timestamp()))}",
        )


def require_signature(
    key: PublicKey, signature: bytes, data: bytes, *, code: str, what: str, by: str
) -> None:
    """Check a raw r || s signature over ``data``: 64 B on P-256 with SHA-256, 96 B on P-384 with SHA-384.

    Raises:
        EvidenceRefused: with ``code``.
    """
    if not _signs(key, signature, data):
        raise _another_signature(code, what, by)


def require_signed_by(signer: Certificate, signature: bytes, data: bytes, *, code: str, what: str) -> None:
    """As `require_signature`, for what comes again and again.

    Raises:
        EvidenceRefused: with ``code``.
    """
    if not _signed(signer, signature, data):
        raise _another_signature(code, what, signer.common_name)


@lru_cache(maxsize=16)
def _signed(signer: Certificate, signature: bytes, data: bytes) -> bool:
    """Whether the signer's key signed this document."""
    return _signs(signer.key, signature, data)


def _signs(key: PublicKey, signature: bytes, data: bytes) -> bool:
    half = len(signature) // 2
    r, s = int.from_bytes(signature[:half], "big"), int.from_bytes(signature[half:], "big")
    algorithm = _SIGNED_WITH.get((key_kind(key), len(signature)))
    if algorithm is None or not isinstance(key, ec.EllipticCurvePublicKey):
        return False
    try:
        key.verify(utils.encode_dss_signature(r, s), data, ec.ECDSA(algorithm))
    except InvalidSignature:
        return False
    return True


def _another_signature(code: str, what: str, by: str) -> EvidenceRefused:
    return EvidenceRefused(code=code, claim=f"signature of {what}", expected=f"by {by}", actual="another")


def require_dates(what: str, not_before: int, not_after: int, *, now: int) -> None:
    """Refuse what is not in force at ``now`` (unix seconds, both ends included).

    Raises:
        EvidenceRefused: code ``evidence.not-yet-valid`` or ``evidence.expired``.
    """
    if now < not_before:
        raise EvidenceRefused(
            code="evidence.not-yet-valid",
            claim=f"validity of {what}",
            expected=f"from {time_text(not_before)}",
            actual=time_text(now),
        )
    if now > not_after:
        raise EvidenceRefused(
            code="evidence.expired",
            claim=f"validity of {what}",
            expected=f"until {time_text(not_after)}",
            actual=time_text(now),
        )


def _key_usage(certificate: Certificate) -> x509.KeyUsage:
    try:
        return certificate.parsed.extensions.get_extension_for_class(x509.KeyUsage).value
    except x509.ExtensionNotFound as error:
        raise EvidenceRefused(
            code="evidence.key-usage",
            claim=f"key usage of {certificate.common_name}",
            expected="stated",
            actual="absent",
        ) from error
