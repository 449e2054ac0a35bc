"""DCAP quotes and PCK extensions: exact round trips, reserved bytes, any bytes give a value or our error."""

from __future__ import annotations

import contextlib
from dataclasses import replace
from pathlib import Path

import pytest
from cryptography import x509
from hypothesis import given, settings
from hypothesis import strategies as st

from cloister.core.evidence.dcap import MAX_QUOTE, Header, Quote, QuoteSignature, SgxReportBody
from cloister.core.evidence.pck import EXTENSION_OID, PckExtension
from cloister.core.verifier.chain import load_certificate, load_chain, load_crl
from cloister.core.verifier.qe import QeIdentity
from cloister.core.verifier.tcb import TcbInfo
from cloister.errors import EvidenceError
from cloister.sim.authority import SimulatedAuthority
from cloister.sim.pki import sgx_extension

NOW = 1_800_000_000
VECTORS = Path(__file__).resolve().parents[3] / "shared" / "vectors" / "dcap"


@pytest.fixture(scope="session")
def authority(tmp_path_factory):
    return SimulatedAuthority.create(tmp_path_factory.mktemp("authority"), now=NOW)


@pytest.fixture(scope="session")
def raw(authority) -> bytes:
    return authority.quote(
        report_data=b"r" * 64, mr_enclave=b"e" * 32, mr_signer=b"s" * 32, isv_prod_id=1, isv_svn=2, now=NOW
    )


def test_round_trip(raw):
    quote = Quote.from_bytes(raw)
    assert quote.to_bytes() == raw
    assert quote.body.mr_enclave == b"e" * 32
    assert (quote.body.isv_prod_id, quote.body.isv_svn) == (1, 2)
    assert quote.signed_bytes == raw[:432]


def test_zero_padding_is_kept(raw):
    quote = Quote.from_bytes(raw + bytes(7))
    assert quote.padding == 7
    assert quote.to_bytes() == raw + bytes(7)


@pytest.mark.parametrize(
    "name", ["sgx-v3-config-swhardening", "sgx-v3-debug-outofdate", "sgx-v3-swhardening-platformca"]
)
def test_real_quotes_round_trip(name):
    if not VECTORS.is_dir():
        pytest.skip("real attestation evidence (../shared/vectors/dcap) is not on this machine")
    data = (VECTORS / name / "quote.bin").read_bytes()
    quote = Quote.from_bytes(data)
    assert quote.to_bytes() == data
    assert quote.body.debug == ("debug" in name)
    leaf = load_chain(quote.signature.certification_data)[0]
    extension = leaf.parsed.extensions.get_extension_for_oid(x509.ObjectIdentifier(EXTENSION_OID))
    platform = PckExtension.from_bytes(extension.value.public_bytes())
    assert platform.cpu_svn[:6] == bytes(platform.tcb_components[:6])
    assert bool(platform.platform_instance_id) == (platform.sgx_type == 1)


@pytest.mark.parametrize("offset", [20, 31, 96, 127, 160, 191, 262, 303])
def test_reserved_byte_of_the_report(offset, raw):
    for start in (48, 48 + 384 + 4 + 128):  # the enclave's report and the quoting enclave's
        changed = bytearray(raw)
        changed[start + offset] = 1
        with pytest.raises(EvidenceError, match="reserved"):
            Quote.from_bytes(bytes(changed))


@pytest.mark.parametrize(
    ("offset", "claim"), [(0, "quote version"), (2, "attestation key type"), (4, "TEE type")]
)
def test_unsupported_header(offset, claim, raw):
    changed = bytearray(raw)
    changed[offset] ^= 0x81
    with pytest.raises(EvidenceError) as caught:
        Quote.from_bytes(bytes(changed))
    assert caught.value.claim == claim


def test_padding_that_is_not_zero(raw):
    with pytest.raises(EvidenceError, match="not zero"):
        Quote.from_bytes(raw + b"\0\1")


def test_quote_that_is_too_long(raw):
    with pytest.raises(EvidenceError, match="length"):
        Quote.from_bytes(raw + bytes(MAX_QUOTE))


def test_every_truncation(raw):
    for length in [*range(0, 1100, 11), *range(1100, len(raw), 97), len(raw) - 1]:
        with pytest.raises(EvidenceError):
            Quote.from_bytes(raw[:length])


def test_length_that_lies(raw):
    parsed = Quote.from_bytes(raw).signature
    data = parsed.to_bytes()
    auth = 576
    longer = data[:auth] + b"\xff\xff" + data[auth + 2 :]
    for changed in (longer, data + b"x", data[:-1], data[: auth + 1], b""):
        with pytest.raises(EvidenceError):
            QuoteSignature.from_bytes(changed)


