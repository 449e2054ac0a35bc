"""One test per refusal of DCAP verification: evidence that is wrong in exactly one place."""

from __future__ import annotations

import hashlib
import json
from dataclasses import replace
from datetime import UTC, datetime

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding

from cloister.core.evidence.dcap import Quote
from cloister.core.secret import Secret
from cloister.core.times import time_text
from cloister.core.verifier import TrustAnchors, verify
from cloister.core.verifier.certificates import load_chain
from cloister.core.verifier.chain import verify_chain
from cloister.core.verifier.tcb import merge_status
from cloister.errors import EvidenceError, EvidenceRefused
from cloister.sim import pki
from cloister.sim.authority import Flaws, SimulatedAuthority
from cloister.sim.pki import raw_sign
from cloister.sim.quote import QuotingEnclave, report


def refused(evidence, anchors, now) -> EvidenceRefused:
    with pytest.raises(EvidenceRefused) as caught:
        verify(evidence, anchors=anchors, now=now)
    error = caught.value
    assert error.claim
    assert error.expected != error.actual
    return error


def pem(*certificates) -> bytes:
    return b"".join(certificate.public_bytes(Encoding.PEM) for certificate in certificates)


@pytest.fixture
def issue(authority, now):
    """Issue a certificate under the authority's root or PCK CA: ``issue(name, by=..., **changes)``."""

    def make(name, *, by, key=None, **changes):
        key = key or ec.generate_private_key(ec.SECP256R1())
        values = {"not_before": now - 86400, "not_after": now + 86400, **changes}
        return pki.issue(name, key.public_key(), issuer=by.certificate, issuer_key=by.key, **values)

    return make


@pytest.fixture
def quote_with(authority):
    """A quote whose PCK chain is the given one; the PCK's key signs the QE report."""

    def make(*chain, pck_key=None, **changes):
        enclave = replace(authority._quoting_enclave, certification_data=pem(*chain), **changes)
        if pck_key is not None:
            enclave = replace(enclave, pck_key=pck_key)
        assert isinstance(enclave, QuotingEnclave)
        return enclave.sign(
            report(
                cpu_svn=bytes(16),
                attributes=bytes([5]) + bytes(15),
                mr_enclave=b"e" * 32,
                mr_signer=b"s" * 32,
                isv_prod_id=0,
                isv_svn=0,
                report_data=bytes(64),
            )
        )

    return make


def signed(authority, field: str, text: bytes) -> dict[str, bytes]:
    return {field: text, f"{field}_signature": raw_sign(authority._tcb_signing.key, text)}


def edited(collateral, field: str, **changes) -> bytes:
    document = {**json.loads(getattr(collateral, field)), **changes}
    return json.dumps(document).encode()


# Step 1: the quote


def test_quoting_enclave_of_another_vendor(make_evidence, anchors, now):
    quote = bytearray(make_evidence().quote)
    quote[12] ^= 1
    assert refused(make_evidence(raw_quote=bytes(quote)), anchors, now).code == "evidence.qe-vendor"


def test_certification_data_of_another_type(make_evidence, anchors, now):
    evidence = make_evidence(signature={"certification_type": 1})
    assert refused(evidence, anchors, now).code == "evidence.certification-type"


# Step 2: the root


def test_simulated_root_under_vendor_anchors(make_evidence, now):
    error = refused(make_evidence(), TrustAnchors.vendor(), now)
    assert (error.code, error.claim) == ("evidence.simulated", "simulated")
    assert (error.expected, error.actual) == ("False", "True")


def test_another_simulated_root(make_evidence, other_authority, anchors, now):
    error = refused(make_evidence(by=other_authority), anchors, now)
    assert (error.code, error.claim) == ("evidence.root", "root certificate")


@pytest.mark.parametrize(
    "field", ["pck_crl_issuer_chain", "tcb_info_issuer_chain", "qe_identity_issuer_chain"]
)
def test_collateral_chain_under_another_root(field, make_evidence, other_authority, anchors, now):
    chain = getattr(other_authority.collateral(now), field)
    assert refused(make_evidence(**{field: chain}), anchors, now).code == "evidence.root"


