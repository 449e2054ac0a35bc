"""SNP reports, TCB versions and the extensions of a VEK: exact round trips, reserved bits, any bytes."""

from __future__ import annotations

import contextlib
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cloister.core.evidence.snp import (
    HOST_VMPL,
    PRODUCTS,
    REPORT_SIZE,
    SnpReport,
    SnpTcb,
    product_of,
    tcb_layout,
)
from cloister.core.evidence.vek import VekExtensions
from cloister.errors import EvidenceError

VECTORS = Path(__file__).resolve().parents[3] / "shared" / "vectors" / "snp"
REAL = (
    "azure-aci-kms/report.bin",
    "google-go-sev-guest/attestation.bin",
    "openpcc/gce_sevsnp_report.bin",
    "trustee-snp/test-report.bin",
    "trustee-snp/test-vlek-report.bin",
    "veraison/extracted-report.bin",
)


def raw_report(version: int = 5) -> bytes:
    """A report in which every field has its own bytes."""
    data = bytearray(range(256)) * 5
    del data[REPORT_SIZE:]
    numbers = {
        0x000: (version, 4),
        0x008: (0x3FF_FFFF, 8),
        0x030: (3, 4),
        0x034: (1, 4),
        0x040: (0xBF, 8),
        0x048: (0x1F, 4),
    }
    for offset, (number, size) in numbers.items():
        data[offset : offset + size] = number.to_bytes(size, "little")
    zero = [(0x4C, 4), (0x18B, 21), (0x1EB, 1), (0x1EF, 1), (0x208, 152), (0x2D0, 24), (0x318, 392)]
    zero += [(0x1F8, 16)] if version < 5 else []
    zero += [(0x188, 3)] if version < 3 else []
    for offset, size in zero:
        data[offset : offset + size] = bytes(size)
    return bytes(data)


def error_of(data: bytes) -> EvidenceError:
    with pytest.raises(EvidenceError) as caught:
        SnpReport.from_bytes(data)
    assert caught.value.code == "evidence.format"
    return caught.value


def altered(data: bytes, offset: int, value: bytes) -> bytes:
    return data[:offset] + value + data[offset + len(value) :]


@pytest.mark.parametrize("version", [2, 3, 4, 5])
def test_round_trip(version):
    raw = raw_report(version)
    report = SnpReport.from_bytes(raw)
    assert report.to_bytes() == raw
    assert report.signed_bytes == raw[:0x2A0]
    assert report.version == version
    assert SnpReport.from_bytes(raw_report(version)) == report


def test_fields_lie_where_amd_has_them():
    raw = raw_report(5)
    report = SnpReport.from_bytes(raw)
    assert report.guest_svn == int.from_bytes(raw[4:8], "little")
    assert report.family_id == raw[0x10:0x20]
    assert report.image_id == raw[0x20:0x30]
    assert report.current_tcb == raw[0x38:0x40]
    assert report.report_data == raw[0x50:0x90]
    assert report.measurement == raw[0x90:0xC0]
    assert report.host_data == raw[0xC0:0xE0]
    assert report.id_key_digest == raw[0xE0:0x110]
    assert report.author_key_digest == raw[0x110:0x140]
    assert report.report_id == raw[0x140:0x160]
    assert report.report_id_ma == raw[0x160:0x180]
    assert report.reported_tcb == raw[0x180:0x188]
    assert (report.cpuid_family, report.cpuid_model, report.cpuid_stepping) == (0x88, 0x89, 0x8A)
    assert report.chip_id == raw[0x1A0:0x1E0]
    assert report.committed_tcb == raw[0x1E0:0x1E8]
    assert report.current_version == raw[0x1E8:0x1EB]
    assert report.committed_version == raw[0x1EC:0x1EF]
    assert report.launch_tcb == raw[0x1F0:0x1F8]
    assert report.launch_mitigation_vector == int.from_bytes(raw[0x1F8:0x200], "little")
    assert report.current_mitigation_vector == int.from_bytes(raw[0x200:0x208], "little")
    assert report.signature == raw[0x2A0:0x2D0][::-1] + raw[0x2E8:0x318][::-1]


