"""Certificate tables of SNP hosts: exact round trips, lies about offsets, and the way to collateral."""

from __future__ import annotations

import base64
import contextlib
from pathlib import Path
from uuid import UUID

import cbor2
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cloister.core.evidence.snp_table import (
    GUIDS,
    MAX_ENTRIES,
    MAX_TABLE,
    CertificateTable,
    TableEntry,
    make_collateral,
)
from cloister.core.verifier.certificates import read_pem
from cloister.errors import EvidenceError

VECTOR = (
    Path(__file__).resolve().parents[3] / "shared" / "vectors" / "snp" / "veraison" / "sevsnp-tsm-report.cbor"
)
DER = {name: b"\x30" + name.encode() for name in GUIDS}


def entry(guid: UUID | bytes, offset: int, size: int) -> bytes:
    raw = guid.bytes if isinstance(guid, UUID) else guid
    return raw + offset.to_bytes(4, "little") + size.to_bytes(4, "little")


def error_of(data: bytes) -> EvidenceError:
    with pytest.raises(EvidenceError) as caught:
        CertificateTable.from_bytes(data)
    assert caught.value.claim.startswith("certificate table")
    return caught.value


def pem(label: str, der: bytes) -> bytes:
    return f"-----BEGIN {label}-----\n{base64.b64encode(der).decode()}\n-----END {label}-----\n".encode()


def test_round_trip():
    table = CertificateTable.pack(DER)
    raw = table.to_bytes()
    assert CertificateTable.from_bytes(raw) == table
    assert raw[:16] == bytes.fromhex("c0b406a4a803495297433fb6014cd0ae")  # as the GUID is written
    for name, der in DER.items():
        assert table.find(name) == der


def test_gaps_order_and_padding_are_kept():
    head = (
        entry(GUIDS["VCEK"], 200, 4)
        + entry(GUIDS["ARK"], 100, 3)
        + entry(bytes(15) + b"\1", 110, 1)
        + bytes(24)
    )
    raw = bytearray(head.ljust(4096, b"\0"))
    raw[100:103], raw[110:111], raw[200:204] = b"ark", b"?", b"vcek"
    table = CertificateTable.from_bytes(bytes(raw))
    assert table.to_bytes() == raw
    assert (table.find("ARK"), table.find("VCEK"), table.find("VLEK")) == (b"ark", b"vcek", b"")


def test_table_without_certificates():
    table = CertificateTable.from_bytes(bytes(24))
    assert table == CertificateTable.pack({})
    with pytest.raises(EvidenceError, match="VCEK or VLEK"):
        table.to_collateral("VCEK")


def test_real_table():
    """Its certificates are PEM, where others have DER."""
    if not VECTOR.is_file():
        pytest.skip("real SEV-SNP evidence (../shared/vectors/snp) is not on this machine")
    raw = cbor2.loads(VECTOR.read_bytes())["auxblob"]
    table = CertificateTable.from_bytes(raw)
    assert table.to_bytes() == raw
    collateral = table.to_collateral("VCEK")
    assert collateral.crl == b""
    found = read_pem(collateral.certificates, most=3)
    assert found == [read_pem(table.find(name), most=1)[0] for name in ("VCEK", "ASK", "ARK")]


@pytest.mark.parametrize("signer", ["VCEK", "VLEK"])
def test_collateral_of_the_signer(signer):
    collateral = CertificateTable.pack(DER).to_collateral(signer)
    assert read_pem(collateral.certificates, most=3) == [DER[signer], DER["ASK"], DER["ARK"]]
    assert collateral.crl == DER["CRL"]


def test_parts_in_pem():
    parts = {"vek": DER["VLEK"], "ask": DER["ASK"], "ark": DER["ARK"]}
    wrapped = {name: pem("CERTIFICATE", der) for name, der in parts.items()}
    expected = make_collateral(**parts, crl=DER["CRL"])
    assert make_collateral(**wrapped, crl=pem("X509 CRL", DER["CRL"])) == expected
    assert make_collateral(**wrapped).crl == b""