def test_chain_that_is_too_short(authority, make_evidence, anchors, now):
    chain = pem(authority._pck.certificate, authority._root.certificate)
    evidence = make_evidence(signature={"certification_data": chain})
    assert refused(evidence, anchors, now).code == "evidence.pck-chain"


# Step 3: the PCK chain


def test_pck_signed_by_another_key(authority, other_authority, make_evidence, anchors, now):
    chain = pem(other_authority._pck.certificate, authority._pck_ca.certificate, authority._root.certificate)
    evidence = make_evidence(signature={"certification_data": chain})
    assert refused(evidence, anchors, now).code == "evidence.pck-chain"


def test_pck_issued_by_an_end_entity(authority, issue, quote_with, make_evidence, anchors, now):
    signer = authority._root
    middle_key = ec.generate_private_key(ec.SECP256R1())
    middle = issue("Fake SGX PCK CA", by=signer, key=middle_key)
    leaf = pki.issue(
        pki.PCK_NAME,
        authority._pck.key.public_key(),
        issuer=middle,
        issuer_key=middle_key,
        not_before=now - 1,
        not_after=now + 1,
    )
    quote = quote_with(leaf, middle, authority._root.certificate)
    error = refused(make_evidence(raw_quote=quote), anchors, now)
    assert error.code == "evidence.pck-chain"
    assert error.actual == "path length -1"


def test_pck_that_is_a_ca(authority, issue, quote_with, make_evidence, anchors, now):
    leaf = issue(pki.PCK_NAME, by=authority._pck_ca, path_length=0)
    quote = quote_with(leaf, authority._pck_ca.certificate, authority._root.certificate)
    assert refused(make_evidence(raw_quote=quote), anchors, now).code == "evidence.pck-chain"


def test_leaf_with_another_name(authority, issue, quote_with, make_evidence, anchors, now):
    leaf = issue("Somebody", by=authority._pck_ca)
    quote = quote_with(leaf, authority._pck_ca.certificate, authority._root.certificate)
    error = refused(make_evidence(raw_quote=quote), anchors, now)
    assert (error.code, error.claim) == ("evidence.pck-chain", "certificate name")


def test_pck_ca_with_another_name(authority, issue, quote_with, make_evidence, anchors, now):
    """Whatever else the root has certified is no CA of platforms."""
    key = ec.generate_private_key(ec.SECP256R1())
    middle = issue("Cloister Simulated SGX Update CA", by=authority._root, key=key, path_length=0)
    leaf = pki.issue(
        pki.PCK_NAME,
        authority._pck.key.public_key(),
        issuer=middle,
        issuer_key=key,
        not_before=now - 1,
        not_after=now + 1,
        sgx=pki.sgx_extension(authority._platform),
    )
    root = authority._root.certificate
    evidence = make_evidence(
        raw_quote=quote_with(leaf, middle, root),
        pck_crl_issuer_chain=pem(middle, root),
        pck_crl=pki.revoke([], issuer=middle, issuer_key=key, issued=now, next_update=now, number=1),
    )
    error = refused(evidence, anchors, now)
    assert (error.code, error.claim) == ("evidence.pck-chain", "certificate name")
    assert error.expected == "one with 'SGX PCK'"


def test_pck_without_sgx_extension(authority, issue, quote_with, make_evidence, anchors, now):
    leaf = issue(pki.PCK_NAME, by=authority._pck_ca)
    quote = quote_with(leaf, authority._pck_ca.certificate, authority._root.certificate)
    error = refused(make_evidence(raw_quote=quote), anchors, now)
    assert (error.code, error.actual) == ("evidence.pck-chain", "absent")


