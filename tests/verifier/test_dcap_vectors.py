"""Evidence that Intel's platforms signed: the verdict on each, and that of an independent verifier."""

from __future__ import annotations

import json
from pathlib import Path

import dcap_qvl
import pytest
from dcap_mutations import TRAILER, load, ours, theirs

from cloister.core.evidence import Collateral, Evidence
from cloister.core.evidence.dcap import Quote
from cloister.core.evidence.tdx import SIZE_10, TdReport
from cloister.core.verifier import TrustAnchors, dcap
from cloister.errors import EvidenceRefused

ACCEPTED = [
    "sgx-v3-config-swhardening",
    "sgx-v3-debug-outofdate",
    "sgx-v3-swhardening-platformca",
    "tdx-v4-azure-vtpm-septve-off-outofdate",
    "tdx-v4-debug",
    "tdx-v4-gce-outofdate-at-2026-06",
    "tdx-v4-gce-uptodate-at-2025-10",
    "tdx-v4-outofdate-advisories",
    "tdx-v4-outofdate-no-advisory",
    "tdx-v4-septve-off",
    "tdx-v4-uptodate",
    "tdx-v4-uptodate-gcp-cos113",
    "tdx-v5-moduleupdate-uptodate-at-2025-06",
    "tdx-v5-service-td-uptodate",
    "tdx-v5-uptodate",
]
REFUSED = {
    "neg-pck-not-yet-valid": (
        "evidence.not-yet-valid",
        "validity of PCK chain: Intel SGX PCK Certificate",
    ),
    "tdx-v4-tcb-not-supported": ("evidence.tcb-level", "TCB level"),
    "tdx-v4-tcb-not-supported-2": ("evidence.tcb-level", "TCB level"),
    "tdx-v5-tcb-not-supported": ("evidence.tcb-level", "TCB level"),
}
# What the second opinion refuses by its own policy, and where our result shows the same to an appraisal.
FLAGS = {
    "DEBUG": "Debug mode is enabled",
    "SEPT_VE_DISABLE=0": "SEPT_VE_DISABLE is not enabled",
    "MRSERVICETD!=0": "Invalid MR service TD",
}
PARTS = {"sgx": "platform", "tdx": "TD", "module": "TDX module", "qe": "quoting enclave"}
SEPT_VE_DISABLE = 28  # bit of TDATTRIBUTES


def expected(folder: Path) -> dict:
    return json.loads((folder / "expected.json").read_text())


def found_parts(result) -> dict[str, str]:
    """The status of each part, as step 12 tells it."""
    detail = next(step.detail for step in result.steps if step.name == "12 TCB level")
    return dict(part.rsplit(" ", 1) for part in detail.split(": ")[0].split(", "))


def found_flags(result) -> list[str]:
    flags = ["DEBUG"] if result.debug else []
    attributes = int.from_bytes(result.measurements.get("td_attributes", b"\xff" * 8), "little")
    if not attributes >> SEPT_VE_DISABLE & 1:
        flags.append("SEPT_VE_DISABLE=0")
    if any(result.measurements.get("mr_service_td", b"")):
        flags.append("MRSERVICETD!=0")
    return flags


def test_every_folder_has_a_verdict_here(vectors):
    names = {folder.name for folder in vectors.iterdir() if (folder / "expected.json").exists()}
    assert names == {*ACCEPTED, *REFUSED}


@pytest.mark.parametrize("name", ACCEPTED)
def test_verdict(name, vectors):
    case, says = load(vectors / name), expected(vectors / name)
    result = ours(case, TrustAnchors.vendor())
    assert result.tcb_status == says["intel_qvl_rules_status"]
    parts = {PARTS[part]: status for part, status in says["parts"].items() if status}
    assert found_parts(result) == parts
    assert found_flags(result) == says["flags"]
    assert (result.tee, result.simulated) == (case.tee, False)
    if says["dcap_qvl_0_7_0"][0] != "ERR":
        assert [result.tcb_status, list(result.advisories)] == says["dcap_qvl_0_7_0"]
    assert result.collateral_issued <= case.now <= result.not_after


