"""Real evidence under policies made of its own values: what no policy may admit is refused by its claim."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest
from dcap_mutations import load, ours
from snp_vectors import FOLDER as SNP_FOLDER
from snp_vectors import GOOD as SNP_GOOD
from snp_vectors import NOW as SNP_NOW
from test_nitro_vectors import DATA as NITRO_FOLDER
from test_nitro_vectors import DEBUG, READERS
from test_nitro_vectors import read as nitro

from cloister.core.evidence import Evidence
from cloister.core.evidence.nitro import NitroDocument
from cloister.core.verifier import TrustAnchors, verify
from cloister.core.verifier.appraisal import AppraisalPolicy, appraise
from cloister.core.verifier.claims import TD_DEBUG
from cloister.core.verifier.result import SnpPlatform, VerifiedEvidence
from cloister.errors import AppraisalRefused

FLAGS = {
    "DEBUG": "debug",
    "SEPT_VE_DISABLE=0": "sept_ve_disable",
    "MRSERVICETD!=0": "mr_service_td",
}


def policy_of(found: VerifiedEvidence, **changes: Any) -> AppraisalPolicy:
    """The policy that asks for exactly what the evidence says, as far as a policy may."""
    measured = found.measurements
    values: dict[str, Any]
    if found.tee == "sgx":
        clear = bytes([measured["attributes"][0] & ~2]) + measured["attributes"][1:]
        values = {
            "mr_enclave": frozenset({measured["mr_enclave"]}),
            "attributes": clear,
            "attributes_mask": b"\xff" * 16,
            "isv_prod_id": measured["isv_prod_id"],
        }
    elif found.tee == "tdx":
        bits = int.from_bytes(measured["td_attributes"], "little") & ~TD_DEBUG
        registers = ("mr_td", "rtmr0", "rtmr1", "rtmr2", "rtmr3", "mr_config_id")
        values = {name: frozenset({measured[name]}) for name in registers}
        values |= {"td_attributes": bits.to_bytes(8, "little"), "td_attributes_mask": b"\xff" * 8}
    elif found.tee == "snp":
        assert isinstance(found.platform, SnpPlatform)
        values = {
            "measurement": frozenset({measured["measurement"]}),
            "guest_policy": measured["guest_policy"] & ~(3 << 18),
            "guest_policy_mask": (1 << 64) - 1,
            "max_vmpl": min(measured["vmpl"], 3),
            "products": frozenset({found.platform.product}),
            "min_microcode": min(measured[f"{name}_tcb"][7] for name in ("reported", "launch", "committed")),
            "allow_vlek": found.platform.signer == "VLEK",
            "allow_missing_crl": True,
            "max_age": 366 * 86400,  # AMD dates its lists for a year
        }
    else:
        values = {f"pcr{index}": frozenset({measured[f"pcr{index}"]}) for index in range(3)}
    if found.tee in ("sgx", "tdx"):
        values |= {"allowed_tcb": frozenset({found.tcb_status}), "any_platform": True}
    return AppraisalPolicy(tee=found.tee, **{**values, **changes})


def claim_of(found: VerifiedEvidence, policy: AppraisalPolicy, now: int) -> str:
    """The claim that forbids it; empty where nothing does."""
    try:
        appraise(found, policy, now=now)
    except AppraisalRefused as error:
        return error.claim
    return ""


def test_every_real_quote(vectors):
    seen = set()
    for folder in sorted(vectors.iterdir()):
        if not (folder / "expected.json").exists():
            continue
        said, case = json.loads((folder / "expected.json").read_text()), load(folder)
        found = ours(case, TrustAnchors.vendor())
        if said["intel_qvl_rules_status"] is None:
            assert not isinstance(found, VerifiedEvidence)
            continue
        assert isinstance(found, VerifiedEvidence)
        expected = FLAGS[said["flags"][0]] if said["flags"] else ""
        assert claim_of(found, policy_of(found), case.now) == expected, folder.name
        strict = policy_of(found, allowed_tcb=frozenset({"UpToDate"}))
        if not expected:
            wanted = "" if found.tcb_status == "UpToDate" else "tcb status"
            assert claim_of(found, strict, case.now) == wanted
        seen.add(expected)
    assert seen == {"", *FLAGS.values()}


@pytest.mark.skipif(not SNP_FOLDER.is_dir(), reason="real SEV-SNP evidence is not on this machine")
@pytest.mark.parametrize("load_report", SNP_GOOD, ids=lambda load_report: load_report.__name__)
def test_every_real_report(load_report):
    found = verify(load_report(), anchors=TrustAnchors.vendor(), now=SNP_NOW)
    policy = policy_of(found)
    assert claim_of(found, policy, SNP_NOW) == ("debug" if found.debug else "")
    if not found.debug:
        without = replace(found, collateral_issued=None)
        assert claim_of(without, replace(policy, allow_missing_crl=False), SNP_NOW) == "revocation list"
        newer = replace(policy, min_microcode=policy.min_microcode + 1)
        assert claim_of(found, newer, SNP_NOW) in ("tcb", "launch tcb", "committed tcb")


@pytest.mark.skipif(not NITRO_FOLDER.is_dir(), reason="real Nitro evidence is not on this machine")
@pytest.mark.parametrize("name", sorted(READERS))
def test_every_real_document(name):
    raw = nitro(name)
    made = NitroDocument.from_bytes(raw).timestamp // 1000
    found = verify(
        Evidence(tee="nitro", quote=raw, collateral=None), anchors=TrustAnchors.vendor(), now=made + 60
    )
    expected = "debug" if name in DEBUG else ""
    assert claim_of(found, policy_of(found), made + 60) == expected
    if not expected:
        assert claim_of(found, policy_of(found, max_age=30), made + 60) == "max age"
        other = policy_of(found, pcr1=frozenset({b"x" * 48}))
        assert claim_of(found, other, made + 60) == "pcr1"