@pytest.mark.parametrize(
    ("start", "end", "code"), [(1, 9, "evidence.not-yet-valid"), (-9, -1, "evidence.expired")]
)
def test_pck_out_of_its_dates(start, end, code, authority, issue, quote_with, make_evidence, anchors, now):
    leaf = issue(
        pki.PCK_NAME,
        by=authority._pck_ca,
        not_before=now + start,
        not_after=now + end,
        sgx=pki.sgx_extension(authority._platform),
    )
    quote = quote_with(leaf, authority._pck_ca.certificate, authority._root.certificate)
    error = refused(make_evidence(raw_quote=quote), anchors, now)
    assert error.code == code
    assert pki.PCK_NAME in error.claim


@pytest.mark.parametrize(
    ("place", "is_ca", "signs", "signs_certificates"),
    [
        ("middle", False, True, True),
        ("middle", True, True, False),
        ("leaf", True, True, True),
        ("leaf", False, False, False),
    ],
)
def test_basic_constraints_and_key_usage_both_count(place, is_ca, signs, signs_certificates, authority, now):
    """A middle that is no CA, or may not sign certificates; a leaf that is a CA, or may not sign."""
    key = ec.generate_private_key(ec.SECP256R1())
    usage = x509.KeyUsage(
        digital_signature=signs,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        key_cert_sign=signs_certificates,
        crl_sign=False,
        encipher_only=False,
        decipher_only=False,
    )
    root = authority._root
    odd = (
        x509.CertificateBuilder()
        .subject_name(x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "Odd")]))
        .issuer_name(root.certificate.subject)
        .public_key(key.public_key())
        .serial_number(1)
        .not_valid_before(datetime.fromtimestamp(now, UTC))
        .not_valid_after(datetime.fromtimestamp(now + 9, UTC))
        .add_extension(usage, critical=True)
        .add_extension(x509.BasicConstraints(ca=is_ca, path_length=0 if is_ca else None), critical=True)
        .sign(root.key, hashes.SHA256())
    )
    below = pki.issue("leaf", key.public_key(), issuer=odd, issuer_key=key, not_before=now, not_after=now)
    chain = load_chain(pem(*((below, odd) if place == "middle" else (odd,)), root.certificate))
    with pytest.raises(EvidenceRefused) as caught:
        verify_chain(chain, now=now, code="evidence.pck-chain", what="chain")
    assert (caught.value.code, caught.value.claim) == ("evidence.pck-chain", "chain: Odd")


# Step 4: the chains of the collateral


def test_crl_of_another_ca_of_the_same_root(authority, issue, make_evidence, anchors, now):
    other = issue("Another SGX PCK CA", by=authority._root, path_length=0)
    evidence = make_evidence(pck_crl_issuer_chain=pem(other, authority._root.certificate))
    error = refused(evidence, anchors, now)
    assert (error.code, error.claim) == ("evidence.crl-chain", "issuer of the PCK CRL")


@pytest.mark.parametrize(
    ("field", "code"),
    [("tcb_info_issuer_chain", "evidence.tcb-chain"), ("qe_identity_issuer_chain", "evidence.qe-chain")],
)
def test_signer_that_is_the_pck_ca(field, code, authority, make_evidence, anchors, now):
    chain = pem(authority._pck_ca.certificate, authority._root.certificate)
    assert refused(make_evidence(**{field: chain}), anchors, now).code == code


@pytest.mark.parametrize(
    ("field", "code"),
    [("tcb_info_issuer_chain", "evidence.tcb-chain"), ("qe_identity_issuer_chain", "evidence.qe-chain")],
)
def test_signer_issued_by_the_pck_ca(field, code, authority, issue, make_evidence, anchors, now):
    signer = issue(pki.TCB_SIGNING_NAME, by=authority._pck_ca)
    evidence = make_evidence(**{field: pem(signer, authority._root.certificate)})
    assert refused(evidence, anchors, now).code == code


