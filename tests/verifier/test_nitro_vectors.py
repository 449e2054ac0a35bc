"""Documents that AWS signed, alone and inside TLS certificates, at the times when they were good."""

from __future__ import annotations

import base64
from dataclasses import replace
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

from cloister.core.evidence import Evidence
from cloister.core.evidence.nitro import FIELDS, NitroDocument
from cloister.core.verifier import TrustAnchors, nitro
from cloister.core.verifier.result import MAX_AHEAD
from cloister.errors import EvidenceError, EvidenceRefused

VECTORS = Path(__file__).resolve().parents[3] / "shared" / "vectors" / "nitro"
DATA = VECTORS / "evervault" / "test-data"

pytestmark = pytest.mark.skipif(
    not VECTORS.is_dir(), reason="real attestation evidence (../shared/vectors/nitro) is not on this machine"
)


def from_base64(path: Path) -> bytes:
    return base64.b64decode(path.read_bytes())


def certificate(path: Path) -> x509.Certificate:
    raw = path.read_bytes()
    load = x509.load_pem_x509_certificate if raw.startswith(b"-----") else x509.load_der_x509_certificate
    return load(raw)


def from_certificate(path: Path) -> bytes:
    """The first label of the certificate's second name is the document, in hex."""
    names = certificate(path).extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    return bytes.fromhex(names.get_values_for_type(x509.DNSName)[1].split(".")[0])


GA, BETA, BETA_DEBUG = (
    "valid-attestation-doc-base64",
    "beta/valid-attestation-doc-bytes",
    "beta/debug-mode-attestation-doc-bytes",
)
CERTIFICATE = "beta/non-debug-cert-containing-attestation-document-18-1-23.pem"
CERTIFICATE_DER = "beta/non-debug-cert-containing-attestation-document-18-1-23-der.crt"
CERTIFICATE_DEBUG = "beta/debug-mode-cert-containing-attestation-doc-18-1-23.pem"
READERS = {
    GA: from_base64,
    BETA: Path.read_bytes,
    BETA_DEBUG: Path.read_bytes,
    CERTIFICATE: from_certificate,
    CERTIFICATE_DER: from_certificate,
    CERTIFICATE_DEBUG: from_certificate,
}
DEBUG = {GA, BETA_DEBUG, CERTIFICATE_DEBUG}  # the "valid" one is a debug-mode document itself
LEAF_DATES = {  # NOTES.md
    GA: (1695047829, 1695058632),
    BETA: (1665651479, 1665662282),
    BETA_DEBUG: (1665582591, 1665593394),
}
PCR8 = "97c5395a83c0d6a04d53ff962663c714c178c24500bf97f78456ed3721d922cf3f940614da4bb90107c439bc4a1443ca"


def read(name: str) -> bytes:
    return READERS[name](DATA / name)


def check(raw: bytes, now: int, anchors: TrustAnchors | None = None):
    evidence = Evidence(tee="nitro", quote=raw, collateral=None)
    return nitro.verify(evidence, anchors=anchors or TrustAnchors.vendor(), now=now)


def refusal(raw: bytes, now: int, anchors: TrustAnchors | None = None) -> tuple[str, str]:
    with pytest.raises(EvidenceRefused) as caught:
        check(raw, now, anchors)
    return caught.value.code, caught.value.claim


@pytest.fixture(params=READERS)
def name(request) -> str:
    return request.param


@pytest.fixture
def raw(name) -> bytes:
    return read(name)


@pytest.fixture
def made(raw) -> int:
    return NitroDocument.from_bytes(raw).timestamp // 1000


def test_round_trip(raw):
    document = NitroDocument.from_bytes(raw)
    assert document.to_bytes() == raw
    assert document.fields == FIELDS
    assert not document.tagged
    assert list(document.pcrs) == list(range(16))
    assert len(document.cabundle) == 4


def test_document_is_genuine(name, raw, made):
    result = check(raw, made)
    assert not result.simulated
    assert result.debug == (name in DEBUG)
    assert result.collateral_issued == result.platform.timestamp == made
    assert result.platform.module_id.startswith("i-0")
    assert 0 < result.not_after - made <= 3 * 3600
    if name in LEAF_DATES:
        assert result.not_after == LEAF_DATES[name][1]


