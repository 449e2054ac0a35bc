"""Verification of evidence under pinned trust anchors, and appraisal under a policy (RFC 9334)."""

from __future__ import annotations

from cloister.core.evidence.bundle import Evidence
from cloister.core.verifier import dcap
from cloister.core.verifier.anchors import TrustAnchors
from cloister.core.verifier.result import VerifiedEvidence
from cloister.errors import EvidenceRefused

__all__ = ["TrustAnchors", "VerifiedEvidence", "verify"]


def verify(evidence: Evidence, *, anchors: TrustAnchors, now: int) -> VerifiedEvidence:
    """Verify evidence of any kind of TEE.

    Args:
        evidence: As it arrived; nothing in it is trusted before it is checked.
        anchors: What to believe without proof.
        now: Unix seconds.

    Raises:
        EvidenceError: something does not parse.
        EvidenceRefused: a check failed.
    """
    if evidence.tee == "sgx":
        return dcap.verify(evidence, anchors=anchors, now=now)
    raise EvidenceRefused(code="evidence.tee", claim="tee", expected="sgx", actual=evidence.tee)