@pytest.mark.parametrize("name", REAL)
def test_real_reports_round_trip(name):
    if not VECTORS.is_dir():
        pytest.skip("real SEV-SNP evidence (../shared/vectors/snp) is not on this machine")
    raw = (VECTORS / name).read_bytes()
    report = SnpReport.from_bytes(raw)
    assert report.to_bytes() == raw
    assert report.product == ("" if report.version == 2 else "Genoa" if "veraison" in name else "Milan")
    product = report.product or "Milan"
    for tcb in (report.current_tcb, report.reported_tcb, report.committed_tcb, report.launch_tcb):
        assert SnpTcb.from_bytes(tcb, product).to_bytes() == tcb


@pytest.mark.parametrize("version", [0, 1, 6, 0x1000_0002])
def test_version_that_is_not_known(version):
    error = error_of(altered(raw_report(), 0, version.to_bytes(4, "little")))
    assert (error.claim, error.expected) == ("version", "2 to 5")


@pytest.mark.parametrize("size", [0, 1, 0x2A0, REPORT_SIZE - 1, REPORT_SIZE + 1])
def test_wrong_length(size):
    error = error_of((raw_report() * 2)[:size])
    assert (error.claim, error.actual) == ("SNP report", f"{size} B")


@pytest.mark.parametrize(
    "offset",
    [0x4C, 0x4F, 0x18B, 0x19F, 0x1EB, 0x1EF, 0x208, 0x29F, 0x2D0, 0x2E7, 0x318, 0x32F, 0x330, 0x49F],
)
def test_reserved_byte(offset):
    for version in (2, 3, 4, 5):
        assert error_of(altered(raw_report(version), offset, b"\1")).claim.startswith("reserved bytes")


@pytest.mark.parametrize(
    ("version", "offset", "claim"),
    [
        (2, 0x188, "cpuid_family"),
        (2, 0x189, "cpuid_model"),
        (2, 0x18A, "cpuid_stepping"),
        *[(version, 0x1F8, "launch_mitigation_vector") for version in (2, 3, 4)],
        *[(version, 0x207, "current_mitigation_vector") for version in (2, 3, 4)],
    ],
)
def test_field_of_a_later_version(version, offset, claim):
    error = error_of(altered(raw_report(version), offset, b"\1"))
    assert (error.claim, error.expected) == (claim, f"0 in version {version}")


@pytest.mark.parametrize(
    ("offset", "value", "claim"),
    [
        (0x00A, b"\x01", "policy"),  # bit 17 must be one
        (0x00B, b"\x07", "policy"),
        (0x00F, b"\x80", "policy"),
        (0x030, b"\x04", "vmpl"),
        (0x030, b"\xfe\xff\xff\xff", "vmpl"),
        (0x040, b"\x40", "platform_info"),
        (0x041, b"\x01", "platform_info"),
        (0x047, b"\x80", "platform_info"),
        (0x048, b"\x20", "key_info"),
        (0x04B, b"\x80", "key_info"),
    ],
)
def test_reserved_bits(offset, value, claim):
    assert error_of(altered(raw_report(), offset, value)).claim == claim


def test_report_that_the_host_asked_for():
    assert SnpReport.from_bytes(altered(raw_report(), 0x30, b"\xff" * 4)).vmpl == HOST_VMPL


@pytest.mark.parametrize(("bits", "signer"), [(0, "VCEK"), (1, "VLEK"), (2, ""), (6, ""), (7, "")])
def test_key_info_names_the_signer(bits, signer):
    for others in range(4):
        assert SnpReport.from_bytes(altered(raw_report(), 0x48, bytes([bits << 2 | others]))).signer == signer


def test_debug_is_bit_19_of_the_policy():
    report = SnpReport.from_bytes(raw_report())
    assert report.debug
    assert not replace(report, policy=report.policy & ~(1 << 19)).debug


