"""``cloister collateral``: the folder that it fills is the one that enclaves read."""

from __future__ import annotations

import json
import os
import shlex
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from cloister.cli.collateral import app
from cloister.core.verifier import TrustAnchors, dcap, snp, verify
from cloister.core.verifier.collateral_key import DcapKey
from cloister.enclave.attester.stapled import StapledCollateral
from cloister.errors import CloisterError, EvidenceError, Unavailable, UsageError
from cloister.host.collateral import CollateralFolder
from cloister.party.evidence import TEE_NAMES, open_evidence
from cloister.party.file_kinds import MAX_FILE
from cloister.sim import tees
from cloister.sim.authority import SimulatedAuthority
from cloister.sim.measurement import measure
from cloister.sim.snp import SimulatedAmd
from support.vendors import NOW, VendorServer


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "collateral"


def run(*arguments: object) -> str:
    """Standard output of a command; raises what it raises."""
    done = CliRunner().invoke(app, [str(each) for each in arguments])
    if isinstance(done.exception, CloisterError):
        raise done.exception
    assert done.exit_code == 0, done.output
    return done.stdout


def fetch(folder: Path, vendors: VendorServer, *arguments: object) -> dict[str, Any]:
    out = run("fetch", "--into", folder, "--pcs", vendors.url, "--kds", vendors.url, "--json", *arguments)
    answer = json.loads(out)
    assert answer["folder"] == str(folder)
    return answer  # type: ignore[no-any-return]


def command(error: CloisterError) -> list[str]:
    """What follows `cloister collateral` in the command that a hint names."""
    words = shlex.split(error.hint.split("`")[1])
    assert words[:2] == ["cloister", "collateral"]
    return words[2:]


def sgx_quote(intel: SimulatedAuthority) -> bytes:
    return intel.quote(
        report_data=bytes(64), mr_enclave=bytes(32), mr_signer=bytes(32), isv_prod_id=0, isv_svn=0, now=NOW
    )


def anchors(intel: SimulatedAuthority, amd: SimulatedAmd) -> TrustAnchors:
    return TrustAnchors.simulated(intel.root_der + amd.root_der)


@pytest.mark.parametrize("kind", ["sgx", "tdx"])
def test_what_a_quote_needs_is_what_the_enclave_then_finds(
    intel: SimulatedAuthority,
    amd: SimulatedAmd,
    vendors: VendorServer,
    folder: Path,
    tmp_path: Path,
    kind: str,
) -> None:
    raw = (
        sgx_quote(intel) if kind == "sgx" else intel.td_quote(report_data=bytes(64), mr_td=bytes(48), now=NOW)
    )
    (tmp_path / "quote.bin").write_bytes(raw)
    (entry,) = fetch(folder, vendors, "--quote", tmp_path / "quote.bin")["files"]
    assert entry["file"] == DcapKey.from_quote(raw).file
    assert (entry["mode"], entry["age"] < 5) == ("0644", True)
    evidence = StapledCollateral(folder).staple_quote(raw)
    assert dcap.verify(evidence, anchors=anchors(intel, amd), now=NOW).simulated


@pytest.mark.parametrize("by", ["report", "options"])
def test_what_a_report_needs_is_what_the_guest_then_finds(
    intel: SimulatedAuthority, amd: SimulatedAmd, vendors: VendorServer, folder: Path, tmp_path: Path, by: str
) -> None:
    raw = amd.report(report_data=bytes(64), measurement=bytes(48))
    (tmp_path / "report.bin").write_bytes(raw)
    options = ["--report", tmp_path / "report.bin"]
    if by == "options":
        options = ["--product", "Genoa", "--chip-id", amd.chip_id.hex(), "--tcb", amd.tcb.to_bytes().hex()]  # type: ignore[list-item]
    assert len(fetch(folder, vendors, *options)["files"]) == 2
    evidence = StapledCollateral(folder).staple_report(raw, b"")
    assert snp.verify(evidence, anchors=anchors(intel, amd), now=NOW).simulated


def test_the_command_that_an_enclave_names_gives_it_what_it_misses(
    intel: SimulatedAuthority, vendors: VendorServer, folder: Path
) -> None:
    stapled = StapledCollateral(folder)
    with pytest.raises(Unavailable) as caught:
        stapled.staple_quote(sgx_quote(intel))
    run(*command(caught.value), "--pcs", vendors.url, "--json")
    assert stapled.staple_quote(sgx_quote(intel)).tee == "sgx"


