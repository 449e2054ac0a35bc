"""Verification of SGX quotes that succeeds, and agreement with an independent verifier."""

from __future__ import annotations

import json

import dcap_qvl
import pytest

from cloister.core.evidence import Evidence
from cloister.core.verifier import TrustAnchors, verify
from cloister.core.verifier.result import CollateralMark, CollateralMemory
from cloister.errors import EvidenceRefused
from cloister.sim.authority import FMSPC, Flaws


def second_opinion(evidence: Evidence, now: int, root: bytes | None = None):
    collateral = dcap_qvl.QuoteCollateralV3.from_json(evidence.collateral.to_json())
    if root is None:
        return dcap_qvl.verify(evidence.quote, collateral, now)
    return dcap_qvl.verify_with_root_ca(evidence.quote, collateral, root, now)


def test_simulated_evidence(make_evidence, anchors, now):
    result = verify(make_evidence(), anchors=anchors, now=now)
    assert result.simulated
    assert not result.debug
    assert result.tcb_status == "UpToDate"
    assert result.advisories == ()
    assert result.measurements["mr_enclave"] == b"e" * 32
    assert result.measurement == b"e" * 32
    assert result.measurements["mr_signer"] == b"s" * 32
    assert (result.measurements["isv_prod_id"], result.measurements["isv_svn"]) == (7, 3)
    assert result.report_data == bytes(range(64))
    assert result.platform.fmspc == FMSPC
    assert result.anchors_digest == anchors.digest
    assert [int(step.name.split()[0]) for step in result.steps] == [*range(1, 11), 12]  # 11 and 13 are TDX's


def test_simulated_evidence_gets_the_same_second_opinion(make_evidence, authority, now):
    evidence = make_evidence(flaws=Flaws(tcb_status="ConfigurationNeeded", advisories=("INTEL-SA-00001",)))
    result = verify(evidence, anchors=TrustAnchors.simulated(authority.roots_der), now=now)
    opinion = second_opinion(evidence, now, authority.root_der)
    assert (opinion.status, tuple(opinion.advisory_ids)) == (result.tcb_status, result.advisories)
    with pytest.raises(ValueError):
        second_opinion(evidence, now)


@pytest.mark.parametrize(
    "flaws",
    [Flaws(pck_revoked=True), Flaws(pck_ca_revoked=True), Flaws(age=40 * 86400), Flaws(fmspc=b"OTHER!")],
)
def test_second_opinion_refuses_what_we_refuse(flaws, make_evidence, authority, anchors, now):
    evidence = make_evidence(flaws=flaws)
    with pytest.raises(EvidenceRefused):
        verify(evidence, anchors=anchors, now=now)
    with pytest.raises(ValueError):
        second_opinion(evidence, now, authority.root_der)


@pytest.mark.parametrize("qe_status", ["UpToDate", "OutOfDate"])
@pytest.mark.parametrize("tcb_status", ["UpToDate", "SWHardeningNeeded", "ConfigurationNeeded", "OutOfDate"])
def test_merged_status_gets_the_same_second_opinion(
    tcb_status, qe_status, make_evidence, authority, anchors, now
):
    evidence = make_evidence(flaws=Flaws(tcb_status=tcb_status, qe_status=qe_status))
    result = verify(evidence, anchors=anchors, now=now)
    assert second_opinion(evidence, now, authority.root_der).status == result.tcb_status


def test_debug_evidence_says_so(make_evidence, anchors, now):
    assert verify(make_evidence(debug=True), anchors=anchors, now=now).debug


def test_result_can_be_printed_and_serialised(make_evidence, anchors, now):
    result = verify(make_evidence(), anchors=anchors, now=now)
    document = json.loads(json.dumps(result.to_dict()))
    assert document["measurements"]["mr_enclave"] == "65" * 32
    assert document["simulated"] is True
    assert len(document["steps"]) == 11
    assert "SIMULATED" in result.lines()[0]


def test_older_collateral_is_noticed(make_evidence, anchors, now):
    fresh = verify(make_evidence(), anchors=anchors, now=now)
    old = verify(make_evidence(flaws=Flaws(age=7200)), anchors=anchors, now=now)
    seen = CollateralMemory()
    seen.admit(fresh.collateral)
    seen.admit(fresh.collateral)
    with pytest.raises(EvidenceRefused) as caught:
        seen.admit(old.collateral)
    assert caught.value.code == "evidence.collateral-older"
    before = CollateralMemory(old.collateral)
    before.admit(fresh.collateral)
    assert before.marks == fresh.collateral


@pytest.mark.parametrize("older", [CollateralMark(issued=1, number=6), CollateralMark(issued=2, number=5)])
def test_either_mark_counts_and_a_refusal_leaves_no_mark(older):
    known = {"TCB info": CollateralMark(issued=2, number=6)}
    seen = CollateralMemory(known)
    with pytest.raises(EvidenceRefused):
        seen.admit({"PCK CRL": CollateralMark(issued=9, number=9), "TCB info": older})
    assert seen.marks == known


def test_measurements_do_not_change(make_evidence, anchors, now):
    result = verify(make_evidence(), anchors=anchors, now=now)
    with pytest.raises(TypeError):
        result.measurements["mr_enclave"] = b""  # type: ignore[index]