@pytest.mark.parametrize("name", REFUSED)
def test_refusal(name, vectors):
    says = expected(vectors / name)
    assert says["intel_qvl_rules_status"] is None
    error = ours(load(vectors / name), TrustAnchors.vendor())
    assert isinstance(error, EvidenceRefused)
    assert (error.code, error.claim) == REFUSED[name]


def test_text_behind_a_quote_is_pointed_out(vectors):
    """Google appended text to that quote. Nobody signed it; what is refused is the TCB, as without it."""
    folder = vectors / "tdx-v4-tcb-not-supported"
    quote = (folder / "quote.bin").read_bytes()
    assert quote.endswith(TRAILER)
    evidence = Evidence(
        tee="tdx",
        quote=quote,
        collateral=Collateral.from_json((folder / "collateral.json").read_text()),
    )
    steps = []
    with pytest.raises(EvidenceRefused) as caught:
        dcap.verify(evidence, anchors=TrustAnchors.vendor(), now=expected(folder)["verify_at"], steps=steps)
    assert (caught.value.code, caught.value.claim) == REFUSED[folder.name]
    noted = [step for step in steps if step.outcome == "note"]
    assert [step.detail for step in noted] == [f"{len(TRAILER)} B behind the quote, which nobody signed"]


@pytest.mark.parametrize("name", [*ACCEPTED, *REFUSED])
def test_second_opinion(name, vectors):
    case, flags = load(vectors / name), expected(vectors / name)["flags"]
    mine, other = ours(case, TrustAnchors.vendor()), theirs(case)
    if name in REFUSED:
        assert isinstance(other, str)
    elif flags:
        assert other == f"Verification failed: {FLAGS[flags[0]]}"
    else:
        assert isinstance(other, dcap_qvl.VerifiedReport)
        assert (mine.tcb_status, list(mine.advisories)) == (other.status, sorted(other.advisory_ids))
        assert mine.platform.ppid == other.ppid


@pytest.mark.parametrize("name", [*ACCEPTED, *REFUSED])
def test_quote_round_trips(name, vectors):
    data = load(vectors / name).quote
    quote = Quote.from_bytes(data)
    assert quote.to_bytes() == data
    assert isinstance(quote.body, TdReport) == (quote.header.tee_type == 0x81)
    assert quote.header.version == {SIZE_10: 4, 384: 3}.get(len(quote.body.to_bytes()), 5)


@pytest.mark.parametrize("name", ACCEPTED)
def test_evidence_expires(name, vectors):
    case = load(vectors / name)
    evidence = Evidence(tee=case.tee, quote=case.quote, collateral=Collateral(**case.collateral))
    last = dcap.verify(evidence, anchors=TrustAnchors.vendor(), now=case.now).not_after
    assert dcap.verify(evidence, anchors=TrustAnchors.vendor(), now=last).not_after == last
    with pytest.raises(EvidenceRefused) as caught:
        dcap.verify(evidence, anchors=TrustAnchors.vendor(), now=last + 1)
    assert caught.value.code == "evidence.expired"


@pytest.mark.parametrize("name", ACCEPTED)
def test_vendor_evidence_is_refused_under_a_simulated_root(name, vectors, anchors):
    error = ours(load(vectors / name), anchors)
    assert isinstance(error, EvidenceRefused)
    assert (error.code, error.claim) == ("evidence.root", "root certificate")


@pytest.mark.parametrize(("tee", "quote"), [("sgx", "tdx-v4-uptodate"), ("tdx", "sgx-v3-config-swhardening")])
def test_evidence_that_names_another_tee(tee, quote, vectors):
    case = load(vectors / quote)
    evidence = Evidence(tee=tee, quote=case.quote, collateral=Collateral(**case.collateral))
    with pytest.raises(EvidenceRefused) as caught:
        dcap.verify(evidence, anchors=TrustAnchors.vendor(), now=case.now)
    assert (caught.value.code, caught.value.claim) == ("evidence.tee", "TEE of the quote")