def test_authentication_data_that_is_too_long(raw):
    with pytest.raises(EvidenceError, match="QE authentication data"):
        replace(Quote.from_bytes(raw).signature, qe_auth_data=bytes(1025))


@pytest.mark.parametrize(
    "name", ["cpu_svn", "attributes", "mr_enclave", "mr_signer", "config_id", "report_data"]
)
def test_field_of_a_wrong_size(name, raw):
    with pytest.raises(EvidenceError, match=name):
        replace(Quote.from_bytes(raw).body, **{name: b"short"})


@given(st.binary(max_size=500))
def test_any_bytes_give_a_value_or_our_error(data):
    for parse in (
        Quote.from_bytes,
        Header.from_bytes,
        SgxReportBody.from_bytes,
        QuoteSignature.from_bytes,
        PckExtension.from_bytes,
        load_certificate,
        load_chain,
        load_crl,
        TcbInfo.from_bytes,
        QeIdentity.from_bytes,
    ):
        with contextlib.suppress(EvidenceError):
            parse(data)


@settings(max_examples=300)
@given(offset=st.integers(0, 1 << 16), value=st.binary(min_size=1, max_size=8))
def test_changed_quote_round_trips_or_is_our_error(offset, value, raw):
    offset %= len(raw)
    changed = raw[:offset] + value + raw[offset + len(value) :]
    try:
        quote = Quote.from_bytes(changed)
    except EvidenceError:
        return
    assert quote.to_bytes() == changed


@settings(max_examples=300)
@given(offset=st.integers(0, 1 << 16), value=st.binary(min_size=1, max_size=3))
def test_changed_der_gives_a_value_or_our_error(offset, value, authority):
    collateral = authority.collateral(NOW)
    for parse, data in (
        (PckExtension.from_bytes, sgx_extension(authority._platform)),
        (load_certificate, authority.root_der),
        (load_crl, collateral.pck_crl),
        (load_chain, collateral.tcb_info_issuer_chain),
        (TcbInfo.from_bytes, collateral.tcb_info),
        (QeIdentity.from_bytes, collateral.qe_identity),
    ):
        at = offset % len(data)
        with contextlib.suppress(EvidenceError):
            parse(data[:at] + value + data[at + len(value) :])


def test_pck_extension_round_trips(authority):
    platform = replace(
        authority._platform, tcb_components=tuple(range(120, 136)), pce_svn=40000, fmspc=b"\xff" * 6
    )
    assert PckExtension.from_bytes(sgx_extension(platform)) == platform


@pytest.mark.parametrize(
    "change",
    [
        {"ppid": b"short"},
        {"pce_id": b"123"},
        {"fmspc": b""},
        {"cpu_svn": bytes(15)},
        {"sgx_type": 3},
        {"pce_svn": 65536},
    ],
)
def test_pck_extension_with_a_wrong_field(change, authority):
    with pytest.raises(EvidenceError, match="SGX extension"):
        PckExtension.from_bytes(sgx_extension(replace(authority._platform, **change)))


def test_pck_extension_without_a_component(authority):
    with pytest.raises(EvidenceError, match="SGX extension"):
        PckExtension.from_bytes(sgx_extension(replace(authority._platform, tcb_components=(1,) * 15)))


def test_pck_extension_with_trailing_bytes(authority):
    with pytest.raises(EvidenceError, match="SGX extension"):
        PckExtension.from_bytes(sgx_extension(authority._platform) + b"\0")


def test_pck_extension_that_is_too_long():
    with pytest.raises(EvidenceError, match="too long"):
        PckExtension.from_bytes(bytes(5000))


@pytest.mark.parametrize(
    "spoil", [lambda pem: b"", lambda pem: pem * 4, lambda pem: b"x" + pem, lambda pem: pem + b" x"]
)
def test_chain_that_is_not_one_to_three_certificates(spoil, authority):
    with pytest.raises(EvidenceError) as caught:
        load_chain(spoil(authority.root_pem.encode()))
    assert caught.value.code == "evidence.certificate"


def test_chain_in_base64_with_stray_bits():
    """Bits that no byte needs must be zero, so that one certificate has one encoding."""
    pem = b"-----BEGIN CERTIFICATE-----\n%s\n-----END CERTIFICATE-----\n"
    with pytest.raises(EvidenceError, match="malformed"):
        load_chain(pem % b"QQ==")
    with pytest.raises(EvidenceError, match="not canonical"):
        load_chain(pem % b"QR==")
