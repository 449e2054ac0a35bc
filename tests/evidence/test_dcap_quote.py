"""DCAP quotes and PCK extensions: exact round trips, reserved bytes, any bytes give a value or our error."""

from __future__ import annotations

import contextlib
from dataclasses import replace
from pathlib import Path

import pytest
from cryptography import x509
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from cloister.core.evidence.dcap import MAX_QUOTE, Header, Quote, QuoteSignature, signed_bytes
from cloister.core.evidence.pck import EXTENSION_OID, PckExtension
from cloister.core.evidence.sgx import SgxReportBody
from cloister.core.evidence.tdx import TdReport, TdReport15
from cloister.core.verifier.certificates import load_certificate, load_chain, load_crl
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


@pytest.fixture(scope="session", params=["4", "4 SGX", "5 SGX", "5 TD 1.0", "5 TD 1.5"])
def newer(request, authority, raw) -> bytes:
    """A quote of version 4 or 5."""
    version = int(request.param[0])
    if request.param.endswith("SGX"):
        return authority._quoting_enclave.sign(Quote.from_bytes(raw).body, version=version)
    return authority.td_quote(
        report_data=b"r" * 64,
        mr_td=b"m" * 48,
        version=version,
        td_version=request.param[5:],
        mr_service_td=b"s" * 48,
        now=NOW,
    )


@pytest.fixture(scope="session")
def td_raw(authority) -> bytes:
    return authority.td_quote(report_data=b"r" * 64, mr_td=b"m" * 48, version=5, now=NOW)


def test_round_trip(raw):
    quote = Quote.from_bytes(raw)
    assert quote.to_bytes() == raw
    assert quote.body.mr_enclave == b"e" * 32
    assert (quote.body.isv_prod_id, quote.body.isv_svn) == (1, 2)
    assert quote.signed_bytes == raw[:432]


@pytest.mark.parametrize("padding", [b"", bytes(7), b"\0\1 text"])
def test_what_follows_is_kept(raw, padding):
    quote = Quote.from_bytes(raw + padding)
    assert quote.padding == padding
    assert quote.to_bytes() == raw + padding


def test_newer_round_trip(newer):
    for data in (newer, newer + bytes(3)):
        quote = Quote.from_bytes(data)
        assert quote.to_bytes() == data
        assert quote.padding == data[len(newer) :]
        assert newer.startswith(quote.signed_bytes)
        assert quote.signed_bytes == signed_bytes(quote.header, quote.body)
        assert (
            QuoteSignature.from_bytes(quote.signature.to_bytes(nested=True), nested=True) == quote.signature
        )


@pytest.mark.parametrize("version", [4, 5])
def test_td_report(version, authority):
    rtmrs = [bytes([number]) * 48 for number in range(4)]
    data = authority.td_quote(report_data=b"r" * 64, mr_td=b"m" * 48, rtmrs=rtmrs, version=version, now=NOW)
    body = Quote.from_bytes(data).body
    assert type(body) is {4: TdReport, 5: TdReport15}[version]
    assert (body.mr_td, body.report_data) == (b"m" * 48, b"r" * 64)
    assert [body.rtmr0, body.rtmr1, body.rtmr2, body.rtmr3] == rtmrs
    assert len(body.to_bytes()) == body.SIZE
    assert not body.debug


@pytest.mark.parametrize("offset", [8, 9, 10, 11])
def test_reserved_byte_of_a_newer_header(offset, newer):
    changed = bytearray(newer)
    changed[offset] = 1
    with pytest.raises(EvidenceError, match="reserved") as caught:
        Quote.from_bytes(bytes(changed))
    assert caught.value.claim == "reserved bytes 8 to 11"


