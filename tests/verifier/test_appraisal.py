"""Appraisal: one test per claim that can refuse, then what is accepted."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest

from cloister.core.verifier import TrustAnchors, verify
from cloister.core.verifier.appraisal import AppraisalPolicy, appraise
from cloister.errors import AppraisalRefused, EvidenceRefused
from cloister.sim.authority import FMSPC, Flaws


@pytest.fixture
def verified(make_evidence, anchors, now):
    def make(**changes):
        return verify(make_evidence(**changes), anchors=anchors, now=now)

    return make


def refused(verified, policy, now) -> AppraisalRefused:
    with pytest.raises(AppraisalRefused) as caught:
        appraise(verified, policy, now=now)
    error = caught.value
    assert error.claim
    assert error.expected != error.actual
    return error


def test_empty_policy_refuses_everything(verified, now):
    assert AppraisalPolicy().is_empty
    assert refused(verified(), AppraisalPolicy(), now).code == "appraisal.empty-policy"
    assert (
        refused(replace(verified(), simulated=False), AppraisalPolicy(), now).code == "appraisal.empty-policy"
    )


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"debug": True},
        {"flaws": Flaws(tcb_status="OutOfDate")},
        {"flaws": Flaws(advisories=("INTEL-SA-00001",))},
    ],
)
def test_production_policy_refuses_every_simulated_quote_first(changes, verified, make_evidence, policy, now):
    """Whatever else is wrong with it, and also if someone verified it under the simulated root before."""
    production = replace(policy, dangerous_simulated_roots=None)
    assert production.anchors == TrustAnchors.vendor()
    error = refused(verified(**changes), production, now)
    assert (error.code, error.claim) == ("appraisal.simulated", "simulated")
    assert (error.expected, error.actual) == ("False", "True")
    with pytest.raises(EvidenceRefused) as caught:
        verify(make_evidence(**changes), anchors=production.anchors, now=now)
    assert caught.value.code == "evidence.simulated"


def test_simulation_policy_refuses_genuine_evidence(verified, policy, now):
    genuine = replace(verified(), simulated=False, anchors_digest=TrustAnchors.vendor().digest)
    assert refused(genuine, policy, now).code == "appraisal.simulated"


def test_evidence_verified_under_another_root(verified, policy, other_authority, now):
    other = replace(policy, dangerous_simulated_roots=other_authority.roots_der)
    assert refused(verified(), other, now).code == "appraisal.trust-anchors"


def test_another_kind_of_tee(verified, policy, now):
    assert refused(replace(verified(), tee="tdx"), policy, now).code == "appraisal.tee"


def test_debug(verified, policy, now):
    assert refused(verified(debug=True), policy, now).code == "appraisal.debug"


def test_debug_that_only_the_attributes_show(verified, policy, now):
    found = verified(debug=True)
    assert refused(replace(found, debug=False), policy, now).code == "appraisal.debug"


@pytest.mark.parametrize(
    ("claim", "change"),
    [
        ("mr_enclave", {"mr_enclave": frozenset({b"x" * 32})}),
        ("mr_signer", {"mr_signer": frozenset({b"x" * 32})}),
        ("attributes", {"attributes": bytes([4]) + bytes(15)}),
        ("isv_prod_id", {"isv_prod_id": 8}),
        ("isv_svn", {"min_isv_svn": 4}),
        ("tcb-status", {"allowed_tcb": frozenset({"SWHardeningNeeded"})}),
        ("tcb-evaluation", {"min_tcb_evaluation": 0xFFFFFFFF}),
        ("platform", {"platforms": frozenset({b"OTHER!"})}),
        ("max-age", {"max_age": 1}),
    ],
)
def test_claim_that_the_policy_does_not_admit(claim, change, verified, policy, now):
    assert refused(verified(), replace(policy, **change), now).code == f"appraisal.{claim}"


def test_denied_advisory(verified, policy, now):
    found = verified(flaws=Flaws(advisories=("INTEL-SA-00001", "INTEL-SA-00002")))
    error = refused(found, replace(policy, denied_advisories=frozenset({"INTEL-SA-00002"})), now)
    assert (error.code, error.actual) == ("appraisal.advisories", "INTEL-SA-00002")


def test_result_that_has_expired(verified, policy, now):
    found = verified()
    assert refused(found, policy, found.not_after + 1).code == "appraisal.expired"


def test_collateral_from_the_future(verified, policy, now):
    assert refused(verified(), policy, now - 86400).code == "appraisal.max-age"


@pytest.mark.parametrize("name", ["mr_enclave", "mr_signer", "attributes", "isv_prod_id", "isv_svn"])
def test_measurement_that_is_absent(name, verified, policy, now):
    found = verified()
    partial = {key: value for key, value in found.measurements.items() if key != name}
    with pytest.raises(AppraisalRefused):
        appraise(replace(found, measurements=partial), policy, now=now)


def test_version_that_is_a_bool(verified, policy, now):
    found = verified()
    odd = {**found.measurements, "isv_svn": True}
    accepting = replace(policy, min_isv_svn=0)
    assert refused(replace(found, measurements=odd), accepting, now).code == "appraisal.isv_svn"
    odd = {**found.measurements, "isv_prod_id": True}
    accepting = replace(policy, isv_prod_id=1)
    assert refused(replace(found, measurements=odd), accepting, now).code == "appraisal.isv_prod_id"


def test_accepted(verified, policy, now):
    found = verified()
    result = appraise(found, policy, now=now)
    assert result.evidence is found
    assert result.policy_digest == policy.digest
    assert now <= result.not_after <= found.not_after
    assert [step.name for step in result.steps][:3] == ["simulated", "trust anchors", "tee"]
    assert json.loads(json.dumps(result.to_dict()))["policy"] == policy.digest.hex()
    assert any("accepted under policy" in line for line in result.lines())


def test_acceptance_ends_with_the_age(verified, policy, now):
    found = verified()
    result = appraise(found, replace(policy, max_age=7200), now=now)
    assert result.not_after == found.collateral_issued + 7200


def test_what_was_not_compared_is_noted(verified, policy, now):
    open_policy = replace(policy, platforms=frozenset(), any_platform=True, mr_signer=frozenset())
    notes = {
        step.name: step.detail
        for step in appraise(verified(), open_policy, now=now).steps
        if step.outcome == "note"
    }
    assert set(notes) == {"mr_signer", "platform"}
    assert FMSPC.hex() in notes["platform"]
