"""Certificates, revocation lists and roots that don't parse, and chains that don't say enough."""

from __future__ import annotations

import threading
import warnings
from datetime import UTC, datetime

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec, padding, rsa
from cryptography.hazmat.primitives.serialization import Encoding

from cloister.core.evidence.pck import PckExtension
from cloister.core.evidence.pem import to_pem
from cloister.core.times import time_text
from cloister.core.verifier import TrustAnchors
from cloister.core.verifier.anchors import MAX_ROOTS
from cloister.core.verifier.certificates import (
    AMD,
    MAX_CERTIFICATE,
    MAX_PEM,
    load_certificate,
    load_chain,
    load_crl,
    parse_certificate,
)
from cloister.core.verifier.chain import require_signed_by, verify_chain, verify_crl
from cloister.errors import EvidenceError, EvidenceRefused, UsageError
from cloister.sim import pki, snp_pki
from cloister.sim.pki import raw_sign
from cloister.sim.snp import SimulatedAmd

NOW = 1_800_000_000
DAY = 86400


@pytest.fixture(scope="module")
def amd() -> SimulatedAmd:
    return SimulatedAmd.create(now=NOW)


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
    assert caught.value.expected == f"at most {MAX_ROOTS} B"


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


def test_threads_leave_the_filters_for_warnings_alone(authority, monkeypatch):
    """They belong to the process: who restores what another thread had set turns warnings off for good."""
    before, parse = list(warnings.filters), x509.load_der_x509_certificate
    second_inside, first_left = threading.Event(), threading.Event()
    second = threading.Thread(target=parse_certificate, args=(authority.root_der,))

    def overlapping(der: bytes) -> x509.Certificate:
        if threading.current_thread() is second:
            second_inside.set()
            first_left.wait(5)
        else:
            second.start()
            second_inside.wait(0.2)  # in vain where threads take turns
        return parse(der)

    monkeypatch.setattr(x509, "load_der_x509_certificate", overlapping)
    parse_certificate(authority.root_der)
    first_left.set()
    second.join()
    assert list(warnings.filters) == before


UNKNOWN = x509.UnrecognizedExtension(x509.ObjectIdentifier("1.3.6.1.4.1.99999.1"), b"\5\0")


def certificate(issuer, *, key=None, algorithm=None, padding_=None, extensions=()) -> bytes:
    """A certificate by ``issuer`` that holds one day from `NOW` on; its key is the issuer's by default."""
    builder = (
        x509.CertificateBuilder()
        .subject_name(x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "Leaf")]))
        .issuer_name(issuer.certificate.subject)
        .public_key((key or issuer.key).public_key())
        .serial_number(1)
        .not_valid_before(datetime.fromtimestamp(NOW, UTC))
        .not_valid_after(datetime.fromtimestamp(NOW + DAY, UTC))
    )
    for extension, critical in extensions:
        builder = builder.add_extension(extension, critical=critical)
    signed = builder.sign(issuer.key, algorithm or hashes.SHA256(), rsa_padding=padding_)
    return signed.public_bytes(Encoding.DER)


@pytest.mark.parametrize("critical", [False, True])
def test_critical_extension_that_nobody_knows(authority, critical):
    der = certificate(authority._root, extensions=[(UNKNOWN, critical)])
    if not critical:
        assert load_certificate(der).der == der
        return
    with pytest.raises(EvidenceError, match="unknown critical extension") as caught:
        load_certificate(der)
    assert (caught.value.code, caught.value.claim) == ("evidence.certificate", "certificate")


@pytest.mark.parametrize("critical", [False, True])
def test_list_with_a_critical_extension(authority, now, critical):
    """A list that is partial, or only says what changed, says so there."""
    root = authority._root
    crl = (
        x509.CertificateRevocationListBuilder()
        .issuer_name(root.certificate.subject)
        .last_update(datetime.fromtimestamp(now, UTC))
        .next_update(datetime.fromtimestamp(now + DAY, UTC))
        .add_extension(x509.CRLNumber(1), critical=False)
        .add_extension(x509.DeltaCRLIndicator(1), critical=critical)
        .sign(root.key, hashes.SHA256())
        .public_bytes(Encoding.DER)
    )
    if not critical:
        assert load_crl(crl).number == 1
        return
    with pytest.raises(EvidenceError, match="unknown critical extension") as caught:
        load_crl(crl)
    assert (caught.value.code, caught.value.claim) == ("evidence.certificate", "revocation list")