@pytest.mark.parametrize(
    ("field", "code"), [("tcb_info", "evidence.tcb-chain"), ("qe_identity", "evidence.qe-chain")]
)
def test_signer_with_another_name(field, code, authority, issue, make_evidence, anchors, now):
    key = ec.generate_private_key(ec.SECP256R1())
    chain = pem(issue("Somebody", by=authority._root, key=key), authority._root.certificate)
    collateral = make_evidence().collateral
    signature = raw_sign(key, getattr(collateral, field))
    evidence = make_evidence(**{f"{field}_issuer_chain": chain, f"{field}_signature": signature})
    error = refused(evidence, anchors, now)
    assert (error.code, error.claim) == (code, "certificate name")


def test_signer_that_has_expired(authority, issue, make_evidence, anchors, now):
    signer = issue(pki.TCB_SIGNING_NAME, by=authority._root, not_after=now - 1)
    evidence = make_evidence(tcb_info_issuer_chain=pem(signer, authority._root.certificate))
    assert refused(evidence, anchors, now).code == "evidence.expired"


# Step 5: revocation


@pytest.mark.parametrize("field", ["root_ca_crl", "pck_crl"])
def test_crl_signed_by_another_authority(field, make_evidence, other_authority, anchors, now):
    crl = getattr(other_authority.collateral(now), field)
    code = {"root_ca_crl": "evidence.root-crl", "pck_crl": "evidence.pck-crl"}[field]
    assert refused(make_evidence(**{field: crl}), anchors, now).code == code


def test_crl_of_another_issuer(authority, make_evidence, anchors, now):
    crl = authority.collateral(now).root_ca_crl
    assert refused(make_evidence(pck_crl=crl), anchors, now).code == "evidence.pck-crl"


def test_crl_with_the_right_key_under_another_name(authority, make_evidence, anchors, now):
    crl = pki.revoke(
        [],
        issuer=authority._root.certificate,
        issuer_key=authority._pck_ca.key,
        issued=now,
        next_update=now,
        number=1,
    )
    error = refused(make_evidence(pck_crl=crl), anchors, now)
    assert (error.code, error.claim) == ("evidence.pck-crl", "issuer of PCK CRL")


def test_revoked_pck(make_evidence, anchors, now):
    error = refused(make_evidence(flaws=Flaws(pck_revoked=True)), anchors, now)
    assert error.code == "evidence.revoked"
    assert pki.PCK_NAME in error.claim


def test_revoked_pck_ca(make_evidence, anchors, now):
    error = refused(make_evidence(flaws=Flaws(pck_ca_revoked=True)), anchors, now)
    assert error.code == "evidence.revoked"
    assert pki.PCK_CA_NAME in error.claim


def test_revoked_tcb_signer(make_evidence, anchors, now):
    error = refused(make_evidence(flaws=Flaws(tcb_signing_revoked=True)), anchors, now)
    assert error.code == "evidence.revoked"
    assert pki.TCB_SIGNING_NAME in error.claim


@pytest.mark.parametrize("revoked", ["tcb_info", "qe_identity", ""])
@pytest.mark.parametrize("own", ["tcb_info", "qe_identity"])
def test_either_revoked_signer(own, revoked, authority, issue, make_evidence, anchors, now):
    """One document has a signer of its own, the other the usual one; each of the two is revoked in turn."""
    key, root = ec.generate_private_key(ec.SECP256R1()), authority._root
    signer = issue(pki.TCB_SIGNING_NAME, by=root, key=key)
    usual = authority._tcb_signing.certificate
    serial = {"": 1, own: signer.serial_number}.get(revoked, usual.serial_number)
    crl = pki.revoke(
        [serial], issuer=root.certificate, issuer_key=root.key, issued=now, next_update=now, number=1
    )
    text = getattr(authority.collateral(now), own)
    evidence = make_evidence(
        root_ca_crl=crl,
        **{
            own: text,
            f"{own}_signature": raw_sign(key, text),
            f"{own}_issuer_chain": pem(signer, root.certificate),
        },
    )
    if not revoked:
        assert verify(evidence, anchors=anchors, now=now).tcb_status == "UpToDate"
        return
    error = refused(evidence, anchors, now)
    assert (error.code, error.claim) == ("evidence.revoked", f"revocation of {pki.TCB_SIGNING_NAME}")


