"""Readers of the real SEV-SNP evidence in ``../shared/vectors/snp``; its formats vary by source."""

from __future__ import annotations

import base64
import json
import re
from dataclasses import dataclass
from pathlib import Path

import cbor2

from cloister.core.evidence import Evidence
from cloister.core.evidence.bundle import AmdCollateral
from cloister.core.evidence.snp_table import CertificateTable, make_collateral
from cloister.core.verifier.certificates import read_pem

FOLDER = Path(__file__).resolve().parents[3] / "shared" / "vectors" / "snp"
# 2025-06-15T12:00:00Z lies in the validity of every real certificate and of both revocation lists.
NOW = 1_749_988_800

_HCL_HEADER = 32  # bytes before the report that Azure's paravisor keeps in the vTPM


@dataclass(frozen=True, kw_only=True)
class Authority:
    """AMD's ASK (or ASVK) and ARK of one product, in DER."""

    ask: bytes
    ark: bytes


def read(name: str) -> bytes:
    return (FOLDER / name).read_bytes()


def authority(name: str) -> Authority:
    """From a PEM file with the ASK first: ``authority("milan")``, ``authority("milan_vlek")``."""
    ask, ark = read_pem(read(f"_amd-roots/ask_ark_{name}.pem"), most=2)
    return Authority(ask=ask, ark=ark)


def crl(product: str) -> bytes:
    return read(f"openpcc/test_amd_{product}_crl.der")


def from_archive(name: str, part: str) -> bytes:
    """One PEM block of a text archive whose members begin with ``-- part.pem --``; decoded."""
    member = read(name).split(f"-- {part}.pem --".encode())[1]
    match = re.search(rb"-----BEGIN ([A-Z0-9 ]+)-----(.*?)-----END \1-----", member, re.DOTALL)
    return base64.b64decode(b"".join(match[2].split()))


def bundle(report: bytes, vek: bytes, by: str, *, crl: bytes = b"") -> Evidence:
    known = authority(by)
    return Evidence(
        tee="snp",
        quote=report,
        collateral=make_collateral(vek=vek, ask=known.ask, ark=known.ark, crl=crl),
    )


def trustee() -> Evidence:
    vcek = read("trustee-snp/test-vcek.der")
    return bundle(read("trustee-snp/test-report.bin"), vcek, "milan", crl=crl("milan"))


def trustee_vlek() -> Evidence:
    vlek = read("trustee-snp/test-vlek.der")
    return bundle(read("trustee-snp/test-vlek-report.bin"), vlek, "milan_vlek", crl=crl("milan"))


def google() -> Evidence:
    vcek = read("google-go-sev-guest/vcek.testcer")  # DER, whatever its name says
    ask, ark = read_pem(read("google-go-sev-guest/milan.testcer"), most=2)
    collateral = make_collateral(vek=vcek, ask=ask, ark=ark, crl=crl("milan"))
    return Evidence(tee="snp", quote=read("google-go-sev-guest/attestation.bin"), collateral=collateral)


def azure_container() -> Evidence:
    """Azure's own JSON: report and PEM chain in base64."""
    data = json.loads(read("azure-aci-kms/snp.json"))
    return Evidence(
        tee="snp",
        quote=base64.b64decode(data["evidence"]),
        collateral=AmdCollateral(certificates=base64.b64decode(data["endorsements"]), crl=crl("milan")),
    )


def azure_virtual_machine() -> Evidence:
    """Azure's HCL report of a Genoa machine: the SNP report after a header."""
    hcl = from_archive("openpcc/azure_sevsnp_report.txt", "test_azure_sevsnp_report")
    vcek = from_archive("openpcc/sev_certificates.txt", "test_vcek")
    return bundle(hcl[_HCL_HEADER : _HCL_HEADER + 1184], vcek, "genoa", crl=crl("genoa"))


def veraison() -> Evidence:
    """What configfs-tsm gave: report and certificate table, as CBOR."""
    data = cbor2.loads(read("veraison/sevsnp-tsm-report.cbor"))
    table = CertificateTable.from_bytes(data["auxblob"])
    return Evidence(tee="snp", quote=data["outblob"], collateral=table.to_collateral("VCEK"))


GOOD = (trustee, trustee_vlek, google, azure_container, azure_virtual_machine, veraison)
