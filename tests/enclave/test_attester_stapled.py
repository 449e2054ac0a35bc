"""Collateral from the host's folder: found, missing, changed, oversized, or no file at all."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from cloister.core.evidence.bundle import MAX_COLLATERAL_JSON, AmdCollateral, Collateral
from cloister.core.evidence.snp_table import CertificateTable
from cloister.core.verifier.certificates import AMD, load_chain
from cloister.core.verifier.collateral_key import DcapKey, SnpKey, crl_file
from cloister.enclave.attester.stapled import StapledCollateral
from cloister.errors import EvidenceError, FormatError, Unavailable, UsageError
from cloister.sim.snp import SnpFlaws
from support.realm import NOW
from support.tees import (
    amd,
    amd_collateral,
    intel,
    intel_collateral,
    sgx_quote,
    shelve,
    snp_report,
    td_quote,
    told,
    verified,
    write,
)

DCAP_FILE = DcapKey.from_quote(sgx_quote()).file


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return shelve(tmp_path / "collateral")


def test_each_kind_of_evidence_finds_its_own(folder: Path) -> None:
    stapled = StapledCollateral(folder)
    for evidence in (
        stapled.staple_quote(sgx_quote()),
        stapled.staple_quote(td_quote()[0]),
        stapled.staple_report(snp_report(), b""),
    ):
        assert verified(evidence).simulated


def test_a_file_that_changed_counts_from_the_next_evidence_on(folder: Path) -> None:
    stapled = StapledCollateral(folder)
    before = stapled.staple_quote(sgx_quote()).collateral
    later = intel().collateral(NOW + 86400)
    write(folder / DCAP_FILE, later.to_json().encode())
    assert stapled.staple_quote(sgx_quote()).collateral == later != before


def test_missing_collateral_names_the_command_that_fetches_it(folder: Path) -> None:
    (folder / DCAP_FILE).unlink()
    with pytest.raises(Unavailable) as caught:
        StapledCollateral(folder).staple_quote(sgx_quote())
    assert told(caught.value) == ("attester.collateral", DCAP_FILE)
    key = DcapKey.from_quote(sgx_quote())
    command = f"cloister collateral fetch --tee sgx --fmspc {key.fmspc.hex()} --ca processor --into {folder}"
    assert command in caught.value.hint


@pytest.mark.parametrize("lacking", ["certificates", "crl"])
def test_missing_snp_collateral_names_the_command_too(tmp_path: Path, lacking: str) -> None:
    folder = shelve(tmp_path, **{lacking: False})
    with pytest.raises(Unavailable) as caught:
        StapledCollateral(folder).staple_report(snp_report(), b"")
    assert caught.value.code == "attester.collateral"
    expected = f"--product Genoa --chip-id {amd().chip_id.hex()} --tcb {amd().tcb.to_bytes().hex()}"
    assert expected in caught.value.hint


def test_without_a_folder_its_variable_is_named() -> None:
    with pytest.raises(UsageError) as caught:
        StapledCollateral(None).staple_quote(sgx_quote())
    assert told(caught.value) == ("attester.collateral", "CLOISTER_COLLATERAL")
    assert "cloister collateral fetch" in caught.value.hint


def test_certificates_of_the_table_come_before_those_of_the_folder(tmp_path: Path) -> None:
    folder = shelve(tmp_path, certificates=False)
    evidence = StapledCollateral(folder).staple_report(snp_report(), amd().certificate_table())
    assert evidence.collateral == amd_collateral()


def test_a_table_without_the_signers_certificate_is_passed_over(folder: Path) -> None:
    chain = load_chain(amd_collateral().certificates, AMD)
    table = CertificateTable.pack({"ASK": chain[1].der, "ARK": chain[2].der}).to_bytes()
    evidence = StapledCollateral(folder).staple_report(snp_report(), table)
    assert evidence.collateral == amd_collateral()


def test_a_table_with_a_revocation_list_needs_no_file(tmp_path: Path) -> None:
    chain, crl = load_chain(amd_collateral().certificates, AMD), amd_collateral().crl
    parts = {"VCEK": chain[0].der, "ASK": chain[1].der, "ARK": chain[2].der, "CRL": crl}
    evidence = StapledCollateral(tmp_path).staple_report(
        snp_report(), CertificateTable.pack(parts).to_bytes()
    )
    assert evidence.collateral == amd_collateral()


@pytest.mark.parametrize("table", ["none", "vcek"])
def test_a_vlek_comes_from_the_table_only(folder: Path, table: str) -> None:
    """The folder's certificates are the VCEK's, and no command can fetch others."""
    report = amd().report(report_data=bytes(64), measurement=b"m" * 48, vlek=True)
    given = amd().certificate_table() if table == "vcek" else b""
    for stapled in (StapledCollateral(folder), StapledCollateral(None)):
        with pytest.raises(Unavailable) as caught:
            stapled.staple_report(report, given)
        assert told(caught.value) == ("attester.collateral", "VLEK")
        assert "must put the VLEK into the certificate table" in caught.value.hint
        assert "cloister" not in caught.value.hint


def test_a_vlek_of_the_table_is_stapled(folder: Path) -> None:
    report = amd().report(report_data=bytes(64), measurement=b"m" * 48, vlek=True)
    chain = load_chain(amd().collateral(NOW, flaws=SnpFlaws(vlek=True)).certificates, AMD)
    parts = zip(("VLEK", "ASK", "ARK"), (each.der for each in chain), strict=True)
    table = CertificateTable.pack(dict(parts)).to_bytes()
    assert verified(StapledCollateral(folder).staple_report(report, table)).platform.signer == "VLEK"


@pytest.mark.parametrize("table", [b"\x01", b"\xff" * 100])
def test_a_malformed_table_is_refused(folder: Path, table: bytes) -> None:
    with pytest.raises(EvidenceError):
        StapledCollateral(folder).staple_report(snp_report(), table)


@pytest.mark.parametrize("size", [0, MAX_COLLATERAL_JSON + 1])
def test_a_file_of_an_impossible_length_is_refused(folder: Path, size: int) -> None:
    with (folder / DCAP_FILE).open("wb") as file:
        file.truncate(size)
    with pytest.raises(FormatError) as caught:
        StapledCollateral(folder).staple_quote(sgx_quote())
    assert told(caught.value) == ("attester.collateral", DCAP_FILE)


@pytest.mark.parametrize("content", [b"\xff", b"{}", b"[", b'{"tcb_info": 1}'])
def test_a_damaged_file_is_refused(folder: Path, content: bytes) -> None:
    write(folder / DCAP_FILE, content)
    with pytest.raises(FormatError):
        StapledCollateral(folder).staple_quote(sgx_quote())


def test_a_pipe_never_blocks_and_a_link_is_not_followed(folder: Path) -> None:
    path = folder / DCAP_FILE
    path.rename(folder / "elsewhere")
    path.symlink_to(folder / "elsewhere")
    with pytest.raises(Unavailable) as caught:
        StapledCollateral(folder).staple_quote(sgx_quote())
    assert caught.value.actual == "ELOOP"
    path.unlink()
    os.mkfifo(path)
    with pytest.raises(FormatError):
        StapledCollateral(folder).staple_quote(sgx_quote())
    path.unlink()
    path.mkdir()
    with pytest.raises(Unavailable):
        StapledCollateral(folder).staple_quote(sgx_quote())


def test_damaged_certificates_are_refused(folder: Path) -> None:
    key = SnpKey(chip_id=amd().chip_id, tcb=amd().tcb.to_bytes())
    write(folder / key.file, b"no PEM")
    with pytest.raises(EvidenceError):
        StapledCollateral(folder).staple_report(snp_report(), b"")


def test_the_crl_is_that_of_the_chains_own_root(folder: Path) -> None:
    ark = load_chain(amd_collateral().certificates, AMD)[-1]
    kept = (folder / crl_file(ark.der)).read_bytes()
    collateral = StapledCollateral(folder).staple_report(snp_report(), b"").collateral
    assert type(collateral) is AmdCollateral
    assert collateral.crl == kept


def test_a_file_that_is_no_crl_is_not_published(folder: Path) -> None:
    ark = load_chain(amd_collateral().certificates, AMD)[-1]
    write(folder / crl_file(ark.der), b"some other file of the host's")
    with pytest.raises(EvidenceError):
        StapledCollateral(folder).staple_report(snp_report(), b"")


def test_what_is_written_is_what_is_read(folder: Path) -> None:
    assert Collateral.from_json((folder / DCAP_FILE).read_text()) == intel_collateral("sgx")