@pytest.mark.parametrize(
    "name",
    ["family_id", "report_data", "measurement", "chip_id", "reported_tcb", "current_version", "signature"],
)
def test_field_of_a_wrong_size(name):
    with pytest.raises(EvidenceError, match=name):
        replace(SnpReport.from_bytes(raw_report()), **{name: b"short"})


@pytest.mark.parametrize(("name", "value"), [("guest_svn", -1), ("guest_svn", 1 << 32), ("cpuid_model", 256)])
def test_number_out_of_range(name, value):
    with pytest.raises(EvidenceError) as caught:
        replace(SnpReport.from_bytes(raw_report()), **{name: value})
    assert caught.value.claim == name


@pytest.mark.parametrize(
    ("family", "model", "product"),
    [
        (0x19, 0x00, "Milan"),
        (0x19, 0x01, "Milan"),
        (0x19, 0x0F, "Milan"),
        (0x19, 0x10, "Genoa"),
        (0x19, 0x1F, "Genoa"),
        (0x19, 0x20, ""),
        (0x19, 0x9F, ""),
        (0x19, 0xA0, "Genoa"),
        (0x19, 0xAF, "Genoa"),
        (0x19, 0xB0, ""),
        (0x1A, 0x00, "Turin"),
        (0x1A, 0x11, "Turin"),
        (0x1A, 0x12, ""),
        (0x17, 0x01, ""),
        (0x00, 0x00, ""),
    ],
)
def test_product_by_cpuid(family, model, product):
    assert product_of(family, model) == product
    report = replace(SnpReport.from_bytes(raw_report(3)), cpuid_family=family, cpuid_model=model)
    assert report.product == product


def test_tcb_layouts():
    raw = bytes((10, 2, 0, 0, 0, 0, 23, 84))
    tcb = SnpTcb(bootloader=10, tee=2, snp=23, microcode=84)
    for product in ("Milan", "Genoa"):
        assert SnpTcb.from_bytes(raw, product) == tcb
    assert tcb.to_bytes() == raw
    assert "fmc" not in tcb.parts
    turin = SnpTcb(fmc=1, bootloader=10, tee=2, snp=23, microcode=84)
    assert turin.to_bytes() == bytes((1, 10, 2, 23, 0, 0, 0, 84))
    assert SnpTcb.from_bytes(turin.to_bytes(), "Turin") == turin
    assert dict(turin.parts) == {"fmc": 1, "bootloader": 10, "tee": 2, "snp": 23, "microcode": 84}


@pytest.mark.parametrize(
    ("product", "reserved"), [("Milan", (2, 3, 4, 5)), ("Genoa", (2, 3, 4, 5)), ("Turin", (4, 5, 6))]
)
def test_reserved_bytes_of_a_tcb(product, reserved):
    for offset in range(8):
        raw = altered(bytes(8), offset, b"\1")
        if offset in reserved:
            with pytest.raises(EvidenceError, match="reserved byte"):
                SnpTcb.from_bytes(raw, product)
        else:
            assert SnpTcb.from_bytes(raw, product).to_bytes() == raw


def test_tcb_that_is_none():
    with pytest.raises(EvidenceError, match="wrong length"):
        SnpTcb.from_bytes(bytes(7), "Milan")
    with pytest.raises(EvidenceError, match="unknown product"):
        tcb_layout("Naples")
    for value in (-1, 256, True):
        with pytest.raises(EvidenceError, match="snp"):
            SnpTcb(bootloader=0, tee=0, snp=value, microcode=0)


VALUES = {
    "2": b"\x16\x08Milan-B0",
    "3.1": b"\x02\x01\x03",
    "3.2": b"\x02\x01\x00",
    "3.3": b"\x02\x01\x08",
    "3.8": b"\x02\x02\x00\xd9",
    "4": b"c" * 64,
}


def test_extensions_of_a_vcek():
    vek = VekExtensions.from_values({**VALUES, "1": b"\2\1\0", "3.4": b"?"})
    assert vek.product == "Milan"
    assert dict(vek.tcb.parts) == {"bootloader": 3, "tee": 0, "snp": 8, "microcode": 0xD9}
    assert (vek.chip_id, vek.csp_id) == (b"c" * 64, "")