@pytest.mark.parametrize("field", ["root_ca_crl", "pck_crl"])
@pytest.mark.parametrize(
    ("age", "code"), [(31 * 86400, "evidence.expired"), (-86400, "evidence.not-yet-valid")]
)
def test_crl_out_of_its_dates(field, age, code, authority, make_evidence, anchors, now):
    crl = getattr(authority.collateral(now, flaws=Flaws(age=age)), field)
    error = refused(make_evidence(**{field: crl}), anchors, now)
    assert error.code == code
    assert "CRL" in error.claim


# Steps 6 and 7: TCB info and QE identity


@pytest.mark.parametrize(
    ("field", "code"), [("tcb_info", "evidence.tcb-info"), ("qe_identity", "evidence.qe-identity")]
)
def test_document_that_was_edited(field, code, authority, make_evidence, anchors, now):
    text = getattr(authority.collateral(now), field) + b" "
    assert refused(make_evidence(**{field: text}), anchors, now).code == code


@pytest.mark.parametrize(
    ("field", "change", "code"),
    [
        ("tcb_info", {"id": "QE"}, "evidence.tcb-info"),
        ("tcb_info", {"version": 2}, "evidence.tcb-info"),
        ("qe_identity", {"id": "TD_QE"}, "evidence.qe-identity"),
        ("qe_identity", {"version": 1}, "evidence.qe-identity"),
        ("tcb_info", {"nextUpdate": "2026-01-01T00:00:00Z"}, "evidence.expired"),
        ("qe_identity", {"nextUpdate": "2026-01-01T00:00:00Z"}, "evidence.expired"),
        ("tcb_info", {"issueDate": "2037-01-01T00:00:00Z"}, "evidence.not-yet-valid"),
        ("qe_identity", {"issueDate": "2037-01-01T00:00:00Z"}, "evidence.not-yet-valid"),
    ],
)
def test_signed_document_that_says_something_else(
    field, change, code, authority, make_evidence, anchors, now
):
    text = edited(authority.collateral(now), field, **change)
    assert refused(make_evidence(**signed(authority, field, text)), anchors, now).code == code


def test_tcb_info_of_another_family(make_evidence, anchors, now):
    error = refused(make_evidence(flaws=Flaws(fmspc=b"OTHER!")), anchors, now)
    assert (error.code, error.claim) == ("evidence.tcb-info", "FMSPC")


def test_tcb_info_of_another_pce(make_evidence, anchors, now):
    error = refused(make_evidence(flaws=Flaws(pce_id=b"\x00\x01")), anchors, now)
    assert (error.code, error.claim) == ("evidence.tcb-info", "PCEID")


@pytest.mark.parametrize("field", ["tcb_info", "qe_identity"])
@pytest.mark.parametrize(
    "text",
    [
        b"[]",
        b"{}",
        b'{"id": "SGX", "id": "SGX"}',
        b'{"version": 3.0}',
        b'{"version": NaN}',
        b"{",
        b"\xff",
        b"[" * 20000,
    ],
)
def test_signed_document_that_is_malformed(field, text, authority, make_evidence, anchors, now):
    with pytest.raises(EvidenceError) as caught:
        verify(make_evidence(**signed(authority, field, text)), anchors=anchors, now=now)
    assert caught.value.code == "evidence.collateral"


@pytest.mark.parametrize(
    "change",
    [
        {"fmspc": "53494d5347"},
        {"fmspc": "5349 4d5347"},
        {"issueDate": "2026-13-01T00:00:00Z"},
        {"issueDate": "2026-01-01"},
        {"tcbEvaluationDataNumber": -1},
        {"tcbEvaluationDataNumber": True},
        {"tcbType": 1},
        {"tcbLevels": []},
        {"tcbLevels": [1]},
        {"tcbLevels": None},
    ],
)
def test_tcb_info_with_a_malformed_field(change, authority, make_evidence, anchors, now):
    text = edited(authority.collateral(now), "tcb_info", **change)
    with pytest.raises(EvidenceError) as caught:
        verify(make_evidence(**signed(authority, "tcb_info", text)), anchors=anchors, now=now)
    assert caught.value.code == "evidence.collateral"