def test_document_expires(raw, made):
    last = check(raw, made).not_after
    assert check(raw, last).not_after == last
    code, claim = refusal(raw, last + 1)
    assert (code, "-enc" in claim) == ("evidence.expired", True)


def test_document_is_not_from_the_future(name, raw, made):
    """The leaf was good before the document was made: the document wasn't."""
    leaf = x509.load_der_x509_certificate(NitroDocument.from_bytes(raw).certificate)
    first = int(leaf.not_valid_before_utc.timestamp())
    assert LEAF_DATES.get(name, (first, 0))[0] == first
    assert refusal(raw, first - 1)[0] == "evidence.not-yet-valid"
    earliest = max(first, made - MAX_AHEAD)
    assert check(raw, earliest).platform.timestamp == made
    if earliest > first:
        found = refusal(raw, earliest - 1)
        assert found == ("evidence.not-yet-valid", "validity of the Nitro document")


def test_document_under_a_simulated_root(raw, made, anchors):
    assert refusal(raw, made, anchors) == ("evidence.root", "root certificate")


def test_register_eight():
    for name in (CERTIFICATE, CERTIFICATE_DER):
        raw = read(name)
        assert check(raw, NitroDocument.from_bytes(raw).timestamp // 1000).measurements["pcr8"].hex() == PCR8


@pytest.mark.parametrize(
    ("name", "path"),
    [(GA, "certificate.der"), *((name, name) for name in (CERTIFICATE, CERTIFICATE_DER, CERTIFICATE_DEBUG))],
)
def test_user_data_binds_a_tls_key(name, path, raw, made):
    key = certificate(DATA / path).public_key()
    result = check(raw, made)
    assert result.report_data == key.public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)
    assert len(result.measurements["nonce"]) == 256
    assert "public_key" not in result.measurements


def test_fields_of_the_debug_document():
    result = check(read(BETA_DEBUG), LEAF_DATES[BETA_DEBUG][0] + 3600)
    assert len(result.report_data) == 13
    assert len(result.measurements["public_key"]) == 19
    assert "nonce" not in result.measurements


@pytest.mark.parametrize(
    "change",
    [
        {"module_id": "i-0"},
        {"user_data": b""},
        {"nonce": b""},
        {"public_key": b"k"},
        {"signature": bytes(96)},
    ],
)
def test_field_that_was_changed(change, raw, made):
    forged = replace(NitroDocument.from_bytes(raw), **change).to_bytes()
    assert refusal(forged, made) == ("evidence.nitro-signature", "signature of the Nitro document")


def test_register_that_was_changed(raw, made):
    document = NitroDocument.from_bytes(raw)
    for index in range(16):
        forged = replace(document, pcrs=dict(document.pcrs) | {index: b"x" * 48}).to_bytes()
        assert refusal(forged, made)[0] == "evidence.nitro-signature"


def test_leaf_of_another_document():
    document, other = (NitroDocument.from_bytes(read(name)) for name in (BETA, BETA_DEBUG))
    mixed = replace(document, certificate=other.certificate).to_bytes()
    assert refusal(mixed, document.timestamp // 1000)[0] == "evidence.nitro-chain"


@pytest.mark.parametrize("position", range(1, 4))
def test_certificate_that_is_missing(position, raw, made):
    document = NitroDocument.from_bytes(raw)
    bundle = document.cabundle[:position] + document.cabundle[position + 1 :]
    assert refusal(replace(document, cabundle=bundle).to_bytes(), made)[0] == "evidence.nitro-chain"


def test_any_byte_that_was_changed(raw, made):
    for offset in range(0, len(raw), 41):
        changed = raw[:offset] + bytes([raw[offset] ^ 1]) + raw[offset + 1 :]
        with pytest.raises((EvidenceError, EvidenceRefused)):
            check(changed, made)


def test_every_truncation(raw):
    for length in [*range(0, 100), *range(100, len(raw), 89), len(raw) - 1]:
        with pytest.raises(EvidenceError):
            NitroDocument.from_bytes(raw[:length])