@pytest.mark.parametrize("bit", [1, 2, 3, 7, 8, 15, 17, 26, 32, 61])
def test_reserved_bit_of_td_attributes(bit, td_raw):
    """One in each range that the TDX module doesn't define."""
    changed = bytearray(td_raw)
    changed[54 + 120 + bit // 8] |= 1 << bit % 8
    with pytest.raises(EvidenceError, match="reserved bit") as caught:
        Quote.from_bytes(bytes(changed))
    assert caught.value.claim == "td_attributes"


@pytest.mark.parametrize("bit", [0, 4, 5, 6, 16, 27, 28, 29, 30, 31, 62, 63])
def test_defined_bit_of_td_attributes(bit, td_raw):
    changed = bytearray(td_raw)
    changed[54 + 120 + bit // 8] |= 1 << bit % 8
    assert Quote.from_bytes(bytes(changed)).body.debug == (bit < 8)


@pytest.mark.parametrize(
    ("offset", "value", "claim"),
    [
        (0, 2, "quote version"),
        (0, 6, "quote version"),
        (2, 3, "attestation key type"),
        (4, 1, "TEE type"),
        (4, 0, "body type"),  # an enclave's quote with a TD's body
        (48, 1, "body type"),
        (48, 4, "body type"),
        (50, 0, "body size"),
        (53, 1, "body size"),
    ],
)
def test_newer_quote_with_another_header_or_body(offset, value, claim, td_raw):
    changed = bytearray(td_raw)
    changed[offset] = value
    with pytest.raises(EvidenceError) as caught:
        Quote.from_bytes(bytes(changed))
    assert caught.value.claim == claim


def test_version_3_has_no_trust_domains(raw):
    with pytest.raises(EvidenceError) as caught:
        Quote.from_bytes(raw[:4] + b"\x81" + raw[5:])
    assert caught.value.claim == "TEE type"


def test_certification_that_is_not_wrapped(td_raw):
    quote = Quote.from_bytes(td_raw)
    at = len(quote.signed_bytes) + 4 + 128
    with pytest.raises(EvidenceError) as caught:
        Quote.from_bytes(td_raw[:at] + b"\x05" + td_raw[at + 1 :])
    assert caught.value.claim == "certification of the attestation key"
    with pytest.raises(EvidenceError, match="length"):
        QuoteSignature.from_bytes(quote.signature.to_bytes(), nested=True)


def test_newer_length_that_lies(newer):
    """Of the signature data, of its certification, of the authentication data, of the PEM chain."""
    quote = Quote.from_bytes(newer)
    start = len(quote.signed_bytes)
    outer = start + 4 + 128 + 2
    auth = outer + 4 + 384 + 64
    inner = auth + 2 + len(quote.signature.qe_auth_data) + 2
    for offset in (start, outer, auth, inner):
        for change in (1, 0xFF):
            changed = bytearray(newer)
            changed[offset] = (changed[offset] + change) % 256
            with pytest.raises(EvidenceError):
                Quote.from_bytes(bytes(changed) + bytes(1))


def test_every_truncation_of_newer_quotes(newer):
    for length in [*range(0, 1400, 13), *range(1400, len(newer), 97), len(newer) - 1]:
        with pytest.raises(EvidenceError):
            Quote.from_bytes(newer[:length])


@pytest.mark.parametrize("name", [name for name, _size in TdReport15.FIELDS])
def test_field_of_a_td_report_of_a_wrong_size(name, td_raw):
    with pytest.raises(EvidenceError, match=name):
        replace(Quote.from_bytes(td_raw).body, **{name: b"short"})


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
        TdReport.from_bytes,
        TdReport15.from_bytes,
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


@settings(max_examples=300, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(offset=st.integers(0, 1 << 16), value=st.binary(min_size=1, max_size=8))
def test_changed_newer_quote_round_trips_or_is_our_error(offset, value, newer):
    offset %= len(newer)
    changed = newer[:offset] + value + newer[offset + len(value) :]
    try:
        quote = Quote.from_bytes(changed)
    except EvidenceError:
        return
    assert quote.to_bytes() == changed


@settings(max_examples=300)
@given(data=st.data())
def test_changed_real_quote_round_trips_or_is_our_error(data):
    if not VECTORS.is_dir():
        pytest.skip("real attestation evidence (../shared/vectors/dcap) is not on this machine")
    path = data.draw(st.sampled_from(sorted(VECTORS.glob("*/quote.bin"))))
    real = path.read_bytes()
    offset = data.draw(st.integers(0, len(real) - 1))
    value = data.draw(st.binary(min_size=1, max_size=8))
    changed = real[:offset] + value + real[offset + len(value) :]
    with contextlib.suppress(EvidenceError):
        assert Quote.from_bytes(changed).to_bytes() == changed


@settings(max_examples=300)
@given(st.binary(min_size=TdReport15.SIZE, max_size=TdReport15.SIZE))
def test_any_bytes_of_the_right_length_round_trip_as_reports(data):
    for kind in (SgxReportBody, TdReport, TdReport15):
        raw = data[: getattr(kind, "SIZE", 384)]
        with contextlib.suppress(EvidenceError):
            assert kind.from_bytes(raw).to_bytes() == raw


@settings(max_examples=300)
@given(offset=st.integers(0, 1 << 16), value=st.binary(min_size=1, max_size=3))
def test_changed_der_gives_a_value_or_our_error(offset, value, authority):
    collateral = authority.collateral(NOW, tee="tdx")
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


def test_pck_extension_with_a_length_in_another_form(authority):
    """DER has one form of a length; the long form of a short one is another."""
    der = sgx_extension(authority._platform)
    assert der[:2] == b"\x30\x82"
    for changed in (b"\x30\x83\x00" + der[2:], b"\x30\x81\x10" + bytes(16), b"\x30\x82\x00\x81" + bytes(129)):
        with pytest.raises(EvidenceError, match="length"):
            PckExtension.from_bytes(changed)


def test_pck_extension_with_a_field_twice(authority):
    der = sgx_extension(authority._platform)
    ppid = der[4 : 6 + der[5]]
    doubled = ppid + der[4:]
    with pytest.raises(EvidenceError, match="twice"):
        PckExtension.from_bytes(b"\x30\x82" + len(doubled).to_bytes(2, "big") + doubled)


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