@pytest.mark.parametrize(
    ("algorithm", "salt", "fits"),
    [
        (hashes.SHA384(), 48, True),
        (hashes.SHA384(), 32, False),
        (hashes.SHA384(), 49, False),
        (hashes.SHA256(), 48, False),
        (hashes.SHA512(), 48, False),
    ],
)
def test_hash_and_salt_of_amds_signatures(amd, algorithm, salt, fits):
    pss = padding.PSS(mgf=padding.MGF1(algorithm), salt_length=salt)
    der = certificate(amd._ask, algorithm=algorithm, padding_=pss)
    if fits:
        assert load_certificate(der, AMD).der == der
        return
    with pytest.raises(EvidenceError, match="not signed in the way that AMD signs"):
        load_certificate(der, AMD)


@pytest.mark.parametrize(("bits", "fits"), [(2048, True), (2040, False), (1024, False)])
def test_shortest_rsa_key(amd, bits, fits):
    key = rsa.generate_private_key(65537, bits)
    der = certificate(amd._ask, key=key, algorithm=hashes.SHA384(), padding_=snp_pki._PSS)
    if fits:
        assert load_certificate(der, AMD).der == der
        return
    with pytest.raises(EvidenceError, match="its key is not of a kind that AMD uses"):
        load_certificate(der, AMD)


def test_list_by_a_ca_that_may_not_sign_lists(amd):
    """AMD's ASK may sign certificates only."""
    made = {
        name: load_crl(
            snp_pki.revoke([], issuer, issued=NOW, next_update=NOW + DAY, number=1),
            AMD,
        )
        for name, issuer in (("ark", amd._ark), ("ask", amd._ask))
    }
    ark, ask = (load_certificate(issuer.der, AMD) for issuer in (amd._ark, amd._ask))
    verify_crl(made["ark"], ark, now=NOW, code="evidence.snp-crl", what="list")
    with pytest.raises(EvidenceRefused) as caught:
        verify_crl(made["ask"], ask, now=NOW, code="evidence.snp-crl", what="list")
    assert (caught.value.code, caught.value.claim) == ("evidence.snp-crl", "signature of list")


def test_a_list_of_the_same_day_by_another_key(authority, other_authority, now):
    """Whatever was found out about one list says nothing about another."""
    issuer = load_certificate(authority.root_der)
    made = [
        load_crl(
            pki.revoke(
                [],
                issuer=authority._root.certificate,
                issuer_key=key,
                issued=now,
                next_update=now + DAY,
                number=1,
            )
        )
        for key in (authority._root.key, other_authority._root.key)
    ]
    verify_crl(made[0], issuer, now=now, code="evidence.root-crl", what="list")
    with pytest.raises(EvidenceRefused) as caught:
        verify_crl(made[1], issuer, now=now, code="evidence.root-crl", what="list")
    assert caught.value.claim == "signature of list"
    with pytest.raises(EvidenceRefused) as caught:  # nor does the first check say anything about later
        verify_crl(made[0], issuer, now=now + DAY + 1, code="evidence.root-crl", what="list")
    assert caught.value.code == "evidence.expired"


def test_a_signature_stands_for_one_signer_and_one_text(authority, other_authority):
    signers = [
        load_certificate(each._tcb_signing.certificate.public_bytes(Encoding.DER))
        for each in (authority, other_authority)
    ]
    signature = raw_sign(authority._tcb_signing.key, b"text")
    another = raw_sign(other_authority._tcb_signing.key, b"text")
    for _ in range(2):
        require_signed_by(signers[0], signature, b"text", code="evidence.tcb-info", what="text")
        for signer, given, text in (
            (signers[1], signature, b"text"),
            (signers[0], another, b"text"),
            (signers[0], signature, b"other"),
            (signers[0], signature[:-1], b"text"),
        ):
            with pytest.raises(EvidenceRefused) as caught:
                require_signed_by(signer, given, text, code="evidence.tcb-info", what="text")
            assert (caught.value.code, caught.value.claim) == ("evidence.tcb-info", "signature of text")
            assert caught.value.expected == f"by {signer.common_name}"
