"""Verification of evidence under pinned trust anchors, and appraisal under a policy (RFC 9334)."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Final, Protocol

from cloister.core.evidence.bundle import Evidence
from cloister.core.verifier import dcap, nitro, snp
from cloister.core.verifier.anchors import TrustAnchors
from cloister.core.verifier.result import Step, VerifiedEvidence


class _Verifier(Protocol):
    def __call__(
        self, evidence: Evidence, *, anchors: TrustAnchors, now: int, steps: list[Step] | None = None
    ) -> VerifiedEvidence: ...


__all__ = ["TrustAnchors", "VerifiedEvidence", "verify"]


def verify(
    evidence: Evidence, *, anchors: TrustAnchors, now: int, steps: list[Step] | None = None
) -> VerifiedEvidence:
    """Verify evidence of any kind of TEE.

    Args:
        evidence: As it arrived; nothing in it is trusted before it is checked.
        anchors: What to believe without proof.
        now: Unix seconds.
        steps: Gets every check as it is passed, so that a refusal shows how far it came.

    Raises:
        EvidenceError: something does not parse.
        EvidenceRefused: a check failed.
    """
    return _VERIFIERS[evidence.tee](evidence, anchors=anchors, now=now, steps=steps)


_VERIFIERS: Final[Mapping[str, _Verifier]] = MappingProxyType(
    {"sgx": dcap.verify, "tdx": dcap.verify, "snp": snp.verify, "nitro": nitro.verify}
)