@pytest.mark.parametrize(
    "part",
    [
        b"",
        b"no certificate",
        pem("CERTIFICATE", b"\x30abc")[:-10],
        pem("CERTIFICATE", b"\x30abc").replace(b"-----END CERT", b"-----END X509"),
        pem("CERTIFICATE", b"\x30abc") * 2,
        pem("PRIVATE KEY", b"\x30abc"),
        b"-----BEGIN CERTIFICATE-----\nA\n-----END CERTIFICATE-----\n",
    ],
)
def test_part_that_is_neither_der_nor_pem(part):
    parts = {"vek": DER["VCEK"], "ask": DER["ASK"], "ark": DER["ARK"]}
    for name, claim in (("vek", "VCEK or VLEK"), ("ask", "ASK"), ("ark", "ARK")):
        with pytest.raises(EvidenceError) as caught:
            make_collateral(**{**parts, name: part})
        assert caught.value.claim == f"certificate table: {claim}"
    if part:
        with pytest.raises(EvidenceError, match="CRL"):
            make_collateral(**parts, crl=part)


@pytest.mark.parametrize("size", [0, 23, 24, 47])
def test_table_without_an_end(size):
    raw = CertificateTable.pack({"ARK": b"x" * 100}).to_bytes()
    assert error_of(raw[:24].ljust(48, b"\1")[:size]).expected


def test_table_that_ends_within_its_entries():
    raw = b"".join(entry(bytes([n] * 16), 0, 0) for n in range(1, 3))
    assert error_of(raw).claim.endswith("entries")


def test_too_many_entries():
    names = [bytes([n] * 16) for n in range(1, MAX_ENTRIES + 2)]
    start = 24 * (len(names) + 1)
    head = b"".join(entry(name, start + n, 1) for n, name in enumerate(names))
    assert error_of(head + bytes(24) + b"x" * len(names)).expected == f"at most {MAX_ENTRIES}"
    with pytest.raises(EvidenceError, match="entries"):
        CertificateTable(
            entries=tuple(
                TableEntry(guid=UUID(bytes=name), offset=start + n, data=b"x") for n, name in enumerate(names)
            ),
            size=1000,
        )


def test_too_long():
    assert error_of(bytes(MAX_TABLE + 1)).claim.endswith("size")
    assert CertificateTable.from_bytes(bytes(MAX_TABLE)).size == MAX_TABLE
    with pytest.raises(EvidenceError, match="size"):
        CertificateTable.pack({"ARK": bytes(MAX_TABLE)})


@pytest.mark.parametrize(
    ("offset", "size"),
    [
        (72, 0),  # empty
        (72, 9),  # beyond the end
        (81, 1),
        (0xFFFFFFFF, 0xFFFFFFFF),
        (0, 8),  # in the entries
        (71, 2),
        (72, 5),  # over the other one
        (76, 4),
        (74, 4),
    ],
)
def test_entry_that_lies(offset, size):
    raw = entry(GUIDS["ARK"], 76, 4) + entry(GUIDS["ASK"], offset, size) + bytes(24) + b"x" * 8
    assert error_of(raw).claim == "certificate table: entries"


def test_entry_that_comes_twice():
    raw = entry(GUIDS["ARK"], 72, 4) + entry(GUIDS["ARK"], 76, 4) + bytes(24) + b"x" * 8
    assert error_of(raw).actual == "a kind occurs twice"


def test_bytes_that_belong_to_no_entry():
    raw = CertificateTable.pack(DER).to_bytes()
    assert error_of(raw + b"\0\1").claim.endswith("no entry")


@given(st.binary(max_size=600))
def test_any_bytes_give_a_value_or_our_error(data):
    with contextlib.suppress(EvidenceError):
        assert CertificateTable.from_bytes(data).to_bytes() == data


@settings(max_examples=300)
@given(st.lists(st.tuples(st.integers(0, 190), st.integers(1, 255)), min_size=1, max_size=4))
def test_altered_tables_give_a_value_or_our_error(changes):
    data = bytearray(CertificateTable.pack(DER).to_bytes().ljust(200, b"\0"))
    for offset, difference in changes:
        data[offset] ^= difference
    with contextlib.suppress(EvidenceError):
        table = CertificateTable.from_bytes(bytes(data))
        assert table.to_bytes() == data
        table.to_collateral("VCEK")