@pytest.mark.parametrize(
    "advisories", [["x"] * 513, ["INTEL-SA-1", 2], ["a b"], [""], ["x" * 65], "INTEL-SA-1", None]
)
def test_advisories_that_are_malformed(advisories, authority, make_evidence, anchors, now):
    document = json.loads(authority.collateral(now).tcb_info)
    document["tcbLevels"][0]["advisoryIDs"] = advisories
    evidence = make_evidence(**signed(authority, "tcb_info", json.dumps(document).encode()))
    with pytest.raises(EvidenceError, match="advisoryIDs") as caught:
        verify(evidence, anchors=anchors, now=now)
    assert caught.value.code == "evidence.collateral"


@pytest.mark.parametrize("field", ["tcb_info", "qe_identity"])
def test_signed_document_with_a_name_twice(field, authority, make_evidence, anchors, now):
    text = b'{"version":9,' + getattr(authority.collateral(now), field)[1:]
    with pytest.raises(EvidenceError) as caught:
        verify(make_evidence(**signed(authority, field, text)), anchors=anchors, now=now)
    assert caught.value.code == "evidence.collateral"


def test_tcb_status_that_nobody_defined(authority, make_evidence, anchors, now):
    with pytest.raises(EvidenceError, match="tcbStatus"):
        verify(make_evidence(flaws=Flaws(tcb_status="Fine")), anchors=anchors, now=now)


# Steps 8 and 9: the quoting enclave


def test_qe_report_signed_by_another_key(make_evidence, anchors, now):
    evidence = make_evidence(signature={"qe_report_signature": bytes(63) + b"\x01"})
    assert refused(evidence, anchors, now).code == "evidence.qe-report"


def test_attestation_key_that_the_qe_does_not_vouch_for(make_evidence, other_authority, anchors, now):
    stranger = Quote.from_bytes(make_evidence(by=other_authority).quote).signature
    evidence = make_evidence(
        signature={"attestation_key": stranger.attestation_key, "signature": stranger.signature}
    )
    assert refused(evidence, anchors, now).code == "evidence.attestation-key"


def test_qe_authentication_data_that_was_changed(make_evidence, anchors, now):
    assert (
        refused(make_evidence(signature={"qe_auth_data": b""}), anchors, now).code
        == "evidence.attestation-key"
    )


def test_qe_report_that_binds_more_than_the_hash(authority, make_evidence, anchors, now):
    """The upper half of REPORTDATA has to be zero."""
    parsed = Quote.from_bytes(make_evidence().quote).signature
    qe_report = replace(parsed.qe_report, report_data=parsed.qe_report.report_data[:32] + b"x" * 32)
    evidence = make_evidence(
        signature={
            "attestation_key": parsed.attestation_key,
            "qe_report": qe_report,
            "qe_report_signature": raw_sign(authority._pck.key, qe_report.to_bytes()),
        }
    )
    assert refused(evidence, anchors, now).code == "evidence.attestation-key"


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"mr_signer": bytes(32)}, "MRSIGNER"),
        ({"isv_prod_id": 2}, "ISVPRODID"),
        ({"isv_svn": 0}, "ISVSVN"),
        ({"misc_select": 1}, "MISCSELECT"),
        ({"attributes": bytes.fromhex("1700000000000000e700000000000000")}, "ATTRIBUTES"),
    ],
)
def test_quoting_enclave_that_is_another(change, field, authority, make_evidence, anchors, now):
    parsed = Quote.from_bytes(make_evidence().quote).signature
    qe_report = replace(parsed.qe_report, **change)
    evidence = make_evidence(
        signature={
            "qe_report": qe_report,
            "qe_report_signature": raw_sign(authority._pck.key, qe_report.to_bytes()),
        }
    )
    error = refused(evidence, anchors, now)
    assert error.code == "evidence.qe"
    assert error.claim.startswith(field)