def test_the_command_that_an_snp_guest_names_gives_it_what_it_misses(
    amd: SimulatedAmd, vendors: VendorServer, folder: Path
) -> None:
    report, stapled = amd.report(report_data=bytes(64), measurement=bytes(48)), StapledCollateral(folder)
    with pytest.raises(Unavailable) as caught:
        stapled.staple_report(report, b"")
    run(*command(caught.value), "--kds", vendors.url, "--json")
    assert stapled.staple_report(report, b"").tee == "snp"


def test_the_product_alone_fetches_the_list_for_hosts_that_give_certificates(
    amd: SimulatedAmd, vendors: VendorServer, folder: Path
) -> None:
    (entry,) = fetch(folder, vendors, "--product", "Genoa")["files"]
    assert entry["file"].endswith(".crl")
    report = amd.report(report_data=bytes(64), measurement=bytes(48))
    assert StapledCollateral(folder).staple_report(report, amd.certificate_table()).tee == "snp"


def test_a_report_without_a_product_needs_the_option(
    amd: SimulatedAmd, vendors: VendorServer, folder: Path, tmp_path: Path
) -> None:
    (tmp_path / "old.bin").write_bytes(amd.report(report_data=bytes(64), measurement=bytes(48), version=2))
    with pytest.raises(UsageError) as caught:
        fetch(folder, vendors, "--report", tmp_path / "old.bin")
    assert caught.value.code == "collateral.product"
    fetch(folder, vendors, "--report", tmp_path / "old.bin", "--product", "Genoa")


def test_when_the_service_is_away_the_old_file_stays(
    intel: SimulatedAuthority, vendors: VendorServer, folder: Path
) -> None:
    options = ("--tee", "sgx", "--fmspc", "53494D534758", "--ca", "processor")
    (entry,) = fetch(folder, vendors, *options)["files"]
    path = folder / entry["file"]
    before = path.read_bytes()
    os.utime(path, (NOW - 3 * 3600, NOW - 3 * 3600))
    vendors.replaced["/sgx/certification/v4/pckcrl"] = 503
    with pytest.raises(Unavailable) as caught:
        fetch(folder, vendors, *options)
    assert f"Kept {path}, which is 3 h old" in caught.value.hint
    assert path.read_bytes() == before
    assert [each.name for each in path.parent.iterdir()] == [path.name]
    vendors.replaced.clear()
    assert fetch(folder, vendors, *options)["files"][0]["age"] < 5


def test_nothing_is_written_where_the_answer_does_not_fit(vendors: VendorServer, folder: Path) -> None:
    vendors.replaced["/sgx/certification/v4/tcb"] = lambda proper: (200, proper[1], b"{}")
    with pytest.raises(CloisterError):
        fetch(folder, vendors, "--fmspc", "53494D534758", "--ca", "processor")
    assert not folder.exists()


@pytest.mark.parametrize(
    "options",
    [
        (),
        ("--fmspc", "00", "--product", "Genoa"),
        ("--fmspc", "zz"),
        ("--product", "Genoa", "--chip-id", "00"),
        ("--product", "Genoa", "--tcb", "00" * 8),
        ("--product", "Genoa", "--chip-id", "xx", "--tcb", "00" * 8),
    ],
)
def test_options_that_name_no_one_thing_are_refused(
    vendors: VendorServer, folder: Path, options: tuple[str, ...]
) -> None:
    with pytest.raises(UsageError) as caught:
        fetch(folder, vendors, *options)
    assert caught.value.code == "collateral.what"
    assert not vendors.asked


@pytest.mark.parametrize(
    "options",
    [("--fmspc", "00"), ("--fmspc", "00" * 6, "--tee", "snp"), ("--fmspc", "00" * 6, "--ca", "root")],
)
def test_values_of_another_form_are_refused(
    vendors: VendorServer, folder: Path, options: tuple[str, ...]
) -> None:
    with pytest.raises(EvidenceError):
        fetch(folder, vendors, *options)
    assert not vendors.asked


@pytest.mark.parametrize("option", ["--quote", "--report"])
def test_files_that_are_no_evidence_are_refused(
    vendors: VendorServer, folder: Path, tmp_path: Path, option: str
) -> None:
    (tmp_path / "large").write_bytes(bytes(MAX_FILE + 1))
    (tmp_path / "page").write_bytes(b"<html>")
    (tmp_path / "cut").write_bytes(b"\3\0\2\0\0\0\0\0\0\0")
    for name, code, claim in (
        ("missing", "file.read", option[2:]),
        ("large", "usage", option[2:]),
        ("page", "evidence.format", "evidence"),
        ("cut", "evidence.format", "quote"),
    ):
        with pytest.raises(UsageError) as caught:
            fetch(folder, vendors, option, tmp_path / name)
        assert (caught.value.code, caught.value.claim) == (code, claim)
    assert not vendors.asked


