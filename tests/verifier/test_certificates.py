"""Certificates, revocation lists and roots that don't parse, and chains that don't say enough."""

from __future__ import annotations

from datetime import UTC, datetime

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding

from cloister.core.evidence.pck import PckExtension
from cloister.core.verifier import TrustAnchors
from cloister.core.verifier.anchors import MAX_ROOTS
from cloister.core.verifier.chain import (
    MAX_CERTIFICATE,
    MAX_PEM,
    load_certificate,
    load_chain,
    load_crl,
    time_text,
    to_pem,
    verify_chain,
)
from cloister.errors import EvidenceError, EvidenceRefused, UsageError
from cloister.sim import pki

DAY = 86400


def element(data: bytes, offset: int) -> int:
    """The end of the DER element at ``offset``."""
    size = data[offset + 1]
    if size < 0x80:
        return offset + 2 + size
    start = offset + 2 + (size & 0x7F)
    return start + int.from_bytes(data[offset + 2 : start], "big")


def without_next_update(crl: bytes) -> bytes:
    """A revocation list whose second time is cut out; its signature doesn't matter to the parser."""
    tbs = 2 + (crl[1] & 0x7F)  # both lengths are in the long form
    end = element(crl, tbs)
    fields, offset = [], tbs + 2 + (crl[tbs + 1] & 0x7F)
    while offset < end:
        following = element(crl, offset)
        fields.append(crl[offset:following])
        offset = following
    times = [number for number, field in enumerate(fields) if field[0] in {0x17, 0x18}]
    del fields[times[1]]
    return pki._tlv(0x30, pki._tlv(0x30, b"".join(fields)) + crl[end:])


def test_certificate_that_is_too_long():
    with pytest.raises(EvidenceError, match="longer than") as caught:
        load_certificate(bytes(MAX_CERTIFICATE + 1))
    assert (caught.value.code, caught.value.claim) == ("evidence.certificate", "certificate")


def test_chain_that_is_too_long():
    with pytest.raises(EvidenceError, match="longer than") as caught:
        load_chain(bytes(MAX_PEM + 1))
    assert (caught.value.code, caught.value.claim) == ("evidence.certificate", "certificate chain")


def test_revocation_list_without_a_next_update(authority, now):
    crl = authority.collateral(now).root_ca_crl
    load_crl(crl)
    with pytest.raises(EvidenceError, match="without a next update") as caught:
        load_crl(without_next_update(crl))
    assert (caught.value.code, caught.value.claim) == ("evidence.certificate", "revocation list")


def test_revocation_list_that_is_signed_in_another_way(authority, now):
    root = authority._root
    crl = (
        x509.CertificateRevocationListBuilder()
        .issuer_name(root.certificate.subject)
        .last_update(datetime.fromtimestamp(now, UTC))
        .next_update(datetime.fromtimestamp(now + DAY, UTC))
        .add_extension(x509.CRLNumber(1), critical=False)
        .sign(root.key, hashes.SHA512())
    )
    with pytest.raises(EvidenceError, match="not signed in the way") as caught:
        load_crl(crl.public_bytes(Encoding.DER))
    assert (caught.value.code, caught.value.claim) == ("evidence.certificate", "revocation list")


def test_leaf_that_does_not_say_what_its_key_is_for(authority, now):
    root = authority._root
    leaf = (
        x509.CertificateBuilder()
        .subject_name(x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "Leaf")]))
        .issuer_name(root.certificate.subject)
        .public_key(ec.generate_private_key(ec.SECP256R1()).public_key())
        .serial_number(1)
        .not_valid_before(datetime.fromtimestamp(now - DAY, UTC))
        .not_valid_after(datetime.fromtimestamp(now + DAY, UTC))
        .sign(root.key, hashes.SHA256())
    )
    chain = [
        load_certificate(leaf.public_bytes(Encoding.DER)),
        load_certificate(authority.root_der),
    ]
    with pytest.raises(EvidenceRefused) as caught:
        verify_chain(chain, now=now, code="evidence.tcb-chain", what="chain")
    assert (caught.value.code, caught.value.claim) == ("evidence.key-usage", "key usage of Leaf")


@pytest.mark.parametrize(("seconds", "text"), [(0, "1970-01-01T00:00:00Z"), (1 << 70, str(1 << 70))])
def test_times(seconds, text):
    assert time_text(seconds) == text


def test_certificate_in_pem(authority):
    root = load_certificate(authority.root_der)
    assert load_chain(to_pem(root.der).encode()) == (root,)


def test_anchors_are_printed_by_kind_and_digest(authority):
    simulated = TrustAnchors.simulated(authority.root_der)
    assert repr(simulated) == f"<TrustAnchors simulated {simulated.digest.hex()[:16]}>"
    assert repr(TrustAnchors.vendor()).startswith("<TrustAnchors vendor ")


def test_simulated_roots_that_are_too_long():
    with pytest.raises(UsageError) as caught:
        TrustAnchors.simulated(bytes(MAX_ROOTS + 1))
    assert (caught.value.code, caught.value.claim) == ("anchors.simulated-root", "simulated roots")


def test_two_simulated_roots_of_one_kind(authority, other_authority):
    with pytest.raises(UsageError) as caught:
        TrustAnchors.simulated(authority.root_der + other_authority.root_der)
    assert (caught.value.code, caught.value.actual) == ("anchors.simulated-root", "dcap")


def test_revocation_list_with_an_impossible_number(authority, now):
    """It would be remembered, in a file that could not be read again."""
    root = authority._root
    crl = pki.revoke(
        [],
        issuer=root.certificate,
        issuer_key=root.key,
        issued=now,
        next_update=now + DAY,
        number=1 << 63,
    )
    with pytest.raises(EvidenceError, match="impossible number"):
        load_crl(crl)


def test_security_version_in_its_unsigned_form(authority):
    """Some of Intel's certificates leave out the zero that DER puts before 128 and above."""
    raw = pki.sgx_extension(authority._platform)
    changed = raw.replace(b"\x02\x01\x02\x01\x02", b"\x02\x01\x02\x01\x80", 1)  # the first component
    assert changed != raw
    assert PckExtension.from_bytes(changed).tcb_components == (0x80, *[2] * 15)