# Step 10: the quote's signature


def test_report_data_that_was_changed(make_evidence, anchors, now):
    quote = bytearray(make_evidence().quote)
    quote[48 + 320] ^= 1
    assert refused(make_evidence(raw_quote=bytes(quote)), anchors, now).code == "evidence.quote-signature"


def test_attestation_key_that_is_no_point(authority, make_evidence, anchors, now):
    point = b"\x01" * 64
    parsed = Quote.from_bytes(make_evidence().quote).signature
    bound = hashlib.sha256(point + parsed.qe_auth_data).digest() + bytes(32)
    qe_report = replace(parsed.qe_report, report_data=bound)
    evidence = make_evidence(
        signature={
            "attestation_key": point,
            "qe_report": qe_report,
            "qe_report_signature": raw_sign(authority._pck.key, qe_report.to_bytes()),
        }
    )
    error = refused(evidence, anchors, now)
    assert (error.code, error.claim) == ("evidence.attestation-key", "attestation key")


# Step 11: the TCB level


def test_platform_below_every_level(authority, make_evidence, anchors, now):
    document = json.loads(authority.collateral(now).tcb_info)
    document["tcbLevels"] = document["tcbLevels"][:1]
    document["tcbLevels"][0]["tcb"]["sgxtcbcomponents"][15]["svn"] = 255
    evidence = make_evidence(**signed(authority, "tcb_info", json.dumps(document).encode()))
    assert refused(evidence, anchors, now).code == "evidence.tcb-level"


def test_pce_below_every_level(authority, make_evidence, anchors, now):
    document = json.loads(authority.collateral(now).tcb_info)
    document["tcbLevels"] = document["tcbLevels"][:1]
    document["tcbLevels"][0]["tcb"]["pcesvn"] = 3
    evidence = make_evidence(**signed(authority, "tcb_info", json.dumps(document).encode()))
    assert refused(evidence, anchors, now).code == "evidence.tcb-level"


@pytest.mark.parametrize("flaw", ["tcb_status", "qe_status"])
def test_revoked_tcb(flaw, make_evidence, anchors, now):
    assert (
        refused(make_evidence(flaws=Flaws(**{flaw: "Revoked"})), anchors, now).code == "evidence.tcb-revoked"
    )


@pytest.mark.parametrize(
    ("platform", "qe", "merged"),
    [
        ("UpToDate", "UpToDate", "UpToDate"),
        ("SWHardeningNeeded", "UpToDate", "SWHardeningNeeded"),
        ("UpToDate", "OutOfDate", "OutOfDate"),
        ("SWHardeningNeeded", "OutOfDate", "OutOfDate"),
        ("ConfigurationNeeded", "OutOfDate", "OutOfDateConfigurationNeeded"),
        ("ConfigurationAndSWHardeningNeeded", "OutOfDate", "OutOfDateConfigurationNeeded"),
        ("OutOfDate", "OutOfDate", "OutOfDate"),
        ("OutOfDateConfigurationNeeded", "OutOfDate", "OutOfDateConfigurationNeeded"),
    ],
)
def test_merged_status(platform, qe, merged):
    assert merge_status(platform, qe) == merged


# When the result has to be had anew


DAY = 86400
ROLES = {"root": ("", 1), "pck-ca": ("root", 0), "pck": ("pck-ca", None), "tcb-signing": ("root", None)}