def test_extensions_of_a_vlek():
    values = {**VALUES, "2": b"\x16\x05Genoa", "5": b"\x16\x03CN="}
    del values["4"]
    vek = VekExtensions.from_values(values)
    assert (vek.product, vek.chip_id, vek.csp_id) == ("Genoa", b"", "CN=")


def test_extensions_of_turin():
    values = {**VALUES, "2": b"\x16\x05Turin", "3.9": b"\x02\x01\x07", "4": b"\x04\x40" + b"t" * 6}
    vek = VekExtensions.from_values(values)
    assert (vek.tcb.fmc, vek.chip_id) == (
        7,
        values["4"],
    )  # 8 B are taken as they are, whatever they look like
    del values["3.9"]
    with pytest.raises(EvidenceError, match=r"3704\.1\.3\.9"):
        VekExtensions.from_values(values)


def test_chip_in_an_octet_string():
    assert VekExtensions.from_values({**VALUES, "4": b"\x04\x40" + b"c" * 64}).chip_id == b"c" * 64


@pytest.mark.parametrize(
    ("arc", "value"),
    [
        ("2", b""),
        ("2", b"\x16\x00"),
        ("2", b"\x0c\x05Milan"),  # another type of text
        ("2", b"\x16\x06Milan"),
        ("2", b"\x16\x05Milan!"),
        ("2", b"\x16\x81\x05Milan"),
        ("2", b"\x16\x05Mil\xe4n"),
        ("2", b"\x16\x05Mil\x00n"),
        ("2", b"\x16\x06Naples"),
        ("3.1", b"\x02\x01\xff"),  # negative
        ("3.1", b"\x02\x02\x01\x00"),  # 256
        ("3.1", b"\x02\x03\x00\x00\x01"),
        ("3.8", b"\x04\x01\x01"),
        ("3.8", b""),
        ("4", b"c" * 63),
        ("4", b"c" * 65),
        ("4", b"\x04\x08" + b"c" * 8),
        ("4", b"\x16\x40" + b"c" * 64),
        ("5", b""),
        ("5", b"\x16\x01\x7f"),
    ],
)
def test_malformed_extension(arc, value):
    with pytest.raises(EvidenceError) as caught:
        VekExtensions.from_values({**VALUES, arc: value})
    assert caught.value.code == "evidence.snp-vek"
    assert caught.value.claim == f"extension 1.3.6.1.4.1.3704.1.{arc}"


@given(st.binary(max_size=1300))
def test_any_bytes_give_a_value_or_our_error(data):
    with contextlib.suppress(EvidenceError):
        assert SnpReport.from_bytes(data).to_bytes() == data
    for product in PRODUCTS:
        with contextlib.suppress(EvidenceError):
            assert SnpTcb.from_bytes(data, product).to_bytes() == data


@given(st.binary(min_size=8, max_size=8), st.sampled_from(PRODUCTS))
def test_any_tcb_gives_a_value_or_our_error(data, product):
    with contextlib.suppress(EvidenceError):
        assert SnpTcb.from_bytes(data, product).to_bytes() == data


@settings(max_examples=300)
@given(
    st.sampled_from([2, 3, 4, 5]),
    st.lists(st.tuples(st.integers(0, REPORT_SIZE - 1), st.integers(1, 255)), min_size=1, max_size=4),
)
def test_altered_reports_give_a_value_or_our_error(version, changes):
    data = bytearray(raw_report(version))
    for offset, difference in changes:
        data[offset] ^= difference
    with contextlib.suppress(EvidenceError):
        assert SnpReport.from_bytes(bytes(data)).to_bytes() == data


@given(st.dictionaries(st.sampled_from([*VALUES, "5", "3.9"]), st.binary(max_size=70)))
def test_any_extensions_give_a_value_or_our_error(values):
    with contextlib.suppress(EvidenceError):
        VekExtensions.from_values(values)
    with contextlib.suppress(EvidenceError):
        VekExtensions.from_values({**VALUES, **values})