@pytest.mark.parametrize(
    ("option", "tee", "hint"),
    [
        ("--quote", "snp", "--report"),
        ("--report", "sgx", "--quote"),
        ("--report", "tdx", "--quote"),
        ("--quote", "nitro", "nothing is to be fetched"),
        ("--report", "nitro", "nothing is to be fetched"),
    ],
)
def test_another_kind_of_evidence_is_refused(
    intel: SimulatedAuthority,
    vendors: VendorServer,
    folder: Path,
    tmp_path: Path,
    option: str,
    tee: str,
    hint: str,
) -> None:
    raw = tees.evidence(intel, measure("worker"), tee, bytes(64), NOW).quote
    (tmp_path / "evidence").write_bytes(raw)
    with pytest.raises(UsageError) as caught:
        fetch(folder, vendors, option, tmp_path / "evidence")
    assert (caught.value.code, caught.value.claim) == ("collateral.what", option)
    assert caught.value.actual == f"{tmp_path / 'evidence'}: {TEE_NAMES[tee]}"
    assert hint in caught.value.hint
    assert not vendors.asked


@pytest.mark.parametrize("kind", ["quote", "report"])
def test_the_command_that_a_verifier_names_gives_it_what_it_misses(
    intel: SimulatedAuthority, amd: SimulatedAmd, vendors: VendorServer, tmp_path: Path, kind: str
) -> None:
    raw = sgx_quote(intel) if kind == "quote" else amd.report(report_data=bytes(64), measurement=bytes(48))
    file, folder = tmp_path / "in hex", tmp_path / "the collateral"
    file.write_text(raw.hex())
    folder.mkdir()
    with pytest.raises(UsageError) as caught:
        open_evidence(file, [folder])
    run(*command(caught.value), "--pcs", vendors.url, "--kds", vendors.url, "--json")
    evidence = open_evidence(file, [folder])
    assert verify(evidence, anchors=anchors(intel, amd), now=NOW).simulated
    if kind == "report":
        next((folder / "snp").glob("*.crl")).unlink()
        with pytest.raises(UsageError) as caught:
            open_evidence(file, [folder])
        run(*command(caught.value), "--kds", vendors.url, "--json")
        assert open_evidence(file, [folder]) == evidence


def test_people_get_a_table(vendors: VendorServer, folder: Path) -> None:
    options = ("--fmspc", "53494D534758", "--ca", "processor", "--pcs", vendors.url, "--into", folder)
    assert "0644" in run("fetch", *options)
    listed = run("list", "--into", folder)
    assert "processor.json" in listed.replace("\n", "")


class TestFolder:
    def test_listing_skips_drafts_and_says_ages(self, folder: Path) -> None:
        store = CollateralFolder(folder)
        assert list(store.entries()) == []
        for name in ("tdx/b.json", "sgx/a.json", "snp/c.crl"):
            store.write(name, b"content")
        (folder / "sgx" / ".a.json.77").write_bytes(b"draft")
        (folder / "sgx" / "folder").mkdir()
        os.utime(folder / "snp/c.crl", (NOW - 2 * 86400, NOW - 2 * 86400))
        entries = list(store.entries())
        assert [each.name for each in entries] == ["sgx/a.json", "tdx/b.json", "snp/c.crl"]
        assert entries[2].age >= 2 * 86400
        assert store.find("sgx/none") is None
        listed = json.loads(run("list", "--into", folder, "--json"))
        assert [each["file"] for each in listed["files"]] == [each.name for each in entries]
        assert "2 d" in run("list", "--into", folder)

    def test_modes_do_not_depend_on_the_umask(self, folder: Path) -> None:
        before = os.umask(0o077)
        try:
            entry = CollateralFolder(folder).write("sgx/a.json", b"content")
        finally:
            os.umask(before)
        assert entry.mode == 0o644

    def test_a_reader_never_sees_a_part(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        store = CollateralFolder(folder)
        store.write("sgx/a.json", b"old")

        def fail(_: int) -> None:
            raise OSError(28, "No space left on device")

        monkeypatch.setattr(os, "fsync", fail)
        with pytest.raises(UsageError) as caught:
            store.write("sgx/a.json", b"new")
        assert caught.value.code == "collateral.folder"
        assert [each.name for each in (folder / "sgx").iterdir()] == ["a.json"]
        assert (folder / "sgx/a.json").read_bytes() == b"old"

    def test_a_folder_that_can_not_be_made_is_an_error(self, tmp_path: Path) -> None:
        (tmp_path / "file").write_bytes(b"")
        with pytest.raises(UsageError) as caught:
            CollateralFolder(tmp_path / "file").write("sgx/a.json", b"")
        assert caught.value.code == "collateral.folder"