def shortened(authority, role: str, now: int) -> SimulatedAuthority:
    """The same authority with the same keys; the certificate of one role ends in a day."""
    found = {
        "root": authority._root,
        "pck-ca": authority._pck_ca,
        "pck": authority._pck,
        "tcb-signing": authority._tcb_signing,
    }
    for name, (above, path_length) in ROLES.items():
        by, old = found.get(above, found[name]), found[name].certificate
        certificate = pki.issue(
            old.subject.get_attributes_for_oid(x509.NameOID.COMMON_NAME)[0].value,
            old.public_key(),
            issuer=by.certificate if above else None,
            issuer_key=by.key,
            not_before=now - DAY,
            not_after=now + (DAY if name == role else 99 * DAY),
            path_length=path_length,
            sgx=pki.sgx_extension(authority._platform) if name == "pck" else None,
        )
        found[name] = replace(found[name], certificate=certificate)
    return SimulatedAuthority(found, Secret(bytes(32)), authority.amd, authority.nitro)


@pytest.mark.parametrize("role", ROLES)
def test_result_ends_with_each_certificate(role, authority, make_evidence, now):
    shorter = shortened(authority, role, now)
    evidence, anchors = make_evidence(by=shorter), TrustAnchors.simulated(shorter.root_der)
    assert verify(evidence, anchors=anchors, now=now).not_after == now + DAY


@pytest.mark.parametrize("field", ["tcb_info", "qe_identity"])
def test_result_ends_with_each_signers_certificate(field, authority, issue, make_evidence, anchors, now):
    """TCB info and QE identity may have signers of their own."""
    key = ec.generate_private_key(ec.SECP256R1())
    signer = issue(pki.TCB_SIGNING_NAME, by=authority._root, key=key)
    text = getattr(authority.collateral(now), field)
    evidence = make_evidence(
        **{
            field: text,
            f"{field}_signature": raw_sign(key, text),
            f"{field}_issuer_chain": pem(signer, authority._root.certificate),
        }
    )
    assert verify(evidence, anchors=anchors, now=now).not_after == now + DAY


@pytest.mark.parametrize("field", ["root_ca_crl", "pck_crl"])
def test_result_ends_with_each_list(field, authority, make_evidence, anchors, now):
    by = authority._root if field == "root_ca_crl" else authority._pck_ca
    crl = pki.revoke(
        [], issuer=by.certificate, issuer_key=by.key, issued=now, next_update=now + DAY, number=1
    )
    assert verify(make_evidence(**{field: crl}), anchors=anchors, now=now).not_after == now + DAY


@pytest.mark.parametrize("field", ["tcb_info", "qe_identity"])
def test_result_ends_with_each_document(field, authority, make_evidence, anchors, now):
    text = edited(authority.collateral(now), field, nextUpdate=time_text(now + DAY))
    evidence = make_evidence(**signed(authority, field, text))
    assert verify(evidence, anchors=anchors, now=now).not_after == now + DAY


# All of it


def test_no_flipped_bit_goes_unnoticed(make_evidence, anchors, now):
    quote = make_evidence().quote
    collateral = make_evidence().collateral
    evidence = make_evidence(raw_quote=quote)
    # Every byte of header, body and fixed signature data that carries a field, and a sample of the PEM chain.
    for offset in [*range(0, 1054, 3), *range(1054, len(quote), 29)]:
        changed = bytearray(quote)
        changed[offset] ^= 1 << (offset % 8)
        with pytest.raises((EvidenceRefused, EvidenceError)):
            verify(replace(evidence, quote=bytes(changed), collateral=collateral), anchors=anchors, now=now)


@pytest.mark.parametrize(
    "field", ["root_ca_crl", "pck_crl", "tcb_info", "qe_identity", "tcb_info_issuer_chain"]
)
def test_no_flipped_bit_of_collateral_goes_unnoticed(field, make_evidence, anchors, now):
    evidence = make_evidence()
    part = getattr(evidence.collateral, field)
    for offset in range(0, len(part), max(1, len(part) // 60)):
        changed = bytearray(part)
        changed[offset] ^= 1 << (offset % 8)
        collateral = replace(evidence.collateral, **{field: bytes(changed)})
        with pytest.raises((EvidenceRefused, EvidenceError)):
            verify(replace(evidence, collateral=collateral), anchors=anchors, now=now)
